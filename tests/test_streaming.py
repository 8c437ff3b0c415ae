"""The stream generator with tiny random models: what it computes, yields and refuses."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import itertools
import weakref
from functools import cache

import pytest
import torch
from helpers import (
    CONTEXT,
    TOKENIZERS,
    expanded_ids,
    golden_tokenizer,
    ids_of,
    living_caches,
    noise,
    penalised_ids,
    pixels,
    tiny_llava,
    watch_seen_ids,
    without_times,
)
from tokenizers.decoders import DecodeStream

import vlmlib
from vlmlib import (
    IMAGE_TOKEN_INDEX,
    CacheError,
    ContextLengthError,
    GenParams,
    GenParamsError,
    ImageError,
    LlavaStreamGenerator,
    NonFiniteLogitsError,
    PlaceholderError,
    PromptError,
    ShapeError,
    TimeStats,
    stream_output,
)
from vlmlib.decoding import Turn, decode

TEXT = "USER: What is this? ASSISTANT:"
ONE = "USER: <image>\nWhat is this? ASSISTANT:"
TWO = "USER: <image>\n<image>\nLeft or right? ASSISTANT:"
PROMPTS = [(TEXT, 0), (ONE, 1), (TWO, 2), ("<image>", 1), ("a red circle <image>", 1)]
GREEDY = GenParams.greedy(n_predict=12)

both_paths = pytest.mark.parametrize("path", ["vlmlib", "transformers"])


@cache
def model_of(name: str, seed: int, tower: str = "clip") -> vlmlib.Llava:
    return tiny_llava(name, seed, tower=tower)


def ask(model, prompt=ONE, params=GREEDY, *, path="vlmlib", image_tensor="one", start=0, **options):
    """Open a stream on either path; the picture is `pixels(1)` unless said otherwise."""
    if isinstance(image_tensor, str):
        image_tensor = pixels(1)
    net = model.net if path == "transformers" else model
    return LlavaStreamGenerator(
        net, model.tokenizer, prompt, start, params, image_tensor=image_tensor, **options
    )


# ---- the same numbers as transformers ----


@both_paths
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("seed", range(3))
def test_greedy_ids_are_those_of_generate(name, tower, seed, path):
    model = model_of(name, seed, tower)
    for prompt, n in PROMPTS:
        pictures = pixels(n, seed) if n else None
        ids = expanded_ids(model.net, model.tokenizer, prompt)
        streamed = ids_of(ask(model, prompt, path=path, image_tensor=pictures, trace=0))
        for use_cache in (True, False):
            whole = model.net.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=GREEDY.n_predict,
                use_cache=use_cache,
                **({"pixel_values": pictures} if n else {}),
            )
            assert streamed == whole[0, ids.shape[1] :].tolist()


def test_the_random_models_say_different_things():
    answers = {
        tuple(ids_of(ask(model_of(name, seed), image_tensor=pixels(1, picture), trace=0)))
        for name in TOKENIZERS
        for seed in range(3)
        for picture in range(3)
    }
    assert len(answers) > 12
    assert max(len(set(a)) for a in answers) > 6


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize(("prompt", "n"), PROMPTS)
def test_first_logits_are_those_of_forward(prompt, n, tower):
    model = model_of("tokenizer_bos", 0, tower)
    pictures = pixels(n) if n else None
    with torch.inference_mode():
        turn = model.turn(prompt, pictures)
        ours = turn.prefill()
        ids = expanded_ids(model.net, model.tokenizer, prompt)
        theirs = model.net(input_ids=ids, pixel_values=pictures).logits[:, -1]
    assert turn.prompt_tokens == ids.shape[1]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-5


@both_paths
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("temp", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 20, 0.8), (1.8, 50, 0.95), (3.0, 5, 1.0)]
)
def test_sampled_ids_are_those_of_generate(llava, seed, temp, top_k, top_p, path):
    ids = expanded_ids(llava.net, llava.tokenizer, ONE)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        whole = llava.net.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels(1),
            do_sample=True,
            temperature=temp,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=1.0,
            max_new_tokens=12,
        )
    params = GenParams(
        temp=temp, top_k=top_k, top_p=top_p, repeat_penalty=1.0, seed=seed, order="hf", n_predict=12
    )
    assert ids_of(ask(llava, ONE, params, path=path, trace=0)) == whole[0, ids.shape[1] :].tolist()


@both_paths
def test_repetition_penalty_by_hand(llava, path, monkeypatch):
    """Every id of prompt and answer is pushed down, whatever stands for the picture is not."""
    penalty, n = 1.7, 10
    text_ids = [i for i in llava.prompt_ids(ONE) if i != IMAGE_TOKEN_INDEX]
    expected = penalised_ids(llava.turn(ONE, pixels(1)), text_ids, penalty, n)
    seen = watch_seen_ids(monkeypatch)
    params = GenParams.greedy(n_predict=n, repeat_penalty=penalty)
    ids = ids_of(ask(llava, ONE, params, path=path, trace=0))
    assert ids == expected
    assert ids != ids_of(ask(llava, ONE, params.but(repeat_penalty=1.0), path=path, trace=0))
    assert seen[:n] == [text_ids + expected[:k] for k in range(n)]
    assert llava.config.image_token_id not in seen[0] and IMAGE_TOKEN_INDEX not in seen[0]


@both_paths
def test_n_vocab_cuts_nothing_off(llava, path):
    """The published systems leave out all ids from n_vocab on where there is no top-k."""
    params = GenParams(temp=1.5, top_p=1.0, top_k=0, seed=0, n_predict=12)
    ids = ids_of(ask(llava, path=path, params=params.but(n_vocab=3), trace=0))
    assert max(ids) >= 3
    assert ids == ids_of(ask(llava, path=path, params=params, trace=0))


@both_paths
@pytest.mark.parametrize("shape", ["one tensor", "list of 3-D", "list of 4-D"])
def test_forms_of_image_tensor(llava, shape, path):
    x = pixels(2)
    forms = {"one tensor": x, "list of 3-D": list(x), "list of 4-D": [x[:1], x[1:]]}
    expected = without_times(ask(llava, TWO, image_tensor=x, path=path))
    assert without_times(ask(llava, TWO, image_tensor=forms[shape], path=path)) == expected
    empty = without_times(ask(llava, TEXT, image_tensor=[], path=path))
    assert empty == without_times(ask(llava, TEXT, image_tensor=None, path=path))


# ---- the contract of every chunk ----


@both_paths
@pytest.mark.parametrize("interval", [1, 2, 3, 7])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("n_predict", [0, 1, 2, 12])
def test_contract_of_every_chunk(llava, n_predict, echo, interval, path):
    params = GREEDY.but(n_predict=n_predict)
    chunks = list(ask(llava, ONE, params, path=path, echo=echo, stream_interval=interval))
    prompt_tokens = expanded_ids(llava.net, llava.tokenizer, ONE).shape[1]
    before = ""
    for chunk in chunks:
        assert set(chunk) == {"text", "delta", "usage", "finish_reason", "timing"}
        assert chunk["text"] == before + chunk["delta"]
        before = chunk["text"]
        usage = chunk["usage"]
        assert usage["prompt_tokens"] == prompt_tokens
        assert usage["total_tokens"] == prompt_tokens + usage["completion_tokens"]
    *early, last = chunks
    assert all(c["finish_reason"] is None and c["timing"] is None for c in early)
    assert last["finish_reason"] == "length"
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == [*range(interval, n_predict + 1, interval), n_predict]
    assert "".join(c["delta"] for c in chunks) == last["text"]
    assert last["text"].startswith(ONE if echo else "")

    timing = last["timing"]
    assert timing["context_tokens"] == prompt_tokens and timing["reused_tokens"] == 0
    assert timing["context_time"] > 0
    assert len(timing["generation_time_list"]) == max(n_predict - 1, 0)
    assert all(t > 0 for t in timing["generation_time_list"])
    assert timing["total_tokens"] == prompt_tokens + max(n_predict - 1, 0)


@both_paths
def test_text_is_what_the_ids_decode_to(llava, path):
    chunks = list(ask(llava, path=path, trace=0, params=GREEDY.but(n_predict=40)))
    full = llava.tokenizer.decode(ids_of(chunks), skip_special_tokens=True)
    text = chunks[-1]["text"]
    assert len(text) > 20
    assert full.startswith(text) and set(full[len(text) :]) <= {"\ufffd"}


@both_paths
def test_every_id_is_decoded_once(llava, path, monkeypatch):
    """The original decodes the whole answer again at every step."""
    expected = ids_of(ask(llava, path=path, trace=0))
    pushed = []

    class Watched:
        def __init__(self, **options):
            self.stream = DecodeStream(**options)

        def step(self, tokenizer, token_id):
            pushed.append(token_id)
            return self.stream.step(tokenizer, token_id)

    monkeypatch.setattr("vlmlib.tokenization.DecodeStream", Watched)
    for name in ("decode", "batch_decode", "convert_ids_to_tokens"):
        monkeypatch.setattr(type(llava.tokenizer), name, lambda *_, **__: pytest.fail("decoded"))
    for chunk in ask(llava, path=path):
        assert pushed == expected[: chunk["usage"]["completion_tokens"]]
    assert pushed == expected


@both_paths
def test_the_interval_does_not_change_the_answer(llava, path):
    last = [without_times(ask(llava, path=path, stream_interval=n))[-1] for n in (1, 2, 3, 7, 100)]
    assert all(c | {"delta": ""} == last[0] | {"delta": ""} for c in last)


@both_paths
@pytest.mark.parametrize("k", [0, 1, 5])
def test_a_stop_id_ends_the_answer(llava, path, k):
    ids = ids_of(ask(llava, path=path, trace=0))
    stop = next(i for i in ids[k:] if i not in ids[:k])
    n = ids.index(stop) + 1
    for n_predict in (50, n):  # "stop" beats "length" when it is the last id allowed
        params = GREEDY.but(n_predict=n_predict)
        chunks = list(ask(llava, path=path, params=params, stop_token_ids=[stop], trace=0))
        last = chunks[-1]
        assert last["finish_reason"] == "stop"
        assert ids_of(chunks) == ids[:n]
        assert last["usage"]["completion_tokens"] == n, "the stop id counts"
        assert len(last["timing"]["generation_time_list"]) == n - 1
        full = llava.tokenizer.decode(ids[: n - 1], skip_special_tokens=True)
        assert last["text"] == full.rstrip("\ufffd"), "the stop id leaves no text"
    cut = list(ask(llava, path=path, params=GREEDY.but(n_predict=n - 1), stop_token_ids=[stop]))
    assert cut[-1]["finish_reason"] == "length"


@both_paths
def test_the_models_own_eos_ends_the_answer(llava, path):
    model = copy.deepcopy(llava)
    eos = ids_of(ask(model, trace=0))[3]
    for many in (eos, [5, eos]):
        model.net.generation_config.eos_token_id = many
        chunks = list(ask(model, path=path))
        assert chunks[-1]["finish_reason"] == "stop"
        assert chunks[-1]["usage"]["completion_tokens"] <= 4
    assert eos in model.stop_token_ids and model.tokenizer.eos_token_id in model.stop_token_ids


@both_paths
def test_stop_token_ids_are_never_changed(llava, path):
    default = inspect.signature(LlavaStreamGenerator).parameters["stop_token_ids"].default
    mine = [7, 9]
    list(ask(llava, path=path, stop_token_ids=mine))
    list(ask(llava, path=path))
    assert mine == [7, 9]
    assert list(default) == []


@both_paths
def test_stop_strings(llava, path):
    text = list(ask(llava, path=path))[-1]["text"]
    stop = text[4:7]
    at = text.index(stop)
    last = list(ask(llava, path=path, params=GREEDY.but(stop=("never said", stop))))[-1]
    assert (last["text"], last["finish_reason"]) == (text[:at], "stop")
    last = list(ask(llava, path=path, params=GREEDY.but(stop=text + "x")))[-1]
    assert (last["text"], last["finish_reason"]) == (text, "length"), "kept back, then let go"


# ---- decode alone, with a script in place of a model ----


def script(ids, vocabulary=371, context_len=1000, prompt_tokens=3) -> Turn:
    """A turn whose logits ask for `ids`, one after the other, and then for id 90 ("x")."""
    wanted = itertools.chain(ids, itertools.repeat(90))

    def logits(_=None):
        return torch.nn.functional.one_hot(torch.tensor([next(wanted)]), vocabulary) * 10.0

    return Turn(logits, logits, [], prompt_tokens, context_len, torch.device("cpu"))


def play(text, *, stop_ids=(2,), params=GREEDY, eos=True, tokenizer=None, **options) -> list[dict]:
    tokenizer = tokenizer or golden_tokenizer("tokenizer_no_bos")
    ids = tokenizer(text).input_ids + [2] * eos
    return list(decode(script(ids), tokenizer, params, stop_ids=stop_ids, **options))


def test_script_is_played():
    chunks = play("a red circle", params=GREEDY.but(n_predict=99))
    assert chunks[-1]["text"] == "a red circle"
    assert chunks[-1]["finish_reason"] == "stop"
    assert chunks[0]["text"] == "a"


def test_stop_beats_length():
    n = len(golden_tokenizer()("a red circle", add_special_tokens=False).input_ids)
    for n_predict, reason in [(n, "length"), (n + 1, "stop"), (n + 2, "stop")]:
        last = play("a red circle", params=GREEDY.but(n_predict=n_predict))[-1]
        assert (last["text"], last["finish_reason"]) == ("a red circle", reason)


def test_stop_string_in_the_last_allowed_token_is_a_stop():
    n = len(golden_tokenizer()("xx##", add_special_tokens=False).input_ids)
    last = play("xx##", eos=False, params=GREEDY.but(n_predict=n, stop="##"))[-1]
    assert (last["text"], last["finish_reason"]) == ("xx", "stop")


def test_emoji_come_whole_and_the_waiting_chunks_say_nothing_new():
    chunks = play("ok 😀!", params=GREEDY.but(n_predict=99))
    assert chunks[-1]["text"] == "ok 😀!"
    assert not any("\ufffd" in c["text"] for c in chunks)
    assert [c["delta"] for c in chunks].count("") >= 3


def test_lstrip_and_prefix():
    assert play("  a b ", lstrip=True)[-1]["text"] == "a b "
    chunks = play("  a b ", lstrip=True, prefix=" Q: ")
    assert chunks[-1]["text"] == "".join(c["delta"] for c in chunks) == " Q: a b "


def test_times_exclude_the_consumer(monkeypatch):
    now = itertools.count()
    clock = [0.0]
    monkeypatch.setattr("vlmlib.decoding.perf_counter", lambda: next(now) + clock[0])
    tokenizer = golden_tokenizer()
    for chunk in decode(script([90] * 9), tokenizer, GREEDY.but(n_predict=9), stop_ids=[2]):
        clock[0] += 1000.0  # a slow consumer
        timing = chunk["timing"]
    assert timing["context_time"] < 10
    assert len(timing["generation_time_list"]) == 8
    assert max(timing["generation_time_list"]) < 10


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_bad_logits_name_their_step(value, step, temp):
    turn, fed = script([90] * 9), []

    def broken(token=None):
        logits = turn.step(token)
        logits[0, :3] = value if len(fed) == step else 0.0
        fed.append(token)
        return logits

    bad = Turn(broken, broken, [], 3, 100, torch.device("cpu"))
    stream = decode(bad, golden_tokenizer(), GenParams(temp=temp, seed=0), stop_ids=[])
    for _ in range(step):
        next(stream)
    with pytest.raises(NonFiniteLogitsError, match=rf"step {step}: 3 of 371 .*float32"):
        next(stream)


# ---- trace ----


@both_paths
@pytest.mark.parametrize("k", [0, 1, 4, 10**6])
def test_trace(llava, path, k):
    params = GenParams(temp=1.5, top_k=20, top_p=0.9, seed=5, n_predict=8)
    chunks = list(ask(llava, path=path, params=params, trace=k, stream_interval=3))
    assert [len(c["tokens"]) for c in chunks] == [3, 3, 2]
    vocabulary = llava.net.lm_head.out_features
    for token in sum((c["tokens"] for c in chunks), []):
        assert len(token.alternatives) == min(k, vocabulary)
        shares = [p for _, _, p in token.alternatives]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 1 + 1e-5
        assert 0 < token.probability <= 1 and 0 < token.drawn_from <= 1
        assert 0 <= token.entropy <= torch.tensor(vocabulary).log2() + 1e-4
        assert token.text == llava.tokenizer.decode([token.id])
        assert all(text == llava.tokenizer.decode([i]) for i, text, _ in token.alternatives)
        if k > vocabulary:
            assert sum(shares) == pytest.approx(1, abs=1e-4)
            (mine,) = (p for i, _, p in token.alternatives if i == token.id)
            assert mine == pytest.approx(token.probability)
    plain = list(ask(llava, path=path, params=params, stream_interval=3))
    assert [c["text"] for c in chunks] == [c["text"] for c in plain], "looking changes nothing"
    assert not any("tokens" in c for c in plain)


def test_trace_of_a_known_distribution():
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    logits = torch.full((1, 371), -torch.inf)
    logits[0, [90, 67, 28, 33]] = p.log()
    turn = Turn(lambda: logits, lambda _: logits, [], 1, 99, torch.device("cpu"))
    params = GREEDY.but(n_predict=1)
    (chunk,) = list(decode(turn, golden_tokenizer(), params, stop_ids=[], trace=2))[:1]
    (token,) = chunk["tokens"]
    assert (token.id, token.text) == (90, "x")
    assert token.probability == pytest.approx(0.5)
    assert token.entropy == pytest.approx(1.75)
    assert [(i, pytest.approx(q)) for i, _, q in token.alternatives] == [(90, 0.5), (67, 0.25)]
    assert token.drawn_from == pytest.approx(0.5), "greedy cuts nothing off"
    params = GenParams(temp=1.0, top_k=2, top_p=1.0, repeat_penalty=1.0, n_predict=1, seed=0)
    (token,) = list(decode(turn, golden_tokenizer(), params, stop_ids=[], trace=0))[0]["tokens"]
    assert token.drawn_from == pytest.approx({90: 2 / 3, 67: 1 / 3}[token.id])
    assert token.probability == pytest.approx({90: 0.5, 67: 0.25}[token.id])
    assert token.entropy == pytest.approx(1.75), "the model's own, whatever is cut off"


# ---- streams do not disturb each other, nor the caller ----


def in_turns(streams) -> list[list[dict]]:
    """Read all streams, one chunk of each at a time."""
    out = [[] for _ in streams]
    for round_ in itertools.zip_longest(*streams):
        for chunks, chunk in zip(out, round_, strict=True):
            chunks += [chunk] if chunk else []
    return out


SAMPLED = GenParams(temp=1.2, n_predict=12, seed=3)


@pytest.mark.parametrize(
    "requests",
    [
        [{}, {}],
        [{}, {"image_tensor": pixels(1, seed=1)}],
        [{"params": SAMPLED}, {"params": SAMPLED, "image_tensor": pixels(1, seed=1)}],
        [{}, {"path": "transformers"}],
        [
            {"params": SAMPLED},
            {"prompt": TWO, "image_tensor": pixels(2), "path": "transformers"},
            {"prompt": TEXT, "image_tensor": None, "params": GREEDY.but(n_predict=20)},
        ],
    ],
    ids=["alike", "pictures", "sampled", "both paths", "three"],
)
def test_interleaved_streams_equal_lone_ones(llava, requests):
    alone = [list(ask(llava, **r)) for r in requests]
    together = in_turns([ask(llava, **r) for r in requests])
    assert [without_times(c) for c in together] == [without_times(c) for c in alone]
    for chunks in together:
        last = chunks[-1]
        times = last["timing"]["generation_time_list"]
        assert len(times) == last["usage"]["completion_tokens"] - 1
    assert len({id(c[-1]["timing"]["generation_time_list"]) for c in together}) == len(requests)


@both_paths
def test_inference_mode_stays_inside(llava, path):
    for _ in ask(llava, path=path):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        x = torch.ones(2, requires_grad=True)
        (x * 2).sum().backward()
    with torch.no_grad():
        for _ in ask(llava, path=path):
            assert not torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()


def read_all(stream):
    list(stream)


def close_early(stream):
    next(stream)
    next(stream)
    stream.close()


def drop_early(stream):
    next(stream)


def fail_while_reading(stream):
    with pytest.raises(KeyError):
        for _ in stream:
            raise KeyError


def never_read(stream):
    pass


@both_paths
@pytest.mark.parametrize(
    "consume", [read_all, close_early, drop_early, fail_while_reading, never_read]
)
def test_memory_is_freed(llava, path, consume, fast_gc):
    before = living_caches()
    picture = pixels(1)
    alive = weakref.ref(picture)
    stream = ask(llava, path=path, image_tensor=picture)
    assert living_caches() == before + 1, "the stream has a cache"
    del picture
    consume(stream)
    if consume in (read_all, close_early):  # what is left of the stream holds nothing
        gc.collect()
        assert alive() is None
        assert living_caches() == before
    del stream
    gc.collect()
    assert alive() is None
    assert living_caches() == before


@both_paths
def test_pictures_are_encoded_once(llava, path):
    sizes = []
    hook = llava.net.model.vision_tower.register_forward_hook(
        lambda module, args, kwargs, out: sizes.append(len(kwargs.get("pixel_values", *args[:1]))),
        with_kwargs=True,
    )
    try:
        stream = ask(llava, TWO, path=path, image_tensor=pixels(2))
        assert sizes == [], "nothing is computed before the first chunk is asked for"
        list(stream)
    finally:
        hook.remove()
    assert sum(sizes) == 2


# ---- a second turn ----


def second_turn(model, prompt=ONE, image_tensor=None):
    """A cache after one answer, and the transcript that goes on from there."""
    cache = model.new_cache()
    image_tensor = pixels(1) if image_tensor is None else image_tensor
    *_, last = ask(model, prompt, image_tensor=image_tensor, cache=cache, chunk_prefilling=True)
    return cache, f"{prompt}{last['text']} USER: And now? ASSISTANT:"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("seed", range(3))
def test_second_turn_equals_the_whole_transcript(name, seed):
    model = model_of(name, seed)
    cache, transcript = second_turn(model)
    first = len(expanded_ids(model.net, model.tokenizer, ONE)[0])
    content = list(cache.content)
    assert len(cache) == first + GREEDY.n_predict - 1, "the last id was never fed"

    whole = list(ask(model, transcript, trace=0))
    again = list(
        ask(model, transcript, start=len(cache), cache=cache, chunk_prefilling=True, trace=0)
    )
    assert ids_of(again) == ids_of(whole)
    assert again[-1]["text"] == whole[-1]["text"]
    assert again[-1]["usage"] == whole[-1]["usage"]
    timing = again[-1]["timing"]
    assert timing["reused_tokens"] >= first - 1
    assert (
        timing["context_tokens"] == whole[-1]["timing"]["context_tokens"] - timing["reused_tokens"]
    )
    assert timing["total_tokens"] == timing["context_tokens"] + GREEDY.n_predict - 1
    assert cache.content[: timing["reused_tokens"]] == content[: timing["reused_tokens"]]
    assert int(cache.past.get_seq_length()) == len(cache)


@torch.inference_mode()
def test_every_start_pos_gives_the_same_logits(llava):
    """Also in the middle of a picture, and where the new transcript is only the old one's head."""
    prompt = "USER: <image>\na <image>\nb ASSISTANT:"
    cache, transcript = second_turn(llava, prompt, pixels(2))
    for text in (transcript, prompt):
        expected = llava.turn(text, pixels(2)).prefill()
        for start in range(len(cache) + 1):
            copied = copy.deepcopy(cache)
            turn = llava.turn(text, pixels(2), start_pos=start, cache=copied)
            assert turn.reused_tokens <= min(start, turn.prompt_tokens - 1)
            assert (turn.prefill() - expected).abs().max() < 1e-4
            assert len(copied) == turn.prompt_tokens == int(copied.past.get_seq_length())
            step = turn.step(torch.tensor([[5]]))
            assert step.shape == expected.shape and len(copied) == turn.prompt_tokens + 1


