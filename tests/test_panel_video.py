"""The video panel, driven by its controls, without a browser."""

from __future__ import annotations

from pathlib import Path

import nvila_helpers
import pytest
from test_internvl import tiny_internvl

import vlmlib
from vlmlib import Video, VideoError
from vlmlib.widgets import VideoPanel

CLIP = Path(__file__).parent / "data" / "clip.mp4"  # 12 frames, 10 a second
CLIPS = {"grey": CLIP, "square": vlmlib.DATA / "videos" / "square-appears.mp4"}
QUESTIONS = ["What happens?", "Which shape appears?"]
MIDDLES, ENDS = VideoPanel.RULES


@pytest.fixture(scope="module", params=["internvl", "nvila"])
def model(request):
    return tiny_internvl() if request.param == "internvl" else nvila_helpers.shared()


@pytest.fixture
def panel(model):
    panel = VideoPanel(model, CLIPS, QUESTIONS, frames=3, pace=0, max_tokens=8)
    yield panel
    panel.stop.click()
    assert panel.wait(10)


def said_about(model, indices, question) -> str:
    frames = vlmlib.load_video(CLIP, indices)
    return vlmlib.answer(model, [Video(frames, len(frames)), question], n_predict=8)


def test_it_opens_on_the_first_clip(panel, model):
    assert panel.indices == vlmlib.get_index(None, 10.0, 11, num_segments=3)
    positions = sum(m.length for m in model.prepare([Video(CLIP, 3)]))
    assert panel.status.value.count("3 of 12 frames in this order: 1, 5, 8") == 1
    assert f"they take {positions} positions" in panel.status.value
    assert 'alt="grey, frame 0, at 0.00 s"' in panel.preview.value


@pytest.mark.parametrize(
    ("count", "rule", "order", "indices"),
    [
        (3, MIDDLES, "as filmed", [1, 5, 8]),
        (3, ENDS, "backwards", [11, 6, 0]),
        (1, ENDS, "as filmed", [0]),
        (2, MIDDLES, "backwards", [8, 2]),
    ],
)
def test_the_model_gets_these_frames_in_this_order(panel, model, count, rule, order, indices):
    panel.count.value, panel.rule.value, panel.order.value = count, rule, order
    assert panel.indices == indices
    panel.start.click()
    assert panel.wait(30)
    prepared = model.prepare([panel._video(panel._pictures["grey"])])
    expected = model.prepare([Video(vlmlib.load_video(CLIP, indices), len(indices))])
    assert [m.key for m in prepared] == [m.key for m in expected]
    assert len(prepared[0].pixels) == count, "each of them once"
    assert "Error" not in panel.status.value


def test_it_streams_what_the_model_says(panel, model):
    panel.order.value, panel.examples.value = "backwards", QUESTIONS[1]
    panel.start.click()
    assert panel.wait(30)
    streamed = panel.text.value
    panel._say(said_about(model, panel.indices, QUESTIONS[1]))
    assert streamed == panel.text.value
    assert "tokens read" in panel.status.value


def test_shuffled_frames_are_the_same_frames(panel):
    panel.count.value = 6
    filmed = panel.indices
    panel.order.value = "shuffled"
    assert sorted(panel.indices) == filmed != panel.indices == panel.indices


def test_the_timeline_follows(panel):
    seen = {panel.timeline.value}
    for control, value in (("count", 5), ("rule", ENDS), ("order", "backwards")):
        getattr(panel, control).value = value
        seen.add(panel.timeline.value)
    panel.picture.value = "square"
    seen.add(panel.timeline.value)
    assert len(seen) == 5
    assert "5 of 16 frames in this order: 15, 11, 8, 4, 0" in panel.timeline.value


def test_a_frame_can_be_looked_at(panel):
    before = panel.preview.value
    panel.frame.value = 7
    assert 'alt="grey, frame 7, at 0.70 s"' in panel.preview.value
    assert panel.preview.value != before
    panel.picture.value = "square"
    assert panel.frame.max == 15 and 'alt="square, frame 0, at 0.00 s"' in panel.preview.value
    panel.frame.value = 15
    panel.picture.value = "grey"  # which has fewer
    assert (panel.frame.max, panel.frame.value) == (11, 0)


def test_stop_halts(panel):
    panel.pace.value, panel.max_tokens.value = 1, 100
    panel.start.click()
    assert not panel.wait(0.3)
    panel.stop.click()
    assert panel.wait(5) and "stopped" in panel.status.value


def test_errors_are_shown(panel):
    panel.question.value = "too long " * 3000
    panel.start.click()
    assert panel.wait(30) and "ContextLengthError" in panel.status.value
    panel._pictures["grey"].frames.clear()
    panel.count.value = 5
    assert "Error" in panel.status.value
    with pytest.raises(VideoError, match="no such file"):
        VideoPanel(tiny_internvl(), [Path("missing.mp4")], QUESTIONS)


def test_a_model_by_name_is_not_loaded_before_it_is_asked(monkeypatch):
    panel = VideoPanel(["tiny-internvl"], [CLIP], QUESTIONS, pace=0, max_tokens=2)
    assert "positions" not in panel.status.value and "8 of 12 frames" in panel.status.value
    monkeypatch.setattr("vlmlib.widgets.load", lambda name: tiny_internvl())
    panel.start.click()
    assert panel.wait(30) and "tokens read" in panel.status.value


def test_every_picture_has_alt_text(panel):
    for html in (panel.preview.value, panel.timeline.value, panel.plot.value):
        assert 'alt="' in html
