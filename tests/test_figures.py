"""Figures: what is wrapped for a page, and what is drawn."""

from __future__ import annotations

import io

import numpy as np
import pytest
from helpers import noise
from matplotlib.colors import to_hex, to_rgb
from PIL import Image

from vlmlib.course import visible
from vlmlib.decoding import TokenTrace
from vlmlib.figures import (
    ORANGE,
    accuracy,
    axes,
    choices,
    context_bars,
    distribution,
    heat,
    png_of,
    principal_colours,
    scales,
    show,
    sureness,
    tiling,
    timeline,
    touched,
)

WORDS = {"caption": "A caption.", "alt": "what is there"}


def opened(shown) -> Image.Image:
    return Image.open(io.BytesIO(shown.png))


def test_fewer_colours_and_less_space_but_the_same_size():
    photo = noise(90, 60)
    whole, small = show(photo, **WORDS), show(photo, **WORDS, colours=16)
    assert opened(small).size == opened(whole).size == (90, 60)
    assert small.width == whole.width == 90
    assert len(opened(small).convert("RGB").getcolors()) <= 16
    assert len(small.png) < len(whole.png) / 2
    figure, _ = axes(3, 2)
    assert opened(show(figure, **WORDS, colours=8)).size == (450, 300)
    assert show(figure, **WORDS, colours=8).width == 300


def test_few_colours_are_those_of_the_picture():
    picture = Image.linear_gradient("L").convert("RGB")
    picture.paste("#D55E00", (10, 10, 30, 30))
    assert opened(show(picture, **WORDS, colours=8)).convert("RGB").getpixel((12, 12))[0] > 200


def test_a_figure_keeps_all_colours_where_they_tell_something():
    figure, ax = axes(3, 2)
    ax.imshow(np.random.default_rng(0).random((30, 40, 3)))
    usual, whole = (show(figure, **WORDS, **options) for options in ({}, {"colours": 0}))
    number = [len(opened(shown).convert("RGB").getcolors(10**6)) for shown in (usual, whole)]
    assert number[0] <= 256 and number[1] > 1000


def test_words_are_needed():
    with pytest.raises(ValueError, match="a caption and an alt text"):
        show(noise(5, 5), caption=" ", alt="x")


@pytest.mark.parametrize("thumbnail", [False, True])
@pytest.mark.parametrize("grid", [(1, 1), (3, 2), (1, 12), (12, 1)])
def test_every_tile_is_numbered(grid, thumbnail):
    figure = tiling(noise(80, 60), grid, thumbnail=thumbnail)
    left, right = figure.axes
    numbers = [text.get_text() for text in right.texts]
    assert numbers == [str(i + 1) for i in range(grid[0] * grid[1] + thumbnail)]
    assert len(left.images) == 1 and len(right.images) == 1 + thumbnail
    assert opened(show(figure, **WORDS)).width == 720


def test_a_timeline_tells_time_and_order():
    frames, times = [noise(64, 48, seed) for seed in range(10)], [i / 4 for i in range(10)]
    (ax,) = timeline(frames, times).axes
    assert [text.get_text() for text in ax.texts] == [f"{t:.2f} s" for t in times]
    figure = timeline(frames, times, [7, 2, 2, 9])
    (ax,) = figure.axes
    words = [text.get_text() for text in ax.texts]
    for time, place in (("1.75 s", "1"), ("0.50 s", "2, 3"), ("2.25 s", "4")):
        assert words[words.index(time) + 1] == place
    outlined = [to_hex(patch.get_edgecolor()) == ORANGE.lower() for patch in ax.patches]
    clear = [image.get_alpha() == 1 for image in ax.images]
    assert outlined == clear == [i in (7, 2, 9) for i in range(10)]
    tops = {round(image.get_extent()[3], 6) for image in ax.images}
    assert len(tops) == 2 and opened(show(figure, **WORDS)).width == 1050


def test_what_does_not_fit_stands_out():
    figure = context_bars({"small": 1000, "large": 6000}, 4000)
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.texts] == ["1,000  (25%)", "6,000  (150%)"]
    beyond = ax.containers[-1]
    assert [bar.get_width() for bar in beyond] == [0, 2000]


def trace(text: str, probability: float, *others: tuple[str, float]) -> TokenTrace:
    best = [(0, text, probability), *((i + 1, t, p) for i, (t, p) in enumerate(others))]
    return TokenTrace(0, text, probability, probability, 0.0, best)


def test_the_strip_tells_doubt_and_leaves_sure_tokens_alone():
    tokens = [trace(" A", 1.0, ("B", 0.001)), trace("\n", 0.6, (" red", 0.3), (" blue", 0.1))]
    (ax,) = choices(tokens).axes
    assert [t.get_text() for t in ax.texts] == ["␣A", "⏎", ".60", "␣red .30", "␣blue .10"]
    assert [to_hex(p.get_facecolor()) for p in ax.patches] == [sureness(1.0), sureness(0.6)]
    (ax,) = choices(tokens, least=0.2).axes
    assert len(ax.texts) == 4


