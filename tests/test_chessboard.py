"""Boards of tiles apart and together, scales merged, pixels folded into channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from helpers import VECTORS, noise
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.internvl.modeling_internvl import InternVLModel

from vlmlib import (
    ShapeError,
    dynamic_s2_preprocess,
    merge_chessboard,
    merge_features_for_dynamic_s2,
    pixel_shuffle,
    space_to_depth,
    split_chessboard,
)

few = st.integers(1, 4)


def counted(*shape: int) -> torch.Tensor:
    """A tensor in which every number is another one."""
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)


# ---- split and merge ----


@pytest.mark.parametrize("case", VECTORS["split_chessboard"], ids=lambda c: c["x"])
def test_golden_split(case, golden_tensors):
    x, y = golden_tensors[case["x"]], golden_tensors[case["out"]]
    assert torch.equal(split_chessboard(x, case["num_split_h"], case["num_split_w"]), y)
    assert torch.equal(merge_chessboard(y, case["num_split_h"], case["num_split_w"]), x)


@pytest.mark.parametrize("case", VECTORS["merge_chessboard"], ids=lambda c: c["x"])
def test_golden_merge(case, golden_tensors):
    x, y = golden_tensors[case["x"]], golden_tensors[case["out"]]
    assert torch.equal(merge_chessboard(x, case["num_split_h"], case["num_split_w"]), y)


@given(few, few, few, few, few, few)
def test_split_and_merge_undo_each_other(b, c, h, w, rows, cols):
    board = counted(b, c, h * rows, w * cols)
    tiles = split_chessboard(board, rows, cols)
    assert tiles.shape == (rows * cols * b, c, h, w)
    assert torch.equal(merge_chessboard(tiles, rows, cols), board)
    tiles = counted(rows * cols * b, c, h, w)
    assert torch.equal(split_chessboard(merge_chessboard(tiles, rows, cols), rows, cols), tiles)


@given(few, few, few, few, few)
def test_a_square_of_positions_is_a_map(b, c, side, rows, cols):
    tokens = counted(rows * cols * b, side * side, c)
    maps = rearrange(tokens, "b (h w) c -> b c h w", h=side)
    merged = merge_chessboard(tokens, rows, cols)
    assert torch.equal(merged, merge_chessboard(maps, rows, cols))


def test_tiles_go_row_by_row_and_pictures_inside_a_tile():
    board = counted(2, 1, 2, 3)
    assert split_chessboard(board, 2, 3).flatten().tolist() == [
        *(1, 7, 2, 8, 3, 9, 4, 10, 5, 11, 6, 12)
    ]


def test_errors_name_both_sizes():
    with pytest.raises(ShapeError, match="5 x 6 does not split into 2 x 3"):
        split_chessboard(torch.zeros(1, 1, 5, 6), 2, 3)
    with pytest.raises(ShapeError, match="6 x 5 does not split into 2 x 3"):
        split_chessboard(torch.zeros(1, 1, 6, 5), 2, 3)
    with pytest.raises(ShapeError, match="7 tiles do not fill 2 x 3"):
        merge_chessboard(torch.zeros(7, 1, 2, 2), 2, 3)
    with pytest.raises(ShapeError, match="8 positions are not a square, 2 x 2 is 4"):
        merge_chessboard(torch.zeros(6, 8, 2), 2, 3)


# ---- scales ----


@pytest.mark.parametrize("case", VECTORS["merge_features_for_dynamic_s2"], ids=lambda c: c["x"])
def test_golden_scales(case, golden_tensors):
    maps, blocks = merge_features_for_dynamic_s2(
        golden_tensors[case["x"]],
        case["block_sizes"],
        case["scales"],
        case["resize_output_to_scale_idx"],
    )
    assert [list(b) for b in blocks] == case["new_block_sizes"]
    for ours, name in zip(maps, case["out"], strict=True):
        torch.testing.assert_close(ours, golden_tensors[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", VECTORS["encode_images_dynamic_s2"], ids=lambda c: c["out"])
def test_golden_merge_split_project_merge(case, golden_tensors):
    maps, blocks = merge_features_for_dynamic_s2(
        golden_tensors[case["tower_output"]][: case["tower_rows"]],
        case["block_sizes"],
        case["scales"],
        case["resize_output_to_scale_idx"],
    )
    weight = golden_tensors[case["projector_weight"]]
    encoded = []
    for x, block in zip(maps, blocks, strict=True):
        tiles = rearrange(split_chessboard(x, *block), "t c h w -> t (h w) c")
        merged = merge_chessboard(tiles @ weight, *block)
        encoded.append(rearrange(merged, "1 c h w -> (h w) c"))
    expected = golden_tensors[case["out"]]
    torch.testing.assert_close(torch.stack(encoded), expected, atol=1e-5, rtol=0)


@given(few, few, st.integers(-3, 2), st.integers(1, 3))
def test_a_flat_map_stays_flat(rows, cols, at, side):
    # Every scale of a constant feature is that constant, whatever is resized to what.
    t = 1 + 4 + rows * cols
    x = torch.tensor([2.0, -3.0]).expand(t, side * side, 2)
    (merged,), (block,) = merge_features_for_dynamic_s2(x, [(rows, cols)], (7, 14, 21), at)
    assert block == [(1, 1), (2, 2), (rows, cols)][at]
    assert merged.shape == (1, 6, block[0] * side, block[1] * side)
    assert torch.equal(merged[0, :, 0, 0], torch.tensor([2.0, -3.0] * 3))
    assert (merged == merged[..., :1, :1]).all()


def test_small_scales_come_first_in_the_channels():
    x = counted(1 + 4 + 4, 1, 1)
    (merged,), _ = merge_features_for_dynamic_s2(x, [(2, 2)], (7, 14, 14), 2)
    assert merged[0, 0].flatten().tolist() == [1, 1, 1, 1]
    assert merged[0, 1].flatten().tolist() == [2, 3, 4, 5]
    assert merged[0, 2].flatten().tolist() == [6, 7, 8, 9]


def test_pictures_of_different_grids_come_as_a_list():
    # Stacking them, as TinyChat does, is an error: their numbers of positions differ.
    blocks = [(3, 4), None, (9, 1)]
    x = torch.randn(17 + 1 + 14, 4, 2, generator=torch.Generator().manual_seed(0))
    maps, new = merge_features_for_dynamic_s2(x, blocks, (448, 896, 1344), -1)
    assert [tuple(m.shape) for m in maps] == [(1, 6, 6, 8), (1, 6, 2, 2), (1, 6, 18, 2)]
    assert new == [(3, 4), (1, 1), (9, 1)]
    alone, _ = merge_features_for_dynamic_s2(x[18:], [(9, 1)], (448, 896, 1344), -1)
    assert torch.equal(alone[0], maps[2])
    assert torch.equal(maps[1][0, :2], maps[1][0, 4:])


def test_shrinking_averages_in_fp32():
    x = counted(1 + 4, 4, 1).to(torch.bfloat16) / 7
    (merged,), (block,) = merge_features_for_dynamic_s2(x, [(2, 2)], (7, 14), 0)
    fine = merge_chessboard(x[1:], 2, 2)
    assert merged.dtype == torch.bfloat16 and block == (1, 1)
    assert torch.equal(merged[:, 1:], F.avg_pool2d(fine.float(), 2).bfloat16())
    assert torch.equal(merged[:, :1], merge_chessboard(x[:1], 1, 1))


def test_resizing_is_given_fp32(monkeypatch):
    # On a CPU the sums are fp32 anyway, so the numbers would not tell.
    seen, resize = [], F.interpolate

    def recording(x, *args, **kwargs):
        seen.append(x.dtype)
        return resize(x, *args, **kwargs)

    monkeypatch.setattr(F, "interpolate", recording)
    merge_features_for_dynamic_s2(torch.zeros(5, 4, 1).half(), [(2, 2)], (7, 14), 1)
    assert seen == [torch.float32] * 2


@pytest.mark.parametrize("size", [(200, 80), (80, 200), (50, 50)])
def test_tiling_and_merging_agree(size):
    # The mean colour of a tile is its feature: the last scale's are where the picture has them.
    scales = (4, 8, 12)
    tiles, block = dynamic_s2_preprocess(noise(*size), scales, 12, 4)
    means = torch.stack(
        [torch.tensor(t.resize((1, 1), 4).getpixel((0, 0))).float()[None] for t in tiles]
    )
    (merged,), (new,) = merge_features_for_dynamic_s2(means, [block], scales, -1)
    assert new == block and merged.shape == (1, 9, *block)
    assert torch.equal(rearrange(merged[0, 6:], "c h w -> (h w) 1 c"), means[5:])


def test_errors_of_scales_name_both_numbers():
    x = torch.zeros(9, 4, 2)
    with pytest.raises(ShapeError, match=r"9 tiles, but the blocks need 17: \[17\]"):
        merge_features_for_dynamic_s2(x, [(3, 4)], (7, 14, 21), 2)
    with pytest.raises(ShapeError, match=r"9 tiles, but the blocks need 8: \[7, 1\]"):
        merge_features_for_dynamic_s2(x, [(1, 2), None], (7, 14, 21), 2)
    for at in (3, -4):
        with pytest.raises(ShapeError, match=f"no scale {at} among 3 scales"):
            merge_features_for_dynamic_s2(x, [(2, 2)], (7, 14, 21), at)
    with pytest.raises(ShapeError, match="scale 15 is not a multiple of the first scale, 7"):
        merge_features_for_dynamic_s2(x, [(2, 2)], (7, 15, 21), 2)


# ---- pixels into channels ----


@pytest.mark.parametrize("case", VECTORS["downsample"], ids=lambda c: c["x"])
@pytest.mark.parametrize(
    ("kind", "factor"),
    [("mlp_downsample", 2), ("mlp_downsample_2x2_fix", 2), ("mlp_downsample_3x3_fix", 3)],
)
def test_golden_space_to_depth(case, kind, factor, golden_tensors):
    assert torch.equal(
        space_to_depth(golden_tensors[case["x"]], factor), golden_tensors[case[kind]]
    )


@given(few, st.integers(1, 9), few, few)
def test_space_to_depth_loses_nothing(b, side, c, factor):
    x = counted(b, side * side, c)
    y = space_to_depth(x, factor)
    out = -(-side // factor)
    assert y.shape == (b, out * out, factor * factor * c)
    back = rearrange(y, "b (h w) (dy dx c) -> b (h dy) (w dx) c", h=out, dy=factor, dx=factor)
    assert torch.equal(rearrange(back[:, :side, :side], "b h w c -> b (h w) c"), x)
    assert not back[:, side:].any() and not back[:, :, side:].any()


def test_channel_order_is_dy_dx_c():
    x = rearrange(counted(1, 2, 2, 2), "b h w c -> b (h w) c")
    assert space_to_depth(x, 2).flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert space_to_depth(counted(1, 16, 1), 2)[0].tolist() == [
        *([1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16])
    ]


def test_space_to_depth_needs_a_square():
    with pytest.raises(ShapeError, match="15 positions are not a square, 3 x 3 is 9"):
        space_to_depth(torch.zeros(1, 15, 1), 2)


@pytest.mark.parametrize("case", VECTORS["pixel_shuffle"], ids=lambda c: c["x"])
def test_golden_pixel_shuffle(case, golden_tensors):
    shuffled = pixel_shuffle(golden_tensors[case["x"]], case["scale_factor"])
    assert torch.equal(shuffled, golden_tensors[case["out"]])


@given(few, few, few, few, st.integers(1, 3))
def test_pixel_shuffle(n, w, h, c, factor):
    x = counted(n, w * factor, h * factor, c)
    y = pixel_shuffle(x, 1 / factor)
    assert y.shape == (n, w, h, c * factor**2)
    assert torch.equal(pixel_shuffle(x, 1 / factor, version="v1"), y.transpose(1, 2))
    theirs = InternVLModel.pixel_shuffle(None, x, 1 / factor) if factor < 3 else y
    assert torch.equal(y, theirs)
    if w == h:
        tokens = rearrange(x, "n w h c -> n (w h) c")
        assert torch.equal(space_to_depth(tokens, factor), rearrange(y, "n w h c -> n (w h) c"))


def test_errors_of_pixel_shuffle():
    with pytest.raises(ShapeError, match=r"5 x 4 features cannot be scaled by 0.5"):
        pixel_shuffle(torch.zeros(1, 5, 4, 1))
    with pytest.raises(ShapeError, match=r"4 x 6 features cannot be scaled by 0.4"):
        pixel_shuffle(torch.zeros(1, 4, 6, 1), 0.4)
    with pytest.raises(ValueError, match="'v1' or 'v2', got 'v3'"):
        pixel_shuffle(torch.zeros(1, 4, 4, 1), version="v3")


def test_other_dimensions_are_an_error():
    with pytest.raises(ShapeError, match=r"expected \(b, c, h, w\), got \(4, 4, 4\)"):
        split_chessboard(torch.zeros(4, 4, 4), 2, 2)
    with pytest.raises(ShapeError, match=r"\(b, n, c\), got \(4, 4\)"):
        merge_chessboard(torch.zeros(4, 4), 2, 2)
