"""NVILA's three folders: what is written comes back, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from helpers import noise
from nvila_helpers import MODES, PROJECTORS, TSP, config, nvila, tokenizer
from safetensors.torch import load_file, save_file

import vlmlib
from vlmlib import CheckpointError, NVILAConfig
from vlmlib.nvila_encoders import BasicImageEncoder, BasicVideoEncoder, TSPVideoEncoder

PARTS = [noise(90, 50), "What is this?"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-nvila"
    nvila("dynamic_s2").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to break."""
    return shutil.copytree(saved, tmp_path / "broken")


def refused(folder, words: str) -> None:
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        vlmlib.load(folder, device="cpu")


def read_json(path):
    return json.loads(path.read_text())


def edit(path, **changes) -> None:
    values = read_json(path) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "removed"}))


def change_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    weights = change(weights) or weights
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def states(model) -> dict[str, torch.Tensor]:
    parts = {"llm": model.llm, "tower": model.vision_tower, "projector": model.mm_projector}
    return {f"{p}.{k}": v for p, part in parts.items() for k, v in part.state_dict().items()}


def same(a, b) -> bool:
    mine, other = states(a), states(b)
    return mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("mode", MODES)
def test_round_trip(mode, projector, tmp_path):
    model = nvila(mode, projector, video_encoder=TSP, rest={"fps": 0.0, "unknown": [1]})
    model.save_pretrained(tmp_path / "a")
    again = vlmlib.load(tmp_path / "a", device="cpu")
    assert type(again) is vlmlib.NVILA and same(model, again)
    assert again.name == str(tmp_path / "a") and not again.vision_tower.training
    assert again.image_processor == model.image_processor
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert again.encoders["video"].pool_sizes == [(2, 1, 1), (4, 2, 1)]
    assert again.config == model.config
    again.save_pretrained(tmp_path / "b")
    for path in (p for p in (tmp_path / "a").rglob("*") if p.is_file()):
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        read = read_json if path.suffix == ".json" else type(path).read_bytes
        assert read(other) == read(path), path.name
    expected = vlmlib.answer(model, PARTS, n_predict=6)
    assert vlmlib.answer(again, PARTS, n_predict=6) == expected


@pytest.mark.parametrize("named", [None, "qwen2"])
def test_a_chat_template_of_ones_own_is_kept(named, tmp_path):
    """Whatever the configuration and the tokenizer say; both stay as they are."""
    model = nvila(chat_template=named)
    model.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    model.save_pretrained(tmp_path)
    assert model.config.chat_template == named and not model.tokenizer.chat_template
    again = vlmlib.load(tmp_path, device="cpu")
    assert again.chat_prompt(["Hi"]) == model.chat_prompt(["Hi"]) == "user: Hi "


def test_the_published_layout(saved):
    top = read_json(saved / "config.json")
    assert top["model_type"] == "llava_llama" and top["s2_scales"] == "28,56,84"
    for name in ("image_encoder", "video_encoder"):
        assert json.loads(top[name])["_target_"].startswith("llava.model.encoders.Basic")
    assert top["mm_projector_cfg"]["mm_projector_type"] == "mlp_downsample"
    assert {p.name for p in saved.iterdir()} == {
        "config.json",
        "llm",
        "vision_tower",
        "mm_projector",
    }
    tower = load_file(saved / "vision_tower" / "model.safetensors")
    assert all(k.startswith(("vision_model.e", "vision_model.post")) for k in tower)
    assert "vision_model.encoder.layers.0.self_attn.q_proj.weight" in tower
    assert set(load_file(saved / "mm_projector" / "model.safetensors")) == {
        f"layers.{n}.{what}" for n in (1, 2, 4) for what in ("weight", "bias")
    }
    llm = load_file(saved / "llm" / "model.safetensors")
    assert "model.layers.0.self_attn.q_proj.bias" in llm and "lm_head.weight" in llm
    assert read_json(saved / "vision_tower" / "config.json")["model_type"] == "siglip_vision_model"


