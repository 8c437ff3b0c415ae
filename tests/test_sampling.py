"""Parameters, processors and the draw."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import VECTORS

from vlmlib import GenParams, GenParamsError, NonFiniteLogitsError, prepare_logits_processor
from vlmlib.sampling import Sampler, check_finite

NONE_SEEN = torch.zeros(1, 0, dtype=torch.long)


def names_of(processors) -> list[str]:
    return [type(p).__name__ for p in processors]


def kept(processors, logits) -> list[int]:
    """Which ids the processors leave possible."""
    return processors(NONE_SEEN, logits)[0].isfinite().nonzero().flatten().tolist()


# ---- prepare_logits_processor ----


@pytest.mark.parametrize("case", VECTORS["prepare_logits_processor"])
def test_golden_processors(case, golden_tensors):
    penalty = case["repetition_penalty"]
    cuts = case["top_p"], case["top_k"], case["min_tokens_to_keep"]
    names = names_of(prepare_logits_processor(case["temperature"], penalty, *cuts))
    expected = case["processors_without_repetition"]
    assert names == ["RepetitionPenaltyLogitsProcessor"] * (penalty != 1.0) + expected

    x, y = golden_tensors[case["x"]], golden_tensors[case["out_without_repetition"]]
    seen = torch.zeros(len(x), 0, dtype=torch.long)
    without = prepare_logits_processor(case["temperature"], 1.0, *cuts)
    assert names_of(without) == expected
    assert torch.equal(without(seen, x.clone()), y)


@pytest.mark.parametrize(("order", "ids"), [("tinychat", [0, 1, 2]), ("hf", [0, 1])])
def test_order_of_the_cuts_matters(order, ids):
    """p=(.30,.25,.15,...): top-p .6 alone needs three; of the best three it needs two."""
    logits = torch.tensor([[0.30, 0.25, 0.15, 0.12, 0.10, 0.08]]).log()
    processors = prepare_logits_processor(1.0, 1.0, 0.6, 3, order=order)
    cuts = ["TopPLogitsWarper", "TopKLogitsWarper"]
    assert names_of(processors) == (cuts if order == "tinychat" else cuts[::-1])
    assert kept(processors, logits) == ids


@pytest.mark.parametrize(
    ("top_p", "top_k", "least", "ids"),
    [
        (1.0, 0, 1, [0, 1, 2, 3]),
        (1.0, 2, 1, [1, 3]),
        (0.5, 0, 1, [1]),
        (0.7, 0, 1, [1, 3]),
        (0.1, 1, 3, [0, 1, 3]),  # min_tokens_to_keep outvotes both
        (1.0, 9, 1, [0, 1, 2, 3]),
    ],
)
def test_which_ids_stay(top_p, top_k, least, ids):
    logits = torch.tensor([[0.1, 0.6, 0.05, 0.25]]).log()
    assert kept(prepare_logits_processor(1.0, 1.0, top_p, top_k, least), logits) == ids


@pytest.mark.parametrize("top_k", [0, -1, 10**9])
def test_no_top_k_keeps_a_large_vocabulary_whole(top_k):
    logits = torch.zeros(1, 60_001)  # the original cut at 50272
    assert len(kept(prepare_logits_processor(1.0, 1.0, 1.0, top_k), logits)) == 60_001


def test_repetition_penalty_comes_first_and_pushes_down():
    processors = prepare_logits_processor(0.5, 2.0, 1.0, 0)
    logits = torch.tensor([[4.0, -1.0, 3.0]])
    scores = processors(torch.tensor([[0, 1]]), logits)
    assert scores.tolist() == [[4.0, -4.0, 6.0]]  # (4/2, -1*2, 3) / 0.5


# ---- GenParams ----


def test_defaults_are_tinychats():
    p = GenParams()
    assert (p.temp, p.repeat_penalty, p.top_p, p.top_k, p.n_vocab, p.n_predict) == (
        *(0.2, 1.1, 0.95, 50),
        *(None, 512),
    )
    assert (p.seed, p.order, p.stop) == (None, "tinychat", ())


def test_read_from_mapping_object_or_itself():
    given = {"temp": 0.5, "top_k": 3, "n_predict": 7, "stop": "###"}
    expected = GenParams(temp=0.5, top_k=3, n_predict=7, stop=("###",))
    assert GenParams.of(given) == GenParams.of(SimpleNamespace(**given, other=1)) == expected
    assert GenParams.of(expected) is expected
    assert GenParams.of({}) == GenParams()
    with pytest.raises(GenParamsError, match=r"unknown parameters \['temperature'\]"):
        GenParams.of({"temperature": 1})
    for wrong in (None, 3, object()):
        with pytest.raises(GenParamsError, match="must have some of"):
            GenParams.of(wrong)


def test_changed_copies_are_checked():
    p = GenParams(seed=1)
    assert p.but(temp=0.9) == GenParams(temp=0.9, seed=1)
    assert p.but() == p
    with pytest.raises(GenParamsError, match="temp"):
        p.but(temp=-1)
    with pytest.raises(GenParamsError, match="^GenParams got .*'temprature'"):
        p.but(temprature=1)


NAN, INF, HUGE = float("nan"), float("inf"), 10**400


@pytest.mark.parametrize("least", [0, -1, 1.5, True, "1", None])
def test_impossible_min_tokens_to_keep(least):
    with pytest.raises(GenParamsError, match="^min_tokens_to_keep must be"):
        prepare_logits_processor(1.0, 1.0, 0.9, 5, least)


def test_processors_check_their_parameters():
    for name, args in {
        "temp": (NAN, 1.0, 0.9, 5),
        "repeat_penalty": (1.0, 0.0, 0.9, 5),
        "top_p": (1.0, 1.0, 1.5, 5),
        "top_k": (1.0, 1.0, 0.9, 0.5),
    }.items():
        with pytest.raises(GenParamsError, match=f"^{name} must be"):
            prepare_logits_processor(*args)
    with pytest.raises(GenParamsError, match="^order must be"):
        prepare_logits_processor(1.0, 1.0, 0.9, 5, order="vllm")


@pytest.mark.parametrize(
    ("changes", "greedy"),
    [
        ({"temp": 0}, True),
        ({"temp": 9.9e-6}, True),
        ({"temp": 1e-5}, False),
        ({"top_p": 0.0}, True),
        ({"top_p": 9.9e-9}, True),
        ({"top_p": 1e-8}, False),
        ({"top_k": 1}, False),  # always the best all the same
        ({}, False),
    ],
)
def test_greedy_thresholds(changes, greedy):
    assert GenParams(**changes).is_greedy is greedy
    assert GenParams.greedy().is_greedy
    assert GenParams.greedy(temp=0.7).temp == 0.7


# ---- Sampler ----


def draws(params: GenParams, logits, n: int = 30) -> list[int]:
    sampler = Sampler(params)
    return [int(sampler.draw(sampler.scores(logits, NONE_SEEN))) for _ in range(n)]


SPREAD = torch.linspace(0, 2, 50)[None]


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_same_seed_same_ids(seed):
    params = GenParams(temp=1.0, top_p=1.0, top_k=0, seed=seed)
    assert draws(params, SPREAD) == draws(params, SPREAD)
    assert draws(params, SPREAD) != draws(params.but(seed=seed ^ 1), SPREAD)


def test_without_a_seed_every_sampler_draws_its_own():
    params = GenParams(temp=1.0, top_p=1.0, top_k=0)
    torch.manual_seed(0)
    first = draws(params, SPREAD)
    torch.manual_seed(0)
    assert draws(params, SPREAD) != first


@pytest.mark.parametrize("seed", [None, 3])
def test_the_global_random_state_is_left_alone(seed):
    before = torch.get_rng_state()
    draws(GenParams(temp=1.0, seed=seed), SPREAD)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temp", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temp):
    n, logits = 3000, torch.tensor([[0.0, 1.0, -1.0, 0.5, 0.2]])
    ids = draws(GenParams.greedy(temp=temp, seed=11), logits, n)
    expected = n * (logits[0] / temp).softmax(dim=-1)
    chi_square = ((torch.bincount(torch.tensor(ids), minlength=5) - expected) ** 2 / expected).sum()
    assert chi_square < 25  # four degrees of freedom: passed by 99.995 % of all seeds, and by 11


@pytest.mark.parametrize("v", [2, 17, 40_000])
def test_what_is_drawn_is_what_multinomial_draws(v):
    sampler, dice = Sampler(GenParams.greedy(temp=1.0, seed=3)), torch.Generator().manual_seed(3)
    for _ in range(20):
        scores = 3 * torch.randn(1, v, generator=torch.Generator().manual_seed(v))
        scores[:, : v // 2] = -INF
        expected = torch.multinomial(scores.softmax(dim=-1), 1, generator=dice)
        assert torch.equal(sampler.draw(scores), expected)


def test_cut_ids_are_never_drawn():
    assert set(draws(GenParams.greedy(temp=5.0, top_k=3, seed=0), SPREAD, 200)) == {47, 48, 49}


def test_greedy_takes_the_best_and_heeds_the_penalty():
    logits = torch.tensor([[1.0, 3.0, 2.9]])
    assert draws(GenParams(temp=0, top_k=1), logits, 3) == [1, 1, 1]
    sampler = Sampler(GenParams.greedy(repeat_penalty=1.1))
    assert int(sampler.draw(sampler.scores(logits, torch.tensor([[1]])))) == 2


def test_probabilities_are_what_is_drawn_with():
    logits = torch.tensor([[1.0, 3.0, 2.9], [0.0, -1.0, 5.0]])
    seen = torch.zeros(2, 0, dtype=torch.long)
    greedy, warm = Sampler(GenParams(temp=0)), Sampler(GenParams.greedy(temp=2, top_k=2, seed=0))
    assert greedy.probabilities(logits).tolist() == [[0, 1, 0], [0, 0, 1]]
    p = warm.probabilities(warm.scores(logits, seen))
    assert torch.allclose(p[0], torch.tensor([0.0, 0.512497, 0.487503]))
    assert warm.draw(warm.scores(logits, seen)).shape == (2, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_fp32_and_the_logits_stay_as_they_were(dtype):
    logits = SPREAD.to(dtype)
    before = logits.clone()
    scores = Sampler(GenParams()).scores(logits, torch.tensor([[49]]))
    assert scores.dtype == torch.float32
    assert torch.equal(logits, before)


# ---- check_finite ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bad_logits_are_counted(dtype):
    logits = torch.zeros(1, 9, dtype=dtype)
    logits[0, 2], logits[0, 5], logits[0, 7] = NAN, INF, -INF
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(NonFiniteLogitsError, match=rf"step 4: 2 of 9 logits .*\(dtype {name}\)"):
        check_finite(logits, step=4)


def test_minus_infinity_passes():
    check_finite(torch.tensor([[0.0, -INF, 1.0]]), step=0)


TINYCHAT = {
    "seed": -1, "n_threads": 1, "n_predict": 512, "n_parts": -1, "n_ctx": 512, "n_batch": 512,
    "n_keep": 0, "n_vocab": 50272, "logit_bias": {}, "top_k": 40, "top_p": 0.95, "tfs_z": 1.0,
    "typical_p": 1.0, "temp": 0.7, "repeat_penalty": 1.1, "repeat_last_n": 64,
    "frequency_penalty": 0.0, "presence_penalty": 0.0, "mirostat": 0, "mirostat_tau": 5.0,
    "mirostat_eta": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("make", [dict, lambda values: SimpleNamespace(**values)])
def test_tinychats_own_parameters_are_read(make):
    """As a dictionary with attributes or as an object; what it carries along is not used."""
    params = GenParams.of(make(TINYCHAT))
    assert params == GenParams(temp=0.7, top_k=40, n_vocab=50272) and params.seed is None
    with pytest.raises(GenParamsError, match="unknown parameters \\['tempo'\\]"):
        GenParams.of(TINYCHAT | {"tempo": 1})
    for seed in (-1, 2**64):
        with pytest.raises(GenParamsError, match=f"^seed must be .* >= 0 and <= {2**63 - 1}, got"):
            GenParams(seed=seed)


def test_what_is_not_said_is_greedy_in_the_short_calls():
    assert GenParams.greedy_unless(None) == GenParams.greedy()
    assert GenParams.greedy_unless({"temp": 0.7}) == GenParams.greedy(temp=0.7)
    assert GenParams.greedy_unless({"temp": 0.7}, seed=1) == GenParams.greedy(temp=0.7, seed=1)
    assert GenParams.greedy_unless(GenParams(), seed=1) == GenParams(seed=1)


def test_logits_that_are_all_minus_infinity_are_an_error():
    with pytest.raises(NonFiniteLogitsError, match="step 3: all 5 logits are -inf"):
        check_finite(torch.full((1, 5), -torch.inf), 3)
    check_finite(torch.tensor([[0.0, -torch.inf]]), 3)
