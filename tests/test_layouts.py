"""Every layout of checkpoints gives the same model; a folder that is not right gives none.

They are written here as the published ones are: the same files and keys, tiny random weights.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import struct
import sys
from dataclasses import replace

import huggingface_hub.constants
import nvila_helpers
import pytest
import sentencepiece
import torch
from helpers import (
    PINPOINTS,
    ids_of,
    noise,
    tiny_llava,
    tiny_llava_next,
    tiny_processor,
)
from safetensors.torch import load_file, save_file
from test_internvl import SPECIAL, TILE, tiny_internvl
from tokenizers.pre_tokenizers import Sequence, Split
from transformers import CLIPConfig, CLIPModel, MistralConfig, Qwen3Config

import vlmlib
from vlmlib import CheckpointError, GenParams, checkpoint, tiling

GREEDY = GenParams.greedy(n_predict=8)
FAMILIES = ("llava", "llava_next", "internvl", "nvila", "nvila_lite")
in_all_families = pytest.mark.parametrize("family", FAMILIES)
PROMPTS = {
    "llava": "USER: <image>\nWhat is this? ASSISTANT:",
    "llava_next": "USER: <image>\nWhat is this? ASSISTANT:",
    "internvl": "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n",
}


# ---- a model and its twin, in transformers' layout and in the original one ----


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}


def make(family: str, **changes):
    """A model in which no weight is like another, not even a bias."""
    if family == "internvl":
        defaults = {"vision": {"attention_bias": True}, "text": {"rope_parameters": DYNAMIC}}
        model = tiny_internvl(**defaults | changes)
        model.image_processor = vlmlib.ImageProcessor(
            None, TILE, TILE, (0.4, 0.5, 0.6), (0.2, 0.2, 0.3), max_patches=4
        )
    elif family.startswith("nvila"):
        lite = {"mode": "dynamic", "projector": "mlp_downsample_3x3_fix", "seed": 1}
        s2 = {"mode": "dynamic_s2", "projector": "mlp_downsample", "chat_template": "qwen2"}
        model = nvila_helpers.nvila(**(lite if family == "nvila_lite" else s2) | changes)
    elif family == "llava":
        rope = {"rope_type": "default", "rope_theta": 5e5}
        model = tiny_llava(max_position_embeddings=512, rope_parameters=rope, **changes)
    else:
        model = tiny_llava_next(**changes)
    generator = torch.Generator().manual_seed(9)
    for weight in model.parameters():
        if weight.dim() < 2:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def models():
    """Not to be changed."""
    return {family: make(family) for family in FAMILIES}


def write_json(path, values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def edit(path, **changes) -> None:
    values = json.loads(path.read_text()) | changes
    write_json(path, {k: v for k, v in values.items() if v != "removed"})


def write_weights(folder, state, storage: str = "one file") -> None:
    """ "shards": two of safetensors and their index; "pickles": two as old checkpoints have."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().contiguous().clone() for k, v in state.items()}
    if storage == "one file":
        return save_file(state, folder / "model.safetensors", {"format": "pt"})
    keys = sorted(state)
    halves = [{k: state[k] for k in keys[i::2]} for i in range(2)]
    stem, suffix = ("model", "safetensors") if storage == "shards" else ("pytorch_model", "bin")
    names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        (save_file if storage == "shards" else torch.save)(half, folder / name)
    places = {k: names[i] for i, half in enumerate(halves) for k in half}
    return write_json(folder / f"{stem}.{suffix}.index.json", {"weight_map": places})


