"""The short way: a model, some pictures and a question in; chunks, a text or a summary out."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from .cache import KVCache
from .decoding import Chunk, last_chunk
from .model import Part, VisionLanguageModel, as_parts, sources_of
from .sampling import GenParams


def stream(
    model: VisionLanguageModel,
    parts: Sequence[Part] | str,
    gen_params: GenParams | Mapping[str, Any] | None = None,
    *,
    cache: KVCache | None = None,
    stream_interval: int = 1,
    trace: int | None = None,
    **changes,
) -> Iterator[Chunk]:
    """Ask `model` about pictures and stream its answer.

        for chunk in vlmlib.stream(model, [image, "What is left of the red circle?"]):
            print(chunk["delta"], end="", flush=True)

    parts            pictures (Pillow pictures or `Path`s), `Video`s and texts (str), in the order
                     they are meant
    gen_params       what is not said, here or by a single parameter (`temp=0.7, seed=1`), is
                     greedy; a whole GenParams says everything
    cache            of an earlier stream: what its prompt and this one have in common is kept
    stream_interval  tokens to a chunk
    trace            k: each chunk tells its tokens' probabilities and the k best alternatives

    Returns an iterator of chunks, whose fields `vlmlib.decoding.decode` tells. White space in front
    of the answer is left out. Raises ImageError, VideoError, GenParamsError, PromptError,
    ContextLengthError, CacheError at the call, before anything is computed.
    """
    params = GenParams.greedy_unless(gen_params, **changes)
    parts = as_parts(parts)
    return model.stream_prompt(
        model.chat_prompt(parts),
        model.prepare(sources_of(parts)),
        params,
        start_pos=0 if cache is None else len(cache),
        chunk_prefilling=cache is not None,
        cache=cache,
        stream_interval=stream_interval,
        lstrip=True,
        trace=trace,
    )


def answer(
    model: VisionLanguageModel,
    parts: Sequence[Part] | str,
    gen_params: GenParams | Mapping[str, Any] | None = None,
    **options,
) -> str:
    """The whole answer at once: `stream` with these parameters, read to its end. Raises what that
    raises.
    """
    return last_chunk(stream(model, parts, gen_params, **options))["text"]


def stream_output(
    generator: Iterable[Chunk], time_stats: TimeStats | None = None, *, file: TextIO | None = None
) -> str:
    """Write an answer to a console while it comes; return it. `time_stats` collects the timing."""
    file = sys.stdout if file is None else file
    text = ""
    for chunk in generator:
        text = chunk["text"]
        file.write(chunk["delta"])
        file.flush()
        if time_stats is not None and chunk["timing"]:
            time_stats.add(chunk["timing"])
    file.write("\n")
    return text


@dataclass(slots=True)
class TimeStats:
    """Collects the `timing` of any number of turns. Times are in seconds."""

    context_tokens: int = 0
    context_times: list[float] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)

    def add(self, timing: dict) -> None:
        """Of one turn: the `timing` of its last chunk."""
        self.context_tokens += timing["context_tokens"]
        self.context_times.append(timing["context_time"])
        self.step_times += timing["generation_time_list"]

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed, from the median step; None before the first step."""
        return 1 / statistics.median(self.step_times) if self.step_times else None

    def __str__(self) -> str:
        if not self.context_times:
            return "no turn yet"
        first = (
            f"{self.context_tokens} tokens read, first answer token after "
            f"{1e3 * statistics.median(self.context_times):.1f} ms"
        )
        if not self.step_times:
            return first
        return (
            f"{first}; then {len(self.step_times)} steps of "
            f"{1e3 * statistics.median(self.step_times):.2f} ms (median), "
            f"{self.tokens_per_second:.0f} tokens/s"
        )
