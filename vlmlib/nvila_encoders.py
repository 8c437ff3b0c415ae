"""From pixels to positions in NVILA: its vision tower, and what it puts around a picture or a clip.

An encoder asks the model for features and adds tokens to them; it knows before that how many
positions this will take. Sources: VILA:llava/model/multimodal_encoder, VILA:llava/model/encoders.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from math import nan
from typing import Any

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from transformers import SiglipVisionModel

from .chessboard import square_side
from .errors import CheckpointError, ShapeError
from .media import Medium
from .tiling import Size, patch_boxes, s2_grids

Pool = tuple[int, int, int]


class SiglipTower(nn.Module):
    """transformers' SiglipVisionModel as NVILA reads it: (t, 3, h, w) -> (t, n, c), no class token.

    select_layer   which of the hidden states; -2 is what the last layer but one gives
    scales, resize_output_to_scale_idx   of dynamic S2; a tower without it has no scales

    Position embeddings are interpolated (bicubic, over rows and columns) for another size of input.
    """

    def __init__(
        self,
        net: SiglipVisionModel,
        select_layer: int = -2,
        scales: Sequence[int] = (),
        resize_output_to_scale_idx: int = 0,
    ):
        super().__init__()
        self.net = net
        self.select_layer = select_layer
        self.scales = list(scales)
        self.resize_output_to_scale_idx = resize_output_to_scale_idx

    @property
    def config(self):
        return self.net.config

    @property
    def hidden_size(self) -> int:
        """Channels that reach the projector: those of all scales."""
        return self.config.hidden_size * max(len(self.scales), 1)

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.net.device, self.net.dtype)
        out = self.net(images, output_hidden_states=True, interpolate_pos_encoding=True)
        return out.hidden_states[self.select_layer]


Writer = Callable[[str | None], Tensor]
"""Text -> (n, d), what stands at its n positions."""


class MediaEncoder:
    """Text whose embeddings stand before and behind the features. `model` is an NVILA."""

    def __init__(self, start_tokens: str | None = None, end_tokens: str | None = "\n"):
        self.start_tokens = _text("start_tokens", start_tokens)
        self.end_tokens = _text("end_tokens", end_tokens)

    def length(self, model, pixels: Tensor, block: tuple[int, int] | None) -> int:
        """Positions that (t, 3, h, w) pixels will take."""
        raise NotImplementedError

    def __call__(self, model, features: Tensor, medium: Medium) -> Tensor:
        """(t, p, c) tower features of a medium -> (medium.length, d)"""
        raise NotImplementedError

    def boxes(self, model, medium: Medium) -> Tensor:
        """(medium.length, 4), as `VisionLanguageModel.boxes`."""
        raise NotImplementedError

    def around(self, model) -> int:
        """Positions of the start and end tokens."""
        return len(_ids(model, self.start_tokens)) + len(_ids(model, self.end_tokens))

    def _between(self, tiles: Tensor, write: Writer) -> Tensor:
        """(t, n, d) -> (t * n', d) with start and end tokens around each tile."""
        before, behind = (
            repeat(write(text), "n d -> t n d", t=len(tiles))
            for text in (self.start_tokens, self.end_tokens)
        )
        return torch.cat([before, tiles, behind], dim=1).flatten(0, 1)


class BasicImageEncoder(MediaEncoder):
    """The features of a picture, a line break behind them."""

    def length(self, model, pixels: Tensor, block: tuple[int, int] | None) -> int:
        rows, cols = _board(model, block)
        return rows * cols * model.tile_side(pixels.shape[-1]) ** 2 + self.around(model)

    def __call__(self, model, features: Tensor, medium: Medium) -> Tensor:
        projected = torch.stack(model.project_features(features, [medium.block]))
        return self._between(projected, partial(_embeds, model))

    def boxes(self, model, medium: Medium) -> Tensor:
        rows, cols = _board(model, medium.block)
        regions = medium.shown if medium.block is None else patch_boxes(rows, cols)
        tiles = model.tile_boxes(medium.pixels.shape[-1], regions)
        side = square_side(tiles.shape[1])
        pattern = "(rows cols) (h w) box -> 1 (rows h cols w) box"
        board = rearrange(tiles, pattern, rows=rows, cols=cols, h=side)
        return self._between(board, partial(_no_boxes, model))


class TSPVideoEncoder(MediaEncoder):
    """The frames of a clip, averaged over blocks of frames, rows and columns; once for every pool.

    pool_sizes   how many (frames, rows, columns) become one
    sep_tokens   text behind each of them; start and end tokens are around every pooled frame
    """

    def __init__(
        self,
        pool_sizes: Sequence[Sequence[int]],
        start_tokens: str | None = None,
        end_tokens: str | None = "\n",
        sep_tokens: str | None = None,
    ):
        super().__init__(start_tokens, end_tokens)
        self.pool_sizes = _pools(pool_sizes)
        self.sep_tokens = _text("sep_tokens", sep_tokens)

    def length(self, model, pixels: Tensor, block: tuple[int, int] | None = None) -> int:
        side, around = model.tile_side(pixels.shape[-1]), self.around(model)
        total = len(self.pool_sizes) * len(_ids(model, self.sep_tokens))
        for pool in self.pool_sizes:
            t, h, w = pooled_shape(len(pixels), side, pool)
            total += t * (h * w + around)
        return total

    def __call__(self, model, features: Tensor, medium: Medium) -> Tensor:
        frames = torch.stack(model.project_features(features))  # (t, n, d)
        pooled = [pool_features(frames, pool) for pool in self.pool_sizes]
        return self._separated(pooled, partial(_embeds, model))

    def boxes(self, model, medium: Medium) -> Tensor:
        pixels, shown = medium.pixels.shape[-1], medium.shown
        pooled = [model.tile_boxes(pixels, shown[::t], (h, w)) for t, h, w in self.pool_sizes]
        return self._separated(pooled, partial(_no_boxes, model))

    def _separated(self, pooled: Sequence[Tensor], write: Writer) -> Tensor:
        """(t, n, d) for every pool -> (n', d)"""
        parts = ([self._between(frames, write), write(self.sep_tokens)] for frames in pooled)
        return torch.cat(sum(parts, []))


def _board(model, block: Size | None) -> Size:
    """(rows, cols) of the tiles whose positions a picture takes."""
    if block is None:
        return 1, 1
    tower = model.get_vision_tower()
    return s2_grids(block, tower.scales)[tower.resize_output_to_scale_idx]


class BasicVideoEncoder(TSPVideoEncoder):
    """The frames of a clip as they are, a line break behind each."""

    def __init__(self, start_tokens: str | None = None, end_tokens: str | None = "\n"):
        super().__init__([[1, 1, 1]], start_tokens, end_tokens)


def pooled_shape(t: int, side: int, pool: Pool) -> tuple[int, int, int]:
    """(frames, rows, columns) that are left of t frames of side x side. Raises ShapeError."""
    shape = (t, side, side)
    if any(n % p for n, p in zip(shape, pool, strict=True)):
        raise ShapeError(f"{t} frames of {side} x {side} features do not divide into pools {pool}")
    return tuple(n // p for n, p in zip(shape, pool, strict=True))


def pool_features(x: Tensor, pool: Pool) -> Tensor:
    """(t, h * w, d) with h = w -> (t / pt, h / ph * w / pw, d), the mean of every block."""
    side = square_side(x.shape[1])
    t, h, w = pooled_shape(len(x), side, pool)
    pattern = "(t pt) (h ph w pw) d -> t (h w) d"
    pt, ph, pw = pool
    return reduce(x, pattern, "mean", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)


ENCODERS = {
    "llava.model.encoders.BasicImageEncoder": ("image", BasicImageEncoder),
    "llava.model.encoders.BasicVideoEncoder": ("video", BasicVideoEncoder),
    "llava.model.encoders.TSPVideoEncoder": ("video", TSPVideoEncoder),
}
"""What a checkpoint may name as `_target_`. Nothing is ever imported by such a name."""


def build_encoder(kind: str, spec: str | dict[str, Any]) -> MediaEncoder:
    """An encoder from a checkpoint's `image_encoder` or `video_encoder`: JSON with a `_target_`,
    the rest are its parameters. Raises CheckpointError.
    """
    try:
        options = dict(json.loads(spec) if isinstance(spec, str) else spec)
        target = options.pop("_target_")
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CheckpointError(
            f"{kind}_encoder must be a JSON object with a _target_, got {spec!r}"
        ) from None
    known = [name for name, (its_kind, _) in ENCODERS.items() if its_kind == kind]
    if target not in known:
        raise CheckpointError(
            f"{kind}_encoder has the _target_ {target!r}, expected one of {known}"
        )
    try:
        return ENCODERS[target][1](**options)
    except TypeError as e:
        raise CheckpointError(f"{kind}_encoder {target}: {e}") from None


def _ids(model, text: str | None) -> list[int]:
    return [] if text is None else model.tokenizer(text, add_special_tokens=False).input_ids


def _embeds(model, text: str | None) -> Tensor:
    """(n, d)"""
    return model.embed(torch.tensor(_ids(model, text), dtype=torch.long))


def _no_boxes(model, text: str | None) -> Tensor:
    """(n, 4): text lies nowhere in a picture."""
    return torch.full((len(_ids(model, text)), 4), nan)


def _text(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be text or nothing, got {value!r}")
    return value


def _pools(sizes: Any) -> list[Pool]:
    ok = isinstance(sizes, (list, tuple)) and sizes
    for size in sizes if ok else ():
        ok = ok and isinstance(size, (list, tuple)) and len(size) == 3
        ok = ok and all(type(n) is int and n >= 1 for n in size)
    if not ok:
        raise TypeError(f"pool_sizes must be a list of (frames, rows, columns), got {sizes!r}")
    return [tuple(size) for size in sizes]
