"""Prompts are fed in pieces, and pictures seen once, without a change in what is said."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import expanded_ids, ids_of, noise, tiny_llava
from test_quant import FAMILIES, GREEDY, PROMPTS, in_all_families, logits

import vlmlib
from vlmlib.cache import FeatureCache

PICTURE = noise(40, 30, 1)


def say(model, picture=PICTURE, question="What is this?"):
    return ids_of(vlmlib.stream(model, [picture, question], GREEDY, trace=0))


@pytest.fixture
def seen(monkeypatch):
    """A model and how often its tower was asked."""
    model = tiny_llava()
    sizes, tower = [], model.tower_features

    def watched(pixels):
        sizes.append(len(pixels))
        return tower(pixels)

    monkeypatch.setattr(model, "tower_features", watched)
    return model, sizes


# ---- in pieces ----


@in_all_families
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_pieces_give_the_same_logits(family, chunk):
    model = FAMILIES[family]()
    whole = logits(model)
    model.prefill_chunk = chunk
    torch.testing.assert_close(logits(model), whole, atol=1e-5, rtol=1e-5)


@in_all_families
def test_no_layer_sees_more_than_a_piece(family):
    model = FAMILIES[family]()
    answers = [say(model), say(model, question="Left or right? " * 3)]
    model.prefill_chunk = 7
    lengths = []
    layer = model.net.get_decoder().layers[0]
    layer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    assert [say(model), say(model, question="Left or right? " * 3)] == answers
    assert max(lengths) == 7 and lengths.count(7) > 2


@in_all_families
def test_all_attention_is_torch_s_own(family, monkeypatch):
    """Of tower and language model, none by a matrix of scores that is written out."""
    model, calls = FAMILIES[family](), []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *args, **kw: calls.append(args) or fused(*args, **kw),
    )
    logits(model)
    layers = [m for m in model.whole_net.modules() if type(m).__name__.endswith("Attention")]
    assert len(calls) == len(layers) > 2


def test_a_second_turn_is_fed_in_pieces_too():
    model = tiny_llava()
    prompt, media = model.chat_prompt(PROMPTS[0]), model.prepare([PICTURE])
    longer = f"{prompt} yes USER: Left or right? ASSISTANT:"
    whole = model.turn(longer, media).prefill()
    model.prefill_chunk = 4
    cache = model.new_cache()
    model.turn(prompt, media, cache=cache).prefill()
    turn = model.turn(longer, media, start_pos=len(cache), cache=cache)
    assert turn.reused_tokens > 4
    torch.testing.assert_close(turn.prefill(), whole, atol=1e-5, rtol=1e-5)


# ---- once for each picture ----


@in_all_families
def test_features_that_are_held_give_the_same_answer(family):
    model = FAMILIES[family]()
    first = say(model)
    assert len(model.feature_cache) == 1
    assert say(model) == first == say(FAMILIES[family]())


def test_a_picture_is_seen_once_in_many_questions(seen):
    model, sizes = seen
    say(model)
    say(model, question="Left or right?")
    say(model, PICTURE.copy())
    say(model, noise(40, 30, 2))
    say(model)
    assert sizes == [1, 1]


def test_changed_weights_see_again(seen):
    model, sizes = seen
    before = say(model)
    with torch.no_grad():
        for weight in model.net.model.multi_modal_projector.parameters():
            weight.neg_()
    assert say(model) != before
    assert sizes == [1, 1]


def test_another_layer_is_another_view(seen):
    model, sizes = seen
    before = say(model)
    model.config.vision_feature_layer = -3
    assert say(model) != before
    model.config.vision_feature_layer = -2
    assert say(model) == before
    assert sizes == [1, 1], "what the usual layer gave was still there"


@in_all_families
def test_the_settings_of_an_encoder_are_its_own(family):
    """Equal for equal models, other ones for every number that `encode` reads."""
    model, same = FAMILIES[family](), FAMILIES[family]()
    assert hash(model.encoder_settings()) == hash(same.encoder_settings())
    assert model.encoder_settings() == same.encoder_settings()
    where, name = model.config, "vision_feature_layer"
    if model.family == "nvila":
        where, name = model.vision_tower, "select_layer"
    setattr(where, name, getattr(where, name) - 1)
    assert model.encoder_settings() != same.encoder_settings()


def test_another_method_sees_again(seen, monkeypatch):
    model, sizes = seen
    before, project = say(model), model.project
    monkeypatch.setattr(model, "project", lambda f, m: -project(f, m))
    assert say(model) != before
    assert sizes == [1, 1]


def test_hidden_states_that_were_asked_for_once_leave_everything_as_it_was(seen):
    model, sizes = seen
    decoder = model.net.get_decoder()
    decoder(
        inputs_embeds=torch.zeros(1, 3, model.text_config.hidden_size), output_hidden_states=True
    )
    assert any(m._forward_hooks for m in decoder.modules()), "these stay"
    assert model.fast_decoder() is not None
    say(model)
    say(model)
    assert sizes == [1]


def test_hooks_are_called_every_time(seen):
    model, sizes = seen
    say(model)
    calls = []
    hook = model.net.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        say(model)
    hook.remove()
    say(model)
    assert len(calls) == 3 and len(sizes) == 4


def test_hooks_of_a_wrapper_are_called_every_time():
    model, calls = FAMILIES["nvila"](), []
    say(model)
    model.get_vision_tower().register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        say(model)
    assert len(calls) == 2


@in_all_families
def test_changed_embeddings_see_again(family):
    """NVILA writes a line break behind a picture."""
    model = FAMILIES[family]()
    before = logits(model)
    with torch.no_grad():
        model.net.get_input_embeddings().weight.mul_(2)
    after = logits(model)
    model.feature_cache.clear()
    assert torch.equal(after, logits(model)) and not torch.equal(after, before)


@pytest.mark.parametrize("chunk", [2048, 5])
def test_gradients_are_those_of_transformers(seen, chunk):
    model, sizes = seen
    say(model)  # what this held knows no gradients
    model.prefill_chunk = chunk
    prompt, (medium,) = model.chat_prompt(PROMPTS[0]), model.prepare([PICTURE])
    ids = expanded_ids(model.net, model.tokenizer, prompt)
    weight = model.net.model.vision_tower.embeddings.patch_embedding.weight
    theirs = model.net(input_ids=ids, pixel_values=medium.pixels).logits[:, -1]
    ours = model.turn(prompt, [medium]).prefill()
    grads = [torch.autograd.grad(logits[0, 7], weight)[0] for logits in (ours, theirs)]
    assert grads[1].abs().sum() > 0
    torch.testing.assert_close(*grads)
    assert sizes == [1, 1]


def test_models_share_no_features(seen):
    model, sizes = seen
    say(model)
    other = model.with_net(model.net)
    assert other.feature_cache is not model.feature_cache
    say(other)
    assert len(sizes) == 2


def test_what_was_not_asked_for_longest_goes_first():
    cache, made = FeatureCache(limit=20), []

    def ask(key, n=2):
        cache.get(key, lambda: made.append(key) or torch.zeros(n))

    for key in "aababcab":  # 8 bytes each: two have room
        ask(key)
    assert "".join(made) == "abcab"
    ask("large", 100)
    assert len(cache) == 1
    ask("large", 100)
    assert made[-1] == "large" and made.count("large") == 1
    cache.clear()
    assert len(cache) == 0
