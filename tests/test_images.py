"""From anything that holds a picture to pixel values."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import noise
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vlmlib import (
    CheckpointError,
    ImageError,
    ImageProcessor,
    load_image,
    pad_to_square,
    process_images,
)

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
SIZES = [
    *((28, 28), (64, 48), (48, 64), (57, 28), (28, 57), (200, 31), (29, 30), (101, 99)),
    *((27, 29), (14, 14), (20, 9), (3, 2), (1, 1)),  # smaller than the crop
    *((1, 40), (40, 1), (1, 7), (7, 1)),
]


def processors(edge: int, crop: int) -> tuple[ImageProcessor, CLIPImageProcessorPil]:
    ours = ImageProcessor(edge, crop, crop, MEAN, STD)
    theirs = CLIPImageProcessorPil(
        size={"shortest_edge": edge},
        crop_size={"height": crop, "width": crop},
        image_mean=MEAN,
        image_std=STD,
    )
    return ours, theirs


# ---- ImageProcessor ----


@pytest.mark.parametrize(("edge", "crop"), [(28, 28), (40, 28), (33, 28), (20, 28), (21, 28)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_same_pixels_as_transformers(edge, crop, size):
    ours, theirs = processors(edge, crop)
    image = noise(*size)
    x = ours.preprocess(image)["pixel_values"]
    y = theirs.preprocess(image, return_tensors="pt")["pixel_values"]
    assert x.shape == y.shape == (1, 3, crop, crop) and x.dtype == torch.float32
    assert (x - y).abs().max() < 1e-5


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_stretched_picture_has_the_pixels_of_transformers(size):
    """SigLIP's: nothing is cut off, whatever the shape."""
    ours = ImageProcessor(None, 28, 26, MEAN, STD)
    theirs = SiglipImageProcessorPil(
        size={"height": 28, "width": 26}, image_mean=MEAN, image_std=STD
    )
    x = ours.preprocess(image := noise(*size))["pixel_values"]
    y = theirs.preprocess(image, return_tensors="pt")["pixel_values"]
    assert x.shape == y.shape == (1, 3, 28, 26)
    assert (x - y).abs().max() < 1e-5
    assert ours.region(*size) == (0, 0, 1, 1)


def test_a_square_is_stretched_as_it_is_cropped():
    """Tiles of NVILA and InternVL, whichever way their file says it."""
    tile = noise(28, 28)
    assert torch.equal(
        ImageProcessor(None, 28, 28, MEAN, STD).pixels(tile), processors(28, 28)[0].pixels(tile)
    )


def test_a_padded_picture_that_is_stretched():
    padding = ImageProcessor(None, 28, 28, MEAN, STD, do_pad=True)
    assert padding.region(60, 30) == processors_that_pad().region(60, 30) == (0, -0.5, 1, 1.5)
    expected = pad_to_square(noise(60, 30), padding.background).resize((28, 28), padding.resample)
    assert np.array_equal(padding.crop(noise(60, 30)), expected)


def processors_that_pad() -> ImageProcessor:
    return ImageProcessor(28, 28, 28, MEAN, STD, do_pad=True)


def test_several_pictures_at_once():
    ours, theirs = processors(28, 28)
    images = [noise(40, 30), noise(30, 40, seed=1)]
    x = ours.preprocess(images)["pixel_values"]
    y = theirs.preprocess(images, return_tensors="pt")["pixel_values"]
    assert x.shape == (2, 3, 28, 28)
    assert (x - y).abs().max() < 1e-5


