"""Scenes, pictures, questions: the same everywhere, and every answer right."""

import json
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmlib.tiny.scenes import (
    COLOURS,
    HELD_OUT,
    KINDS,
    LABELS,
    PLACES,
    PRINTS,
    SHAPES,
    TRAIN_START,
    VALIDATION,
    Scene,
    Thing,
    ask,
    caption,
    detail_scene,
    draw,
    example_scenes,
    outline,
    questions,
    random_scene,
    reserved_keys,
    train_detail_scene,
    train_scene,
)

seeds = st.integers(0, 2**40)
NUMBERS = {"no": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}


@given(seeds)
def test_a_seed_gives_one_scene_and_leaves_the_global_generator_alone(seed):
    random.seed(1)
    before = random.getstate()
    scene = random_scene(seed)
    assert scene == random_scene(seed)
    assert questions(scene, random.Random(3)) == questions(scene, random.Random(3))
    assert random.getstate() == before


@given(seeds)
def test_a_scene_survives_json(seed):
    scene = random_scene(seed)
    assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


@given(seeds)
def test_scenes_are_well_formed(seed):
    scene = random_scene(seed, label_share=0.9)
    labels = [thing.label for thing in scene.things if thing.label]
    assert 1 <= len(scene.things) <= 5
    assert len(set(labels)) == len(labels)
    assert all(thing.size == "large" for thing in scene.things if thing.label)


def test_about_four_in_ten_large_shapes_carry_a_label():
    things = [t for seed in range(2_000) for t in random_scene(seed).things if t.size == "large"]
    assert 0.36 < sum(bool(t.label) for t in things) / len(things) < 0.44


def test_wrong_scenes_are_refused():
    circle = Thing("circle", "red", "small", 4)
    with pytest.raises(ValueError, match="no such thing"):
        Thing("cube", "red", "small", 4)
    with pytest.raises(ValueError, match="needs a large shape"):
        Thing("circle", "red", "small", 4, "K")
    with pytest.raises(ValueError, match="reading order"):
        Scene((circle, circle))
    with pytest.raises(ValueError, match="1 to 5"):
        Scene(())


# ------------------------------------------------------------------ held-out separation


def test_no_training_seed_is_reserved():
    assert max(HELD_OUT) < min(VALIDATION) < max(VALIDATION) < TRAIN_START


def test_no_reserved_scene_is_in_the_training_stream():
    assert not {train_scene(i).key for i in range(5_000)} & reserved_keys()


def test_a_reserved_scene_is_passed_over(monkeypatch):
    first = random_scene(TRAIN_START, 0.6)
    taken = frozenset({first.key})
    monkeypatch.setattr("vlmlib.tiny.scenes.reserved_keys", lambda: taken)
    assert train_scene(0) == random_scene(TRAIN_START + 1, 0.6)


def test_the_key_is_about_content_not_looks():
    plain = Scene((Thing("star", "blue", "large", 2, "K"),))
    shifted = Scene((Thing("star", "blue", "large", 2, "K", (0.01, 0.0)),), noise=3.0)
    other = Scene((Thing("star", "blue", "large", 2, "L"),))
    assert plain.key == shifted.key != other.key


# ---------------------------------------------------------------------------- pictures


@settings(deadline=None, max_examples=20)
@given(seeds, st.sampled_from([56, 112, (150, 90), (90, 150)]))
def test_pictures_have_the_size_asked_for_and_repeat(seed, size):
    picture = draw(random_scene(seed), size)
    assert picture.size == (size if isinstance(size, tuple) else (size, size))
    assert picture.tobytes() == draw(random_scene(seed), size).tobytes()


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_every_thing_is_drawn_in_its_colour_at_its_place(seed):
    scene = random_scene(seed, label_share=0.0)
    pixels = np.asarray(draw(Scene(scene.things), 112)).astype(int)
    for thing in scene.things:
        x, y, _ = outline(thing, 112, 112)
        error = abs(pixels[round(y), round(x)] - np.array(COLOURS[thing.colour])).max()
        assert error <= 14


