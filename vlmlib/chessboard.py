"""Feature maps cut into boards of tiles and put together again, and pixels folded into channels.

Knows shapes only. All tiles go row by row. Papers: S2 https://arxiv.org/abs/2403.13043, NVILA
https://arxiv.org/abs/2412.04468.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from .errors import ShapeError
from .tiling import Size, s2_grids


def split_chessboard(x: Tensor, num_split_h: int, num_split_w: int) -> Tensor:
    """(b, c, H, W) -> (rows * cols * b, c, H / rows, W / cols), all of the first tile first.

    Raises ShapeError where H or W does not divide. Source: VILA:llava/model/llava_arch.py.
    """
    _check_factors(num_split_h, num_split_w)
    if x.dim() != 4:
        raise ShapeError(f"expected (b, c, h, w), got {tuple(x.shape)}")
    h, w = x.shape[-2:]
    if h % num_split_h or w % num_split_w:
        raise ShapeError(f"{h} x {w} does not split into {num_split_h} x {num_split_w} tiles")
    return rearrange(
        x, "b c (rows h) (cols w) -> (rows cols b) c h w", rows=num_split_h, cols=num_split_w
    )


def merge_chessboard(x: Tensor, num_split_h: int, num_split_w: int) -> Tensor:
    """(rows * cols * b, c, h, w), or (rows * cols * b, n, c) -> (b, c, rows * h, cols * w).

    The inverse of `split_chessboard`; n positions are a square. Raises ShapeError.
    Source: VILA:llava/model/llava_arch.py.
    """
    _check_factors(num_split_h, num_split_w)
    if len(x) % (num_split_h * num_split_w):
        raise ShapeError(f"{len(x)} tiles do not fill {num_split_h} x {num_split_w} boards")
    if x.dim() == 3:
        x = rearrange(x, "b (h w) c -> b c h w", h=square_side(x.shape[1]))
    if x.dim() != 4:
        raise ShapeError(f"expected (b, c, h, w) or (b, n, c), got {tuple(x.shape)}")
    return rearrange(
        x, "(rows cols b) c h w -> b c (rows h) (cols w)", rows=num_split_h, cols=num_split_w
    )


def _check_factors(*factors: int) -> None:
    if min(factors) < 1:
        raise ShapeError(f"features are cut or folded by 1 or more, got {factors}")


def square_side(n: int) -> int:
    """The side of a square of n positions. Raises ShapeError."""
    side = isqrt(n)
    if side * side != n:
        raise ShapeError(f"{n} positions are not a square, {side} x {side} is {side * side}")
    return side


def merge_features_for_dynamic_s2(
    image_features: Tensor,
    block_sizes: Sequence[Size | None],
    scales: Sequence[int],
    resize_output_to_scale_idx: int,
) -> tuple[list[Tensor], list[Size]]:
    """(t, n, c) features of all tiles of all pictures -> a (1, c * scales, h, w) map a picture.

    block_sizes   of every picture: (rows, cols) of its last scale, as `dynamic_s2_preprocess` made
                  them; None for a picture of one tile, whose channels are repeated for every scale
    scales        smallest first, in pixels
    resize_output_to_scale_idx   all scales are brought to the size of this one

    Also returns the (rows, cols) in tiles of each map. Raises ShapeError when t is not what the
    blocks and scales need. Source: VILA:llava/model/llava_arch.py.
    """
    if not -len(scales) <= resize_output_to_scale_idx < len(scales):
        raise ShapeError(f"no scale {resize_output_to_scale_idx} among {len(scales)} scales")
    grids = [[(1, 1)] if b is None else s2_grids(b, scales) for b in block_sizes]
    counts = [sum(rows * cols for rows, cols in grid) for grid in grids]
    if sum(counts) != len(image_features):
        raise ShapeError(
            f"{len(image_features)} tiles, but the blocks need {sum(counts)}: {counts}"
        )
    features, new_block_sizes = [], []
    for block, grid, tiles in zip(block_sizes, grids, image_features.split(counts), strict=True):
        at = 0 if block is None else resize_output_to_scale_idx
        merged = _merge_scales(tiles, grid, at)
        repeats = len(scales) if block is None else 1
        features.append(repeat(merged, "b c h w -> b (s c) h w", s=repeats))
        new_block_sizes.append(grid[at])
    return features, new_block_sizes


def _merge_scales(tiles: Tensor, grids: Sequence[Size], at: int) -> Tensor:
    """The tiles of all scales -> (1, c * scales, h, w), as large as scale number `at`."""
    parts = tiles.split([rows * cols for rows, cols in grids])
    maps = [merge_chessboard(p, *grid) for p, grid in zip(parts, grids, strict=True)]
    size = maps[at].shape[-2:]
    return torch.cat([F.interpolate(m.float(), size, mode="area").to(m) for m in maps], dim=1)


def space_to_depth(x: Tensor, factor: int) -> Tensor:
    """(b, h * w, c) with h = w -> (b, ceil(h / factor) ** 2, factor ** 2 * c): squares of features
    side by side in the channels, in the order (dy, dx, c).

    Where h does not divide, zeros are added below and on the right. Raises ShapeError.
    Source: VILA:llava/model/multimodal_projector/base_projector.py.
    """
    _check_factors(factor)
    side = square_side(x.shape[1])
    missing = -side % factor
    x = rearrange(x, "b (h w) c -> b h w c", h=side)
    x = F.pad(x, (0, 0, 0, missing, 0, missing))
    return rearrange(x, "b (h dy) (w dx) c -> b (h w) (dy dx c)", dy=factor, dx=factor)


def pixel_shuffle(x: Tensor, scale_factor: float = 0.5, *, version: str = "v2") -> Tensor:
    """(n, w, h, c) -> (n, w * s, h * s, c / s ** 2) for a scale_factor s of 1/2, 1/3, ...

    "v2" keeps both axes in their places, "v1" (first InternVL checkpoints) swaps them.
    Raises ShapeError. Source: InternVL:internvl_chat/internvl/model/internvl_chat.
    """
    factor = round(1 / scale_factor) if scale_factor > 0 else 0
    w, h = x.shape[1:3]
    if not abs(factor * scale_factor - 1) < 1e-6 or w % factor or h % factor:
        raise ShapeError(f"{w} x {h} features cannot be scaled by {scale_factor}")
    if version not in ("v1", "v2"):
        raise ValueError(f"version must be 'v1' or 'v2', got {version!r}")
    axes = "w h" if version == "v2" else "h w"
    return rearrange(x, f"n (w dw) (h dh) c -> n {axes} (dw dh c)", dw=factor, dh=factor)
