"""Keys and values of a sequence: what is kept of them is right, whatever happened before."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from threading import Barrier
from unittest.mock import patch

import pytest
import torch
from helpers import noise, tiny_llava, transcript
from test_fast import SIZES
from transformers import (
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vlmlib import CacheError, Chat
from vlmlib.cache import FeatureCache, GrowingLayer, KVCache

GROUPED = {**SIZES, "num_key_value_heads": 2}
WINDOWS = {
    "mistral": lambda n: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=n)),
    "mistral's default": lambda n: MistralForCausalLM(MistralConfig(**GROUPED)),
    "qwen2, some layers": lambda n: Qwen2ForCausalLM(
        Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=n, max_window_layers=1)
    ),
}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("during", ["prefill", "step"])
def test_what_is_interrupted_between_two_layers_can_be_gone_on_from(during, fast):
    """Ctrl-C when layer 0 has cached a position and layer 1 has not."""
    model = tiny_llava(max_position_embeddings=512)
    model.fast = fast
    chat = Chat(model)
    list(chat.ask([noise(40, 30), "what is this?"], n_predict=9))
    messages = [*chat.messages, ("user", ("and this?",))]
    stream = chat.ask("and this?", n_predict=9)
    if during == "step":
        next(stream)
    first, second = chat.cache.past.layers
    name = "append" if fast and during == "step" else "update"
    with (
        patch.object(second, name, side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        list(stream)
    assert first.get_seq_length() > second.get_seq_length() == len(chat.cache)
    prompt, media = transcript(model, messages)
    turn = model.turn(prompt, media, start_pos=len(chat.cache), cache=chat.cache)
    assert turn.reused_tokens > 10
    expected = model.turn(prompt, media).prefill()
    torch.testing.assert_close(turn.prefill(), expected, atol=1e-4, rtol=0)
    assert {layer.get_seq_length() for layer in (first, second)} == {len(chat.cache)}
    list(chat.ask("and now?", n_predict=9))


@torch.inference_mode()
@pytest.mark.parametrize("window", [5, 16])
@pytest.mark.parametrize("kind", WINDOWS)
def test_layers_with_a_window_give_the_same_logits_and_can_be_cropped(kind, window):
    """As the whole sequence gives, and as with transformers' layers, which forget; in pieces of any
    size, that end before the window and behind it.
    """
    torch.manual_seed(0)
    net = WINDOWS[kind](window).eval()
    ids = torch.randint(0, 97, (1, 40))
    whole = net(ids, use_cache=False).logits
    ours, theirs = KVCache(net.config), DynamicCache(config=net.config)
    assert {type(layer) for layer in ours.past.layers} == {GrowingLayer}

    def fed(past, pieces):
        out = [net(piece, past_key_values=past, use_cache=True).logits for piece in pieces]
        return torch.cat(out, dim=1)

    pieces = ids.split((4, 1, 1, 12, 1, 1, 20), dim=1)
    torch.testing.assert_close(fed(theirs, pieces), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(fed(ours.past, pieces), whole, atol=1e-5, rtol=0)
    ours.content = ids[0].tolist()
    for n in (39, 30, 17, 16, 3, 0):
        ours.keep(n)
        again = fed(ours.past, ids[:, n:].split(7, dim=1))
        torch.testing.assert_close(again, whole[:, n:], atol=1e-5, rtol=0)
        ours.content = ids[0].tolist()


def test_rows_are_not_chosen_behind_its_back():
    """transformers' layers replace `keys` there; the next update would bring the old rows back."""
    past = tiny_llava().new_cache().past
    for layer in range(2):
        past.update(torch.ones(2, 2, 3, 4), torch.ones(2, 2, 3, 4), layer)
    rows = torch.tensor([1, 1])
    for change in (past.reorder_cache, past.batch_select_indices, past.batch_repeat_interleave):
        with pytest.raises(CacheError, match="one sequence"):
            change(rows)


def test_what_is_cropped_is_zero():
    """A step over the whole room of a cache multiplies what is masked by 0: NaN would stay NaN."""
    layer = GrowingLayer()
    layer.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    layer.update(torch.full((1, 2, 2, 4), torch.nan), torch.full((1, 2, 2, 4), torch.nan))
    layer.crop(-2)
    assert layer.get_seq_length() == 3 and (layer.keys == 1).all()
    assert not layer.buffer[:, :, :, 3:].any()


def test_features_that_two_threads_ask_for_are_counted_once():
    cache, both = FeatureCache(limit=10_000), Barrier(4)

    def encode():
        both.wait(timeout=30)
        return torch.ones(1000)

    with ThreadPoolExecutor(4) as pool:
        found = [f.result() for f in [pool.submit(cache.get, "key", encode) for _ in range(4)]]
    assert len(found) == 4 and len(cache) == 1 and cache._bytes == 4000
    assert len(deepcopy(cache)) == 0 and deepcopy(cache).limit == 10_000