@torch.inference_mode()
@pytest.mark.parametrize("changed", [0, 1])
def test_a_changed_picture_invalidates_what_follows(llava, changed):
    prompt = "USER: <image>\na <image>\nb ASSISTANT:"
    cache, transcript = second_turn(llava, prompt, pixels(2))
    other = pixels(2)
    other[changed] += 0.01
    turn = llava.turn(transcript, other, start_pos=len(cache), cache=cache)
    ids = llava.prompt_ids(prompt)
    where = [i for i, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX][changed]
    assert turn.reused_tokens == where + 3 * changed, "up to the picture, and not one further"
    assert (turn.prefill() - llava.turn(transcript, other).prefill()).abs().max() < 1e-4


def test_without_chunk_prefilling_everything_is_fed_again(llava):
    cache, transcript = second_turn(llava)
    last = list(ask(llava, transcript, start=len(cache), cache=cache))[-1]
    assert last["timing"]["reused_tokens"] == 0
    assert last["timing"]["context_tokens"] == last["usage"]["prompt_tokens"]


def test_reused_pictures_are_not_encoded_again(llava, monkeypatch):
    calls, encode = [], llava.encode
    monkeypatch.setattr(llava, "encode", lambda medium: calls.append(1) or encode(medium))
    cache, transcript = second_turn(llava)
    assert calls == [1]
    llava.feature_cache.clear()
    list(ask(llava, transcript, start=len(cache), cache=cache, chunk_prefilling=True))
    assert calls == [1]


