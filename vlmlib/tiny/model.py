"""The model: LLaVA-1.5 in miniature, out of transformers' own parts.

CLIP tower -> features of the second-to-last layer without CLS -> two-layer projector -> Llama.
Only the sizes differ from `llava-hf/llava-1.5-7b-hf`; code, file layout and chat format are alike.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .tokenizer import IMAGE

PIXELS, PATCH = 112, 14
IMAGE_TOKENS = (PIXELS // PATCH) ** 2

CHAT_TEMPLATE = (
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


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """The sizes. The tower has four layers that are read and a last one that never is."""
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=5,
        image_size=PIXELS,
        patch_size=PATCH,
        projection_dim=160,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=5,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlavaForConditionalGeneration:
    """A model with fresh weights that depend on `seed` only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(build_config(tokenizer))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=128,
    )
    return model


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Pictures to 112 x 112, `<image>` to 64 tokens, messages to LLaVA's chat format."""
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS}
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write a checkpoint folder in fp16; each file appears whole or not at all."""
    staging = folder.with_name(f".{folder.name}.staging")
    staging.mkdir(parents=True, exist_ok=True)
    half = LlavaForConditionalGeneration(model.config)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    _silence_unread_layer(half)
    half.half().save_pretrained(staging)
    processor.save_pretrained(staging)
    processor.image_processor.save_pretrained(staging)
    _write_special_tokens(processor.tokenizer, staging)
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(staging.iterdir()):
        file.chmod(0o644)
        file.replace(folder / file.name)
    staging.rmdir()


@torch.no_grad()
def _silence_unread_layer(model: LlavaForConditionalGeneration) -> None:
    """Zero what the last tower layer adds: LLaVA reads the layer before it, so it never learnt."""
    last = model.model.vision_tower.encoder.layers[-1]
    for linear in (last.self_attn.out_proj, last.mlp.fc2):
        linear.weight.zero_()
        linear.bias.zero_()


def _write_special_tokens(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """`special_tokens_map.json`, for readers of the older layout."""
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "image_token")
    text = json.dumps({name: getattr(tokenizer, name) for name in names}, indent=2)
    (folder / "special_tokens_map.json").write_text(text + "\n", encoding="utf-8")
