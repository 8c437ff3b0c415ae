"""InternVL3: what it adds to `vlmlib.model`, and its stream generator.

A picture becomes up to twelve tiles and, as the last one, the whole of it. The features of the
tower's last layer, without the class token, are folded two by two patches into one and projected:
256 positions a tile. In the prompt they stand between `<img>` and `</img>`. The frames of a clip
are pictures of one tile, each announced by its number.
Paper: https://arxiv.org/abs/2504.10479.
Sources: InternVL:internvl_chat/internvl/model/internvl_chat, llm-awq:tinychat/models/internvl3.py.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isqrt
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from transformers import InternVLForConditionalGeneration
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .cache import KVCache
from .chessboard import pixel_shuffle, square_side
from .decoding import Chunk
from .errors import PlaceholderError, ShapeError
from .images import ImageProcessor, ImageSource, load_image
from .media import Medium, Video, check_kinds
from .model import Media, VisionLanguageModel, check_pixels, end_of_answer_ids, one_of
from .sampling import GenParams
from .tiling import dynamic_preprocess, dynamic_regions, patch_boxes
from .tokenization import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    check_placeholders,
    tokenizer_image_token,
)
from .video import get_index

IMG_START_TOKEN = "<img>"
IMG_END_TOKEN = "</img>"
IMG_CONTEXT_TOKEN = "<IMG_CONTEXT>"
NUM_IMAGE_TOKEN = 256
"""Positions of a tile in the published models; `InternVL.tokens_per_tile` is a model's own."""

NUM_FRAMES = 8
"""Frames of a clip that are looked at, unless the clip says otherwise."""

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"

SYSTEM_MESSAGE = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
    "多模态大语言模型。"
)
_CONVERSATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<{{ part.type }}>\n{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_TEMPLATES = {
    "internvl2_5": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\n"
        + SYSTEM_MESSAGE
        + "<|im_end|>\n{% endif %}"
        + _CONVERSATION
    ),
    "hf": _CONVERSATION,
}
"""Prompts of the original checkpoints, with their system message, and of the -hf ones, without:
`model.chat_template = CHAT_TEMPLATES["internvl2_5"]` chooses. Source: InternVL:conversation.py."""

_SLOT = IMG_START_TOKEN + IMG_CONTEXT_TOKEN + IMG_END_TOKEN  # one, whatever its length
_PLACEHOLDER = re.compile(
    rf"(?P<video>{VIDEO_TOKEN})|(?P<frame>Frame\d+: )?(?:{IMAGE_TOKEN}|{IMG_CONTEXT_TOKEN}"
    rf"|{IMG_START_TOKEN}(?P<run>(?:{IMG_CONTEXT_TOKEN})+){IMG_END_TOKEN})"
)


