"""From a folder to a model, and one clear sentence when the folder is not one."""

from __future__ import annotations

import json
import shutil

import huggingface_hub.constants
import pytest
import torch
from helpers import PICTURE, expanded_ids, noise, pixels, tiny_llava
from safetensors.torch import load_file
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


def test_pickled_weights(folder, saved):
    """Old checkpoints have nothing else; `tests/test_layouts.py` has those that mean harm."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    ours, theirs = (vlmlib.load(f, device="cpu").net.state_dict() for f in (folder, saved))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_chat_template_in_a_file_of_its_own(folder, saved):
    """Where the processors of older checkpoints have it."""
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    prompts = [vlmlib.load(f, device="cpu").chat_prompt(["What?"]) for f in (folder, saved)]
    assert prompts[0] == prompts[1]


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
