"""The token budget: how many positions a picture takes, known from its size alone.

Nothing is opened, cut or encoded, and a configuration is enough; so a 70B model's budget costs
nothing either. Sources: the papers and files named in `vlmlib.llava`, `.internvl` and `.nvila`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import InternVLConfig, LlavaConfig, LlavaNextConfig, PretrainedConfig

from .errors import CheckpointError, ShapeError
from .internvl import tile_pixels, tokens_per_tile
from .llava import LlavaNext, input_tokens, pinpoints
from .model import VisionLanguageModel
from .nvila_checkpoint import NVILAConfig
from .nvila_encoders import build_encoder
from .projectors import projected_side
from .tiling import anyres_tokens, dynamic_s2_tokens, dynamic_tiles


def image_tokens(
    model_or_config: VisionLanguageModel | PretrainedConfig | NVILAConfig, width: int, height: int
) -> int:
    """Positions that the only picture of a prompt takes, `width` x `height` pixels large.

    It is the length of all its media: features, LLaVA-1.6's newlines, what an NVILA's encoder adds.
    What the prompt says around them (InternVL's `<img>`, `</img>`) is text and not counted.

    model_or_config  a model; or a configuration, for which the family's usual preprocessing is
                     assumed: tiles as large as the tower's pictures, InternVL 1 to 12 of them

    Raises ShapeError for a size below 1, TypeError for other models, CheckpointError for an NVILA
    configuration whose encoder adds other text than line breaks: only a tokenizer can count that.
    """
    if not all(isinstance(side, int) and side >= 1 for side in (width, height)):
        raise ShapeError(f"a picture has whole sides of at least 1 pixel, got {width} x {height}")
    model = model_or_config if isinstance(model_or_config, VisionLanguageModel) else None
    config = model_or_config if model is None else model.config
    for kind, count in COUNTS.items():
        if isinstance(config, kind):
            return count(config, model, width, height)
    raise TypeError(f"expected a model or its configuration, got {type(config).__name__}")


def _llava(config: LlavaConfig, model, width: int, height: int) -> int:
    side = config.vision_config.image_size
    shape = (side, side) if model is None else model.image_processor.crop_size.values()
    return input_tokens(config, *shape)


def _llava_next(config: LlavaNextConfig, model, width: int, height: int) -> int:
    vision = config.vision_config
    grid = (pinpoints(config), vision.image_size, vision.patch_size)
    rounding = LlavaNext.rounding if model is None else model.rounding
    return anyres_tokens(width, height, *grid, rounding=rounding)


def _internvl(config: InternVLConfig, model, width: int, height: int) -> int:
    numbers = (1, 12)
    if model is not None:
        numbers = (model.image_processor.min_patches, model.image_processor.max_patches)
    tiles = dynamic_tiles(width, height, *numbers, tile_pixels(config), use_thumbnail=True)
    return tiles * tokens_per_tile(config)


def _nvila(config: NVILAConfig, model, width: int, height: int) -> int:
    tower = config.vision_tower_cfg
    tile = tower["image_size"] if model is None else model.tile_pixels
    side = projected_side(config.mm_projector_cfg["mm_projector_type"], tile // tower["patch_size"])
    around = _line_breaks(config) if model is None else model.encoders["image"].around(model)
    if config.image_aspect_ratio == "dynamic":
        numbers = (config.min_tiles, config.max_tiles, tile)
        return dynamic_tiles(width, height, *numbers, use_thumbnail=True) * (side**2 + around)
    if config.image_aspect_ratio == "dynamic_s2":
        return around + dynamic_s2_tokens(
            width,
            height,
            config.scales,
            config.max_tiles,
            tile,
            tokens_per_tile=side**2,
            resize_output_to_scale_idx=config.s2_resize_output_to_scale_idx,
        )
    return side**2 + around


def _line_breaks(config: NVILAConfig) -> int:
    """How many tokens the image encoder adds: each of its texts is nothing or one line break."""
    encoder = build_encoder("image", config.image_encoder)
    texts = [text for text in (encoder.start_tokens, encoder.end_tokens) if text]
    if set(texts) - {"\n"}:
        raise CheckpointError(f"the image encoder adds {texts}: only a loaded model can count that")
    return len(texts)


COUNTS: dict[type, Callable[[Any, VisionLanguageModel | None, int, int], int]] = {
    LlavaConfig: _llava,
    LlavaNextConfig: _llava_next,
    InternVLConfig: _internvl,
    NVILAConfig: _nvila,
}