def replaced(name: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        name = re.sub(old, new, name)
    return name


def llava_state(model, tower: bool) -> dict:
    """Keys of liuhaotian/llava-v1.5-7b, and with the tower of v1.6, which is in it."""
    return {
        replaced(
            name,
            (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
            (r"^model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
            (r"^model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
            (r"^model\.language_model\.", "model."),
        ): weight
        for name, weight in model.net.state_dict().items()
        if tower or "vision_tower" not in name
    }


def llava_config(model, **more) -> dict:
    text = model.net.config.text_config
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads "
    names += "num_key_value_heads max_position_embeddings vocab_size rms_norm_eps bos_token_id "
    names += "eos_token_id pad_token_id hidden_act initializer_range"
    return {
        "_name_or_path": "./checkpoints/llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        **{name: getattr(text, name) for name in names.split()},
        "rope_theta": text.rope_parameters["rope_theta"],
        "rope_scaling": None,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "use_cache": False,
        "use_mm_proj": True,
    } | more


def clip_config(model) -> dict:
    """As in openai/clip-vit-large-patch14-336, whose tower is one half of the model."""
    vision = json.loads(model.net.config.vision_config.to_json_string())
    return {"model_type": "clip", "vision_config": vision, "text_config": {}}


def write_tower(folder, model, storage: str = "one file") -> None:
    """The whole of CLIP, of which only one half is wanted."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "vocab_size": 9, "eos_token_id": 1}
    vision = model.net.config.vision_config
    whole = CLIPModel(CLIPConfig(text_config=small, vision_config=vision.to_dict()))
    state = {k: v for k, v in whole.state_dict().items() if not k.startswith("vision_model.")}
    own = model.net.model.vision_tower.state_dict()
    state |= {f"vision_model.{k}": v for k, v in own.items()}
    write_weights(
        folder, state | {"vision_model.embeddings.position_ids": torch.arange(5)}, storage
    )
    write_json(folder / "config.json", clip_config(model))
    write_processor(folder)


def write_processor(folder, p=None) -> None:
    p = p or tiny_processor()
    config = {"size": p.crop_height, "crop_size": p.crop_height, "image_mean": p.image_mean}
    config |= {"image_std": p.image_std, "feature_extractor_type": "CLIPFeatureExtractor"}
    write_json(folder / "preprocessor_config.json", config)


def write_llava(folder, model, storage: str = "one file", **changes) -> None:
    is_next = isinstance(model, vlmlib.LlavaNext)
    state = llava_state(model, tower=is_next)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    more = {"mm_vision_tower": "clip"}
    if is_next:
        state["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = (
            torch.arange(17)
        )
        more |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
        more["image_grid_pinpoints"] = [[w, h] for h, w in model.config.image_grid_pinpoints]
        write_json(folder / "clip" / "config.json", clip_config(model))
        write_processor(folder / "clip", model.image_processor)
    else:
        write_tower(folder / "clip", model)
    write_weights(folder, state, storage)
    write_json(folder / "config.json", llava_config(model, **more) | changes)
    model.tokenizer.save_pretrained(folder)


def old_rope(config: dict) -> dict:
    """A language model's configuration as transformers wrote it before version 5."""
    rope = config.pop("rope_parameters")
    theta, kind = rope.pop("rope_theta"), rope["rope_type"]
    scaling = None if kind == "default" else rope | {"type": kind}
    return config | {"rope_theta": theta, "rope_scaling": scaling}


def write_internvl(folder, model, storage: str = "one file", **changes) -> None:
    """As OpenGVLab/InternVL3-1B."""
    state, qkv = {}, {}
    for name, weight in model.net.state_dict().items():
        if not name.startswith("model.vision_tower."):
            name = replaced(
                name,
                (r"^model\.language_model\.", "language_model.model."),
                (r"^lm_head\.", "language_model.lm_head."),
                (r"^model\.multi_modal_projector\.layer_norm\.", "mlp1.0."),
                (r"^model\.multi_modal_projector\.linear_1\.", "mlp1.1."),
                (r"^model\.multi_modal_projector\.linear_2\.", "mlp1.3."),
            )
        elif part := re.search(r"layer\.(\d+)\.attention\.[qkv]_proj\.(\w+)", name):
            qkv.setdefault(part.groups(), []).append(weight)  # in this order
            continue
        else:
            name = replaced(
                name,
                (r"^model\.vision_tower\.", "vision_model."),
                ("cls_token", "class_embedding"),
                ("position_embeddings", "position_embedding"),
                (r"patch_embeddings\.projection", "patch_embedding"),
                (r"encoder\.layer\.", "encoder.layers."),
                (r"attention\.projection_layer", "attn.proj"),
                ("layernorm_before", "norm1"),
                ("layernorm_after", "norm2"),
                (r"attention\.([qk]_norm)", r"attn.\1"),
                (r"lambda_(\d)", r"ls\1"),
            )
        state[name] = weight
    for (layer, what), parts in qkv.items():
        state[f"vision_model.encoder.layers.{layer}.attn.qkv.{what}"] = torch.cat(parts)
    write_weights(folder, state, storage)
    vision, text = model.net.config.vision_config, model.net.config.text_config
    names = "hidden_size num_hidden_layers num_attention_heads intermediate_size layer_norm_eps "
    names += "hidden_act norm_type num_channels initializer_range"
    config = {
        "_commit_hash": None,
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        },
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": TILE,
        "hidden_size": text.hidden_size,
        "llm_config": old_rope(json.loads(text.to_json_string()))
        | {"architectures": ["Qwen2ForCausalLM"], "moe_config": None, "use_cache": False},
        "max_dynamic_patch": model.image_processor.max_patches,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "system_message": None,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "use_thumbnail": True,
        "vision_config": {
            "model_type": "intern_vit_6b",
            **{name: getattr(vision, name) for name in names.split()},
            "drop_path_rate": 0.1,
            "image_size": TILE,
            "patch_size": vision.patch_size[0],
            "qk_normalization": vision.use_qk_norm,
            "qkv_bias": vision.attention_bias,
            "use_flash_attn": True,
        },
    }
    write_json(folder / "config.json", config | changes)
    write_processor(folder, model.image_processor)
    model.tokenizer.save_pretrained(folder)


def write_nvila(folder, model, storage: str = "one file", **changes) -> None:
    """As Efficient-Large-Model/NVILA-8B-hf and NVILA-Lite-2B-hf-0626."""
    state = {f"llm.{k}": v for k, v in model.llm.state_dict().items()}
    own = model.vision_tower.net.state_dict()
    state |= {f"vision_tower.vision_model.{k}": v for k, v in own.items()}
    state["vision_tower.vision_model.head.probe"] = torch.zeros(1, 1, 24)
    state |= {f"mm_projector.{k}": v for k, v in model.mm_projector.state_dict().items()}
    write_weights(folder, state, storage)
    config = {
        "architectures": ["NVILAForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_nvila.NVILAConfig"},
        "model_type": "nvila" if model.config.dynamic_s2 else "nvila_lite",
        "image_token_id": 371,
        "text_config": old_rope(copy.deepcopy(model.config.llm_cfg)),
        "vision_config": {
            k: v for k, v in model.config.vision_tower_cfg.items() if k[:6] != "vision"
        },
    }
    write_json(folder / "config.json", config | changes)
    write_json(folder / "preprocessor_config.json", model.image_processor.to_dict("Siglip"))
    model.tokenizer.save_pretrained(folder)


def write(folder, model, storage: str = "one file", **changes):
    """In the original layout, of NVILA in one folder."""
    writers = {"llava": write_llava, "internvl": write_internvl, "nvila": write_nvila}
    writers[model.family](folder, model, storage, **changes)
    return folder


@pytest.fixture(scope="module")
def written(models, tmp_path_factory):
    """Not to be changed."""
    root = tmp_path_factory.mktemp("original")
    return {family: write(root / family, model) for family, model in models.items()}


@pytest.fixture
def folder_of(written, tmp_path):
    """A copy to break."""
    return lambda family: shutil.copytree(written[family], tmp_path / family)


def load(folder, **options):
    return vlmlib.load(folder, device="cpu", **options)


def refused(folder, *words: str, load=load) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    text = str(caught.value)
    assert "\n" not in text and str(folder) in text
    for word in words:
        assert word in text
    return text


def change_weights(folder, change, name: str = "model.safetensors") -> None:
    weights = load_file(folder / name)
    weights = change(weights) or weights
    save_file(weights, folder / name, {"format": "pt"})


def states(model) -> dict[str, torch.Tensor]:
    if model.family != "nvila":
        return dict(model.net.state_dict())
    parts = {"llm": model.llm, "tower": model.vision_tower, "projector": model.mm_projector}
    return {f"{p}.{k}": v for p, part in parts.items() for k, v in part.state_dict().items()}


def buffers(model) -> dict[str, torch.Tensor]:
    nets = (model.llm, model.vision_tower) if model.family == "nvila" else (model.net,)
    return {name: buffer for net in nets for name, buffer in net.named_buffers()}


def same(a, b) -> bool:
    pairs = [(states(a), states(b)), (buffers(a), buffers(b))]
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)


# ---- one model, whatever the layout ----


@pytest.mark.parametrize("storage", ["one file", "shards", "pickles"])
@in_all_families
def test_twins(models, written, family, storage, tmp_path):
    """The original layout and transformers' own (of NVILA: one folder and three) are one model."""
    model = models[family]
    original = written[family]
    if storage != "one file":
        original = write(tmp_path / "original", model, storage)
    model.save_pretrained(tmp_path / "native")
    twins = load(original), load(tmp_path / "native")
    assert type(twins[0]) is type(twins[1]) is type(model)
    assert all(same(model, twin) for twin in twins)
    assert not any(p.is_meta for twin in twins for p in twin.parameters())
    picture = noise(90, 50)
    prompt = PROMPTS.get(family) or model.chat_prompt([picture, "What is this?"])
    if not family.startswith("llava"):  # whose original pads pictures
        keys = [[m.key for m in twin.prepare([picture])] for twin in twins]
        assert keys[0] == keys[1] and twins[0].image_processor == twins[1].image_processor
    if family.startswith("nvila"):
        assert len({twin.chat_prompt([picture, "Hi"]) for twin in twins}) == 1
    results = []
    with torch.inference_mode():
        for each in (model, *twins):
            media = twins[1].prepare([picture])
            logits = each.turn(prompt, media).prefill()
            chunks = list(each.stream_prompt(prompt, media, GREEDY, trace=0))
            results.append((logits, ids_of(chunks)))
    for logits, ids in results[1:]:
        assert (logits - results[0][0]).abs().max() < 1e-6
        assert ids == results[0][1]
    *_, last = vlmlib.stream(twins[0], [picture, "Hi"], n_predict=4)
    assert last["finish_reason"], "also by the prompt that it writes itself"


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_logits_are_those_of_transformers(models, tmp_path, family):
    """`from_pretrained` reads the same folder of transformers' layout."""
    model = models[family]
    model.save_pretrained(tmp_path)
    ours, theirs = load(tmp_path), type(model.net).from_pretrained(tmp_path).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.inference_mode():
        assert torch.equal(ours.net(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert {k: v.shape for k, v in ours.net.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert ours.net.generation_config.eos_token_id == theirs.generation_config.eos_token_id
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = theirs.generate(input_ids=ids, **options)
    assert torch.equal(ours.net.generate(input_ids=ids, **options), expected)


@pytest.mark.parametrize("text", [MistralConfig, Qwen3Config])
def test_other_language_models(models, tmp_path, text):
    """As llava-v1.6-mistral-7b-hf and the younger InternVLs have."""
    config = copy.deepcopy(models["internvl"].net.config)
    known = config.text_config.to_dict()
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads "
    names += "num_key_value_heads vocab_size max_position_embeddings eos_token_id"
    config.text_config = text(**{k: known[k] for k in names.split()}, head_dim=8)
    made = vlmlib.InternVL(
        type(models["internvl"].net)(config).eval(), models["internvl"].tokenizer
    )
    made.save_pretrained(tmp_path)
    ours, theirs = load(tmp_path), type(made.net).from_pretrained(tmp_path).eval()
    assert type(ours.config.text_config) is text
    media, prompt = ours.prepare([noise(40, 30)]), PROMPTS["internvl"]
    ids = ids_of(ours.stream_prompt(prompt, media, GREEDY, trace=0))
    again = vlmlib.InternVL(theirs, ours.tokenizer, ours.image_processor)
    with torch.inference_mode():
        logits = [m.turn(prompt, media).prefill() for m in (ours, again)]
    assert (logits[0] - logits[1]).abs().max() < 1e-6
    assert ids == ids_of(again.stream_prompt(prompt, media, GREEDY, trace=0))


def test_the_original_prompts_and_pictures(written, models):
    parts = [noise(64, 48), "What <image> is </s> this?"]
    llava, llava_next, internvl = (load(written[f]) for f in FAMILIES[:3])
    for model in (llava, llava_next):
        prompt = model.chat_prompt(parts)
        assert prompt.startswith("A chat between a curious user and an artificial intelligence")
        assert prompt.endswith("is <\u200b/s> this? ASSISTANT:")
        assert " USER: <image>\nWhat <\u200bimage> is" in prompt
    turns = [("system", ["Be brief."]), ("user", ["Hi"]), ("assistant", ["Ho"]), ("user", ["So?"])]
    expected = "Be brief. USER: Hi ASSISTANT: Ho</s>USER: So? ASSISTANT:"
    assert llava.conversation_prompt(turns) == expected
    assert llava.conversation.messages == [], "the format itself is not filled"
    chat = vlmlib.Chat(llava)
    for question in (parts, "And?"):
        assert list(chat.ask(question, n_predict=3))
    assert internvl.chat_prompt(parts).startswith("<|im_start|>system\n你是书生·万象")
    assert internvl.image_processor.max_patches == 4
    token = internvl.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert internvl.config.image_token_id == token
    assert internvl.config.image_seq_length == internvl.tokens_per_tile
    assert llava.config.image_aspect_ratio == "pad"
    (wide,) = llava.prepare([noise(80, 20)])
    assert wide.pixels[0, :, 0, 0].abs().max() < 0.02, "padded with the mean colour"
    assert llava_next.config.image_grid_pinpoints == PINPOINTS
    assert llava_next.rounding == "original" and models["llava_next"].rounding == "hf"


@pytest.mark.parametrize(
    "vision",
    [{}, {"use_qk_norm": True, "norm_type": "rms_norm"}],
    ids=["without biases", "as the tower of 6 B weights"],
)
def test_towers_of_internvl(vision, tmp_path):
    model = make("internvl", vision=vision, text={})
    assert same(load(write(tmp_path, model)), model)


def test_the_original_rounding(tmp_path):
    """One of the sizes for which int() and rounding to seven places differ."""
    made = make("llava_next", image_size=336, patch_size=14)
    made.config.image_grid_pinpoints = [[height, width] for width, height in tiling.PINPOINTS]
    made.image_processor = vlmlib.ImageProcessor(336, 336, 336, (0.5,) * 3, (0.5,) * 3)
    model, size = load(write(tmp_path, made)), (88, 55)
    (medium,) = model.prepare([noise(*size)])
    length = vlmlib.anyres_tokens(*size, model.pinpoints)
    assert length != vlmlib.anyres_tokens(*size, model.pinpoints, rounding="hf")
    assert medium.length == length == vlmlib.image_tokens(model, *size)
    with torch.inference_mode():
        assert len(model.encode(medium)) == length == len(model.boxes(medium))


@pytest.mark.parametrize(
    ("change", "prompt", "end"),
    [
        ({"model_type": "llava_mistral"}, "[INST] <image>\nHi [/INST]", "</s>"),
        (
            {"token": "<|im_end|>"},
            "<|im_start|>system\nAnswer the questions.<|im_end|>",
            "<|im_end|>",
        ),
        ({"model_type": "llava"}, "A chat between a curious user", "</s>"),
    ],
    ids=["mistral", "chatml", "the older name"],
)
def test_formats_of_the_original_llavas(folder_of, change, prompt, end):
    folder = folder_of("llava_next")
    if "token" in change:  # in place of another, so that the embeddings fit
        path = folder / "tokenizer.json"
        text = path.read_text(encoding="utf-8").replace('"<unk>"', f'"{change["token"]}"')
        path.write_text(text, encoding="utf-8")
    else:
        edit(folder / "config.json", **change)
    model = load(folder)
    assert model.chat_prompt([noise(30, 30), "Hi"]).startswith(prompt)
    assert model.tokenizer.convert_tokens_to_ids(end) in model.stop_token_ids


def test_a_tokenizer_in_one_sentencepiece_file(folder_of):
    """As the original LLaVAs have: ids are sentencepiece's own, every piece between pictures on its
    own.
    """
    folder = folder_of("llava")
    (folder / "tokenizer.json").unlink()
    lines = ["USER: what is left of the red circle? ASSISTANT: a small blue square"] * 30
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    flags = {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer"}
    write_json(folder / "tokenizer_config.json", tokens | flags)
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    model = load(folder)
    texts = ["USER:", "\nwhat is \u2211 left? ASSISTANT:"]
    first, second = map(pieces.encode, texts)
    assert model.prompt_ids("<image>".join(texts)) == [1, *first, -200, *second]
    assert model.stop_token_ids == [2] and model.prompt_ids("a</s>")[-1] == 2
    assert list(vlmlib.stream(model, [noise(30, 30), "what is left?"], n_predict=4))


def test_a_tokenizer_in_one_json_file(models, tmp_path):
    """It is taken as it is: transformers would make it again as the class that is named."""
    made = make("internvl")
    backend = made.tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Split("t", "isolated"), backend.pre_tokenizer])
    made.save_pretrained(tmp_path)
    for name in ("Qwen2Tokenizer", "Qwen2TokenizerFast", "LlamaTokenizer"):
        edit(tmp_path / "tokenizer_config.json", tokenizer_class=name, backend="removed")
        assert_same_ids(load(tmp_path).tokenizer, made.tokenizer)


@pytest.mark.parametrize("added", ["added_tokens_decoder", "added_tokens.json"])
def test_a_tokenizer_in_vocabulary_and_merges(models, folder_of, added):
    """As OpenGVLab/InternVL3-1B has: special tokens stand beside them, in either of two places."""
    folder, made = folder_of("internvl"), models["internvl"].tokenizer
    (folder / "tokenizer.json").unlink()
    made.backend_tokenizer.model.save(str(folder))
    tokens = {str(token): i for i, token in made.added_tokens_decoder.items()}
    flags = {"special": True, "normalized": False}
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": made.eos_token}
    if added == "added_tokens.json":
        write_json(folder / added, tokens)
        config["additional_special_tokens"] = list(tokens)
    else:
        config[added] = {str(i): {"content": token} | flags for token, i in tokens.items()}
    write_json(folder / "tokenizer_config.json", config)
    assert_same_ids(load(folder).tokenizer, made)


def assert_same_ids(tokenizer, expected) -> None:
    text = "What is this that\n12 left? <img><IMG_CONTEXT></img><|im_end|> é</s>"
    assert tokenizer(text).input_ids == expected(text).input_ids
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert tokenizer.eos_token_id == expected.eos_token_id
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL]
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == "".join(
            SPECIAL[skip * len(SPECIAL) :]
        )


# ---- keys ----

HEADS = {
    "llava": "lm_head.weight",
    "llava_next": "lm_head.weight",
    "internvl": "language_model.lm_head.weight",
    "nvila": "llm.lm_head.weight",
}


@pytest.mark.parametrize("native", [False, True], ids=["original", "native"])
@pytest.mark.parametrize("family", HEADS)
def test_a_head_that_is_not_there_is_tied(models, folder_of, tmp_path, family, native):
    """Whatever the configuration says; one that is there is used."""
    folder, names, path = folder_of(family), [HEADS[family]], "config.json"
    if native:
        folder = tmp_path / "native"
        models[family].save_pretrained(folder)
        names = ["lm_head.weight", "language_model.lm_head.weight"]
    edit(folder / path, tie_word_embeddings=True)
    place = folder / "llm" if native and family == "nvila" else folder
    assert same(load(folder), models[family])
    change_weights(place, lambda w: {k: v for k, v in w.items() if k not in names})
    edit(folder / path, tie_word_embeddings=False)
    model = load(folder)
    net = model.net
    assert net.lm_head.weight is net.get_input_embeddings().weight
    assert net.config.get_text_config().tie_word_embeddings
    model.image_processor = models[family].image_processor
    if getattr(model, "conversation", None) is None:
        model.save_pretrained(tmp_path / "again")
        assert same(load(tmp_path / "again"), model)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_keys_of_older_and_newer_transformers(models, tmp_path, family, prefix):
    models[family].save_pretrained(tmp_path)
    newer = {
        replaced(name, (r"vision_tower\.", f"vision_tower.{prefix}")): weight
        for name, weight in models[family].net.state_dict().items()
    }
    older = {
        replaced(
            name,
            (r"^lm_head", "language_model.lm_head"),
            (r"^model\.language_model", "language_model.model"),
            (r"^model\.", ""),
        ): weight
        for name, weight in newer.items()
    }
    for state in (newer, older):
        write_weights(tmp_path, state)
        assert same(load(tmp_path), models[family])


NEEDLESS_KEYS = re.compile("position_ids|inv_freq|head.probe|^text_|projection|logit_scale")
NEEDLESS = {
    "llava": "model.layers.1.self_attn.rotary_emb.inv_freq",
    "llava_next": "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
    "nvila": "vision_tower.vision_model.head.attention.in_proj_weight",
}


@pytest.mark.parametrize("family", NEEDLESS)
def test_needless_keys(models, folder_of, family):
    folder = folder_of(family)
    change_weights(folder, lambda w: w.update({NEEDLESS[family]: torch.arange(3)}))
    assert same(load(folder), models[family])


@pytest.mark.parametrize("family", ["llava_next", "nvila"])
def test_a_norm_that_is_never_used_may_be_missing(models, folder_of, family):
    folder = folder_of(family)
    change_weights(folder, lambda w: {k: v for k, v in w.items() if "post_layernorm" not in k})
    model = load(folder)
    norms = {k: v for k, v in states(model).items() if "post_layernorm" in k}
    assert all((w == ("weight" in name)).all() for name, w in norms.items()) and len(norms) == 2
    medium = model.prepare([noise(64, 48)])[0]
    with torch.inference_mode():
        assert torch.equal(model.encode(medium), models[family].encode(medium))


A_KEY = {
    "llava": "model.mm_projector.2.bias",
    "llava_next": "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
    "internvl": "vision_model.encoder.layers.1.attn.qkv.weight",
    "nvila": "mm_projector.layers.2.weight",
    "nvila_lite": "llm.model.layers.0.mlp.up_proj.weight",
}


@in_all_families
def test_keys_that_do_not_fit(folder_of, family):
    folder, key = folder_of(family), A_KEY[family]
    data = (folder / "model.safetensors").read_bytes()

    def after(change, *words):
        (folder / "model.safetensors").write_bytes(data)
        change_weights(folder, change)
        refused(folder, *words)

    n = 3 if "qkv" in key else 1
    after(lambda w: {k: w[k] for k in w if k != key}, f"{n} missing keys: ")
    after(lambda w: w.update(bogus=torch.zeros(1)), "1 unexpected keys: bogus")
    after(
        lambda w: w.update({key: torch.zeros(3, 7)}), f"1 mismatched keys: {key} (3, 7), expected"
    )
    after(lambda w: w.update({key: w[key].int()}), f"1 mismatched keys: {key} (not floating point)")
    after(
        lambda w: {k.replace("model.layers.", "model.layers.7"): v for k, v in w.items()},
        "missing keys: ",
        " more; ",
        "unexpected keys: ",
    )


def test_a_key_in_two_files(models, tmp_path):
    folder = write(tmp_path, models["llava"], "shards")
    first, second = sorted(folder.glob("*.safetensors"))
    key = next(iter(load_file(first)))
    change_weights(folder, lambda w: w.update({key: torch.zeros(1)}), second.name)
    refused(folder, f"{second.name}: holds keys of another file again: {key}")


def test_two_keys_that_mean_one_weight(folder_of):
    folder = folder_of("nvila")
    key = "vision_tower.vision_model.embeddings.patch_embedding.bias"
    other = key.replace("vision_model.", "")
    change_weights(folder, lambda w: w.update({other: w[key].clone()}))
    refused(folder, key, other, "are one and the same")


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llava", {"mm_projector_type": "linear"}, "mm_projector_type 'linear', expected one of"),
        ("llava", {"mm_use_im_start_end": True}, "mm_use_im_start_end True"),
        ("llava", {"model_type": "llava_mpt"}, "model_type 'llava_mpt', expected one of ['llava'"),
        ("llava", {"model_type": []}, "model_type [], expected one of"),
        ("llava", {"vocab_size": "many"}, "configuration cannot be read"),
        ("llava", {"mm_vision_select_layer": "removed"}, "KeyError: 'mm_vision_select_layer'"),
        (
            "llava_next",
            {"mm_patch_merge_type": "flat"},
            "needs mm_patch_merge_type 'spatial_unpad'",
        ),
        ("llava_next", {"image_grid_pinpoints": "(1x1)"}, "configuration cannot be read"),
        ("internvl", {"ps_version": "v1"}, "ps_version 'v1', expected one of ['v2']"),
        ("internvl", {"template": "Hermes-2"}, "template 'Hermes-2', expected one of"),
        (
            "internvl",
            {"llm_config": {"model_type": "internlm2"}},
            "is 'internlm2', expected 'qwen2'",
        ),
        ("internvl", {"vision_config": None}, "configuration cannot be read"),
        ("nvila", {"text_config": "removed"}, "KeyError: 'text_config'"),
    ],
)
def test_configurations_that_cannot_be_run(folder_of, family, changes, words):
    folder = folder_of(family)
    edit(folder / "config.json", **changes)
    refused(folder, words)


def test_another_tower(models, folder_of, tmp_path):
    folder = folder_of("llava")
    edit(folder / "clip" / "config.json", model_type="siglip")
    refused(folder, "its vision tower is 'siglip', expected 'clip'")
    models["llava"].save_pretrained(tmp_path / "native")
    edit(tmp_path / "native" / "config.json", vision_config={"model_type": "pixtral"})
    refused(tmp_path / "native", "vision_config has model_type 'pixtral', expected one of")


# ---- the hub's cache ----

CLIP = "openai/clip-vit-large-patch14-336"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """(hub id, writes a folder, commit) -> a cache as huggingface_hub leaves it; no network."""
    root = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))

    def add(name: str, write, commit: str = "a" * 40):
        repo = root / f"models--{name.replace('/', '--')}"
        snapshot = repo / "snapshots" / commit
        write(snapshot)
        for path in [p for p in snapshot.rglob("*") if p.is_file()]:
            blob = repo / "blobs" / f"{commit[:4]}-{path.parent.name}-{path.name}"
            blob.parent.mkdir(exist_ok=True)
            path.rename(blob)
            path.symlink_to(os.path.relpath(blob, path.parent))
        write_json(repo / "refs" / "main", {})
        (repo / "refs" / "main").write_text(commit)
        return snapshot

    return add


