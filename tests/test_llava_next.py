"""LLaVA-1.6: tiles, their merge and the whole model are transformers' own, at many sizes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import (
    NEXT_TILE,
    PINPOINTS,
    ids_of,
    noise,
    tiny_llava_next,
    tiny_processor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

import vlmlib
from vlmlib import tiling
from vlmlib.llava import process_images

SIZES = [(28, 28), (64, 48), (48, 64), (90, 30), (30, 90), (200, 7), (7, 200), (57, 56), (1, 90)]
SLIVERS = [(200, 7), (7, 200), (1, 90)]
SEVERAL = [[(64, 48)], [(30, 90)], [(90, 30)], [(28, 28), (90, 30)]]
HALF = (0.5, 0.5, 0.5)
GREEDY = vlmlib.GenParams.greedy(n_predict=12)


@pytest.fixture(scope="module")
def model():
    return tiny_llava_next()


@pytest.fixture(scope="module")
def processor():
    ours = tiny_processor()
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": NEXT_TILE},
        crop_size={"height": NEXT_TILE, "width": NEXT_TILE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=list(ours.image_mean),
        image_std=list(ours.image_std),
    )


def reference_inputs(model, processor, prompt, images):
    """What transformers' own model takes for these pictures and this prompt."""
    batch = processor(images, return_tensors="pt")
    lengths = iter(m.length for m in model.prepare(images))
    ids = []
    for i in model.prompt_ids(prompt):
        picture = i == vlmlib.IMAGE_TOKEN_INDEX
        ids += [model.config.image_token_id] * next(lengths) if picture else [i]
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": batch["pixel_values"],
        "image_sizes": torch.as_tensor(batch["image_sizes"]),
    }


@pytest.mark.parametrize("size", SIZES)
def test_tiles_and_features_are_those_of_transformers(model, processor, size):
    image = noise(*size)
    (medium,) = model.prepare([image])
    theirs = processor([image], return_tensors="pt")
    assert (medium.pixels - theirs["pixel_values"][0]).abs().max() < 1e-5
    with torch.inference_mode():
        ours = model.encode(medium)
        (expected,) = model.net.get_image_features(
            theirs["pixel_values"], torch.as_tensor(theirs["image_sizes"])
        ).pooler_output
    if size in SLIVERS:  # there nothing is left of the tiles; the whole picture's 16 are the same
        assert len(expected) < len(ours)
        ours, expected = ours[:16], expected[:16]
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("size", SIZES)
def test_length_is_known_before_encoding(model, size):
    (medium,) = model.prepare([noise(*size)])
    with torch.inference_mode():
        assert len(model.encode(medium)) == medium.length


@pytest.mark.parametrize("sizes", SEVERAL)
def test_logits_and_greedy_ids_are_those_of_transformers(model, processor, sizes):
    images = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    prompt = "<image>" * len(images) + "\nwhat is this? ASSISTANT:"
    inputs = reference_inputs(model, processor, prompt, images)
    with torch.inference_mode():
        logits = model.turn(prompt, model.prepare(images)).prefill()
        expected = model.net(**inputs).logits[:, -1]
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    generated = model.net.generate(**inputs, do_sample=False, max_new_tokens=12)
    stream = vlmlib.LlavaStreamGenerator(
        model, model.tokenizer, prompt, 0, GREEDY, image_tensor=model.prepare(images), trace=0
    )
    assert ids_of(stream) == generated[0, inputs["input_ids"].shape[1] :].tolist()


def test_pixel_values_alone_do_not_tell_the_size(model):
    with pytest.raises(vlmlib.ShapeError, match="picture's size"):
        model.turn("<image>", torch.zeros(1, 3, 28, 28))


