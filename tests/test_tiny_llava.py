"""The model that ships: transformers reads it too, says the same, and it really sees."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import LAYOUTS
from transformers import AutoProcessor, LlavaForConditionalGeneration

import vlmlib
from vlmlib.tiny.scenes import HELD_OUT, draw, questions, random_scene

FOLDER = vlmlib.DATA / "checkpoints" / "tiny-llava"
GREEDY = vlmlib.GenParams.greedy(n_predict=100)


@pytest.fixture(scope="module")
def model():
    return vlmlib.load("tiny-llava", device="cpu")


@pytest.fixture(scope="module")
def reference():
    """transformers' own classes, reading the same folder."""
    net = LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32)
    return net.eval(), AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def cases():
    """50 held-out scenes at several sizes, each with one question of another kind."""
    out = []
    for i, seed in enumerate(HELD_OUT[:50]):
        scene = random_scene(seed)
        asked = questions(scene, random.Random(seed))
        out.append((draw(scene, (112, 224, 336)[i % 3]), asked[i % len(asked)]))
    return out


def test_is_small_and_in_the_layout_of_llava_hf():
    files = {f.name for f in FOLDER.iterdir()}
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 8e6
    assert files >= LAYOUTS["tiny-llava"] | {"README.md"}


def test_same_input_as_the_processor(model, reference, cases):
    _, processor = reference
    for image, qa in cases[:10]:
        content = [{"type": "image"}, {"type": "text", "text": qa.question}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        assert model.chat_prompt([image, qa.question]) == prompt
        theirs = processor(images=image, text=prompt, return_tensors="pt")
        assert (model.prepare_images([image]) - theirs["pixel_values"]).abs().max() < 1e-5
        ids = model.prompt_ids(prompt)
        at = ids.index(vlmlib.IMAGE_TOKEN_INDEX)
        picture = [model.config.image_token_id] * 64
        assert ids[:at] + picture + ids[at + 1 :] == theirs["input_ids"][0].tolist()


@pytest.mark.parametrize("path", ["vlmlib", "transformers"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_greedy_ids_are_those_of_generate(model, reference, cases, path, use_cache):
    net, processor = reference
    for image, qa in cases if use_cache else cases[:10]:
        prompt = model.chat_prompt([image, qa.question])
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        expected = net.generate(**inputs, do_sample=False, max_new_tokens=100, use_cache=use_cache)[
            0, inputs["input_ids"].shape[1] :
        ]
        *_, last = vlmlib.LlavaStreamGenerator(
            model if path == "vlmlib" else net,
            model.tokenizer,
            prompt,
            0,
            GREEDY,
            image_tensor=model.prepare_images([image]),
            stream_interval=1000,
            trace=0,
        )
        assert [t.id for t in last["tokens"]] == expected.tolist()


def test_it_sees(model, cases):
    right = [vlmlib.answer(model, [image, qa.question]) == qa.answer for image, qa in cases]
    assert sum(right) >= 45


def test_it_needs_the_picture(model, cases):
    """Shown another scene's picture it gives other answers: it does not guess from the question."""
    images = [image for image, _ in cases]
    wrong = zip(images[1:] + images[:1], cases, strict=True)
    right = [vlmlib.answer(model, [image, qa.question]) == qa.answer for image, (_, qa) in wrong]
    assert sum(right) < 30


def test_a_second_turn_works(model):
    """Both turns of a conversation in one prompt, in the checkpoint's own chat format."""
    image = vlmlib.load_image(vlmlib.DATA / "images" / "three-shapes.png")
    first = model.chat_prompt([image, "What is left of the red circle?"])
    said = vlmlib.answer(model, [image, "What is left of the red circle?"])
    prompt = f"{first} {said}</s>USER: What is written on the red circle? ASSISTANT:"
    *_, last = vlmlib.LlavaStreamGenerator(
        model, model.tokenizer, prompt, 0, GREEDY, image_tensor=model.prepare_images([image])
    )
    assert "K" in last["text"]
