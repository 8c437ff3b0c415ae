"""One picture into tiles of the size that a vision tower takes, and their features back into one.

Two ways: *anyres* (LLaVA-1.6) fits the picture into the best of some listed resolutions, keeps its
aspect and fills up with black; *dynamic* (InternVL, NVILA) stretches it to the grid of the nearest
aspect. Sizes of pictures are (width, height) and grids (cols, rows), as Pillow counts; a
`block_size` is (rows, cols), as features count. Tiles go row by row. Nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf, nan

import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from .errors import ShapeError
from .images import ImageSource, load_image

Size = tuple[int, int]

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""The resolutions of LLaVA-1.6 as (width, height)."""

S2_SCALES = (448, 896, 1344)
"""The scales of NVILA."""

MOST_TILES = 256
"""Of one picture; what asks for more is a mistake, and would fill the memory."""

ROUNDING = {"original": int, "hf": lambda x: int(round(x, 7))}
"""How many rows or columns of a padded grid are picture, from a fraction; by checkpoint flavour."""


def _crops(image: Image.Image, tile: int) -> list[Image.Image]:
    """Cut into squares, row by row."""
    corners = [(x, y) for y in range(0, image.height, tile) for x in range(0, image.width, tile)]
    return [image.crop((x, y, x + tile, y + tile)) for x, y in corners]


def _stretched(image: Image.Image, grid: Size, tile: int) -> list[Image.Image]:
    cols, rows = grid
    return _crops(image.resize((cols * tile, rows * tile), Image.Resampling.BICUBIC), tile)


def _check_size(width: int, height: int) -> None:
    if min(width, height) < 1:
        raise ShapeError(f"a picture has at least 1 x 1 pixels, got {width} x {height}")


def patch_boxes(
    rows: int,
    cols: int,
    regions: Tensor | Sequence[float] = (0.0, 0.0, 1.0, 1.0),
    reach: float = 1.0,
) -> Tensor:
    """Boxes (left, top, right, bottom) of a grid over each of (..., 4) regions, row by row:
    (..., rows * cols, 4).

    reach   how many times as wide and high as its region the grid is, cut off at the region's
            border: 29 patches fold two by two into 15 positions that would reach to 30 / 29
    """
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    corners = torch.stack([x, y, x + 1, y + 1], dim=-1) / torch.tensor([cols, rows, cols, rows])
    grid = rearrange((corners * reach).clamp(max=1), "h w box -> (h w) box")
    left_top, right_bottom = torch.as_tensor(regions)[..., None, :].split(2, dim=-1)
    size = right_bottom - left_top
    return torch.cat([left_top, left_top], dim=-1) + grid * torch.cat([size, size], dim=-1)


# ---- dynamic: InternVL, NVILA ----


def tile_grids(min_num: int, max_num: int) -> list[Size]:
    """All (cols, rows) with min_num <= cols * rows <= max_num, fewest tiles first.

    Of two grids with as many tiles the one with fewer columns comes first. Raises ShapeError.
    """
    if not 1 <= min_num <= max_num <= MOST_TILES:
        raise ShapeError(
            f"expected 1 <= min_num <= max_num <= {MOST_TILES}, got {min_num} and {max_num}"
        )
    counts = range(1, max_num + 1)
    grids = [(c, r) for c in counts for r in counts if min_num <= c * r <= max_num]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


def find_closest_aspect_ratio(
    aspect_ratio: float, target_ratios: Sequence[Size], width: int, height: int, image_size: int
) -> Size:
    """The (cols, rows) of `target_ratios` whose cols / rows is nearest to `aspect_ratio`.

    Of two equally near the later one wins, if the picture has more than half of its pixels.
    Source: VILA:llava/mm_utils.py.
    """
    best, best_diff = (1, 1), inf
    for cols, rows in target_ratios:
        diff = abs(aspect_ratio - cols / rows)
        large = width * height > 0.5 * image_size * image_size * cols * rows
        if diff < best_diff or (diff == best_diff and large):
            best, best_diff = (cols, rows), diff
    return best


def dynamic_grid(
    width: int, height: int, min_num: int = 1, max_num: int = 12, image_size: int = 448
) -> Size:
    """The (cols, rows) that `dynamic_preprocess` stretches a picture of this size to."""
    _check_size(width, height)
    grids = tile_grids(min_num, max_num)
    return find_closest_aspect_ratio(width / height, grids, width, height, image_size)


