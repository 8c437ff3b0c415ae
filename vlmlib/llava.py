"""LLaVA: what it adds to `vlmlib.model`, and its stream generator.

A CLIP tower cuts the picture into patches; the features of its last layer but one, without the
class token, pass through a two-layer projector and stand in the prompt where `<image>` stood.
Paper: https://arxiv.org/abs/2310.03744.
Sources: LLaVA:llava/model, llm-awq:tinychat/stream_generators.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration, PreTrainedModel

from .cache import KVCache
from .decoding import Chunk, Turn, decode
from .errors import CacheError, DeviceError
from .images import ImageSource, process_images
from .model import VisionLanguageModel, end_of_answer_ids, stack_images
from .sampling import GenParams
from .tokenization import (
    IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
    check_placeholders,
    tokenizer_image_token,
)


class Llava(VisionLanguageModel):
    """LLaVA-1.5 around transformers' LlavaForConditionalGeneration."""

    family = "llava"
    net: LlavaForConditionalGeneration

    def prepare_images(self, images: Sequence[ImageSource]) -> Tensor:
        return process_images(images, self.image_processor, self.config)

    def encode_images(self, pixel_values: Tensor) -> list[Tensor]:
        """(b, 3, h, w) -> b tensors (n, d): tower, the configured layer, projector."""
        return list(self.net.get_image_features(pixel_values=pixel_values).pooler_output)

    def image_lengths(self, pixel_values: Tensor) -> list[int]:
        return [image_tokens(self.config, *pixel_values.shape[-2:])] * len(pixel_values)

    def prompt_ids(self, prompt: str) -> list[int]:
        return prompt_ids(prompt, self.tokenizer)


def image_tokens(config, height: int, width: int) -> int:
    """Positions of one (3, height, width) input: its patches, and the class token if kept."""
    vision = config.vision_config
    patches = (height // vision.patch_size) * (width // vision.patch_size)
    class_token = vision.model_type.startswith("clip")
    dropped = config.vision_feature_select_strategy == "default"
    return patches + class_token - dropped


def prompt_ids(prompt: str, tokenizer) -> list[int]:
    """Ids with IMAGE_TOKEN_INDEX for pictures, in the way of the tokenizer's own flavour.

    A tokenizer that has `<image>` in its vocabulary (-hf checkpoints) takes the prompt in one
    piece, one that has not (the original checkpoints) takes it piece by piece.
    """
    image_id = tokenizer.get_vocab().get(IMAGE_TOKEN)
    if image_id is None:
        return tokenizer_image_token(prompt, tokenizer)
    return [IMAGE_TOKEN_INDEX if i == image_id else i for i in tokenizer(prompt).input_ids]


def transformers_turn(
    net: LlavaForConditionalGeneration,
    tokenizer,
    prompt: str,
    image_tensor: Tensor | Sequence[Tensor] | None,
) -> Turn:
    """A turn of any LlavaForConditionalGeneration through its public `forward`: pictures with the
    prompt, then one id at a time through `past_key_values`.
    """
    pixels = stack_images(image_tensor)
    ids = prompt_ids(prompt, tokenizer)
    check_placeholders(ids.count(IMAGE_TOKEN_INDEX), 0 if pixels is None else len(pixels))
    n = 0 if pixels is None else image_tokens(net.config, *pixels.shape[-2:])
    runs = [[net.config.image_token_id] * n if i == IMAGE_TOKEN_INDEX else [i] for i in ids]
    input_ids = torch.tensor([sum(runs, [])], device=net.device)
    past = DynamicCache(config=net.config.get_text_config(decoder=True))

    def feed(ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        out = net(
            input_ids=ids,
            pixel_values=pixel_values,
            past_key_values=past,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    return Turn(
        prefill=lambda: feed(
            input_ids, None if pixels is None else pixels.to(net.device, net.dtype)
        ),
        step=feed,
        text_ids=[i for i in ids if i != IMAGE_TOKEN_INDEX],
        prompt_tokens=input_ids.shape[1],
        context_len=net.config.get_text_config(decoder=True).max_position_embeddings,
        device=net.device,
    )


def LlavaStreamGenerator(
    model: Llava | LlavaForConditionalGeneration,
    tokenizer,
    input: str,
    start_pos: int,
    gen_params: GenParams | Any,
    device: str | torch.device | None = None,
    stream_interval: int = 1,
    echo: bool = False,
    stop_token_ids: Sequence[int] = (),
    image_tensor: Tensor | Sequence[Tensor] | None = None,
    chunk_prefilling: bool = False,
    *,
    cache: KVCache | None = None,
    lstrip: bool = False,
    trace: int | None = None,
) -> Iterator[Chunk]:
    """Stream the answer to `input`, a prompt with one `<image>` for every picture.

    model          a vlmlib model, driven by `start_pos`; or any LlavaForConditionalGeneration of
                   transformers, driven through its `past_key_values`
    start_pos      how many positions of `cache` may be kept; `input` is always the whole transcript
    gen_params     GenParams, or a mapping or object with its names
    device         must be the model's own, which is also the default
    echo           begin `text` with the prompt
    stop_token_ids ids that end the answer, besides the model's own
    image_tensor   (b, 3, h, w) pixel values, or a list of them
    chunk_prefilling  feed only what `cache` does not hold; False feeds the whole transcript again
    cache, lstrip, trace   see `VisionLanguageModel.turn` and `vlmlib.decoding.decode`

    Returns an iterator of chunks (`vlmlib.decoding.decode` tells their fields). The prompt,
    pictures and parameters are checked at the call, before anything is computed.
    Source: llm-awq:tinychat/stream_generators/llava_stream_gen.py.
    """
    params = GenParams.of(gen_params)
    check_device(device, model.device)
    if isinstance(model, PreTrainedModel):
        if start_pos:
            raise CacheError(
                f"start_pos is {start_pos}: a transformers model starts at 0, load it with "
                "vlmlib.load to continue a conversation"
            )
        net, turn = model, transformers_turn(model, tokenizer, input, image_tensor)
    else:
        keep = start_pos if chunk_prefilling else 0
        net, turn = model.net, model.turn(input, image_tensor, start_pos=keep, cache=cache)
    return decode(
        turn,
        tokenizer,
        params,
        stop_ids=end_of_answer_ids(net, tokenizer, stop_token_ids),
        stream_interval=stream_interval,
        prefix=input if echo else "",
        lstrip=lstrip,
        trace=trace,
    )


def check_device(wanted: str | torch.device | None, own: torch.device) -> None:
    """Nothing is moved behind the caller's back: another device than the model's is an error."""
    if wanted is None:
        return
    device = torch.device(wanted)
    if device.type != own.type or (device.index or 0) != (own.index or 0):
        raise DeviceError(f"device is {device}, but the model is on {own}: move one of them")
