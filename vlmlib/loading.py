"""From a name, a folder or a hub id to a model that streams."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoTokenizer,
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)
from transformers.utils import logging as hf_logging

from .errors import CheckpointError, DeviceError
from .images import ImageProcessor
from .internvl import InternVL
from .llava import Llava, LlavaNext
from .model import VisionLanguageModel

DATA = Path(__file__).resolve().parent.parent / "data"
"""The repository's pictures and checkpoints."""

FAMILIES = {
    "llava": (Llava, LlavaForConditionalGeneration),
    "llava_next": (LlavaNext, LlavaNextForConditionalGeneration),
    "internvl": (InternVL, InternVLForConditionalGeneration),
}
"""config.json's model_type -> (vlmlib's class, transformers' class)."""

SMALL = 200e6
"""Bytes of weights up to which a CPU runs in float32, and loading shows no progress."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def load(
    checkpoint: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> VisionLanguageModel:
    """Load a model with its tokenizer and preprocessing, ready for `vlmlib.stream`.

    checkpoint  a model that ships with the repository ("tiny-llava"), a folder, or a hub id
    device      default: the GPU if there is one, else the CPU
    dtype       default: on a GPU the checkpoint's own; on a CPU float32 for small models (under
                200 MB of weights) and bfloat16 for large ones
    revision    commit, tag or branch of a hub id

    Only safetensors are read, and no code from the checkpoint is run.
    Raises CheckpointError and DeviceError.
    """
    folder = find_checkpoint(checkpoint, revision=revision)
    model_type = _read_config(folder).get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{folder}: config.json has model_type {model_type!r}, expected one of {list(FAMILIES)}"
        )
    family, net_class = FAMILIES[model_type]
    device = find_device(device)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    if not size:
        raise CheckpointError(f"{folder}: holds no *.safetensors file")
    if dtype is None:
        small = torch.float32 if size < SMALL else torch.bfloat16
        dtype = small if device.type == "cpu" else "auto"
    with _blaming(folder, "configuration and tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    with _blaming(folder, "configuration and weights"):
        net = _load_net(net_class, folder, dtype, quiet=size < SMALL)
    model = family(net.to(device), tokenizer, ImageProcessor.from_folder(folder))
    model.name = os.fspath(checkpoint)
    return model


def find_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or the GPU if there is one, else the CPU. Raises DeviceError."""
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=(found := torch.device(wanted)))
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).partition("\n")[0]
        raise DeviceError(f"device {str(wanted)!r} cannot be used here: {reason}") from None
    return found


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


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: holds no config.json") from None
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not readable as JSON ({e})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(config).__name__}")
    return config


def _load_net(net_class, folder: Path, dtype, *, quiet: bool):
    with _progress_bar(not quiet):
        net, report = net_class.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, with the missing and the unexpected
            output_loading_info=True,
        )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, report.get(what) or [])):
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise CheckpointError(f"{folder}: {len(keys)} {what.replace('_', ' ')}: {shown}")
    return net


@contextlib.contextmanager
def _blaming(folder: Path, what: str) -> Iterator[None]:
    """Whatever a library raises on a broken file becomes a CheckpointError with its first line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as e:
        first_line = next(iter(str(e).strip().splitlines()), "")
        raise CheckpointError(
            f"{folder}: {what} cannot be read ({type(e).__name__}: {first_line})"
        ) from e


@contextlib.contextmanager
def _progress_bar(shown: bool) -> Iterator[None]:
    """transformers' bar is one switch for the whole process: put it back as it was."""
    before = hf_logging.is_progress_bar_enabled()
    (hf_logging.enable_progress_bar if shown else hf_logging.disable_progress_bar)()
    try:
        yield
    finally:
        (hf_logging.enable_progress_bar if before else hf_logging.disable_progress_bar)()
