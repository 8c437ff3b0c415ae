"""vlmlib: streamed inference in vision-language models, step by step.

    model = vlmlib.load("tiny-llava")
    for chunk in vlmlib.stream(model, [image, "What is left of the red circle?"]):
        print(chunk["delta"], end="")

Axes are named alike in every docstring:

    b  batch          n  tokens (positions in a sequence)     v  vocabulary
    t  tiles          c  channels of a picture or a feature   d  width of the language model
    h, w  rows and columns, of pixels or of patches
"""

from .cache import KVCache
from .decoding import TokenTrace, decode
from .errors import (
    CacheError,
    CheckpointError,
    ContextLengthError,
    GenParamsError,
    ImageError,
    NonFiniteLogitsError,
    PlaceholderError,
    VlmError,
)
from .images import ImageProcessor, load_image, pad_to_square, process_images
from .llava import Llava, LlavaStreamGenerator
from .loading import DATA, load, shipped_models
from .model import VisionLanguageModel
from .sampling import GenParams, prepare_logits_processor
from .streaming import TimeStats, answer, stream, stream_output
from .tokenization import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
    escape_special_tokens,
    tokenizer_image_token,
)

__all__ = [
    "DATA",
    "IGNORE_INDEX",
    "IMAGE_TOKEN",
    "IMAGE_TOKEN_INDEX",
    "CacheError",
    "CheckpointError",
    "ContextLengthError",
    "GenParams",
    "GenParamsError",
    "ImageError",
    "ImageProcessor",
    "KVCache",
    "Llava",
    "LlavaStreamGenerator",
    "NonFiniteLogitsError",
    "PlaceholderError",
    "TimeStats",
    "TokenTrace",
    "VisionLanguageModel",
    "VlmError",
    "answer",
    "decode",
    "escape_special_tokens",
    "load",
    "load_image",
    "pad_to_square",
    "prepare_logits_processor",
    "process_images",
    "shipped_models",
    "stream",
    "stream_output",
    "tokenizer_image_token",
]