@pytest.mark.parametrize("chunk_prefilling", [False, True])
def test_a_bare_transformers_model_starts_at_0(llava, chunk_prefilling):
    with pytest.raises(CacheError, match="start_pos is 3: a transformers model starts at 0"):
        ask(llava, path="transformers", start=3, chunk_prefilling=chunk_prefilling)


# ---- what is refused, and when ----


@both_paths
@pytest.mark.parametrize(
    ("prompt", "n", "words"),
    [(ONE, 0, "1 <image>.*0 image"), (TEXT, 2, "0 <image>.*2 image"), (TWO, 3, "2 <image>.*3 im")],
)
def test_wrong_number_of_pictures(llava, path, prompt, n, words):
    with pytest.raises(PlaceholderError, match=words):
        ask(llava, prompt, path=path, image_tensor=pixels(n) if n else None)


@both_paths
def test_image_tensor_that_is_none(llava, path):
    for wrong in (torch.zeros(28, 28), torch.zeros(1, 1, 28, 28), ["a.png"], torch.zeros(0, 3)):
        with pytest.raises(ShapeError, match=r"expected \(3, h, w\) or .* pixel values, got"):
            ask(llava, path=path, image_tensor=wrong)


@both_paths
def test_prompt_longer_than_the_context(llava, path):
    prompt = ONE + " x" * 100
    n = expanded_ids(llava.net, llava.tokenizer, prompt).shape[1]
    with pytest.raises(ContextLengthError, match=rf"{n} tokens.*context holds {CONTEXT}"):
        ask(llava, prompt, path=path)


