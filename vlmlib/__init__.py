"""vlmlib: streamed inference in vision-language models, step by step.

    model = vlmlib.load("tiny-llava")
    for chunk in vlmlib.stream(model, [image, "What is left of the red circle?"]):
        print(chunk["delta"], end="", flush=True)

Axes are named alike in every docstring:

    b  batch          n  tokens (positions in a sequence)     v  vocabulary
    t  tiles          c  channels of a picture or a feature   d  width of the language model
    h, w  rows and columns, of pixels or of patches
"""

from .budget import image_tokens
from .cache import KVCache
from .chat import Chat
from .chessboard import (
    merge_chessboard,
    merge_features_for_dynamic_s2,
    pixel_shuffle,
    space_to_depth,
    split_chessboard,
)
from .conversation import Conversation, conv_templates
from .decoding import TokenTrace, decode
from .errors import (
    CacheError,
    CheckpointError,
    ContextLengthError,
    DeviceError,
    GenParamsError,
    ImageError,
    NonFiniteLogitsError,
    PlaceholderError,
    PromptError,
    ShapeError,
    VideoError,
    VlmError,
)
from .fusion import prepare_inputs_labels_for_multimodal
from .images import ImageProcessor, load_image, pad_to_square
from .internvl import (
    IMG_CONTEXT_TOKEN,
    IMG_END_TOKEN,
    IMG_START_TOKEN,
    NUM_IMAGE_TOKEN,
    InternVL,
    InternVLStreamGenerator,
)
from .llava import Llava, LlavaNext, LlavaStreamGenerator, process_images
from .loading import DATA, load, load_pretrained_model, memory_estimate, shipped_models
from .media import Medium, Video
from .model import VisionLanguageModel
from .nvila import NVILA, NVILAStreamGenerator
from .nvila_causal import LlavaMetaForCausalLM
from .nvila_checkpoint import NVILAConfig
from .nvila_model import LlavaMetaModel
from .projectors import build_projector, projected_side
from .sampling import GenParams, prepare_logits_processor
from .streaming import TimeStats, answer, stream, stream_output
from .tiling import (
    anyres_tiles,
    anyres_tokens,
    dynamic_preprocess,
    dynamic_s2_preprocess,
    dynamic_s2_tiles,
    dynamic_s2_tokens,
    dynamic_tiles,
    find_closest_aspect_ratio,
    get_anyres_image_grid_shape,
    merge_anyres,
    select_best_resolution,
    tile_grids,
    unpad_image,
)
from .tokenization import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
    escape_special_tokens,
    tokenizer_image_token,
)
from .video import get_index, load_video, uniform_indices

__all__ = [
    "DATA",
    "IGNORE_INDEX",
    "IMAGE_TOKEN",
    "IMAGE_TOKEN_INDEX",
    "IMG_CONTEXT_TOKEN",
    "IMG_END_TOKEN",
    "IMG_START_TOKEN",
    "NUM_IMAGE_TOKEN",
    "CacheError",
    "Chat",
    "Conversation",
    "conv_templates",
    "CheckpointError",
    "ContextLengthError",
    "DeviceError",
    "GenParams",
    "GenParamsError",
    "ImageError",
    "ImageProcessor",
    "InternVL",
    "InternVLStreamGenerator",
    "KVCache",
    "Llava",
    "LlavaMetaForCausalLM",
    "LlavaMetaModel",
    "LlavaNext",
    "LlavaStreamGenerator",
    "Medium",
    "NVILA",
    "NVILAConfig",
    "NVILAStreamGenerator",
    "NonFiniteLogitsError",
    "PlaceholderError",
    "PromptError",
    "ShapeError",
    "TimeStats",
    "TokenTrace",
    "Video",
    "VideoError",
    "VisionLanguageModel",
    "VlmError",
    "answer",
    "anyres_tiles",
    "anyres_tokens",
    "build_projector",
    "decode",
    "dynamic_preprocess",
    "dynamic_s2_preprocess",
    "dynamic_s2_tiles",
    "dynamic_s2_tokens",
    "dynamic_tiles",
    "escape_special_tokens",
    "find_closest_aspect_ratio",
    "get_anyres_image_grid_shape",
    "get_index",
    "image_tokens",
    "load",
    "load_image",
    "load_pretrained_model",
    "load_video",
    "memory_estimate",
    "merge_anyres",
    "merge_chessboard",
    "merge_features_for_dynamic_s2",
    "pad_to_square",
    "pixel_shuffle",
    "prepare_inputs_labels_for_multimodal",
    "prepare_logits_processor",
    "process_images",
    "projected_side",
    "select_best_resolution",
    "shipped_models",
    "space_to_depth",
    "split_chessboard",
    "stream",
    "stream_output",
    "tile_grids",
    "tokenizer_image_token",
    "uniform_indices",
    "unpad_image",
]
