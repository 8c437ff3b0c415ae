"""What NVILA does with ids and media, under its published name: embed them, answer them.

Sources: VILA:llava/model/llava_arch.py, llm-awq:tinychat/models/nvila/llava_arch.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import chain
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .cache import KVCache
from .decoding import last_chunk
from .errors import CacheError, PromptError, ShapeError
from .fusion import check_lengths, prepare_inputs_labels_for_multimodal
from .media import Medium
from .model import as_parts, sources_of
from .nvila_model import MEDIA_TOKENS
from .sampling import GenParams, check_whole
from .tokenization import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
    TextStream,
    check_placeholders,
)


class LlavaMetaForCausalLM:
    """What an NVILA does with ids and media; the parts are those of LlavaMetaModel.

    media         {"image": [(3, h, w) tiles], "video": [(t, 3, h, w) frames]}, every kind in the
                  order of its placeholders
    media_config  {"image": {"block_sizes": [...]}}: how many of the tiles belong together, with
                  dynamic S2; {"image": {"tiles": t}}: they are the tiles of one picture, each with
                  a placeholder of its own. `prepare_media` makes both.
    quant_llm     of a model that holds both kinds of weights, which `quantize_llm` tells how to
                  get: True the four-bit ones (`quantized`), False its own. A model that holds one
                  kind runs with that for both values.
    """

    _own_cache: KVCache | None = None

    def _embed(
        self,
        input_ids: Tensor,
        media: Mapping[str, Sequence[Tensor | Medium]] | None,
        media_config: Mapping[str, Any] | None,
        labels: Tensor | None,
        attention_mask: Tensor | None,
        *,
        padding_side: str | None = None,
        truncate: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(b, n) ids and their media -> inputs_embeds (b, n', d), labels and mask (b, n').

        attention_mask  0 where `input_ids` is padding, on either side; padding is dropped
        labels          (b, n); IGNORE_INDEX where media and padding are
        padding_side    of the results; the tokenizer's by default
        truncate        cut what exceeds the context; otherwise it is an error

        Raises PlaceholderError when a kind has more or fewer media than placeholders,
        PromptError, ContextLengthError and ShapeError.
        """
        ids, mask = self.as_batch(input_ids, attention_mask, self.media_token_ids.values())
        mask = mask.bool()
        labels = torch.full_like(ids, IGNORE_INDEX) if labels is None else labels.to(self.device)
        rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        ordered = self.in_order(rows, self.as_media(media, media_config))
        for token_id in self.media_token_ids.values():
            ids = ids.masked_fill(ids == token_id, IMAGE_TOKEN_INDEX)
        _, _, new_mask, _, embeds, new_labels = prepare_inputs_labels_for_multimodal(
            SimpleNamespace(embed=self.embed, encode_images=lambda m: [self.encode(x) for x in m]),
            ids,
            None,
            mask,
            None,
            labels,
            ordered,
            padding_side=padding_side or self.tokenizer.padding_side,
            model_max_length=self.context_len,
            truncate=truncate,
        )
        if embeds is None:  # one id a row, and no media
            embeds = self.embed(ids)
        return embeds, new_labels, new_mask

    def in_order(self, rows: Sequence[Sequence[int]], media: Sequence[Medium]) -> list[Medium]:
        """Media in the order of the placeholders in rows of ids: at each the next one of its kind.

        Raises PlaceholderError that names the numbers of both.
        """
        kinds = {token_id: kind for kind, token_id in self.media_token_ids.items()}
        of_kind = {kind: [m for m in media if m.kind == kind] for kind in MEDIA_TOKENS}
        for token_id, kind in kinds.items():
            found = sum(row.count(token_id) for row in rows)
            check_placeholders(found, len(of_kind[kind]), MEDIA_TOKENS[kind].strip("<>"))
        queues = {kind: iter(of_kind[kind]) for kind in of_kind}
        return [next(queues[kinds[i]]) for row in rows for i in row if i in kinds]

    def expanded(
        self, input_ids: Tensor, mask: Tensor | None, media_config: Mapping[str, Any] | None
    ) -> tuple[Tensor, Tensor | None]:
        """(1, n) ids and mask -> those with a placeholder for every tile, see `expand_tiles`."""
        tiles = tiles_of(media_config)
        if tiles is None or len(input_ids) != 1:
            return input_ids, mask
        row = input_ids[0] if mask is None else input_ids[0][mask[0].bool()]
        text = self.tokenizer.decode(row, clean_up_tokenization_spaces=False)
        whole = expand_tiles(text, tiles)
        if whole == text:
            return input_ids, mask
        return torch.tensor([self.tokenizer(whole).input_ids]), None

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        media: Mapping[str, Sequence[Tensor | Medium]] | None = None,
        media_config: Mapping[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        quant_llm: bool = True,
        **generation_kwargs,
    ) -> Tensor:
        """transformers' own generation, also of a padded batch -> (b, n') new ids.

        `generation_kwargs` are those of transformers' `generate`. An answer ends with the model's
        stop tokens unless they say otherwise.
        """
        ids, mask = self.expanded(input_ids, attention_mask, media_config)
        embeds, _, mask = self._embed(ids, media, media_config, None, mask, padding_side="left")
        options = self.with_stop_tokens(generation_kwargs)
        llm = self.choose_weights(quant_llm).get_llm()
        return llm.generate(inputs_embeds=embeds, attention_mask=mask.long(), **options)

    def generate_content(
        self,
        prompt: str | Sequence[Any],
        generation_config: GenParams | GenerationConfig | Mapping[str, Any] | None = None,
        quant_llm: bool = True,
    ) -> str:
        """The answer to pictures, clips and texts (or one text).

        generation_config  parameters as `vlmlib.stream` takes them: greedy in what they leave open,
                           and without n_predict as far as the context reaches; or a
                           GenerationConfig of transformers

        Raises PromptError, and what a stream raises.
        """
        parts = as_parts(prompt)
        text, media = self.chat_prompt(parts), self.prepare(sources_of(parts))
        if isinstance(generation_config, GenerationConfig):
            ids = torch.tensor([self.tokenizer(text).input_ids])
            out = self.generate(
                ids, media, quant_llm=quant_llm, generation_config=generation_config
            )
            return _text(out[0].tolist(), self.tokenizer).strip()
        if generation_config is None or isinstance(generation_config, Mapping):
            generation_config = {"n_predict": self.context_len, **(generation_config or {})}
        params = GenParams.greedy_unless(generation_config)
        chunks = self.choose_weights(quant_llm).stream_prompt(text, media, params)
        return last_chunk(chunks)["text"].strip()

    def benchmark(
        self,
        prompt: str | Sequence[Any],
        quant_llm: bool = True,
        *,
        repeats: int = 3,
        n_predict: int = 32,
    ) -> dict[str, float]:
        """Median times, in seconds, of answering `prompt`: {"prompt_tokens", "encode_time" of the
        media, "context_time" to the first token, with the media, "step_time" of each further one}.
        """
        check_whole("repeats", repeats, at_least=1)
        parts = as_parts(prompt)
        text, media = self.chat_prompt(parts), self.prepare(sources_of(parts))
        params, model = GenParams.greedy(n_predict=n_predict), self.choose_weights(quant_llm)
        encode, context, steps, tokens = [], [], [], 0
        for _ in range(repeats):
            encode.append(self._encode_time(media))
            model.feature_cache.clear()
            last = last_chunk(model.stream_prompt(text, media, params))
            context.append(last["timing"]["context_time"])
            steps += last["timing"]["generation_time_list"]
            tokens = last["usage"]["prompt_tokens"]
        return {
            "prompt_tokens": tokens,
            "encode_time": statistics.median(encode),
            "context_time": statistics.median(context),
            "step_time": statistics.median(steps or [0.0]),
        }

    @torch.inference_mode()
    def _encode_time(self, media: Sequence[Medium]) -> float:
        start = perf_counter()
        for medium in media:
            self.encode(medium).sum().item()  # waits for a GPU
        return perf_counter() - start

    def prepare_media(
        self, conversation: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, list[Tensor]], dict[str, dict[str, Any]]]:
        """[{"from": "human" or "gpt", "value": text or parts}] -> media and media_config.

        The parts are pictures (Pillow pictures or `Path`s), `Video`s and texts. `conversation` is
        left as it is: `conversation_prompt` makes the prompt of the same parts. Raises PromptError.
        """
        for message in conversation:
            if not isinstance(message, Mapping) or "value" not in message:
                got = list(message) if isinstance(message, Mapping) else type(message).__name__
                raise PromptError(f"a message must have 'from' and 'value', got {got}")
        sources = sources_of(chain.from_iterable(as_parts(m["value"]) for m in conversation))
        prepared = self.prepare(sources)
        pictures = [m for m in prepared if m.kind == "image"]
        media = {
            "image": [tile for m in pictures for tile in m.pixels],
            "video": [m.pixels for m in prepared if m.kind == "video"],
        }
        config = {"image": {}, "video": {}}
        if any(m.block for m in pictures):
            config["image"]["block_sizes"] = [m.block for m in pictures]
        elif self.mode(sources) == "dynamic":
            config["image"]["tiles"] = len(pictures)
        return {kind: found for kind, found in media.items() if found}, config

    @torch.inference_mode()
    def stream_gen(
        self,
        input_ids: Tensor,
        media: Mapping[str, Sequence[Tensor | Medium]] | None,
        media_cfg: Mapping[str, Any] | None,
        start_pos: int,
        chunk_prefilling: bool,
        quant_llm: bool,
        attention_mask: Tensor | None = None,
        *,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, int]:
        """Feed (1, n) ids and their media at `start_pos` -> (1, 1, v) logits, positions taken.

        chunk_prefilling  TinyChat's choice of a kernel for several ids behind a filled cache; here
                          there is one way, and it is the same for both values
        cache             None is one that belongs to the model, for stepping by hand; it begins
                          anew at `start_pos` 0. Two sequences at once need a cache each.

        Raises CacheError when the cache does not reach `start_pos`, was made by another model or
        with other weights or settings; ContextLengthError, and ShapeError for a batch.
        """
        if len(input_ids) != 1:
            raise ShapeError(f"stream_gen takes one sequence, got {len(input_ids)}")
        ids, mask = self.expanded(input_ids, attention_mask, media_cfg)
        embeds, _, _ = self._embed(ids, media, media_cfg, None, mask)
        check_lengths([start_pos + embeds.shape[1]], self.context_len)
        model = self.choose_weights(quant_llm)
        if cache is None:
            if model._own_cache is None:
                model._own_cache = model.new_cache()
            cache = model._own_cache
        model.check_cache(cache)
        model.fast_decoder()
        if start_pos == 0:
            cache.begin(model.made_by())
        elif cache.made_by not in (None, model.made_by()):
            raise CacheError(
                "the cache was written with other weights or settings: begin anew at start_pos 0"
            )
        cache.writer = object()
        logits = model.forward(embeds, start_pos, cache)
        return logits[:, None], embeds.shape[1]


def expand_tiles(prompt: str, tiles: int | None) -> str:
    """One `<image>` and a line break for every tile of the only picture of a prompt.

    A prompt in which they are already written out stays as it is.
    """
    one = f"{IMAGE_TOKEN}\n"
    if tiles is None or prompt.count(IMAGE_TOKEN) != 1 or (tiles == 1 and one in prompt):
        return prompt
    return prompt.replace(IMAGE_TOKEN, one * tiles)


def tiles_of(media_config: Mapping[str, Any] | None) -> int | None:
    """How many tiles of one picture the pictures are, if they are."""
    return ((media_config or {}).get("image") or {}).get("tiles")


def _text(ids: Sequence[int], tokenizer) -> str:
    """As a stream shows it: without special tokens, and no half characters at the end."""
    stream = TextStream(tokenizer)
    for token_id in ids:
        stream.push(token_id)
    stream.flush()
    return stream.text
