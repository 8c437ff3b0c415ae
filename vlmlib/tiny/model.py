"""The models: LLaVA-1.5, NVILA and InternVL3 in miniature, out of the same parts as the large ones.

    tiny-llava      CLIP, two-layer projector, Llama: the layout of llava-hf/llava-1.5-7b-hf
    tiny-nvila      SigLIP at two scales, folding projector, Qwen2: the layout of NVILA-8B
    tiny-internvl   InternVL's tower, folding projector, Qwen2: the layout of InternVL3-1B-hf

Only the sizes differ from the published models; code, file layout and chat format are alike. The
parts are as large in all three, so that what one has learnt can start another (`warm_start`).
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..checkpoint import write_json
from ..images import ImageProcessor
from ..internvl import IMG_CONTEXT_TOKEN, IMG_END_TOKEN, IMG_START_TOKEN, InternVL
from ..llava import Llava
from ..model import VisionLanguageModel
from ..nvila import NVILA
from ..nvila_checkpoint import NVILAConfig
from ..nvila_model import MEDIA_TOKENS
from ..tokenization import VIDEO_TOKEN
from .scenes import draw, train_scene
from .tokenizer import IMAGE, build_qwen_tokenizer, build_tokenizer

PIXELS, PATCH, LAYERS = 112, 14, 4
IMAGE_TOKENS = (PIXELS // PATCH) ** 2
FOLDED_TOKENS = IMAGE_TOKENS // 4
MAX_TILES = 9
MEAN, STD = tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)

LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TOWER = {
    "hidden_size": 160,
    "intermediate_size": 640,
    "num_attention_heads": 5,
    "image_size": PIXELS,
    "patch_size": PATCH,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
LANGUAGE = {
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""Of all three. CLIP and SigLIP have one layer more, which is never read."""


def _with_ids(language: dict, tokenizer: PreTrainedTokenizerFast) -> dict:
    """Sizes of a language model, Llama or Qwen2, with what its tokenizer knows."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **language,
    }


def build(name: str, seed: int = 0) -> VisionLanguageModel:
    """The model of this name with fresh weights that depend on `seed` only."""
    if name not in BUILDERS:
        raise ValueError(f"no model {name!r}; there are {', '.join(BUILDERS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BUILDERS[name]()
    model.name = name
    model.net.generation_config = GenerationConfig(
        bos_token_id=model.tokenizer.bos_token_id,
        eos_token_id=model.tokenizer.eos_token_id,
        pad_token_id=model.tokenizer.pad_token_id,
        max_new_tokens=128,
    )
    return model


def _processor(**changes) -> ImageProcessor:
    return ImageProcessor(PIXELS, PIXELS, PIXELS, MEAN, STD, **changes)


def build_llava(tower: dict, language: dict, processor: ImageProcessor) -> Llava:
    """LLaVA-1.5 of these sizes: of CLIP's tower, and of Llama."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = LLAVA_TEMPLATE
    tower = CLIPVisionConfig(**tower, projection_dim=tower["hidden_size"])
    language = LlamaConfig(**_with_ids(language, tokenizer))
    config = LlavaConfig(
        vision_config=tower,
        text_config=language,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(tower.image_size // tower.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=language.tie_word_embeddings,
    )
    return Llava(LlavaForConditionalGeneration(config).eval(), tokenizer, processor)


def build_nvila(
    tower: dict, language: dict, processor: ImageProcessor, config: NVILAConfig
) -> NVILA:
    """NVILA of these sizes: of SigLIP's tower, and of Qwen2; `config` says the rest."""
    tokenizer = build_qwen_tokenizer({"video_token": MEDIA_TOKENS["video"]})
    parts = {"llm_cfg": _with_ids(language, tokenizer), "vision_tower_cfg": tower}
    return NVILA(replace(config, **parts), tokenizer, processor)


def build_internvl(tower: dict, language: dict, processor: ImageProcessor) -> InternVL:
    """InternVL3 of these sizes: of InternVL's tower, and of Qwen2."""
    tokenizer = build_qwen_tokenizer(
        {
            "start_image_token": IMG_START_TOKEN,
            "end_image_token": IMG_END_TOKEN,
            "context_image_token": IMG_CONTEXT_TOKEN,
            "video_token": VIDEO_TOKEN,
        }
    )
    tokenizer.chat_template = INTERNVL_TEMPLATE
    language = Qwen2Config(**_with_ids(language, tokenizer))
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**tower, attention_bias=True),
        text_config=language,
        image_token_id=tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN),
        image_seq_length=(tower["image_size"] // tower["patch_size"] // 2) ** 2,
        downsample_ratio=0.5,
        tie_word_embeddings=language.tie_word_embeddings,
    )
    net = InternVLForConditionalGeneration(config).eval()
    nn.init.normal_(net.model.vision_tower.embeddings.position_embeddings, std=0.02)  # were zero
    return InternVL(net, tokenizer, processor)


