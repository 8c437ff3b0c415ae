"""The chat panel, driven by its buttons, without a browser."""

from __future__ import annotations

import pytest

import vlmlib
from vlmlib.widgets import ChatPanel

PICTURES = [vlmlib.DATA / "images" / f"{n}.png" for n in ("three-shapes", "dark-background")]
QUESTIONS = ["Describe the picture.", "How many shapes are there?"]


@pytest.fixture(scope="module")
def model():
    return vlmlib.load("tiny-llava")


@pytest.fixture
def panel(model):
    panel = ChatPanel(model, PICTURES, QUESTIONS, pace=0)
    yield panel
    panel.stop.click()
    assert panel.wait(10)


def send(panel, question: str) -> None:
    panel.question.value = question
    panel.start.click()
    assert panel.wait(30)


def test_turns_are_those_of_a_chat_and_only_the_first_reads_the_picture(panel, model):
    for question in QUESTIONS:
        send(panel, question)
    chat = vlmlib.Chat(model)
    list(chat.ask([vlmlib.load_image(PICTURES[0]), QUESTIONS[0]]))
    *_, last = chat.ask(QUESTIONS[1])
    assert panel.chat.messages[1::2] == chat.messages[1::2]
    (kept, fed, drawn) = panel.turns[-1]
    assert (kept, fed) == (last["timing"]["reused_tokens"], last["timing"]["context_tokens"])
    assert drawn == last["usage"]["completion_tokens"]
    assert f"{kept} tokens kept" in panel.status.value
    for _, parts in chat.messages:
        assert parts[-1] in panel.text.value


def test_another_picture_makes_the_conversation_read_again(panel):
    for question in QUESTIONS:
        send(panel, question)
    panel.picture.value = "dark-background"
    send(panel, QUESTIONS[0])
    before_the_picture = panel.turns[-1][0]
    assert before_the_picture < 8 and len(panel.chat.messages) == 6
    assert panel.chat.messages[5] != panel.chat.messages[1]  # the same question, another picture


def test_stop_keeps_what_was_said_and_the_next_turn_goes_on(panel):
    panel.pace.value = 5
    panel.start.click()
    assert not panel.wait(0.7)
    panel.stop.click()
    assert panel.wait(5) and "stopped" in panel.status.value
    assert 0 < len(panel.chat.messages[1][1][0]) < 60
    panel.pace.value = 0
    send(panel, QUESTIONS[1])
    assert panel.turns[1][0] > panel.turns[0][1] and len(panel.turns) == 2


def test_a_new_conversation_forgets(panel):
    send(panel, QUESTIONS[0])
    panel.new.click()
    assert panel.turns == [] and QUESTIONS[0] not in panel.text.value
    send(panel, QUESTIONS[1])
    assert len(panel.turns) == 1 and panel.turns[0][0] == 0


def test_an_error_is_shown_and_leaves_the_conversation(panel):
    send(panel, QUESTIONS[1])
    send(panel, "too long " * 3000)
    assert "ContextLengthError" in panel.status.value and len(panel.chat.messages) == 2
    send(panel, QUESTIONS[1])
    assert len(panel.turns) == 2 and "ended its answer" in panel.status.value


def test_markup_is_escaped(panel):
    panel._asked = "<script>"
    panel._say("<b>")
    assert "<script>" not in panel.text.value and "&lt;b&gt;" in panel.text.value