def test_as_published_checkpoints_are(saved, folder):
    """With a pooling head, nulls, paths in the configuration, and no media tokens' template."""
    edit(
        folder / "config.json",
        architectures=["LlavaLlamaModel"],
        resume_path="/somewhere/else",
        chat_template="qwen2",
        min_tiles=None,
        llm_cfg={"_name_or_path": "/somewhere/else/llm"},
        vision_tower_cfg=None,
        mm_projector_cfg={"mm_projector_type": "linear"},
        model_dtype="torch.bfloat16",
    )

    def with_head(weights):
        head = torch.zeros(1, 1, 24)
        return weights | {
            "vision_model.head.probe": head,
            "vision_model.head.mlp.fc1.weight": head[0].clone(),
            "vision_model.embeddings.position_ids": torch.arange(16)[None],
        }

    change_weights(folder / "vision_tower", with_head)
    edit(folder / "vision_tower" / "config.json", vision_use_head="removed")
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    change_weights(folder / "llm", lambda w: w | rotary)
    model = vlmlib.load(folder, device="cpu")
    assert same(model, vlmlib.load(saved, device="cpu"))
    assert "You are a helpful assistant<|im_end|>" in model.chat_prompt(["a"])
    assert model.config.min_tiles == 1
    assert model.config.mm_projector_cfg["mm_projector_type"] == "mlp_downsample"


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_vision_keys_with_and_without_prefix(saved, folder, prefix):
    def renamed(weights):
        plain = {k.removeprefix("vision_model."): v for k, v in weights.items()}
        return {prefix + k: v for k, v in plain.items() if "post_layernorm" not in k}

    change_weights(folder / "vision_tower", renamed)
    model, original = (vlmlib.load(f, device="cpu") for f in (folder, saved))
    x = torch.randn(1, 3, 28, 28)
    with torch.inference_mode():
        assert torch.equal(model.get_vision_tower()(x), original.get_vision_tower()(x))


def test_lm_head_present_is_used_absent_is_tied(saved, folder):
    for tied in (True, False):  # whatever the configuration says
        edit(folder / "llm" / "config.json", tie_word_embeddings=tied)
        model = vlmlib.load(folder, device="cpu")
        assert same(model, vlmlib.load(saved, device="cpu"))
    change_weights(folder / "llm", lambda w: {k: v for k, v in w.items() if "lm_head" not in k})
    for tied in (True, False):
        edit(folder / "llm" / "config.json", tie_word_embeddings=tied)
        model = vlmlib.load(folder, device="cpu")
        assert model.get_lm_head().weight is model.get_llm().get_input_embeddings().weight
    model.save_pretrained(folder / "again")
    assert same(model, vlmlib.load(folder / "again", device="cpu"))


def test_a_tokenizer_as_vocabulary_and_merges(saved, folder):
    """As Qwen2's slow tokenizer was saved."""
    made = vlmlib.load(saved, device="cpu").tokenizer
    (folder / "llm" / "tokenizer.json").unlink()
    made.backend_tokenizer.model.save(str(folder / "llm"))
    added = made.added_tokens_decoder
    edit(
        folder / "llm" / "tokenizer_config.json",
        tokenizer_class="Qwen2Tokenizer",
        backend="removed",
        added_tokens_decoder={
            str(i): {"content": str(t), "special": True, "normalized": False}
            for i, t in added.items()
        },
    )
    model = vlmlib.load(folder, device="cpu")
    assert model.media_token_ids == {"image": 371, "video": 372}
    prompt = model.chat_prompt(PARTS)
    assert model.tokenizer(prompt).input_ids == made(prompt).input_ids
    assert model.stop_token_ids == [0, 2]


