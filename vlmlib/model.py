"""What the three families share: tokenizer, language model with its cache, one kind of turn.

A family (see `vlmlib.llava`) adds how it writes a prompt and what it does with a picture.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import output_capturing

from .cache import FeatureCache, KVCache
from .checkpoint import Origin, as_device, in_one_line, save_net, write_json
from .decoding import Chunk, Turn, decode
from .errors import CacheError, DeviceError, GenParamsError, PromptError, ShapeError
from .fast import FastDecoder
from .fusion import fuse, positions, prepare_inputs_labels_for_multimodal, split_at
from .images import ImageSource
from .int4 import Int4Linear
from .media import Medium, Video
from .sampling import GenParams
from .tokenization import (
    IMAGE_TOKEN_INDEX,
    check_placeholders,
    check_text,
    escape_special_tokens,
)

Part = ImageSource | Video | str
Media = Tensor | Sequence[Tensor | Medium] | None


class VisionLanguageModel(ABC):
    """A network from transformers with its tokenizer and picture preprocessing, ready to stream.

    net              the network in evaluation mode, with its weights as transformers loaded them
    tokenizer        fast tokenizer
    image_processor  see `vlmlib.images.ImageProcessor`
    name             what `vlmlib.load` was asked for
    chat_template    a Jinja template in place of the tokenizer's own
    origin           the layout of its checkpoint, if that is not transformers' own
    prefill_chunk    a longer prompt is fed in pieces of so many positions, so that what is computed
                     on the way takes no more memory than that
    fast             take single steps by `vlmlib.fast` where it can, which differ by rounding only;
                     False leaves them to transformers' modules
    quantized        the same model with four-bit weights, if it is to hold both, see `quantize_llm`
    """

    family: str
    image_processor_type: str
    name: str = ""
    chat_template: str | None = None
    origin: Origin | None = None
    prefill_chunk: int = 2048
    fast: bool = True
    quantized: VisionLanguageModel | None = None
    _decoder: FastDecoder | None = None

    def __init__(self, net: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, image_processor):
        self.net = net
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    # ---- what a family adds ----

    @abstractmethod
    def prepare(self, sources: Sequence[ImageSource]) -> list[Medium]:
        """The pictures and clips of one prompt, in its order -> media ready to be encoded."""

    @abstractmethod
    def medium(self, pixels: Tensor) -> Medium:
        """Preprocessed (t, 3, h, w) pixel values of one picture -> a medium."""

    @abstractmethod
    def tower_features(self, pixels: Tensor) -> Tensor:
        """(t, 3, h, w) -> (t, p, c): what the tower says of all p patches of a tile."""

    @abstractmethod
    def project(self, features: Tensor, medium: Medium) -> Tensor:
        """(t, p, c) tower features of a medium -> (medium.length, d), as wide as the embeddings."""

    @abstractmethod
    def prompt_ids(self, prompt: str) -> list[int]:
        """Prompt text -> ids, with IMAGE_TOKEN_INDEX once for every medium."""

    @abstractmethod
    def boxes(self, medium: Medium) -> Tensor:
        """(medium.length, 4): the part of the original that each position comes from, as (left,
        top, right, bottom) with the original from 0 to 1; NaN for positions that are no patch.

        Raises ShapeError for media that were made from pixel values alone: those of `prepare` know
        what they show.
        """

    def encoder_settings(self) -> tuple[Hashable, ...]:
        """What `encode` goes by besides pixels and weights. What was kept is of no use when it is
        another.
        """
        return ()

    # ---- what all share ----

    def encode(self, medium: Medium) -> Tensor:
        """Features (medium.length, d) of a medium. Raises ShapeError if there are not as many."""
        features = self.project(self.tower_features(medium.pixels), medium)
        if len(features) != medium.length:
            raise ShapeError(f"a medium of {medium.length} positions has {len(features)} features")
        return features

    @property
    def config(self):
        """Of the whole network."""
        return self.net.config

    @property
    def text_config(self):
        """Of the language model."""
        return self.net.config.get_text_config(decoder=True)

    @property
    def context_len(self) -> int:
        """How many positions prompt and answer may take together."""
        return self.text_config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.net.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.net.dtype

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer."""
        return end_of_answer_ids(self.net, self.tokenizer)

    def __repr__(self) -> str:
        packed = [m for m in self.net.modules() if isinstance(m, Int4Linear)]
        n = sum(p.numel() for p in self.parameters())
        n += sum(m.in_features * m.out_features for m in packed)
        dtype = "int4 and " * bool(packed) + str(self.dtype).removeprefix("torch.")
        return (
            f"{type(self).__name__}({n / 1e6:.1f} M parameters, {dtype} on {self.device}, "
            f"context {self.context_len})"
        )

    @property
    def whole_net(self) -> nn.Module:
        """All weights, by the names that checkpoints are translated to."""
        return self.net

    def parameters(self) -> Iterator[Tensor]:
        """All weights."""
        return self.whole_net.parameters()

    def processor_config(self) -> dict[str, Any]:
        """The preprocessor_config.json of this model."""
        return self.image_processor.to_dict(self.image_processor_type)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write a folder that `vlmlib.load` reads, in the layout that the model was loaded from, or
        transformers' own. Weights become safetensors, whatever they were.

        In a layout that is not transformers' own, prompts stay as config.json has them, and a tower
        that is a checkpoint of its own lies inside the folder, by the name it had. Raises
        CheckpointError if the network has other weights than that layout knows, as four-bit ones;
        with `origin = None` they are saved in transformers' own.
        """
        folder, tokenizer = Path(folder), copy.copy(self.tokenizer)
        if self.origin is None:
            save_net(self.net, folder)
            write_json(folder / "preprocessor_config.json", self.processor_config())
            tokenizer.chat_template = self.chat_template or tokenizer.chat_template
        else:
            self.origin.save(folder, self)
        tokenizer.save_pretrained(folder)

    def with_net(self, net: PreTrainedModel) -> VisionLanguageModel:
        """The same model around another network."""
        other = copy.copy(self)
        other.net, other.quantized, other._decoder = net, None, None
        other.__dict__.pop("feature_cache", None)
        return other

    def choose_weights(self, quant_llm: bool) -> VisionLanguageModel:
        """`quantized` if it is asked for and there is one; else the model as it is."""
        return self.quantized if quant_llm and self.quantized else self

    @cached_property
    def feature_cache(self) -> FeatureCache:
        """Features of the pictures and clips seen last: the tower is asked once for each of them,
        in how many questions and turns they may occur.
        """
        return FeatureCache()

    def new_cache(self) -> KVCache:
        """An empty key/value cache for one sequence."""
        return KVCache(self.net.config)

    def check_cache(self, cache: KVCache) -> None:
        """Raise CacheError for what is no cache of this model's."""
        if not isinstance(cache, KVCache):
            raise CacheError(f"cache must be one of new_cache, got {type(cache).__name__}")
        if cache.config() is not self.net.config:
            raise CacheError("the cache is another model's: it was made by new_cache of that one")

    def embed(self, ids: Tensor) -> Tensor:
        """(n,) or (b, n) ids -> (..., d)."""
        return self.net.get_input_embeddings()(ids.to(self.device))

    def forward(
        self,
        inputs_embeds: Tensor,
        start_pos: int,
        cache: KVCache,
        content: Sequence[Hashable] | None = None,
    ) -> Tensor:
        """Feed (1, n, d) embeddings at positions start_pos, start_pos + 1, ... -> (1, v) logits.

        Whatever the cache held from `start_pos` on is forgotten first. `content` says what the n
        positions are, so that a later turn can find out what it may keep; without it they are never
        kept. Raises CacheError when `start_pos` lies behind the cache's end.
        """
        cache.keep(start_pos)
        logits = self._feed(inputs_embeds, cache)
        cache.content += [object() for _ in inputs_embeds[0]] if content is None else content
        return logits

    def step(self, token: Tensor, cache: KVCache, decoder: FastDecoder | None = None) -> Tensor:
        """Feed one (1, 1) id behind all that `cache` holds -> (1, v) logits.

        Every token of an answer but the last goes through here. `decoder` is the `fast_decoder()`,
        asked for once an answer; without it transformers' modules do the step.
        """
        if decoder is not None:
            return decoder(token, cache)
        logits = self._feed(self.embed(token), cache)
        cache.add(token)
        return logits

    def _feed(self, inputs_embeds: Tensor, cache: KVCache) -> Tensor:
        # Gradients would not reach an earlier piece, and need the memory of all of them anyway.
        n = inputs_embeds.shape[1] if inputs_embeds.requires_grad else self.prefill_chunk
        for piece in inputs_embeds.split(n, dim=1):
            out = self.net.get_decoder()(
                inputs_embeds=piece, past_key_values=cache.past, use_cache=True
            )
        return self.net.lm_head(out.last_hidden_state[:, -1])

    def fast_decoder(self) -> FastDecoder | None:
        """For single steps; None if `fast` is off, if the language model is of a kind that it does
        not know, and while there are hooks in that or its head: it would go past them.
        """
        if not self.fast or _hooked(self._language_modules()):
            return None
        if self._decoder is None or not self._decoder.is_current(self.net):
            self._decoder = FastDecoder(self.net) if FastDecoder.supports(self.net) else None
        return self._decoder

    def made_by(self) -> Hashable:
        """A name for all that keys and values come from, as it is now. Ask for the `fast_decoder`
        before: making it moves weights.
        """
        return *self._encoder(), *_versions(self._modules())

    def _encoder(self) -> tuple[Hashable, ...]:
        """The methods and settings that make features of pixels."""
        methods = (self.encode, self.tower_features, self.project)
        names = (getattr(m, "__func__", m) for m in methods)
        return *names, *self.encoder_settings()

    def _modules(self) -> Iterator[nn.Module]:
        parts = (part for part in vars(self).values() if isinstance(part, nn.Module))
        return chain.from_iterable(part.modules() for part in parts)

    def _language_modules(self) -> Iterator[nn.Module]:
        return chain(self.net.get_decoder().modules(), self.net.lm_head.modules())

    def _vision_modules(self) -> list[nn.Module]:
        """Tower and projector, and the table of embeddings, with which a family may write around a
        picture.
        """
        language = {*self._language_modules()} - {self.net.get_input_embeddings()}
        return [m for m in self._modules() if m not in language]

    def features(self, medium: Medium, key: Hashable) -> Tensor:
        """`encode` of the medium with this key, or what it was when it was last asked for.

        It is always asked where gradients are wanted, and while there are hooks in tower, projector
        or the table of embeddings; and again after a weight there, a method or one of the
        `encoder_settings` was changed. (What is written through `.data`, torch tells nobody.)
        """
        vision = self._vision_modules()
        if torch.is_grad_enabled() or _hooked(vision):
            return self.encode(medium)
        made_by = *self._encoder(), *_versions(vision)
        return self.feature_cache.get((key, made_by), partial(self.encode, medium))

    def chat_prompt(self, parts: Sequence[Part]) -> str:
        """Pictures and texts of one user turn, in order -> the prompt the model was trained on."""
        return self.conversation_prompt([("user", parts)])

    def conversation_prompt(self, messages: Sequence[tuple[str, Sequence[Part]]]) -> str:
        """(role, parts) of all turns so far -> the prompt for the next answer.

        A str is text and a `Path` or Pillow picture is a picture; text is escaped, so it cannot
        smuggle in placeholders or control tokens. Raises PromptError.
        """
        content = [
            {"role": role, "content": self._content(as_parts(parts))} for role, parts in messages
        ]
        return self._written(content, add_generation_prompt=True)

    def _written(self, messages: Sequence[dict[str, Any]], **options) -> str:
        """By the chat template, which is a program of the checkpoint's, run in jinja's sandbox."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, tokenize=False, **options
            )
        except Exception as e:
            raise PromptError(
                f"the model's chat template cannot write this conversation ({in_one_line(e)})"
            ) from e

    def _content(self, parts: Sequence[Part]) -> list[dict[str, str]]:
        """The parts of one message as chat templates take them."""
        content = []
        for is_text, run in groupby(parts, key=lambda part: isinstance(part, str)):
            if is_text:  # neighbours as one text: "<ima" and "ge>" must not meet unescaped
                text = escape_special_tokens("".join(run), self.tokenizer)
                content.append({"type": "text", "text": text})
            else:
                kinds = ("video" if isinstance(part, Video) else "image" for part in run)
                content += [{"type": kind} for kind in kinds]
        return content

    def stream_prompt(
        self,
        prompt: str,
        media: Media,
        gen_params: GenParams | Any,
        *,
        start_pos: int = 0,
        chunk_prefilling: bool = False,
        cache: KVCache | None = None,
        answer: Sequence[int] = (),
        echo: bool = False,
        **options,
    ) -> Iterator[Chunk]:
        """Stream the answer to a whole prompt: what every family's generator comes down to.

        With `chunk_prefilling` only what the first `start_pos` positions of `cache` do not hold is
        fed, without it everything. The stream goes on behind `answer`, and tells what is new only.
        `options` are those of `answer_turn`.
        """
        check_start(start_pos)
        keep = start_pos if chunk_prefilling else 0
        turn = self.turn(prompt, media, start_pos=keep, cache=cache, answer=answer)
        options["prefix"] = prompt if echo else ""
        return answer_turn(
            turn, self.tokenizer, gen_params, stop_ids=self.stop_token_ids, **options
        )

    def turn(
        self,
        prompt: str,
        media: Media = None,
        *,
        start_pos: int = 0,
        cache: KVCache | None = None,
        answer: Sequence[int] = (),
    ) -> Turn:
        """Tokenise the whole prompt; feed only what `cache` does not hold of its first `start_pos`.

        `media` are Medium objects or pixel values, see `as_media`. `answer` are ids with which the
        answer begins; they count as prompt. Raises PlaceholderError when placeholders and media
        differ in number, PromptError for what is no text or no id, CacheError when `start_pos` is
        ahead of the cache, or the cache another model's; and on the way, if another stream writes
        into it.
        """
        check_text(prompt)
        ids, media = self.read(prompt, media)
        ids = [*ids, *answer]
        check_ids(ids, len(self.net.get_input_embeddings().weight))
        check_placeholders(ids.count(IMAGE_TOKEN_INDEX), len(media))
        lengths, keys = [m.length for m in media], [m.key for m in media]
        content = positions(ids, lengths, keys)
        cache, start = self._reusable(content, start_pos, cache)
        me, decoder = object(), None

        def prefill() -> Tensor:
            nonlocal decoder
            check_writer(cache.common_prefix(content) >= start)
            cache.writer = me
            decoder = self.fast_decoder()
            if start == 0:
                cache.begin(self.made_by())
            first_id, first_medium, offset = split_at(ids, lengths, start)
            seen = zip(media[first_medium:], keys[first_medium:], strict=True)
            features = [self.features(m, key) for m, key in seen]
            inputs = fuse(ids[first_id:], features, self.embed)[:, offset:]
            return self.forward(inputs, start, cache, content[start:])

        def step(token: Tensor) -> Tensor:
            check_writer(cache.writer is me)
            return self.step(token, cache, decoder)

        return Turn(
            prefill,
            step,
            text_ids=[i for i in ids if i != IMAGE_TOKEN_INDEX],
            prompt_tokens=len(content),
            context_len=self.context_len,
            device=self.device,
            reused_tokens=start,
            looks_ahead=self.device.type == "cuda",
        )

    def read(self, prompt: str, media: Media) -> tuple[list[int], list[Medium]]:
        """Ids of the whole prompt, and its media in the order of their placeholders."""
        return self.prompt_ids(prompt), self.as_media(media)

    def encode_images(self, images: Media) -> list[Tensor]:
        """Media or their pixel values -> one (n_i, d) tensor each."""
        return [self.encode(m) for m in self.as_media(images)]

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        images: Media = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        attention_mask: Tensor | None = None,
        **options,
    ) -> Tensor:
        """transformers' own generation from (b, n) ids with IMAGE_TOKEN_INDEX for each medium.

        images          media or pixel values, see `as_media`; in the order of their placeholders
        image_sizes     (width, height) of each picture, where its pixels do not tell its layout

        `options` are those of transformers' `generate`: do_sample, temperature, top_p, num_beams,
        max_new_tokens, use_cache, ... Unless they say otherwise, an answer ends where a stream's
        does. A batch of unequal prompts is padded anywhere and masked by `attention_mask` (b, n);
        it is padded on the left before decoding. Returns (b, n') new ids.
        Raises PlaceholderError, ShapeError, ContextLengthError.
        Source: LLaVA:llava/model/language_model/llava_llama.py.
        """
        ids, mask = self.as_batch(input_ids, attention_mask)
        _, _, mask, _, embeds, _ = prepare_inputs_labels_for_multimodal(
            self,
            ids,
            None,
            mask,
            None,
            None,
            [] if images is None else images,  # None would leave the padding where it is
            image_sizes,
            padding_side="left",
            model_max_length=self.context_len,
        )
        if embeds is None:  # one id a row, and no pictures
            embeds = self.embed(ids)
        options = self.with_stop_tokens(options)
        return self.net.generate(inputs_embeds=embeds, attention_mask=mask, **options)

    def as_batch(
        self, input_ids: Tensor, attention_mask: Tensor | None, media_ids: Collection[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """(b, n) ids and what masks their padding (None: nothing does) on the model's device.
        Raises ShapeError, and PromptError for what is no id and none of `media_ids` either.
        """
        if input_ids.dim() != 2 or not input_ids.shape[1]:
            raise ShapeError(f"expected (b, n) ids, one at least, got {tuple(input_ids.shape)}")
        ids = input_ids.to(self.device)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(self.device)
        if mask.shape != ids.shape:
            raise ShapeError(f"ids are {tuple(ids.shape)}, the mask is {tuple(mask.shape)}")
        text = [i for i in ids[mask.bool()].tolist() if i not in media_ids]
        check_ids(text, len(self.net.get_input_embeddings().weight))
        return ids, mask

    def with_stop_tokens(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of transformers' `generate`, and where they do not say it, what ends an answer
        and what is written behind its end.
        """
        config, stop = copy.copy(options.get("generation_config")), self.stop_token_ids
        pads = (self.net.generation_config.pad_token_id, self.tokenizer.pad_token_id, *stop)
        pad = next((i for i in pads if i is not None), None)
        own = {"eos_token_id": stop or None, "pad_token_id": pad}
        if config is None:
            return own | dict(options)
        for name, value in own.items():
            if getattr(config, name) is None:
                setattr(config, name, value)
        return dict(options) | {"generation_config": config}

    def as_media(self, media: Media) -> list[Medium]:
        """Media, or one medium, as they are; of pixel values (b, 3, h, w), or a list of (3, h, w)
        or (t, 3, h, w), one medium for each entry. Raises ShapeError.
        """
        if media is None:
            return []
        if isinstance(media, Tensor):
            media = list(media) if media.dim() == 4 else [media]
        elif not isinstance(media, Sequence):
            media = [media]
        out = []
        for m in media:
            if isinstance(m, Tensor) and m.dim() in (3, 4) and m.shape[-3] == 3:
                m = self.medium(m if m.dim() == 4 else m[None])
            elif not isinstance(m, Medium):
                shape = tuple(m.shape) if isinstance(m, Tensor) else type(m).__name__
                raise ShapeError(f"expected (3, h, w) or (t, 3, h, w) pixel values, got {shape}")
            out.append(m)
        return out

    def _reusable(self, content, start_pos: int, cache: KVCache | None) -> tuple[KVCache, int]:
        """The cache to write into, and how many of its positions the new prompt can keep."""
        check_start(start_pos)
        if cache is not None:
            self.check_cache(cache)
        if start_pos > (0 if cache is None else len(cache)):
            held = "no cache was given" if cache is None else f"the cache holds {len(cache)}"
            raise CacheError(
                f"start_pos is {start_pos}, but {held}: pass the earlier turn's cache="
            )
        if cache is None:
            return self.new_cache(), 0
        if cache.made_by not in (None, self.made_by()):
            return cache, 0  # what it holds was computed with other weights or settings
        # The last position is always fed again: its logits are what the answer begins with.
        return cache, min(start_pos, cache.common_prefix(content), max(len(content) - 1, 0))


def answer_turn(
    turn: Turn,
    tokenizer: PreTrainedTokenizerBase,
    gen_params: GenParams | Any,
    *,
    stop_ids: Collection[int],
    stop_token_ids: Collection[int] = (),
    device: str | torch.device | None = None,
    **options,
) -> Iterator[Chunk]:
    """`decode` with a generator's parameters read and checked; `options` are decode's own.

    stop_ids        the model's own
    stop_token_ids  those that somebody wants besides
    """
    params = GenParams.of(gen_params)
    check_device(device, turn.device)
    check_stop_ids(stop_token_ids)
    return decode(turn, tokenizer, params, stop_ids={*stop_ids, *stop_token_ids}, **options)


def _hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether somebody watches them: transformers' own hooks for `output_hidden_states`, which stay
    once they were needed, do not count.
    """
    hooks = chain.from_iterable(
        (*m._forward_hooks.values(), *m._forward_pre_hooks.values()) for m in modules
    )
    return any(getattr(hook, "__module__", None) != output_capturing.__name__ for hook in hooks)


def _versions(modules: Iterable[nn.Module]) -> Iterator[tuple]:
    """Of each weight something that is another when it was moved, cast, exchanged or written in."""
    for m in modules:
        for w in chain(m._parameters.values(), m._buffers.values()):
            if w is not None:
                yield w.data_ptr(), w.dtype, 0 if w.is_inference() else w._version


def check_pixels(pixels: Tensor, size: int | Sequence[int]) -> None:
    """Raise ShapeError for what are not (t, 3, h, w) pixels of that size, a side or (h, w)."""
    height, width = (size, size) if isinstance(size, int) else size
    if pixels.shape[1:] != (3, height, width) or not len(pixels):
        raise ShapeError(f"expected (t, 3, {height}, {width}) pixels, got {tuple(pixels.shape)}")


def check_stop_ids(ids: Collection[int]) -> None:
    if not isinstance(ids, Collection) or not all(type(i) is int for i in ids):
        raise GenParamsError(f"stop_token_ids must be a list of whole numbers, got {ids!r}")


def one_of(media: Any, image_tensor: Any) -> Any:
    """TinyChat's generators have two names for the media: the one that was used."""
    if media is not None and image_tensor is not None:
        raise ValueError("media and image_tensor are two names for one thing: give one of them")
    return image_tensor if media is None else media


def check_start(start_pos: int) -> None:
    if not isinstance(start_pos, int) or isinstance(start_pos, bool) or start_pos < 0:
        raise CacheError(f"start_pos must be a whole number >= 0, got {start_pos!r}")


def check_writer(alone: bool) -> None:
    if not alone:
        raise CacheError(
            "another stream has written into the cache since: read a stream to its end before the "
            "next one begins, or give each its own cache"
        )


def check_ids(ids: Sequence[int], n: int) -> None:
    """Raise PromptError for what is neither one of n ids nor a placeholder."""
    for i in ids:
        if not isinstance(i, int) or not (0 <= i < n or i == IMAGE_TOKEN_INDEX):
            raise PromptError(
                f"the prompt has the id {i!r}, but the model knows only 0 to {n - 1}: is the "
                "tokenizer its own?"
            )


def as_parts(parts: Sequence[Part] | str) -> tuple[Part, ...]:
    """One text, or pictures, clips and texts in their order. Raises PromptError."""
    if isinstance(parts, str):
        return (parts,)
    if not isinstance(parts, Sequence) or isinstance(parts, bytes):
        raise PromptError(
            f"expected a text, or a list of pictures, clips and texts, got {type(parts).__name__}"
        )
    return tuple(parts)


def sources_of(parts: Iterable[Part]) -> list[ImageSource | Video]:
    """The pictures and clips among the parts."""
    return [part for part in parts if not isinstance(part, str)]


def check_device(wanted: str | torch.device | None, own: torch.device) -> None:
    """Nothing is moved behind the caller's back: another device than the model's is an error."""
    if wanted is None:
        return
    device = as_device(wanted)
    if device.type != own.type or (device.index or 0) != (own.index or 0):
        raise DeviceError(f"device is {device}, but the model is on {own}: move one of them")


def end_of_answer_ids(net: PreTrainedModel, tokenizer, extra: Collection[int] = ()) -> list[int]:
    """Ids that end an answer: the tokenizer's EOS, the checkpoint's, and those asked for."""
    ids = set(extra or ())
    for eos in (tokenizer.eos_token_id, getattr(net.generation_config, "eos_token_id", None)):
        ids.update(eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos])
    return sorted(ids)
