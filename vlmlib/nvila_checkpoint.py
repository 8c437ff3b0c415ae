"""NVILA's checkpoints: in three folders, as it is saved here too, or in one.

    config.json      model_type llava_llama, and everything that `NVILAConfig` knows
    llm/             Qwen2 with its tokenizer, as transformers writes them
    vision_tower/    SigLIP, with preprocessor_config.json
    mm_projector/    `layers.N.weight`, see `vlmlib.projectors`

In one folder (the -hf ones) the keys begin with the names of these parts, and config.json has a
text_config and a vision_config only. Nothing that a checkpoint names is imported.
Source: VILA:llava/model/llava_arch.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from .checkpoint import (
    Origin,
    Progress,
    Weights,
    blaming,
    check_depth,
    check_dtype,
    check_layers,
    check_links,
    default_dtype,
    fill,
    find_device,
    finish,
    holds_weights,
    is_tied,
    load_tokenizer,
    read_config,
    renamed,
    save_net,
    stored_weights,
    without_code,
    write_json,
)
from .errors import CheckpointError, ShapeError
from .images import ImageProcessor
from .int4 import Int4Config, expect_int4, unpack_net
from .nvila_encoders import SiglipTower, build_encoder
from .projectors import Projector, build_projector
from .tiling import s2_sides, tile_grids

PARTS = {
    "llm": ("llm_cfg", "qwen2"),
    "vision_tower": ("vision_tower_cfg", "siglip_vision_model"),
    "mm_projector": ("mm_projector_cfg", "v2l_projector"),
}
"""Folder, or beginning of keys -> (its configuration in `NVILAConfig`, model_type)."""

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
        self._check_numbers()
        self._check_scales()

    def _check_numbers(self) -> None:
        names = "min_tiles max_tiles num_video_frames mm_vision_select_layer"
        for name in (*names.split(), "s2_resize_output_to_scale_idx"):
            if type(value := getattr(self, name)) is not int:
                raise CheckpointError(f"{name} is {value!r}, expected a whole number")

    def _check_scales(self) -> None:
        scales, at = self.scales, self.s2_resize_output_to_scale_idx
        try:
            least = s2_sides(scales)[-1] ** 2 if scales else self.min_tiles
            tile_grids(least, self.max_tiles)
        except ShapeError as e:
            numbers = f"s2_scales {self.s2_scales!r}, {self.min_tiles} to {self.max_tiles} tiles"
            raise CheckpointError(f"{numbers}: {e}") from None
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


def nvila_weights(folder: Path) -> Weights | None:
    """The weights of an NVILA in either layout; None for another model's. Raises CheckpointError.

    LLaVA's original checkpoints have the same model_type, but other folders and keys.
    """
    if not holds_weights(folder) and any((folder / part).is_dir() for part in PARTS):
        for part in PARTS:
            if not (folder / part).is_dir():
                raise CheckpointError(f"{folder}: holds no folder {part}")
        parts = {part: stored_weights(folder / part) for part in PARTS}
        stored = {f"{part}.{key}": w for part in PARTS for key, w in parts[part].items()}
    else:
        stored = stored_weights(folder)
    return renamed(stored) if any(key.startswith("llm.") for key in stored) else None


def load_parts(
    folder: Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What `LlavaMetaModel.init_vlm` takes, from a checkpoint's folder. Raises CheckpointError."""
    check_dtype(dtype)
    check_links(folder)
    weights = nvila_weights(folder)
    if weights is None:
        raise CheckpointError(f"{folder}: its weights are not those of an NVILA")
    split = not holds_weights(folder)
    with blaming(folder, "configuration"):
        config = (_of_three_folders if split else _of_one_folder)(folder, weights)
        for values in (config.llm_cfg, config.vision_tower_cfg):
            check_depth(values, weights)
        for media in ("image", "video"):  # refused before a weight is read
            build_encoder(media, getattr(config, f"{media}_encoder"))
        llm = Qwen2Config.from_dict(config.llm_cfg)
        llm.tie_word_embeddings = is_tied(weights)
        tower = SiglipVisionConfig.from_dict(config.vision_tower_cfg | {"vision_use_head": False})
        check_layers(config.mm_vision_select_layer, tower.num_hidden_layers)
        kind, scales = config.mm_projector_cfg.get("mm_projector_type"), len(config.scales) or 1
        int4 = Int4Config.of(config.llm_cfg) or Int4Config.of(read_config(folder))
    device = find_device(device)
    llm.dtype = tower.dtype = dtype = dtype or default_dtype(weights, device, int4)
    tokenizer = load_tokenizer(folder / "llm" if split else folder)
    processor = ImageProcessor.from_folder(folder / "vision_tower" if split else folder)

    with blaming(folder, "preprocessing"):
        processor.check_size(tower.image_size)

    def make() -> nn.ModuleDict:
        projector = build_projector(kind, tower.hidden_size * scales, llm.hidden_size)
        net = expect_int4(Qwen2ForCausalLM(llm), int4)
        return whole_net(net, SiglipVisionModel(tower), projector)

    net = fill(folder, make, weights, device, dtype, progress)
    finish(unpack_net(net["llm"], int4), folder / "llm" if split else folder)
    origin = Origin(weights, {"": (folder, read_config(folder))}, settings=lambda model: {})
    return {
        "origin": None if split else origin,
        "config": config,
        "llm": net["llm"],
        "vision_tower": wrap_tower(net["vision_tower"], config),
        "mm_projector": net["mm_projector"],
        "tokenizer": tokenizer,
        "image_processor": processor,
    }


