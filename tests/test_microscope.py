"""Attention maps: exact weights, and positions that lie where their patches are."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import nvila_helpers
import pytest
import torch
from helpers import noise, pixels, tiny_llava, tiny_llava_next, tiny_processor
from PIL import Image
from test_internvl import tiny_internvl

from vlmlib import IMAGE_TOKEN_INDEX, ImageProcessor, ShapeError, Video
from vlmlib.fusion import fuse
from vlmlib.microscope import attention, heat_map, picture_weights
from vlmlib.tiling import patch_boxes

PROMPT = "USER: <image>\nwhat is this? <image> ASSISTANT:"


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


@pytest.mark.parametrize("answer", [[], [67, 352, 358]])
def test_weights_are_those_of_one_plain_pass(model, answer):
    media = model.as_media(pixels(2))
    weights = attention(model, PROMPT, media, answer)
    decoder = model.net.get_decoder()
    before = decoder.config._attn_implementation
    with torch.inference_mode():
        features = [model.encode(m) for m in media]
        inputs = fuse([*model.prompt_ids(PROMPT), *answer], features, model.embed)
        decoder.set_attn_implementation("eager")
        expected = decoder(inputs_embeds=inputs, output_attentions=True).attentions
        decoder.set_attn_implementation(before)
    expected = torch.stack([layer[0, :, -1] for layer in expected])
    assert weights.shape == expected.shape == (2, 4, inputs.shape[1])
    assert (weights - expected).abs().max() < 1e-5
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4))


def test_the_fast_kernels_are_put_back(model):
    decoder = model.net.get_decoder()
    before = decoder.config._attn_implementation
    attention(model, "two blue squares")
    assert decoder.config._attn_implementation == before != "eager"


def test_the_tower_is_asked_once_for_each_picture():
    model = tiny_llava()
    media = model.as_media(pixels(2))
    with patch.object(model, "tower_features", wraps=model.tower_features) as tower:
        first, again = (attention(model, PROMPT, media) for _ in range(2))
    assert tower.call_count == 2 and torch.equal(first, again)


def test_the_only_position_looks_at_itself(model):
    assert len(model.prompt_ids("")) == 1
    assert torch.equal(attention(model, ""), torch.ones(2, 4, 1))


def test_weights_of_the_pictures(model):
    media = model.as_media(pixels(2))
    n = len(model.prompt_ids(PROMPT)) - 2 + 8
    first, second = picture_weights(model, PROMPT, media, torch.arange(n))
    at = model.prompt_ids(PROMPT).index(IMAGE_TOKEN_INDEX)
    assert first.tolist() == [at, at + 1, at + 2, at + 3]
    assert len(second) == 4 and second[0] > first[-1]


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (28, 28), (90, 31)])
@pytest.mark.parametrize("pad", [False, True])
def test_region_is_what_the_crop_shows(size, pad):
    """A picture whose colours tell where they are: the crop has those of the region, as far as
    whole colours can tell and half a pixel cannot be cut.
    """
    plain = tiny_processor()
    processor = ImageProcessor(28, 28, 28, plain.image_mean, plain.image_std, do_pad=pad)
    x, y = ((np.arange(side) + 0.5) / side for side in size)
    ramps = np.stack([*np.broadcast_arrays(x, y[:, None]), np.zeros(size[::-1])], axis=-1)
    crop = np.asarray(processor.crop(Image.fromarray((255 * ramps).round().astype(np.uint8)))) / 255
    left, top, right, bottom = processor.region(*size)
    middles = (np.arange(28) + 0.5) / 28
    x, y = left + middles * (right - left), top + middles * (bottom - top)
    inside = np.ix_(*(np.flatnonzero((at > 0.1) & (at < 0.9)) for at in (y, x)))
    off = np.abs(crop[..., :2] - np.stack(np.broadcast_arrays(x, y[:, None]), axis=-1))[inside]
    pixel = np.array([right - left, bottom - top]) / 28
    assert ((off - 1 / 255) / pixel).max() < 0.6 and len(inside[0]) > 6


# ---- where positions lie ----


def nearsighted(model, tower):
    """Every patch sees itself alone: what the layers' attention says is nothing."""
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            if "out_proj" in name or "projection_layer" in name:
                weight.zero_()
    return model


def nearsighted_llava(**changes):
    model = tiny_llava()
    for name, value in changes.items():
        setattr(model.config, name, value)
    return nearsighted(model, model.net.model.vision_tower)


def nearsighted_internvl():
    model = tiny_internvl()
    return nearsighted(model, model.net.model.vision_tower)


def nearsighted_nvila(mode, projector="mlp_downsample", **changes):
    model = nvila_helpers.nvila(mode, projector, **changes)
    return nearsighted(model, model.vision_tower)