def test_dtype(saved):
    model = vlmlib.load(saved, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert vlmlib.answer(model, [noise(90, 50), vlmlib.Video([noise(9, 9)]), "a"], n_predict=3)
    assert {p.dtype for p in vlmlib.load(saved, device="cpu").parameters()} == {torch.float32}


def test_parts_not_given_are_made_fresh():
    model = vlmlib.NVILA(config("dynamic_s2"), tokenizer(), nvila().image_processor)
    assert model.get_mm_projector().c_in == 3 * 24
    assert list(vlmlib.stream(model, PARTS, n_predict=3))


@pytest.mark.parametrize(
    ("part", "first"),
    [
        ("llm", "model.norm.weight"),
        ("vision_tower", "vision_model.embeddings.patch_embedding.bias"),
        ("mm_projector", "layers.1.bias"),
    ],
)
def test_a_part_is_missing_or_broken(folder, part, first, saved):
    weights = folder / part / "model.safetensors"
    data = weights.read_bytes()
    change_weights(folder / part, lambda w: {k: w[k] for k in w if k != first})
    missing = first.removeprefix("vision_model.")
    refused(folder, rf"broken: 1 missing keys: {part}.{missing}")
    weights.write_bytes(data)
    change_weights(folder / part, lambda w: w.update(bogus=torch.zeros(1)))
    refused(folder, "broken: 1 unexpected keys: bogus")
    weights.write_bytes(data)
    change_weights(folder / part, lambda w: w.update({first: torch.zeros(3, 7)}))
    refused(folder, rf"broken: 1 mismatched keys: {first} \(3, 7\), expected ")
    weights.write_bytes(data[:500])
    refused(folder, rf"{part}.model.safetensors: weights cannot be read")
    torch.save(load_file(saved / part / "model.safetensors"), folder / part / "pytorch_model.bin")
    weights.unlink()
    assert same(vlmlib.load(folder, device="cpu"), vlmlib.load(saved, device="cpu"))
    (folder / part / "config.json").write_text("{")
    refused(folder, rf"{part}.config.json: not readable as JSON")
    (folder / part / "config.json").write_text('{"model_type": "else"}')
    refused(folder, rf"{part}: model_type is 'else', expected '")
    (folder / part / "pytorch_model.bin").unlink()
    refused(folder, rf"{part}: holds neither model.safetensors nor")
    shutil.rmtree(folder / part)
    refused(folder, rf"holds no folder {part}")


def test_other_files_are_missing(folder):
    (folder / "llm" / "tokenizer.json").unlink()
    refused(folder, "llm: holds none of tokenizer.json, vocab.json")
    (folder / "vision_tower" / "preprocessor_config.json").unlink()
    refused(folder, "no preprocessor_config.json|holds none of")
    for part in ("llm", "vision_tower", "mm_projector"):
        shutil.rmtree(folder / part)
    refused(folder, r"holds neither model.safetensors nor")


BAD = [
    ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres', expected one of"),
    ({"dynamic_s2": False}, "is 'dynamic_s2', but dynamic_s2 is not set"),
    ({"s2_scales": "a,b"}, "s2_scales must be like '448,896,1344', got 'a,b'"),
    ({"s2_scales": None}, "s2_scales must be like"),
    ({"s2_scales": "28,50"}, "scale 50 is not a multiple of the first"),
    ({"s2_scales": "0,28"}, "s2_scales '0,28'"),
    ({"s2_resize_output_to_scale_idx": 3}, "s2_resize_output_to_scale_idx is 3, scales are"),
    ({"max_tiles": 10**9}, "max_num <= 256, got 9 and 1000000000"),
    ({"s2_scales": "28,28000000"}, "s2_scales '28,28000000'.*got 1000000000000 and"),
    ({"num_video_frames": "many"}, "num_video_frames is 'many', expected a whole number"),
    ({"s2": True}, "without tiles, is not supported"),
    ({"chat_template": "llama3"}, "chat_template is 'llama3'"),
    ({"image_encoder": "{"}, "image_encoder must be a JSON object with a _target_"),
    ({"image_encoder": "[]"}, "image_encoder must be a JSON object with a _target_"),
    ({"image_encoder": '{"_target_": 3}'}, "image_encoder has the _target_ 3, expected one of"),
    (
        {"video_encoder": '{"_target_": "llava.model.encoders.BasicImageEncoder"}'},
        "video_encoder has the _target_ 'llava.model.encoders.BasicImageEncoder', expected one of",
    ),
    (
        {"image_encoder": '{"_target_": "llava.model.encoders.BasicImageEncoder", "a": 1}'},
        "image_encoder llava.model.encoders.BasicImageEncoder: .*'a'",
    ),
    (
        {"video_encoder": '{"_target_": "llava.model.encoders.TSPVideoEncoder"}'},
        "TSPVideoEncoder: .*pool_sizes",
    ),
    ({"video_encoder": TSP.replace("[2, 1, 1]", "[2, 0, 1]")}, "pool_sizes must be a list of"),
    ({"video_encoder": TSP.replace('"<"', "3")}, "start_tokens must be text"),
]


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_broken_configuration(folder, changes, words):
    edit(folder / "config.json", **changes)
    refused(folder, words)


def test_an_unknown_projector(folder):
    edit(folder / "mm_projector" / "config.json", mm_projector_type="resampler")
    refused(folder, "unknown projector 'resampler'")
    edit(folder / "mm_projector" / "config.json", mm_projector_type="linear")
    refused(folder, "2 missing keys: mm_projector.layers.bias, mm_projector.layers.weight")


def test_nothing_named_by_a_checkpoint_is_imported(folder):
    (folder / "evil.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(folder))
    try:
        edit(folder / "config.json", image_encoder='{"_target_": "evil.Encoder"}')
        refused(folder, "_target_ 'evil.Encoder', expected one of")
        edit(folder / "config.json", image_encoder='{"_target_": "os.system", "command": "x"}')
        refused(folder, "_target_ 'os.system'")
        assert "evil" not in sys.modules
    finally:
        sys.path.remove(str(folder))


def test_scales_are_a_string():
    made = config("dynamic_s2", s2_scales="84,28,56")
    assert made.scales == [28, 56, 84] and made.s2_scales == "84,28,56"
    assert config("dynamic").scales == []
    assert config("dynamic_s2", s2_scales=[28, 56]).scales == [28, 56]
    null = NVILAConfig.from_dict({"s2_scales": None, "dynamic_s2": None, "model_type": "x"})
    assert null.scales == [] and not null.dynamic_s2
    assert NVILAConfig.from_dict(made.to_dict()).scales == made.scales


def test_encoders_by_default():
    model = nvila()
    assert type(model.encoders["image"]) is BasicImageEncoder
    assert type(model.encoders["video"]) is BasicVideoEncoder
    assert isinstance(model.encoders["video"], TSPVideoEncoder)
    assert model.encoders["image"].end_tokens == "\n"