def whole_net(llm: nn.Module, vision_tower: nn.Module, mm_projector: nn.Module) -> nn.ModuleDict:
    """The parts by the names that checkpoints have for them."""
    return nn.ModuleDict(dict(zip(PARTS, (llm, vision_tower, mm_projector), strict=True)))


def _of_three_folders(folder: Path, weights: Weights) -> NVILAConfig:
    parts = {}
    for part, (name, model_type) in PARTS.items():
        parts[name] = without_code(read_config(folder / part))
        if (found := parts[name].get("model_type")) != model_type:
            raise CheckpointError(
                f"{folder / part}: model_type is {found!r}, expected {model_type!r}"
            )
    return NVILAConfig.from_dict(read_config(folder) | parts)


def _of_one_folder(folder: Path, weights: Weights) -> NVILAConfig:
    """The published code has the projector and how pictures are cut as constants; here the
    projector's weights tell them. Source: sglang:python/sglang/srt/models/nvila.py, nvila_lite.py.
    """
    config = without_code(read_config(folder))
    llm, tower = config["text_config"], config["vision_config"]
    lite = "mm_projector.layers.7.weight" in weights
    kind, factor = ("mlp_downsample_3x3_fix", 3) if lite else ("mlp_downsample", 2)
    width = weights["mm_projector.layers.1.weight"].shape[0] // factor**2
    side, n = tower["image_size"], width // tower["hidden_size"]
    return NVILAConfig(
        image_aspect_ratio="dynamic_s2" if n > 1 else "dynamic",
        dynamic_s2=n > 1,
        s2_scales=",".join(str(side * i) for i in range(1, n + 1)) if n > 1 else None,
        s2_resize_output_to_scale_idx=-1,
        chat_template="qwen2",
        llm_cfg=llm,
        vision_tower_cfg=tower,
        mm_projector_cfg={"mm_projector_type": kind},
    )


def wrap_tower(net: SiglipVisionModel, config: NVILAConfig) -> SiglipTower:
    at = config.s2_resize_output_to_scale_idx
    return SiglipTower(net, config.mm_vision_select_layer, config.scales, at)


# ---- saving ----


def save_llm(folder: Path, llm: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    save_net(llm, folder)
    tokenizer.save_pretrained(folder)


def save_tower(folder: Path, tower: SiglipTower, processor: ImageProcessor) -> None:
    """Keys begin with `vision_model.`, as in the published checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    state = tower.net.state_dict().items()
    _save(folder, {VISION_PREFIX + k.removeprefix(VISION_PREFIX): v for k, v in state})
    write_json(folder / "config.json", tower_config(tower))
    write_json(folder / "preprocessor_config.json", processor.to_dict("SiglipImageProcessor"))


def save_projector(folder: Path, projector: Projector) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder, projector.state_dict())
    write_json(folder / "config.json", projector_config(projector))


def save_config(folder: Path, config: NVILAConfig) -> None:
    write_json(folder / "config.json", config.to_dict())


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


def _save(folder: Path, weights: Mapping[str, Tensor]) -> None:
    weights = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
