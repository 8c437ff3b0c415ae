"""Four bits a weight: the numbers, the kernels, the search, and what is saved and read."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import deque

import nvila_helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import ids_of, noise, tiny_llava
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_internvl import tiny_internvl
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen2Config, Qwen2ForCausalLM

import vlmlib
from vlmlib import (
    CheckpointError,
    GenParams,
    Int4Linear,
    InternVLStreamGenerator,
    NVILAStreamGenerator,
    QuantizationError,
    quantize_llm,
)
from vlmlib.int4 import (
    KERNEL_ROWS,
    KERNELS,
    METHOD,
    dequantize,
    linears_of,
    pack,
    quantize,
    unpack,
)
from vlmlib.quant import (
    GROUPS,
    best_scales,
    can_fold,
    cut_weights,
    fold,
    layer_inputs,
    nearest,
    watch,
)
from vlmlib.tiny.evaluate import grade, weight_formats
from vlmlib.tiny.scenes import VALIDATION

GREEDY = GenParams.greedy(n_predict=12)
FAMILIES = {"llava": tiny_llava, "nvila": nvila_helpers.nvila, "internvl": tiny_internvl}
in_all_families = pytest.mark.parametrize("family", FAMILIES)
PROMPTS = [
    [noise(40, 30, 1), "What is this?"],
    "Hello there",
    [noise(28, 50, 2), "Left or right?"],
]


def random_weights(o, i, seed=0, dtype=torch.float32):
    return torch.randn(o, i, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int4_linear(o, i, group_size, bias=False, dtype=torch.bfloat16, seed=0):
    numbers = quantize(random_weights(o, i, seed, dtype), group_size)
    return Int4Linear.of(i, *numbers, random_weights(1, o, seed + 1, dtype)[0] if bias else None)


def logits(model, prompt=PROMPTS[0]):
    """(1, n, v): what the whole network says about one prompt."""
    parts = [prompt] if isinstance(prompt, str) else prompt
    media = model.prepare([p for p in parts if not isinstance(p, str)])
    with torch.inference_mode():
        return model.turn(model.chat_prompt(parts), media).prefill()


def answer_ids(model, params=GREEDY):
    return ids_of(vlmlib.stream(model, PROMPTS[0], params, trace=0))


# ---- numbers ----


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_packing_is_undone(rows, pairs, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 16, (rows, 2 * pairs), generator=generator, dtype=torch.uint8)
    packed = pack(values)
    assert packed.shape == (rows, pairs) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed), values)


def test_the_even_column_is_in_the_high_half():
    assert pack(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x12, 0xF0]]


def test_numbers_by_hand():
    weight = torch.tensor([[-2.0, 0.3, 1.6, 5.5], [0.0, 7.5, 4.1, 0.2], [-7.5, -4.0, -3.6, 0.0]])
    values, scales, zeros = quantize(weight, 4)
    assert scales.tolist() == [[0.5], [0.5], [0.5]]
    assert zeros.tolist() == [[4], [0], [15]]
    assert values.tolist() == [[0, 5, 7, 15], [0, 15, 8, 0], [0, 7, 8, 15]]
    assert dequantize(values, scales, zeros).tolist() == [
        [-2.0, 0.5, 1.5, 5.5],
        [0.0, 7.5, 4.0, 0.0],
        [-7.5, -4.0, -3.5, 0.0],
    ]


def test_a_group_on_one_side_of_zero_is_cut_as_by_awq():
    """Its zero point would be far out of 0..15. Groups of real weights have both signs."""
    values, scales, zeros = quantize(torch.tensor([[9.0, 9.5, 10.0, 10.5]]), 4)
    assert scales.item() == pytest.approx(0.1) and zeros.item() == 0
    assert values.tolist() == [[15, 15, 15, 15]]


@given(
    st.integers(1, 4),
    st.integers(1, 70),
    st.sampled_from([2, 8, 32]),
    st.floats(-1e3, 1e3),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**32 - 1),
)
def test_no_weight_inside_the_range_is_off_by_more_than_half_a_step(o, i, e, shift, dtype, seed):
    weight = (random_weights(o, i, seed) * 10 ** (seed % 7 - 3) + shift).to(dtype)
    values, scales, zeros = quantize(weight, e)
    assert scales.dtype == dtype and values.shape[1] == e * scales.shape[1] >= i
    assert values.max() <= 15 and zeros.max() <= 15
    found = dequantize(values, scales.double(), zeros)[:, :i]
    s, z = (x.double().repeat_interleave(e, dim=1)[:, :i] for x in (scales, zeros))
    w = weight.double()
    inside = (w >= -z * s) & (w <= (15 - z) * s)
    assert ((found - w).abs() <= s / 2 * (1 + 1e-5))[inside].all()
    signs = torch.stack([(weight < 0).any(), (weight > 0).any()])
    if signs.all() and e >= i:  # one group a row
        rows = (weight < 0).any(dim=1) & (weight > 0).any(dim=1)
        beyond = 15 * torch.finfo(dtype).eps  # a scale that was rounded down is too short by this
        assert ((found - w).abs() <= s * (0.5 + beyond) * (1 + 1e-5))[rows].all()


def test_columns_that_fill_a_group_weigh_nothing():
    weight = random_weights(3, 160)
    values, scales, zeros = quantize(weight, 128)
    assert values.shape == (3, 256) and scales.shape == zeros.shape == (3, 2)
    assert (dequantize(values, scales, zeros)[:, 160:] == 0).all()
    assert torch.equal(values[:, :128], quantize(weight[:, :128], 128)[0])


# ---- the layer ----

SIZES = [(48, 256, 128), (160, 160, 32), (32, 160, 128), (64, 432, 64), (16, 512, 256)]


@pytest.mark.parametrize(("o", "i", "e"), SIZES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (2, 3), ()])
def test_the_kernel_computes_the_formula(o, i, e, bias, shape, monkeypatch):
    layer, x = int4_linear(o, i, e, bias), random_weights(1, i, 5).bfloat16()
    x = (x + random_weights(6, i, 6).bfloat16())[: torch.Size(shape).numel()].view(*shape, i)
    called = []
    kernel = KERNELS["cpu"]
    monkeypatch.setitem(KERNELS, "cpu", lambda *args: called.append(args) or kernel(*args))
    found = layer(x)
    assert len(called) == 1 and found.shape == (*shape, o) and found.dtype == torch.bfloat16
    # What the kernel multiplies by: (q - 8) s + z', where z' = (8 - z) s was rounded to bfloat16.
    s, z = layer.scales.double()[..., None], layer.zeros.double()[..., None]
    factor = ((8 - z) * s).bfloat16().double()
    weight = ((unpack(layer.packed).view(o, -1, e) - 8.0) * s + factor).flatten(1)[:, :i]
    product = x.double() @ weight.T
    exact = product + (layer.bias.double() if bias else 0)
    rounding = 2**-8 * (product.abs() + exact.abs()) + 1e-3  # of the product, and of the sum
    assert ((found.double() - exact).abs() <= rounding).all()
    # Plain weights (q - z) s differ by the rounding of z': 8 s / 2^9 at most.
    plain = F.linear(x.double(), layer.dequantize().double(), layer.bias.double() if bias else None)
    steps = layer.scales.double().repeat_interleave(e, dim=1)[:, :i]
    allowed = x.double().abs() @ (steps * (8 + 15) / 2**9).T  # and of w' itself, 15 s at most
    assert ((found.double() - plain).abs() <= allowed + rounding).all()


@pytest.mark.parametrize(
    "case", ["float32", "float16", "group of 16", "24 outputs", "many positions", "gradient"]
)
def test_without_a_kernel_the_weights_are_made(case, monkeypatch):
    monkeypatch.setitem(KERNELS, "cpu", None)
    dtype = {"float32": torch.float32, "float16": torch.float16}.get(case, torch.bfloat16)
    o, e = (24 if case == "24 outputs" else 48), (16 if case == "group of 16" else 32)
    layer = int4_linear(o, 96, e, bias=True, dtype=dtype)
    x = random_weights(KERNEL_ROWS + (case == "many positions"), 96).to(dtype)
    x.requires_grad_(case == "gradient")
    expected = F.linear(x, layer.dequantize(), layer.bias)
    assert torch.equal(layer(x), expected)
    if case == "gradient":
        layer(x).sum().backward()
        assert torch.equal(x.grad, layer.dequantize().sum(0).expand_as(x))


def test_nothing_of_nothing():
    assert int4_linear(16, 32, 32)(torch.zeros(0, 32, dtype=torch.bfloat16)).shape == (0, 16)


@pytest.mark.parametrize(("o", "i", "e"), [(48, 256, 128), (40, 160, 32), (8, 96, 32)])
def test_what_cuda_is_given_has_the_shapes_it_wants(o, i, e, monkeypatch):
    """Without a GPU: torch checks sizes and types of imagined tensors, and computes nothing."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        layer = Int4Linear(i, o, e, bias=True, device="cuda").bfloat16()
        y = layer(torch.zeros(2, 3, i, device="cuda", dtype=torch.bfloat16))
        weights, factors = layer._for_kernel
    assert y.shape == (2, 3, o) and y.device.type == "cuda" and y.dtype == torch.bfloat16
    tiles = weights.shape[1] * 2 * weights.shape[3]
    assert weights.shape[0] * 8 == o and tiles * 16 == -(-i // e) * e
    assert factors.shape == (-(-i // e), o, 2)


def test_old_gpus_do_without_the_kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with FakeTensorMode():
        assert Int4Linear(64, 16, 32, device="cuda").bfloat16()._for_kernel is None


def test_the_kernels_order_is_not_saved_and_not_outlived():
    layer, other = int4_linear(32, 64, 32), int4_linear(32, 64, 32, seed=7)
    x = random_weights(1, 64).bfloat16()
    expected = layer(x), other(x)
    assert set(layer.state_dict()) == {"packed", "scales", "zeros"}
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), expected[1]) and not torch.equal(*expected)
    layer.float()
    assert layer(x.float()).dtype == torch.float32
    assert torch.equal(layer.bfloat16()(x), expected[1])


@pytest.mark.parametrize("sizes", [(128, 64, 64), (48, 16, 32)])
def test_parts_of_a_stack_compute_as_before(sizes):
    parts = [int4_linear(o, 96, 32, bias=True, seed=o + k) for k, o in enumerate(sizes)]
    x = random_weights(3, 96).bfloat16()
    before = [part(x) for part in parts]
    whole = Int4Linear.stacked(parts)
    assert torch.equal(whole(x), torch.cat(before, dim=-1))
    assert all(torch.equal(part(x), y) for part, y in zip(parts, before, strict=True))
    storages = {p._for_kernel[0].untyped_storage().data_ptr() for p in (*parts, whole)}
    assert len(storages) == (1 if sizes[0] == 128 else 4), "whole blocks share it"
    other = int4_linear(sizes[1], 96, 32, bias=True, seed=9)
    parts[1].load_state_dict(other.state_dict())
    before[1] = other(x)
    assert torch.equal(whole(x), torch.cat(before, dim=-1))
    assert torch.equal(parts[1](x), before[1])
    alone = copy.deepcopy(parts[1]).to(torch.bfloat16)
    assert alone._whole is None and torch.equal(alone(x), before[1])


# ---- a model ----


@in_all_families
def test_only_the_decoders_linear_layers_become_four_bits(family):
    model = FAMILIES[family]()
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    done = []
    quantized = quantize_llm(model, group_size=16, progress=lambda *args: done.append(args))
    assert done == [(1, 2), (2, 2)]
    names = {n for n, m in quantized.net.named_modules() if isinstance(m, Int4Linear)}
    decoder = {n for n, m in model.net.named_modules() if m is model.net.get_decoder()}.pop()
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {n.rpartition(".")[2] for n in names} == set(linears) and len(names) == 14
    assert all(n.startswith(f"{decoder}.layers.") for n in names)
    kept = set(before) - {f"{n}.{part}" for n in names for part in ("weight", "bias")}
    old, new = model.net.state_dict(), quantized.net.state_dict()
    assert all(old[n].data_ptr() == new[n].data_ptr() for n in kept), "shared, not copied"
    assert old.keys() == before.keys() and all(torch.equal(old[n], before[n]) for n in before)
    assert type(quantized) is type(model) and quantized.tokenizer is model.tokenizer
    assert not hasattr(model.net.config, "quantization_config")
    count = re.compile(r"\((.*?) M parameters")
    assert count.search(repr(quantized))[1] == count.search(repr(model))[1]
    assert "int4 and float32" in repr(quantized) and "int4" not in repr(model)


def test_a_model_of_four_bits_answers_like_its_weights():
    """The same as 16-bit layers that hold the same weights."""
    model = tiny_llava()
    quantized = quantize_llm(model, group_size=16)
    for name, module in list(quantized.net.named_modules()):
        if isinstance(module, Int4Linear):
            linear = model.net.get_submodule(name)
            linear.weight.data.copy_(module.dequantize())
    assert torch.equal(logits(model), logits(quantized))
    assert answer_ids(model) == answer_ids(quantized)


def test_what_is_made_in_inference_mode_can_be_used_outside():
    model = tiny_llava()
    with torch.inference_mode():
        quantized = quantize_llm(model, group_size=16, calibration=PROMPTS[:1])
    tensors = quantized.net.state_dict().values()
    assert not any(tensor.is_inference() for tensor in tensors)


@pytest.mark.parametrize("size", [0, 1, 3, -2, 32.0, None])
def test_wrong_group_sizes(size):
    with pytest.raises(QuantizationError, match=f"size {size} .* an even group_size of at least 2"):
        quantize_llm(tiny_llava(), group_size=size)


def test_what_cannot_be_quantised():
    model = tiny_llava()
    with pytest.raises(QuantizationError, match="calibration is empty"):
        quantize_llm(model, calibration=[])
    with pytest.raises(QuantizationError, match="has four-bit weights already"):
        quantize_llm(quantize_llm(model))

    class Other(type(model.net.get_decoder())):
        pass

    model.net.get_decoder().__class__ = Other
    with pytest.raises(QuantizationError, match=r"'Qwen2Model'\], not those of Other: calib"):
        quantize_llm(model, calibration=PROMPTS)
    assert isinstance(quantize_llm(model), vlmlib.Llava), "rounding needs to know nothing"


# ---- the search ----


def searched_nets():
    """A decoder with grouped queries and one without; biases and norms that do something."""
    for kv_heads in (2, 4):
        model = tiny_llava(num_key_value_heads=kv_heads, attention_bias=True)
        for seed, parameter in enumerate(model.net.get_decoder().parameters()):
            noise_ = random_weights(1, parameter.numel(), seed).view_as(parameter)
            parameter.data += 0.1 * noise_ * (1 if parameter.dim() > 1 else 3)
        yield model


@torch.no_grad()
def test_the_search_never_raises_the_error_on_its_prompts():
    """For every group of layers: plain rounding, with scales, with scales and cuts."""
    gains = []
    for model in searched_nets():
        inputs: deque = layer_inputs(model, PROMPTS)
        for layer in model.net.get_decoder().layers:
            calls = inputs.popleft()
            plain, scaled = [], []
            for group, seen in zip(GROUPS, watch(layer, calls), strict=True):
                block = layer.get_submodule(group.block)
                weights = {name: block.get_submodule(name).weight for name in group.linears}
                plain.append(seen.error(block, {n: nearest(w, 16) for n, w in weights.items()}))
                if can_fold(layer, group):
                    s = best_scales(layer, group, seen, 16)
                    new = {n: nearest(w * s, 16) / s for n, w in weights.items()}
                    scaled.append(seen.error(block, new))
                    fold(layer, group, s)
                else:
                    scaled.append(plain[-1])
            for at, (group, seen) in enumerate(zip(GROUPS, watch(layer, calls), strict=True)):
                block = layer.get_submodule(group.block)
                cut = cut_weights(layer, group, seen, 16)
                error = seen.error(block, {n: nearest(w, 16) for n, w in cut.items()})
                assert scaled[at] <= plain[at]
                assert error <= scaled[at] * (1 + 1e-4)
                gains.append(error / plain[at])
    assert min(gains) < 0.9 and len(gains) == 16


@torch.no_grad()
def test_folding_alone_changes_nothing():
    for model in searched_nets():
        before = [logits(model, prompt) for prompt in PROMPTS]
        for layer in model.net.get_decoder().layers:
            for seed, group in enumerate(GROUPS):
                inputs = layer.get_submodule(group.path(group.linears[0])).in_features
                if can_fold(layer, group):
                    fold(layer, group, 2 ** random_weights(1, inputs, seed)[0])
        for prompt, expected in zip(PROMPTS, before, strict=True):
            found = logits(model, prompt)
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@in_all_families
def test_a_search_leaves_the_model_alone_and_makes_its_own_scales(family):
    model = FAMILIES[family]()
    model.net.get_decoder().layers[0].input_layernorm.weight.data[3] = 30.0  # a large input
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    expected = logits(model)
    quantized = quantize_llm(model, group_size=16, calibration=PROMPTS)
    rounded = quantize_llm(model, group_size=16)
    after = model.net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert torch.equal(logits(model), expected)
    errors = [(logits(m) - expected).square().mean() for m in (quantized, rounded)]
    assert errors[0] < errors[1]
    norms = [m.net.get_decoder().layers[0].input_layernorm.weight for m in (model, quantized)]
    assert not torch.equal(*norms)


def test_a_failure_leaves_no_hooks(monkeypatch):
    model = tiny_llava()
    monkeypatch.setattr("vlmlib.quant._answered", lambda *args: torch.zeros(1, 2, 3))
    with pytest.raises(RuntimeError):
        quantize_llm(model, calibration=PROMPTS)
    assert not any(layer._forward_pre_hooks for layer in model.net.get_decoder().layers)


# ---- both kinds of weights in one model ----


def by_generator(family, model, quant_llm):
    """An answer through the family's generator, chunk by chunk."""
    generator = {"nvila": NVILAStreamGenerator, "internvl": InternVLStreamGenerator}[family]
    media, prompt = model.prepare(PROMPTS[0][:1]), model.chat_prompt(PROMPTS[0])
    return generator(model, GREEDY, prompt, media, quant_llm=quant_llm, trace=0, stream_interval=1)


@pytest.mark.parametrize("family", ["nvila", "internvl"])
def test_quant_llm_chooses_between_the_weights_of_a_model_that_holds_both(family):
    model = FAMILIES[family]()
    model.quantized = quantize_llm(model, group_size=48)
    wanted = {False: answer_ids(model), True: answer_ids(model.quantized)}
    assert wanted[False] != wanted[True]
    streams = {quant: by_generator(family, model, quant) for quant in (True, False)}
    found = {True: [], False: []}
    for chunks in zip(streams[True], streams[False], strict=False):  # at the same time
        for quant, chunk in zip(streams, chunks, strict=True):
            found[quant] += [token.id for token in chunk["tokens"]]
    for quant, ids in found.items():
        ids += [token.id for chunk in streams[quant] for token in chunk.get("tokens", ())]
        assert ids == wanted[quant]


@pytest.mark.parametrize("family", ["nvila", "internvl"])
def test_a_model_with_one_kind_of_weights_runs_alike_for_both(family):
    model = FAMILIES[family]()
    for one in (model, quantize_llm(model, group_size=48)):
        for quant in (True, False):
            assert ids_of(by_generator(family, one, quant)) == answer_ids(one)


def test_quant_llm_of_nvilas_own_methods():
    model = nvila_helpers.nvila()
    model.quantized = quantized = quantize_llm(model, group_size=48)
    texts = {}
    for quant, one in ((False, model), (True, quantized)):
        texts[quant] = vlmlib.answer(one, PROMPTS[0], GREEDY).strip()
        assert model.generate_content(PROMPTS[0], GREEDY, quant_llm=quant) == texts[quant]
        ids, media = model.chat_prompt(PROMPTS[0]), {"image": model.prepare(PROMPTS[0][:1])}
        ids = torch.tensor([model.tokenizer(ids).input_ids])
        new = model.generate(
            ids, media, quant_llm=quant, do_sample=False, max_new_tokens=GREEDY.n_predict
        )
        assert new[0].tolist() == answer_ids(one)[: new.shape[1]]
        said, _ = model.stream_gen(ids, media, None, 0, False, quant)
        assert torch.equal(said[0], logits(one))
    assert texts[False] != texts[True]
    assert model.generate_content(PROMPTS[0], GREEDY) == texts[True], "the published default"
    assert model.benchmark("Hi", repeats=1, n_predict=2)["step_time"] > 0
    assert not hasattr(model.config.llm_cfg, "quantization_config")
    assert quantized.config.llm_cfg["quantization_config"]["group_size"] == 48


# ---- checkpoints ----


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def parts_of(model):
    parts = (model.llm, model.vision_tower, model.mm_projector) if model.family == "nvila" else ()
    return parts or (model.net,)


def same(a, b):
    """Whether two models hold the same numbers, and say the same to the last bit.

    Products round differently where matrices lie differently in memory, as those that are read
    from a file do: so both are given memory of their own first.
    """
    a, b = copy.deepcopy(a), copy.deepcopy(b)
    states = []
    for model in (a, b):
        parts = [part._apply(torch.clone) for part in parts_of(model)]
        states.append([item for part in parts for item in part.state_dict().items()])
    for (name, value), (other, wanted) in zip(*states, strict=True):
        assert name == other and torch.equal(value, wanted), name
    return all(torch.equal(logits(a, prompt), logits(b, prompt)) for prompt in PROMPTS)


def llm_folder(family, folder):
    return folder / "llm" if family == "nvila" else folder


@in_all_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_what_is_loaded(family, dtype, tmp_path):
    model = vlmlib.load(saved(FAMILIES[family](), tmp_path / "16"), device="cpu", dtype=dtype)
    quantized = quantize_llm(model, group_size=32, calibration=PROMPTS)
    ids = answer_ids(quantized)  # the fast decoder has made views of the weights
    folder = saved(quantized, tmp_path / "4")
    config = json.loads((llm_folder(family, folder) / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == METHOD == "vlmlib_int4"
    again = vlmlib.load(folder, device="cpu", dtype=dtype)
    assert type(again) is type(model) and again.dtype == dtype and not again.net.training
    assert same(again, quantized)
    assert dtype == torch.bfloat16 or answer_ids(again) == ids
    assert vlmlib.load(folder, device="cpu").dtype == torch.bfloat16, "what the kernels want"
    with pytest.raises(QuantizationError, match="already"):
        quantize_llm(again)
    second = saved(again, tmp_path / "second")
    files = [llm_folder(family, f) / "model.safetensors" for f in (folder, second)]
    first, other = map(load_file, files)
    assert first.keys() == other.keys() and all(torch.equal(first[n], other[n]) for n in first)
    again.net.float()
    assert logits(quantize_llm(model)).shape == logits(again).shape


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int4") / "tiny"
    return saved(quantize_llm(tiny_llava(), group_size=16), folder)


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of it to break."""
    return shutil.copytree(checkpoint, tmp_path / "broken")


def change(folder, weights=None, **quantization):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= quantization
    (folder / "config.json").write_text(json.dumps(config))
    if weights:
        state = load_file(folder / "model.safetensors")
        weights(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})


Q_PROJ = "language_model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": lambda w: w.pop(f"{Q_PROJ}.scales")}, "1 missing keys: .*q_proj.scales"),
        ({"weights": lambda w: w.update(x=torch.zeros(1))}, "1 unexpected keys: .*x"),
        ({"group_size": 32}, r"_proj\.(scales|packed)"),
        ({"group_size": 3}, "group_size 3 and layout 'plain': expected an even"),
        ({"group_size": "16"}, "group_size '16' and layout"),
        ({"layout": "gemv"}, "layout 'gemv'.*one of .'plain', 'awq'"),
        ({"bits": 3}, "bits"),
        ({"layout": "awq"}, r"qweight|expected \(3, 48\)"),
    ],
)
def test_broken_checkpoints(folder, changes, words):
    change(folder, **changes)
    with pytest.raises(CheckpointError, match=f"(?s)broken: .*{words}"):
        vlmlib.load(folder, device="cpu")


def pack_awq(values):
    """AutoAWQ's GEMM format, from its definition: of eight neighbours, number ORDER[k] goes to the
    k-th four bits of a word, from the lowest.
    """
    rows = []
    for row in values.tolist():
        words = []
        for at in range(0, len(row), 8):
            word = 0
            for k, neighbour in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                word |= row[at + neighbour] << (4 * k)
            words.append(word - 2**32 if word >= 2**31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}


def write_awq(model, folder, *, skip=(), **config):
    """A four-bit model in AutoAWQ's format: every matrix with inputs in rows, packed by outputs."""
    saved(model, folder)
    state = load_file(folder / "model.safetensors")
    for name in sorted(n.removesuffix(".packed") for n in state if n.endswith(".packed")):
        parts = {part: state.pop(f"{name}.{part}") for part in ("packed", "scales", "zeros")}
        values = unpack(parts["packed"])
        if name.endswith(skip or "none"):
            weight = dequantize(values, parts["scales"], parts["zeros"])
            state[f"{name}.weight"] = weight.contiguous()
            continue
        state[f"{name}.qweight"] = pack_awq(values.T)
        state[f"{name}.qzeros"] = pack_awq(parts["zeros"].T)
        state[f"{name}.scales"] = parts["scales"].T.half().contiguous()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    whole = json.loads((folder / "config.json").read_text()) | {"quantization_config": AWQ | config}
    (folder / "config.json").write_text(json.dumps(whole))


@pytest.fixture(scope="module")
def half():
    """Four-bit weights whose scales are exact in 16 bits, as AutoAWQ keeps them."""
    model = quantize_llm(tiny_llava(attention_bias=True), group_size=16)
    for module in model.net.modules():
        if isinstance(module, Int4Linear):
            module.scales = module.scales.half().float()
    return model


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"version": "GEMM", "modules_to_not_convert": ["vision_tower"]},
        {"modules_to_not_convert": None, "backend": "autoawq"},
    ],
)
def test_awq_checkpoints(half, tmp_path, config):
    write_awq(half, tmp_path, **config)
    model = vlmlib.load(tmp_path, device="cpu", dtype=torch.float32)
    assert same(model, half)
    assert answer_ids(model) == answer_ids(half)
    assert vlmlib.load(tmp_path, device="cpu").dtype == torch.bfloat16
    again = vlmlib.load(saved(model, tmp_path / "ours"), device="cpu", dtype=torch.float32)
    assert again.net.config.quantization_config["layout"] == "plain"
    assert same(again, half)