def test_crop_shows_what_the_tower_sees():
    ours, _ = processors(28, 28)
    image = noise(50, 30)
    seen = torch.from_numpy(np.array(ours.crop(image))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    assert (ours.pixels(image) * std + mean - seen).abs().max() < 1e-6


def test_only_torch_tensors():
    with pytest.raises(ValueError, match="return_tensors"):
        processors(28, 28)[0].preprocess(noise(3, 3), return_tensors="np")


# ---- pad_to_square, process_images ----


@pytest.mark.parametrize(("size", "corner"), [((7, 4), (0, 1)), ((4, 7), (1, 0)), ((5, 5), (0, 0))])
def test_pad_to_square(size, corner):
    image, colour = noise(*size), (1, 2, 3)
    square = np.array(pad_to_square(image, colour))
    side, (left, top) = max(size), corner
    assert square.shape == (side, side, 3)
    inside = np.zeros((side, side), dtype=bool)
    inside[top : top + size[1], left : left + size[0]] = True
    assert np.array_equal(square[inside], np.array(image).reshape(-1, 3))
    assert (square[~inside] == colour).all()


@pytest.mark.parametrize("whose", [0, 1], ids=["ours", "transformers"])
def test_process_images_modes(whose):
    processor = processors(28, 28)[whose]
    images = [noise(60, 30), noise(30, 60, seed=1)]
    cropped = processors(28, 28)[0].preprocess(images)["pixel_values"]
    for config in (None, SimpleNamespace(), SimpleNamespace(image_aspect_ratio=None)):
        assert (process_images(images, processor, config) - cropped).abs().max() < 1e-5
    colour = tuple(int(255 * m) for m in MEAN)
    squares = [pad_to_square(i, colour) for i in images]
    padded = processors(28, 28)[0].preprocess(squares)["pixel_values"]
    x = process_images(images, processor, SimpleNamespace(image_aspect_ratio="pad"))
    assert x.shape == (2, 3, 28, 28)
    assert (x - padded).abs().max() < 1e-5
    assert x[0, :, 0].abs().max() < 0.02, "the padding is what normalising makes 0"


def test_do_pad_is_the_pad_mode():
    ours, _ = processors(28, 28)
    padding = processors_that_pad()
    x = process_images([noise(60, 30)], ours, SimpleNamespace(image_aspect_ratio="pad"))
    assert torch.equal(x, process_images([noise(60, 30)], padding))


@pytest.mark.parametrize("mode", ["any", "", "PAD", 1])
def test_unknown_mode(mode):
    with pytest.raises(ValueError, match=f"image_aspect_ratio must be .*got {mode!r}"):
        process_images(
            [noise(3, 3)], processors(28, 28)[0], SimpleNamespace(image_aspect_ratio=mode)
        )


def test_process_images_reads_files(tmp_path):
    noise(9, 9).save(tmp_path / "a.png")
    ours, _ = processors(28, 28)
    expected = process_images([noise(9, 9)], ours)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        assert torch.equal(process_images([source], ours), expected)


# ---- load_image: modes ----


def filled(mode: str, value) -> Image.Image:
    return Image.new(mode, (4, 3), value)


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_sixteen_bit_files_keep_their_brightness():
    ramp = Image.fromarray(np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8))
    grey = np.array(load_image(saved(ramp)))[..., 0].flatten()
    assert np.array_equal(grey, np.arange(0, 256, 4))


def test_the_given_picture_is_left_alone():
    image = filled("RGBA", (1, 2, 3, 4))
    load_image(image).putpixel((0, 0), (9, 9, 9))
    assert image.mode == "RGBA" and image.getpixel((0, 0)) == (1, 2, 3, 4)


# ---- load_image: errors ----


def test_a_picture_over_the_warning_limit_is_refused(monkeypatch):
    data = saved(noise(4, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11)  # Pillow itself only warns up to twice this
    with pytest.raises(ImageError, match="too many pixels"):
        load_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12)
    assert load_image(data).size == (4, 3)


# ---- ImageProcessor.from_folder ----

CONFIG = {
    "size": {"shortest_edge": 30},
    "crop_size": {"height": 28, "width": 26},
    "image_mean": MEAN,
    "image_std": STD,
}


def folder_with(tmp_path, config, name="preprocessor_config.json"):
    (tmp_path / name).write_text(config if isinstance(config, str) else json.dumps(config))
    return tmp_path


def test_from_folder(tmp_path):
    assert ImageProcessor.from_folder(folder_with(tmp_path, CONFIG)) == ImageProcessor(
        30, 28, 26, MEAN, STD
    )
    plain = CONFIG | {
        "size": 30,
        "crop_size": 28,
        "resample": 2,
        "rescale_factor": 1,
        "do_pad": True,
    }
    assert ImageProcessor.from_folder(folder_with(tmp_path, plain)) == ImageProcessor(
        30, 28, 28, MEAN, STD, resample=2, rescale_factor=1.0, do_pad=True
    )


