"""From a name, a folder or a hub id to a model that streams."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode, snapshot_download
from transformers import PreTrainedModel

from .checkpoint import (
    Origin,
    Progress,
    Weights,
    blaming,
    check_depth,
    check_dtype,
    check_layers,
    check_links,
    check_ratio,
    default_dtype,
    fill,
    find_device,
    finish,
    in_one_line,
    is_tied,
    load_tokenizer,
    memory_by_part,
    read_config,
    renamed,
    stored_weights,
    without_code,
)
from .errors import CheckpointError, QuantizationError
from .fast import FastDecoder
from .images import ImageProcessor
from .int4 import Int4Config, expect_int4, unpack_net
from .layouts import FAMILIES, LAYOUTS, Layout
from .model import VisionLanguageModel
from .nvila import NVILA
from .nvila_checkpoint import nvila_weights
from .quant import quantize_llm

DATA = Path(__file__).resolve().parent.parent / "data"
"""The repository's pictures and checkpoints."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")
PICKLES = ("*pytorch_model*.bin",)
"""Of a hub id; these only if it has no safetensors."""


def load(
    checkpoint: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    fast: bool | None = None,
    quant: str | None = None,
) -> VisionLanguageModel:
    """Load a model with its tokenizer and preprocessing, ready for `vlmlib.stream`.

    checkpoint  a model that ships with the repository ("tiny-llava"), a folder, or a hub id
    device      default: the GPU if there is one, else the CPU
    dtype       default: on a GPU the checkpoint's own; on a CPU float32 for small models (under
                200 MB of weights) and bfloat16 for large ones; bfloat16 for four-bit weights
    revision    commit, tag or branch of a hub id
    progress    told (bytes read, bytes in all) while weights are read; a download has the bars of
                huggingface_hub, and nothing else is shown
    fast        False: transformers' modules take every step; True: it is an error if they must,
                since `vlmlib.fast` does not know the language model. They differ by rounding only.
    quant       "int4" rounds the language model to four bits, as `quantize_llm` does by default

    What a folder is shows by its files and keys, whatever its name: transformers' LLaVA-1.5 and
    1.6 and InternVL3, the original ones of these three, and both layouts of NVILA. Language models
    may have four-bit weights as `quantize_llm` makes and `save_pretrained` saves them, or in
    AutoAWQ's GEMM format. No code from a checkpoint is run. Nothing is read of weights that do not
    fit the configuration, or that have no room on the device; `memory_estimate` tells how much they
    need.
    Raises CheckpointError, DeviceError and QuantizationError.
    """
    check_dtype(dtype)
    if quant not in (None, "int4"):
        raise QuantizationError(f"quant must be None or 'int4', got {quant!r}")
    dtype = dtype or (torch.bfloat16 if quant else None)
    folder = _checked(find_checkpoint(checkpoint, revision=revision))
    if nvila_weights(folder) is None:
        model = _load(_open(folder), find_device(device), dtype, progress)
    else:
        model = NVILA.load_pretrained(folder, device=device, dtype=dtype, progress=progress)
    model.name = os.fspath(checkpoint)
    model.fast = fast is not False
    if fast and not FastDecoder.supports(model.net):
        kind = type(model.net.get_decoder()).__name__
        raise CheckpointError(
            f"{checkpoint}: no fast steps for its language model, a {kind} with this "
            "configuration; load it with fast=None"
        )
    return quantize_llm(model) if quant else model


def memory_estimate(
    checkpoint: str | os.PathLike,
    dtype: torch.dtype | None = None,
    *,
    revision: str | None = None,
) -> dict[str, int]:
    """Bytes of {"language_model", "vision_tower", "projector"} in `dtype`, or as they are stored.

    It reads no weights, but their files must be here or are downloaded. What an answer takes
    besides (key/value cache, activations) is not in it. Raises CheckpointError.
    """
    check_dtype(dtype)
    folder = _checked(find_checkpoint(checkpoint, revision=revision))
    return memory_by_part(nvila_weights(folder) or _open(folder).weights, dtype)


