"""What the files of a checkpoint hold, and how it gets into a network: one way for all layouts.

Nothing from a checkpoint is ever run: weights are safetensors, or pickles read with
`weights_only=True`, and every name of a file stays inside the checkpoint's folder. Names, shapes
and memory are checked before any weight is read; each is read once, straight to its device.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.utils import logging as hf_logging

from .errors import CheckpointError, DeviceError
from .int4 import Int4Config

SMALL = 200e6
"""Bytes of weights up to which a CPU runs in float32."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U8": torch.uint8,
}
"""safetensors' names of what weights may be stored in."""

Renames = Sequence[tuple[str, str]]
"""(regular expression, replacement), applied in this order. Where a replacement holds {q,k,v}, the
tensor is cut into as many equal parts along its rows."""

CANONICAL: Renames = (
    (r"^model\.", ""),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "language_model."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
)
"""Checkpoints of several generations of transformers, and its networks themselves, differ in these:
two names mean one weight if they become the same."""

OPTIONAL = re.compile(
    r"position_ids$|rotary_emb\.inv_freq$|^vision_tower\.(head|post_layernorm|text_model"
    r"|text_projection|visual_projection|logit_scale)\b"
)
"""Weights that no layout needs: they may be there or not."""

CODE = re.compile(r"auto_map|_?(attn|experts)_implementation(_internal)?")
"""Entries of a config.json, at any depth, that name code for transformers to fetch and run."""

PARTS = {
    "language_model": ("language_model", "lm_head", "llm"),
    "vision_tower": ("vision_tower",),
    "projector": ("multi_modal_projector", "mm_projector", "image_newline"),
}

TOKENIZERS = {
    "tokenizer.json": PreTrainedTokenizerFast,
    "vocab.json": Qwen2Tokenizer,
    "tokenizer.model": LlamaTokenizer,
}
"""File -> what reads it; where there are several, the first counts."""

CGROUP = Path("/sys/fs/cgroup")
"""Where a container finds its limits. Source: linux:Documentation/admin-guide/cgroup-v2.rst."""

SHOWN = 10
"""Keys that an error lists of each kind; of the others it tells the number."""

Progress = Callable[[int, int], None]
"""Told (bytes read, bytes in all) at first and after every tensor."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file, not read yet; without `dtype` it is of none that weights have."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @property
    def is_float(self) -> bool:
        return self.dtype is not None and self.dtype.is_floating_point

    def nbytes(self, dtype: torch.dtype | None = None) -> int:
        """As it is stored, or with floating point numbers in another type."""
        dtype = (self.is_float and dtype) or self.dtype or torch.uint8
        return prod(self.shape) * dtype.itemsize


Weights = dict[str, Stored]
"""By key; by canonical name, once they are renamed."""


# ---- files ----


def read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: holds no {path.name}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not readable as JSON ({e})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(config).__name__}")
    return config


def write_json(path: Path, config: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")


def without_code(config: Any) -> Any:
    """A copy of a configuration, without what would make transformers fetch and run code."""
    if isinstance(config, dict):
        return {k: without_code(v) for k, v in config.items() if not CODE.fullmatch(k)}
    return [without_code(v) for v in config] if isinstance(config, list) else config


def check_links(folder: Path, root: Path | None = None) -> None:
    """Raise CheckpointError for what is in `folder` by a link out of it (or of `root`, which it is
    in), but for the links of the hub's cache (`snapshots/REVISION`), which lead to its `blobs`.
    """
    homes = [(root or folder).resolve()]
    if homes[0].parent.name == "snapshots":
        homes.append((homes[0].parent.parent / "blobs").resolve())
    for path in chain(folder.glob("*"), folder.glob("*/*")):
        with blaming(path, "link"):
            if not any(path.resolve().is_relative_to(home) for home in homes):
                raise CheckpointError(f"{path}: a link that leads out of the checkpoint's folder")


def holds_weights(folder: Path) -> bool:
    return any(chain(folder.glob("*.safetensors"), folder.glob("pytorch_model*.bin")))


def stored_weights(folder: Path) -> Weights:
    """All tensors of a folder by key; only headers are read. Raises CheckpointError."""
    stored = {}
    for path in _weight_files(folder):
        if not os.path.isfile(path):
            raise CheckpointError(f"{folder}: the weights cannot be read: {path.name} is missing")
        with blaming(path, "weights"):
            found = (_read_header if path.suffix == ".safetensors" else _read_pickle)(path)
        if twice := stored.keys() & found.keys():
            raise CheckpointError(f"{path}: holds keys of another file again: {_listed(twice)}")
        stored |= found
    return stored


def _weight_files(folder: Path) -> list[Path]:
    """What is there: one file, or those that an index names; safetensors rather than pickles."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            return [folder / shard for shard in _shards(index)]
    raise CheckpointError(
        f"{folder}: holds neither model.safetensors nor pytorch_model.bin, nor an index of several"
    )