def test_a_tower_from_the_hubs_cache(models, folder_of, hub):
    folder = folder_of("llava")
    shutil.rmtree(folder / "clip")
    edit(folder / "config.json", mm_vision_tower=CLIP)
    with pytest.raises(CheckpointError, match=f"'{CLIP}' is neither a folder here nor in the hub"):
        load(folder)
    refused(folder, f"elsewhere and put it into {folder / CLIP}")
    hub(CLIP, lambda snapshot: write_tower(snapshot, models["llava"], "pickles"))
    assert same(load(folder), models["llava"])


def test_revisions(models, hub):
    other = make("llava", seed=3)
    hub("some/llava", lambda f: write(f, other), "b" * 40)
    hub("some/llava", lambda f: write(f, models["llava"]), "a" * 40)
    assert same(load("some/llava"), models["llava"])
    assert same(load("some/llava", revision="b" * 40), other)
    sizes = vlmlib.memory_estimate("some/llava", revision="b" * 40)
    assert sizes == vlmlib.memory_estimate("some/llava")
    with pytest.raises(CheckpointError, match="could not be downloaded") as caught:
        load("some/llava", revision="c" * 40)
    assert "\n" not in str(caught.value)


@in_all_families
def test_all_layouts_from_the_hubs_cache(models, hub, family):
    hub("some/model", lambda f: write(f, models[family], "shards"))
    assert same(load("some/model"), models[family])
    assert load("some/model").name == "some/model"


