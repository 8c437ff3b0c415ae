"""From (1, v) scores to one token id: parameters, processors, the draw.

Nothing here knows about pictures, prompts or text: scores and ids in, an id out.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .errors import GenParamsError, NonFiniteLogitsError

GREEDY_BELOW_TEMPERATURE = 1e-5
GREEDY_BELOW_TOP_P = 1e-8
ORDERS = ("tinychat", "hf")


GREEDY = {"temp": 0.0, "repeat_penalty": 1.0, "top_p": 1.0, "top_k": 0}

UNUSED = (
    "n_threads", "n_parts", "n_ctx", "n_batch", "n_keep", "logit_bias", "tfs_z", "typical_p",
    "repeat_last_n", "frequency_penalty", "presence_penalty", "mirostat", "mirostat_tau",
    "mirostat_eta",
)  # fmt: skip
"""What TinyChat's own gen_params hold besides, and none of its generators reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenParams:
    """How to sample; names and defaults are TinyChat's.

    temp            0 is greedy; 1 leaves the model's distribution as it is
    repeat_penalty  divides the positive scores of the ids in prompt and answer so far, multiplies
                    the negative ones; 1 is off, 1e-6 to 1e6 leave all scores finite
    top_p           keep the smallest set of ids whose probabilities reach this sum; 1 is off
    top_k           keep this many best ids; 0 or less is off
    n_vocab         accepted for TinyChat's sake and not used: scores know their own size
    n_predict       at most this many new tokens
    seed            same seed, same tokens, on the same kind of device; None draws a fresh one
    order           "tinychat": temperature, top-p, top-k; "hf": temperature, top-k, top-p
    stop            strings that end the answer and are not part of it

    Raises GenParamsError, naming the parameter, on anything impossible.
    """

    temp: float = 0.2
    repeat_penalty: float = 1.1
    top_p: float = 0.95
    top_k: int = 50
    n_vocab: int | None = None
    n_predict: int = 512
    seed: int | None = None
    order: str = "tinychat"
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        _check_warpers(self.temp, self.repeat_penalty, self.top_p, self.top_k, self.order)
        check_whole("n_predict", self.n_predict, at_least=0)
        if self.seed is not None:
            check_whole("seed", self.seed, at_least=0, at_most=2**63 - 1)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(s, str) and s for s in stop):
            raise GenParamsError(f"stop must be non-empty strings, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(stop))

    @classmethod
    def greedy(cls, **changes) -> GenParams:
        """Always the best token: no temperature, no cut, no penalty."""
        return cls(**GREEDY | changes)

    @classmethod
    def greedy_unless(cls, gen_params: Any, **changes) -> GenParams:
        """What is not said is greedy; a GenParams, or an object with its names, says everything."""
        if gen_params is None or isinstance(gen_params, Mapping):
            gen_params = GREEDY | dict(gen_params or {})
        return cls.of(gen_params).but(**changes)

    @classmethod
    def of(cls, gen_params: Any) -> GenParams:
        """Read a GenParams, a mapping, or any object with some of these attributes.

        A mapping may also hold the parameters that TinyChat carries along and never uses; anything
        else in it is an error. TinyChat's seed -1 is None.
        """
        if isinstance(gen_params, cls):
            return gen_params
        names = [f.name for f in fields(cls)]
        if isinstance(gen_params, Mapping):
            if unknown := sorted(map(str, set(gen_params) - {*names, *UNUSED})):
                raise GenParamsError(f"unknown parameters {unknown}, expected some of {names}")
            found = {n: v for n, v in gen_params.items() if n in names}
        else:
            found = {n: getattr(gen_params, n) for n in names if hasattr(gen_params, n)}
            if not found:
                raise GenParamsError(
                    f"gen_params must have some of {names}, got {type(gen_params).__name__}"
                )
        if found.get("seed") == -1:
            del found["seed"]
        return cls(**found)

    def but(self, **changes) -> GenParams:
        """A changed copy, checked again."""
        try:
            return replace(self, **changes)
        except TypeError as e:
            raise GenParamsError(str(e).replace(".__init__()", "")) from None

    @property
    def is_greedy(self) -> bool:
        """Whether no token is drawn: TinyChat's thresholds for temperature and top-p."""
        return self.temp < GREEDY_BELOW_TEMPERATURE or self.top_p < GREEDY_BELOW_TOP_P


def prepare_logits_processor(
    temperature: float,
    repetition_penalty: float,
    top_p: float,
    top_k: int,
    min_tokens_to_keep: int = 1,
    *,
    order: str = "tinychat",
) -> LogitsProcessorList:
    """transformers' own processors in the order asked for, without those that do nothing.

    The order matters: top-p counts the probabilities that top-k leaves, or the other way round.
    Raises GenParamsError.
    Source of the thresholds and the default order: llm-awq:tinychat/stream_generators.
    """
    _check_warpers(temperature, repetition_penalty, top_p, top_k, order)
    check_whole("min_tokens_to_keep", min_tokens_to_keep, at_least=1)
    processors, cuts = LogitsProcessorList(), LogitsProcessorList()
    if repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(float(repetition_penalty)))
    if temperature >= GREEDY_BELOW_TEMPERATURE and temperature != 1.0:
        processors.append(TemperatureLogitsWarper(float(temperature)))
    if GREEDY_BELOW_TOP_P <= top_p < 1.0:
        cuts.append(TopPLogitsWarper(float(top_p), min_tokens_to_keep=min_tokens_to_keep))
    if top_k > 0:
        cuts.append(TopKLogitsWarper(top_k, min_tokens_to_keep=min_tokens_to_keep))
    processors.extend(cuts if order == "tinychat" else reversed(cuts))
    return processors


