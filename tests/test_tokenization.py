"""Text to ids with placeholders, and ids back to text one at a time."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from helpers import TOKENIZERS, VECTORS, fresh_tokenizer, golden_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from vlmlib import (
    IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
    PlaceholderError,
    escape_special_tokens,
    tokenizer_image_token,
)
from vlmlib.tokenization import TextStream, check_placeholders

names = st.sampled_from(TOKENIZERS)
any_id = st.one_of(
    *(
        st.integers(low, high)
        for low, high in [(0, 2), (130, 260), (0, len(golden_tokenizer()) - 1)]
    )
)
ids = st.lists(any_id, max_size=24)
texts = st.text(max_size=40).filter(lambda t: IMAGE_TOKEN not in t)


# ---- tokenizer_image_token ----


@pytest.mark.parametrize("case", VECTORS["tokenizer_image_token"], ids=lambda c: c["prompt"][:30])
def test_golden_ids(case):
    tokenizer = golden_tokenizer(case["tokenizer"])
    index = case["image_token_index"]
    assert tokenizer_image_token(case["prompt"], tokenizer, index) == case["ids"]
    tensor = tokenizer_image_token(case["prompt"], tokenizer, index, return_tensors="pt")
    assert tensor.dtype == torch.long and tensor.shape == (len(case["ids"]),)
    assert tensor.tolist() == case["ids"]


def test_placeholder_is_minus_200_unless_said_otherwise(tokenizer):
    assert IMAGE_TOKEN_INDEX == -200
    assert tokenizer_image_token("a<image>b", tokenizer).count(-200) == 1
    assert tokenizer_image_token("a<image>b", tokenizer, -7).count(-7) == 1


@given(names, texts)
def test_without_pictures_it_is_the_tokenizer(name, prompt):
    tokenizer = golden_tokenizer(name)
    assert tokenizer_image_token(prompt, tokenizer) == tokenizer(prompt).input_ids


@given(names, st.lists(texts, min_size=1, max_size=4))
def test_every_piece_is_tokenised_by_itself(name, pieces):
    tokenizer = golden_tokenizer(name)
    front = tokenizer("").input_ids
    expected = list(front)
    for i, piece in enumerate(pieces):
        expected += [-200] * (i > 0) + tokenizer(piece).input_ids[len(front) :]
    assert tokenizer_image_token(IMAGE_TOKEN.join(pieces), tokenizer) == expected


@pytest.mark.parametrize(
    ("name", "template", "front", "back"),
    [
        ("tokenizer_bos", "<s> $A </s>", [1], [2]),
        ("tokenizer_bos", "$A </s>", [], [2]),
        ("tokenizer_bos", "<s> <unk> $A </s> </s>", [1, 0], [2, 2]),
        ("tokenizer_no_bos", "<|im_start|> $A", [1], []),  # a BOS, though bos_token_id is None
        ("tokenizer_no_bos", "<|im_start|> $A <|im_end|>", [1], [2]),
    ],
)
@pytest.mark.parametrize("prompt", ["", "x", "<image>", "x<image>y", "<image>x<image><image>y "])
def test_special_tokens_once_not_per_piece(name, template, front, back, prompt):
    tokenizer = fresh_tokenizer(name)
    bare = tokenizer_image_token(prompt, golden_tokenizer("tokenizer_no_bos"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(t, i) for t, i in tokenizer.get_added_vocab().items()]
    )
    assert tokenizer("").input_ids == front + back  # the template is in force
    assert tokenizer_image_token(prompt, tokenizer) == front + bare + back


SPACED = ("<unk>", "<s>", "\n", "a", "b", "▁", "▁a", "▁b")


def spacing_tokenizer() -> PreTrainedTokenizerFast:
    """Puts a space in front of every text, as SentencePiece does."""
    vocabulary = {token: i for i, token in enumerate(SPACED)}
    backend = Tokenizer(BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    backend.pre_tokenizer = Metaspace(prepend_scheme="always")
    backend.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPACED.index("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("a b", "<s> ▁a ▁b"),
        ("a<image>b", "<s> ▁a * ▁b"),
        ("<image>a", "<s> * ▁a"),
        ("a<image>", "<s> ▁a *"),
        ("ab<image>ba<image><image>aa b", "<s> ▁a b * ▁b a * * ▁a a ▁b"),
        ("<image>\na", "<s> * ▁ \n a"),
        ("a <image> b", "<s> ▁a ▁ * ▁b"),
    ],
)
def test_every_piece_keeps_its_prefix_space(prompt, tokens):
    tokenizer = spacing_tokenizer()
    expected = [IMAGE_TOKEN_INDEX if t == "*" else SPACED.index(t) for t in tokens.split(" ")]
    assert tokenizer_image_token(prompt, tokenizer) == expected
    pieces = [tokenizer(p, add_special_tokens=False).input_ids for p in prompt.split(IMAGE_TOKEN)]
    by_piece = [tokenizer.bos_token_id, *pieces[0]]
    for piece in pieces[1:]:
        by_piece += [IMAGE_TOKEN_INDEX, *piece]
    assert expected == by_piece


@pytest.mark.parametrize("bad", ["np", "tf", "", True, 1])
def test_unknown_return_tensors(tokenizer, bad):
    with pytest.raises(ValueError, match="return_tensors must be None or 'pt'"):
        tokenizer_image_token("x", tokenizer, return_tensors=bad)


# ---- escape_special_tokens, check_placeholders ----

SNIPPETS = [
    *(IMAGE_TOKEN, "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    *("<", ">", "|", "<<", "s", "</", "image", " ", "a\u200bb", "ü"),
]


@given(names, st.lists(st.sampled_from(SNIPPETS), max_size=8).map("".join))
@example("tokenizer_bos", "<s<s>> <ima<image>ge> </s></s>")
def test_escaped_text_holds_no_special_token(name, text):
    tokenizer = golden_tokenizer(name)
    safe = escape_special_tokens(text, tokenizer)
    assert IMAGE_TOKEN not in safe
    found = tokenizer(safe, add_special_tokens=False).input_ids
    assert not set(found) & set(tokenizer.all_special_ids)
    assert safe.replace("\u200b", "") == text.replace("\u200b", ""), "reads the same"
    assert escape_special_tokens(safe, tokenizer) == safe, "once is enough"
    assert tokenizer.decode(found) == safe, "nothing is lost"


def test_plain_text_is_left_alone(tokenizer):
    text = "Is 3 < 5 > 1? | images of </sofas> ..."
    assert escape_special_tokens(text, tokenizer) == text


def test_placeholder_error_names_both_numbers():
    check_placeholders(2, 2)
    with pytest.raises(PlaceholderError, match=r"2 <image> placeholder.*3 image.*escape_special"):
        check_placeholders(2, 3)


# ---- TextStream ----


def texts_of(tokenizer, ids, stop=()) -> tuple[list[str], bool]:
    """`text` after every id and after the flush, and whether a stop string came."""
    stream, seen, stopped = TextStream(tokenizer, stop), [], False
    for i in ids:
        stopped = stream.push(i)
        seen.append(stream.text)
        if stopped:
            break
    stream.flush()
    return [*seen, stream.text], stopped


@given(names, ids)
def test_streamed_text_is_the_decoded_text(name, ids):
    tokenizer = golden_tokenizer(name)
    full = tokenizer.decode(ids, skip_special_tokens=True)
    seen, _ = texts_of(tokenizer, ids)
    assert full.startswith(seen[-1])
    assert set(full[len(seen[-1]) :]) <= {"\ufffd"}, "only the halves of a character may be missing"
    assert all(later.startswith(text) for text, later in zip(seen, seen[1:], strict=False))


@pytest.mark.parametrize(
    "text", ["Grüße, naïve Ärzte", "a 😀👍🏽 b", "☃ 你好 ☃", "👩‍👩‍👧 ok", "\ufb01x"]
)
def test_no_half_characters_are_shown(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) > len(text.split())
    seen, _ = texts_of(tokenizer, ids)
    assert seen[-1] == text
    assert not any("\ufffd" in t for t in seen)


def test_a_character_that_never_completes_is_not_shown(tokenizer):
    *most, _ = tokenizer("ok 😀", add_special_tokens=False).input_ids
    seen, _ = texts_of(tokenizer, most)
    assert seen[-1] == "ok "


def test_special_ids_leave_no_text(tokenizer):
    (x,) = tokenizer("x", add_special_tokens=False).input_ids
    seen, _ = texts_of(tokenizer, [1, x, 0, x, 2])
    assert seen[-1] == "xx"


@st.composite
def stopped_texts(draw):
    """A tokenizer, ids, and stop strings of which most come in the text, wholly or nearly."""
    tokenizer = golden_tokenizer(draw(names))
    words = st.lists(
        st.sampled_from(["a", "b", "aa", "ab", " red circle", "#", "é", "😀"]), max_size=9
    )
    text = "".join(draw(words))
    pieces = draw(st.lists(st.integers(1, 3), max_size=len(text)))
    ids, at = [], 0
    for n in [*pieces, len(text)]:  # cut anywhere, so that tokens end anywhere
        ids += tokenizer(text[at : at + n], add_special_tokens=False).input_ids
        at += n
    slices = st.tuples(st.integers(0, max(len(text) - 1, 0)), st.integers(1, 4))
    inside = slices.map(lambda s: text[s[0] : s[0] + s[1]])
    nearly = inside.map(lambda s: s + "b")
    stop = draw(st.lists(inside | nearly | st.text("ab#", min_size=1, max_size=3), max_size=3))
    return tokenizer, ids, [s for s in stop if s]


def cut_at_stop(tokenizer, ids, stop) -> tuple[str, bool]:
    """The slow and simple way: look at the whole text after every id."""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n], skip_special_tokens=True)
        if starts := [text.find(s) for s in stop if s in text]:
            return text[: min(starts)], True
    return tokenizer.decode(ids, skip_special_tokens=True), False


@given(stopped_texts())
def test_stop_strings_against_the_simple_way(case):
    tokenizer, ids, stop = case
    expected, should_stop = cut_at_stop(tokenizer, ids, stop)
    seen, stopped = texts_of(tokenizer, ids, stop)
    assert (seen[-1], stopped) == (expected, should_stop)
    assert all(expected.startswith(text) for text in seen), "no part of a stop string was shown"


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("left of ### right", ["###"], "left of "),
        ("one\nUSER: two", ["\nUSER:"], "one"),
        ("a##b###c", ["###"], "a##b"),  # began and did not complete, then did
        ("aaab", ["aab"], "a"),  # the stop string begins inside its own beginning
        ("ababac", ["abac"], "ab"),
        ("xyz", ["yz", "xy"], ""),  # overlapping: the earlier one wins
        ("xyz", ["z", "xyz"], ""),
        ("grün ☃ end", ["☃"], "grün "),
        ("end", ["end"], ""),
    ],
)
def test_stop_strings(tokenizer, text, stop, shown):
    letter_by_letter = [i for c in text for i in tokenizer(c, add_special_tokens=False).input_ids]
    seen, stopped = texts_of(tokenizer, letter_by_letter, stop)
    assert stopped and seen[-1] == shown
    assert all(shown.startswith(t) for t in seen)


def test_the_beginning_of_a_stop_string_comes_out_at_the_end(tokenizer):
    ids = [i for c in "yes ##" for i in tokenizer(c, add_special_tokens=False).input_ids]
    seen, stopped = texts_of(tokenizer, ids, ["###"])
    assert not stopped
    assert seen[-2:] == ["yes ", "yes ##"], "kept back until the flush"


def test_slow_tokenizers_are_refused():
    with pytest.raises(TypeError, match="fast tokenizer"):
        TextStream(object())


@settings(deadline=None)
@given(st.lists(st.integers(0, 264), max_size=30), st.text(max_size=8))
def test_a_tokenizer_with_bytes_streams_whatever_comes(ids, text):
    """Llama's decoder joins bytes; a broken character also spoils whole ones before it."""
    tokenizer = with_bytes()
    stream, seen = TextStream(tokenizer), ""
    whole = [3 + byte for byte in text.encode()]
    for token_id in (*whole, *ids):
        stream.push(token_id)
        assert stream.text.startswith(seen)
        seen = stream.text
    alone = TextStream(tokenizer)
    for token_id in whole:
        alone.push(token_id)
    assert alone.text == tokenizer.backend_tokenizer.decode(whole)


def test_half_a_character_behind_a_byte_that_is_whole():
    stream = TextStream(with_bytes())
    for token_id in (3 + 0x0A, 3 + 0xF0, 3 + 0x9F, 260, 261, 3 + 0xC3, 3 + 0xA9):
        stream.push(token_id)
    assert stream.text == "\n\ufffd\ufffd aloé"


@cache
def with_bytes():
    """A tokenizer like Llama's: a few words, and all bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "▁a", "lo", "é", "▁the", "b"]
    model = BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