@pytest.mark.parametrize("width", [2.0, 7.0])
def test_a_long_strip_is_broken_and_nothing_overlaps(width):
    tokens = [trace(f" token{i}", 0.5, (" another", 0.5)) for i in range(40)]
    figure = choices(tokens, width=width)
    assert figure.get_figwidth() <= width + 0.2
    (ax,) = figure.axes
    boxes = [(p.get_x(), p.get_y(), p.get_width()) for p in ax.patches]
    assert len(boxes) == 40 and len({y for _, y, _ in boxes}) > 2
    for (x, y, wide), (next_x, next_y, _) in zip(boxes, boxes[1:], strict=False):
        assert (next_y == y and next_x >= x + wide) or (next_y > y + 30 and next_x == 0)


def test_dollars_are_no_formula():
    text = r"$\x$"
    assert png_of(choices([trace(text, 0.5, (text, 0.4))]))
    assert png_of(distribution([text], [1.0], [1.0]))


def test_sure_is_pale():
    brightness = [sum(to_rgb(sureness(p))) for p in (0.0, 0.5, 1.0)]
    assert brightness == sorted(brightness) and brightness[0] < brightness[2]
    assert visible(" a\n") == "␣a⏎"


def test_heat_is_where_the_weights_are():
    figure, ax = axes(2, 2)
    heat(ax, noise(40, 20), [[0.0, 1.0], [0.5, -3.0]])
    grey, paint = ax.images
    assert paint.get_array()[..., 3].tolist() == [[0, 230], [115, 0]]
    assert grey.get_extent() == paint.get_extent() == [0, 40, 20, 0]
    heat(ax, noise(4, 4), [[0.0]])  # nothing anywhere


def test_colours_are_the_directions_of_most_difference():
    rng = np.random.default_rng(0)
    strong = rng.normal(size=(4, 6, 3)) * [9, 5, 3]
    features = np.concatenate([rng.normal(size=(4, 6, 5)) / 10, strong], axis=-1)
    colours = principal_colours(features)
    assert colours.shape == (4, 6, 3) and 0 <= colours.min() < 0.1 < 0.9 < colours.max() <= 1
    for k in range(3):
        one, other = colours[..., k].flatten(), strong[..., k].flatten()
        assert abs(np.corrcoef(one, other)[0, 1]) > 0.9
    np.testing.assert_allclose(principal_colours(-features), colours, atol=1e-9)
    np.testing.assert_allclose(principal_colours(features + 7), colours, atol=1e-9)


def test_where_nothing_differs_all_is_grey():
    assert (principal_colours(np.ones((3, 5, 4))) == 0.5).all()


@pytest.mark.parametrize(
    ("box", "patches"),
    [
        ((0, 0, 1, 1), (0, 0, 8, 6)),
        ((1 / 12, 1 / 6, 2 / 12, 2 / 6), (0, 1, 2, 2)),
        ((0.5, 0.5, 0.625, 1), (4, 3, 5, 6)),
    ],
)
def test_patches_under_a_box(box, patches):
    assert touched(box, rows=6, cols=8) == patches


def test_scales_stand_side_by_side():
    maps = [np.random.default_rng(0).normal(size=(2 * r, 2 * c, 4)) for r, c in [(1, 1), (2, 3)]]
    figure = scales(noise(60, 40), [(1, 1), (2, 3)], maps, tile=20, box=(0.5, 0.5, 0.6, 0.7))
    assert [ax.get_title() for ax in figure.axes] == ["20 × 20 pixels", "60 × 40 pixels", "", ""]
    assert [ax.images[0].get_array().shape[:2] for ax in figure.axes] == [
        *((20, 20), (40, 60), (2, 2), (4, 6))
    ]
    framed = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in figure.axes[3].patches]
    assert framed == [pytest.approx((30, 20, 10, 10))] * 2
    assert not scales(noise(6, 4), [(1, 1)], maps[:1], tile=4).axes[0].patches


def test_accuracy_is_drawn_where_it_was_measured():
    def measured(right, n, tokens):
        kinds = {"read_print": {"n": n, "right": right}}
        return {"print": {"kinds": kinds, "tokens": tokens, "chance": {"read_print": 0.02}}}

    few = measured(0.0, 100, {"min": 64, "mean": 64, "max": 64})
    many = measured(1.0, 900, {"min": 80, "mean": 120, "max": 160})
    plain = {"scene": {"kinds": {"caption": {"n": 3, "right": 1.0}}}}
    (ax,) = accuracy({"few": few, "plain": plain, "many": many}).axes
    points = [tuple(float(v[0]) for v in box.lines[0].get_data()) for box in ax.containers]
    assert points == [(64, 0), (120, 100)]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["by chance, 2.0%", "few, 0.0%", "many, 100.0%"]
    low, high = (
        segment[:, 1] for box in ax.containers for segment in box.lines[2][1].get_segments()
    )
    assert low[0] == pytest.approx(0) and 3 < low[1] < 4, "none of 100 is not never"
    assert high[1] == pytest.approx(100) and 99.5 < high[0] < 100
    assert ax.get_xlim()[1] > 160
