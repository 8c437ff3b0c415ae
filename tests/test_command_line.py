"""`python -m vlmlib`: the answer on stdout, the summary on stderr, one line for what is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

import vlmlib
from vlmlib.__main__ import main

PICTURE = str(vlmlib.DATA / "images" / "three-shapes.png")
CLIP = str(sorted((vlmlib.DATA / "videos").glob("*.mp4"))[0])


def test_answers_and_sums_up(capsys):
    assert main([PICTURE, "What is left of the red circle?"]) == 0
    out, err = capsys.readouterr()
    assert out == "A small blue square.\n"
    assert "prompt + " in err and "tokens/s" in err and "first answer token after" in err


def test_quiet_and_json(capsys):
    question = "How many shapes are there?"
    assert main([PICTURE, question, "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert quiet.err == ""
    assert main([PICTURE, question, "--json"]) == 0
    out, err = capsys.readouterr()
    assert out == quiet.out
    summary = json.loads(err)
    assert summary["text"] + "\n" == out
    assert summary["usage"]["completion_tokens"] > 1


def test_a_terminal_is_told_how_far_loading_is(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    question = "How many shapes are there?"
    assert main([PICTURE, question, "--quiet", "--device", "cpu"]) == 0
    lines = capsys.readouterr().err.split("\r")
    size = sum(vlmlib.memory_estimate("tiny-llava").values())
    assert lines[0] == "loading tiny-llava ... " and len(lines) > 20
    assert re.fullmatch(
        rf"loading tiny-llava ... 100% of {size / 1e6:.1f} MB, [\d.]+ s\n", lines[-1]
    )


def test_no_room_is_told_on_a_line_of_its_own(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(vlmlib.checkpoint, "free_memory", lambda device: 1e6)
    assert main([PICTURE, "What?", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    first, second, rest = err.split("\n")
    assert (out, rest) == ("", "") and re.fullmatch(r"loading tiny-llava ... [\d.]+ s", first)
    assert second.startswith("vlmlib: error: ") and "of cpu's memory 1.0 MB are free" in second


def test_sampling_options_reach_the_sampler(capsys):
    def say(*options):
        assert main([PICTURE, "Describe the picture.", "--quiet", *options]) == 0
        return capsys.readouterr().out

    hot = ["--temp", "3", "--seed"]
    assert say(*hot, "1") == say(*hot, "1")
    assert len({say(*hot, str(seed)) for seed in range(4)}) > 1
    assert say(*hot, "1", "--top-k", "1") == say()
    assert say("--stop", ",").count(",") == 0
    assert len(say("--max-tokens", "3").split()) <= 3


def test_weights_of_four_bits(capsys):
    assert main([PICTURE, "What is left of the red circle?", "--quant", "int4"]) == 0
    out, err = capsys.readouterr()
    assert out == "A small blue square.\n" and "int4" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.png", "What?"], "missing.png: no such file"),
        ([__file__, "What?"], "not a picture that can be read"),
        ([PICTURE], "no question follows"),
        ([PICTURE, "What?", "--temp", "-1"], "temp must be a finite number >= 0"),
        ([PICTURE, "What?", "--temp", "nan"], "temp must be a finite number"),
        ([PICTURE, "What?", "--top-p", "2"], "top_p must be"),
        ([PICTURE, "What?", "--max-tokens", "-5"], "n_predict must be"),
        ([PICTURE, "What?", "--model", "huge-llava"], "'huge-llava' is not a folder here"),
        ([PICTURE, "word " * 3000], "context holds 2048"),
        ([PICTURE, "What?", "--device", "abacus"], "abacus"),
        ([CLIP, "What?"], "LLaVA looks at pictures and at no clips"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, words):
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.startswith("vlmlib: error: ") and err.count("\n") == 1


def test_user_text_cannot_add_a_placeholder(capsys):
    assert main([PICTURE, "What is <image>?", "--quiet", "--max-tokens", "5"]) == 0


def test_the_module_runs_and_help_says_how():
    run = [sys.executable, "-m", "vlmlib", "--help"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for word in ("PICTURE", "QUESTION", "examples:", "--temp", "tiny-llava", "Exit status"):
        assert word in done.stdout