@pytest.mark.parametrize("sizes", SEVERAL)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    ],
    ids=str,
)
def test_generate_from_processed_images(model, processor, sizes, options):
    """LLaVA's own path, process_images and generate with image_sizes, gives transformers' ids."""
    images = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    prompt = "<image>" * len(images) + "\nwhat is this? ASSISTANT:"
    pixels = process_images(images, model.image_processor, model.config)
    inputs = reference_inputs(model, processor, prompt, images)
    torch.manual_seed(1)
    ours = model.generate(
        torch.tensor([model.prompt_ids(prompt)]),
        images=pixels,
        image_sizes=sizes,
        max_new_tokens=10,
        **options,
    )
    torch.manual_seed(1)
    theirs = model.net.generate(**inputs, max_new_tokens=10, **options)
    assert ours[0].tolist() == theirs[0, inputs["input_ids"].shape[1] :].tolist()


def test_sampled_ids_are_those_of_transformers(model, processor):
    images, prompt = [noise(64, 48), noise(90, 30)], "<image> and <image>\nwhat? ASSISTANT:"
    inputs = reference_inputs(model, processor, prompt, images)
    torch.manual_seed(5)
    options = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.0}
    theirs = model.net.generate(**inputs, do_sample=True, max_new_tokens=12, **options)
    params = vlmlib.GenParams(
        temp=0.9, top_k=40, top_p=0.9, repeat_penalty=1.0, seed=5, order="hf", n_predict=12
    )
    stream = model.stream_prompt(prompt, model.prepare(images), params, trace=0)
    assert ids_of(stream) == theirs[0, inputs["input_ids"].shape[1] :].tolist()


def test_tiles_of_another_size_are_refused(model):
    (tiles,) = process_images([noise(64, 48)], model.image_processor, model.config)
    for pixels, size in [(tiles[:1], (64, 48)), (tiles, (28, 28)), (tiles[0], (64, 48))]:
        with pytest.raises(vlmlib.ShapeError, match="prepare_images makes them"):
            model.sized(pixels, size)


def test_anyres_of_both_flavours(model):
    """The original configuration lists (width, height), transformers' (height, width)."""
    original = SimpleNamespace(
        image_aspect_ratio="anyres", image_grid_pinpoints=[(w, h) for h, w in PINPOINTS]
    )
    images = [noise(56, 28), noise(28, 56)]
    ours = process_images(images, model.image_processor, original)
    theirs = process_images(images, model.image_processor, model.config)
    assert [len(tiles) for tiles in ours] == [3, 4]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_flavour_of_the_checkpoint_decides_the_rounding():
    """One of the sizes for which int() and rounding to seven places differ."""
    model = tiny_llava_next(image_size=336, patch_size=14, num_hidden_layers=1)
    model.config.image_grid_pinpoints = [[height, width] for width, height in tiling.PINPOINTS]
    model.config.vision_feature_layer = -1
    model.image_processor = vlmlib.ImageProcessor(336, 336, 336, HALF, HALF)
    (medium,) = model.prepare([noise(88, 55)])
    with torch.inference_mode():
        assert len(model.encode(medium)) == medium.length
    original = vlmlib.anyres_tokens(88, 55, model.pinpoints)
    assert medium.length == vlmlib.anyres_tokens(88, 55, model.pinpoints, rounding="hf") != original


def test_it_loads_from_its_folder(model, processor, tmp_path):
    model.net.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = vlmlib.load(tmp_path, device="cpu")
    assert type(loaded) is vlmlib.LlavaNext
    image = noise(64, 48)
    answers = [vlmlib.answer(m, [image, "what is this?"], n_predict=12) for m in (model, loaded)]
    assert answers[0] == answers[1] != ""


def test_the_same_pixels_of_another_size_are_another_picture(model):
    """What is unpadded differs, so nothing behind the picture may be kept."""
    (tiles,) = process_images([noise(60, 50)], model.image_processor, model.config)
    one, other = model.sized(tiles, (60, 50)), model.sized(tiles, (50, 50))
    cache = model.new_cache()
    prompt = "what? <image> this"
    first = model.turn(prompt, [one], cache=cache)
    first.prefill()
    second = model.turn(prompt, [other], cache=cache, start_pos=len(cache))
    assert second.reused_tokens <= len(model.prompt_ids(prompt)) - 2
    fresh = model.turn(prompt, [other]).prefill()
    assert (second.prefill() - fresh).abs().max() < 1e-4
