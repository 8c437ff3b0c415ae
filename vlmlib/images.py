"""Pictures in: from anything that holds one to the (b, 3, h, w) tensor a vision tower takes."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from .checkpoint import in_one_line, read_json
from .errors import CheckpointError, ImageError

ImageSource = Image.Image | str | os.PathLike | bytes


def load_image(source: ImageSource) -> Image.Image:
    """A file name, the bytes of a file, or a Pillow picture -> an RGB picture, upright.

    16-bit greys keep their brightness, transparent parts become white, an animation gives its first
    frame. Raises ImageError that names the source.
    """
    if isinstance(source, Image.Image):
        name, handle = "the given picture", None
    elif isinstance(source, (bytes, bytearray)):
        name, handle = f"{len(source)} bytes", io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        name, handle = str(source), _existing_file(source)
    else:
        raise ImageError(f"expected a picture or a file name, got {type(source).__name__}")
    try:
        if handle is None:
            return _rgb(source, name)
        with Image.open(handle) as image:
            _check_pixels(image)
            return _rgb(image, name)
    except ImageError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as e:
        raise ImageError(f"{name}: too many pixels to be opened safely ({e})") from None
    except Exception as e:  # Pillow's readers raise whatever a broken file makes them raise
        raise ImageError(f"{name}: not a picture that can be read ({in_one_line(e)})") from None


def _check_pixels(image: Image.Image) -> None:
    """What Pillow only warns of is an error here, without a filter for warnings: those are the
    process's own, and pictures may be read in several threads.
    """
    pixels, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if most is not None and pixels > most:
        raise Image.DecompressionBombError(f"{pixels:,} pixels, of at most {most:,}")


def _existing_file(source: str | os.PathLike) -> Path:
    path = Path(source)
    if os.path.isdir(path):
        raise ImageError(f"{path}: a folder, expected a picture file")
    if not os.path.exists(path):
        raise ImageError(f"{path}: no such file")
    return path


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.format == "EPS":  # Pillow would hand it to Ghostscript
        raise ImageError(f"{name}: an EPS picture is a program, and is not run")
    if 0 in image.size:
        raise ImageError(f"{name}: has no pixels (size {image.width}x{image.height})")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greys: convert() alone would clip them to white
        grey = np.asarray(image).astype(np.int64)
        shift = 8 if image.mode.startswith("I;16") or grey.max() > 255 else 0
        image = Image.fromarray((grey >> shift).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


LARGEST_SQUARE = 8192
"""Pixels along a side; as a square, a thin picture that is longer would not fit into memory."""


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Centre the picture on a square of its longer side, scaled down to LARGEST_SQUARE if that is
    more. Source: LLaVA:llava/mm_utils.py.
    """
    side = max(image.size)
    if side > LARGEST_SQUARE:
        scale, side = LARGEST_SQUARE / side, LARGEST_SQUARE
        image = image.resize([max(1, round(scale * s)) for s in image.size])
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


LARGEST = 2048
"""Pixels along a side that a preprocessor_config.json may ask for; no tower takes as many."""

SLIVER = 64
"""Of a picture more than this many times as long as wide only the middle is scaled."""


