"""The budget panel, driven by its sliders, without a browser."""

from __future__ import annotations

import pytest
from transformers import InternVLConfig, LlavaConfig

from vlmlib import image_tokens
from vlmlib.widgets import BudgetPanel

MODELS = {"LLaVA-1.5": LlavaConfig(), "InternVL3": InternVLConfig()}


@pytest.fixture
def panel():
    return BudgetPanel(MODELS)


def test_it_opens_on_what_it_was_given():
    panel = BudgetPanel(MODELS, 3000, size=(500, 400))
    assert (panel.size, panel.context.value) == ((500, 400), 3000)
    assert "500 × 400 pixels in 3,000 positions" in panel.status.value


def test_it_counts_what_the_library_counts(panel):
    panel.picture_width.value, panel.picture_height.value = 450, 450
    for name, config in MODELS.items():
        assert f"{name} {image_tokens(config, 450, 450):,}" in panel.figure.value


def test_the_figure_follows_every_control(panel):
    seen = {panel.figure.value}
    for control, value in [
        (panel.picture_width, 768),
        (panel.picture_height, 380),
        (panel.context, 8192),
    ]:
        control.value = value
        seen.add(panel.figure.value)
    assert len(seen) == 4
    assert "768 × 380 pixels in 8,192 positions" in panel.status.value


def test_an_error_is_shown_and_gone_when_it_is_over(panel):
    before = panel.figure.value
    panel._models["nobody"] = "not a model"
    panel.picture_width.value = 300
    assert "TypeError: expected a model" in panel.status.value
    assert panel.figure.value == before
    del panel._models["nobody"]
    panel.picture_width.value = 310
    assert "310 × 768" in panel.status.value and panel.figure.value != before


def test_the_figure_has_alt_text(panel):
    assert 'alt="bars of the positions taken: LLaVA-1.5 576, InternVL3 3,328"' in panel.figure.value
