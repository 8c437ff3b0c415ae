"""LLaVA-1.6: tiles, their merge and the whole model are transformers' own, at many sizes."""

from __future__ import annotations

import pytest
import torch
from helpers import CHAT_TEMPLATE, GOLDEN, ids_of, noise, tiny_processor, wild_net
from tokenizers import AddedToken
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

import vlmlib

TILE = 28
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]  # (height, width)
SIZES = [(28, 28), (64, 48), (48, 64), (90, 30), (30, 90), (200, 7), (7, 200), (57, 56), (1, 90)]
SLIVERS = [(200, 7), (7, 200), (1, 90)]
GREEDY = vlmlib.GenParams.greedy(n_predict=12)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(GOLDEN / "tokenizer_bos")
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model(tokenizer):
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=TILE,
            patch_size=7,
        ),
        text_config=LlamaConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            vocab_size=len(tokenizer),
            bos_token_id=1,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_grid_pinpoints=PINPOINTS,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    net = wild_net(LlavaNextForConditionalGeneration, config, 0)
    net.generation_config.eos_token_id = tokenizer.eos_token_id
    return vlmlib.LlavaNext(net, tokenizer, tiny_processor())


@pytest.fixture(scope="module")
def processor():
    ours = tiny_processor()
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=list(ours.image_mean),
        image_std=list(ours.image_std),
    )


def reference_inputs(model, processor, prompt, images):
    """What transformers' own model takes for these pictures and this prompt."""
    batch = processor(images, return_tensors="pt")
    lengths = iter(m.length for m in model.prepare(images))
    ids = []
    for i in model.prompt_ids(prompt):
        picture = i == vlmlib.IMAGE_TOKEN_INDEX
        ids += [model.config.image_token_id] * next(lengths) if picture else [i]
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": batch["pixel_values"],
        "image_sizes": torch.as_tensor(batch["image_sizes"]),
    }


@pytest.mark.parametrize("size", SIZES)
def test_tiles_and_features_are_those_of_transformers(model, processor, size):
    image = noise(*size)
    (medium,) = model.prepare([image])
    theirs = processor([image], return_tensors="pt")
    assert (medium.pixels - theirs["pixel_values"][0]).abs().max() < 1e-5
    with torch.inference_mode():
        ours = model.encode(medium)
        (expected,) = model.net.get_image_features(
            theirs["pixel_values"], torch.as_tensor(theirs["image_sizes"])
        ).pooler_output
    if size in SLIVERS:  # there nothing is left of the tiles; the whole picture's 16 are the same
        assert len(expected) < len(ours)
        ours, expected = ours[:16], expected[:16]
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("size", SIZES)
def test_length_is_known_before_encoding(model, size):
    (medium,) = model.prepare([noise(*size)])
    with torch.inference_mode():
        assert len(model.encode(medium)) == medium.length


@pytest.mark.parametrize("sizes", [[(64, 48)], [(30, 90)], [(28, 28), (90, 30)]])
def test_logits_and_greedy_ids_are_those_of_transformers(model, processor, sizes):
    images = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    prompt = "<image>" * len(images) + "\nwhat is this? ASSISTANT:"
    inputs = reference_inputs(model, processor, prompt, images)
    with torch.inference_mode():
        logits = model.turn(prompt, model.prepare(images)).prefill()
        expected = model.net(**inputs).logits[:, -1]
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    generated = model.net.generate(**inputs, do_sample=False, max_new_tokens=12)
    stream = vlmlib.LlavaStreamGenerator(
        model, model.tokenizer, prompt, 0, GREEDY, image_tensor=model.prepare(images), trace=0
    )
    assert ids_of(stream) == generated[0, inputs["input_ids"].shape[1] :].tolist()


def test_pixel_values_alone_do_not_tell_the_size(model):
    with pytest.raises(TypeError, match="picture's size"):
        model.turn("<image>", torch.zeros(1, 3, TILE, TILE))
