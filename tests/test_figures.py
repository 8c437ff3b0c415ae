"""Figures: what is wrapped for a page, and what is drawn."""

from __future__ import annotations

import io

import pytest
from helpers import noise
from matplotlib.colors import to_hex, to_rgb
from PIL import Image

from vlmlib.course import visible
from vlmlib.decoding import TokenTrace
from vlmlib.figures import (
    accuracy,
    axes,
    choices,
    context_bars,
    distribution,
    heat,
    png_of,
    show,
    sureness,
    tiling,
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
