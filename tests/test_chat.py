"""Conversations: what is kept of earlier turns, and that keeping it changes nothing."""

from __future__ import annotations

import pytest
import torch
from helpers import noise, tiny_llava, tiny_llava_next, transcript
from transformers import MistralConfig

from vlmlib import CacheError, Chat, ContextLengthError, PlaceholderError

TURNS = [
    [noise(40, 30, seed=0), "what is this?"],
    ["and this?"],
    [noise(30, 40, seed=1), "two blue squares?"],
    ["a red circle?"],
    [noise(28, 28, seed=2), noise(9, 50, seed=3), "what is this?"],
]
ROOM = {"max_position_embeddings": 512}
OPTIONS = {"n_predict": 9, "trace": 0, "stream_interval": 100}


WINDOW = {"text_class": MistralConfig, "sliding_window": 16}


@pytest.fixture(scope="module", params=["llava-0", "llava-1", "llava_next-0", "mistral-0"])
def model(request):
    name, seed = request.param.split("-")
    if name == "llava_next":
        return tiny_llava_next(int(seed))
    return tiny_llava(seed=int(seed), **ROOM, **(WINDOW if name == "mistral" else {}))


def talk(chat, turns=TURNS):
    """(ids, timing) of every turn."""
    out = []
    for parts in turns:
        *_, last = chat.ask(parts, **OPTIONS)
        out.append(([t.id for t in last["tokens"]], last["timing"]))
    return out


def test_five_turns_equal_the_whole_transcript_every_time(model):
    kept, fed = Chat(model), Chat(model, chunk_prefilling=False)
    for (ids, timing), (same, whole) in zip(talk(kept), talk(fed), strict=True):
        assert ids == same
        assert timing["context_tokens"] + timing["reused_tokens"] == whole["context_tokens"]
        assert whole["reused_tokens"] == 0
    assert kept.messages == fed.messages


@pytest.mark.parametrize("turn", range(1, len(TURNS)))
def test_logits_of_a_later_turn_are_those_of_the_whole_transcript(model, turn):
    chat = Chat(model)
    talk(chat, TURNS[:turn])
    prompt, media = transcript(model, [*chat.messages, ("user", tuple(TURNS[turn]))])
    continued = model.turn(prompt, media, start_pos=len(chat.cache), cache=chat.cache)
    assert continued.reused_tokens > 0
    assert (continued.prefill() - model.turn(prompt, media).prefill()).abs().max() < 1e-4


def test_only_what_is_new_is_fed(model):
    (_, first), (_, second), *_ = talk(Chat(model))
    assert first["reused_tokens"] == 0
    assert second["reused_tokens"] >= first["context_tokens"] - 1


def test_an_edited_turn_is_read_again(model):
    chat = Chat(model)
    talk(chat, TURNS[:2])
    chat.messages[0] = ("user", (TURNS[0][0], "what is that?"))
    fresh = Chat(model)
    fresh.messages = list(chat.messages)
    ((ids, timing),) = talk(chat, TURNS[2:3])
    ((expected, _),) = talk(fresh, TURNS[2:3])
    assert ids == expected
    first = model.turn(model.chat_prompt(TURNS[0]), model.prepare(TURNS[0][:1]))
    assert 0 < timing["reused_tokens"] < first.prompt_tokens


def test_a_picture_that_was_painted_over_is_read_again(model):
    picture = noise(28, 28, seed=5)
    chat = Chat(model)
    talk(chat, [[picture, "what is this?"]])
    picture.paste((255, 0, 0), (0, 0, 28, 28))
    fresh = Chat(model)
    fresh.messages = list(chat.messages)
    ((ids, timing),) = talk(chat, [["and this?"]])
    assert ids == talk(fresh, [["and this?"]])[0][0]
    assert timing["reused_tokens"] <= 8  # what stands before the picture


def test_an_edited_answer_is_read_again(model):
    chat = Chat(model)
    talk(chat, TURNS[:2])
    chat.messages[1] = ("assistant", ("a red circle",))
    fresh = Chat(model)
    fresh.messages = list(chat.messages)
    ((ids, timing),) = talk(chat, TURNS[2:3])
    ((expected, whole),) = talk(fresh, TURNS[2:3])
    assert ids == expected
    prompt, media = model.conversation_prompt(chat.messages[:1]), model.prepare(TURNS[0][:1])
    assert timing["reused_tokens"] == model.turn(prompt, media).prompt_tokens


def test_a_deleted_turn_is_forgotten(model):
    chat = Chat(model)
    talk(chat, TURNS[:3])
    del chat.messages[2:4]
    fresh = Chat(model)
    fresh.messages = list(chat.messages)
    assert talk(chat, TURNS[3:4])[0][0] == talk(fresh, TURNS[3:4])[0][0]


