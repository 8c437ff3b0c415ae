"""LLaVA's `generate`: beams, sampling and padded batches are transformers' own."""

from __future__ import annotations

import pytest
import torch
from helpers import expanded_ids, pixels, tiny_llava
from torch.nn.utils.rnn import pad_sequence

from vlmlib import ContextLengthError, PlaceholderError, ShapeError

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
def test_a_padded_batch_equals_the_single_runs(model, side):
    rows = [torch.tensor(model.prompt_ids(p)) for p in PROMPTS]
    ids = pad_sequence(rows, batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side=side)
    options = {"do_sample": False, "max_new_tokens": 8}
    images = pixels(2, seed=3)
    batch = model.generate(ids, images=images, attention_mask=mask, **options)
    pictures = [images[:1], images[1:], None]
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
    with pytest.raises(ContextLengthError, match="model_max_length is 96"):
        model.generate(ids, images=pixels(1) if "<image>" in prompt else None)
