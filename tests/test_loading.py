"""From a folder to a model, and one clear sentence when the folder is not one."""

from __future__ import annotations

import json
import shutil

import huggingface_hub.constants
import pytest
import torch
from helpers import PICTURE, expanded_ids, noise, pixels, tiny_llava
from safetensors.torch import load_file, save_file
from transformers.utils import logging as hf_logging

import vlmlib
from vlmlib import CheckpointError

PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint as transformers writes it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    model = tiny_llava(seed=4)
    model.net.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    processor = model.image_processor
    config = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": PICTURE},
        "crop_size": processor.crop_size,
        "image_mean": processor.image_mean,
        "image_std": processor.image_std,
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to break."""
    return shutil.copytree(saved, tmp_path / "broken")


def refused(checkpoint, words: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=f"(?s){words}") as caught:
        vlmlib.load(checkpoint, device="cpu")
    assert isinstance(caught.value, OSError) and isinstance(caught.value, vlmlib.VlmError)
    return caught.value


def test_load_gives_the_same_model(saved):
    model, original = vlmlib.load(saved, device="cpu"), tiny_llava(seed=4)
    assert isinstance(model, vlmlib.Llava)
    assert not model.net.training
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    ids = expanded_ids(original.net, original.tokenizer, PROMPT)
    with torch.inference_mode():
        expected = original.net(input_ids=ids, pixel_values=pixels()).logits
        assert torch.equal(model.net(input_ids=ids, pixel_values=pixels()).logits, expected)
    parts = [noise(40, 30), "What is this?"]
    assert model.chat_prompt(parts) == original.chat_prompt(parts) == PROMPT
    assert torch.equal(model.prepare_images(parts[:1]), original.prepare_images(parts[:1]))
    answers = [vlmlib.answer(m, parts, n_predict=8) for m in (model, original)]
    assert answers[0] == answers[1]
    assert "Llava(" in repr(model) and "float32 on cpu" in repr(model)


def test_dtype(saved):
    assert vlmlib.load(str(saved), device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_shipped_models_load_by_name(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "checkpoints" / "my-tiny")
    monkeypatch.setattr("vlmlib.loading.DATA", tmp_path)
    assert vlmlib.shipped_models() == ["my-tiny"]
    assert isinstance(vlmlib.load("my-tiny", device="cpu"), vlmlib.Llava)
    refused(
        "my-tinny", r"'my-tinny' is not a folder here.*ships with the repository: \['my-tiny'\]"
    )


@pytest.mark.parametrize("name", ["no-such-model", "a/b/c", "owner/na me"])
def test_unknown_name(name):
    refused(name, f"{name!r} is not a folder here, not a hub id")


def test_hub_id_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    error = refused(
        "nobody/no-such-model", "'nobody/no-such-model' is neither a folder here nor in"
    )
    assert "HF_HUB_OFFLINE is set" in str(error)
    assert "check the name and the network" in str(error)
    assert "\n" not in str(error)


def test_hub_id_when_the_network_is_down(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    error = str(refused("nobody/no-such-model", "it could not be downloaded"))
    assert "connect" in error.lower() and "\n" not in error
    assert error.endswith("or download it elsewhere and give its folder")


def test_a_file_is_not_a_checkpoint(saved):
    refused(saved / "config.json", "config.json' is not a folder here")


def test_missing_files(folder):
    (folder / "preprocessor_config.json").unlink()
    refused(folder, "broken: no preprocessor_config.json")
    (folder / "model.safetensors").unlink()
    refused(folder, r"broken: holds neither model.safetensors nor")
    (folder / "config.json").unlink()
    refused(folder, "broken: holds no config.json")


def test_pickled_weights(folder, saved):
    """Old checkpoints have nothing else; `tests/test_layouts.py` has those that mean harm."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    ours, theirs = (vlmlib.load(f, device="cpu").net.state_dict() for f in (folder, saved))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{ broken", "config.json: not readable as JSON"),
        ("", "config.json: not readable as JSON"),
        ("[" * 100_000, "config.json: not readable as JSON"),
        ("[1]", "config.json: expected an object, got list"),
        ("{}", r"model_type None, expected one of \['llava'"),
        ('{"model_type": "blip"}', r"model_type 'blip', expected one of \['llava'"),
        ('{"model_type": "llava", "text_config": 3}', "broken: configuration.* cannot be read"),
    ],
)
def test_broken_config(folder, text, words):
    (folder / "config.json").write_text(text)
    refused(folder, words)


def change_weights(folder, change) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


HEAD = "language_model.lm_head.weight"
NORM = "language_model.model.norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop(NORM), "1 missing keys: language_model.norm.weight"),
        (lambda w: w.update(bogus=torch.zeros(2)), "1 unexpected keys: .*bogus"),
        (lambda w: w.update({HEAD: torch.zeros(5, 48)}), "1 mismatched keys: .*lm_head.weight"),
        (
            lambda w: [w.pop(k) for k in list(w) if "norm" in k],
            r"\d+ missing keys: .* and \d+ more",
        ),
    ],
    ids=["missing", "extra", "wrong shape", "many missing"],
)
def test_weights_that_do_not_fit(folder, change, words):
    change_weights(folder, change)
    refused(folder, f"broken: {words}")


@pytest.mark.parametrize("data", [b"", b"garbage" * 99, "half"], ids=["empty", "garbage", "cut"])
def test_broken_weights_file(folder, data):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000] if data == "half" else data)
    refused(folder, r"broken.model.safetensors: weights cannot be read")


def test_a_shard_is_missing(folder):
    (folder / "model.safetensors").unlink()
    tiny_llava().net.save_pretrained(folder, max_shard_size="100KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    refused(folder, "the weights cannot be read: model-00002-of-.* is missing")


def test_a_chat_template_in_a_file_of_its_own(folder, saved):
    """Where the processors of older checkpoints have it."""
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    prompts = [vlmlib.load(f, device="cpu").chat_prompt(["What?"]) for f in (folder, saved)]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize("text", [None, "{", "{}"], ids=["missing", "cut", "empty"])
def test_broken_tokenizer(folder, text):
    path = folder / "tokenizer.json"
    path.unlink() if text is None else path.write_text(text)
    refused(folder, "broken: (tokenizer cannot be read|holds none of tokenizer.json, vocab.json)")


@pytest.mark.parametrize("on", [True, False])
def test_nothing_is_printed(saved, tmp_path, on, capfd):
    """And transformers' switch for its progress bars stays as it was, also after an error."""
    before = hf_logging.is_progress_bar_enabled()
    try:
        (hf_logging.enable_progress_bar if on else hf_logging.disable_progress_bar)()
        model = vlmlib.load(saved, device="cpu")
        model.save_pretrained(tmp_path / "saved")
        assert hf_logging.is_progress_bar_enabled() is on
        (tmp_path / "file").touch()
        with pytest.raises(OSError):
            model.save_pretrained(tmp_path / "file" / "in it")
        assert hf_logging.is_progress_bar_enabled() is on
    finally:
        (hf_logging.enable_progress_bar if before else hf_logging.disable_progress_bar)()
    assert capfd.readouterr() == ("", "")


def test_llavas_own_call():
    folder = vlmlib.DATA / "checkpoints" / "tiny-llava"
    tokenizer, model, processor, length = vlmlib.load_pretrained_model(folder, None, "tiny")
    assert (model.tokenizer, model.image_processor) == (tokenizer, processor)
    assert (model.name, length) == ("tiny", 2048)
    with pytest.raises(CheckpointError, match="merge them into it"):
        vlmlib.load_pretrained_model(folder, "lmsys/vicuna-7b-v1.5", "tiny-lora")
