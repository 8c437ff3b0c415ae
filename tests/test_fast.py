"""Decode steps in plain tensor code: the same numbers as transformers' modules."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import ids_of, pixels, tiny_llava
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from vlmlib import GenParams, LlavaStreamGenerator
from vlmlib.cache import KVCache
from vlmlib.fast import FastDecoder
from vlmlib.int4 import Int4Linear, linears_of
from vlmlib.quant import quantize_llm, rounded

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 1024,
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}


def language_model(kind="llama", kv_heads=6, rope="default", **changes):
    torch.manual_seed(0)
    config, net = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[kind]
    sizes = SIZES | {"num_key_value_heads": kv_heads, "rope_parameters": ROPES[rope]} | changes
    net = net(config(**sizes)).eval()
    for parameter in net.parameters():  # biases and norms that do something
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net


def in_four_bits(net):
    for name, linear in linears_of(net.model.layers).items():
        net.model.layers.set_submodule(name, rounded(linear, 16))
    return net


@torch.inference_mode()
def prefilled(net, n):
    """A cache that holds n random ids, and these."""
    ids = torch.randint(0, 97, (1, n), generator=torch.Generator().manual_seed(n))
    cache = KVCache(net.config)
    net(ids, past_key_values=cache.past, use_cache=True)
    cache.content += ids[0].tolist()
    return cache, ids


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_steps_give_the_logits_of_the_whole_sequence(kind, kv_heads, rope):
    net = language_model(kind, kv_heads, rope)
    cache, ids = prefilled(net, 7)
    whole = copy.deepcopy(net)
    decoder = FastDecoder(net)
    tokens = torch.randint(0, 97, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = torch.cat([decoder(tokens[:, i : i + 1], cache) for i in range(300)])
        theirs = whole(torch.cat([ids, tokens], dim=1)).logits[0, 7:]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    assert cache.content == ids[0].tolist() + tokens[0].tolist()
    assert int(cache.past.get_seq_length()) == len(cache) == 307


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_steps_with_weights_of_four_bits(kind):
    net = in_four_bits(language_model(kind, 2))
    cache, ids = prefilled(net, 7)
    whole = copy.deepcopy(net)
    decoder = FastDecoder(net)
    assert FastDecoder.supports(net)
    tokens = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = torch.cat([decoder(tokens[:, i : i + 1], cache) for i in range(40)])
        theirs = whole(torch.cat([ids, tokens], dim=1)).logits[0, 7:]
        assert torch.equal(net(ids).logits, whole(ids).logits), "the separate layers still work"
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_steps_with_weights_of_four_bits_in_the_kernel():
    """In bfloat16, where both ways round at other places: not further apart than from exact ones,
    and the same weights exactly in either.
    """
    net = language_model("qwen2", 2, hidden_size=64, intermediate_size=96, num_attention_heads=4)
    net = net.bfloat16()
    for name, linear in linears_of(net.model.layers).items():
        net.model.layers.set_submodule(name, rounded(linear, 32))
    cache, ids = prefilled(net, 5)
    exact = copy.deepcopy(net).float()
    decoder = FastDecoder(net)
    tokens = torch.randint(0, 97, (1, 30), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        ours = torch.cat([decoder(tokens[:, i : i + 1], cache) for i in range(30)]).float()
        sequence = torch.cat([ids, tokens], dim=1)
        theirs, wanted = net(sequence).logits[0, 5:].float(), exact(sequence).logits[0, 5:]
    assert (ours - wanted).norm() < 1.5 * (theirs - wanted).norm() < 0.1 * wanted.norm()
    assert all("_for_kernel" in vars(layer.qkv) for layer in decoder.layers)


def test_fused_layers_of_four_bits_take_no_memory_of_their_own():
    net = in_four_bits(language_model("qwen2", 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    decoder = FastDecoder(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    attention, fused = net.model.layers[1].self_attn, decoder.layers[1].qkv
    assert fused.out_features == 48 + 2 * 16
    for part in (attention.q_proj, attention.k_proj, attention.v_proj):
        for name, value in part.named_buffers():
            whole = getattr(fused, name).untyped_storage().data_ptr()
            assert value.untyped_storage().data_ptr() == whole


def test_fused_weights_take_no_memory_of_their_own():
    net = language_model("qwen2", 2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    decoder = FastDecoder(net)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    attention = net.model.layers[1].self_attn
    for part in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert part.weight.untyped_storage().data_ptr() == (
            decoder.layers[1].qkv.untyped_storage().data_ptr()
        )
    attention.k_proj.weight.data.zero_()
    assert (decoder.layers[1].qkv[48:64] == 0).all()


def test_both_kinds_of_step_go_on_from_each_other():
    net = language_model("qwen2", 2)
    decoder, reference = FastDecoder(net), copy.deepcopy(net)
    cache, ids = prefilled(net, 5)
    with torch.inference_mode():
        for step in range(600):
            token = torch.tensor([[step % 97]])
            ids = torch.cat([ids, token], dim=1)
            if step % 3:
                logits = decoder(token, cache)
            else:
                logits = net(token, past_key_values=cache.past, use_cache=True).logits[:, -1]
                cache.content.append(step % 97)
        torch.testing.assert_close(logits, reference(ids).logits[:, -1], atol=2e-5, rtol=0)


def test_a_shortened_cache_forgets():
    net = language_model()
    decoder = FastDecoder(net)
    cache, ids = prefilled(net, 9)
    with torch.inference_mode():
        for token in range(20):
            decoder(torch.tensor([[token]]), cache)
        cache.keep(4)
        logits = decoder(torch.tensor([[3]]), cache)
        wanted = net(torch.cat([ids[:, :4], torch.tensor([[3]])], dim=1)).logits[:, -1]
    torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=0)


def test_a_cache_grows_and_can_be_used_in_and_out_of_inference_mode():
    net = language_model()
    decoder = FastDecoder(net)
    cache, _ = prefilled(net, 300)
    copied = copy.deepcopy(cache)
    with torch.no_grad():
        ours = decoder(torch.tensor([[1]]), cache)
    with torch.inference_mode():
        again = decoder(torch.tensor([[1]]), copied)
        more = [decoder(torch.tensor([[1]]), copied) for _ in range(500)]
    assert torch.equal(ours, again) and len(copied) == 801 and len(cache) == 301
    assert torch.isfinite(more[-1]).all()


def test_what_it_does_not_know_is_left_to_transformers():
    assert FastDecoder.supports(language_model())
    assert FastDecoder.supports(language_model("qwen2", 2))
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    assert not FastDecoder.supports(language_model("qwen2", **window))
    assert not FastDecoder.supports(language_model(hidden_act="gelu"))
    assert not FastDecoder.supports(language_model(attention_bias=True))
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    assert not FastDecoder.supports(language_model(**dynamic))
    mixed = in_four_bits(language_model())
    mixed.model.layers[2].mlp.down_proj = torch.nn.Linear(80, 48, bias=False)
    assert not FastDecoder.supports(mixed)
    strange = language_model()
    strange.model.layers[0].mlp.up_proj = torch.nn.Sequential(strange.model.layers[0].mlp.up_proj)
    assert not FastDecoder.supports(strange)


def test_a_moved_model_is_fused_again():
    model = tiny_llava()
    first = model.fast_decoder()
    assert first is model.fast_decoder()
    model.net.double()
    second = model.fast_decoder()
    assert second is not first and second.layers[0].qkv.dtype == torch.float64
    model.fast = False
    assert model.fast_decoder() is None


def test_a_moved_model_of_four_bits_is_fused_again():
    model = quantize_llm(tiny_llava(), group_size=16)
    first = model.fast_decoder()
    assert isinstance(first.layers[0].qkv, Int4Linear) and first is model.fast_decoder()
    model.net.double()
    second = model.fast_decoder()
    assert second is not first and second.layers[0].qkv.scales.dtype == torch.float64


@pytest.mark.parametrize("params", [GenParams.greedy(n_predict=60), GenParams(seed=3, temp=1.0)])
@pytest.mark.parametrize("four_bits", [False, True])
def test_streams_are_the_same_with_and_without(params, four_bits):
    answers = []
    for fast in (True, False):
        model = quantize_llm(tiny_llava(), group_size=16) if four_bits else tiny_llava()
        model.fast = fast
        prompt = "USER: <image>\nWhat is this? ASSISTANT:"
        stream = LlavaStreamGenerator(
            model, model.tokenizer, prompt, 0, params, image_tensor=pixels(1), trace=0
        )
        answers.append(ids_of(stream))
    assert answers[0] == answers[1] and len(answers[0]) >= 10
