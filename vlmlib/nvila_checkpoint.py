"""NVILA's checkpoints: one folder with a config.json, and one folder for each of its three parts.

    config.json      model_type llava_llama, and everything that `NVILAConfig` knows
    llm/             Qwen2 with its tokenizer, as transformers writes them
    vision_tower/    SigLIP, with preprocessor_config.json
    mm_projector/    `layers.N.weight`, see `vlmlib.projectors`

Only safetensors are read, and nothing that a checkpoint names is imported.
Source: VILA:llava/model/llava_arch.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from .checkpoint import (
    SMALL,
    blaming,
    check_keys,
    default_dtype,
    find_device,
    load_net,
    read_config,
    save_net,
)
from .errors import CheckpointError, ShapeError
from .images import ImageProcessor
from .nvila_encoders import SiglipTower
from .projectors import Projector, build_projector
from .tiling import s2_sides

PARTS = ("llm", "vision_tower", "mm_projector")
MODES = (None, "square", "resize", "pad", "dynamic", "dynamic_s2")
VISION_PREFIX = "vision_model."
BASIC = '{{"_target_": "llava.model.encoders.Basic{}Encoder"}}'


@dataclass(slots=True)
class NVILAConfig:
    """What config.json says besides the three parts; the names are the checkpoints' own.

    image_aspect_ratio  how a picture meets the square tiles, see `vlmlib.nvila.NVILA`
    s2_scales           sides in pixels as a string, "448,896,1344", if `dynamic_s2`
    image_encoder, video_encoder   JSON with a `_target_`, see `vlmlib.nvila_encoders`
    chat_template       "qwen2", or None for the tokenizer's own
    *_cfg               configurations of the parts; those in the parts' own folders count
    rest                whatever else there is, kept for saving

    Raises CheckpointError.
    """

    image_aspect_ratio: str | None = None
    min_tiles: int = 1
    max_tiles: int = 12
    num_video_frames: int = 8
    dynamic_s2: bool = False
    s2_scales: str | None = None
    s2_resize_output_to_scale_idx: int = 0
    mm_vision_select_layer: int = -2
    image_encoder: str = BASIC.format("Image")
    video_encoder: str = BASIC.format("Video")
    chat_template: str | None = None
    llm_cfg: dict[str, Any] | None = None
    vision_tower_cfg: dict[str, Any] | None = None
    mm_projector_cfg: dict[str, Any] | None = None
    rest: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.image_aspect_ratio not in MODES:
            raise CheckpointError(
                f"image_aspect_ratio is {self.image_aspect_ratio!r}, expected one of {list(MODES)}"
            )
        if self.image_aspect_ratio == "dynamic_s2" and not self.dynamic_s2:
            raise CheckpointError("image_aspect_ratio is 'dynamic_s2', but dynamic_s2 is not set")
        if self.rest.get("s2"):
            raise CheckpointError("s2, several scales without tiles, is not supported")
        if self.chat_template not in (None, "qwen2"):
            raise CheckpointError(
                f"chat_template is {self.chat_template!r}, expected 'qwen2' or nothing"
            )
        self._check_scales()

    def _check_scales(self) -> None:
        scales, at = self.scales, self.s2_resize_output_to_scale_idx
        try:
            s2_sides(scales or [1])
        except (ShapeError, ZeroDivisionError) as e:
            raise CheckpointError(f"s2_scales {self.s2_scales!r}: {e}") from None
        if self.dynamic_s2 and not -len(scales) <= at < len(scales):
            raise CheckpointError(f"s2_resize_output_to_scale_idx is {at}, scales are {scales}")

    @property
    def scales(self) -> list[int]:
        """Of dynamic S2, smallest first; none without it."""
        return parse_scales(self.s2_scales) if self.dynamic_s2 else []

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> NVILAConfig:
        """Of config.json; null stands for the default."""
        names = {f.name for f in fields(cls)} - {"rest"}
        known = {k: v for k, v in config.items() if k in names and v is not None}
        rest = {k: v for k, v in config.items() if k not in names | {"model_type"}}
        return cls(**known, rest=rest)

    def to_dict(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rest"}
        return {"model_type": "llava_llama", **own, **self.rest}


def parse_scales(scales: Any) -> list[int]:
    """ "448,896,1344" (or a list) -> [448, 896, 1344], smallest first. Raises CheckpointError."""
    try:
        return sorted(int(s) for s in (scales.split(",") if isinstance(scales, str) else scales))
    except (TypeError, ValueError):
        raise CheckpointError(f"s2_scales must be like '448,896,1344', got {scales!r}") from None


class HeadlessSiglip(SiglipVisionModel):
    """Without the pooling head, which NVILA does not use; checkpoints may hold one or not."""

    _keys_to_ignore_on_load_unexpected = [r"(^|\.)head\.", r"position_ids$"]
    _keys_to_ignore_on_load_missing = [r"post_layernorm\."]


def is_nvila(folder: Path, config: Mapping[str, Any]) -> bool:
    """By its layout: LLaVA's original checkpoints have the same model_type, but one folder."""
    parts = [part for part in PARTS if (folder / part).is_dir()]
    return config.get("model_type") == "llava_llama" and bool(parts)


