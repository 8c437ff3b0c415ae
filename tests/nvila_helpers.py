"""Tiny random NVILAs: tiles of 28 pixels, 4 x 4 patches each."""

from __future__ import annotations

from functools import cache

import torch
from helpers import fresh_tokenizer

import vlmlib
from vlmlib import NVILA, NVILAConfig

TILE = 28
SCALES = "28,56,84"
CONTEXT = 640
PROJECTORS = (
    "identity",
    "linear",
    "mlp2x_gelu",
    "mlp_downsample",
    "mlp_downsample_2x2_fix",
    "mlp_downsample_3x3_fix",
)
MODES = ("resize", "pad", "dynamic", "dynamic_s2")
TSP = (
    '{"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[2, 1, 1], [4, 2, 1]],'
    ' "start_tokens": "<", "end_tokens": "at", "sep_tokens": "is re"}'
)


def tokenizer():
    """Its EOS is another token than the one that ends a turn, as Qwen2's base model has it."""
    made = fresh_tokenizer("tokenizer_no_bos")
    made.chat_template = None
    made.eos_token = "<|endoftext|>"
    return made


def config(mode: str = "resize", projector: str = "mlp_downsample", **changes) -> NVILAConfig:
    s2 = {"dynamic_s2": True, "s2_scales": SCALES, "s2_resize_output_to_scale_idx": -1}
    width = 24
    llm = {
        "hidden_size": 48
        if projector != "identity"
        else width * (3 if mode == "dynamic_s2" else 1),
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "vocab_size": 380,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    tower = {
        "hidden_size": width,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": TILE // 4,
    }
    own = {
        "image_aspect_ratio": mode,
        "num_video_frames": 4,
        "llm_cfg": llm,
        "vision_tower_cfg": tower,
        "mm_projector_cfg": {"mm_projector_type": projector},
    }
    return NVILAConfig(**(s2 if mode == "dynamic_s2" else {}) | own | changes)


def processor() -> vlmlib.ImageProcessor:
    return vlmlib.ImageProcessor(None, TILE, TILE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def nvila(mode: str = "resize", projector: str = "mlp_downsample", seed: int = 0, **changes):
    """Wild enough that its greedy answers differ from prompt to prompt."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NVILA(config(mode, projector, **changes), tokenizer(), processor())
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=1.2 / weight[0].numel() ** 0.5)
    return model


@cache
def shared(mode: str = "resize", projector: str = "mlp_downsample", **changes) -> NVILA:
    """Not to be changed."""
    return nvila(mode, projector, **changes)