@in_all_families
def test_four_bit_weights_are_saved_in_transformers_own_layout(written, family, tmp_path):
    model = vlmlib.quantize_llm(load(written[family]), group_size=16)
    with pytest.raises(CheckpointError, match="cannot be saved in the layout they came in"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    model.origin = None
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.float32)
    assert same(again, model) and again.image_processor == model.image_processor


@in_all_families
def test_the_memory_of_four_bit_weights(models, family, tmp_path):
    model = vlmlib.quantize_llm(models[family], group_size=16)
    model.save_pretrained(tmp_path)
    sizes = [sum(vlmlib.memory_estimate(tmp_path, d).values()) for d in (None, torch.float16)]
    floats = sum(w.nbytes for n, w in states(model).items() if "post_layernorm" not in n)
    bytes_ = sum(w.nbytes for w in states(model).values() if w.dtype == torch.uint8)
    assert sizes == [floats, (floats - bytes_) // 2 + bytes_]
    assert load(tmp_path).dtype == torch.bfloat16


# ---- memory and progress ----


@pytest.mark.parametrize("storage", ["one file", "pickles"])
@in_all_families
def test_memory_estimate(models, written, family, storage, tmp_path, monkeypatch):
    folder = written[family] if storage == "one file" else write(tmp_path, models[family], storage)

    monkeypatch.setattr(checkpoint, "_opened", lambda path: pytest.fail("weights are read"))
    sizes, halves = (vlmlib.memory_estimate(folder, d) for d in (None, torch.float16))
    assert list(sizes) == ["language_model", "vision_tower", "projector"]
    needless = {k: v for k, v in states(models[family]).items() if "post_layernorm" in k}
    expected = sum(p.nbytes for p in models[family].parameters())
    assert sum(sizes.values()) == expected - sum(p.nbytes for p in needless.values())
    assert all(2 * halves[part] == size > 0 for part, size in sizes.items())


@in_all_families
def test_no_room(written, family, monkeypatch):
    monkeypatch.setattr(checkpoint, "_opened", lambda path: pytest.fail("weights are read"))
    need = sum(vlmlib.memory_estimate(written[family], torch.float32).values())
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: need - 1)
    refused(
        written[family], "in torch.float32, and of cpu's memory", "dtype=torch.bfloat16 would fit"
    )
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: need / 2 - 1)
    refused(written[family], "are free: free some, or take a model of at most 0.00 billion weights")


