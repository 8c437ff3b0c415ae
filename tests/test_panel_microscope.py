"""The microscope panel, driven by its buttons, without a browser."""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod

import pytest
import torch
from helpers import noise
from test_internvl import tiny_internvl

import vlmlib
from vlmlib.course import visible
from vlmlib.microscope import attention
from vlmlib.widgets import MicroscopePanel

PICTURES = [vlmlib.DATA / "images" / f"{name}.png" for name in ("three-shapes", "five-shapes")]
QUESTIONS = ["What is left of the red circle?", "Describe the picture."]


@pytest.fixture(scope="module")
def model():
    return vlmlib.load("tiny-llava")


@pytest.fixture
def panel(model):
    return MicroscopePanel(model, PICTURES, QUESTIONS)


def text_of(panel) -> str:
    return "".join(token.text for token in panel.tokens[:-1]).strip()


def greedy_behind(panel, model, begun) -> list[int]:
    """By the whole sequence at every step, no cache."""
    prompt = model.chat_prompt([panel._asked.image, panel.question.value])
    media, ids = model.prepare([panel._asked.image]), list(begun)
    with torch.inference_mode():
        while not ids or ids[-1] not in model.stop_token_ids:
            ids.append(int(model.turn(prompt, media, answer=ids).prefill().argmax()))
    return ids


def test_it_opens_with_an_answer(panel, model):
    said = vlmlib.answer(model, [vlmlib.load_image(PICTURES[0]), QUESTIONS[0]])
    assert text_of(panel) == said
    assert [b.description for b in panel.strip.children] == [visible(t.text) for t in panel.tokens]
    assert panel.answers == {said: pytest.approx(prod(t.probability for t in panel.tokens))}
    assert said in panel.said.value and "token 1 of 6" in panel.status.value


def test_another_question_about_another_picture(panel, model):
    panel.picture.value, panel.examples.value = "five-shapes", QUESTIONS[1]
    assert panel.question.value == QUESTIONS[1]
    panel.strip.children[3].click()
    panel.ask.click()
    assert text_of(panel) == vlmlib.answer(model, [vlmlib.load_image(PICTURES[1]), QUESTIONS[1]])
    assert panel.chosen == 0 and len(panel.answers) == 1


def test_a_token_shows_what_was_considered(panel):
    panel.strip.children[2].click()
    token = panel.tokens[2]
    assert panel.chosen == 2 and "token 3 of 6, ␣blue" in panel.status.value
    shown = [b.description.rsplit("  ", 1)[0] for b in panel.alternatives]
    assert shown == [visible(text) for _, text, _ in token.alternatives]
    assert [b.disabled for b in panel.alternatives] == [True, False, False, False, False]
    borders = [b.layout.border_top for b in panel.strip.children]
    assert [i for i, border in enumerate(borders) if "transparent" not in border] == [2]


@pytest.mark.parametrize(("position", "k"), [(1, 1), (3, 2), (0, 4), (5, 1)])
def test_a_branch_goes_on_behind_the_other_token(panel, model, position, k):
    before = [t.id for t in panel.tokens[:position]]
    panel.strip.children[position].click()
    id, _, p = panel.tokens[position].alternatives[k]
    panel.alternatives[k].click()
    ids = [t.id for t in panel.tokens]
    assert ids == greedy_behind(panel, model, [*before, id])
    assert panel.tokens[position].probability == p and panel.chosen == position
    assert len(panel.answers) == 2 and len(panel.strip.children) == len(ids)
    assert panel.alternatives[k].disabled and not panel.alternatives[0].disabled
    panel.alternatives[0].click()  # and back
    assert len(panel.answers) == 2 and len(panel.tokens) == 6


def test_buttons_stay_where_the_keyboard_is(panel):
    buttons, others = list(panel.strip.children), list(panel.alternatives)
    buttons[1].click()
    others[1].click()
    assert list(panel.strip.children)[:6] == buttons[: len(panel.tokens)]
    assert panel.alternatives == others


def test_the_stop_token_ends_the_answer(panel, model):
    panel.strip.children[-2].click()
    (stop,) = model.stop_token_ids
    panel.tokens[-2] = replace(panel.tokens[-2], alternatives=[(stop, "</s>", 0.01)])
    panel.alternatives[0].click()
    assert [t.id for t in panel.tokens[-1:]] == [stop] and len(panel.tokens) == 5


def test_the_layer_changes_the_picture_and_nothing_else(panel, model):
    panel.strip.children[2].click()
    figures, tokens = set(), list(panel.tokens)
    for layer in range(4):
        panel.layer.value = layer
        figures.add(panel.figure.value)
    assert len(figures) == 4 and panel.tokens == tokens
    share = int(re.search(r"(\d+)% of the layer", panel.status.value).group(1))
    prompt = model.chat_prompt([panel._asked.image, panel.question.value])
    weights = attention(
        model, prompt, model.prepare([panel._asked.image]), [t.id for t in tokens[:2]]
    )
    assert share == round(100 * weights[3].mean(0)[4:68].sum().item())
    x, y = (int(n) for n in re.findall(r"(\d+)% from", panel.figure.value))
    best = int(weights[3].mean(0)[4:68].argmax())
    assert abs(x - 100 * (best % 8 + 0.5) / 8) < 1 and abs(y - 100 * (best // 8 + 0.5) / 8) < 1


def test_a_model_with_tiles():
    panel = MicroscopePanel(tiny_internvl(), {"noise": noise(60, 40)}, ["is it?"], max_tokens=5)
    assert len(panel.tokens) <= 5 and "from the left" in panel.figure.value
    panel.alternatives[2].click()
    assert len(panel.answers) == 2 and "Error" not in panel.status.value


def test_an_error_is_shown_and_the_answer_stays(panel):
    tokens, said = list(panel.tokens), panel.said.value
    panel.question.value = "too long " * 3000
    panel.ask.click()
    assert "ContextLengthError" in panel.status.value
    assert (panel.tokens, panel.said.value) == (tokens, said)
    panel.alternatives[1].click()  # of the question before
    assert len(panel.answers) == 2 and "Error" not in panel.status.value


def test_markup_is_escaped(panel):
    panel.question.value = "<b>what</b>"
    panel.ask.click()
    panel.answers["<script>"] = 1.0
    panel._go_on(panel._asked, [], 0)
    assert "<script>" not in panel.said.value and "&lt;script&gt;" in panel.said.value
