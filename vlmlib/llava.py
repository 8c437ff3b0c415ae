"""LLaVA: what it adds to `vlmlib.model`, and its stream generator.

A CLIP tower cuts the picture into patches; the features of its last layer but one, without the
class token, pass through a two-layer projector and stand in the prompt where `<image>` stood.
LLaVA-1.6 (`LlavaNext`) does that for several tiles of the picture.
Paper: https://arxiv.org/abs/2310.03744.
Sources: LLaVA:llava/model, llm-awq:tinychat/stream_generators.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from math import nan
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    DynamicCache,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

from .cache import KVCache
from .conversation import Conversation
from .decoding import Chunk, Turn
from .errors import CacheError, CheckpointError, ImageError, PromptError, ShapeError, VideoError
from .fusion import prepare_inputs_labels_for_multimodal
from .images import ImageSource, load_image, pad_to_square
from .media import Medium, Video
from .model import (
    Media,
    Part,
    VisionLanguageModel,
    answer_turn,
    check_ids,
    check_pixels,
    end_of_answer_ids,
)
from .sampling import GenParams
from .tiling import (
    Size,
    anyres_boxes,
    anyres_tiles,
    anyres_tokens,
    get_anyres_image_grid_shape,
    merge_anyres,
    patch_boxes,
)
from .tokenization import (
    IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
    check_placeholders,
    check_text,
    tokenizer_image_token,
)


class Llava(VisionLanguageModel):
    """LLaVA-1.5 around transformers' LlavaForConditionalGeneration.

    conversation  the prompts of an original checkpoint; None: the tokenizer's chat template
    """

    family = "llava"
    image_processor_type = "CLIPImageProcessor"
    net: LlavaForConditionalGeneration
    conversation: Conversation | None = None

    prepare_inputs_labels_for_multimodal = prepare_inputs_labels_for_multimodal

    def prepare_images(self, images: Sequence[ImageSource]) -> Tensor | list[Tensor]:
        """Pictures -> (b, 3, h, w) as the checkpoint's preprocessing says."""
        return process_images(images, self.image_processor, self.config)

    def prepare(self, sources: Sequence[ImageSource]) -> list[Medium]:
        pictures = _loaded(sources)
        media = self.as_media(self.prepare_images(pictures) if pictures else None)
        padded = getattr(self.config, "image_aspect_ratio", None) == "pad"
        shown = replace(self.image_processor, do_pad=padded or self.image_processor.do_pad).region
        return [
            replace(m, regions=torch.tensor([shown(*p.size)]))
            for m, p in zip(media, pictures, strict=True)
        ]

    def boxes(self, medium: Medium) -> Tensor:
        patch = self.config.vision_config.patch_size
        rows, cols = (side // patch for side in medium.pixels.shape[-2:])
        (grid,) = patch_boxes(rows, cols, medium.shown)
        return torch.cat([torch.full((medium.length - len(grid), 4), nan), grid])

    def medium(self, pixels: Tensor) -> Medium:
        check_pixels(pixels, self.config.vision_config.image_size)
        length = len(pixels) * input_tokens(self.config, *pixels.shape[-2:])
        return Medium(pixels, length)

    def tower_features(self, pixels: Tensor) -> Tensor:
        net, config = self.net.model, self.config
        pixels = pixels.to(self.device, self.dtype)
        states = net.vision_tower(pixels, output_hidden_states=True).hidden_states
        layers = config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        x = torch.cat([states[layer] for layer in layers], dim=-1)
        default = config.vision_feature_select_strategy == "default"
        return x[:, 1:] if default else x  # without the class token

    def project(self, features: Tensor, medium: Medium) -> Tensor:
        return self.net.model.multi_modal_projector(features).flatten(0, 1)

    def encode_images(
        self, images: Media, image_sizes: Sequence[Size] | None = None
    ) -> list[Tensor]:
        """Pixel values of pictures -> one (n_i, d) tensor each; sizes are (width, height)."""
        if image_sizes is None:
            return super().encode_images(images)
        if len(images) != len(image_sizes):
            raise ShapeError(f"{len(images)} pictures, but {len(image_sizes)} image_sizes")
        return [
            self.encode(x if isinstance(x, Medium) else self.sized(x, size))
            for x, size in zip(images, image_sizes, strict=True)
        ]

    def sized(self, pixels: Tensor, size: Size) -> Medium:
        """(3, h, w) or (t, 3, h, w) of a picture that was `size` (width, height) -> a medium."""
        return self.medium(pixels if pixels.dim() == 4 else pixels[None])

    def encoder_settings(self) -> tuple[Hashable, ...]:
        config = self.config
        return str(config.vision_feature_layer), config.vision_feature_select_strategy

    def prompt_ids(self, prompt: str) -> list[int]:
        return prompt_ids(prompt, self.tokenizer)

    def conversation_prompt(self, messages: Sequence[tuple[str, Sequence[Part]]]) -> str:
        if self.conversation is None:
            return super().conversation_prompt(messages)
        talk = self.conversation.copy()
        for role, parts in messages:
            text = "".join(p.get("text", IMAGE_TOKEN + "\n") for p in self._content(parts))
            if role == "system":
                talk.set_system(text)
            elif role in ("user", "assistant"):
                talk.append_message(talk.roles[role == "assistant"], text)
            else:
                raise PromptError(f"a role must be system, user or assistant, got {role!r}")
        talk.append_message(talk.roles[1], None)
        return talk.get_prompt()

    def processor_config(self) -> dict[str, Any]:
        return super().processor_config() | {"do_pad": self.image_processor.do_pad}

    @property
    def stop_token_ids(self) -> list[int]:
        end = self.conversation and self.tokenizer.get_vocab().get(self.conversation.stop_str)
        return end_of_answer_ids(self.net, self.tokenizer, [] if end is None else [end])


class LlavaNext(Llava):
    """LLaVA-1.6 around transformers' LlavaNextForConditionalGeneration: anyres tiles.

    rounding  of padding, see `vlmlib.tiling.ROUNDING`: "original" for an original checkpoint
    """

    image_processor_type = "LlavaNextImageProcessor"
    net: LlavaNextForConditionalGeneration
    rounding: str = "hf"

    @property
    def pinpoints(self) -> list[Size]:
        """Sizes (width, height) that a picture may be fitted into."""
        return pinpoints(self.config)

    def encoder_settings(self) -> tuple[Hashable, ...]:
        return *super().encoder_settings(), str(self.pinpoints), self.rounding

    def processor_config(self) -> dict[str, Any]:
        pinpoints = {"image_grid_pinpoints": self.config.image_grid_pinpoints}
        return super().processor_config() | pinpoints

    def prepare(self, sources: Sequence[ImageSource]) -> list[Medium]:
        pictures = _loaded(sources)
        tiles = self.prepare_images(pictures) if pictures else []
        return [self.sized(t, p.size) for t, p in zip(tiles, pictures, strict=True)]

    def sized(self, pixels: Tensor, size: Size) -> Medium:
        """As `Llava.sized`. Raises ShapeError if these are not the tiles of such a picture."""
        vision = self.config.vision_config
        cols, rows = get_anyres_image_grid_shape(size, self.pinpoints, vision.image_size)
        if pixels.dim() != 4 or len(pixels) != 1 + rows * cols:
            raise ShapeError(
                f"a picture of {size[0]} x {size[1]} has 1 + {rows} x {cols} tiles, got pixels "
                f"{tuple(pixels.shape)}: prepare_images makes them"
            )
        check_pixels(pixels, vision.image_size)
        grid = (self.pinpoints, vision.image_size, vision.patch_size)
        return Medium(pixels, anyres_tokens(*size, *grid, rounding=self.rounding), size=tuple(size))

    def medium(self, pixels: Tensor) -> Medium:
        """Raises ShapeError: pixels alone do not tell the layout of the tiles."""
        raise ShapeError("LLaVA-1.6 needs the picture's size too: use prepare([picture]) or sized")

    def boxes(self, medium: Medium) -> Tensor:
        vision = self.config.vision_config
        grid = (self.pinpoints, vision.image_size, vision.patch_size)
        return anyres_boxes(*medium.size, *grid, rounding=self.rounding)

    def project(self, features: Tensor, medium: Medium) -> Tensor:
        vision = self.config.vision_config
        return merge_anyres(
            self.net.model.multi_modal_projector(features),
            medium.size,
            self.pinpoints,
            vision.image_size,
            vision.image_size // vision.patch_size,
            self.net.model.image_newline,
            rounding=self.rounding,
        )


def process_images(
    images: Sequence[ImageSource], image_processor, model_cfg=None
) -> Tensor | list[Tensor]:
    """Pictures -> (b, 3, h, w). `model_cfg.image_aspect_ratio` chooses how they meet the square:

    None, "square"  the processor alone: scale the shorter side, crop the centre (sides are lost)
    "pad"           first centre the whole picture on a square of the mean colour (LLaVA-1.5)
    "anyres"        tiles, by `model_cfg.image_grid_pinpoints` (width, height) (LLaVA-1.6): one
                    (t, 3, h, w) for each picture, in one tensor if all have as many tiles; also
                    for transformers' LlavaNextConfig, which lists (height, width)

    Raises ImageError. Source: LLaVA:llava/mm_utils.py.
    """
    is_next = getattr(model_cfg, "model_type", None) == "llava_next"
    mode = "anyres" if is_next else getattr(model_cfg, "image_aspect_ratio", None)
    if mode not in (None, "square", "pad", "anyres"):
        raise ValueError(
            f"image_aspect_ratio must be None, 'square', 'pad' or 'anyres', got {mode!r}"
        )
    pictures = [load_image(i) for i in images]
    if not pictures:
        raise ImageError("expected at least one picture, got none")
    if mode == "pad":
        colour = tuple(int(255 * m) for m in image_processor.image_mean)
        pictures = [pad_to_square(p, colour) for p in pictures]
    if mode != "anyres":
        return torch.cat([_pixels([p], image_processor) for p in pictures])
    tile = image_processor.crop_size["height"]
    sizes = pinpoints(model_cfg) if is_next else map(tuple, model_cfg.image_grid_pinpoints)
    sizes = list(sizes)
    tiled = [_pixels(anyres_tiles(p, sizes, tile), image_processor) for p in pictures]
    return torch.stack(tiled) if len({len(t) for t in tiled}) == 1 else tiled


def _pixels(pictures: Sequence[Image.Image], image_processor) -> Tensor:
    """(b, 3, h, w) from our ImageProcessor or one of transformers'."""
    batches = [image_processor.preprocess(p, return_tensors="pt")["pixel_values"] for p in pictures]
    return torch.cat([torch.as_tensor(batch) for batch in batches])


def input_tokens(config, height: int, width: int) -> int:
    """Positions of one (3, height, width) input: its patches, and the class token if kept."""
    vision = config.vision_config
    patches = (height // vision.patch_size) * (width // vision.patch_size)
    class_token = vision.model_type.startswith("clip")
    dropped = config.vision_feature_select_strategy == "default"
    return patches + class_token - dropped


def pinpoints(config) -> list[Size]:
    """Resolutions as (width, height); a configuration of LLaVA-1.6 has them the other way round."""
    return [(width, height) for height, width in config.image_grid_pinpoints]


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
    net: LlavaForConditionalGeneration, tokenizer, prompt: str, image_tensor: Media
) -> Turn:
    """A turn of any LlavaForConditionalGeneration through its public `forward`: pictures with the
    prompt, then one id at a time through `past_key_values`.
    """
    check_text(prompt)
    media = Llava(net, tokenizer, None).as_media(image_tensor)
    ids = prompt_ids(prompt, tokenizer)
    check_ids(ids, len(net.get_input_embeddings().weight))
    check_placeholders(ids.count(IMAGE_TOKEN_INDEX), len(media))
    lengths = iter(m.length for m in media)
    image_id = net.config.image_token_id
    runs = ([image_id] * next(lengths) if i == IMAGE_TOKEN_INDEX else [i] for i in ids)
    input_ids = torch.tensor([[*chain.from_iterable(runs)]], device=net.device)
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

    def prefill() -> Tensor:
        pixels = [m.pixels.to(net.device, net.dtype) for m in media]
        return feed(input_ids, torch.cat(pixels) if pixels else None)

    return Turn(
        prefill,
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
    image_tensor: Media = None,
    chunk_prefilling: bool = False,
    *,
    cache: KVCache | None = None,
    lstrip: bool = False,
    trace: int | None = None,
) -> Iterator[Chunk]:
    """Stream the answer to `input`, a prompt with one `<image>` for every picture.

    model          a vlmlib model, driven by `start_pos`; or any LlavaForConditionalGeneration of
                   transformers, driven through its `past_key_values`
    tokenizer      of a transformers model; a vlmlib model has its own, and that is used
    start_pos      how many positions of `cache` may be kept; `input` is always the whole transcript
    gen_params     GenParams, or a mapping or object with its names
    device         must be the model's own, which is also the default
    echo           begin `text` with the prompt
    stop_token_ids ids that end the answer, besides the model's own
    image_tensor   (b, 3, h, w) pixel values, or a list with one entry for every picture
    chunk_prefilling  feed only what `cache` does not hold; False feeds the whole transcript again,
                   as a transformers model always does
    cache, lstrip, trace   see `VisionLanguageModel.turn` and `vlmlib.decoding.decode`; a
                   transformers model takes no cache

    Returns an iterator of chunks (`vlmlib.decoding.decode` tells their fields). The prompt,
    pictures and parameters are checked at the call, before anything is computed.
    Source: llm-awq:tinychat/stream_generators/llava_stream_gen.py.
    """
    options = {
        "device": device,
        "stop_token_ids": stop_token_ids,
        "stream_interval": stream_interval,
        "lstrip": lstrip,
        "trace": trace,
    }
    if not isinstance(model, PreTrainedModel):
        return model.stream_prompt(
            input,
            image_tensor,
            gen_params,
            start_pos=start_pos,
            chunk_prefilling=chunk_prefilling,
            cache=cache,
            echo=echo,
            **options,
        )
    if not isinstance(model, LlavaForConditionalGeneration):
        raise CheckpointError(
            f"expected a vlmlib model or a LlavaForConditionalGeneration, got "
            f"{type(model).__name__}: load it with vlmlib.load"
        )
    if start_pos or cache is not None:
        raise CacheError(
            f"start_pos is {start_pos}: a transformers model starts at 0 and takes no cache, load "
            "it with vlmlib.load to continue a conversation"
        )
    turn = transformers_turn(model, tokenizer, input, image_tensor)
    prefix = input if echo else ""
    stop_ids = end_of_answer_ids(model, tokenizer)
    return answer_turn(turn, tokenizer, gen_params, stop_ids=stop_ids, prefix=prefix, **options)


def _loaded(sources: Sequence[ImageSource]) -> list[Image.Image]:
    if any(isinstance(source, Video) for source in sources):
        raise VideoError("LLaVA looks at pictures and at no clips: give it frames as pictures")
    return [load_image(source) for source in sources]