def dynamic_preprocess(
    image: ImageSource,
    min_num: int = 1,
    max_num: int = 12,
    image_size: int = 448,
    use_thumbnail: bool = False,
) -> list[Image.Image]:
    """A picture -> square tiles of `image_size`; the aspect changes to that of the nearest grid.

    With `use_thumbnail` the whole picture, squeezed into one tile, comes last; not if there is only
    one tile. Raises ImageError and ShapeError. Source: VILA:llava/mm_utils.py.
    """
    image = load_image(image)
    tiles = _stretched(image, dynamic_grid(*image.size, min_num, max_num, image_size), image_size)
    if use_thumbnail and len(tiles) > 1:
        tiles += _stretched(image, (1, 1), image_size)
    return tiles


def dynamic_tiles(
    width: int,
    height: int,
    min_num: int = 1,
    max_num: int = 12,
    image_size: int = 448,
    use_thumbnail: bool = False,
) -> int:
    """How many tiles `dynamic_preprocess` makes. Raises ShapeError."""
    cols, rows = dynamic_grid(width, height, min_num, max_num, image_size)
    return cols * rows + (use_thumbnail and cols * rows > 1)


def dynamic_regions(
    width: int,
    height: int,
    min_num: int = 1,
    max_num: int = 12,
    image_size: int = 448,
    use_thumbnail: bool = False,
) -> Tensor:
    """(t, 4): what part of the picture each of the tiles of `dynamic_preprocess` shows."""
    cols, rows = dynamic_grid(width, height, min_num, max_num, image_size)
    tiles = patch_boxes(rows, cols)
    return torch.cat([tiles, patch_boxes(1, 1)]) if use_thumbnail and len(tiles) > 1 else tiles


# ---- dynamic at several scales: NVILA ----