def test_what_would_fit(monkeypatch):
    free = {"cuda": 9e9, "cpu": 15e9}
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: free[device.type])
    weights = {"language_model.a": checkpoint.Stored(None, "", (7 * 10**9,), torch.float16)}

    def advice(device: str) -> str:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.check_memory("there", weights, torch.device(device), torch.float32)
        return str(caught.value).partition(" are free: ")[2]

    assert advice("cuda") == "device='cpu' with dtype=torch.bfloat16 would fit, with 14.00 GB"
    assert advice("cpu") == "dtype=torch.bfloat16 would fit, with 14.00 GB"
    free["cpu"] = 13e9
    assert advice("cuda") == "free some, or take a model of at most 4.50 billion weights"
    free["cuda"] = 28e9
    checkpoint.check_memory("there", weights, torch.device("cuda"), torch.float32)


def test_free_memory(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    monkeypatch.setattr(checkpoint, "CGROUP", tmp_path)
    free = checkpoint.free_memory(cpu)
    assert 1e6 < free < 1e15
    assert checkpoint.free_memory(torch.device("meta")) == float("inf")
    (tmp_path / "memory.stat").write_text("anon 300000\nfile 900000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    assert checkpoint.free_memory(cpu) == 700000, "in a container"
    (tmp_path / "memory.max").write_text("max\n")
    assert checkpoint.free_memory(cpu) > 1e6, "in one without a limit"


def test_dtypes():
    def stored(dtype, n):
        return checkpoint.Stored(None, "", (n,), dtype)

    weights = {"a": stored(torch.float16, 10), "b": stored(torch.float32, 4), "c": stored(None, 99)}
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert checkpoint.default_dtype(weights, gpu) is torch.float16, "most of the bytes"
    assert checkpoint.default_dtype(weights, cpu) is torch.float32
    weights["a"] = stored(torch.float16, 10**8)
    assert checkpoint.default_dtype(weights, cpu) is torch.bfloat16
    assert checkpoint.default_dtype({}, gpu) is torch.float32


def test_nothing_outside_is_changed(written, capfd):
    state = torch.random.get_rng_state()
    load(written["llava"])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() is torch.float32 and not torch.zeros(1).is_meta
    assert capfd.readouterr() == ("", "")


def test_an_error_of_the_callback_is_its_own(written):
    def stop(done, total):
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough") as caught:
        load(written["llava"], progress=stop)
    assert not isinstance(caught.value, CheckpointError)


@in_all_families
def test_dtype_and_progress(written, family):
    told = []
    model = load(written[family], dtype=torch.bfloat16, progress=lambda *n: told.append(n))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(b.dtype != torch.bfloat16 for b in buffers(model).values()), "angles stay exact"
    assert list(vlmlib.stream(model, [noise(40, 30), "Hi"], n_predict=2))
    done, totals = zip(*told, strict=True)
    assert len(set(totals)) == 1 and list(done) == sorted(done)
    assert (done[0], done[-1]) == (0, totals[0]), "the size is told before anything is read"


def test_the_files_may_change_after_loading(models, folder_of):
    folder = folder_of("internvl")
    model = load(folder)
    (folder / "model.safetensors").write_bytes(b"")
    assert same(model, models["internvl"])


# ---- saving ----


def assert_alike(a, b) -> None:
    parts = [noise(60, 40), "Hi"]
    assert type(a) is type(b) and same(a, b) and a.image_processor == b.image_processor
    assert a.chat_prompt(parts) == b.chat_prompt(parts)
    assert [m.key for m in a.prepare(parts[:1])] == [m.key for m in b.prepare(parts[:1])]
    assert a.stop_token_ids == b.stop_token_ids


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_saving(models, family, tmp_path):
    """Also over the folder that the model came from."""
    model = models[family]
    for _ in range(2):
        model.save_pretrained(tmp_path)
        model = load(tmp_path)
        assert_alike(model, models[family])


@pytest.mark.parametrize("storage", ["shards", "pickles"])
@in_all_families
def test_saving_in_the_original_layout(models, written, family, storage, tmp_path):
    """The same keys in the same folders, but for those that nobody reads."""
    folder, saved = write(tmp_path / "original", models[family], storage), tmp_path / "saved"
    model, config = load(folder), json.loads((folder / "config.json").read_text())
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    for place in (saved, folder):
        model.save_pretrained(place)
        assert_alike(load(place), model)
    for place in written[family].glob("**/model.safetensors"):
        published = {k for k in load_file(place) if not NEEDLESS_KEYS.search(k)}
        assert set(load_file(saved / place.relative_to(written[family]))) == published
    assert json.loads((saved / "config.json").read_text()) == config | {"torch_dtype": "float32"}


def test_a_tower_from_the_hub_is_saved_too(models, folder_of, hub, tmp_path):
    """It lies in the folder then, by its name."""
    folder = folder_of("llava")
    shutil.rmtree(folder / "clip")
    edit(folder / "config.json", mm_vision_tower=CLIP)
    snapshot = hub(CLIP, lambda snapshot: write_tower(snapshot, models["llava"]))
    model = load(folder)
    shutil.rmtree(snapshot)
    model.save_pretrained(tmp_path / "saved")
    assert_alike(load(tmp_path / "saved"), model)


def test_settings_are_saved_with_the_original_layout(written, tmp_path):
    llava, llava_next, internvl = (load(written[f]) for f in FAMILIES[:3])
    llava.config.image_aspect_ratio = None
    llava_next.config.image_grid_pinpoints = PINPOINTS[1:]
    internvl.image_processor = replace(internvl.image_processor, min_patches=2, max_patches=6)
    for model in (llava, llava_next, internvl):
        model.save_pretrained(tmp_path)
        assert_alike(load(tmp_path), model)


@pytest.mark.parametrize("family", ["llava", "nvila"])
def test_other_weights_are_not_saved_in_the_original_layout(written, family, tmp_path):
    model = load(written[family])
    model.net.lm_head = torch.nn.Linear(48, 7)
    with pytest.raises(
        CheckpointError, match="1 missing keys: .*lm_head.bias.* 1 mismatched.*"
    ) as e:
        model.save_pretrained(tmp_path)
    assert "cannot be saved in the layout they came in" in str(e.value)
    assert not list(tmp_path.iterdir())


# ---- folders that mean harm ----


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("family", ["llava", "internvl", "nvila"])
def test_a_trap_in_a_pickle(models, tmp_path, family):
    folder, mark = write(tmp_path / "folder", models[family], "pickles"), tmp_path / "mark"
    shard = sorted(folder.glob("*.bin"))[0]
    torch.save(torch.load(shard) | {"trap": Trap(mark)}, shard)
    refused(folder, shard.name, "refused, because a pickle can run code", "system")
    refused(folder, "refused, because", load=vlmlib.memory_estimate)
    assert not mark.exists()
    torch.load(shard, weights_only=False)
    assert mark.exists(), "the trap works"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (["a", "list"], "expected tensors by name"),
        ({"model.norm.weight": "text"}, "expected tensors by name, got str"),
        ({1: torch.zeros(2)}, "expected tensors by name"),
        ({"a": torch.zeros(1).expand(10**12)}, "a claims to be larger than what the file holds"),
        ({"a": torch.eye(3).to_sparse()}, "claims to be larger|cannot be read"),
    ],
    ids=["list", "text", "number", "expanded", "sparse"],
)
def test_pickles_of_other_things(folder_of, content, words):
    folder = folder_of("llava")
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    assert re.search(words, refused(folder))