def _shards(index: Path) -> list[str]:
    places = read_json(index).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else [places]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise CheckpointError(f"{index}: names {name!r}, which is not a file of its folder")
    return sorted(set(names))


def _read_header(path: Path) -> Weights:
    with safe_open(path, "pt") as f:  # refuses headers that claim more than the file holds
        slices = {key: f.get_slice(key) for key in f.keys()}  # noqa: SIM118
        return {
            key: Stored(path, key, tuple(s.get_shape()), DTYPES.get(s.get_dtype()))
            for key, s in slices.items()
        }


def _read_pickle(path: Path) -> Weights:
    known = DTYPES.values()
    return {
        key: Stored(path, key, tuple(t.shape), t.dtype if t.dtype in known else None)
        for key, t in _unpickle(path).items()
    }


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Tensors that are mapped into memory, and read when they are used."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as e:
        what = re.search(r"GLOBAL (\S+)", str(e))
        raise CheckpointError(
            f"{path}: refused, because a pickle can run code when it is opened, and this one holds "
            f"more than tensors{f': {what[1]}' if what else ''}"
        ) from None
    tensors = found.items() if isinstance(found, dict) else [(None, found)]
    for key, t in tensors:
        if not isinstance(key, str) or not isinstance(t, Tensor):
            raise CheckpointError(f"{path}: expected tensors by name, got {type(t).__name__}")
        if t.layout is not torch.strided or t.nbytes > t.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {key} claims to be larger than what the file holds")
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Callable[[str], Tensor]]:
    """key -> tensor, mapped from the file."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as f:
            yield f.get_tensor
    else:
        yield _unpickle(path).__getitem__


# ---- names ----


def canonical(name: str, renames: Renames = ()) -> str:
    """The name that a key of a checkpoint, or a weight of a network, has in common with others."""
    for pattern, replacement in (*renames, *CANONICAL):
        name = re.sub(pattern, replacement, name)
    return name


def renamed(stored: Weights, renames: Renames = ()) -> Weights:
    """By canonical name. Raises CheckpointError for two keys that mean one weight."""
    names = {key: canonical(key, renames) for key in stored}
    for name, n in Counter(names.values()).items():
        if n > 1 and not OPTIONAL.search(name):
            keys = [key for key in names if names[key] == name]
            raise CheckpointError(f"{stored[keys[0]].path.parent}: {keys} are one and the same")
    return {names[key]: weight for key, weight in stored.items()}


def is_tied(weights: Weights) -> bool:
    """A language model without a head of its own uses its embeddings."""
    return not any(re.match(r"(llm\.)?lm_head\.", name) for name in weights)


Rows = tuple[Stored, int, int]
"""The i-th of n equal parts of a tensor."""


def _plan(folder: Path, net: nn.Module, weights: Weights) -> dict[str, Rows]:
    """Name in the network -> what it gets. Raises CheckpointError."""
    rows, out_of_place = {}, {}
    for name, weight in weights.items():
        before, *choice = re.split(r"\{(.*)\}", name)
        parts = [before + p + choice[1] for p in choice[0].split(",")] if choice else [name]
        rows |= {part: (weight, i, len(parts)) for i, part in enumerate(parts)}
    own = {canonical(name): (name, w) for name, w in net.state_dict().items()}
    if is_tied(weights):
        own = {name: w for name, w in own.items() if not re.match(r"(llm\.)?lm_head\.", name)}
    for name in own.keys() & rows.keys():
        (weight, _, n), expected = rows[name], own[name][1]
        whole = (len(expected) * n, *expected.shape[1:]) if n > 1 else tuple(expected.shape)
        if expected.is_floating_point() and not weight.is_float:
            out_of_place[weight.key] = f"{weight.key} (not floating point)"
        elif not expected.is_floating_point() and weight.dtype != expected.dtype:
            out_of_place[weight.key] = f"{weight.key} (not {expected.dtype})"
        elif weight.shape != whole:
            out_of_place[weight.key] = f"{weight.key} {weight.shape}, expected {whole}"
    report = {
        "missing": {n for n in own.keys() - rows.keys() if not OPTIONAL.search(n)},
        "unexpected": {rows[n][0].key for n in rows.keys() - own.keys() if not OPTIONAL.search(n)},
        "mismatched": out_of_place.values(),
    }
    wrong = [f"{len(keys)} {what} keys: {_listed(keys)}" for what, keys in report.items() if keys]
    if wrong:
        raise CheckpointError(f"{folder}: {'; '.join(wrong)}")
    return {own[name][0]: rows[name] for name in own.keys() & rows.keys()}


def _listed(keys: Collection[str]) -> str:
    more = len(keys) - SHOWN
    return ", ".join(sorted(keys)[:SHOWN]) + (f" and {more} more" if more > 0 else "")


# ---- memory ----


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises CheckpointError for what no network runs in."""
    known = torch.float64, torch.float32, torch.float16, torch.bfloat16
    if dtype is not None and dtype not in known:
        raise CheckpointError(f"dtype must be one of {known}, got {dtype!r}")