def test_a_closed_stream_leaves_its_answer_so_far(model):
    chat = Chat(model)
    chunks = chat.ask(TURNS[0], n_predict=9)
    said = next(chunks)["text"]
    assert chat.messages == []
    chunks.close()
    assert chat.messages[-1] == ("assistant", (said,))
    fresh = Chat(model, chunk_prefilling=False)
    fresh.messages = list(chat.messages)
    assert talk(chat, TURNS[1:2])[0][0] == talk(fresh, TURNS[1:2])[0][0]


@pytest.mark.parametrize("begun", [False, True])
def test_two_questions_behind_one_turn_cannot_both_join(model, begun):
    chat = Chat(model)
    talk(chat, TURNS[:1])
    one, two = chat.ask("and this?", n_predict=3), chat.ask("two blue squares?", n_predict=3)
    if begun:
        next(one)
    list(two)
    with pytest.raises(CacheError, match="changed since this question was asked"):
        list(one)
    assert [parts for role, parts in chat.messages[2:] if role == "user"] == [
        ("two blue squares?",)
    ]
    talk(chat, TURNS[1:2])


def test_a_turn_that_cannot_be_asked_leaves_nothing(model):
    chat = Chat(model)
    talk(chat, TURNS[:1])
    before = list(chat.messages)
    with pytest.raises(ContextLengthError):
        chat.ask("too long " * 600)
    assert chat.messages == before
    assert len(talk(chat, TURNS[1:2])[0][0]) > 0


def test_two_conversations_on_one_model_do_not_mix(model):
    alone = talk(Chat(model)), talk(Chat(model), TURNS[::-1])
    one, two = Chat(model), Chat(model)
    mixed = [], []
    for a, b in zip(TURNS, TURNS[::-1], strict=True):
        mixed[0].extend(talk(one, [a]))
        mixed[1].extend(talk(two, [b]))
    for together, apart in zip(mixed, alone, strict=True):
        assert [ids for ids, _ in together] == [ids for ids, _ in apart]


def test_placeholders_in_user_text_stay_text(model):
    chat = Chat(model)
    talk(chat, [[TURNS[0][0], "what is <image>?"], ["<image>"]])
    with pytest.raises(PlaceholderError):
        model.turn("<image> <image>", model.prepare([TURNS[0][0]]))


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_turn_that_fails_leaves_nothing(model, monkeypatch, fails_at):
    chat, once, calls = Chat(model), model._feed, []
    talk(chat, TURNS[:1])
    before = list(chat.messages)

    def tired(*args, **kwargs):
        calls.append(args)
        if len(calls) == fails_at:
            raise MemoryError("no room")
        return once(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model, "_feed", tired)
        patch.setattr(model, "fast", False)
        with pytest.raises(MemoryError, match="no room"):
            list(chat.ask(TURNS[1], **OPTIONS))
    assert chat.messages == before
    fresh = Chat(model, chunk_prefilling=False)
    fresh.messages = list(before)
    assert talk(chat, TURNS[1:2])[0][0] == talk(fresh, TURNS[1:2])[0][0]


@pytest.mark.parametrize("fast", [True, False])
def test_what_other_weights_computed_is_not_kept(fast):
    """Neither after they were written in, nor after they were cast."""
    model = tiny_llava(**ROOM)
    model.fast = fast
    chat = Chat(model)
    talk(chat, TURNS[:2])
    with torch.no_grad():
        model.net.get_decoder().layers[0].self_attn.v_proj.weight.mul_(-2)
    for change in (lambda: None, lambda: model.net.to(torch.bfloat16)):
        change()
        fresh = Chat(model, chunk_prefilling=False)
        fresh.messages = list(chat.messages)
        (ids, timing), (same, _) = (talk(c, TURNS[1:2])[0] for c in (chat, fresh))
        assert ids == same and timing["reused_tokens"] == 0
    assert talk(chat, TURNS[1:2])[0][1]["reused_tokens"] > 0


def negate(module):
    with torch.no_grad():
        for weight in module.parameters():
            weight.neg_()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: negate(model.net.model.vision_tower),
        lambda model: negate(model.net.model.multi_modal_projector),
        lambda model: setattr(model.config, "vision_feature_layer", -3),
        lambda model: setattr(model, "project", lambda *args: -type(model).project(model, *args)),
    ],
    ids=["tower", "projector", "setting", "method"],
)
def test_a_picture_that_is_encoded_otherwise_is_not_kept(change):
    model = tiny_llava(**ROOM)
    chat = Chat(model)
    talk(chat, TURNS[:1])
    fed = {}
    for name, then in (("before", lambda _: None), ("after", change)):
        then(model)
        prompt, media = transcript(model, [*chat.messages, ("user", tuple(TURNS[1]))])
        whole = model.turn(prompt, media).prefill()
        turn = model.turn(prompt, media, start_pos=len(chat.cache), cache=chat.cache)
        fed[name] = whole
        assert (turn.reused_tokens > 0) == (name == "before")
        torch.testing.assert_close(turn.prefill(), whole, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(fed["before"], fed["after"], atol=1e-2)
