"""LLaVA's prompt formats, written out."""

from __future__ import annotations

import pytest
from helpers import tiny_llava

from vlmlib import Conversation, PromptError, conv_templates

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
EXPECTED = {
    "vicuna_v1": f"{VICUNA} USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Where? ASSISTANT:",
    "llava_v1": f"{VICUNA.replace('user', 'human')} "
    "USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Where? ASSISTANT:",
    "mistral_instruct": "[INST] <image>\nWhat? [/INST] A cat. </s>[INST] Where? [/INST]",
    "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|>"
    "<|im_start|>user\n<image>\nWhat?<|im_end|><|im_start|>assistant\nA cat.<|im_end|>"
    "<|im_start|>user\nWhere?<|im_end|><|im_start|>assistant\n",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_two_turns(name):
    conversation = conv_templates[name].copy()
    user, assistant = conversation.roles
    for role, text in [(user, "<image>\nWhat?"), (assistant, "A cat."), (user, "Where?")]:
        conversation.append_message(role, text)
    conversation.append_message(assistant, None)
    assert conversation.get_prompt() == EXPECTED[name]
    assert conv_templates[name].messages == []


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("roles", [(0, 0), (1,), (0, 1, 1)], ids=str)
def test_roles_take_turns_where_the_style_cannot_say_otherwise(name, roles):
    conversation = conv_templates[name].copy()
    for number in roles:
        conversation.append_message(conversation.roles[number], "text")
    if name == "chatml_direct":
        written = [f"{conversation.roles[number]}text<|im_end|>" for number in roles]
        assert conversation.get_prompt().endswith("<|im_end|>" + "".join(written))
        return
    with pytest.raises(PromptError, match=r"roles must take turns, 'USER' first, got \["):
        conversation.get_prompt()


def test_an_open_user_turn_says_nothing():
    conversation = conv_templates["mistral_instruct"].copy()
    conversation.append_message("USER", None)
    assert conversation.get_prompt() == ""


def test_all_of_them_are_here():
    assert set(conv_templates) == set(EXPECTED)


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("vicuna_v1", "</s>"),
        ("llava_v1", "</s>"),
        ("mistral_instruct", "</s>"),
        ("chatml_direct", "<|im_end|>"),
    ],
)
def test_stop_string(name, stop):
    conversation = conv_templates[name].copy()
    assert conversation.stop_str == stop
    user, assistant = conversation.roles
    conversation.append_message(user, "What?")
    conversation.append_message(assistant, "A cat.")
    assert conversation.get_prompt().endswith(stop), "an answer ends with it"


def test_unknown_role_and_frozen_table():
    with pytest.raises(ValueError, match="role must be one of"):
        conv_templates["vicuna_v1"].copy().append_message("HUMAN", "hello")
    with pytest.raises(TypeError):
        conv_templates["mine"] = None


def test_templates_share_no_messages():
    conv_templates["llava_v1"].append_message("USER", "hello")
    try:
        assert not conv_templates["vicuna_v1"].messages
    finally:
        conv_templates["llava_v1"].messages.clear()


def test_a_system_text_has_the_head_that_its_style_wants():
    chatml, vicuna = (conv_templates[name].copy() for name in ("chatml_direct", "vicuna_v1"))
    for conversation in (chatml, vicuna):
        conversation.set_system("Be brief.")
        conversation.append_message(conversation.roles[0], "Hi")
    assert chatml.get_prompt().startswith("<|im_start|>system\nBe brief.<|im_end|><|im_start|>user")
    assert vicuna.get_prompt() == "Be brief. USER: Hi "
    with pytest.raises(ValueError, match="style must be 'two', 'chatml' or 'inst', got 'foo'"):
        Conversation("", ("a", "b"), "foo", "")


def test_a_role_that_is_none_is_an_error():
    model = tiny_llava()
    model.conversation = conv_templates["chatml_direct"]
    with pytest.raises(PromptError, match="system, user or assistant, got 'asistant'"):
        model.conversation_prompt([("user", ("a",)), ("asistant", ("b",)), ("user", ("c",))])
