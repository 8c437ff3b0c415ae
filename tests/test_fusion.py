"""Features take the place of placeholders; positions and the cache keep count."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import VECTORS, pixels
from hypothesis import given
from hypothesis import strategies as st

from vlmlib import (
    IGNORE_INDEX,
    CacheError,
    ContextLengthError,
    KVCache,
    PlaceholderError,
    ShapeError,
    prepare_inputs_labels_for_multimodal,
)
from vlmlib.fusion import digest, fuse, positions, split_at

PIC = -200
prompts = st.lists(st.sampled_from([PIC, 3, 4, 5]), max_size=8)


@pytest.mark.parametrize("case", VECTORS["prepare_inputs_labels_for_multimodal"])
def test_golden_embeddings(case, golden_tensors):
    names = ("embed_tokens_weight", "input_ids", "attention_mask", "attention_mask_out")
    table, ids, mask, mask_out = (golden_tensors[case[n]].clone() for n in names)
    features = list(golden_tensors[case["image_features"]])
    expected = golden_tensors[case["inputs_embeds_out"]]
    for b in range(len(ids)):
        row = ids[b][mask[b].bool()].tolist()
        mine = [features.pop(0) for _ in range(row.count(PIC))]
        fused = fuse(row, mine, lambda i: table[i])[0]
        # The original cut what was too long; the shorter ones are padded.
        assert torch.equal(fused[: case["model_max_length"]], expected[b][mask_out[b].bool()])
    assert not features


def sizes_of(prompt) -> list[int]:
    return [2 + k for k in range(prompt.count(PIC))]


@given(prompts)
def test_fuse_and_positions_agree(prompt):
    lengths = sizes_of(prompt)
    features = [torch.full((n, 1), 100.0 + k) for k, n in enumerate(lengths)]
    fused = fuse(prompt, features, lambda i: i[:, None].float())
    content = positions(prompt, lengths, [100 + k for k in range(len(lengths))])
    assert fused.shape == (1, len(content), 1)
    assert fused.flatten().tolist() == [c[0] if isinstance(c, tuple) else c for c in content]
    assert [c[1] for c in content if isinstance(c, tuple)] == sum(
        map(list, map(range, lengths)), []
    )


@given(prompts)
def test_split_at_finds_every_position(prompt):
    lengths = sizes_of(prompt)
    content = positions(prompt, lengths, range(len(lengths)))
    for start in range(len(content) + 1):
        i, pictures, offset = split_at(prompt, lengths, start)
        rest = positions(prompt[i:], lengths[pictures:], range(pictures, len(lengths)))
        assert rest[offset:] == content[start:]
        assert offset == 0 or prompt[i] == PIC


def test_counts_must_agree():
    with pytest.raises(PlaceholderError, match=r"2 <image>.*1 image"):
        fuse([PIC, 3, PIC], [torch.zeros(1, 1)], lambda i: i[:, None])
    with pytest.raises(PlaceholderError, match=r"0 <image>.*1 image"):
        positions([3], [4], ["a"])


def test_digest_tells_contents_apart():
    x = torch.arange(6.0)
    assert digest(x) == digest(x.clone()) == digest(torch.stack([x, x], dim=1)[:, 0])
    others = [x.view(2, 3), x.bfloat16(), x.double(), x + 1e-6, x[:5], x.flip(0)]
    assert len({digest(t) for t in [x, *others]}) == 7


def test_cache_counts(llava):
    cache = llava.new_cache()
    assert isinstance(cache, KVCache) and len(cache) == 0
    assert cache.common_prefix([1, 2]) == 0
    cache.content = [1, ("a", 0), ("a", 1), 5]
    for content, n in [
        ([], 0),
        ([2], 0),
        ([1], 1),
        ([1, ("b", 0)], 1),
        ([1, ("a", 0), ("a", 1), 6], 3),
        ([1, ("a", 0), ("a", 1), 5, 6], 4),
    ]:
        assert cache.common_prefix(content) == n
    cache.keep(2)
    assert cache.content == [1, ("a", 0)]
    for bad in (-1, 3):
        with pytest.raises(CacheError, match=f"start_pos {bad} is outside .* holds 2 positions"):
            cache.keep(bad)


# ---- a batch as LLaVA prepares it ----


def stub(table, features):
    """What the function needs of a model."""
    return SimpleNamespace(embed=lambda ids: table[ids], encode_images=lambda images: features)


def prepared(ids, mask, features, labels=None, **options):
    """The four tensors for features of one channel, where token 3 is embedded as 3.0."""
    model = stub(torch.arange(50.0)[:, None], features)
    ids, mask = torch.tensor(ids), None if mask is None else torch.tensor(mask)
    spare = torch.zeros_like(ids)
    out = prepare_inputs_labels_for_multimodal(
        model, ids, spare, mask, "past", labels, object(), **options
    )
    assert out[0] is None and out[3] == "past"
    return out[4], out[5], out[1], out[2]


def features_of(*lengths: int) -> list[torch.Tensor]:
    return [torch.full((n, 1), 100.0 + k) for k, n in enumerate(lengths)]


@pytest.mark.parametrize("case", VECTORS["prepare_inputs_labels_for_multimodal"])
def test_golden_batches(case, golden_tensors):
    names = ("input_ids", "attention_mask", "embed_tokens_weight", "image_features")
    ids, mask, table, features = (golden_tensors[case[n]] for n in names)
    limit = case["model_max_length"]

    def prepare(truncate: bool):
        return prepare_inputs_labels_for_multimodal(
            stub(table, features),
            ids,
            torch.zeros_like(ids),
            mask,
            None,
            ids.clone(),
            torch.zeros(len(features), 3, 2, 2),
            padding_side=case["padding_side"],
            model_max_length=limit,
            truncate=truncate,
        )

    none, positions, new_mask, past, embeds, labels = prepare(truncate=True)
    assert none is past is None
    for ours, name in [(positions, "position_ids"), (new_mask, "attention_mask")]:
        assert torch.equal(ours, golden_tensors[case[f"{name}_out"]])
    assert torch.equal(embeds, golden_tensors[case["inputs_embeds_out"]])
    assert torch.equal(labels, golden_tensors[case["labels_out"]])

    rows = [row[kept] for row, kept in zip(ids, mask, strict=True)]
    n = features.shape[1]
    lengths = [len(row) + (n - 1) * int((row == PIC).sum()) for row in rows]
    if limit is not None and max(lengths) > limit:  # the reference cut them without a word
        with pytest.raises(ContextLengthError, match=rf"{max(lengths)}.* is {limit}$"):
            prepare(truncate=False)
    else:
        assert torch.equal(prepare(truncate=False)[4], embeds)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(side):
    ids = [[7, PIC, 8, 0], [0, 0, 9, PIC]]
    mask = [[1, 1, 1, 0], [0, 0, 1, 1]]  # whatever side it came from
    labels = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    embeds, labels, positions, mask = prepared(
        ids, mask, features_of(3, 2), labels, padding_side=side
    )
    rows = [[7, 100, 100, 100, 8], [9, 101, 101]]
    wanted = [[1, -100, -100, -100, 3], [7, -100, -100]]
    left = side == "left"
    for b, n in enumerate((5, 3)):
        real = slice(5 - n, 5) if left else slice(0, n)
        pad = slice(0, 5 - n) if left else slice(n, 5)
        assert embeds[b, real, 0].tolist() == rows[b] and not embeds[b, pad].any()
        assert labels[b, real].tolist() == wanted[b]
        assert (labels[b, pad] == IGNORE_INDEX).all()
        assert positions[b, real].tolist() == list(range(n)) and not positions[b, pad].any()
        assert mask[b, real].all() and not mask[b, pad].any()


@given(st.lists(prompts.filter(len), min_size=1, max_size=4), st.sampled_from(["left", "right"]))
def test_a_batch_is_its_rows_fused_alone(rows, side):
    width = max(map(len, rows))
    ids = [row + [0] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    features = features_of(*(1 + k % 3 for k in range(sum(r.count(PIC) for r in rows))))
    if not features:
        return
    embeds, _, positions, mask = prepared(ids, mask, features, padding_side=side)
    rest = iter(features)
    for b, row in enumerate(rows):
        mine = [next(rest) for _ in range(row.count(PIC))]
        alone = fuse(row, mine, lambda i: i[:, None].float())[0]
        kept = mask[b].bool()
        assert torch.equal(embeds[b, kept], alone)
        assert positions[b, kept].tolist() == list(range(len(alone)))


def test_a_row_of_text_takes_no_picture():
    # In the original it takes one, and the next row gets the wrong picture.
    embeds, *_ = prepared([[5, 6], [7, PIC]], None, features_of(1))
    assert embeds[..., 0].tolist() == [[5, 6], [7, 100]]


@pytest.mark.parametrize("given_", [0, 1, 3])
def test_too_few_and_too_many_pictures_name_both_counts(given_):
    with pytest.raises(PlaceholderError, match=rf"2 <image>.*, but {given_} image"):
        prepared([[5, PIC], [PIC, 6]], None, features_of(*[1] * given_))
    with pytest.raises(PlaceholderError, match=r"1 <image>.*, but 0 image"):
        prepare_inputs_labels_for_multimodal(
            stub(None, None), torch.tensor([[5, PIC]]), None, None, None, None, None
        )


def test_a_masked_placeholder_is_padding():
    embeds, *_ = prepared([[PIC, 5, PIC]], [[0, 1, 1]], features_of(1))
    assert embeds[0, :, 0].tolist() == [5, 100]
    embeds, *_ = prepared([[PIC, 5, 6]], [[0, 1, 1]], [])
    assert embeds[0, :, 0].tolist() == [5, 6]


def test_too_long_names_the_lengths():
    call = [[[5, PIC], [PIC, 6]], None, features_of(3, 4)]
    with pytest.raises(ContextLengthError, match=r"\[4, 5\] positions.*model_max_length is 4"):
        prepared(*call, model_max_length=4)
    embeds, _, positions, mask = prepared(*call, model_max_length=4, truncate=True)
    assert embeds[..., 0].tolist() == [[5, 100, 100, 100], [101, 101, 101, 101]]
    assert positions.tolist() == [[0, 1, 2, 3]] * 2 and mask is None
    assert prepared(*call, model_max_length=5)[0].shape == (2, 5, 1)


def test_what_was_none_stays_none():
    model = stub(torch.arange(50.0)[:, None], features_of(2, 2))
    same = torch.tensor([[5, PIC], [PIC, 6]])
    out = prepare_inputs_labels_for_multimodal(model, same, None, None, None, None, object())
    assert [x is None for x in out] == [True, True, True, True, False, True]
    model.encode_images = lambda images: features_of(2, 3)
    out = prepare_inputs_labels_for_multimodal(model, same, None, None, None, None, object())
    assert out[2].tolist() == [[True] * 3 + [False], [True] * 4]  # else padding would be read


def test_the_mask_keeps_its_dtype():
    for dtype in (torch.bool, torch.long, torch.float32):
        mask = torch.tensor([[1, 1, 1]], dtype=dtype)
        model = stub(torch.arange(50.0)[:, None], features_of(2))
        ids = torch.tensor([[5, PIC, 6]])
        out = prepare_inputs_labels_for_multimodal(model, ids, None, mask, None, None, object())
        assert out[2].dtype == dtype and out[2].shape == (1, 4)


@pytest.mark.parametrize(
    ("ids", "images"), [([[5, 6, 7]], None), ([[5]], "the same pictures again"), ([[5], [6]], ())]
)
def test_nothing_to_do_for_text_and_for_decoding_steps(ids, images):
    def encode(images):
        raise AssertionError("pictures are encoded once, with the prompt")

    model = SimpleNamespace(embed=None, encode_images=encode)
    ids, labels = torch.tensor(ids), torch.tensor(ids)
    mask = torch.ones(len(ids), 9)  # of a decoding step: all positions so far
    out = prepare_inputs_labels_for_multimodal(model, ids, None, mask, "past", labels, images)
    assert out[0] is ids and out[2] is mask and out[3] == "past" and out[5] is labels
    assert out[1] is out[4] is None


def test_a_prompt_that_is_one_picture():
    embeds, *_ = prepared([[PIC]], None, features_of(3))
    assert embeds[0, :, 0].tolist() == [100, 100, 100]


def test_sizes_reach_the_encoder():
    seen = []

    def encode(images, image_sizes):
        seen.append((images, image_sizes))
        return features_of(2)

    model = SimpleNamespace(embed=lambda ids: ids[:, None].float(), encode_images=encode)
    ids = torch.tensor([[5, PIC]])
    prepare_inputs_labels_for_multimodal(
        model, ids, None, None, None, None, "pixels", image_sizes=[(640, 480)]
    )
    assert seen == [("pixels", [(640, 480)])]


def test_all_text_goes_through_the_embedding_with_its_row():
    calls = []

    def embed(ids):
        calls.append(ids.tolist())
        return ids[:, None].float()

    model = SimpleNamespace(embed=embed, encode_images=lambda images: features_of(1, 1, 1))
    ids = torch.tensor([[5, PIC, 6, PIC], [PIC, 7, 8, 9]])
    prepare_inputs_labels_for_multimodal(model, ids, None, None, None, None, object())
    assert calls == [[5, 6], [7, 8, 9]]


def test_masks_and_labels_of_another_shape_name_both():
    with pytest.raises(ShapeError, match=r"input_ids is \(1, 2\), the attention mask \(1, 3\)"):
        prepared([[5, PIC]], [[1, 1, 1]], features_of(1))
    with pytest.raises(ShapeError, match=r"labels is \(1, 3\), the attention mask \(1, 2\)"):
        prepared([[5, PIC]], [[1, 1]], features_of(1), torch.zeros(1, 3))


def test_the_last_position_predicts_as_if_alone(llava):
    # Left padding must not change what a prompt's row answers.
    ids = torch.tensor([[5, 6, PIC, 7], [8, PIC, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    images = pixels(2)
    with torch.no_grad():
        _, positions, new_mask, _, embeds, _ = prepare_inputs_labels_for_multimodal(
            llava, ids, torch.zeros_like(ids), mask, None, None, images, padding_side="left"
        )
        batch = llava.net.get_decoder()(
            inputs_embeds=embeds, attention_mask=new_mask, position_ids=positions
        ).last_hidden_state[:, -1]
        for b, row in enumerate(([5, 6, PIC, 7], [8, PIC])):
            features = llava.encode_images(images[b : b + 1])
            alone = llava.net.get_decoder()(inputs_embeds=fuse(row, features, llava.embed))
            torch.testing.assert_close(
                batch[b], alone.last_hidden_state[0, -1], atol=1e-4, rtol=1e-4
            )