class Sampler:
    """Draws one id after another with its own random generator: no global seed is read or set."""

    def __init__(self, params: GenParams, device: torch.device | str = "cpu"):
        self.greedy = params.is_greedy
        if self.greedy:  # a monotonic warper does not change which id is best
            params = params.but(temp=1.0, top_p=1.0, top_k=0)
        self.processors = prepare_logits_processor(
            params.temp, params.repeat_penalty, params.top_p, params.top_k, order=params.order
        )
        self.generator = torch.Generator(device)
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    def scores(self, logits: Tensor, seen: Tensor) -> Tensor:
        """(b, v) logits, (b, n) ids seen so far -> (b, v) fp32 scores; -inf is "never"."""
        scores = logits.float()
        for processor in self.processors:  # calling their list looks at signatures every time
            scores = processor(seen, scores)
        return scores

    def probabilities(self, scores: Tensor) -> Tensor:
        """(b, v) scores -> (b, v) what `draw` draws with; greedy puts all on the best."""
        if self.greedy:
            return torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)
        return scores.softmax(dim=-1)

    def draw(self, scores: Tensor) -> Tensor:
        """(b, v) scores -> (b, 1) ids."""
        if self.greedy:
            return scores.argmax(dim=-1, keepdim=True)
        # What torch.multinomial does, without its checks: they would wait for a GPU at every token.
        race = torch.empty_like(scores).exponential_(generator=self.generator)
        return (self.probabilities(scores) / race).argmax(dim=-1, keepdim=True)


def entropy(probabilities: Tensor) -> float:
    """Of a (v,) distribution, in bits."""
    return torch.special.entr(probabilities).sum().item() / math.log(2)


def check_finite(logits: Tensor, step: int) -> None:
    """NaN or +inf in (1, v) logits is an error that says how many, where and in which dtype.

    -inf passes: models use it for ids that must never come. If all are, nothing can come.
    """
    bad = logits.isnan() | logits.isposinf()
    if logits.isneginf().all():
        raise NonFiniteLogitsError(
            f"step {step}: all {logits.numel()} logits are -inf, so that no id can come"
        )
    if bad.any():
        raise NonFiniteLogitsError(
            f"step {step}: {int(bad.sum())} of {logits.numel()} logits are NaN or +inf "
            f"(dtype {str(logits.dtype).removeprefix('torch.')}); "
            "the weights are broken or the dtype overflows: try float32 or bfloat16"
        )


def _check_warpers(temperature, repetition_penalty, top_p, top_k, order) -> None:
    _number("temp", temperature, at_least=0.0)
    _number("repeat_penalty", repetition_penalty, at_least=1e-6, at_most=1e6)
    _number("top_p", top_p, at_least=0.0, at_most=1.0)
    check_whole("top_k", top_k)
    if order not in ORDERS:
        raise GenParamsError(f"order must be one of {ORDERS}, got {order!r}")


def _number(name, value, *, at_least=-math.inf, at_most=math.inf) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    ok = ok and abs(value) <= sys.float_info.max  # false for NaN, infinity and ints beyond floats
    if not (ok and at_least <= value <= at_most):
        high = f" and <= {at_most:g}" if at_most < math.inf else ""
        raise GenParamsError(f"{name} must be a finite number >= {at_least:g}{high}, got {value!r}")


def check_whole(name, value, *, at_least=-math.inf, at_most=math.inf) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value <= at_most:
        least = f" >= {at_least}" if at_least > -math.inf else ""
        most = f" and <= {at_most}" if at_most < math.inf else ""
        raise GenParamsError(f"{name} must be a whole number{least}{most}, got {value!r}")
