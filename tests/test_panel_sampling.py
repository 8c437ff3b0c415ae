"""The sampling panel, moved by its sliders, without a browser."""

from __future__ import annotations

import re

import pytest
import torch

from vlmlib import NonFiniteLogitsError, ShapeError
from vlmlib.widgets import SamplingPanel

NAMES = ["a", "b", "c", "d"]
SCORES = torch.tensor([0.5, 2.0, 1.0, -1.0])  # b, c, a, d from best to worst


@pytest.fixture
def panel():
    many = [f"t{i}" for i in range(50)], torch.linspace(2, 0, 50), []
    return SamplingPanel({"four": (NAMES, SCORES, [1]), "fifty": many}, bars=5)


def shown(panel) -> dict[str, float]:
    """Token and percent, as the picture says in words."""
    (alt,) = re.findall(r'alt="([^"]*)"', panel.plot.value)
    pairs = (part.rsplit(" ", 1) for part in alt.split(", "))
    return {name.replace("&#x27;", ""): float(share.rstrip("%")) for name, share in pairs}


def test_begins_with_the_models_own_distribution(panel):
    expected = dict(zip(NAMES, (100 * SCORES.softmax(-1)).tolist(), strict=True))
    assert list(shown(panel)) == ["b", "c", "a", "d"]  # the best first
    assert shown(panel) == pytest.approx(expected, abs=0.06)
    assert "4 of 4 tokens" in panel.status.value


def test_sliders_move_the_bars(panel):
    panel.top_k.value = 2
    assert [name for name, share in shown(panel).items() if share] == ["b", "c"]
    panel.top_k.value, panel.temp.value = 0, 0.0
    assert shown(panel)["b"] == 100 and "1 of 4 tokens" in panel.status.value
    panel.temp.value, panel.repeat_penalty.value = 1.0, 2.0
    assert shown(panel)["b"] == shown(panel)["c"]  # 2 / 2 is 1
    panel.repeat_penalty.value, panel.top_p.value = 1.0, 0.05
    assert shown(panel)["b"] == 100


def test_the_order_of_the_cuts_can_be_chosen():
    p = torch.tensor([0.30, 0.25, 0.15, 0.12, 0.10, 0.08])
    panel = SamplingPanel({"six": (list("abcdef"), p.log(), [])})
    panel.top_p.value, panel.top_k.value = 0.6, 3
    assert "3 of 6 tokens" in panel.status.value
    panel.order.value = "hf"
    assert "2 of 6 tokens" in panel.status.value


def test_draws_add_up_until_something_changes(panel):
    panel.temp.value, panel.top_k.value = 2.0, 3
    panel.draw.click()
    first = panel.counts.clone()
    panel.draw.click()
    assert first.sum() == 100 and panel.counts.sum() == 200
    assert panel.counts[3] == 0 and (panel.counts >= first).all()
    panel.top_k.value = 0
    assert panel.counts.sum() == 0


def test_tokens_without_a_bar_share_one(panel):
    panel.row.value = "fifty"
    assert list(shown(panel)) == ["t0", "t1", "t2", "t3", "t4", "45 others"]
    assert sum(shown(panel).values()) == pytest.approx(100, abs=0.4)


def test_rows_are_checked():
    with pytest.raises(ShapeError, match="four: 3 texts"):
        SamplingPanel({"four": (NAMES[:3], SCORES, [])})
    with pytest.raises(NonFiniteLogitsError):
        SamplingPanel({"four": (NAMES, SCORES * float("nan"), [])})