def differences(model, dark, lit) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(boxes, changed) of every medium of one picture."""
    out = []
    for before, after in zip(model.prepare([dark]), model.prepare([lit]), strict=True):
        with torch.inference_mode():
            change = (model.encode(before) - model.encode(after)).abs().amax(-1)
        boxes = model.boxes(after)
        assert boxes.shape == (after.length, 4)
        out.append((boxes, change > 1e-5))
    return out


TILE_BLUR = 4 / 28  # of a tile: as far as bicubic filters reach
CASES = {
    "llava": (nearsighted_llava, TILE_BLUR),
    "llava pad": (lambda: nearsighted_llava(image_aspect_ratio="pad"), TILE_BLUR),
    "internvl": (nearsighted_internvl, TILE_BLUR),
    "nvila resize": (lambda: nearsighted_nvila("resize"), TILE_BLUR),
    "nvila pad": (lambda: nearsighted_nvila("pad", "linear"), 2 * TILE_BLUR),
    "nvila folded unevenly": (
        lambda: nearsighted_nvila("dynamic", "mlp_downsample_3x3_fix"),
        TILE_BLUR,
    ),
    "nvila dynamic": (lambda: nearsighted_nvila("dynamic"), TILE_BLUR),
    "nvila dynamic_s2": (lambda: nearsighted_nvila("dynamic_s2"), 1 / 4 + TILE_BLUR),
    "nvila first scale": (
        lambda: nearsighted_nvila("dynamic_s2", s2_resize_output_to_scale_idx=0),
        TILE_BLUR,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(84, 56), (56, 84), (28, 28)])
def test_a_position_lies_where_it_looks(case, size):
    """Light up a spot of a dark picture: the positions whose box holds it change, and no position
    changes whose box is farther from it than pictures blur when they are resized.
    """
    make, margin = CASES[case]
    model, (width, height) = make(), size
    dark = noise(width, height)
    dark.paste((0, 0, 0), (0, 0, width, height))
    spots, seen = [(0.07, 0.11), (0.35, 0.62), (0.62, 0.35), (0.5, 0.93), (0.93, 0.5)], 0
    for x, y in spots:
        lit = dark.copy()
        left, top = round(x * width) - 1, round(y * height) - 1
        lit.paste((255, 255, 255), (left, top, left + 3, top + 3))
        at = torch.tensor([(left + 1.5) / width, (top + 1.5) / height])
        for boxes, changed in differences(model, dark, lit):
            holds = ((boxes[:, :2] < at) & (at < boxes[:, 2:])).all(1)
            near = ((boxes[:, :2] - margin < at) & (at < boxes[:, 2:] + margin)).all(1)
            assert not (holds & ~changed).any() and not (changed & ~near).any()
            assert not (near & boxes.isnan().any(1)).any()
            seen += int(holds.sum())
    assert seen >= 2  # a crop may miss some


@pytest.mark.parametrize("case", ["llava pad", "nvila pad"])
def test_padding_lies_outside(case):
    model = CASES[case][0]()
    (medium,) = model.prepare([noise(84, 56)])
    assert medium.shown.tolist() == [[0.0, -0.25, 1.0, 1.25]]
    tops = model.boxes(medium)[:, 1]
    assert tops[~tops.isnan()].min() == -0.25


def test_frames_lie_over_each_other():
    """The frames of a clip show the same place; pools are as large as what they average."""
    frames = [noise(40, 30, seed) for seed in range(4)]
    model = nearsighted_internvl()
    (clip,) = model.prepare([Video(frames)])
    one = patch_boxes(2, 2)
    assert torch.equal(model.boxes(clip), one.repeat(4, 1))
    _, placed = model.read("Frames: <video>", [clip])
    assert all(torch.equal(model.boxes(frame), one) for frame in placed) and len(placed) == 4
    nvila = nvila_helpers.shared("resize", video_encoder=nvila_helpers.TSP)
    (clip,) = nvila.prepare([Video(frames)])
    boxes = nvila.boxes(clip)
    with torch.inference_mode():
        assert len(boxes) == clip.length == len(nvila.encode(clip))
    known = boxes[~boxes.isnan().any(1)]
    assert torch.equal(known, torch.cat([one, one, patch_boxes(1, 2)]))


def test_positions_that_are_no_patch():
    """Texts around a picture lie nowhere, at the places where the encoder writes them."""
    model = nvila_helpers.shared(
        image_encoder='{"_target_": "llava.model.encoders.BasicImageEncoder", '
        '"start_tokens": "is re", "end_tokens": "at"}',
    )
    (medium,) = model.prepare([noise(30, 20)])
    text = model.boxes(medium).isnan().all(1).nonzero().flatten().tolist()
    before, behind = (len(model.tokenizer(t).input_ids) for t in ("is re", "at"))
    assert text == [*range(before), *range(medium.length - behind, medium.length)]


def test_pixels_alone_do_not_tell_what_they_show(model):
    (medium,) = model.as_media(pixels(1))
    with pytest.raises(ShapeError, match="use media of `prepare`"):
        model.boxes(medium)


@pytest.mark.parametrize("size", [(28, 28), (64, 48), (48, 64), (90, 30), (200, 7)])
def test_boxes_of_tiles_cover_the_picture_twice(size):
    """Once by the whole picture, once by its tiles; newlines have none."""
    model = tiny_llava_next()
    (medium,) = model.prepare([noise(*size)])
    boxes = model.boxes(medium)
    assert boxes.shape == (medium.length, 4)
    patches = boxes[~boxes.isnan().any(1)]
    area = (patches[:, 2] - patches[:, 0]) * (patches[:, 3] - patches[:, 1])
    assert area.sum().item() == pytest.approx(2.0, abs=1e-4)
    assert patches.min() >= 0 and patches.max() <= 1 + 1e-6


def test_heat_map_keeps_the_weight():
    weights = torch.rand(12, generator=torch.Generator().manual_seed(0))
    heat = heat_map(weights, patch_boxes(3, 4), 37, 23)
    assert heat.shape == (23, 37)
    assert heat.sum().item() == pytest.approx(weights.sum().item(), rel=1e-4)
    one = heat_map(torch.eye(12)[6], patch_boxes(3, 4), 40, 30)
    assert one[10:20, 20:30].sum() == pytest.approx(1.0) and one.sum() == pytest.approx(1.0)
    outside = heat_map(torch.ones(1), torch.tensor([[-1.0, 0.0, 1.0, 1.0]]), 10, 10)
    assert outside.sum() == pytest.approx(0.5)
    assert heat_map(torch.ones(1), torch.full((1, 4), torch.nan), 5, 5).sum() == 0
