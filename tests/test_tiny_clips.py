"""Clips: what happens in them is what the answers say."""

from __future__ import annotations

import json
import random
import re
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tiny_scenes import fits

import vlmlib
from vlmlib.tiny.clips import (
    CLIP_KINDS,
    EVENTS,
    Clip,
    ask_clip,
    clip_questions,
    example_clips,
    frames,
    is_reserved,
    random_clip,
    reserved_clips,
    train_clip,
)
from vlmlib.tiny.evaluate import mp4
from vlmlib.tiny.scenes import PLACES, TRAIN_START, Scene, Thing, reserved_keys
from vlmlib.video import load_video

seeds = st.integers(0, 2**40)
NUMBERS = ("no", "one", "two", "three", "four", "five")


def placed(scene) -> set[str]:
    """What is where; a thing lies where its centre is."""
    out = set()
    for t in scene.things:
        row, column = round(t.row + t.shift[1]), round(t.column + t.shift[0])
        out.add(f"{t.size} {t.colour} {t.shape} {PLACES[3 * row + column]}")
    return out


def seen(clip) -> tuple[str, set[str], set[str]]:
    """(event, what is only in the first frame, what is only in the last one)."""
    first, last = placed(clip.at(0.0)), placed(clip.at(1.0))
    gone, new = first - last, last - first
    if not gone or not new:
        return ("appear" if new else "vanish"), gone, new
    (before,), (after,) = gone, new
    here, there = (next(p for p in PLACES if name.endswith(p)) for name in (before, after))
    return ("turn" if here == there else "move"), gone, new


def only(scene, words):
    (found,) = [thing for thing in scene.things if fits(thing, words)]
    return found


def answer_again(clip, kind, question):
    """The right answer, worked out from the first and the last frame and the question alone."""
    event, gone, new = seen(clip)
    first, last = next(iter(gone), ""), next(iter(new), "")
    name = " ".join((first or last).split()[:3])
    place = (last or first).removeprefix(name + " ")
    if kind in ("count_at_start", "count_at_end"):
        n = len((clip.at(0.0) if kind == "count_at_start" else clip.at(1.0)).things)
        return "There is one shape." if n == 1 else f"There are {NUMBERS[n]} shapes."
    if kind == "which":
        return f"The {name}."
    if kind == "where_at_end":
        words = re.search(r"the (.*) at the end", question)[1]
        thing = only(clip.at(0.0), words)
        mine = f"{thing.size} {thing.colour} {thing.shape}"
        (there,) = (p for p in placed(clip.at(1.0)) if p.startswith(mine))
        return there.removeprefix(mine + " ").capitalize() + "."
    if event == "move":
        a, b = (PLACES.index(next(p for p in PLACES if x.endswith(p))) for x in (first, last))
        way = {1: "right", -1: "left", 3: "down", -3: "up"}[b - a]
        if kind == "way":
            assert fits(clip.thing, re.search(r"does the (.*) move", question)[1])
            return way.capitalize() + "."
        return f"The {name} moves {way}."
    return {
        "appear": f"A {name} appears {place}.",
        "vanish": f"The {name} vanishes.",
        "turn": f"The {name} turns {(last.split() or ['', ''])[1]}.",
    }[event]


@settings(max_examples=300, deadline=None)
@given(seeds, seeds)
def test_every_answer_follows_from_the_frames(seed, other_seed):
    clip = random_clip(seed)
    assert clip == random_clip(seed) and seen(clip)[0] == clip.event
    for qa in clip_questions(clip, random.Random(other_seed)):
        assert qa.answer == answer_again(clip, qa.kind, qa.question), qa


def test_every_event_and_kind_occurs():
    clips = [random_clip(seed) for seed in range(300)]
    assert {clip.event for clip in clips} == set(EVENTS)
    asked = {qa.kind for clip in clips for qa in clip_questions(clip, random.Random(0))}
    assert asked == set(CLIP_KINDS)


def test_frames_begin_and_end_as_the_clip_says():
    for clip in [*example_clips().values(), *map(random_clip, range(20))]:
        pictures = frames(clip)
        assert len(pictures) == 16 and {p.size for p in pictures} == {clip.scene.size}
        middle = [np.asarray(p).astype(int) for p in pictures]
        steps = [abs(a - b).max() > 60 for a, b in zip(middle, middle[1:], strict=False)]
        assert all(steps) if clip.event == "move" else sum(steps) == 1


def test_no_reserved_clip_or_scene_is_in_the_training_stream():
    clips = [train_clip(i) for i in range(1_000)]
    assert not {clip.key for clip in clips} & reserved_clips()
    assert not {s.key for clip in clips for s in (clip.start, clip.end)} & reserved_keys()
    passed_over = [
        c for c in map(random_clip, range(TRAIN_START, TRAIN_START + 1_000)) if is_reserved(c)
    ]
    assert 10 < len(passed_over) < 300


def test_anything_may_appear_or_vanish():
    clips = [c for c in map(random_clip, range(300)) if c.event in ("appear", "vanish")]
    assert {clip.index for clip in clips} >= {0, 1, 2}


def test_impossible_clips_are_refused():
    circle = Thing("circle", "red", "large", 0)
    scene = Scene((circle, Thing("star", "blue", "small", 1)))
    with pytest.raises(ValueError, match="event 'explode'"):
        Clip(scene, "explode", 0)
    with pytest.raises(ValueError, match="cannot turn 'red'"):
        Clip(scene, "turn", 0, "red")
    for way in ("right", "left", "up", ""):
        with pytest.raises(ValueError, match="no free place"):
            Clip(scene, "move", 0, way)
    with pytest.raises(ValueError, match="must not be empty"):
        Clip(Scene((circle,)), "appear", 0)
    with pytest.raises(ValueError, match="no question kind 'taste'"):
        ask_clip(random_clip(0), "taste", random.Random(0))


def test_the_example_clips_are_on_disk_as_they_are_drawn():
    folder = vlmlib.DATA / "videos"
    described = json.loads((folder / "clips.json").read_text())
    assert {p.name for p in folder.glob("*.mp4")} == set(described) and len(described) >= 4
    for name, clip in example_clips().items():
        told = described[f"{name}.mp4"]
        assert told["clip"] == json.loads(json.dumps(clip.to_dict()))
        assert told["questions"] == [asdict(qa) for qa in clip_questions(clip, random.Random(0))]
        drawn = frames(clip)
        read = load_video(folder / f"{name}.mp4", lambda n, fps: range(n))
        assert len(read) == len(drawn)
        for ours, theirs in zip(drawn, read, strict=True):
            assert np.abs(np.subtract(ours, theirs, dtype=float)).mean() < 3


def test_a_clip_is_encoded_and_read_again():
    drawn = frames(random_clip(5), size=112)
    read = load_video(mp4(drawn), lambda n, fps: (n == len(drawn) and fps == 8) and [0, n - 1])
    for ours, theirs in zip((drawn[0], drawn[-1]), read, strict=True):
        assert ours.size == theirs.size
        assert np.abs(np.subtract(ours, theirs, dtype=float)).mean() < 6