def test_a_pickle_of_an_old_kind(folder_of):
    folder = folder_of("llava")
    (folder / "model.safetensors").unlink()
    options = {"_use_new_zipfile_serialization": False}
    torch.save({"a": torch.zeros(2)}, folder / "pytorch_model.bin", **options)
    refused(folder, "weights cannot be read")


def claim(path, change) -> None:
    """Rewrite the header of a file of safetensors."""
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    change(next(v for k, v in header.items() if k != "__metadata__"))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(shape=[10**6, 10**6]),
        lambda t: t.update(shape=[10**6, 10**6], data_offsets=[0, 4 * 10**12]),
        lambda t: t.update(data_offsets=[10**12, 10**12 + 8]),
        lambda t: t.update(dtype="F999"),
    ],
    ids=["shape", "shape and place", "place", "dtype"],
)
def test_headers_that_lie(folder_of, change):
    folder = folder_of("llava")
    claim(folder / "model.safetensors", change)
    refused(folder, "model.safetensors: weights cannot be read")


@pytest.mark.parametrize("place", ["model.safetensors", "config.json", "tokenizer.json", "clip"])
def test_links_that_lead_out(folder_of, tmp_path, place):
    folder = folder_of("llava")
    (folder / place).rename(tmp_path / "outside")
    (folder / place).symlink_to(tmp_path / "outside")
    refused(folder, f"{place}: a link that leads out of the checkpoint's folder")
    (folder / place).unlink()
    (folder / place).symlink_to(folder / place)
    refused(folder, str(folder / place))


