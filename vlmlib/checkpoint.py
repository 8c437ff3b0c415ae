"""What all loaders of checkpoints share: read, compare, and blame the folder for what is wrong.

Only safetensors are read, and no code from a checkpoint is run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from transformers.utils import logging as hf_logging

from .errors import CheckpointError, DeviceError
from .int4 import adopt_awq

SMALL = 200e6
"""Bytes of weights up to which a CPU runs in float32, and loading shows no progress."""


def find_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or the GPU if there is one, else the CPU. Raises DeviceError."""
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=(found := torch.device(wanted)))
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).partition("\n")[0]
        raise DeviceError(f"device {str(wanted)!r} cannot be used here: {reason}") from None
    return found


def default_dtype(size: float, device: torch.device, config: dict) -> torch.dtype | str:
    """What `size` bytes of weights run in if nobody says otherwise; "auto" is the checkpoint's.

    Four-bit ones in bfloat16: their kernels compute in nothing else.
    """
    if config.get("quantization_config"):
        return torch.bfloat16
    if device.type != "cpu":
        return "auto"
    return torch.float32 if size < SMALL else torch.bfloat16


def read_config(folder: Path) -> dict:
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


def load_net(net_class, folder: Path, dtype, *, quiet: bool, **options):
    """A network of transformers with exactly the folder's weights; `options` are its loader's."""
    config = options.pop("config", None) or net_class.config_class.from_pretrained(folder)
    adopt_awq(config)
    with _progress_bar(not quiet):
        net, report = net_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, with the missing and the unexpected
            output_loading_info=True,
            **options,
        )
    check_keys(folder, report)
    return net


def save_net(net, folder: Path) -> None:
    """Weights and configuration, as transformers writes them."""
    size = sum(t.nbytes for t in net.state_dict().values())
    with _progress_bar(size > SMALL):
        net.save_pretrained(folder)


def check_keys(folder: Path, report: Mapping[str, Collection]) -> None:
    """Raise CheckpointError if any keys are missing, unexpected or of another shape."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, report.get(what) or [])):
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise CheckpointError(f"{folder}: {len(keys)} {what.replace('_', ' ')}: {shown}")


@contextlib.contextmanager
def blaming(folder: Path, what: str) -> Iterator[None]:
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
