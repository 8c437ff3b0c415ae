"""What the three families share: tokenizer, language model with its cache, one kind of turn.

A family (see `vlmlib.llava`) adds how it writes a prompt and what it does with a picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Sequence
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .cache import KVCache
from .decoding import Turn
from .errors import CacheError, PlaceholderError
from .fusion import digest, fuse, positions, split_at
from .images import ImageSource
from .tokenization import IMAGE_TOKEN_INDEX, check_placeholders, escape_special_tokens

Part = ImageSource | str


class VisionLanguageModel(ABC):
    """A network from transformers with its tokenizer and picture preprocessing, ready to stream.

    net              the network; its weights stay as transformers loaded them
    tokenizer        fast tokenizer
    image_processor  see `vlmlib.images.ImageProcessor`
    name             what `vlmlib.load` was asked for
    """

    family: str
    name: str = ""

    def __init__(self, net: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, image_processor):
        self.net = net.eval()
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    # ---- what a family adds ----

    @abstractmethod
    def prepare_images(self, images: Sequence[ImageSource]) -> Tensor:
        """Pictures -> pixel values (b, 3, h, w)."""

    @abstractmethod
    def encode_images(self, pixel_values: Tensor) -> list[Tensor]:
        """(b, 3, h, w) -> one (n_i, d) tensor of features a picture, as wide as the embeddings."""

    @abstractmethod
    def image_lengths(self, pixel_values: Tensor) -> list[int]:
        """How many positions each picture will take, without encoding it."""

    @abstractmethod
    def prompt_ids(self, prompt: str) -> list[int]:
        """Prompt text -> ids, with IMAGE_TOKEN_INDEX once for every picture."""

    # ---- what all share ----

    @property
    def config(self):
        return self.net.config

    @property
    def text_config(self):
        return self.net.config.get_text_config(decoder=True)

    @property
    def context_len(self) -> int:
        """How many positions prompt and answer may take together."""
        return self.text_config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return self.net.device

    @property
    def dtype(self) -> torch.dtype:
        return self.net.dtype

    @property
    def stop_token_ids(self) -> list[int]:
        return end_of_answer_ids(self.net, self.tokenizer)

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.net.parameters())
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{type(self).__name__}({n / 1e6:.1f} M parameters, {dtype} on {self.device}, "
            f"context {self.context_len})"
        )

    def new_cache(self) -> KVCache:
        return KVCache(self.config)

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
        out = self.net.get_decoder()(
            inputs_embeds=inputs_embeds, past_key_values=cache.past, use_cache=True
        )
        cache.content += [object() for _ in inputs_embeds[0]] if content is None else content
        return self.net.lm_head(out.last_hidden_state[:, -1])

    def chat_prompt(self, parts: Sequence[Part]) -> str:
        """Pictures and texts of one user turn, in order -> the prompt the model was trained on.

        A str is text and a `Path` or Pillow picture is a picture; text is escaped, so it cannot
        smuggle in placeholders or control tokens.
        """
        content = []
        for is_text, run in groupby(parts, key=lambda part: isinstance(part, str)):
            if is_text:  # neighbours as one text: "<ima" and "ge>" must not meet unescaped
                text = escape_special_tokens("".join(run), self.tokenizer)
                content.append({"type": "text", "text": text})
            else:
                content += [{"type": "image"} for _ in run]
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )

    def turn(
        self,
        prompt: str,
        image_tensor: Tensor | Sequence[Tensor] | None = None,
        *,
        start_pos: int = 0,
        cache: KVCache | None = None,
    ) -> Turn:
        """Tokenise the whole prompt; feed only what `cache` does not hold of its first `start_pos`.

        Raises PlaceholderError when placeholders and pictures differ in number, CacheError when
        `start_pos` is ahead of the cache.
        """
        ids = self.prompt_ids(prompt)
        pixels = stack_images(image_tensor)
        given = 0 if pixels is None else len(pixels)
        check_placeholders(ids.count(IMAGE_TOKEN_INDEX), given)
        pictures = [] if pixels is None else [p.to(self.device, self.dtype) for p in pixels]
        lengths = [] if pixels is None else self.image_lengths(pixels)
        content = positions(ids, lengths, [digest(p) for p in pictures])
        cache, start = self._reusable(content, start_pos, cache)

        def prefill() -> Tensor:
            first_id, first_picture, offset = split_at(ids, lengths, start)
            new = pictures[first_picture:]
            features = self.encode_images(torch.stack(new)) if new else []
            inputs = fuse(ids[first_id:], features, self.embed)[:, offset:]
            return self.forward(inputs, start, cache, content[start:])

        def step(token: Tensor) -> Tensor:
            return self.forward(self.embed(token), len(cache), cache, [int(token)])

        return Turn(
            prefill,
            step,
            text_ids=[i for i in ids if i != IMAGE_TOKEN_INDEX],
            prompt_tokens=len(content),
            context_len=self.context_len,
            device=self.device,
            reused_tokens=start,
        )

    def _reusable(self, content, start_pos: int, cache: KVCache | None) -> tuple[KVCache, int]:
        """The cache to write into, and how many of its positions the new prompt can keep."""
        if not isinstance(start_pos, int) or isinstance(start_pos, bool) or start_pos < 0:
            raise CacheError(f"start_pos must be a whole number >= 0, got {start_pos!r}")
        if start_pos > (0 if cache is None else len(cache)):
            held = "no cache was given" if cache is None else f"the cache holds {len(cache)}"
            raise CacheError(
                f"start_pos is {start_pos}, but {held}: pass the earlier turn's cache="
            )
        if cache is None:
            return self.new_cache(), 0
        # The last position is always fed again: its logits are what the answer begins with.
        return cache, min(start_pos, cache.common_prefix(content), len(content) - 1)


def stack_images(image_tensor: Tensor | Sequence[Tensor] | None) -> Tensor | None:
    """(3, h, w), (b, 3, h, w), or a list of either -> (b, 3, h, w); nothing -> None."""
    if image_tensor is None or (not isinstance(image_tensor, Tensor) and not len(image_tensor)):
        return None
    tensors = [image_tensor] if isinstance(image_tensor, Tensor) else list(image_tensor)
    if not all(isinstance(t, Tensor) and t.dim() in (3, 4) and t.shape[-3] == 3 for t in tensors):
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in tensors]
        raise PlaceholderError(f"image_tensor must hold (3, h, w) pixel values, got {shapes}")
    return torch.cat([t[None] if t.dim() == 3 else t for t in tensors])


def end_of_answer_ids(net: PreTrainedModel, tokenizer, extra: Collection[int] = ()) -> list[int]:
    """Ids that end an answer: the tokenizer's EOS, the checkpoint's, and those asked for."""
    ids = set(extra)
    for eos in (tokenizer.eos_token_id, getattr(net.generation_config, "eos_token_id", None)):
        ids.update(eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos])
    return sorted(ids)