class InternVL(VisionLanguageModel):
    """InternVL3 around transformers' InternVLForConditionalGeneration.

    image_processor  its mean, deviation and numbers of tiles are used; None: ImageNet's, 1 to 12
    chat_template    see CHAT_TEMPLATES; the tokenizer's own if it has one
    """

    family = "internvl"
    image_processor_type = "GotOcr2ImageProcessor"
    net: InternVLForConditionalGeneration

    def __init__(self, net, tokenizer, image_processor: ImageProcessor | None = None):
        if image_processor is None:
            side = tile_pixels(net.config)
            colours = map(tuple, (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
            image_processor = ImageProcessor(None, side, side, *colours)
        super().__init__(net, tokenizer, replace(image_processor, shortest_edge=None))
        if not tokenizer.chat_template:
            self.chat_template = CHAT_TEMPLATES["internvl2_5"]

    @property
    def image_size(self) -> int:
        """Pixels along a side of a tile."""
        return tile_pixels(self.config)

    @property
    def tokens_per_tile(self) -> int:
        """Positions that a tile takes."""
        return tokens_per_tile(self.config)

    @property
    def stop_token_ids(self) -> list[int]:
        end = self.tokenizer.get_vocab().get(TURN_END)
        return end_of_answer_ids(self.net, self.tokenizer, [] if end is None else [end])

    def processor_config(self) -> dict[str, Any]:
        p = self.image_processor
        tiles = {"min_patches": p.min_patches, "max_patches": p.max_patches}
        return super().processor_config() | tiles | {"crop_to_patches": True}

    def prepare(self, sources: Sequence[ImageSource | Video]) -> list[Medium]:
        return [self._clip(s) if isinstance(s, Video) else self._picture(s) for s in sources]

    def _picture(self, source: ImageSource) -> Medium:
        p, image = self.image_processor, load_image(source)
        numbers = (p.min_patches, p.max_patches, self.image_size)
        tiles = dynamic_preprocess(image, *numbers, use_thumbnail=True)
        regions = dynamic_regions(*image.size, *numbers, use_thumbnail=True)
        return replace(self.medium(self._pixels(tiles)), regions=regions)

    def _clip(self, video: Video) -> Medium:
        frames = video.frames(partial(frame_indices, video))
        tiles = sum((dynamic_preprocess(f, 1, 1, self.image_size) for f in frames), [])
        regions = patch_boxes(1, 1).repeat(len(tiles), 1)
        return replace(self.medium(self._pixels(tiles), "video"), regions=regions)

    def _pixels(self, tiles: Sequence[Image.Image]) -> Tensor:
        """(t, 3, h, w)"""
        return torch.stack([self.image_processor.pixels(tile) for tile in tiles])

    def boxes(self, medium: Medium) -> Tensor:
        side = isqrt(self.tokens_per_tile)
        return patch_boxes(side, side, medium.shown).flatten(0, 1)

    def medium(self, pixels: Tensor, kind: str = "image") -> Medium:
        check_pixels(pixels, self.image_size)
        return Medium(pixels, len(pixels) * self.tokens_per_tile, kind)

    def as_media(self, media: Media | Mapping[str, Sequence[Tensor | Medium]]) -> list[Medium]:
        """Media as they are; of pixel values (t, 3, h, w) one picture of t tiles, or of {"image":
        [...], "video": [...]} all pictures, then all clips, each (t, 3, h, w). Raises ShapeError.
        """
        if isinstance(media, Tensor) and media.dim() == 4:
            media = [media]
        if not isinstance(media, Mapping):
            return super().as_media(media)
        check_kinds(media)
        clips = [replace(m, kind="video") for m in self.as_media(media.get("video"))]
        return [*self.as_media(media.get("image")), *clips]

    def tower_features(self, pixels: Tensor) -> Tensor:
        layer = self.config.vision_feature_layer
        out = self.net.model.vision_tower(
            pixel_values=pixels.to(self.device, self.dtype), output_hidden_states=layer != -1
        )
        x = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        default = self.config.vision_feature_select_strategy == "default"
        return x[:, 1:] if default else x  # without the class token

    def encoder_settings(self) -> tuple[Hashable, ...]:
        config, strategy = self.config, self.config.vision_feature_select_strategy
        return str(config.vision_feature_layer), strategy, config.downsample_ratio

    def project(self, features: Tensor, medium: Medium) -> Tensor:
        x = rearrange(features, "t (w h) c -> t w h c", w=square_side(features.shape[1]))
        x = rearrange(pixel_shuffle(x, self.config.downsample_ratio), "t w h c -> t (w h) c")
        return self.net.model.multi_modal_projector(x).flatten(0, 1)

    def prompt_ids(self, prompt: str) -> list[int]:
        """`<img>`, IMAGE_TOKEN_INDEX, `</img>` for every `<image>`; a clip's frames have theirs."""
        slot = IMG_START_TOKEN + IMAGE_TOKEN + IMG_END_TOKEN
        whole = _PLACEHOLDER.sub(
            lambda m: m[0] if m["video"] else (m["frame"] or "") + slot, prompt
        )
        return tokenizer_image_token(whole, self.tokenizer)

    def read(self, prompt: str, media: Media) -> tuple[list[int], list[Medium]]:
        """As for every model; media take the prompt's placeholders as `place_media` says."""
        prompt, media = place_media(prompt, self.as_media(media))
        return self.prompt_ids(prompt), media


def frame_indices(video: Video, n: int, fps: float) -> list[int]:
    """Which of a clip's n frames to look at: by default NUM_FRAMES of a file, and all of a list.

    A list of as many frames as are wanted is taken as it is; the middles of its parts would give
    one frame twice, and the last one never.
    """
    if not video.is_file and video.num_frames in (None, n):
        return list(range(n))
    num = NUM_FRAMES if video.num_frames is None else video.num_frames
    return get_index(video.bound, fps, n - 1, num_segments=num)


def tile_pixels(config) -> int:
    """Pixels along a side of a tile."""
    return _side(config.vision_config.image_size)


def tokens_per_tile(config) -> int:
    """Positions that a tile takes."""
    patches = tile_pixels(config) // _side(config.vision_config.patch_size)
    return round((patches * config.downsample_ratio) ** 2)


def _side(size: int | Sequence[int]) -> int:
    """Configurations have one number, or (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ShapeError(f"tiles and patches must be squares, got {height} x {width}")
    return height


def place_media(prompt: str, media: Sequence[Medium]) -> tuple[str, list[Medium]]:
    """Give every placeholder its medium -> (prompt, media), one placeholder a picture or frame.

    The k-th `<image>` is the k-th picture, the k-th `<video>` the k-th clip: a line
    `Frame1: <image>` for each of its frames. These lines may also be in the prompt already.
    `<IMG_CONTEXT>` (-hf prompts), also repeated between `<img>` and `</img>`, means `<image>`. If
    a prompt has no placeholder at all, its media open its first user turn, each on a line.
    Raises PlaceholderError that names both numbers.
    """
    found = list(_PLACEHOLDER.finditer(prompt))
    if media and not found:
        return place_media(_opened_with(prompt, media), media)
    groups = _assign(found, media)
    texts = iter([_written(match, group) for match, group in zip(found, groups, strict=True)])
    return _PLACEHOLDER.sub(lambda _: next(texts), prompt), sum(groups, [])


def _opened_with(prompt: str, media: Sequence[Medium]) -> str:
    """Placeholders at the start of the first user turn, or of a prompt that has no turns."""
    user = f"{TURN_START}user\n"
    at = prompt.find(user) + len(user) if user in prompt else 0
    lines = [f"{VIDEO_TOKEN if m.kind == 'video' else IMAGE_TOKEN}\n" for m in media]
    return prompt[:at] + "".join(lines) + prompt[at:]


def _assign(found: Sequence[re.Match], media: Sequence[Medium]) -> list[list[Medium]]:
    """For every placeholder its picture, or the frames of its clip."""
    pictures = [[m] for m in media if m.kind != "video"]
    clips = [_frames(m) for m in media if m.kind == "video"]
    of_clip, what = [bool(m["video"]) for m in found], "video"
    if clips and not any(of_clip) and (not pictures or any(m["frame"] for m in found)):
        clips = [[frame] for clip in clips for frame in clip]  # the prompt has a line for each
        of_clip, what = [bool(m["frame"]) or not pictures for m in found], "image"
    check_placeholders(of_clip.count(False), len(pictures))
    check_placeholders(of_clip.count(True), len(clips), what)
    pools = {False: iter(pictures), True: iter(clips)}
    return [next(pools[is_clip]) for is_clip in of_clip]


def _frames(clip: Medium) -> list[Medium]:
    t = len(clip.pixels)
    shown = [None] * t if clip.regions is None else clip.regions.split(1)
    frames = zip(clip.pixels.split(1), shown, strict=True)
    return [Medium(p, clip.length // t, "video", regions=region) for p, region in frames]


def _written(match: re.Match, group: Sequence[Medium]) -> str:
    """The text that takes the place of one placeholder."""
    if match["video"]:
        return "\n".join(f"Frame{i}: {_SLOT}" for i in range(1, len(group) + 1))
    run = (match["run"] or "").count(IMG_CONTEXT_TOKEN)
    if run > 1 and run != group[0].length:
        raise PlaceholderError(
            f"the prompt has {run} {IMG_CONTEXT_TOKEN} where a picture of {len(group[0].pixels)} "
            f"tile(s) takes {group[0].length} positions; <image> takes as many as needed"
        )
    return (match["frame"] or "") + _SLOT


def InternVLStreamGenerator(
    model: InternVL,
    gen_params: GenParams | Any,
    input: str,
    media: Media | Mapping[str, Sequence[Tensor | Medium]] = None,
    media_cfg: Any = None,
    start_pos: int = 0,
    device: str | torch.device | None = None,
    stream_interval: int = 2,
    echo: bool = False,
    stop_token_ids: Sequence[int] = (),
    image_tensor: Media = None,
    chunk_prefilling: bool = False,
    quant_llm: bool = False,
    *,
    cache: KVCache | None = None,
    lstrip: bool = False,
    trace: int | None = None,
) -> Iterator[Chunk]:
    """Stream the answer to `input`, a prompt with a placeholder for every picture and clip.

    gen_params     GenParams, or a mapping or object with its names
    media          from `model.prepare`, or pixel values as a list or a mapping, see `as_media`;
                   `place_media` tells which placeholder is whose
    media_cfg      TinyChat's; not used, since every medium knows its own tiles
    start_pos      how many positions of `cache` may be kept; `input` is always the whole transcript
    device         must be the model's own, which is also the default
    echo           begin `text` with the prompt
    stop_token_ids ids that end the answer, besides the model's own
    image_tensor   another name for `media`; only one of both may be given
    chunk_prefilling  feed only what `cache` does not hold; False feeds the whole transcript again
    quant_llm      True: the four-bit weights of a model that holds them beside others, as its
                   `quantized`; a model that holds one kind runs with that for both values
    cache, lstrip, trace   see `VisionLanguageModel.turn` and `vlmlib.decoding.decode`

    Returns an iterator of chunks (`vlmlib.decoding.decode` tells their fields). The prompt, media
    and parameters are checked at the call, before anything is computed.
    Source: llm-awq:tinychat/stream_generators/internvl_stream_gen.py.
    """
    return model.choose_weights(quant_llm).stream_prompt(
        input,
        one_of(media, image_tensor),
        gen_params,
        start_pos=start_pos,
        chunk_prefilling=chunk_prefilling,
        cache=cache,
        echo=echo,
        device=device,
        stop_token_ids=stop_token_ids,
        stream_interval=stream_interval,
        lstrip=lstrip,
        trace=trace,
    )