def _middle(image: Image.Image, length: int) -> Image.Image:
    """The middle `length` pixels of the longer side."""
    left, top = (max(0, side - length) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


def _sides(size: int | Mapping[str, int]) -> tuple[int, int]:
    """(height, width) as preprocessor_config.json has it."""
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """CLIP's and SigLIP's preprocessing in Pillow and torch: resize, crop, normalise.

    Reads the hub's preprocessor_config.json, and gives what transformers' CLIPImageProcessor and
    SiglipImageProcessor give with their Pillow backend; torchvision is not needed. The attributes
    `crop_size` and `image_mean` and the method `preprocess` carry transformers' names:
    `process_images` takes either.

    shortest_edge  length that the shorter side is scaled to, before the centre is cropped (CLIP);
                   None: the whole picture is stretched to the size of the crop (SigLIP)
    min_patches, max_patches  how many tiles InternVL cuts a picture into; LLaVA does not use them
    """

    shortest_edge: int | None
    crop_height: int
    crop_width: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    resample: int = Image.Resampling.BICUBIC
    rescale_factor: float = 1 / 255
    do_pad: bool = False
    min_patches: int = 1
    max_patches: int = 12

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> ImageProcessor:
        """Read preprocessor_config.json, or the newer processor_config.json that embeds it."""
        folder = Path(folder)
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (path := folder / name).is_file():
                config = read_json(path)
                config = config.get("image_processor", config)
                if isinstance(config, dict) and "image_mean" in config:
                    return cls._from_config(config, path)
        raise CheckpointError(f"{folder}: no preprocessor_config.json with an image_mean")

    @classmethod
    def _from_config(cls, config: dict[str, Any], path: Path) -> ImageProcessor:
        try:
            size, crop = config["size"], config.get("crop_size")
            edge = size if isinstance(size, int) else size.get("shortest_edge")
            height, width = _sides(crop or size)
            if edge is None and (height, width) != _sides(size):
                if config.get("do_center_crop", True):
                    raise ValueError(f"size is {size}, but crop_size is {crop}")
                height, width = _sides(size)
            made = cls(
                shortest_edge=None if edge is None else int(edge),
                crop_height=height,
                crop_width=width,
                image_mean=tuple(map(float, config["image_mean"])),
                image_std=tuple(map(float, config["image_std"])),
                resample=Image.Resampling(config.get("resample", Image.Resampling.BICUBIC)),
                rescale_factor=float(config.get("rescale_factor", 1 / 255)),
                do_pad=bool(config.get("do_pad", False)),
                min_patches=int(config.get("min_patches", 1)),
                max_patches=int(config.get("max_patches", 12)),
            )
            made._check()
            return made
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as e:
            raise CheckpointError(
                f"{path}: not a CLIP preprocessor configuration ({e!r})"
            ) from None

    def _check(self) -> None:
        """Raise ValueError for pictures that would fill the memory, or be no numbers."""
        sides = (self.shortest_edge, self.crop_height, self.crop_width)
        if not all(1 <= side <= LARGEST for side in sides if side is not None):
            raise ValueError(f"sizes {sides}, expected 1 to {LARGEST}")
        scaling = (*self.image_mean, *self.image_std, self.rescale_factor)
        counts = len(self.image_mean), len(self.image_std)
        if counts != (3, 3) or 0 in self.image_std or not all(map(isfinite, scaling)):
            raise ValueError("expected finite numbers, three of image_mean and of image_std, not 0")

    def check_size(self, size: int | Sequence[int]) -> None:
        """Raise CheckpointError if this is not for a tower of that size, a side or (h, w)."""
        height, width = (size, size) if isinstance(size, int) else size
        if (self.crop_height, self.crop_width) != (height, width):
            raise CheckpointError(
                f"its pictures are cut to {self.crop_height} x {self.crop_width} pixels, but its "
                f"vision tower takes {height} x {width}"
            )

    def to_dict(self, kind: str) -> dict[str, Any]:
        """What `from_folder` reads, as transformers' image processor of that name writes it."""
        sizes = {"size": self.crop_size, "do_center_crop": False}
        if self.shortest_edge is not None and kind.startswith(("CLIP", "Llava")):
            edge = {"shortest_edge": self.shortest_edge}
            sizes = {"size": edge, "crop_size": self.crop_size, "do_center_crop": True}
        return {
            "image_processor_type": kind,
            **sizes,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "resample": int(self.resample),
            "rescale_factor": self.rescale_factor,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
        }

    @property
    def crop_size(self) -> dict[str, int]:
        return {"height": self.crop_height, "width": self.crop_width}

    @property
    def background(self) -> tuple[int, int, int]:
        """The colour that is 0 after normalising, as LLaVA rounds it."""
        return tuple(int(255 * m) for m in self.image_mean)

    def crop(self, image: Image.Image) -> Image.Image:
        """The resized and cropped picture: exactly the pixels that the tower will see."""
        if self.do_pad:
            image = pad_to_square(image, self.background)
        if self.shortest_edge is None:
            return image.resize((self.crop_width, self.crop_height), self.resample)
        short = min(image.size)
        if max(image.size) > SLIVER * short:  # scaled whole it would not fit into memory
            image = _middle(image, SLIVER * short)
        w, h = (int(self.shortest_edge * side / short) for side in image.size)
        image = image.resize((w, h), self.resample)
        left, top = (w - self.crop_width) // 2, (h - self.crop_height) // 2
        return image.crop((left, top, left + self.crop_width, top + self.crop_height))

    def region(self, width: int, height: int) -> tuple[float, float, float, float]:
        """What `crop` shows of a picture of this size: (left, top, right, bottom), where the
        picture itself is 0 to 1; beyond that is padding.
        """
        side = max(width, height)
        w, h = (side, side) if self.do_pad else (width, height)
        if self.shortest_edge is not None:
            scale = self.shortest_edge / min(w, h)
            w, h = self.crop_width / scale, self.crop_height / scale
        half = w / width / 2, h / height / 2
        return 0.5 - half[0], 0.5 - half[1], 0.5 + half[0], 0.5 + half[1]

    def pixels(self, image: Image.Image) -> Tensor:
        """RGB picture -> (3, h, w) fp32."""
        x = torch.from_numpy(np.array(self.crop(image), dtype=np.float32)) * self.rescale_factor
        x = (x - torch.tensor(self.image_mean)) / torch.tensor(self.image_std)
        return rearrange(x, "h w c -> c h w")

    def preprocess(self, images: Image.Image | Sequence[Image.Image], return_tensors: str = "pt"):
        """transformers' call: {"pixel_values": (b, 3, h, w)}."""
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        images = [images] if isinstance(images, Image.Image) else images
        return {"pixel_values": torch.stack([self.pixels(i) for i in images])}