def test_awq_checkpoints_with_layers_of_sixteen_bits(half, tmp_path):
    write_awq(half, tmp_path, skip=("down_proj",), modules_to_not_convert=["down_proj"])
    model = vlmlib.load(tmp_path, device="cpu", dtype=torch.float32)
    assert type(model.net.get_decoder().layers[1].mlp.down_proj) is torch.nn.Linear
    assert (logits(model) - logits(half)).abs().max() < 1e-4
    assert answer_ids(model) == answer_ids(half), "fast or not"
    again = vlmlib.load(saved(model, tmp_path / "ours"), device="cpu", dtype=torch.float32)
    assert same(again, model)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"bits": 3}, "AWQ with bits 3"),
        ({"version": "gemv"}, "version 'gemv'.*only 4, 'gemm' and True"),
        ({"zero_point": False}, "zero_point False"),
        ({"version": "marlin"}, "'marlin'"),
        ({"group_size": 40}, "48 inputs in groups of 40"),
        ({"group_size": -1}, "group_size -1"),
    ],
)
def test_awq_formats_that_cannot_be_read(half, tmp_path, config, words):
    write_awq(half, tmp_path, **config)
    with pytest.raises(CheckpointError, match=f"{tmp_path.name}: .*{words}"):
        vlmlib.load(tmp_path, device="cpu")


