"""Which frames are taken from a video, and that they are the right ones.

`data/clip.mp4` has 12 frames of 64 x 48 pixels at 10 frames a second; frame i is grey 10 + 20 * i.
Its key frames are 0 and 6, with frames in between that depend on later ones.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import decord
import numpy as np
import pytest
from helpers import VECTORS
from hypothesis import given
from hypothesis import strategies as st

from vlmlib import VideoError, get_index, load_video, uniform_indices

CLIP = Path(__file__).parent / "data" / "clip.mp4"


def grey(frames) -> list[int]:
    """Of every frame, which one of the clip it is."""
    return [round((np.asarray(f).mean() - 10) / 20) for f in frames]


# ---- which frames ----


@pytest.mark.parametrize("case", VECTORS["internvl_frame_indices"], ids=lambda c: str(c["bound"]))
def test_golden_frame_indices(case):
    last, n = case["num_frames"] - 1, case["num_segments"]
    assert get_index(case["bound"], case["fps"], last, 0, n) == case["indices"]


@given(st.integers(0, 5000), st.integers(1, 40), st.integers(0, 50))
def test_indices_lie_in_the_video_in_order(more, n, first):
    last = first + more
    indices = get_index(None, 25.0, last, first, n)
    assert len(indices) == n and indices == sorted(indices)
    assert first <= indices[0] and indices[-1] <= last


@given(st.floats(0, 50), st.floats(0, 50), st.integers(1, 9))
def test_indices_lie_in_the_bound(start, length, n):
    indices = get_index((start, start + length), 10.0, 1000, 0, n)
    assert round(start * 10) <= indices[0] and indices[-1] <= round((start + length) * 10)


def test_fewer_frames_than_segments():
    assert get_index(None, 30.0, 0, num_segments=4) == [0, 0, 0, 0]
    assert get_index(None, 30.0, 7, num_segments=8) == [0, 1, 2, 3, 4, 4, 5, 6]


def test_the_first_frame_counts_with_a_bound_and_without():
    assert get_index((0.0, 4.0), 10.0, 99, first_idx=20, num_segments=2) == [25, 35]
    assert get_index(None, 10.0, 40, first_idx=20, num_segments=2) == [25, 35]


@given(st.integers(1, 3000), st.integers(1, 64))
def test_uniform_indices(n, num):
    indices = uniform_indices(n, num)
    assert len(indices) == num and indices == sorted(indices) and indices[0] == 0
    assert indices[-1] == (n - 1 if num > 1 else 0)
    gaps = np.diff(indices)
    assert num < 2 or np.abs(gaps - (n - 1) / (num - 1)).max() <= 1


def test_uniform_indices_by_hand():
    assert uniform_indices(12, 4) == [0, 4, 7, 11]
    assert uniform_indices(2, 5) == [0, 0, 0, 1, 1]


# ---- the frames ----


@pytest.mark.parametrize(
    "source", [CLIP, str(CLIP), CLIP.read_bytes()], ids=["Path", "str", "bytes"]
)
def test_the_frames_asked_for(source):
    frames = load_video(source, [11, 0, 7, 7, 3])
    assert grey(frames) == [11, 0, 7, 7, 3]
    assert {(f.mode, f.size) for f in frames} == {("RGB", (64, 48))}


def test_every_frame():
    assert grey(load_video(CLIP, range(12))) == list(range(12))


def test_a_function_chooses():
    seen = []

    def middle(n, fps):
        seen.append((n, fps))
        return get_index((0.2, 0.8), fps, n - 1, num_segments=3)

    assert grey(load_video(CLIP, middle)) == [3, 5, 7]
    assert seen == [(12, 10.0)]
    assert grey(load_video(CLIP, lambda n, _: uniform_indices(n, 4))) == [0, 4, 7, 11]


def test_no_frame_asked_for():
    assert load_video(CLIP, []) == []


@pytest.mark.parametrize("bridge", ["native", "torch"])
def test_whatever_decord_was_told_to_give(bridge):
    decord.bridge.set_bridge(bridge)
    try:
        assert grey(load_video(CLIP, [1, 9])) == [1, 9]
        assert decord.bridge._CURRENT_BRIDGE.type == bridge
    finally:
        decord.bridge.reset_bridge()


def test_in_a_thread_of_its_own():
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(grey(load_video(CLIP, [2, 8]))))
        for _ in range(3)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [[2, 8]] * 3


# ---- what cannot be read ----


def test_a_video_without_frames(monkeypatch):
    empty = SimpleNamespace(VideoReader=lambda *_, **__: [])
    monkeypatch.setitem(sys.modules, "decord", empty)
    with pytest.raises(VideoError, match="clip.mp4.*0 frames"):
        load_video(CLIP, lambda n, _: uniform_indices(n, 8))


def test_a_stack_trace_is_not_part_of_the_message(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Check failed: codec\n\nStack trace:\n(0) ...")

    monkeypatch.setitem(sys.modules, "decord", SimpleNamespace(VideoReader=fail))
    with pytest.raises(VideoError, match=r"clip.mp4.*\(Check failed: codec\)$"):
        load_video(CLIP, [0])


def test_without_decord(monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(VideoError, match="package decord"):
        load_video(CLIP, [0])
