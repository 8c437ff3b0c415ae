"""From a name, a folder or a hub id to a model that streams."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoTokenizer,
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

from .checkpoint import SMALL, blaming, default_dtype, find_device, load_net, read_config
from .errors import CheckpointError, QuantizationError
from .fast import FastDecoder
from .images import ImageProcessor
from .internvl import InternVL
from .llava import Llava, LlavaNext
from .model import VisionLanguageModel
from .nvila import NVILA
from .nvila_checkpoint import is_nvila
from .quant import quantize_llm

DATA = Path(__file__).resolve().parent.parent / "data"
"""The repository's pictures and checkpoints."""

FAMILIES = {
    "llava": (Llava, LlavaForConditionalGeneration),
    "llava_next": (LlavaNext, LlavaNextForConditionalGeneration),
    "internvl": (InternVL, InternVLForConditionalGeneration),
}
"""config.json's model_type -> (vlmlib's class, transformers' class)."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def load(
    checkpoint: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    fast: bool | None = None,
    quant: str | None = None,
) -> VisionLanguageModel:
    """Load a model with its tokenizer and preprocessing, ready for `vlmlib.stream`.

    checkpoint  a model that ships with the repository ("tiny-llava"), a folder, or a hub id
    device      default: the GPU if there is one, else the CPU
    dtype       default: on a GPU the checkpoint's own; on a CPU float32 for small models (under
                200 MB of weights) and bfloat16 for large ones; bfloat16 for four-bit weights
    revision    commit, tag or branch of a hub id
    fast        False: transformers' modules take every step; True: it is an error if they must,
                since `vlmlib.fast` does not know the language model. The answers are the same.
    quant       "int4" rounds the language model to four bits, as `quantize_llm` does by default

    Four-bit language models are read as `quantize_llm` makes and `save_pretrained` saves them, and
    from AutoAWQ's GEMM format. Only safetensors are read, and no code from the checkpoint is run.
    Raises CheckpointError, DeviceError and QuantizationError.
    """
    if quant not in (None, "int4"):
        raise QuantizationError(f"quant must be None or 'int4', got {quant!r}")
    dtype = dtype or (torch.bfloat16 if quant else None)
    folder = find_checkpoint(checkpoint, revision=revision)
    config = read_config(folder)
    if is_nvila(folder, config):
        model = NVILA.load_pretrained(folder, device=device, dtype=dtype)
    else:
        model = _load_native(folder, config, device, dtype)
    model.name = os.fspath(checkpoint)
    model.fast = fast is not False
    if fast and not FastDecoder.supports(model.net):
        kind = type(model.net.get_decoder()).__name__
        raise CheckpointError(
            f"{checkpoint}: no fast steps for its language model, a {kind} with this "
            "configuration; load it with fast=None"
        )
    return quantize_llm(model) if quant else model


def load_pretrained_model(
    model_path: str | os.PathLike, model_base: str | None, model_name: str, **options
) -> tuple:
    """LLaVA's call: (tokenizer, model, image_processor, context_len); `options` are `load`'s.

    The layout of the checkpoint decides what it is, so `model_name` is only remembered as the
    model's name. Weights that need a `model_base` must be merged into it first: CheckpointError.
    Source: LLaVA:llava/model/builder.py.
    """
    if model_base is not None:
        raise CheckpointError(
            f"{model_path}: weights on top of a base ({model_base}) are not supported; merge them "
            "into it and load the merged folder with model_base=None"
        )
    model = load(model_path, **options)
    model.name = model_name
    return model.tokenizer, model, model.image_processor, model.context_len


def _load_native(folder: Path, config: dict, device, dtype) -> VisionLanguageModel:
    """A checkpoint in the layout of transformers' own class."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{folder}: config.json has model_type {model_type!r}, expected one of {list(FAMILIES)}"
        )
    family, net_class = FAMILIES[model_type]
    device = find_device(device)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    if not size:
        raise CheckpointError(f"{folder}: holds no *.safetensors file")
    dtype = dtype or default_dtype(size, device, config)
    with blaming(folder, "configuration and tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    with blaming(folder, "configuration and weights"):
        net = load_net(net_class, folder, dtype, quiet=size < SMALL)
    return family(net.to(device), tokenizer, ImageProcessor.from_folder(folder))


def shipped_models() -> list[str]:
    """Names of the checkpoints in the repository."""
    return sorted(p.parent.name for p in DATA.glob("checkpoints/*/config.json"))


def find_checkpoint(checkpoint: str | os.PathLike, *, revision: str | None = None) -> Path:
    """The folder of a shipped model, of a folder's name, or of a hub id (downloaded if need be)."""
    name = os.fspath(checkpoint)
    if name in shipped_models():
        return DATA / "checkpoints" / name
    if Path(name).is_dir():
        return Path(name)
    if HUB_ID.fullmatch(name) and not Path(name).exists():
        return _download(name, revision)
    raise CheckpointError(
        f"{name!r} is not a folder here, not a hub id (owner/name), and not a model that ships "
        f"with the repository: {shipped_models()}"
    )


def _download(name: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except Exception as e:
        raise CheckpointError(
            f"{name!r} is neither a folder here nor in the hub's cache, and it could not be "
            f"downloaded ({type(e).__name__}): check the name and the network, or download it "
            "elsewhere and give its folder"
        ) from e
