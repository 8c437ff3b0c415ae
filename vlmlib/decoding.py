"""The decode loop: scores in, text chunks out. One loop serves every model family.

It knows ids and logits only. How a prompt becomes the first logits, and how one more id becomes the
next ones, is the business of the `Turn` that a family hands over (`vlmlib.model`, `vlmlib.llava`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from math import isfinite
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import ContextLengthError, PromptError
from .sampling import GenParams, Sampler, check_finite, check_whole, entropy
from .tokenization import TextStream

Chunk = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt ready to be answered.

    prefill()      feeds the prompt, returns (1, v) logits behind its last position
    step(id)       feeds one (1, 1) id, returns (1, v) logits behind it
    text_ids       the prompt's ids without placeholders, seen by the repetition penalty
    prompt_tokens  positions of the whole prompt, media in their places
    context_len    how many positions prompt and answer may take together
    device         where ids go
    reused_tokens  positions of the prompt that a cache holds already; `prefill` feeds the others
    looks_ahead    a device works by itself: give it the step behind a token before that token is
                   read, so that it never waits. If the token ends the answer, that step is lost.
                   The first token is read before its step: somebody waits for it.
    """

    prefill: Callable[[], Tensor]
    step: Callable[[Tensor], Tensor]
    text_ids: list[int]
    prompt_tokens: int
    context_len: int
    device: torch.device
    reused_tokens: int = 0
    looks_ahead: bool = False


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """One sampled token under the microscope.

    probability   what the model itself gave it (temperature 1, nothing cut off)
    drawn_from    what it had after penalty, temperature and cuts, when it was drawn
    entropy       of the model's own distribution, in bits
    alternatives  the k best ids with their text and the model's own probability
    """

    id: int
    text: str
    probability: float
    drawn_from: float
    entropy: float
    alternatives: list[tuple[int, str, float]]


def decode(
    turn: Turn,
    tokenizer: PreTrainedTokenizerBase,
    params: GenParams,
    *,
    stop_ids: Collection[int],
    stream_interval: int = 1,
    prefix: str = "",
    lstrip: bool = False,
    trace: int | None = None,
) -> Iterator[Chunk]:
    """Check the request, then answer it as an iterator of chunks.

    Every `stream_interval` tokens a chunk comes, a dictionary:

    text           the whole answer so far (behind `prefix`)
    delta          what is new in it
    usage          {"prompt_tokens", "completion_tokens", "total_tokens"}: media are counted in
                   their places, and so is the token that ends the answer
    finish_reason  None, in the last chunk "stop" or "length"
    timing         None, in the last chunk {"context_tokens": positions of the prompt that were fed,
                   "reused_tokens": those that were not, "context_time": seconds until the first
                   token was sampled, "generation_time_list": seconds of each later one,
                   "total_tokens": context_tokens and one for each of these}
    tokens         with `trace=k` only: a list of TokenTraces with k alternatives, one for every
                   token since the last chunk

    Raises GenParamsError, PromptError and ContextLengthError at the call, NonFiniteLogitsError on
    the way.
    """
    check_whole("stream_interval", stream_interval, at_least=1)
    if trace is not None:
        check_whole("trace", trace, at_least=0)
    if not turn.prompt_tokens:
        raise PromptError("the prompt is empty: there is nothing to answer")
    if turn.prompt_tokens >= turn.context_len:
        raise ContextLengthError(
            f"the prompt takes {turn.prompt_tokens} tokens, pictures included, and the model's "
            f"context holds {turn.context_len}: there is no room for an answer"
        )
    tracer, traces = (None, None) if trace is None else (_Tracer(tokenizer, trace), [])
    out = _Answer(turn, TextStream(tokenizer, params.stop), prefix, lstrip, traces)
    return _loop(turn, params, frozenset(stop_ids), stream_interval, out, tracer)


def last_chunk(chunks: Iterable[Chunk]) -> Chunk:
    """The last one; none of the others is kept, of which each has the whole text up to it."""
    return deque(chunks, maxlen=1)[0]