def test_a_large_picture_shrinks_to_the_small_one():
    scene = Scene((Thing("diamond", "green", "large", 4, "H"),))
    small = np.asarray(draw(scene, 56)).astype(int)
    large = np.asarray(draw(scene, 224).resize((56, 56), 4)).astype(int)
    assert abs(small - large).mean() < 2


def test_labels_differ_from_each_other_on_paper():
    pictures = [
        np.asarray(draw(Scene((Thing("square", "yellow", "large", 4, label),)), 112)).astype(int)
        for label in LABELS
    ]
    for i, first in enumerate(pictures):
        assert all((abs(first - other) > 80).any(-1).sum() >= 8 for other in pictures[:i])


# -------------------------------------------------------------------------- small print


@given(seeds)
def test_scenes_with_small_print_are_well_formed(seed):
    scene = detail_scene(seed)
    prints = [thing.print for thing in scene.things if thing.print]
    assert len(set(prints)) == len(prints) and set(prints) <= set(PRINTS)
    assert 2 <= len(scene.things) <= 5
    width, height = scene.size
    assert draw(scene).size == scene.size and max(scene.size) in range(300, 373)
    assert any(abs(height / width - aspect) < 0.06 * aspect for aspect in (2 / 3, 1, 3 / 2))
    assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


@given(seeds)
def test_no_small_print_lies_on_a_cut(seed):
    """Cut into the tiles of its format, every printed text lies inside of one of them."""
    scene = detail_scene(seed)
    width, height = scene.size
    cols, rows = 2 if width < 0.8 * height else 3, 2 if height < 0.8 * width else 3
    for thing in scene.things:
        if thing.print:
            x, y, _ = outline(thing, width, height)
            column, row = x / width * cols % 1, y / height * rows % 1
            assert 0.2 < column < 0.8 and 0.2 < row < 0.8


@pytest.mark.parametrize("texts", [("472", "172"), ("924", "927"), ("CAT", "BAT"), ("HEN", "PEN")])
def test_small_print_is_lost_in_a_small_picture_and_plain_in_a_tile(texts):
    """Two prints differ by little everywhere there, and by much in many pixels here."""
    pictures = [
        draw(Scene((Thing("square", "blue", "large", 4, print=text),), size=(336, 336)))
        for text in texts
    ]

    def differing(size):
        small, other = (np.asarray(p.resize((size, size), 3)).astype(int) for p in pictures)
        return (abs(small - other) > 80).any(-1).sum()

    assert differing(336) > 10 and differing(112) <= 1


def test_the_training_stream_has_no_reserved_small_print():
    assert not {train_detail_scene(i).key for i in range(2_000)} & reserved_keys()
    assert detail_scene(5).key in reserved_keys()


# ------------------------------------------------------------------ questions and answers


def fits(thing, words):
    """Does every word of a description such as `large red circle` hold for the thing?"""
    known = {thing.size, thing.colour, thing.shape, "shape"}
    return set(words.split()) <= known


def only(scene, words):
    """The one thing that the words describe."""
    found = [thing for thing in scene.things if fits(thing, words)]
    assert len(found) == 1, (words, scene)
    return found[0]


def named(thing):
    marked = f" marked {thing.label}" if thing.label else ""
    return f"A {thing.size} {thing.colour} {thing.shape}{marked}."


