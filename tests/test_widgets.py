"""The streaming panel, driven by its buttons, without a browser."""

from __future__ import annotations

import threading

import pytest

import vlmlib
from vlmlib.widgets import StreamPanel

PICTURES = sorted((vlmlib.DATA / "images").glob("*.png"))
QUESTIONS = ["Describe the picture.", "How many shapes are there?"]


@pytest.fixture(scope="module")
def model():
    return vlmlib.load("tiny-llava")


@pytest.fixture
def panel(model):
    panel = StreamPanel(model, PICTURES, QUESTIONS, pace=0)
    yield panel
    panel.stop.click()
    assert panel.wait(10)


def test_streams_what_the_model_says(panel, model):
    panel.start.click()
    assert panel.wait(30)
    said = vlmlib.answer(model, [vlmlib.load_image(PICTURES[0]), QUESTIONS[0]])
    assert said in panel.text.value
    assert "the model ended its answer" in panel.status.value
    assert "tokens/s" in panel.status.value
    assert (panel.start.disabled, panel.stop.disabled) == (False, True)


def test_stop_halts_and_the_panel_can_stream_again(panel):
    panel.pace.value = 5
    panel.start.click()
    assert panel.start.disabled and not panel.stop.disabled
    assert not panel.wait(0.5)
    panel.stop.click()
    assert panel.wait(2)
    assert "stopped" in panel.status.value
    panel.pace.value = 0
    panel.start.click()
    assert panel.wait(30)
    assert "ended its answer" in panel.status.value


def test_a_second_click_does_not_start_a_second_stream(panel):
    panel.pace.value = 5
    panel.start.click()
    before = threading.active_count()
    panel.start.click()
    assert threading.active_count() == before


def test_controls_reach_the_stream(panel):
    panel.max_tokens.value = 2
    panel.start.click()
    assert panel.wait(30)
    assert "the token limit was reached" in panel.status.value
    panel.temp.value, panel.top_k.value, panel.seed.value = 1.5, 3, 7
    params = panel.params()
    assert (params.temp, params.top_k, params.seed, params.n_predict) == (1.5, 3, 7, 2)


def test_an_error_in_the_thread_is_shown(panel):
    panel.seed.value = -1
    panel.start.click()
    assert panel.wait(10)
    assert "GenParamsError: seed must be" in panel.status.value
    assert not panel.start.disabled


def test_markup_from_model_or_user_is_escaped(panel):
    panel._say("<script>alert(1)</script>")
    assert "<script>" not in panel.text.value and "&lt;script&gt;" in panel.text.value
    panel._status("<b>", error=True)
    assert "<b>" not in panel.status.value


def test_own_pictures(panel):
    photo = (vlmlib.DATA / "images" / "photo-cat.jpg").read_bytes()
    panel._uploaded({"new": ({"name": "cat.jpg", "content": memoryview(photo)},)})
    assert panel.picture.value == "your own picture"
    panel._uploaded({"new": ({"name": "note.txt", "content": memoryview(b"hello")},)})
    assert "note.txt" in panel.status.value and "not a picture" in panel.status.value


def test_every_picture_in_the_panel_has_alt_text(panel):
    for html in (panel.preview.value, panel.plot.value):
        assert 'alt="' in html
