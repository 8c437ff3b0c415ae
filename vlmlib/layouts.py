"""The layouts of LLaVA's and InternVL's checkpoints: how each is recognised by its keys, what the
keys are called in transformers' networks, and what its configuration says in transformers' terms.

NVILA's are in `vlmlib.nvila_checkpoint`.
Sources: LLaVA:llava/model, InternVL:internvl_chat/internvl/model/internvl_chat.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from .checkpoint import Renames
from .conversation import conv_templates
from .errors import CheckpointError
from .internvl import CHAT_TEMPLATES, IMG_CONTEXT_TOKEN, InternVL
from .llava import Llava, LlavaNext, pinpoints
from .model import VisionLanguageModel
from .tiling import get_anyres_image_grid_shape

Config = dict[str, Any]

FAMILIES = {
    "llava": (Llava, LlavaForConditionalGeneration),
    "llava_next": (LlavaNext, LlavaNextForConditionalGeneration),
    "internvl": (InternVL, InternVLForConditionalGeneration),
}
"""transformers' model_type -> (vlmlib's class, transformers' class)."""


KINDS = {
    "text_config": ("llama", "mistral", "qwen2", "qwen3"),
    "vision_config": ("clip_vision_model", "siglip_vision_model", "internvl_vision"),
}
"""What transformers' own layouts may be made of, by model_type."""


@dataclass(frozen=True, slots=True)
class Layout:
    """
    marker     (regular expression) a key that this layout has, and those after it have not
    translate  (config.json, the tower's config.json) -> transformers' configuration
    renames    of its keys, before `checkpoint.CANONICAL`
    expected   entries of config.json, and the values that vlmlib can run
    tower      entry of config.json that names another checkpoint, of its tower
    settle     (model, config.json): what differs from transformers' layout besides the network
    settings   model -> those of its settings that config.json has, to save them
    """

    marker: str
    translate: Callable[[Config, Config], PretrainedConfig]
    renames: Renames = ()
    expected: Mapping[str, Collection] = field(default_factory=dict)
    tower: str | None = None
    settle: Callable[[VisionLanguageModel, Config], None] | None = None
    settings: Callable[[VisionLanguageModel], Config] | None = None

    def check(self, config: Config) -> None:
        """Raise CheckpointError for what vlmlib cannot run."""
        for name, values in self.expected.items():
            if config.get(name) not in list(values):
                raise CheckpointError(
                    f"config.json has {name} {config.get(name)!r}, expected one of {list(values)}"
                )


def known(config_class: type[PretrainedConfig], config: Config, **changes) -> PretrainedConfig:
    """Of this class, from those entries that it knows."""
    names = {f.name for f in fields(config_class)} | {"rope_theta", "rope_scaling"}
    names -= {"architectures", "dtype", "use_cache"}
    return config_class(**{k: v for k, v in config.items() if k in names} | changes)


def _native(config: Config, tower: Config) -> PretrainedConfig:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"config.json has model_type {model_type!r}, expected one of {list(FAMILIES)}"
        )
    for part, expected in KINDS.items():
        kind = config.get(part, {}).get("model_type", expected[0])
        if kind not in expected:
            raise CheckpointError(
                f"{part} has model_type {kind!r}, expected one of {list(expected)}"
            )
    made = FAMILIES[model_type][1].config_class.from_dict(config)
    aspect = getattr(made, "image_aspect_ratio", None)
    if model_type == "llava" and aspect not in (None, "square", "pad"):
        raise CheckpointError(f"image_aspect_ratio is {aspect!r}, expected 'square' or 'pad'")
    if model_type == "internvl" and not isinstance(layer := made.vision_feature_layer, int):
        raise CheckpointError(f"vision_feature_layer is {layer!r}, expected one layer")
    if model_type == "llava_next":
        _check_resolutions(made)
    return made


def _check_resolutions(config: LlavaNextConfig) -> None:
    sizes = pinpoints(config)
    if not sizes or not all(type(side) is int for size in sizes for side in size):
        raise CheckpointError("image_grid_pinpoints must be a list of [height, width]")
    for size in sizes:
        get_anyres_image_grid_shape((1, 1), [size], config.vision_config.image_size)


LLAVA_TEXT = {"llava": LlamaConfig, "llava_llama": LlamaConfig, "llava_mistral": MistralConfig}
"""model_type -> its language model. Sources: LLaVA:llava/model/language_model."""


def _llava(config: Config, tower: Config) -> LlavaConfig | LlavaNextConfig:
    """config.json is the language model's, with some entries about pictures."""
    text = known(LLAVA_TEXT[config["model_type"]], config)
    anyres = config.get("image_aspect_ratio") == "anyres"
    if anyres and config.get("mm_patch_merge_type") != "spatial_unpad":
        raise CheckpointError(
            "image_aspect_ratio 'anyres' needs mm_patch_merge_type 'spatial_unpad'"
        )
    if tower.get("model_type") not in ("clip", "clip_vision_model"):
        raise CheckpointError(f"its vision tower is {tower.get('model_type')!r}, expected 'clip'")
    patches = config.get("mm_vision_select_feature", "patch") == "patch"
    made = (LlavaNextConfig if anyres else LlavaConfig)(
        text_config=text,
        vision_config=known(CLIPVisionConfig, tower.get("vision_config", tower)),
        image_token_id=text.vocab_size,  # no token stands for pictures
        vision_feature_layer=config["mm_vision_select_layer"],
        vision_feature_select_strategy="default" if patches else "full",
    )
    made.image_aspect_ratio = config.get("image_aspect_ratio")
    if anyres:  # they are (width, height) there, and (height, width) in transformers
        made.image_grid_pinpoints = [[h, w] for w, h in config["image_grid_pinpoints"]]
        _check_resolutions(made)
    return made


