"""Attention maps: exact weights, and positions that lie where their patches are."""

from __future__ import annotations

import pytest
import torch
from helpers import noise, pixels, tiny_llava, tiny_processor
from test_llava_next import model as next_model  # noqa: F401
from test_llava_next import tokenizer  # noqa: F401

from vlmlib import IMAGE_TOKEN_INDEX, ImageProcessor
from vlmlib.fusion import fuse
from vlmlib.microscope import attention, heat_map, patch_boxes, picture_weights

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
    """Paint the picture's edges of the region: they are the edges of the crop."""
    plain = tiny_processor()
    processor = ImageProcessor(28, 28, 28, plain.image_mean, plain.image_std, do_pad=pad)
    left, top, right, bottom = processor.region(*size)
    assert ((left + right) / 2, (top + bottom) / 2) == (0.5, 0.5)
    pixel = (right - left) * size[0] / 28, (bottom - top) * size[1] / 28
    assert pixel[0] == pytest.approx(pixel[1])
    assert pixel[0] == pytest.approx((max if pad else min)(size) / 28)


def test_a_patch_lies_where_it_was_cut(model):
    """Light up one spot of the picture: the position whose box holds it changes its features."""
    image = noise(56, 40)
    image.paste((0, 0, 0), (0, 0, 56, 40))
    spot = image.copy()
    spot.paste((255, 255, 255), (30, 25, 34, 29))
    dark, lit = model.prepare([image, spot])
    boxes = model.boxes(lit)
    holds = (boxes[:, :2] < torch.tensor([32 / 56, 27 / 40])).all(1)
    holds &= (boxes[:, 2:] > torch.tensor([32 / 56, 27 / 40])).all(1)
    rows = lit.pixels.sub(dark.pixels).abs().sum(1)[0].unfold(0, 14, 14).unfold(1, 14, 14)
    changed = rows.sum((-1, -2)).flatten() > 0
    assert holds.tolist() == changed.tolist() and holds.sum() == 1


@pytest.mark.parametrize("size", [(28, 28), (64, 48), (48, 64), (90, 30), (200, 7)])
def test_boxes_of_tiles_cover_the_picture_twice(next_model, size):  # noqa: F811
    """Once by the whole picture, once by its tiles; newlines have none."""
    (medium,) = next_model.prepare([noise(*size)])
    boxes = next_model.boxes(medium)
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