def _tiny_llava() -> Llava:
    return build_llava({**TOWER, "num_hidden_layers": LAYERS + 1}, LANGUAGE, _processor())


def _tiny_nvila() -> NVILA:
    config = NVILAConfig(
        image_aspect_ratio="dynamic_s2",
        max_tiles=MAX_TILES,
        num_video_frames=8,
        dynamic_s2=True,
        s2_scales=f"{PIXELS},{2 * PIXELS}",
        s2_resize_output_to_scale_idx=-1,
        chat_template="qwen2",
        mm_projector_cfg={"mm_projector_type": "mlp_downsample"},
    )
    tower = {**TOWER, "num_hidden_layers": LAYERS + 1}
    return build_nvila(tower, LANGUAGE, _processor(), config)


def _tiny_internvl() -> InternVL:
    tower = {**TOWER, "num_hidden_layers": LAYERS, "layer_scale_init_value": 1.0}
    return build_internvl(tower, LANGUAGE, _processor(max_patches=MAX_TILES))


BUILDERS = {
    "tiny-llava": _tiny_llava,
    "tiny-nvila": _tiny_nvila,
    "tiny-internvl": _tiny_internvl,
}


def parts(model: VisionLanguageModel) -> nn.ModuleDict:
    """All that learns, under names that the three models share."""
    nvila, net = isinstance(model, NVILA), model.net
    return nn.ModuleDict(
        {
            "tower": model.vision_tower.net if nvila else net.model.vision_tower,
            "projector": model.mm_projector if nvila else net.model.multi_modal_projector,
            "language": net.get_decoder(),
            "head": net.lm_head,
        }
    )


# ------------------------------------------------------------------------------ warm start


CLIP_NAMES = {
    "patch_embeddings.projection": "patch_embedding",
    "position_embeddings": "position_embedding.weight",
    "cls_token": "class_embedding",
    "encoder.layer.": "encoder.layers.",
    "layernorm_before": "layer_norm1",
    "layernorm_after": "layer_norm2",
    "attention.projection_layer": "self_attn.out_proj",
    "attention.": "self_attn.",
}
"""What InternVL's tower calls a thing, and what CLIP and SigLIP call it."""

PATCHES = "tower.embeddings.patch_embedding"
POSITIONS = "tower.embeddings.position_embedding.weight"
CLASS = "tower.embeddings.class_embedding"
NVILA_PROJECTOR = "projector.layers."


@torch.no_grad()
def warm_start(model: VisionLanguageModel, source: VisionLanguageModel) -> list[str]:
    """Copy from another tiny model what has the same meaning; returns the names of what was copied.

    Within a family that is everything. Otherwise it is the layers of the tower and of the language
    model, the embeddings of the vocabulary that both have and those of patches and places. What the
    towers do differently is folded into the weights: CLIP alone normalises its embeddings (that
    takes the spread of a typical picture), and InternVL alone scales what a layer adds. NVILA takes
    InternVL's projector too: both fold two by two.
    """
    same = type(model) is type(source)
    own = dict(parts(source).named_parameters())
    theirs = own if same else {_clip_name(name): value for name, value in own.items()}
    if not same and isinstance(source, Llava):
        theirs |= _normed_embeddings(theirs, source)
    elif not same and isinstance(source, InternVL):
        theirs |= _scaled_layers(theirs)
        if isinstance(model, NVILA):
            theirs |= _widened_projector(theirs, len(model.vision_tower.scales))
    copied = []
    for name, parameter in parts(model).named_parameters():
        value = theirs.get(name if same else _clip_name(name))
        if value is None or not (same or name.startswith(("tower.", "language.", NVILA_PROJECTOR))):
            continue
        if name == "language.embed_tokens.weight":
            rows = min(len(value), len(parameter))
            parameter[:rows] = value[:rows]
        else:  # SigLIP has no place for a class token; InternVL's places have an axis more
            rows = parameter.shape[-2] if _clip_name(name) == POSITIONS else len(value)
            parameter.copy_(value[-rows:].reshape(parameter.shape))
        copied.append(name)
    return copied


