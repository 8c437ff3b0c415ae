"""The panel of scales, driven by its sliders, without a browser."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import noise
from nvila_helpers import shared

from vlmlib.widgets import ScalesPanel

PICTURES = {"wide": noise(120, 70), "tall": noise(40, 130), "square": noise(64, 64)}


@pytest.fixture(scope="module")
def model():
    return shared("dynamic_s2", max_tiles=10)


@pytest.fixture
def panel(model):
    return ScalesPanel(model, PICTURES)


def position(panel) -> int:
    return int(re.search(r"position (\d+) of", panel.status.value).group(1)) - 1


def test_it_opens_on_the_middle_of_the_first_picture(panel):
    assert (panel.picture.value, panel.across.value, panel.down.value) == ("wide", 50, 50)
    assert "of 4 × 4 patches" in panel.status.value and 'alt="wide, cut into' in panel.figure.value


@pytest.mark.parametrize(
    ("name", "place"),
    [("wide", (0, 0)), ("tall", (100, 100)), ("square", (37, 81)), ("wide", (50, 3))],
)
def test_the_position_shows_the_place(panel, model, name, place):
    panel.picture.value = name
    panel.across.value, panel.down.value = place
    (medium,) = model.prepare([PICTURES[name]])
    box = model.boxes(medium)[position(panel)]
    at = torch.tensor(place) / 100
    assert (box[:2] <= at + 1e-4).all() and (at <= box[2:] + 1e-4).all()


@pytest.mark.parametrize("name", PICTURES)
def test_the_patches_framed_are_those_that_reach_the_position(panel, model, name):
    panel.picture.value, panel.across.value, panel.down.value = name, 30, 62
    (medium,) = model.prepare([PICTURES[name]])
    x = torch.randn(len(medium.pixels), 16, 24, requires_grad=True)
    (row,) = torch.autograd.grad(model.project(x, medium)[position(panel)].sum(), x)
    counts = [int((part.abs().sum(-1) > 0).sum()) for part in row.split([1, 4, len(x) - 5])]
    framed = re.findall(r"(\d+) × (\d+) of", panel.status.value)
    assert counts == [int(rows) * int(cols) for rows, cols in framed]


def test_the_figure_follows(panel):
    seen = {panel.figure.value}
    for across, down, name in [(10, 10, "wide"), (90, 10, "wide"), (90, 10, "tall")]:
        panel.picture.value, panel.across.value, panel.down.value = name, across, down
        seen.add(panel.figure.value)
    assert len(seen) == 4


def test_an_error_is_shown_and_the_figure_stays(panel):
    before = panel.figure.value
    panel._pictures["tall"] = None
    panel.picture.value = "tall"
    assert "Error" in panel.status.value and panel.figure.value == before


def test_a_model_without_scales_says_so():
    panel = ScalesPanel(shared("resize"), PICTURES)
    assert "Error" in panel.status.value