def _settle_llava(model: Llava, config: Config) -> None:
    """The prompts that it was trained on. LLaVA's own code guesses them by the model's name."""
    if config["model_type"] == "llava_mistral":
        style = "mistral_instruct"
    else:
        chatml = conv_templates["chatml_direct"].stop_str in model.tokenizer.get_vocab()
        style = "chatml_direct" if chatml else "vicuna_v1"
    model.conversation = conv_templates[style].copy()
    model.rounding = "original"


def _llava_settings(model: Llava) -> Config:
    made = {"image_aspect_ratio": model.config.image_aspect_ratio}
    if isinstance(model, LlavaNext):
        made["image_grid_pinpoints"] = [list(size) for size in model.pinpoints]
    return made


def _internvl(config: Config, tower: Config) -> InternVLConfig:
    vision, llm = config["vision_config"], config["llm_config"]
    if llm["model_type"] != "qwen2":
        raise CheckpointError(
            f"its language model is {llm['model_type']!r}, expected 'qwen2'; transformers' own "
            "layout of it (-hf) may have another"
        )
    return InternVLConfig(
        text_config=known(Qwen2Config, llm),
        vision_config=known(
            InternVLVisionConfig,
            vision,
            attention_bias=vision["qkv_bias"],
            use_qk_norm=vision["qk_normalization"],
        ),
        downsample_ratio=config["downsample_ratio"],
        vision_feature_layer=config["select_layer"],
    )


def _settle_internvl(model: InternVL, config: Config) -> None:
    cut = config.get("dynamic_image_size", True)
    model.image_processor = replace(
        model.image_processor,
        min_patches=config["min_dynamic_patch"] if cut else 1,
        max_patches=config["max_dynamic_patch"] if cut else 1,
    )
    model.chat_template = CHAT_TEMPLATES[config["template"]]
    model.config.image_token_id = model.tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
    model.config.image_seq_length = model.tokens_per_tile


def _internvl_settings(model: InternVL) -> Config:
    p = model.image_processor
    cut = {"min_dynamic_patch": p.min_patches, "max_dynamic_patch": p.max_patches}
    return {"dynamic_image_size": True} | cut


_TOWER = r"^vision_tower\."
_LAYER = r"^(vision_tower\.encoder\.)layers\.(\d+)\."
LAYOUTS = {
    "original LLaVA": Layout(
        r"^model\.mm_projector\.",
        _llava,
        renames=(
            (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
            (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
            (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
            (r"^model\.(?=embed_tokens\.|layers\.|norm\.)", "language_model."),
        ),
        expected={
            "model_type": LLAVA_TEXT,
            "mm_projector_type": ("mlp2x_gelu",),
            "mm_vision_select_feature": ("patch", "cls_patch", None),
            "mm_use_im_start_end": (False, None),
            "mm_patch_merge_type": ("flat", "spatial_unpad", None),
            "image_aspect_ratio": ("square", "pad", "anyres", None),
        },
        tower="mm_vision_tower",
        settle=_settle_llava,
        settings=_llava_settings,
    ),
    "original InternVL": Layout(
        r"^mlp1\.",
        _internvl,
        renames=(
            (r"^mlp1\.0\.", "multi_modal_projector.layer_norm."),
            (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
            (r"^mlp1\.3\.", "multi_modal_projector.linear_2."),
            (r"^vision_model\.", "vision_tower."),
            (_TOWER + r"embeddings\.class_embedding$", "vision_tower.embeddings.cls_token"),
            (
                _TOWER + r"embeddings\.position_embedding$",
                "vision_tower.embeddings.position_embeddings",
            ),
            (
                _TOWER + r"embeddings\.patch_embedding\.",
                "vision_tower.embeddings.patch_embeddings.projection.",
            ),
            (_LAYER + r"attn\.qkv\.", r"\1layer.\2.attention.{q,k,v}_proj."),
            (_LAYER + r"attn\.proj\.", r"\1layer.\2.attention.projection_layer."),
            (_LAYER + r"attn\.", r"\1layer.\2.attention."),
            (_LAYER + r"norm1\.", r"\1layer.\2.layernorm_before."),
            (_LAYER + r"norm2\.", r"\1layer.\2.layernorm_after."),
            (_LAYER + r"ls(\d)$", r"\1layer.\2.lambda_\3"),
            (_LAYER, r"\1layer.\2."),
        ),
        expected={
            "ps_version": ("v2",),
            "template": ("internvl2_5",),
            "use_thumbnail": (True,),
            "pad2square": (False, None),
        },
        settle=_settle_internvl,
        settings=_internvl_settings,
    ),
    "transformers": Layout("", _native),
}
"""Tried in this order."""