def as_device(name: str | torch.device) -> torch.device:
    """Raises DeviceError for what is no device's name."""
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as e:
        reason = str(e).partition("\n")[0]
        raise DeviceError(f"device {str(name)!r} cannot be used here: {reason}") from None


def find_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or the GPU if there is one, else the CPU. Raises DeviceError."""
    found = as_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if found.type == "meta":
        raise DeviceError("device 'meta' cannot be used here: it holds no numbers")
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).partition("\n")[0]
        raise DeviceError(f"device {str(found)!r} cannot be used here: {reason}") from None
    return found


def default_dtype(
    weights: Weights, device: torch.device, int4: Int4Config | None = None
) -> torch.dtype:
    """What to run in if nobody says otherwise: kernels for four-bit weights want bfloat16."""
    if int4:
        return torch.bfloat16
    sizes = Counter()
    for weight in weights.values():
        if weight.is_float:
            sizes[weight.dtype] += weight.nbytes()
    if device.type == "cpu":
        return torch.float32 if sum(sizes.values()) < SMALL else torch.bfloat16
    return max(sizes, key=sizes.get, default=torch.float32)


def memory_by_part(weights: Weights, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Bytes that the weights take, in `dtype` or as they are stored."""
    groups = {name: part for part, names in PARTS.items() for name in names}
    sizes = dict.fromkeys(PARTS, 0)
    for name, weight in weights.items():
        if (group := name.partition(".")[0]) in groups and not OPTIONAL.search(name):
            sizes[groups[group]] += weight.nbytes(dtype)
    return sizes