def answer_again(scene, kind, question):
    """The right answer, worked out from the words of the question alone."""
    text = question.rstrip("?.")
    things = scene.things
    if kind in ("count", "count_shape", "count_colour"):
        noun = re.search(r"(?:How many|Count the) (.*?)s(?: are there| do you see|$)", text)[1]
        count = sum(fits(thing, noun) for thing in things)
        number = [word for word, value in NUMBERS.items() if value == count][0]
        return f"There is one {noun}." if count == 1 else f"There are {number} {noun}s."
    if kind == "where":
        place = PLACES[only(scene, text.removeprefix("Where is the ")).place]
        return place.capitalize() + "."
    if kind == "at":
        place = re.search(r"is (.*)", text)[1]
        there = [thing for thing in things if PLACES[thing.place] == place]
        return named(there[0]) if there else "Nothing."
    if kind == "colour":
        words = re.search(r"the ([\w ]+?)(?: have)?$", text)[1]
        return only(scene, words).colour.capitalize() + "."
    if kind == "size":
        words = re.search(r"the ([\w ]+?)(?: large or small)?$", text)[1]
        return only(scene, words).size.capitalize() + "."
    if kind in ("left", "right", "above", "below"):
        other = only(scene, re.search(r"(?:of|above|below) the (.*)", text)[1])
        row, column = divmod(other.place, 3)
        step = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}[kind]
        reach = {(row + step[0] * k, column + step[1] * k) for k in (1, 2)}
        found = [thing for thing in things if divmod(thing.place, 3) in reach]
        assert len(found) == 1
        return named(found[0])
    if kind == "exist":
        words = re.search(r"an? (.*?)(?: in the picture)?$", text)[1]
        return "Yes." if any(fits(thing, words) for thing in things) else "No."
    if kind == "read_label":
        label = only(scene, re.search(r"on the (.*)", text)[1]).label
        sign = "number" if label.isdigit() else "letter"
        return f"The {sign} {label}." if label else "Nothing."
    if kind == "find_label":
        found = [thing for thing in things if thing.label == text[-1]]
        assert len(found) == 1
        return f"The {found[0].size} {found[0].colour} {found[0].shape}."
    if kind == "read_print":
        small = only(scene, re.search(r"on the (.*)", text)[1]).print
        return f"The {'number' if small.isdigit() else 'word'} {small}."
    if kind == "find_print":
        (found,) = (thing for thing in things if thing.print == text.split()[-1])
        return f"The {found.size} {found.colour} {found.shape}."
    parts = [f"a {t.size} {t.colour} {t.shape}" for t in things]
    parts = [
        p + (f" marked {t.label}" if t.label else "") for p, t in zip(parts, things, strict=True)
    ]
    parts = [f"{p} {PLACES[t.place]}" for p, t in zip(parts, things, strict=True)]
    text = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return "A" + text[1:] + "."


@settings(max_examples=400)
@given(seeds, seeds)
def test_every_answer_follows_from_its_question(seed, other_seed):
    for scene in (random_scene(seed, label_share=0.6), detail_scene(seed)):
        for qa in questions(scene, random.Random(other_seed)):
            assert qa.answer == answer_again(scene, qa.kind, qa.question), qa


def test_every_kind_is_asked_and_yes_is_half_of_the_answers():
    asked = [qa for s in range(1_500) for qa in questions(random_scene(s), random.Random(s))]
    small = [qa for s in range(500) for qa in questions(detail_scene(s), random.Random(s))]
    assert {qa.kind for qa in asked} == set(KINDS) - {"read_print", "find_print"}
    assert {qa.kind for qa in small} == set(KINDS) - {"find_label", "read_label"}
    yes = [qa.answer == "Yes." for qa in asked if qa.kind == "exist"]
    assert 0.45 < sum(yes) / len(yes) < 0.55


def test_a_caption_in_words():
    things = (Thing("circle", "red", "large", 0, "K"), Thing("square", "blue", "small", 4))
    assert caption(Scene(things)) == (
        "A large red circle marked K at the top left and a small blue square in the middle."
    )


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="no question kind 'taste'"):
        ask(random_scene(0), "taste", random.Random(0))


def test_one_example_answers_the_question_of_the_readme():
    found = [
        qa.answer
        for scene in example_scenes().values()
        for trial in range(60)
        for qa in questions(scene, random.Random(trial))
        if qa.question == "What is left of the red circle?"
    ]
    assert set(found) == {"A small blue square."}
    assert len({scene.key for scene in example_scenes().values()}) == len(example_scenes())
    assert {t.shape for s in example_scenes().values() for t in s.things} == set(SHAPES)