def test_a_tower_behind_links(folder_of, tmp_path):
    folder = folder_of("llava")
    (tmp_path / "outside").mkdir()
    (folder / "clip").rename(tmp_path / "outside" / "clip")
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "c").symlink_to(tmp_path / "outside")
    edit(folder / "config.json", mm_vision_tower="a/b/c/clip")
    refused(folder, "clip", "a link that leads out of the checkpoint's folder")


def test_links_that_stay(models, folder_of, tmp_path):
    folder = folder_of("llava")
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(folder)
    assert same(load(tmp_path / "link"), models["llava"])


@pytest.mark.parametrize("name", ["/etc", "../clip", "clip/../../clip", "~/clip", "clap", 3, None])
def test_towers_at_other_places(folder_of, name):
    folder = folder_of("llava")
    shutil.copytree(folder / "clip", folder.parent / "clip")
    edit(folder / "config.json", mm_vision_tower=name)
    with pytest.raises(CheckpointError, match="vision tower at|neither a folder here nor"):
        load(folder)


def test_code_that_comes_along(models, folder_of, monkeypatch):
    """auto_map and _target_ name code, and the folder has it: it stays where it is."""
    for family in ("internvl", "nvila", "llava"):
        folder = folder_of(family)
        for name in ("configuration_internvl_chat", "modeling_internvl_chat", "evil"):
            (folder / f"{name}.py").write_text("raise SystemExit('imported')")
        auto = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
        edit(folder / "config.json", auto_map=auto)
        edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
        monkeypatch.syspath_prepend(folder)
        assert same(load(folder), models[family])
    assert not {"evil", "modeling_internvl_chat"} & set(sys.modules)


