"""What NVILA is made of, under its published name: language model, tower and projector.

Paper: https://arxiv.org/abs/2412.04468.
Sources: VILA:llava/model/llava_arch.py, llm-awq:tinychat/models/nvila/llava_arch.py.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from . import nvila_checkpoint
from .checkpoint import Progress
from .chessboard import merge_chessboard, merge_features_for_dynamic_s2, split_chessboard
from .images import ImageProcessor
from .nvila_checkpoint import NVILAConfig, parse_scales
from .nvila_encoders import SiglipTower, build_encoder
from .projectors import Projector, build_projector
from .tiling import Size
from .tokenization import IMAGE_TOKEN

MEDIA_TOKENS = {"image": IMAGE_TOKEN, "video": "<vila/video>"}
"""Placeholders in prompts. Their ids are the tokenizer's, and differ between checkpoints."""

CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The template that checkpoints call "qwen2"; its system prompt has no period."""


class LlavaMetaModel:
    """Qwen2 with a SigLIP tower and a projector.

    llm           Qwen2ForCausalLM
    vision_tower  SiglipTower
    mm_projector  Projector
    encoders      {"image", "video"}: what stands around the features, see `vlmlib.nvila_encoders`
    """

    config: NVILAConfig | None = None

    def init_vlm(
        self,
        config: NVILAConfig,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: ImageProcessor,
        llm: Qwen2ForCausalLM | None = None,
        vision_tower: SiglipTower | SiglipVisionModel | None = None,
        mm_projector: Projector | None = None,
    ) -> None:
        """Put the parts together; those not given are made from `config`, with fresh weights.

        Media tokens that the tokenizer lacks are added to it. Raises CheckpointError, ShapeError.
        """
        self.config = replace(config)  # `post_config` writes into it
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.llm = (llm or Qwen2ForCausalLM(Qwen2Config(**config.llm_cfg))).eval()
        tower = vision_tower or SiglipVisionModel(_headless(config.vision_tower_cfg))
        if not isinstance(tower, SiglipTower):
            tower = nvila_checkpoint.wrap_tower(tower, config)
        self.vision_tower = tower.eval()
        if mm_projector is None:
            kind = config.mm_projector_cfg["mm_projector_type"]
            mm_projector = build_projector(kind, tower.hidden_size, self.llm.config.hidden_size)
        self.mm_projector = mm_projector.eval()
        self.encoders = {
            "image": build_encoder("image", config.image_encoder),
            "video": build_encoder("video", config.video_encoder),
        }
        tokenizer.add_tokens(list(MEDIA_TOKENS.values()), special_tokens=True)
        self.media_token_ids = {
            kind: tokenizer.convert_tokens_to_ids(token) for kind, token in MEDIA_TOKENS.items()
        }
        self.chat_template = _template(config, tokenizer)
        self.post_config()

    def post_config(self) -> None:
        """The configuration tells what the parts are, not what a file once said."""
        self.config.llm_cfg = nvila_checkpoint.llm_config(self.llm)
        self.config.vision_tower_cfg = nvila_checkpoint.tower_config(self.vision_tower)
        self.config.mm_projector_cfg = nvila_checkpoint.projector_config(self.mm_projector)

    @classmethod
    def load_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        progress: Progress | None = None,
    ):
        """A model from its folder, parameters as of `vlmlib.load`. Raises CheckpointError."""
        parts = nvila_checkpoint.load_parts(Path(folder), device, dtype, progress)
        model = cls.__new__(cls)
        model.origin = parts.pop("origin")
        model.init_vlm(**parts)
        return model

    def save_pretrained(self, output_dir: str | os.PathLike) -> None:
        """Write the folder that `load_pretrained` reads."""
        folder, tokenizer = Path(output_dir), copy.copy(self.tokenizer)
        if own := self.chat_template != _template(self.config, tokenizer):
            tokenizer.chat_template = self.chat_template or tokenizer.chat_template
        nvila_checkpoint.save_llm(folder / "llm", self.llm, tokenizer)
        tower = folder / "vision_tower"
        nvila_checkpoint.save_tower(tower, self.vision_tower, self.image_processor)
        nvila_checkpoint.save_projector(folder / "mm_projector", self.mm_projector)
        self.post_config()
        config = replace(self.config, chat_template=None) if own else self.config
        nvila_checkpoint.save_config(folder, config)

    def get_llm(self) -> Qwen2ForCausalLM:
        return self.llm

    def get_lm_head(self) -> torch.nn.Module:
        return self.get_llm().lm_head

    def get_vision_tower(self) -> SiglipTower:
        return self.vision_tower

    def get_mm_projector(self) -> Projector:
        return self.mm_projector

    split_chessboard = staticmethod(split_chessboard)
    merge_chessboard = staticmethod(merge_chessboard)

    def merge_features_for_dynamic_s2(
        self, image_features: Tensor, block_sizes: Sequence[Size | None]
    ) -> tuple[list[Tensor], list[Size]]:
        """The function of this name, with the scales of the tower."""
        scales, at = _s2(self.get_vision_tower(), self.config)
        return merge_features_for_dynamic_s2(image_features, block_sizes, scales, at)

    def encode_images(
        self, images: Tensor, block_sizes: Sequence[Size | None] | None = None
    ) -> list[Tensor]:
        """(t, 3, h, w) tiles of all pictures -> one (n_i, d) tensor a picture.

        block_sizes   of every picture: (rows, cols) of the tiles of its last scale, or None for a
                      picture of one tile; without dynamic S2 every tile is a picture

        The projector sees a picture in pieces of a tile's size, whatever the picture's own.
        """
        return self.project_features(self.get_vision_tower()(images), block_sizes)

    def project_features(
        self, features: Tensor, block_sizes: Sequence[Size | None] | None = None
    ) -> list[Tensor]:
        """(t, p, c) features of the tower for the tiles of all pictures, as `encode_images`."""
        tower, projector = self.get_vision_tower(), self.get_mm_projector()
        scales, at = _s2(tower, getattr(self, "config", None))
        if not scales:
            return list(projector(features))
        blocks = [None] * len(features) if block_sizes is None else block_sizes
        maps, blocks = merge_features_for_dynamic_s2(features, blocks, scales, at)
        pieces = [split_chessboard(m, *b) for m, b in zip(maps, blocks, strict=True)]
        x = rearrange(torch.cat(pieces), "t c h w -> t (h w) c")
        projected = projector(x).split([len(p) for p in pieces])
        maps = [merge_chessboard(p, *b) for p, b in zip(projected, blocks, strict=True)]
        return [rearrange(m, "1 d h w -> (h w) d") for m in maps]


def _s2(tower: Any, config: Any) -> tuple[list[int], int]:
    """Scales and the number of the one that all are brought to: the tower's, or else those of the
    configuration; no scales without dynamic S2.
    """
    if scales := getattr(tower, "scales", None):
        return list(scales), getattr(tower, "resize_output_to_scale_idx", 0)
    if getattr(config, "dynamic_s2", False):
        return parse_scales(config.s2_scales), config.s2_resize_output_to_scale_idx
    return [], 0


def _template(config: NVILAConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template in place of the tokenizer's own, as a checkpoint asks for it."""
    return CHAT_TEMPLATE if config.chat_template or not tokenizer.chat_template else None


def _headless(config: Mapping[str, Any]) -> SiglipVisionConfig:
    return SiglipVisionConfig(**{**config, "vision_use_head": False})