def s2_sides(scales: Sequence[int]) -> list[int]:
    """Scales in pixels -> tiles a side; every scale must be a multiple of the first."""
    if not scales or min(scales) < 1:
        raise ShapeError(f"dynamic S2 needs scales of 1 pixel or more, got {list(scales)}")
    for scale in scales:
        if scale % scales[0]:
            raise ShapeError(f"scale {scale} is not a multiple of the first scale, {scales[0]}")
    return [scale // scales[0] for scale in scales]


def s2_grids(block_size: Size, scales: Sequence[int]) -> list[Size]:
    """The (rows, cols) of every scale: squares, and for the last scale `block_size`."""
    return [*((side, side) for side in s2_sides(scales)[:-1]), tuple(block_size)]


def dynamic_s2_block(
    width: int,
    height: int,
    s2_scales: Sequence[int] = S2_SCALES,
    max_num: int = 12,
    image_size: int = 448,
) -> Size:
    """The (rows, cols) of the last scale: as many tiles as a square there, up to `max_num`."""
    min_num = s2_sides(s2_scales)[-1] ** 2
    cols, rows = dynamic_grid(width, height, min_num, max_num, image_size)
    return rows, cols


def dynamic_s2_preprocess(
    image: ImageSource,
    s2_scales: Sequence[int] = S2_SCALES,
    max_num: int = 12,
    image_size: int = 448,
) -> tuple[list[Image.Image], Size]:
    """A picture -> the tiles of all scales, smallest scale first, and the last one's (rows, cols).

    Every scale but the last is a square of tiles. Raises ImageError and ShapeError.
    Source: VILA:llava/mm_utils.py.
    """
    image = load_image(image)
    block_size = dynamic_s2_block(*image.size, s2_scales, max_num, image_size)
    tiles = []
    for rows, cols in s2_grids(block_size, s2_scales):
        tiles += _stretched(image, (cols, rows), image_size)
    return tiles, block_size


def dynamic_s2_tiles(
    width: int,
    height: int,
    s2_scales: Sequence[int] = S2_SCALES,
    max_num: int = 12,
    image_size: int = 448,
) -> int:
    """How many tiles `dynamic_s2_preprocess` makes. Raises ShapeError."""
    block_size = dynamic_s2_block(width, height, s2_scales, max_num, image_size)
    return sum(rows * cols for rows, cols in s2_grids(block_size, s2_scales))


def dynamic_s2_tokens(
    width: int,
    height: int,
    s2_scales: Sequence[int] = S2_SCALES,
    max_num: int = 12,
    image_size: int = 448,
    *,
    tokens_per_tile: int = 256,
    resize_output_to_scale_idx: int = -1,
) -> int:
    """Positions of a picture after merging its scales at the chosen one, and the projector.
    Raises ShapeError.
    """
    block_size = dynamic_s2_block(width, height, s2_scales, max_num, image_size)
    rows, cols = s2_grids(block_size, s2_scales)[resize_output_to_scale_idx]
    return rows * cols * tokens_per_tile


# ---- anyres: LLaVA-1.6 ----


def select_best_resolution(original_size: Size, possible_resolutions: Sequence[Size]) -> Size:
    """The resolution that keeps most of the picture's pixels, and of those the least wasteful.

    On a tie the first one wins. The original checkpoints list (width, height), transformers' list
    (height, width): swap those. Raises ShapeError. Source: LLaVA:llava/mm_utils.py.
    """
    width, height = original_size
    _check_size(width, height)
    if not possible_resolutions:
        raise ShapeError("there are no resolutions to choose from")

    def score(resolution: Size) -> tuple[int, int]:
        w, h = resolution
        scale = min(w / width, h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - w * h

    best_width, best_height = max(possible_resolutions, key=score)
    return best_width, best_height


def get_anyres_image_grid_shape(
    image_size: Size, grid_pinpoints: Sequence[Size], tile: int
) -> Size:
    """The (cols, rows) of tiles of the best resolution. Raises ShapeError.
    Source: LLaVA:llava/mm_utils.py.
    """
    width, height = select_best_resolution(image_size, grid_pinpoints)
    if width % tile or height % tile:
        raise ShapeError(f"resolution {width}x{height} does not divide into tiles of {tile}")
    cols, rows = width // tile, height // tile
    if min(cols, rows) < 1 or cols * rows > MOST_TILES:
        raise ShapeError(
            f"resolution {width}x{height} is a grid of {cols} x {rows} tiles of {tile}, expected 1 "
            f"to {MOST_TILES} tiles"
        )
    return cols, rows


def anyres_tiles(
    image: ImageSource, pinpoints: Sequence[Size] = PINPOINTS, tile_size: int = 336
) -> list[Image.Image]:
    """A picture -> the whole of it squeezed into one tile, then the tiles of the best resolution.

    There the picture keeps its aspect, on black. Raises ImageError and ShapeError.
    Source: LLaVA:llava/mm_utils.py.
    """
    image = load_image(image)
    cols, rows = get_anyres_image_grid_shape(image.size, pinpoints, tile_size)
    fitted = fit_inside(image, (cols * tile_size, rows * tile_size))
    return [*_stretched(image, (1, 1), tile_size), *_crops(fitted, tile_size)]


def fit_inside(image: Image.Image, size: Size) -> Image.Image:
    """Scale to the largest that fits into `size` and centre that on black."""
    by_width, by_height = size[0] / image.width, size[1] / image.height
    if by_width < by_height:
        inner = size[0], min(ceil(image.height * by_width), size[1])
    else:
        inner = min(ceil(image.width * by_height), size[0]), size[1]
    black = Image.new("RGB", size)
    corner = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    black.paste(image.resize(inner, Image.Resampling.BICUBIC), corner)
    return black


def unpadded_size(
    rows: int, cols: int, original_size: Size, *, rounding: str = "original"
) -> tuple[int, int]:
    """How many of `rows` and `cols` are left once the padding of `fit_inside` is cut off.

    What is cut is the same on both sides, so an odd row may stay; at least one always does.
    `rounding` is a key of ROUNDING: "original", or "hf" for transformers' checkpoints. Raises
    ShapeError, and ValueError for another rounding.
    """
    width, height = original_size
    _check_size(width, height)
    if rounding not in ROUNDING:
        raise ValueError(f"rounding must be one of {list(ROUNDING)}, got {rounding!r}")
    round_ = ROUNDING[rounding]
    if width / height > cols / rows:
        return _without_margins(rows, round_(height * (cols / width))), cols
    return rows, _without_margins(cols, round_(width * (rows / height)))


def _without_margins(size: int, inner: int) -> int:
    return size - 2 * ((size - max(inner, 1)) // 2)


def unpad_image(tensor: Tensor, original_size: Size, *, rounding: str = "original") -> Tensor:
    """(c, h, w) of a padded picture -> the part that is picture; see `unpadded_size`, also for what
    it raises.

    Source: LLaVA:llava/model/llava_arch.py; "hf": transformers:models/llava_next.
    """
    h, w = tensor.shape[1:]
    kept_h, kept_w = unpadded_size(h, w, original_size, rounding=rounding)
    top, left = (h - kept_h) // 2, (w - kept_w) // 2
    return tensor[:, top : top + kept_h, left : left + kept_w]


def merge_anyres(
    features: Tensor,
    image_size: Size,
    pinpoints: Sequence[Size],
    tile: int,
    patches_per_side: int,
    image_newline: Tensor | None = None,
    merge_type: str = "spatial_unpad",
    *,
    rounding: str = "original",
) -> Tensor:
    """(t, n, c) features of one picture's `anyres_tiles` -> (n', c), the whole picture first.

    merge_type   "flat" tile after tile; "spatial" the rows of the whole grid; "spatial_unpad" those
                 without padding, with `image_newline` (c,) at the end of each

    A picture of one tile only keeps its n features, and gets one newline for "spatial_unpad".
    Raises ShapeError. Source: LLaVA:llava/model/llava_arch.py.
    """
    _check_merge_type(merge_type)
    if merge_type == "spatial_unpad" and image_newline is None:
        raise ValueError("merge_type 'spatial_unpad' needs image_newline")
    t, n, _ = features.shape
    side = patches_per_side
    if n != side * side:
        raise ShapeError(f"a tile has {n} features, expected {side} x {side}")
    if t == 1:
        newline = [] if merge_type != "spatial_unpad" else [image_newline[None].to(features)]
        return torch.cat([features[0], *newline])
    cols, rows = get_anyres_image_grid_shape(image_size, pinpoints, tile)
    if t != 1 + rows * cols:
        raise ShapeError(f"{t} tiles, expected 1 and a grid of {cols} x {rows}")
    if merge_type == "flat":
        return rearrange(features, "t n c -> (t n) c")
    tiles = features[1:]
    grid = rearrange(tiles, "(rows cols) (h w) c -> c (rows h) (cols w)", rows=rows, h=side)
    if merge_type == "spatial_unpad":
        grid = _end_rows(unpad_image(grid, image_size, rounding=rounding), image_newline)
    return torch.cat([features[0], rearrange(grid, "c h w -> (h w) c")])


def _end_rows(grid: Tensor, newline: Tensor) -> Tensor:
    """(c, h, w), (c,) -> (c, h, w + 1)"""
    column = repeat(newline.to(grid), "c -> c h 1", h=grid.shape[1])
    return torch.cat([grid, column], dim=2)


def anyres_boxes(
    width: int,
    height: int,
    pinpoints: Sequence[Size] = PINPOINTS,
    tile_size: int = 336,
    patch_size: int = 14,
    *,
    rounding: str = "original",
) -> Tensor:
    """(n, 4): what part of the picture each position of `merge_anyres` ("spatial_unpad") comes
    from; NaN for the newlines. The margin of half a row that unpadding may leave is squeezed in.
    """
    side = tile_size // patch_size
    cols, rows = get_anyres_image_grid_shape((width, height), pinpoints, tile_size)
    h, w = unpadded_size(rows * side, cols * side, (width, height), rounding=rounding)
    grid = rearrange(patch_boxes(h, w), "(h w) box -> h w box", h=h)
    lines = torch.cat([grid, torch.full((h, 1, 4), nan)], dim=1)
    return torch.cat([patch_boxes(side, side), rearrange(lines, "h w box -> (h w) box")])


def anyres_tokens(
    width: int,
    height: int,
    pinpoints: Sequence[Size] = PINPOINTS,
    tile_size: int = 336,
    patch_size: int = 14,
    *,
    merge_type: str = "spatial_unpad",
    rounding: str = "original",
) -> int:
    """How many positions `merge_anyres` gives a picture of this size. Raises ShapeError."""
    _check_merge_type(merge_type)
    side = tile_size // patch_size
    cols, rows = get_anyres_image_grid_shape((width, height), pinpoints, tile_size)
    if merge_type != "spatial_unpad":
        return side * side * (1 + rows * cols)
    h, w = unpadded_size(rows * side, cols * side, (width, height), rounding=rounding)
    return side * side + h * (w + 1)


def _check_merge_type(merge_type: str) -> None:
    if merge_type not in ("flat", "spatial", "spatial_unpad"):
        raise ValueError(
            f"merge_type must be 'flat', 'spatial' or 'spatial_unpad', got {merge_type!r}"
        )