def test_tokenizers_at_other_places(models, folder_of, tmp_path):
    """A tokenizer_config.json may name files; those of the folder are read."""
    folder, elsewhere = folder_of("internvl"), tmp_path / "elsewhere.json"
    elsewhere.write_text("no tokenizer")
    names = ("tokenizer_file", "vocab_file", "merges_file", "gguf_file")
    edit(folder / "tokenizer_config.json", **dict.fromkeys(names, str(elsewhere)))
    assert_same_ids(load(folder).tokenizer, models["internvl"].tokenizer)


@pytest.mark.parametrize("native", [False, True], ids=["original", "native"])
@pytest.mark.parametrize("family", ["llava", "internvl", "nvila"])
def test_kernels_from_the_hub(models, folder_of, tmp_path, family, native):
    """transformers would fetch and run what these entries name."""
    folder = folder_of(family)
    if native:
        models[family].save_pretrained(folder := tmp_path / "native")
    kernels = {
        f"{_}{what}_implementation": "evil/kernel"
        for _ in ("", "_")
        for what in ("attn", "experts")
    }
    for path in folder.glob("**/config.json"):
        config = json.loads(path.read_text())
        parts = [v for k, v in config.items() if isinstance(v, dict) and k.endswith("_config")]
        for part in (config, *parts):
            part |= kernels
        write_json(path, config)
    model = load(folder)
    assert same(model, models[family])
    assert "evil" not in model.net.config.to_json_string()


def test_code_that_comes_along_with_transformers_layout(models, tmp_path):
    models["llava"].save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    edit(tmp_path / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"})
    assert same(load(tmp_path), models["llava"])
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("llava", ["num_hidden_layers"]),
        ("internvl", ["llm_config", "num_hidden_layers"]),
        ("internvl", ["vision_config", "num_hidden_layers"]),
        ("nvila", ["text_config", "num_hidden_layers"]),
        ("llava", ["vocab_size"]),
        ("internvl", ["vision_config", "image_size"]),
        ("nvila", ["vision_config", "intermediate_size"]),
    ],
    ids=lambda x: x if isinstance(x, str) else ".".join(x),
)
def test_configurations_that_claim_too_much(folder_of, family, path):
    """Nothing is made before it is seen that there are no such weights."""
    folder = folder_of(family)
    config = json.loads((folder / "config.json").read_text())
    part = config if len(path) == 1 else config[path[0]]
    part[path[-1]] = 2 * 10**8 if "layers" in path[-1] else 2 * 10**6 // 7 * 7
    write_json(folder / "config.json", config)
    text = refused(folder)
    words = r"layers, but there are only \d+ weights|mismatched keys|vision tower takes 199"
    assert re.search(words, text)


PREPROCESSING = "preprocessor_config.json"


@pytest.mark.parametrize(
    ("family", "file", "changes", "words"),
    [
        ("internvl", PREPROCESSING, {"size": 10**9, "crop_size": 28}, "expected 1 to 2048"),
        ("nvila", f"vision_tower/{PREPROCESSING}", {"size": 14}, "are cut to 14 x 14 pixels, but"),
        ("nvila", "config.json", {"mm_vision_select_layer": -9}, "asks for layer -9"),
        ("llava_next", "config.json", {"image_grid_pinpoints": []}, "must be a list of"),
        ("llava_next", "config.json", {"image_grid_pinpoints": [[28, 28.0]]}, "must be a list of"),
        ("llava_next", "config.json", {"image_grid_pinpoints": [[28]]}, "cannot be read"),
        ("llava_next", "config.json", {"image_grid_pinpoints": [[28, -28]]}, "expected 1 to 256"),
        (
            "llava_next",
            "config.json",
            {"image_grid_pinpoints": [[28, 28], [28000, 28000]]},
            "1000 x 1000 tiles of 28, expected 1 to 256 tiles",
        ),
    ],
)
def test_numbers_that_would_fail_or_fill_memory_later(
    models, tmp_path, family, file, changes, words
):
    """Whatever comes with the weights fits them, or is told before they are read."""
    models[family].save_pretrained(tmp_path)
    edit(tmp_path / file, **changes)
    refused(tmp_path, words)


def test_too_many_tiles_for_internvl(folder_of):
    folder = folder_of("internvl")
    edit(folder / "config.json", max_dynamic_patch=10**9)
    with pytest.raises(vlmlib.ShapeError, match="max_num <= 256, got 1 and 1000000000"):
        load(folder).prepare([noise(30, 20)])


def test_everything_at_once(models, folder_of, tmp_path, monkeypatch):
    """Nothing of it is loaded, nothing run, and it says why."""
    mark = tmp_path / "mark"
    folder = folder_of("nvila")
    model = nvila_helpers.shared("dynamic_s2")
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    shutil.copytree(folder / "llm", tmp_path / "llm")
    (folder / "llm" / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../../llm/model.safetensors"}}
    write_json(folder / "llm" / "model.safetensors.index.json", index)
    (folder / "mm_projector" / "model.safetensors").unlink()
    torch.save({"trap": Trap(mark)}, folder / "mm_projector" / "pytorch_model.bin")
    command = json.dumps({"_target_": "os.system", "command": f"touch {mark}"})
    edit(folder / "config.json", image_encoder=command, auto_map={"AutoModel": "evil.Model"})
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    (folder / "vision_tower" / "extra.json").symlink_to("/etc/hostname")
    refused(folder, "a link that leads out")
    (folder / "vision_tower" / "extra.json").unlink()
    refused(folder, "names '../../llm/model.safetensors', which is not a file of its folder")
    (folder / "llm" / "model.safetensors.index.json").unlink()
    shutil.copy(tmp_path / "llm" / "model.safetensors", folder / "llm")
    refused(folder, "a pickle can run code")
    (folder / "mm_projector" / "pytorch_model.bin").unlink()
    write_weights(folder / "mm_projector", model.mm_projector.state_dict())
    monkeypatch.setattr(checkpoint, "_opened", lambda path: pytest.fail("weights are read"))
    refused(folder, "_target_ 'os.system', expected one of")
    assert not mark.exists() and "evil" not in sys.modules