@both_paths
def test_the_answer_ends_with_the_context(llava, path):
    room = CONTEXT - expanded_ids(llava.net, llava.tokenizer, ONE).shape[1]
    last = list(ask(llava, path=path, params=GREEDY.but(n_predict=10**9)))[-1]
    assert last["finish_reason"] == "length"
    assert last["usage"]["completion_tokens"] == room
    assert last["usage"]["total_tokens"] == CONTEXT
    filler = "x" * (room - 1)
    for n, expected in [(room - 1, 1), (room - 2, 2)]:
        last = list(ask(llava, filler[:n] + ONE, path=path, params=GREEDY))[-1]
        assert last["usage"]["completion_tokens"] == expected
    with pytest.raises(ContextLengthError):
        ask(llava, "x" + filler + ONE, path=path)


@both_paths
def test_broken_weights(llava, path):
    model = copy.deepcopy(llava)
    torch.nn.init.constant_(model.net.lm_head.weight, float("nan"))
    n = model.net.lm_head.out_features
    with pytest.raises(NonFiniteLogitsError, match=rf"step 0: {n} of {n} logits .*float32"):
        next(ask(model, path=path))


@both_paths
@pytest.mark.parametrize("device", ["cuda:0", "meta", torch.device("cuda", 1)])
def test_another_device(llava, path, device):
    with pytest.raises(ValueError, match=r"device is .*, but the model is on cpu"):
        ask(llava, path=path, device=device)


