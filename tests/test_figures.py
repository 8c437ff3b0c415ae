"""Figures: what is wrapped for a page, and what is drawn."""

from __future__ import annotations

import io

import pytest
from helpers import noise
from PIL import Image

from vlmlib.figures import axes, context_bars, show, tiling

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
