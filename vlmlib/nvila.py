"""NVILA: what it adds to `vlmlib.model`, and its stream generator.

A picture is seen whole and, cut into tiles, in more detail. Either every tile has a placeholder in
the prompt (`dynamic`), or the features of several scales are laid over each other and the picture
has one (`dynamic_s2`). The frames of a clip are tiles too. transformers has no such model; the
language model and the tower are its Qwen2 and SigLIP.
Paper: https://arxiv.org/abs/2412.04468.
Sources: VILA:llava/model, llm-awq:tinychat/stream_generators/NVILA_stream_gen.py.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from . import nvila_checkpoint
from .cache import KVCache
from .decoding import Chunk
from .errors import ShapeError
from .images import ImageSource, load_image, pad_to_square
from .media import Medium, Video, check_kinds
from .model import Media, Part, VisionLanguageModel, end_of_answer_ids, one_of, sources_of
from .nvila_causal import LlavaMetaForCausalLM, expand_tiles, tiles_of
from .nvila_model import MEDIA_TOKENS, LlavaMetaModel
from .projectors import folded, projected_side
from .sampling import GenParams
from .tiling import (
    Size,
    dynamic_preprocess,
    dynamic_regions,
    dynamic_s2_preprocess,
    dynamic_tiles,
    patch_boxes,
    s2_grids,
)
from .tokenization import IMAGE_TOKEN_INDEX
from .video import span, uniform_indices

MediaByKind = Mapping[str, Sequence[Tensor | Medium]]


class NVILA(LlavaMetaModel, LlavaMetaForCausalLM, VisionLanguageModel):
    """Qwen2 that sees through SigLIP. `net` is the language model, with tower and projector beside
    it; the parameters are those of `LlavaMetaModel.init_vlm`.

    How a picture meets the square tiles is the configuration's image_aspect_ratio:

    "resize"      stretched to one tile
    "pad"         first centred on a square of the mean colour
    "dynamic"     cut into up to `max_tiles` tiles, and the whole of it as the last one
    "dynamic_s2"  cut at every one of `s2_scales`

    Only the one picture of a conversation is cut; where there are several, each is one stretched
    tile. Frames of a clip always are.
    """

    family = "nvila"
    image_processor_type = "SiglipImageProcessor"

    def __init__(self, config, tokenizer, image_processor, **parts):
        self.init_vlm(config, tokenizer, image_processor, **parts)

    @property
    def net(self) -> Qwen2ForCausalLM:
        return self.get_llm()

    @net.setter
    def net(self, llm: Qwen2ForCausalLM) -> None:
        self.llm, self.config, self._own_cache = llm, replace(self.config), None
        self.post_config()

    @property
    def stop_token_ids(self) -> list[int]:
        """Also the token with which the chat template ends an answer."""
        return end_of_answer_ids(self.net, self.tokenizer, self._turn_end_ids())

    def _turn_end_ids(self) -> list[int]:
        answer = "[the answer]"
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        text = self._written(messages)
        _, found, after = text.rpartition(answer)
        return self.tokenizer(after, add_special_tokens=False).input_ids[:1] if found else []

    @property
    def whole_net(self) -> nn.ModuleDict:
        return nvila_checkpoint.whole_net(self.llm, self.vision_tower.net, self.mm_projector)

    def save_pretrained(self, output_dir: str | os.PathLike) -> None:
        """In three folders, or in one if it came in one."""
        is_split = self.origin is None
        save = LlavaMetaModel.save_pretrained if is_split else VisionLanguageModel.save_pretrained
        save(self, output_dir)

    # ---- pictures and clips ----

    @property
    def tile_pixels(self) -> int:
        """Pixels along a side of a tile."""
        return self.image_processor.crop_height

    def tile_side(self, pixels: int) -> int:
        """Positions along a side of a tile of so many pixels, behind the projector."""
        patches = pixels // self.vision_tower.config.patch_size
        return projected_side(self.mm_projector.kind, patches)

    def mode(self, sources: Sequence[ImageSource | Video]) -> str | None:
        """image_aspect_ratio as it applies to the pictures of one conversation."""
        mode, pictures = self.config.image_aspect_ratio, _pictures(sources)
        if mode in ("dynamic", "dynamic_s2") and len(pictures) != 1:
            return "resize"
        return mode

    def prepare(self, sources: Sequence[ImageSource | Video]) -> list[Medium]:
        """Media in the order of `sources`; with "dynamic" one picture becomes one medium a tile."""
        mode, media = self.mode(sources), []
        for source in sources:
            clip = isinstance(source, Video)
            media += [self._clip(source)] if clip else self._picture(load_image(source), mode)
        return media

    def _picture(self, image: Image.Image, mode: str | None) -> list[Medium]:
        config, side = self.config, self.tile_pixels
        if mode == "dynamic":
            numbers = (config.min_tiles, config.max_tiles, side, True)
            tiles = dynamic_preprocess(image, *numbers)
            regions = dynamic_regions(*image.size, *numbers).split(1)
            return [
                replace(self.medium(self._pixels([tile])), regions=region)
                for tile, region in zip(tiles, regions, strict=True)
            ]
        if mode == "dynamic_s2":
            tiles, block = dynamic_s2_preprocess(image, config.scales, config.max_tiles, side)
            regions = torch.cat([patch_boxes(*grid) for grid in s2_grids(block, config.scales)])
            return [replace(self.medium(self._pixels(tiles), block=block), regions=regions)]
        return [replace(self.medium(self._pixels([image])), regions=self._shown(image))]

    def _shown(self, picture: Image.Image) -> Tensor:
        """(1, 4): the region of the one tile that a picture is stretched to."""
        if self.config.image_aspect_ratio != "pad":
            return patch_boxes(1, 1)
        return torch.tensor([replace(self.image_processor, do_pad=True).region(*picture.size)])

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures -> (t, 3, h, w), each stretched to a tile; "pad" first makes it a square."""
        processor, size = self.image_processor, (self.tile_pixels, self.tile_pixels)
        if self.config.image_aspect_ratio == "pad":
            images = [pad_to_square(image, processor.background) for image in images]
        tiles = [image.resize(size, processor.resample) for image in images]
        return torch.stack([processor.pixels(tile) for tile in tiles])

    def _clip(self, video: Video) -> Medium:
        num = self.config.num_video_frames if video.num_frames is None else video.num_frames
        frames = video.frames(partial(frame_indices, video, num))
        pictures = [load_image(frame) for frame in frames]
        regions = torch.cat([self._shown(picture) for picture in pictures])
        return replace(self.medium(self._pixels(pictures), "video"), regions=regions)

    def medium(self, pixels: Tensor, kind: str = "image", block: Size | None = None) -> Medium:
        """(t, 3, h, w) of a clip's frames; of a picture's one tile; or with `block`, of the tiles
        of all its scales. Raises ShapeError.
        """
        if pixels.dim() != 4 or pixels.shape[1] != 3 or pixels.shape[2] != pixels.shape[3]:
            raise ShapeError(f"expected (t, 3, h, w) pixels of squares, got {tuple(pixels.shape)}")
        if kind == "image" and len(pixels) != self._tiles_in(block):
            raise ShapeError(
                f"{len(pixels)} tiles, but a picture with block {block} has {self._tiles_in(block)}"
            )
        length = self.encoders[kind].length(self, pixels, block)
        return Medium(pixels, length, kind, block=block)

    def _tiles_in(self, block: Size | None) -> int:
        grids = [(1, 1)] if block is None else s2_grids(block, self.vision_tower.scales)
        return sum(rows * cols for rows, cols in grids)

    def as_media(self, media: Media | MediaByKind, media_cfg: Any = None) -> list[Medium]:
        """Media as they are; or of pixel values by kind, {"image": [...], "video": [...]}, with
        media_cfg as `prepare_media` makes it. Raises ShapeError.
        """
        if not isinstance(media, Mapping):
            media = {"image": [media] if isinstance(media, Medium) else media}
        check_kinds(media)
        blocks = ((media_cfg or {}).get("image") or {}).get("block_sizes")
        clips = [self._as_clip(clip) for clip in media.get("video") or ()]
        return [*self._as_pictures(media.get("image"), blocks), *clips]

    def _as_clip(self, clip: Tensor | Medium) -> Medium:
        return clip if isinstance(clip, Medium) else self.medium(clip, "video")

    def _as_pictures(self, tiles: Media, blocks: Sequence[Size | None] | None) -> list[Medium]:
        if tiles is None or not blocks or any(isinstance(tile, Medium) for tile in tiles):
            return super().as_media(tiles)
        blocks = [block and tuple(block) for block in blocks]  # JSON has no tuples
        counts = [self._tiles_in(block) for block in blocks]
        if sum(counts) != len(tiles):
            raise ShapeError(f"{len(tiles)} tiles, but block_sizes {blocks} need {counts}")
        if len(shapes := {tuple(tile.shape) for tile in tiles}) > 1:
            raise ShapeError(f"the tiles must be of one size, got {sorted(shapes)}")
        groups = torch.stack(list(tiles)).split(counts)
        return [self.medium(t, block=b) for t, b in zip(groups, blocks, strict=True)]

    def tower_features(self, pixels: Tensor) -> Tensor:
        return self.vision_tower(pixels)

    def project(self, features: Tensor, medium: Medium) -> Tensor:
        return self.encoders[medium.kind](self, features, medium)

    def encoder_settings(self) -> tuple[Hashable, ...]:
        tower = self.vision_tower
        encoders = ((type(e), str(vars(e))) for e in self.encoders.values())
        return tower.select_layer, str(tower.scales), tower.resize_output_to_scale_idx, *encoders

    def boxes(self, medium: Medium) -> Tensor:
        return self.encoders[medium.kind].boxes(self, medium)

    def tile_boxes(self, pixels: int, regions: Tensor, pool: Size = (1, 1)) -> Tensor:
        """(t, n, 4): what the n positions of each tile of so many pixels show, behind the projector
        and averaged over `pool` (rows, columns); regions (t, 4) are what the tiles show.
        """
        side, patches = self.tile_side(pixels), pixels // self.vision_tower.config.patch_size
        reach = side * folded(self.mm_projector.kind) / patches
        return patch_boxes(side // pool[0], side // pool[1], regions, reach)

    # ---- prompts ----

    def _content(self, parts: Sequence[Part]) -> str:
        """One text with placeholders."""
        content = super()._content(parts)
        return "".join(p.get("text", MEDIA_TOKENS.get(p["type"])) for p in content)

    def conversation_prompt(self, messages: Sequence[tuple[str, Sequence[Part]]]) -> str:
        prompt = super().conversation_prompt(messages)
        sources = sources_of(chain.from_iterable(parts for _, parts in messages))
        if self.mode(sources) != "dynamic":
            return prompt
        config = self.config
        (picture,) = _pictures(sources)
        numbers = (config.min_tiles, config.max_tiles, self.tile_pixels, True)
        return expand_tiles(prompt, dynamic_tiles(*load_image(picture).size, *numbers))

    def prompt_ids(self, prompt: str) -> list[int]:
        """The prompt in one piece; clips have IMAGE_TOKEN_INDEX too."""
        return self._with_placeholders(self.tokenizer(prompt).input_ids)

    def _with_placeholders(self, ids: Sequence[int]) -> list[int]:
        media = set(self.media_token_ids.values())
        return [IMAGE_TOKEN_INDEX if i in media else i for i in ids]

    def read(self, prompt: str, media: Media | MediaByKind) -> tuple[list[int], list[Medium]]:
        """As for every model; each placeholder takes the next medium of its own kind."""
        ids = self.tokenizer(prompt).input_ids
        return self._with_placeholders(ids), self.in_order([ids], self.as_media(media))


def frame_indices(video: Video, num: int, n: int, fps: float) -> list[int]:
    """`num` of a clip's n frames at equal distances, its first and its last included."""
    first, last = span(video.bound, fps, n - 1)
    return [first + i for i in uniform_indices(last - first + 1, num)]


def _pictures(sources: Sequence[ImageSource | Video]) -> list[ImageSource]:
    return [source for source in sources if not isinstance(source, Video)]


def NVILAStreamGenerator(
    model: NVILA,
    gen_params: GenParams | Any,
    input: str,
    media: Media | MediaByKind = None,
    media_cfg: Mapping[str, Any] | None = None,
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
    media, media_cfg  from `model.prepare_media`, see LlavaMetaForCausalLM; or media from
                   `model.prepare`. One `<image>` stands for all tiles of a "dynamic" picture, or
                   they are written out already
    start_pos      how many positions of `cache` may be kept; `input` is always the whole transcript
    device         must be the model's own, which is also the default
    echo           begin `text` with the prompt
    stop_token_ids ids that end the answer, besides the model's own
    image_tensor   another name for pictures in `media`; only one of both may be given
    chunk_prefilling  feed only what `cache` does not hold; False feeds the whole transcript again
    quant_llm      see LlavaMetaForCausalLM: which weights, of a model that holds both
    cache, lstrip, trace   see `VisionLanguageModel.turn` and `vlmlib.decoding.decode`

    Returns an iterator of chunks (`vlmlib.decoding.decode` tells their fields). The prompt, media
    and parameters are checked at the call, before anything is computed.
    Source: llm-awq:tinychat/stream_generators/NVILA_stream_gen.py.
    """
    return model.choose_weights(quant_llm).stream_prompt(
        expand_tiles(input, tiles_of(media_cfg)),
        model.as_media(one_of(media, image_tensor), media_cfg),
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