def _scaled_layers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """InternVL's layers without the scales of what they add, and places without the first axis."""
    changed = {POSITIONS: weights[POSITIONS][0]}
    for name, scale in weights.items():
        layer, _, kind = name.rpartition(".")
        if kind in ("lambda_1", "lambda_2"):
            last = "self_attn.out_proj" if kind == "lambda_1" else "mlp.fc2"
            weight, bias = (weights[f"{layer}.{last}.{what}"] for what in ("weight", "bias"))
            changed[f"{layer}.{last}.weight"] = weight * scale[:, None]
            changed[f"{layer}.{last}.bias"] = bias * scale
    return changed


def _widened_projector(weights: dict[str, Tensor], scales: int) -> dict[str, Tensor]:
    """InternVL's projector for stacked scales, under NVILA's names: it reads the finest alone."""
    kept = {}
    for layer, theirs in ((1, "layer_norm"), (2, "linear_1"), (4, "linear_2")):
        for what in ("weight", "bias"):
            kept[f"{NVILA_PROJECTOR}{layer}.{what}"] = weights[f"projector.{theirs}.{what}"]
    for what in ("weight", "bias"):  # of four patches; the coarser scales come first in each
        name = f"{NVILA_PROJECTOR}1.{what}"
        kept[name] = repeat(kept[name], "(p c) -> (p s c)", p=4, s=scales)
    first = f"{NVILA_PROJECTOR}2.weight"
    patches = rearrange(kept[first], "d (p c) -> d p 1 c", p=4)
    kept[first] = rearrange(F.pad(patches, (0, 0, scales - 1, 0)), "d p s c -> d (p s c)")
    return kept


def _clip_name(name: str) -> str:
    """The name in CLIP of a parameter of any of the towers; other names stay."""
    if not name.startswith("tower."):
        return name
    for theirs, clip in CLIP_NAMES.items():
        name = name.replace(theirs, clip)
    return name


def _normed_embeddings(weights: dict[str, Tensor], source: Llava) -> dict[str, Tensor]:
    """Embeddings of patches, places and class whose sum is CLIP's behind its first norm."""
    tower = source.net.model.vision_tower
    embedded = tower.embeddings(source.prepare([draw(train_scene(0))])[0].pixels)
    spread = embedded[:, 1:].std(dim=-1, correction=0).mean()
    scale, shift = tower.pre_layrnorm.weight / spread, tower.pre_layrnorm.bias
    patches, places = weights[f"{PATCHES}.weight"], weights[POSITIONS]
    places = (places - places.mean(dim=1, keepdim=True)) * scale
    return {
        f"{PATCHES}.weight": (patches - patches.mean(dim=0)) * scale[:, None, None, None],
        f"{PATCHES}.bias": shift,
        POSITIONS: places,
        CLASS: tower.pre_layrnorm(embedded[0, 0]) - places[0],
    }


# ---------------------------------------------------------------------------------- saving


def save(model: VisionLanguageModel, folder: Path) -> None:
    """Write a checkpoint folder in fp16; each file appears whole or not at all."""
    staging = folder.with_name(f".{folder.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    half = copy.deepcopy(model)
    for part in parts(half).values():
        part.half()
    if not isinstance(model, InternVL):
        _silence_unread_layer(parts(half)["tower"])
    WRITERS[half.family](half, staging)
    for file in sorted(path for path in staging.rglob("*") if path.is_file()):
        place = folder / file.relative_to(staging)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.chmod(0o644)
        file.replace(place)
    shutil.rmtree(staging)


def _write_llava(model: Llava, folder: Path) -> None:
    tokenizer = model.tokenizer
    model.net.save_pretrained(folder)
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS}
    )
    processor = LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    pictures.save_pretrained(folder)
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "image_token")
    text = {name: getattr(tokenizer, name) for name in names}
    write_json(folder / "special_tokens_map.json", text)


def _write_internvl(model: InternVL, folder: Path) -> None:
    model.save_pretrained(folder)
    text = {"processor_class": "InternVLProcessor", "image_seq_length": FOLDED_TOKENS}
    write_json(folder / "processor_config.json", text)


WRITERS = {"llava": _write_llava, "nvila": NVILA.save_pretrained, "internvl": _write_internvl}


@torch.no_grad()
def _silence_unread_layer(tower: nn.Module) -> None:
    """Zero what the last layer adds: the layer before it is read, so it never learnt."""
    last = tower.encoder.layers[-1]
    for linear in (last.self_attn.out_proj, last.mlp.fc2):
        linear.weight.zero_()
        linear.bias.zero_()