def load_parts(
    folder: Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """What `LlavaMetaModel.init_vlm` takes, from a checkpoint's folder. Raises CheckpointError."""
    for part in PARTS:
        if not (folder / part).is_dir():
            raise CheckpointError(f"{folder}: holds no folder {part}")
    with blaming(folder, "configuration"):
        config = NVILAConfig.from_dict(read_config(folder))
    device = find_device(device)
    size = sum(f.stat().st_size for f in folder.glob("*/*.safetensors"))
    dtype = dtype or default_dtype(size, device, read_config(folder / "llm"))
    llm = load_llm(folder / "llm", dtype, quiet=size < SMALL)
    tower = load_tower(folder / "vision_tower", llm.dtype, quiet=size < SMALL)
    tower = wrap_tower(tower, config)
    projector = load_projector(folder / "mm_projector", tower.hidden_size, llm.config.hidden_size)
    return {
        "config": config,
        "llm": llm.to(device),
        "vision_tower": tower.to(device),
        "mm_projector": projector.to(device, llm.dtype),
        "tokenizer": load_tokenizer(folder / "llm"),
        "image_processor": ImageProcessor.from_folder(folder / "vision_tower"),
    }


def load_llm(folder: Path, dtype: torch.dtype | str, *, quiet: bool) -> Qwen2ForCausalLM:
    """Tied to the embeddings exactly where the checkpoint holds no lm_head."""
    _expect(folder, read_config(folder), "qwen2")
    with blaming(folder, "configuration and weights"):
        config = Qwen2Config.from_pretrained(folder)
        config.tie_word_embeddings = "lm_head.weight" not in weight_names(folder)
        return load_net(Qwen2ForCausalLM, folder, dtype, quiet=quiet, config=config)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """tokenizer.json exactly as it is (AutoTokenizer would make any into one of Qwen2); or Qwen2's
    vocab.json and merges.txt.
    """
    if (folder / "tokenizer.json").is_file():
        loader = PreTrainedTokenizerFast
    elif (folder / "vocab.json").is_file():
        loader = AutoTokenizer
    else:
        raise CheckpointError(f"{folder}: holds neither tokenizer.json nor vocab.json")
    with blaming(folder, "tokenizer"):
        return loader.from_pretrained(folder, trust_remote_code=False)


def load_tower(folder: Path, dtype: torch.dtype, *, quiet: bool) -> SiglipVisionModel:
    _expect(folder, read_config(folder), "siglip_vision_model")
    with blaming(folder, "configuration and weights"):
        config = SiglipVisionConfig.from_pretrained(folder)
        config.vision_use_head = False
        weight_names(folder)
        return load_net(HeadlessSiglip, folder, dtype, quiet=quiet, config=config)


def wrap_tower(net: SiglipVisionModel, config: NVILAConfig) -> SiglipTower:
    at = config.s2_resize_output_to_scale_idx
    return SiglipTower(net, config.mm_vision_select_layer, config.scales, at)


def load_projector(folder: Path, c_in: int, d_out: int) -> Projector:
    config = read_config(folder)
    _expect(folder, config, "v2l_projector")
    with blaming(folder, "weights"):
        projector = build_projector(config.get("mm_projector_type"), c_in, d_out)
        weights = {}
        for path in weight_files(folder):
            weights |= load_file(path)
        fill(projector, weights, folder)
    return projector


def fill(module: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Load exactly these weights. Raises CheckpointError that names what is left or lacking."""
    own = module.state_dict()
    common = own.keys() & weights.keys()
    report = {
        "missing_keys": own.keys() - common,
        "unexpected_keys": weights.keys() - common,
        "mismatched_keys": {k for k in common if own[k].shape != weights[k].shape},
    }
    check_keys(folder, report)
    module.load_state_dict(weights)


def weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: holds no *.safetensors file")
    return files


def weight_names(folder: Path) -> set[str]:
    names = set()
    for path in weight_files(folder):
        with safe_open(path, "pt") as f:
            names |= set(f.keys())
    return names


def _expect(folder: Path, config: Mapping[str, Any], model_type: str) -> None:
    found = config.get("model_type")
    if found != model_type:
        raise CheckpointError(f"{folder}: model_type is {found!r}, expected {model_type!r}")


# ---- saving ----


def save_llm(folder: Path, llm: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    save_net(llm, folder)
    tokenizer.save_pretrained(folder)


def save_tower(folder: Path, tower: SiglipTower, processor: ImageProcessor) -> None:
    """Keys begin with `vision_model.`, as in the published checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    state = tower.net.state_dict().items()
    _save(folder, {VISION_PREFIX + k.removeprefix(VISION_PREFIX): v for k, v in state})
    _write(folder / "config.json", tower_config(tower))
    _write(folder / "preprocessor_config.json", processor_config(processor))


def save_projector(folder: Path, projector: Projector) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder, projector.state_dict())
    _write(folder / "config.json", projector_config(projector))


def save_config(folder: Path, config: NVILAConfig) -> None:
    _write(folder / "config.json", config.to_dict())


def llm_config(llm: Qwen2ForCausalLM) -> dict[str, Any]:
    return json.loads(llm.config.to_json_string())


def tower_config(tower: SiglipTower) -> dict[str, Any]:
    config = json.loads(tower.config.to_json_string())
    dtype = str(tower.net.dtype).removeprefix("torch.")
    return config | {"architectures": ["SiglipVisionModel"], "dtype": dtype}


def projector_config(projector: Projector) -> dict[str, Any]:
    return {
        "architectures": ["MultimodalProjector"],
        "model_type": "v2l_projector",
        "mm_projector_type": projector.kind,
    }


def processor_config(processor: ImageProcessor) -> dict[str, Any]:
    """As SiglipImageProcessor writes it."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": processor.crop_height, "width": processor.crop_width},
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
        "resample": int(processor.resample),
        "rescale_factor": processor.rescale_factor,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
    }


def _save(folder: Path, weights: Mapping[str, Tensor]) -> None:
    weights = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _write(path: Path, config: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2) + "\n")