@both_paths
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_own_device(llava, path, device):
    assert next(ask(llava, path=path, device=device))["usage"]["completion_tokens"] == 1


@both_paths
def test_errors_come_at_the_call(llava, path):
    for error, options in [
        (GenParamsError, {"params": {"temp": -1}}),
        (GenParamsError, {"params": {"temperature": 1}}),
        (ValueError, {"stream_interval": 0}),
        (PlaceholderError, {"image_tensor": None}),
    ]:
        with pytest.raises(error):
            ask(llava, path=path, **options)


@both_paths
def test_parameters_as_mapping_and_object(llava, path):
    values = {"temp": 0.0, "repeat_penalty": 1.0, "top_p": 1.0, "top_k": 0, "n_predict": 12}
    expected = without_times(ask(llava, path=path))
    holder = type("Namespace", (), values | {"n_vocab": 32000})
    assert without_times(ask(llava, path=path, params=values)) == expected
    assert without_times(ask(llava, path=path, params=holder)) == expected


# ---- the short way, and the console ----


def test_stream_and_answer(llava, tmp_path):
    picture = noise(40, 30)
    picture.save(tmp_path / "a.png")
    chunks = list(vlmlib.stream(llava, [picture, "What is this?"], n_predict=9))
    prompt = "USER: <image>\nWhat is this? ASSISTANT:"
    assert llava.chat_prompt([picture, "What is this?"]) == prompt
    *_, last = ask(
        llava, prompt, GREEDY.but(n_predict=9), image_tensor=llava.prepare_images([picture])
    )
    assert chunks[-1]["text"] == last["text"].lstrip()
    again = vlmlib.answer(llava, [tmp_path / "a.png", "What is this?"], n_predict=9)
    assert again == chunks[-1]["text"]
    assert vlmlib.answer(llava, "Hello", n_predict=3) == vlmlib.answer(
        llava, ["Hello"], n_predict=3
    )
    sampled = vlmlib.answer(llava, "Hello", {"temp": 1.5, "n_predict": 9}, seed=1)
    greedy_but = GenParams.greedy(temp=1.5, n_predict=9, seed=1)
    assert sampled == vlmlib.answer(llava, "Hello", greedy_but), "what is not said is greedy"


