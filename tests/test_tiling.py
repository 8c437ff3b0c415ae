"""Pictures into tiles, features of tiles back into one sequence, and the counts of both."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import VECTORS, noise
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as got_ocr2
from transformers.models.llava_next import modeling_llava_next as llava_next
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from vlmlib import (
    ImageError,
    ShapeError,
    anyres_tiles,
    anyres_tokens,
    dynamic_preprocess,
    dynamic_s2_preprocess,
    dynamic_s2_tiles,
    dynamic_s2_tokens,
    dynamic_tiles,
    find_closest_aspect_ratio,
    get_anyres_image_grid_shape,
    merge_anyres,
    select_best_resolution,
    tile_grids,
    unpad_image,
)
from vlmlib.tiling import PINPOINTS, dynamic_grid, fit_inside, s2_grids

SIDES = (1, 2, 9, 55, 88, 110, 205, 336, 337, 640, 656, 752, 987, 1000, 1128, 1399)
ROUNDED_APART = [(88, 55), (55, 176), (205, 656), (1128, 47), (752, 423), (987, 376)]
SMALL = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))

sides = st.integers(1, 2500)
sizes = st.tuples(sides, sides)


def pixels_of(tiles) -> np.ndarray:
    """(t, h, w, 3)"""
    return np.stack([np.asarray(tile) for tile in tiles])


def swapped(pairs):
    return [(b, a) for a, b in pairs]


# ---- dynamic ----


@pytest.mark.parametrize("case", VECTORS["dynamic_preprocess"], ids=lambda c: str(c["size"]))
def test_golden_dynamic(case):
    options = [case[k] for k in ("min_num", "max_num", "image_size")]
    tiles = dynamic_preprocess(Image.new("RGB", case["size"]), *options, case["use_thumbnail"])
    assert len(tiles) == case["tiles"]
    assert dynamic_tiles(*case["size"], *options, case["use_thumbnail"]) == case["tiles"]
    (w, h), ratios = case["size"], tile_grids(case["min_num"], case["max_num"])
    grid = find_closest_aspect_ratio(w / h, ratios, w, h, case["image_size"])
    assert list(grid) == case["grid_w_h"]


def test_grids_with_fewest_tiles_first():
    assert tile_grids(1, 4) == [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1)]
    assert tile_grids(3, 3) == [(1, 3), (3, 1)]


@pytest.mark.parametrize(("low", "high"), [(5, 3), (0, 4), (-1, -1), (1, 10**9)])
def test_no_grid_is_an_error(low, high):
    with pytest.raises(ShapeError, match=f"got {low} and {high}"):
        dynamic_preprocess(Image.new("RGB", (5, 5)), low, high)


@pytest.mark.parametrize(
    ("side", "grid"), [(1, 1), (633, 1), (634, 2), (950, 2), (951, 3), (9999, 3)]
)
def test_squares_grow_at_half_their_area(side, grid):
    assert dynamic_grid(side, side, 1, 12, 448) == (grid, grid)


def test_equally_near_grids_of_one_area():
    # 5 : 4 lies just between 1 : 2 and 2 : 1; only a large picture takes the later one.
    assert dynamic_grid(5, 4, 2, 3, 448) == (1, 2)
    assert dynamic_grid(500, 400, 2, 3, 448) == (1, 2)
    assert dynamic_grid(1000, 800, 2, 3, 448) == (2, 1)


@given(sizes, st.integers(1, 6), st.integers(0, 8), st.sampled_from([28, 448]))
def test_same_grid_as_transformers(size, low, more, tile):
    theirs = got_ocr2.get_optimal_tiled_canvas(size[::-1], (tile, tile), low, low + more)
    assert dynamic_grid(*size, low, low + more, tile) == theirs


@pytest.mark.parametrize("size", [(90, 60), (61, 200), (30, 31), (300, 40), (1, 9)], ids=str)
def test_same_tiles_as_transformers(size):
    image, tile = noise(*size), SizeDict(height=28, width=28)
    processor = got_ocr2.GotOcr2ImageProcessorPil(resample=Image.Resampling.BICUBIC)
    chw = np.asarray(image).transpose(2, 0, 1)
    theirs = processor.crop_image_to_patches(
        chw, 1, 12, True, tile, resample=Image.Resampling.BICUBIC
    )
    ours = dynamic_preprocess(image, 1, 12, 28, use_thumbnail=True)
    assert (pixels_of(ours) == np.stack(theirs).transpose(0, 2, 3, 1)).all()


def test_tiles_go_row_by_row_and_the_thumbnail_is_last():
    image = Image.new("RGB", (60, 30), "white")
    image.paste("red", (50, 0, 60, 10))  # top right
    tiles = dynamic_preprocess(image, 18, 18, 10, use_thumbnail=True)
    assert [i for i, t in enumerate(tiles) if t.getpixel((5, 5)) == (255, 0, 0)] == [5]
    assert tiles[-1].size == (10, 10) and tiles[-1].getpixel((9, 0))[1] < 100


def test_one_tile_has_no_thumbnail():
    assert len(dynamic_preprocess(noise(50, 50), 1, 1, 28, use_thumbnail=True)) == 1
    assert dynamic_tiles(50, 50, 1, 1, 28, use_thumbnail=True) == 1
    assert dynamic_tiles(100, 50, 1, 2, 28, use_thumbnail=True) == 3


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
@pytest.mark.parametrize(
    "cut", [dynamic_preprocess, anyres_tiles, lambda i: dynamic_s2_preprocess(i)[0]]
)
def test_any_picture_mode_gives_rgb_tiles(mode, cut):
    assert {t.mode for t in cut(Image.new(mode, (40, 30)))} == {"RGB"}


def test_what_is_no_picture_is_named():
    with pytest.raises(ImageError, match="nowhere.png"):
        dynamic_preprocess("nowhere.png")


# ---- dynamic at several scales ----


@pytest.mark.parametrize("case", VECTORS["dynamic_s2_preprocess"], ids=lambda c: str(c["size"]))
def test_golden_dynamic_s2(case):
    options = [case[k] for k in ("s2_scales", "max_num", "image_size")]
    tiles, block_size = dynamic_s2_preprocess(Image.new("RGB", case["size"]), *options)
    assert len(tiles) == case["tiles"] and list(block_size) == case["block_size"]
    assert {t.size for t in tiles} == {(case["image_size"],) * 2}
    assert dynamic_s2_tiles(*case["size"], *options) == case["tiles"]


@given(sizes)
def test_nvila_takes_14_to_17_tiles(size):
    n = dynamic_s2_tiles(*size)
    assert 14 <= n <= 17
    assert dynamic_s2_tokens(*size) == 256 * (n - 5)
    assert dynamic_s2_tokens(*size, resize_output_to_scale_idx=1) == 256 * 4
    assert dynamic_s2_tokens(*size, tokens_per_tile=121) == 121 * (n - 5)


def test_scales_are_squares_of_the_whole_picture_then_a_grid():
    image = noise(200, 80)
    tiles, block_size = dynamic_s2_preprocess(image, (28, 56, 84), 12, 28)
    assert block_size == (2, 5) and s2_grids(block_size, (28, 56, 84))[1] == (2, 2)
    small = image.resize((28, 28), Image.Resampling.BICUBIC)
    square = image.resize((56, 56), Image.Resampling.BICUBIC)
    wide = image.resize((140, 56), Image.Resampling.BICUBIC)
    assert tiles[0] == small
    assert tiles[2] == square.crop((28, 0, 56, 28)) and tiles[3] == square.crop((0, 28, 28, 56))
    assert tiles[5 + 4] == wide.crop((112, 0, 140, 28))
    assert tiles[5 + 5] == wide.crop((0, 28, 28, 56))


def test_errors_of_dynamic_s2_name_both_numbers():
    with pytest.raises(ShapeError, match="scale 900 is not a multiple of the first scale, 448"):
        dynamic_s2_preprocess(noise(5, 5), (448, 900))
    with pytest.raises(ShapeError, match="got 9 and 6"):
        dynamic_s2_preprocess(noise(5, 5), (28, 56, 84), 6, 28)


# ---- anyres: the choice ----


@pytest.mark.parametrize("case", VECTORS["anyres"], ids=lambda c: str(c["size"]))
def test_golden_anyres(case):
    size, pinpoints = tuple(case["size"]), case["pinpoints"]
    assert list(select_best_resolution(size, pinpoints)) == case["best"]
    cols, rows = get_anyres_image_grid_shape(size, pinpoints, 336)
    assert [cols, rows] == case["grid_w_h"]
    unpadded = unpad_image(torch.zeros(2, rows * 24, cols * 24), size)
    assert list(unpadded.shape[1:]) == case["unpadded_h_w"]


@given(sizes)
def test_same_choice_as_transformers(size):
    theirs = llava_next.select_best_resolution(size[::-1], swapped(PINPOINTS))
    assert select_best_resolution(size, PINPOINTS) == theirs[::-1]
    cols, rows = get_anyres_image_grid_shape(size, PINPOINTS, 336)
    patches = llava_next.image_size_to_num_patches(size[::-1], swapped(PINPOINTS), 336)
    assert 1 + cols * rows == patches


def test_ties():
    assert select_best_resolution((10, 10), [(40, 40), (20, 20)]) == (20, 20)  # least wasted
    assert select_best_resolution((10, 10), [(20, 40), (40, 20)]) == (20, 40)  # first listed
    assert select_best_resolution((10, 10), [(40, 20), (20, 40)]) == (40, 20)


def test_a_resolution_that_is_no_grid_names_both_sizes():
    with pytest.raises(ShapeError, match="500x336 .* tiles of 336"):
        get_anyres_image_grid_shape((640, 480), [(500, 336)], 336)


@pytest.mark.parametrize("size", [(0, 336), (-336, -336), (33600, 33600)])
def test_a_resolution_of_no_tiles_or_too_many(size):
    with pytest.raises(ShapeError, match="tiles of 336, expected 1 to 256 tiles"):
        get_anyres_image_grid_shape((640, 480), [size], 336)


# ---- anyres: the tiles ----


@pytest.mark.parametrize(
    "size",
    [(60, 45), (45, 60), (28, 28), (200, 31), (31, 200), (3, 90), (1, 40), (57, 56)],
    ids=str,
)
def test_same_tiles_as_transformers_llava_next(size):
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=[list(p) for p in swapped(SMALL)],
        do_normalize=False,
        do_rescale=False,
    )
    image = noise(*size)
    theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(0, 2, 3, 1)
    assert (pixels_of(anyres_tiles(image, SMALL, 28)) == theirs).all()


def test_padding_is_black_and_centred():
    fitted = np.asarray(fit_inside(Image.new("RGB", (30, 10), "white"), (60, 40)))
    assert (fitted[:10] == 0).all() and (fitted[30:] == 0).all() and (fitted[10:30] == 255).all()
    fitted = np.asarray(fit_inside(Image.new("RGB", (10, 30), "white"), (41, 60)))
    assert (fitted[:, 10:30] == 255).all() and not fitted[:, :10].any() and not fitted[:, 30:].any()


def test_the_free_side_is_rounded_up():
    fitted = np.asarray(fit_inside(Image.new("RGB", (30, 10), "white"), (40, 40)))
    assert fitted[:, 0, 0].astype(bool).sum() == 14


# ---- anyres: the features ----


@pytest.mark.parametrize(
    ("size", "tokens"),
    [((640, 480), 2340), ((336, 336), 1176), ((672, 672), 2928), ((1000, 300), 2182)],
    ids=str,
)
@pytest.mark.parametrize("rounding", ["original", "hf"])
def test_token_counts_of_llava_1_6(size, tokens, rounding):
    assert anyres_tokens(*size, rounding=rounding) == tokens


def packed_by_transformers(features, size, newline, tile, patch):
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=tile, patch_size=patch),
        image_grid_pinpoints=swapped(PINPOINTS),
    )
    pack = llava_next.LlavaNextModel.pack_image_features
    sizes = torch.tensor([size[::-1]])
    return pack(SimpleNamespace(config=config), [features], sizes, "default", newline)[0][0]


def tiles_of(size, patches: int, channels: int = 1) -> torch.Tensor:
    """Features in which every number is another one."""
    cols, rows = get_anyres_image_grid_shape(size, PINPOINTS, 336)
    shape = (1 + cols * rows, patches**2, channels)
    return torch.arange(shape[0] * shape[1] * shape[2]).float().view(shape)


@pytest.mark.parametrize("width", SIDES)
def test_same_features_as_transformers_hf_flavour(width):
    newline = torch.tensor([-1.0])
    sizes = [(width, h) for h in SIDES] + [s for s in ROUNDED_APART if s[0] == width]
    for size in sizes:
        features = tiles_of(size, 24)
        ours = merge_anyres(features, size, PINPOINTS, 336, 24, newline, rounding="hf")
        theirs = packed_by_transformers(features, size, newline, 336, 14)
        assert len(ours) == anyres_tokens(*size, rounding="hf")
        if keeps_nothing(size):  # see test_thin_pictures_keep_a_row
            assert len(theirs) < len(ours)
        else:
            assert torch.equal(ours, theirs), size


def keeps_nothing(size) -> bool:
    """transformers takes all rows or columns of the thinnest pictures for padding."""
    cols, rows = get_anyres_image_grid_shape(size, PINPOINTS, 336)
    grid = torch.zeros(1, rows * 24, cols * 24)
    return llava_next.unpad_image(grid, size[::-1]).numel() == 0


def test_only_the_thinnest_pictures_differ_from_transformers():
    empty = [(w, h) for w in SIDES for h in SIDES if keeps_nothing((w, h))]
    assert empty and all(max(s) >= 24 * min(s) for s in empty)


@pytest.mark.parametrize("size", ROUNDED_APART, ids=str)
def test_the_flavours_round_apart(size):
    assert anyres_tokens(*size) != anyres_tokens(*size, rounding="hf")


@pytest.mark.parametrize("rounding", ["original", "hf"])
@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (3, 1000), (1399, 2)], ids=str)
def test_thin_pictures_keep_a_row(size, rounding):
    cols, rows = get_anyres_image_grid_shape(size, PINPOINTS, 336)
    kept = unpad_image(torch.zeros(1, rows * 24, cols * 24), size, rounding=rounding)
    assert kept.numel() and min(kept.shape[1:]) <= 2
    assert anyres_tokens(*size, rounding=rounding) > 576


@given(sizes, st.integers(1, 40), st.integers(1, 40), st.sampled_from(["original", "hf"]))
def test_unpadding_is_centred_and_leaves_one_side_whole(size, h, w, rounding):
    grid = torch.arange(h * w).view(1, h, w)
    kept = unpad_image(grid, size, rounding=rounding)
    _, kept_h, kept_w = kept.shape
    assert kept.numel() and (kept_h == h or kept_w == w)
    top, left = (h - kept_h) // 2, (w - kept_w) // 2
    assert 2 * top == h - kept_h and 2 * left == w - kept_w
    assert torch.equal(kept, grid[:, top : h - top, left : w - left])


@given(sizes, st.sampled_from(["flat", "spatial", "spatial_unpad"]))
def test_counts_without_making_anything(size, merge_type):
    features = tiles_of(size, 4)
    merged = merge_anyres(features, size, PINPOINTS, 336, 4, torch.zeros(1), merge_type)
    assert len(merged) == anyres_tokens(*size, patch_size=84, merge_type=merge_type)
    assert torch.equal(merged[:16], features[0])


def test_merge_types_by_hand():
    # one row of two tiles, 2 x 2 patches each:   4 5 | 8  9
    #                                             6 7 | 10 11
    features = torch.arange(12.0).view(3, 4, 1)
    args = (features, (56, 28), [(56, 28)], 28, 2)
    newline = torch.tensor([-1.0])
    flat = merge_anyres(*args, merge_type="flat").flatten().tolist()
    spatial = merge_anyres(*args, merge_type="spatial").flatten().tolist()
    unpadded = merge_anyres(*args, newline).flatten().tolist()
    assert flat == list(range(12))
    assert spatial == [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11]
    assert unpadded == [0, 1, 2, 3, 4, 5, 8, 9, -1, 6, 7, 10, 11, -1]


def test_a_single_tile():
    one = torch.arange(4.0).view(1, 4, 1)
    newline = torch.tensor([-1.0])
    ended = merge_anyres(one, (9, 9), PINPOINTS, 28, 2, newline)
    assert ended.flatten().tolist() == [0, 1, 2, 3, -1]
    for merge_type in ("flat", "spatial"):
        merged = merge_anyres(one, (9, 9), PINPOINTS, 28, 2, newline, merge_type)
        assert torch.equal(merged, one[0])


def test_merge_keeps_the_dtype():
    features = tiles_of((640, 480), 2).to(torch.bfloat16)
    merged = merge_anyres(features, (640, 480), PINPOINTS, 336, 2, torch.zeros(1))
    assert merged.dtype == torch.bfloat16


def test_errors_of_merging_name_both_sizes():
    features, newline = torch.zeros(4, 4, 1), torch.zeros(1)
    with pytest.raises(ShapeError, match="4 tiles, expected 1 and a grid of 2 x 2"):
        merge_anyres(features, (640, 480), PINPOINTS, 336, 2, newline)
    with pytest.raises(ShapeError, match="4 features, expected 3 x 3"):
        merge_anyres(features, (640, 480), PINPOINTS, 336, 3, newline)
    with pytest.raises(ValueError, match="'flat', 'spatial' or 'spatial_unpad', got 'unpad'"):
        merge_anyres(features, (640, 480), PINPOINTS, 336, 2, newline, "unpad")
    with pytest.raises(ValueError, match="got 'unpad'"):
        anyres_tokens(640, 480, merge_type="unpad")
    with pytest.raises(ValueError, match="needs image_newline"):
        merge_anyres(features, (640, 480), PINPOINTS, 336, 2)
    with pytest.raises(ValueError, match="'original', 'hf'.*got 'up'"):
        anyres_tokens(640, 480, rounding="up")


def test_what_there_is_nothing_to_choose_or_cut_from():
    with pytest.raises(ShapeError, match="no resolutions"):
        select_best_resolution((3, 4), [])
    with pytest.raises(ShapeError, match="1 x 1 pixels, got 0 x 0"):
        unpad_image(torch.zeros(3, 4, 4), (0, 0))