def load_pretrained_model(
    model_path: str | os.PathLike, model_base: str | None, model_name: str, **options
) -> tuple:
    """LLaVA's call: (tokenizer, model, image_processor, context_len); `options` are `load`'s.

    The layout of the checkpoint decides what it is, so `model_name` is only remembered as the
    model's name. Raises what `load` raises, and CheckpointError for weights that need a
    `model_base`: they must be merged into it first.
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


@dataclass(frozen=True, slots=True)
class _Opened:
    """A checkpoint of LLaVA or InternVL of which no weight is read yet.

    tower   the folder of its tower, if that is another checkpoint
    """

    folder: Path
    config: dict[str, Any]
    layout: Layout
    weights: Weights
    tower: Path | None = None


def _open(folder: Path) -> _Opened:
    config, stored = read_config(folder), stored_weights(folder)
    fits = (x for x in LAYOUTS.values() if any(re.search(x.marker, key) for key in stored))
    layout = next(fits, LAYOUTS["transformers"])
    with blaming(folder, "configuration"):
        layout.check(config)
    weights, tower = renamed(stored, layout.renames), None
    if layout.tower:
        lacking = not any(name.startswith("vision_tower.") for name in weights)
        tower = _find_tower(folder, config.get(layout.tower), FILES if lacking else FILES[:1])
        if lacking:
            theirs = stored_weights(tower).items()
            weights |= renamed({f"vision_tower.{key}": weight for key, weight in theirs})
    return _Opened(folder, config, layout, weights, tower)


def _find_tower(folder: Path, name: Any, files: Sequence[str]) -> Path:
    """A folder inside the checkpoint's, or a hub id: nothing else that a configuration names."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(
            f"{folder}: config.json has its vision tower at {name!r}, expected a folder inside "
            "this one, or a hub id: put it there and name it so"
        )
    found = folder / name
    if not found.is_dir():
        found, folder = _download(name, None, files, f"put it into {found}"), None
    return _checked(found, folder)


def _checked(folder: Path, root: Path | None = None) -> Path:
    """A folder with a config.json and no links that lead out."""
    check_links(folder, root)
    read_config(folder)
    return folder


def _load(opened: _Opened, device, dtype, progress) -> VisionLanguageModel:
    folder, layout, weights = opened.folder, opened.layout, opened.weights
    with blaming(folder, "configuration"):
        tower = read_config(opened.tower) if opened.tower else {}
        for values in (opened.config, tower):
            check_depth(values, weights)
        config = layout.translate(without_code(opened.config), without_code(tower))
        text, vision = config.text_config, config.vision_config
        check_layers(config.vision_feature_layer, vision.num_hidden_layers)
        check_ratio(getattr(config, "downsample_ratio", 1))
        config.tie_word_embeddings = text.tie_word_embeddings = is_tied(weights)
        if vision.model_type == "siglip_vision_model":
            vision.vision_use_head = False  # nobody reads it
        int4 = Int4Config.of(opened.config)
    dtype = dtype or default_dtype(weights, device, int4)
    config.dtype = text.dtype = vision.dtype = dtype
    family, net_class = FAMILIES[config.model_type]
    tokenizer = load_tokenizer(folder)
    processor = ImageProcessor.from_folder(opened.tower or folder)
    with blaming(folder, "preprocessing"):
        processor.check_size(vision.image_size)

    def make() -> PreTrainedModel:
        return expect_int4(net_class(config), int4)

    net = unpack_net(fill(folder, make, weights, device, dtype, progress), int4)
    finish(net, folder)
    model = family(net, tokenizer, processor)
    if layout.settle:
        with blaming(folder, "configuration"):
            layout.settle(model, opened.config)
        folders = {"": (folder, opened.config)}
        if opened.tower:
            folders[opened.config[layout.tower]] = opened.tower, tower
        model.origin = Origin(weights, folders, layout.settings)
    return model


def shipped_models() -> list[str]:
    """Names of the checkpoints in the repository."""
    return sorted(p.parent.name for p in DATA.glob("checkpoints/*/config.json"))


def find_checkpoint(checkpoint: str | os.PathLike, *, revision: str | None = None) -> Path:
    """The folder of a shipped model, of a folder's name, or of a hub id (downloaded if need be)."""
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise CheckpointError(f"expected the name of a checkpoint, got {checkpoint!r}")
    name = os.fspath(checkpoint)
    if name in shipped_models():
        return DATA / "checkpoints" / name
    if os.path.isdir(name):
        return Path(name)
    if HUB_ID.fullmatch(name) and not os.path.exists(name):
        return _download(name, revision)
    raise CheckpointError(
        f"{name!r} is not a folder here, not a hub id (owner/name), and not a model that ships "
        f"with the repository: {shipped_models()}"
    )


def _download(
    name: str,
    revision: str | None,
    files: Sequence[str] = FILES,
    instead: str = "give its folder",
) -> Path:
    ask = partial(snapshot_download, name, local_files_only=is_offline_mode())
    try:
        found = Path(ask(revision=revision, allow_patterns=files))
        if files == FILES and not any(found.rglob("*.safetensors")):
            ask(revision=found.name, allow_patterns=[*files, *PICKLES])
    except Exception as e:
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else in_one_line(e)
        raise CheckpointError(
            f"{name!r} is neither a folder here nor in the hub's cache, and it could not be "
            f"downloaded ({why}): check the name and the network, or download it "
            f"elsewhere and {instead}"
        ) from e
    return found