def bytes_of(net):
    """Of all that is in the layers of its decoder."""
    return sum(tensor.nbytes for tensor in net.get_decoder().layers.state_dict().values())


def with_int4(net, group_size):
    """Of the sizes of a network, on a device that holds no data."""
    for name, linear in linears_of(net.get_decoder().layers).items():
        sizes = (linear.in_features, linear.out_features, group_size, linear.bias is not None)
        net.get_decoder().layers.set_submodule(name, Int4Linear(*sizes, device="meta"))
    return net.bfloat16()


@pytest.mark.parametrize(("group_size", "share"), [(128, 0.265), (64, 0.276), (32, 0.30)])
def test_size_of_a_model_of_half_a_billion_weights(group_size, share):
    """As wide and as deep as Qwen2-0.5B; no embeddings."""
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    config = Qwen2Config(**sizes, num_attention_heads=14, num_key_value_heads=2, vocab_size=8)
    with torch.device("meta"):
        net = Qwen2ForCausalLM(config).bfloat16()
    assert sum(p.numel() for p in net.model.layers.parameters()) == 357_897_216
    whole = bytes_of(net)
    assert bytes_of(with_int4(net, group_size)) / whole == pytest.approx(share, abs=0.005)


@in_all_families
def test_what_is_saved_is_as_large_as_its_sizes_say(family, tmp_path):
    model = FAMILIES[family]()
    model.net.to(torch.bfloat16)
    quantized = quantize_llm(model, group_size=16)
    file = llm_folder(family, saved(quantized, tmp_path)) / "model.safetensors"
    layers = [t.nbytes for name, t in load_file(file).items() if re.search(r"model\.layers", name)]
    assert sum(layers) == bytes_of(with_int4(copy.deepcopy(model.net).to("meta"), 16))


# ---- the model that ships ----


def test_the_model_that_ships_still_sees():
    """With few weights to a scale, and the search, in the type that the kernels want."""
    *_, (name, quantized) = weight_formats("tiny-llava", prompts=4)
    assert name == "int4, searched" and "int4 and bfloat16" in repr(quantized)
    graded = grade(quantized, "scene", VALIDATION[:3])
    assert sum(g.right for g in graded) >= 0.8 * len(graded) >= 20
