"""The benchmark: it measures what it says, and lets nobody win by saying something else."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from unittest.mock import MagicMock, call

import pytest
import torch
from helpers import tiny_llava

from vlmlib import ImageProcessor, bench, quantize_llm
from vlmlib.figures import png_of, step_times
from vlmlib.tiny.model import build_internvl, build_llava, build_nvila
from vlmlib.tiny.scenes import draw, random_scene

SMALL = {
    "vocab_size": 700,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SMALL_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


CPU = torch.device("cpu")
PROCESSOR = ImageProcessor(56, 56, 56, *bench.NORMAL)
S2 = replace(bench.DYNAMIC_S2, s2_scales="56,112,168")
FAMILIES = {
    "llava": lambda: build_llava(SMALL_TOWER, SMALL, PROCESSOR),
    "internvl": lambda: build_internvl(SMALL_TOWER, SMALL, PROCESSOR),
    "nvila": lambda: build_nvila(SMALL_TOWER, SMALL, PROCESSOR, S2),
}


@pytest.fixture(params=FAMILIES)
def model(request, monkeypatch):
    """One of each family, as the published sizes are made, but small."""
    monkeypatch.setattr(bench, "SHAPES", FAMILIES)
    return bench.random_model(request.param, CPU, torch.float32)


def test_the_published_sizes_are_those_of_the_names():
    billions = {"internvl3-1b": 0.9, "internvl3-2b": 2.1, "nvila-2b": 2.5}
    billions |= {"internvl3-8b": 7.9, "nvila-8b": 8.4, "llava-1.5-7b": 7.1}
    assert set(billions) == set(bench.SHAPES)
    for name, expected in billions.items():
        with torch.device("meta"):
            model = bench.SHAPES[name]()
        parameters = sum(p.numel() for p in model.parameters())
        assert parameters / 1e9 == pytest.approx(expected, abs=0.05), name


def test_all_contenders_say_the_same_and_are_timed(model):
    notes = []
    result = bench.measure(
        model, tokens=6, repeats=2, compiled=False, int4=True, history=150, progress=notes.append
    )
    ours, plain, theirs, int4 = result["steps"]
    assert (ours, plain, theirs, int4) == (bench.FAST, bench.PLAIN, bench.STREAMER, bench.INT4)
    for step in result["steps"].values():
        assert 0 < step["low"] <= step["median"] <= step["high"]
        share = step["bytes"] / step["median"] / result["copy_bandwidth"]
        assert step["bandwidth_share"] == pytest.approx(share)
    first = {name: times["median"] for name, times in result["stages"].items()}
    assert list(first) == ["preprocess", "vision", "prefill", "first token"]
    assert 150 <= result["second_turn"]["history"] < 150 + 30, "a sentence more at most"
    assert not result["failed"]
    assert torch.backends.cpu.get_cpu_capability() in result["machine"]
    assert any(bench.STREAMER in note for note in notes)
    assert json.loads(json.dumps(result)) == result
    words = bench.table(result)
    assert all(name in words for name in result["steps"])
    assert png_of(step_times(result)).startswith(b"\x89PNG")


def test_a_table_needs_no_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None; import vlmlib.bench"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_random_weights_say_one_id_after_the_other(model):
    request = bench.Request.of(model, draw(random_scene(0)), tokens=8)
    ids = bench.by_vlmlib(request, model).ids
    assert len(ids) == 7
    assert ids == [(ids[0] + i) % SMALL["vocab_size"] for i in range(7)]


def test_whoever_says_something_else_is_found_out(model):
    request = bench.Request.of(model, draw(random_scene(0)), tokens=3)

    def honest(request):
        return bench.Answer([1, 2], [0.0, 1.0, 2.0])

    def other(request):
        return bench.Answer([1, 3], [0.0, 0.1, 0.2])

    with pytest.raises(RuntimeError, match=r"cheat says \[1, 3\], vlmlib says \[1, 2\]"):
        bench.race({bench.FAST: honest, "cheat": other}, request, 1, CPU, lambda words: None)


def test_who_cannot_run_is_named_with_the_reason(model):
    request = bench.Request.of(model, draw(random_scene(0)), tokens=3)
    entries = {
        bench.FAST: lambda request: bench.Answer([1, 2], [0.0, 1.0, 3.0]),
        "broken": lambda request: 1 / 0,
    }
    samples, failed, _ = bench.race(entries, request, 2, CPU, lambda words: None)
    assert samples == {bench.FAST: [1.5, 1.5]}
    assert failed == {"broken": "ZeroDivisionError: division by zero"}
    with pytest.raises(ZeroDivisionError):
        bench.race({bench.FAST: entries["broken"]}, request, 2, CPU, lambda words: None)


def test_the_compiled_contender_compiles_its_steps(model, monkeypatch):
    """With a compiler that leaves all as it is: the real one takes half a minute."""
    steps = []

    def compiled(function, **options):
        def step(*args, **kwargs):
            steps.append(options["fullgraph"])
            return function(*args, **kwargs)

        return step

    monkeypatch.setattr(torch, "compile", compiled)
    request = bench.Request.of(model, draw(random_scene(0)), tokens=6)
    entries = bench.contenders(model, compiled=True, int4=False)
    ours, theirs = (entries[name](request).ids for name in (bench.FAST, bench.COMPILED))
    assert ours == theirs and steps == [False] * 5, "all but the prompt"


def test_memory_and_time_are_those_of_the_models_own_gpu(monkeypatch):
    gpu, calls = torch.device("cuda", 1), MagicMock()
    calls.memory_allocated.side_effect, calls.max_memory_allocated.side_effect = [5, 7], [9, 8]
    names = "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats", "synchronize"
    for name in names:
        monkeypatch.setattr(torch.cuda, name, getattr(calls, name))
    entries = dict.fromkeys((bench.FAST, "other"), lambda _: bench.Answer([1], [0.0, 1.0]))
    _, _, peaks = bench.race(entries, None, 1, gpu, lambda words: None)
    assert peaks == {bench.FAST: 4, "other": 1}
    bench.seconds(lambda: None, gpu)
    assert all(made in [getattr(call, name)(gpu) for name in names] for made in calls.mock_calls)
    assert calls.synchronize.call_count == 2


def test_bytes_of_a_step_by_hand(monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", FAMILIES)
    model = bench.random_model("internvl", CPU, torch.bfloat16)
    rotations = sum(b.nbytes for b in model.net.get_decoder().buffers())
    d, inner, layers, kv, v, positions = 128, 256, 2, 2 * 32, 700, 10
    matrices = layers * (2 * d * d + 2 * d * kv + 3 * d * inner)
    others = layers * (d + 2 * kv + 2 * d) + d + v * d  # biases, norms, head
    cache = 2 * layers * kv * positions
    expected = 2 * (matrices + others + cache) + rotations
    assert bench.bytes_per_step(model, positions) == expected
    packed = matrices * (0.5 + (2 + 1) / 128)  # four bits, and a scale and a zero for each group
    expected = packed + 2 * (others + cache) + rotations
    assert bench.bytes_per_step(quantize_llm(model), positions) == expected


def test_spread():
    assert bench.spread([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert bench.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}


@pytest.mark.parametrize("options", [{"tokens": 1}, {"repeats": 0}])
def test_too_little_to_measure(options):
    with pytest.raises(ValueError, match="expected tokens >= 2 and repeats >= 1"):
        bench.measure(tiny_llava(), **options)


def test_the_command_saves_what_it_prints(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "SHAPES", FAMILIES)
    options = [
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--tokens",
        "3",
        "--repeats",
        "1",
        "--no-compile",
        "--save",
    ]
    bench.main(["llava", *options, str(tmp_path)])
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("{"))
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert json.loads(files.pop("llava-float32-cpu.json")) == json.loads(line)
    assert files.pop("llava-float32-cpu.png").startswith(b"\x89PNG")
    assert not files
