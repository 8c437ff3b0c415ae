"""The tiling panel, driven by its sliders, without a browser."""

from __future__ import annotations

import pytest
from PIL import Image

import vlmlib
from vlmlib.widgets import TilingPanel

PHOTO = vlmlib.DATA / "images" / "photo-coffee.jpg"


@pytest.fixture
def panel():
    return TilingPanel(PHOTO)


def sizes(panel, width, height, most=12) -> str:
    panel.picture_width.value, panel.picture_height.value = width, height
    panel.max_tiles.value = most
    return panel.status.value


def test_it_opens_on_what_it_was_given():
    panel = TilingPanel(Image.new("RGB", (30, 20)), size=(400, 300), max_tiles=6)
    assert (panel.size, panel.max_tiles.value) == ((400, 300), 6)
    assert "3 × 2 tiles" in panel.status.value


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((1280, 720, 12), "4 × 2 tiles and the whole picture, 2,304 tokens; made 12.5% wider."),
        ((720, 1280, 12), "2 × 4 tiles and the whole picture, 2,304 tokens; made 12.5% higher."),
        ((400, 300, 12), "4 × 3 tiles and the whole picture, 3,328 tokens; its shape is kept."),
        ((400, 300, 1), "1 × 1 tiles, 256 tokens; made 33.3% higher."),
        ((2400, 20, 24), "24 × 1 tiles and the whole picture, 6,400 tokens; made 400.0% higher."),
    ],
)
def test_it_says_what_the_library_says(panel, size, words):
    assert words in sizes(panel, *size)


def test_the_picture_follows(panel):
    seen = {panel.figure.value}
    for size in [(600, 600), (20, 2400), (600, 400, 6), (600, 400, 5)]:
        sizes(panel, *size)
        seen.add(panel.figure.value)
    assert len(seen) == 5


def test_an_error_is_shown(panel):
    panel._picture = None
    assert "Error" in sizes(panel, 300, 300)


def test_the_figure_has_alt_text(panel):
    assert 'alt="a picture cut into 4 columns and 2 rows' in panel.figure.value