def test_stream_drops_the_space_in_front(llava):
    for seed in range(99):  # until an answer begins with a space
        params = GenParams.greedy(temp=3.0, seed=seed, n_predict=3)
        *_, last = ask(llava, llava.chat_prompt(["Hello"]), params, image_tensor=None)
        if last["text"][:1].isspace() and last["text"].strip():
            break
    assert vlmlib.answer(llava, "Hello", params) == last["text"].lstrip() != last["text"]


def test_stream_goes_on_with_a_cache(llava):
    cache = llava.new_cache()
    parts = [noise(28, 28), "What is this?"]
    first = list(vlmlib.stream(llava, parts, cache=cache, n_predict=5))
    second = list(vlmlib.stream(llava, parts, cache=cache, n_predict=5))
    assert second[-1]["text"] == first[-1]["text"]
    assert second[-1]["timing"]["context_tokens"] == 1, "the last position is always fed again"


def test_stream_checks_at_the_call(llava, tmp_path):
    with pytest.raises(GenParamsError, match="top_p"):
        vlmlib.stream(llava, "Hello", top_p=2)
    with pytest.raises(GenParamsError, match="nonsense"):
        vlmlib.stream(llava, "Hello", nonsense=2)
    with pytest.raises(ImageError, match="no such file"):
        vlmlib.stream(llava, [tmp_path / "missing.png", "Hello"])