# The decorator re-enters inference mode on every resume; a `with` around `yield` would leak it to
# the caller.
@torch.inference_mode()
def _loop(turn, params, stop_ids, stream_interval, out, tracer) -> Iterator[Chunk]:
    limit = min(params.n_predict, turn.context_len - turn.prompt_tokens)
    sampler = Sampler(params, turn.device)
    seen = torch.tensor([turn.text_ids], dtype=torch.long, device=turn.device)

    def draw(logits: Tensor) -> _Drawn:
        nonlocal seen
        scores = sampler.scores(logits, seen)
        token = sampler.draw(scores)  # (1, 1)
        seen = torch.cat([seen, token], dim=1)
        return _Drawn(token, logits, scores)

    start = perf_counter()
    drawn = draw(turn.prefill())
    out.context_time = perf_counter() - start
    reason = "length"
    while out.tokens < limit:
        is_last = out.tokens + 1 == limit
        looks_ahead = turn.looks_ahead and out.tokens and not is_last
        ahead = draw(turn.step(drawn.token)) if looks_ahead else None
        token_id = drawn.read(step=out.tokens)
        out.count(perf_counter() - start)
        if tracer:
            out.traces.append(tracer(token_id, drawn.logits, drawn.scores))
        if token_id in stop_ids or out.stream.push(token_id):
            reason = "stop"
            break
        if out.tokens % stream_interval == 0:
            yield out.chunk()
        if not is_last:
            start = perf_counter()
            drawn = ahead or draw(turn.step(drawn.token))
    out.stream.flush()
    yield out.chunk(reason)


class _Drawn:
    """A (1, 1) id on the device with what it was drawn from, on its way to be read."""

    def __init__(self, token: Tensor, logits: Tensor, scores: Tensor):
        self.token, self.logits, self.scores = token, logits, scores
        on_gpu = token.is_cuda  # any other device has no event here: its copy is waited for
        self._id = token.to("cpu", non_blocking=on_gpu)
        self._highest = logits.max().to("cpu", non_blocking=on_gpu)
        self._arrival = torch.cuda.current_stream(token.device).record_event() if on_gpu else None

    def read(self, step: int) -> int:
        """Wait until it is here. Raises NonFiniteLogitsError."""
        if self._arrival:
            self._arrival.synchronize()
        if not isfinite(self._highest.item()):
            check_finite(self.logits, step)
        return int(self._id)


@dataclass(slots=True)
class _Answer:
    """What has been said so far, and how long it took."""

    turn: Turn
    stream: TextStream
    prefix: str
    lstrip: bool
    traces: list[TokenTrace] | None
    tokens: int = 0
    context_time: float = 0.0
    step_times: list[float] = field(default_factory=list)
    shown: str = ""

    def count(self, seconds: float) -> None:
        """One more token was sampled; the first one's time is the time to first token."""
        self.tokens += 1
        if self.tokens == 1:
            self.context_time = seconds
        else:
            self.step_times.append(seconds)

    def chunk(self, finish_reason: str | None = None) -> Chunk:
        answer = self.stream.text.lstrip() if self.lstrip else self.stream.text
        text = self.prefix + answer
        delta, self.shown = text[len(self.shown) :], text
        prompt = self.turn.prompt_tokens
        chunk = {
            "text": text,
            "delta": delta,
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": self.tokens,
                "total_tokens": prompt + self.tokens,
            },
            "finish_reason": finish_reason,
            "timing": self._timing() if finish_reason else None,
        }
        if self.traces is not None:
            chunk["tokens"], self.traces = self.traces, []
        return chunk

    def _timing(self) -> dict[str, Any]:
        fed = self.turn.prompt_tokens - self.turn.reused_tokens
        return {
            "context_tokens": fed,
            "reused_tokens": self.turn.reused_tokens,
            "context_time": self.context_time,
            "total_tokens": fed + len(self.step_times),
            "generation_time_list": list(self.step_times),
        }


class _Tracer:
    def __init__(self, tokenizer, k: int):
        self.tokenizer, self.k = tokenizer, k

    def __call__(self, token_id: int, logits: Tensor, scores: Tensor) -> TokenTrace:
        p = logits[0].float().softmax(dim=-1)  # (v,)
        best = p.topk(min(self.k, p.numel()))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return TokenTrace(
            id=token_id,
            text=self.tokenizer.decode([token_id]),
            probability=p[token_id].item(),
            drawn_from=scores[0].softmax(dim=-1)[token_id].item(),
            entropy=entropy(p),
            alternatives=[(i, self.tokenizer.decode([i]), q) for i, q in pairs],
        )