def free_memory(device: torch.device) -> float:
    """Bytes; infinite where nothing tells."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if device.type in ("cpu", "mps"):
        return min(psutil.virtual_memory().available, _left_in_container())
    return float("inf")


def _left_in_container() -> float:
    """Bytes up to the limit of a Linux container, which psutil does not know."""
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = dict(map(str.split, (CGROUP / "memory.stat").read_text().splitlines()))
        return limit - int(used["anon"])
    except (OSError, ValueError, KeyError):  # no container, or one without a limit
        return float("inf")


def check_memory(folder: Path, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
    """Raise CheckpointError if there is no room for the weights, with what there is room for."""
    free, half = free_memory(device), torch.bfloat16
    need, small = (sum(memory_by_part(weights, d).values()) for d in (dtype, half))
    if need <= free:
        return
    most = free / half.itemsize / 1e9
    advice = f"free some, or take a model of at most {most:.2f} billion weights"
    if small <= free:
        advice = f"dtype={half} would fit, with {told(small)}"
    elif small <= free_memory(torch.device("cpu")):
        advice = f"device='cpu' with dtype={half} would fit, with {told(small)}"
    raise CheckpointError(
        f"{folder}: its weights take {told(need)} in {dtype}, and of {device}'s memory "
        f"{told(free)} are free: {advice}"
    )


def told(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


# ---- a network ----


COUNTS = ("max_position_embeddings", "num_attention_heads", "num_key_value_heads")
"""Weights may fit negative ones."""


def check_depth(config: Mapping[str, Any], weights: Weights) -> None:
    """Raise CheckpointError for numbers with which no network can run, and for more layers than
    there are weights: to make them takes for ever.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_depth(value, weights)
        elif name in COUNTS and value is not None and not (type(value) is int and value >= 1):
            raise CheckpointError(f"{name} is {value!r}, expected a whole number >= 1")
        elif name == "num_hidden_layers" and isinstance(value, int) and value > len(weights):
            raise CheckpointError(f"{value} layers, but there are only {len(weights)} weights")


def check_layers(layers: int | Sequence[int], depth: int) -> None:
    """Raise CheckpointError if a vision tower of this depth has not these hidden states."""
    for layer in [layers] if isinstance(layers, int) else layers:
        if not -depth - 1 <= layer <= depth:
            raise CheckpointError(f"asks for layer {layer} of a vision tower of {depth} layers")


def check_ratio(ratio: float) -> None:
    """Raise CheckpointError for what cannot be the part of a tile's side that is left of it."""
    if not 0.01 <= ratio <= 1:
        raise CheckpointError(f"downsample_ratio is {ratio!r}, expected a number from 0.01 to 1")