def test_from_folder_with_the_newer_file(tmp_path):
    nested = folder_with(tmp_path, {"image_processor": CONFIG}, "processor_config.json")
    assert ImageProcessor.from_folder(nested).crop_size == {"height": 28, "width": 26}


def test_from_what_transformers_saves(tmp_path):
    ours, theirs = processors(40, 28)
    theirs.save_pretrained(tmp_path)
    assert ImageProcessor.from_folder(tmp_path) == ours
    size = {"height": 28, "width": 26}
    SiglipImageProcessorPil(size=size, image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
    assert ImageProcessor.from_folder(tmp_path) == ImageProcessor(None, 28, 26, MEAN, STD)


@pytest.mark.parametrize("edge", [30, None], ids=["cropped", "stretched"])
def test_what_is_written_is_read_again(tmp_path, edge):
    """By transformers, too: the same pixels."""
    ours = ImageProcessor(edge, 28, 26, MEAN, STD)
    folder_with(tmp_path, ours.to_dict("CLIPImageProcessor"))
    assert ImageProcessor.from_folder(tmp_path) == ours
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path)
    y = theirs.preprocess(noise(64, 48), return_tensors="pt")["pixel_values"]
    assert (ours.pixels(noise(64, 48)) - y[0]).abs().max() < 1e-5


def test_a_crop_that_is_not_done_is_not_read(tmp_path):
    stretched = CONFIG | {"size": {"height": 20, "width": 20}, "do_center_crop": False}
    assert ImageProcessor.from_folder(folder_with(tmp_path, stretched)).crop_size == {
        "height": 20,
        "width": 20,
    }


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "no preprocessor_config.json"),
        ({"processor_class": "X"}, "with an image_mean"),
        ({k: v for k, v in CONFIG.items() if k != "size"}, "not a CLIP preprocessor.*size"),
        (
            {k: v for k, v in CONFIG.items() if k != "image_std"},
            "not a CLIP preprocessor.*image_std",
        ),
        (CONFIG | {"size": {}}, "not a CLIP preprocessor"),
        (
            CONFIG | {"size": {"height": 30, "width": 30}},
            "size is {'height': 30, 'width': 30}, but crop_size is {'height': 28",
        ),
        (CONFIG | {"image_mean": None}, "not a CLIP preprocessor"),
        (CONFIG | {"resample": "cubic"}, "not a CLIP preprocessor"),
        (CONFIG | {"resample": 99}, "99 is not a valid Resampling"),
        (CONFIG | {"size": 10**6}, r"sizes \(1000000, 28, 26\), expected 1 to 2048"),
        (CONFIG | {"crop_size": -1}, "expected 1 to 2048"),
        (CONFIG | {"image_mean": [0.5, 0.5]}, "expected finite numbers, three of"),
        (CONFIG | {"image_std": [0.5, 0, 0.5]}, "expected finite numbers, three of"),
        (CONFIG | {"image_mean": [0.5, float("nan"), 0.5]}, "expected finite numbers, three of"),
        ('{"a": ' * 10**5 + "1" + "}" * 10**5, "not readable as JSON"),
        ("{ broken", "not readable as JSON"),
        ([1, 2], "expected an object"),
        ({"image_processor": 3}, "with an image_mean"),
    ],
)
def test_from_folder_errors(tmp_path, config, words):
    if config is not None:
        folder_with(tmp_path, config)
    with pytest.raises(CheckpointError, match=f"(?s){tmp_path.name}.*{words}"):
        ImageProcessor.from_folder(tmp_path)


def test_a_sliver_is_scaled_without_filling_the_memory():
    processor = processors(28, 28)[0]
    image = Image.new("RGB", (1, 200_000), (10, 20, 30))
    image.paste((200, 100, 50), (0, 99_990, 1, 100_010))
    assert processor.crop(image).size == (28, 28)
    assert processor.crop(image).getpixel((14, 14)) == (200, 100, 50)
