"""The closed form of the token budget equals what is really prepared and encoded."""

from __future__ import annotations

import nvila_helpers
import pytest
import torch
from helpers import noise, tiny_llava, tiny_llava_next
from hypothesis import given, settings
from hypothesis import strategies as st
from test_internvl import tiny_internvl
from transformers import CLIPVisionConfig, InternVLConfig, LlavaConfig, LlavaNextConfig

from vlmlib import CheckpointError, ImageProcessor, InternVL, NVILAConfig, ShapeError, image_tokens

SIZES = [(28, 28), (1, 1), (300, 40), (40, 300), (57, 57), (84, 56), (85, 113), (200, 7), (1, 90)]
SIZES += [(width, height) for width in range(20, 140, 17) for height in range(20, 140, 19)]
HALF = (0.5, 0.5, 0.5)


def few_tiles() -> InternVL:
    model = tiny_internvl()
    model.image_processor = ImageProcessor(28, 28, 28, HALF, HALF, min_patches=3, max_patches=5)
    return model


MODELS = {
    "llava": tiny_llava,
    "llava with a class token": lambda: tiny_llava(tower="siglip"),
    "llava_next": tiny_llava_next,
    "internvl": tiny_internvl,
    "internvl, 3 to 5 tiles": few_tiles,
    **{
        f"nvila {mode} {projector}": lambda m=mode, p=projector: nvila_helpers.shared(m, p)
        for mode in nvila_helpers.MODES
        for projector in ("mlp_downsample", "mlp_downsample_3x3_fix")
    },
    "nvila with tokens around": lambda: nvila_helpers.shared(
        "dynamic",
        image_encoder='{"_target_": "llava.model.encoders.BasicImageEncoder", '
        '"start_tokens": "is re", "end_tokens": null}',
    ),
    "nvila at the first scale": lambda: nvila_helpers.shared(
        "dynamic_s2", s2_resize_output_to_scale_idx=0
    ),
}


def taken(model, width: int, height: int) -> int:
    return sum(medium.length for medium in model.prepare([noise(width, height)]))


@pytest.mark.parametrize("name", MODELS)
def test_a_grid_of_sizes(name):
    model = MODELS[name]()
    assert [image_tokens(model, *size) for size in SIZES] == [taken(model, *s) for s in SIZES]


@pytest.mark.parametrize("name", MODELS)
def test_lengths_are_those_of_the_features(name):
    model = MODELS[name]()
    media = model.prepare([noise(85, 113)])
    with torch.inference_mode():
        features = [model.encode(medium) for medium in media]
    assert image_tokens(model, 85, 113) == sum(map(len, features))


@pytest.mark.parametrize("name", [n for n in MODELS if "around" not in n and "3 to 5" not in n])
def test_a_configuration_is_enough(name):
    model = MODELS[name]()
    for size in SIZES:
        assert image_tokens(model.config, *size) == image_tokens(model, *size)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900))
def test_any_size(width, height):
    for model in (nvila_helpers.shared("dynamic"), nvila_helpers.shared("dynamic_s2")):
        assert image_tokens(model, width, height) == taken(model, width, height)


def test_published_models():
    """Sizes of the hub's configurations; counts of the papers and of the reference code."""
    tower = CLIPVisionConfig(image_size=336, patch_size=14)
    assert image_tokens(LlavaConfig(vision_config=tower), 640, 480) == 576
    next_config = LlavaNextConfig(
        vision_config=tower,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    )
    sizes = [(640, 480), (336, 336), (672, 672), (1000, 300)]
    assert [image_tokens(next_config, *s) for s in sizes] == [2340, 1176, 2928, 2182]
    internvl3 = InternVLConfig()
    assert [image_tokens(internvl3, n, n) for n in (448, 896)] == [256, 5 * 256]
    nvila = {
        "vision_tower_cfg": {"image_size": 448, "patch_size": 14},
        "mm_projector_cfg": {"mm_projector_type": "mlp_downsample"},
    }
    for side, tiles in ((633, 1), (634, 5), (951, 10)):
        config = NVILAConfig(image_aspect_ratio="dynamic", **nvila)
        assert image_tokens(config, side, side) == tiles * 257


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5), (2.5, 5), ("5", 5)])
def test_impossible_sizes(size):
    with pytest.raises(ShapeError, match="at least 1 pixel"):
        image_tokens(nvila_helpers.shared(), *size)


def test_what_cannot_be_counted():
    with pytest.raises(TypeError, match="expected a model or its configuration, got str"):
        image_tokens("tiny-llava", 5, 5)
    with pytest.raises(CheckpointError, match="only a loaded model can count"):
        image_tokens(MODELS["nvila with tokens around"]().config, 5, 5)