def fill(
    folder: Path,
    make: Callable[[], nn.Module],
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> nn.Module:
    """The network that `make` gives, with exactly these weights (by canonical name).

    Raises CheckpointError with the keys that are missing, unexpected or of another shape, or if
    there is no room; until then nothing was allocated.
    """
    with blaming(folder, "configuration"), torch.device("meta"):
        net = make()
    plan = _plan(folder, net, weights)
    check_memory(folder, weights, device, dtype)
    done, total = 0, sum(weight.nbytes() // n for weight, _, n in plan.values())
    progress = progress or (lambda done, total: None)
    progress(done, total)
    for path in sorted({weight.path for weight, _, _ in plan.values()}):
        state = {}
        for name, tensor in _read(path, plan):
            kept = dtype if tensor.is_floating_point() else tensor.dtype
            state[name] = tensor.to(device, kept, copy=True)  # the file may change later
            done += tensor.nbytes
            progress(done, total)
        net.load_state_dict(state, strict=False, assign=True)
    net.load_state_dict(_unused(net, device, dtype), strict=False, assign=True)
    _real_buffers(net, device)
    return net.eval()


def _read(path: Path, plan: Mapping[str, Rows]) -> Iterator[tuple[str, Tensor]]:
    """What one file has for the network, by the network's names; mapped, not copied."""
    with blaming(path, "weights"), _opened(path) as get:
        for name, (weight, i, n) in plan.items():
            if weight.path == path:
                yield name, get(weight.key).chunk(n)[i]


def _unused(net: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights that a network has but never uses, where no file holds them: those of a norm."""
    return {
        name: torch.full(w.shape, float(name.endswith("weight")), dtype=dtype, device=device)
        for name, w in net.state_dict().items()
        if w.is_meta and OPTIONAL.search(canonical(name))
    }


def _real_buffers(net: nn.Module, device: torch.device) -> None:
    """What no file holds, as the angles of rotary embeddings: by making its small module again."""
    for module in net.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            with torch.random.fork_rng(devices=[]):  # a module begins with random weights
                made = type(module)(module.config)
            for name, buffer in made.named_buffers(recurse=False):
                module.register_buffer(name, buffer.to(device), persistent=False)


def save_net(net: PreTrainedModel, folder: Path) -> None:
    """Weights and configuration as transformers writes them, without its progress bar."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        net.save_pretrained(folder)
    finally:
        if shown:
            hf_logging.enable_progress_bar()


@dataclass(frozen=True, slots=True)
class Origin:
    """How a network lay in a checkpoint, to save it in the same layout.

    weights   by canonical name
    folders   name inside the checkpoint -> (where it was, its config.json); the last one also has
              the preprocessing
    settings  model -> those of its settings that are in the first config.json
    """

    weights: Weights
    folders: Mapping[str, tuple[Path, dict[str, Any]]]
    settings: Callable[[Any], dict[str, Any]]

    def save(self, folder: Path, model: Any) -> None:
        """Write all but the tokenizer of a VisionLanguageModel. Raises CheckpointError if it has
        other weights by now; until then nothing is written.
        """
        try:
            plan = _plan(folder, model.whole_net, self.weights)
        except CheckpointError as e:
            raise CheckpointError(
                f"{e}: weights of another shape or name cannot be saved in the layout they came in"
            ) from None
        state, parts = model.whole_net.state_dict(), {}
        for name, (weight, i, _) in plan.items():
            parts.setdefault((weight.path.parent, weight.key), {})[i] = state[name]
        dtype, settings = str(model.dtype).removeprefix("torch."), self.settings(model)
        for name, (place, config) in self.folders.items():
            (into := folder / name).mkdir(parents=True, exist_ok=True)
            if own := {k: _joined(p) for (where, k), p in parts.items() if where == place}:
                save_torch_state_dict(own, into)
            settings["dtype" if "dtype" in config else "torch_dtype"] = dtype
            write_json(into / "config.json", config | settings)
            settings = {}
        write_json(into / "preprocessor_config.json", model.processor_config())
        model.net.generation_config.save_pretrained(folder)


def _joined(parts: Mapping[int, Tensor]) -> Tensor:
    """Equal parts of a tensor by number -> the tensor."""
    return torch.cat([parts[i] for i in sorted(parts)]) if len(parts) > 1 else parts[0]


def finish(net: PreTrainedModel, folder: Path) -> None:
    """What is no weight of its own: tied embeddings, and how the checkpoint generates."""
    net.tie_weights()
    if (folder / "generation_config.json").is_file():
        with blaming(folder, "generation_config.json"):
            made = GenerationConfig.from_pretrained(folder)
            ends = made.eos_token_id if isinstance(made.eos_token_id, list) else [made.eos_token_id]
            if not all(end is None or type(end) is int for end in ends):
                raise CheckpointError(f"generation_config.json has eos_token_id {ends}")
            net.generation_config = made


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """tokenizer.json exactly as it is (AutoTokenizer would make any into one of Qwen2); or Qwen2's
    vocab.json and merges.txt; or Llama's tokenizer.model. Its chat template may be beside it in
    chat_template.json, as processors had it before transformers 5. Raises CheckpointError.
    """
    loader = next((TOKENIZERS[name] for name in TOKENIZERS if (folder / name).is_file()), None)
    if loader is None:
        raise CheckpointError(f"{folder}: holds none of {', '.join(TOKENIZERS)}")
    with blaming(folder, "tokenizer"):
        tokenizer = loader.from_pretrained(folder)
        tokenizer("a")  # its settings fail not before, as a model_max_length that is no number
        if not tokenizer.chat_template and (folder / "chat_template.json").is_file():
            tokenizer.chat_template = read_json(folder / "chat_template.json")["chat_template"]
    return tokenizer


@contextlib.contextmanager
def blaming(place: Path, what: str) -> Iterator[None]:
    """Whatever is raised on a broken file becomes a CheckpointError that names the place."""
    try:
        yield
    except CheckpointError as e:
        if str(place) in str(e):
            raise
        raise CheckpointError(f"{place}: {e}") from None
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":  # of Rust code
            raise
        raise CheckpointError(f"{place}: {what} cannot be read ({in_one_line(e)})") from e


def in_one_line(e: Exception) -> str:
    """What a library says is wrong: the kind, and so much of the text as fits."""
    return f"{type(e).__name__}: {textwrap.shorten(str(e), 300)}"
