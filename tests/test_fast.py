"""Decode steps in plain tensor code: the same numbers as transformers' modules."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from unittest.mock import MagicMock, patch
from weakref import ref

import pytest
import torch
from helpers import ids_of, tiny_llava, without_times
from test_quant import FAMILIES, PROMPTS, in_all_families
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import vlmlib
from vlmlib import CheckpointError, ContextLengthError, GenParams, NonFiniteLogitsError
from vlmlib.cache import KVCache
from vlmlib.decoding import _Drawn, decode
from vlmlib.fast import FastDecoder, record, side_stream
from vlmlib.int4 import Int4Linear, linears_of
from vlmlib.quant import quantize_llm, rounded
from vlmlib.sampling import Sampler

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
    ours = decoder(torch.tensor([[1]]), cache)
    with torch.inference_mode():
        again = decoder(torch.tensor([[1]]), copied)
        more = [decoder(torch.tensor([[1]]), copied) for _ in range(500)]
    assert torch.equal(ours, again) and len(copied) == 801 and len(cache) == 301
    assert torch.isfinite(more[-1]).all()
    assert not any(t.requires_grad for t in (ours, cache.past.layers[0].buffer))


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


# ---- recorded steps ----


@pytest.fixture
def recorded(monkeypatch):
    """A stand-in for CUDA graphs: the tensor operations of one run are written down once and done
    again on the same memory, without any Python. Collects their outputs.
    """
    outs = []

    def record(run, device):
        with torch.inference_mode(False), torch.no_grad():
            graph = make_fx(lambda _: run(), _allow_non_fake_inputs=True)(torch.zeros(1))
            out = torch.empty(0)
        outs.append(out)

        def replay():
            new = graph(torch.zeros(1))
            return out.resize_(new.shape).copy_(new)

        return replay

    monkeypatch.setattr("vlmlib.fast.record", record)
    return outs


@pytest.mark.parametrize(("kv_heads", "four_bits"), [(1, False), (2, True), (6, False)])
def test_recorded_steps_give_the_logits_of_the_whole_sequence(kv_heads, four_bits, recorded):
    net = language_model("qwen2", kv_heads)
    net = in_four_bits(net) if four_bits else net
    cache, ids = prefilled(net, 245)
    whole, decoder = copy.deepcopy(net), FastDecoder(net)
    decoder.records_graphs = True
    tokens = torch.randint(0, 97, (1, 25), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = torch.cat([decoder(tokens[:, i : i + 1], cache) for i in range(20)])
        more = net(tokens[:, 20:], past_key_values=cache.past, use_cache=True).logits[0]
        theirs = whole(torch.cat([ids, tokens], dim=1)).logits[0, 245:]
    torch.testing.assert_close(torch.cat([ours, more]), theirs, atol=2e-5, rtol=0)
    assert len(recorded) == 2, "again when the buffer has grown"
    assert cache.content == ids[0].tolist() + tokens[0, :20].tolist()


def test_a_recorded_step_can_be_used_in_and_out_of_inference_mode(recorded):
    net = language_model()
    decoder = FastDecoder(net)
    decoder.records_graphs = True
    cache, ids = prefilled(net, 9)
    tokens = torch.arange(6)[None]
    with torch.inference_mode():
        decoder(tokens[:, :1], cache)
    ours = torch.cat([decoder(tokens[:, i : i + 1], cache) for i in range(1, 6)])
    theirs = net(torch.cat([ids, tokens], dim=1)).logits[0, 10:]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    assert len(recorded) == 1 and not ours.requires_grad


@torch.inference_mode()
def test_recorded_steps_of_several_caches_do_not_mix(recorded):
    net = language_model()
    decoder = FastDecoder(net)
    caches = [prefilled(net, n)[0] for n in (9, 20, 270)]
    copies = copy.deepcopy(caches)
    for step in range(20):
        token = torch.tensor([[step]])
        for kept, cache in zip(copies, caches, strict=True):
            decoder.records_graphs = False
            expected = decoder(token, kept)
            decoder.records_graphs = True
            assert (decoder(token, cache) - expected).abs().max() < 2e-5
        if step == 10:
            for cache in (*copies, *caches):
                cache.keep(8)
    assert len(recorded) == len(decoder.graphs) == 3
    assert [len(cache) for cache in (*copies, *caches)] == [17] * 6


@torch.inference_mode()
def test_the_next_cache_of_a_size_needs_no_recording(recorded):
    net = language_model("qwen2", 2)
    decoder = FastDecoder(net)
    decoder.records_graphs = True
    whole = copy.deepcopy(net)
    for n, recordings in [(9, 1), (30, 1), (250, 2), (300, 2), (200, 3)]:
        cache, ids = prefilled(net, n)
        tokens = torch.arange(10)[None]
        ours = torch.cat([decoder(tokens[:, i : i + 1], cache) for i in range(10)])
        theirs = whole(torch.cat([ids, tokens], dim=1)).logits[0, n:]
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
        assert len(recorded) == recordings and len(decoder.graphs) == 1
        del cache
        gc.collect()


@torch.inference_mode()
def test_one_graph_at_most_outlives_its_cache(recorded):
    """Each has as much memory as the cache."""
    net = language_model()
    decoder = FastDecoder(net)
    decoder.records_graphs = True
    token = torch.tensor([[1]])

    def started(n):
        cache, _ = prefilled(net, n)
        decoder(token, cache)
        return cache, ref(cache.past.layers[0].buffer)

    def held(*buffers):
        gc.collect()
        return [buffer() is not None for buffer in buffers]

    caches, buffers = zip(*(started(n) for n in (9, 300, 20)), strict=True)
    assert held(*buffers) == [True] * 3
    del caches
    assert held(*buffers) == [False, False, True], "the last one"
    longer, other = started(508)
    assert held(*buffers, other) == [False, False, False, True]
    while len(longer) <= 512:
        decoder(token, longer)
    assert held(other) == [False], "outgrown"


def test_a_step_is_recorded_on_its_own_gpu(monkeypatch):
    """Also if another one is the current GPU, or recorded first."""
    calls, device = MagicMock(), torch.device("cuda", 1)
    for name in ("CUDAGraph", "device", "graph", "Stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(calls, name))
    side_stream.cache_clear()
    assert record(calls.run, device)() is calls.run.return_value
    side_stream.cache_clear()
    recording = "CUDAGraph device __enter__ Stream graph __enter__ run __exit__ __exit__ replay"
    assert [name.rpartition(".")[2] for name, *_ in calls.mock_calls] == recording.split()
    calls.device.assert_called_once_with(device)
    calls.Stream.assert_called_once_with(device)
    assert calls.graph.call_args.kwargs["stream"] is calls.Stream.return_value


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_drawn_id_is_waited_for_on_its_own_gpu(kind, monkeypatch):
    """Where there is no event to wait for, the copy itself must wait."""
    stream, token = MagicMock(), MagicMock(is_cuda=kind == "cuda", device=torch.device(kind, 1))
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    drawn = _Drawn(token, MagicMock(), None)
    token.to.assert_called_once_with("cpu", non_blocking=kind == "cuda")
    wait = stream.return_value.record_event.return_value.synchronize
    assert not wait.called and drawn.read(0) == 1
    if kind == "cuda":
        stream.assert_called_once_with(token.device)
        wait.assert_called_once_with()
    else:
        assert not stream.called


@torch.inference_mode()
def test_steps_and_draws_never_wait_for_the_device(monkeypatch):
    """Tensors on "meta" hold no data: whoever reads one gets an error."""
    monkeypatch.setattr("vlmlib.fast.record", lambda run, device: run)
    net = language_model("qwen2", 2).to("meta")
    decoder, cache = FastDecoder(net), KVCache(net.config)
    decoder.records_graphs = True
    net(torch.zeros(1, 253, dtype=torch.long, device="meta"), past_key_values=cache.past)
    cache.content = [0] * 253
    sampler = Sampler(GenParams())
    sampler.generator = None  # "meta" has none
    token = torch.zeros(1, 1, dtype=torch.long, device="meta")
    seen = token
    for _ in range(6):
        token = sampler.draw(sampler.scores(decoder(token, cache), seen))
        seen = torch.cat([seen, token], dim=1)
    assert len(cache) == 259 and token.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        _ = cache.content


# ---- in a model ----


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


@pytest.mark.parametrize("change", ["weight", "head", "layer"])
def test_a_model_with_another_weight_is_fused_again(change):
    model = tiny_llava()
    first, layers = model.fast_decoder(), model.net.get_decoder().layers
    if change == "weight":
        old = layers[1].mlp.down_proj.weight
        layers[1].mlp.down_proj.weight = torch.nn.Parameter(old.detach().clone())
    elif change == "head":
        model.net.lm_head = copy.deepcopy(model.net.lm_head)
    else:
        del layers[1]
    assert model.fast_decoder() is not first


def test_hooks_are_not_passed_by():
    model, seen = tiny_llava(), []
    ids = answered(model, GREEDY)
    for module in (model.net.get_decoder().layers[1].mlp, model.net.lm_head):
        hook = module.register_forward_hook(lambda *args: seen.append(args[2].shape[-2]))
        assert answered(model, GREEDY) == ids
        hook.remove()
        assert seen[1:] == [1] * (len(ids) - 1)
        assert answered(model, GREEDY) == ids and len(seen) == len(ids)
        seen.clear()
    assert model.fast_decoder() is not None


def test_the_kind_of_step_is_chosen_when_an_answer_begins():
    model, seen = tiny_llava(), []
    ids = answered(model, GREEDY)
    streams = [vlmlib.stream(model, PROMPTS[0], GREEDY, trace=0) for _ in range(2)]
    hook = model.net.lm_head.register_forward_hook(lambda *_: seen.append(1))
    assert ids_of(streams[0]) == ids and len(seen) == len(ids)
    hook.remove()
    model.net.double()
    assert ids_of(streams[1]) == ids


def answered(model, params):
    return ids_of(vlmlib.stream(model, PROMPTS[0], params, trace=0))


GREEDY = GenParams.greedy(n_predict=12)
SAMPLED = [
    GenParams(seed=3, temp=1.0, n_predict=12),
    GenParams(seed=4, temp=2.0, repeat_penalty=1.5, top_k=0, n_predict=12, order="hf"),
]


def conversation(model, params, **options):
    """Everything three turns say and leave behind."""
    chat, said = vlmlib.Chat(model, **options), []
    for parts in (PROMPTS[0], "Hello", "Left or right?"):
        said.append(without_times(chat.ask(parts, params, trace=1)))
        for chunk in said[-1]:
            for token in chunk.pop("tokens"):
                chunk.setdefault("ids", []).append((token.id, round(token.probability, 4)))
    return said, [i if isinstance(i, int) else i[1] for i in chat.cache.content]


@in_all_families
@pytest.mark.parametrize("params", [GREEDY, *SAMPLED])
def test_conversations_are_the_same_with_and_without(family, params):
    """Second turns in a cache, whole transcripts, answers that are stopped in their middle."""
    model = FAMILIES[family]()
    ids = answered(model, params)
    stop = model.tokenizer.decode(ids[5:6])
    for changes in ({}, {"stop": (stop,)}, {"n_predict": 1}):
        for chunk_prefilling in (True, False):
            model.fast = True
            assert model.fast_decoder() is not None
            fast = conversation(model, params.but(**changes), chunk_prefilling=chunk_prefilling)
            model.fast = False
            assert model.fast_decoder() is None
            plain = conversation(model, params.but(**changes), chunk_prefilling=chunk_prefilling)
            assert fast == plain
    assert len(set(ids)) > 5 or params.is_greedy


@in_all_families
def test_answers_that_fill_the_context_are_the_same_with_and_without(family):
    model, said = FAMILIES[family](), []
    model.net.lm_head.weight.data[model.stop_token_ids] = 0  # never the best
    for model.fast in (True, False):
        chat = vlmlib.Chat(model)
        said.append(without_times(chat.ask(PROMPTS[0], GREEDY.but(n_predict=10_000))))
        assert said[-1][-1]["finish_reason"] == "length"
        assert said[-1][-1]["usage"]["total_tokens"] == model.context_len
        with pytest.raises(ContextLengthError):
            chat.ask("And now?", GREEDY)
    assert said[0] == said[1]


@in_all_families
def test_streams_of_four_bits_are_the_same_with_and_without(family):
    model = quantize_llm(FAMILIES[family](), group_size=16)
    answers = []
    for fast in (True, False):
        model.fast = fast
        answers.append([answered(model, params) for params in (GREEDY, *SAMPLED)])
    assert answers[0] == answers[1]


@in_all_families
@pytest.mark.parametrize("four_bits", [False, True])
def test_a_model_that_has_answered_in_inference_mode_can_be_trained(family, four_bits):
    model = FAMILIES[family]()
    model = quantize_llm(model, group_size=16) if four_bits else model
    with torch.inference_mode():
        ids = answered(model, GREEDY)
    x = torch.zeros(1, 3, model.text_config.hidden_size, requires_grad=True)
    model.net.get_decoder()(inputs_embeds=x).last_hidden_state.sum().backward()
    assert x.grad.isfinite().all() and answered(model, GREEDY) == ids


@in_all_families
def test_a_copy_of_a_model_that_has_answered_is_its_own(family):
    model = FAMILIES[family]()
    ids = answered(model, GREEDY)
    other = copy.deepcopy(model)
    assert answered(other, GREEDY) == ids
    for weight in other.net.get_decoder().parameters():
        weight.data.zero_()
    assert answered(model, GREEDY) == ids != answered(other, GREEDY)


@in_all_families
def test_a_model_that_has_answered_is_saved_as_before(family, tmp_path):
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path / "before")
    ids = answered(model, GREEDY)
    model.save_pretrained(tmp_path / "after")
    for file in tmp_path.glob("before/**/*.safetensors"):
        after = tmp_path / "after" / file.relative_to(tmp_path / "before")
        assert after.read_bytes() == file.read_bytes()
    assert answered(vlmlib.load(tmp_path / "after", device="cpu"), GREEDY) == ids


def test_load_can_do_without(tmp_path):
    tiny_llava().save_pretrained(tmp_path / "known")
    tiny_llava(hidden_act="gelu").save_pretrained(tmp_path / "unknown")

    def has(name, **options):
        model = vlmlib.load(tmp_path / name, device="cpu", **options)
        return model.fast_decoder() is not None

    assert has("known") and has("known", fast=True) and not has("known", fast=False)
    assert not has("unknown") and not has("unknown", fast=False)
    with pytest.raises(CheckpointError, match="unknown: no fast steps .* a LlamaModel .*fast=None"):
        has("unknown", fast=True)


# ---- a step ahead ----


@pytest.fixture
def ahead(monkeypatch):
    """Every stream gives its device the next step before it reads a token, as on a GPU."""

    def decode_ahead(turn, *args, **options):
        return decode(replace(turn, looks_ahead=True), *args, **options)

    return lambda: monkeypatch.setattr("vlmlib.model.decode", decode_ahead)


@in_all_families
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED[1]])
def test_a_step_ahead_says_the_same(family, fast, params, ahead):
    model = FAMILIES[family]()
    model.fast = fast
    stop = model.tokenizer.decode(answered(model, params)[5:6])
    said = [conversation(model, p) for p in (params, params.but(stop=(stop,)))]
    ahead()
    again = [conversation(model, p) for p in (params, params.but(stop=(stop,)))]
    assert again[0] == said[0], "all end by their length: no step is lost"
    for (chunks, content), (expected, held) in zip(again, said, strict=True):
        for turn in (*chunks, *expected):
            del turn[-1]["timing"]  # of the token that ended the turn before, if it was fed
        assert chunks == expected
        assert content[: len(held)] == held and len(content) - len(held) in (0, 1)


def test_a_step_ahead_is_lost_where_an_answer_ends(ahead):
    model, prompt = tiny_llava(seed=1), "USER: Hello ASSISTANT:"

    def steps(n_predict, stop=()):
        with patch.object(model, "step", wraps=model.step) as step:
            params = GREEDY.but(n_predict=n_predict)
            ids = ids_of(model.stream_prompt(prompt, None, params, stop_token_ids=stop, trace=0))
        return len(ids), step.call_count

    ids = ids_of(model.stream_prompt(prompt, None, GREEDY, trace=0))
    end = next(i for i in range(3, 12) if ids[i] not in ids[:i])
    expected = [(12, 11), (end + 1, end), (end + 1, end), (1, 0), (0, 0)]
    requests = [(12,), (12, ids[end : end + 1]), (end + 1, ids[end : end + 1]), (1,), (0,)]
    assert [steps(*request) for request in requests] == expected
    ahead()
    expected[1] = (end + 1, end + 1)
    assert [steps(*request) for request in requests] == expected


def test_the_first_token_waits_for_no_step(ahead):
    model = tiny_llava(seed=1)
    ahead()
    with patch.object(model, "step", wraps=model.step) as step:
        stream = model.stream_prompt("USER: Hello ASSISTANT:", None, GREEDY)
        steps = [step.call_count for _ in zip(stream, range(4), strict=False)]
    assert steps == [0, 2, 3, 4]


def test_a_stream_that_is_left_with_a_step_ahead_can_be_gone_on_from(ahead):
    said = []
    for _ in range(2):
        chat = vlmlib.Chat(tiny_llava(seed=2))
        stream = chat.ask(PROMPTS[0], GREEDY)
        for _ in range(4):
            next(stream)
        stream.close()
        said.append((chat.messages[-1], ids_of(chat.ask("Hello", GREEDY, trace=0))))
        ahead()
    assert said[0] == said[1] and said[0][0][1] != ("",)


def test_broken_numbers_are_told_at_their_step(ahead):
    model, steps = tiny_llava(), []

    def step(token, cache, decoder):
        steps.append(token)
        return decoder(token, cache) if len(steps) != 3 else torch.full((1, 400), torch.nan)

    model.step = step
    ahead()
    stream = vlmlib.stream(model, PROMPTS[0], GREEDY)
    for _ in range(3):
        next(stream)
    with pytest.raises(NonFiniteLogitsError, match="step 3: 400 of 400"):
        next(stream)


def test_a_recorded_step_does_not_keep_its_decoder(recorded):
    """Memory of a GPU must be free when the last name of a model goes, not at the next sweep."""
    net = language_model()
    decoder = FastDecoder(net)
    decoder.records_graphs = True
    cache, _ = prefilled(net, 9)
    with torch.inference_mode():
        decoder(torch.tensor([[1]]), cache)
    gone = ref(decoder)
    gc.disable()
    try:
        del decoder
        assert gone() is None
    finally:
        gc.enable()
