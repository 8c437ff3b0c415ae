"""LLaVA's `generate`: beams, sampling and padded batches are transformers' own."""

from __future__ import annotations

import pytest
import torch
from helpers import expanded_ids, ids_of, pixels, tiny_llava
from test_quant import FAMILIES, in_all_families
from torch.nn.utils.rnn import pad_sequence

from vlmlib import ContextLengthError, GenParams, PlaceholderError, ShapeError

PROMPTS = ["<image>\nwhat is this? ASSISTANT:", "USER: <image> a red circle", "two blue squares"]


@pytest.fixture(scope="module", params=[0, 1])
def model(request):
    return tiny_llava(seed=request.param)


def both(model, prompt, **options):
    """New ids from vlmlib and from transformers, for one prompt."""
    n = prompt.count("<image>")
    images = pixels(n, seed=3) if n else None
    ids = torch.tensor([model.prompt_ids(prompt)])
    torch.manual_seed(1)
    ours = model.generate(ids, images=images, **options)
    expanded = expanded_ids(model.net, model.tokenizer, prompt)
    torch.manual_seed(1)
    pictures = {"pixel_values": images} if n else {}
    theirs = model.net.generate(input_ids=expanded, **pictures, **options)
    return ours[0].tolist(), theirs[0, expanded.shape[1] :].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "num_beams": 4, "length_penalty": 2.0},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": True, "num_beams": 2, "temperature": 1.3},
    ],
    ids=str,
)
def test_ids_are_those_of_transformers(model, prompt, options):
    ours, theirs = both(model, prompt, max_new_tokens=10, **options)
    assert ours == theirs


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompts", [PROMPTS, [*PROMPTS[2:], "Left or right? ASSISTANT:"]])
def test_a_padded_batch_equals_the_single_runs(model, prompts, side):
    rows = [torch.tensor(model.prompt_ids(p)) for p in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side=side)
    options = {"do_sample": False, "max_new_tokens": 8}
    images = pixels(2, seed=3) if prompts is PROMPTS else None
    batch = model.generate(ids, images=images, attention_mask=mask, **options)
    pictures = [None, None] if images is None else [images[:1], images[1:], None]
    for row, mine, picture in zip(batch, rows, pictures, strict=True):
        alone = model.generate(mine[None], images=picture, **options)[0]
        assert row[: len(alone)].tolist() == alone.tolist()


def test_wrong_numbers_are_named(model):
    ids = torch.tensor([model.prompt_ids(PROMPTS[0])])
    with pytest.raises(PlaceholderError, match="1 <image>.*2 image"):
        model.generate(ids, images=pixels(2))
    with pytest.raises(ShapeError, match="2 pictures, but 1 image_sizes"):
        model.generate(ids, images=pixels(2), image_sizes=[(28, 28)])


@pytest.mark.parametrize("prompt", ["<image> " + "too long " * 60, "too long " * 60])
def test_a_prompt_beyond_the_context_is_refused(model, prompt):
    ids = torch.tensor([model.prompt_ids(prompt)])
    with pytest.raises(ContextLengthError, match="model_max_length is 96$"):
        model.generate(ids, images=pixels(1) if "<image>" in prompt else None)


@in_all_families
def test_an_answer_ends_where_that_of_a_stream_does(family, monkeypatch):
    model, prompt = FAMILIES[family](), "two blue squares"
    params, options = GenParams.greedy(n_predict=12), {"do_sample": False, "max_new_tokens": 12}

    def both():
        ids = torch.tensor([model.prompt_ids(prompt)])
        streamed = ids_of(model.stream_prompt(prompt, None, params, trace=0))
        return streamed, model.generate(ids, **options)[0].tolist()

    streamed, generated = both()
    assert streamed == generated and len(streamed) == 12
    end = next(i for i in range(2, 12) if streamed[i] not in streamed[:i])
    monkeypatch.setattr(type(model), "stop_token_ids", [streamed[end]])
    monkeypatch.setattr(model.net.generation_config, "eos_token_id", None)
    assert both() == (streamed[: end + 1],) * 2
    options["eos_token_id"] = streamed[1]
    assert both()[1] == streamed[: streamed.index(streamed[1]) + 1], "unless it is said otherwise"