@both_paths
def test_stream_output(llava, path, capsys):
    text = list(ask(llava, path=path))[-1]["text"]
    file, stats = io.StringIO(), TimeStats()
    assert stream_output(ask(llava, path=path), stats, file=file) == text
    assert file.getvalue() == text + "\n"
    assert capsys.readouterr().out == ""
    assert len(stats.context_times) == 1 and len(stats.step_times) == GREEDY.n_predict - 1
    assert stream_output(ask(llava, path=path)) == text
    assert capsys.readouterr().out == text + "\n"


def test_time_stats():
    stats = TimeStats()
    assert str(stats) == "no turn yet" and stats.tokens_per_second is None
    stats.add({"context_tokens": 10, "context_time": 0.5, "generation_time_list": []})
    assert str(stats) == "10 tokens read, first answer token after 500.0 ms"
    stats.add({"context_tokens": 5, "context_time": 0.1, "generation_time_list": [0.1, 0.02, 0.01]})
    assert stats.context_tokens == 15 and stats.context_times == [0.5, 0.1]
    assert stats.tokens_per_second == pytest.approx(50)
    assert str(stats) == (
        "15 tokens read, first answer token after 300.0 ms; "
        "then 3 steps of 20.00 ms (median), 50 tokens/s"
    )
    assert TimeStats().step_times == [], "nothing is shared between two of them"


@both_paths
def test_an_empty_prompt(path):
    llava = tiny_llava("tokenizer_no_bos")
    with pytest.raises(PromptError, match="the prompt is empty"):
        ask(llava, "", path=path, image_tensor=None)


def test_a_traced_stream_has_tokens_in_every_chunk(llava):
    chunks = list(vlmlib.stream(llava, "what is this?", n_predict=2, trace=0))
    assert [len(chunk["tokens"]) for chunk in chunks] == [1, 1, 0]
    assert not any("tokens" in c for c in vlmlib.stream(llava, "what is this?", n_predict=2))
