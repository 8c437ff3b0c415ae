"""Tokenizer, sequences, training, saving: each promise of the recipe, on small runs."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vlmlib.tiny.data import (
    IGNORE,
    Stream,
    Writer,
    attention_mask,
    choose_questions,
    collate,
    patch_targets,
    pixels_of,
)
from vlmlib.tiny.evaluate import (
    Graded,
    answer,
    model_card,
    objects_right,
    prompt_of,
    summary,
    table,
)
from vlmlib.tiny.model import IMAGE_TOKENS, PATCH, PIXELS, build_model, build_processor, save
from vlmlib.tiny.scenes import COLOURS, QA, SHAPES, draw, random_scene, train_scene
from vlmlib.tiny.tokenizer import build_tokenizer
from vlmlib.tiny.train import (
    Recipe,
    Trainer,
    answer_logits,
    embed_patches_by_matrix,
    load_trainer,
    picture_features,
    run,
    save_state,
    split_parameters,
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(scenes=200)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return build_processor(tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(tokenizer).eval()


PAIRS = [
    QA("count", "How many shapes are there?", "There are two shapes."),
    QA("exist", "Is there a green star?", "No."),
    QA("where", "Where is the circle?", "At the top left."),
]


# --------------------------------------------------------------------------- tokenizer


@given(st.text())
def test_any_text_comes_back(text):
    tokenizer = _shared_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids) == text


_TOKENIZERS = []


def _shared_tokenizer():
    if not _TOKENIZERS:
        _TOKENIZERS.append(build_tokenizer(scenes=50))
    return _TOKENIZERS[0]


def test_begin_of_sequence_comes_first_as_in_llama(tokenizer):
    assert tokenizer("").input_ids == [tokenizer.bos_token_id]
    assert tokenizer("What?").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.encode("<image>", add_special_tokens=False) == [
        tokenizer.convert_tokens_to_ids("<image>")
    ]


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match="261 tokens or more"):
        build_tokenizer(vocabulary=200)


# --------------------------------------------------------------------------- sequences


def test_a_sequence_is_what_the_processor_makes_of_the_text(tokenizer, processor):
    """Training reads exactly the ids that inference reads, first and second turn."""
    messages = []
    for number, qa in enumerate(PAIRS):
        parts = [{"type": "image"}] if number == 0 else []
        content = [*parts, {"type": "text", "text": qa.question}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": qa.answer})
    text = processor.apply_chat_template(messages)
    assert text == (
        "USER: <image>\nHow many shapes are there? ASSISTANT: There are two shapes.</s>"
        "USER: Is there a green star? ASSISTANT: No.</s>"
        "USER: Where is the circle? ASSISTANT: At the top left.</s>"
    )
    picture = draw(random_scene(0))
    ids = processor(images=picture, text=text)["input_ids"][0]
    assert Writer(tokenizer).conversation(PAIRS).ids == list(ids)
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    assert prompt == prompt_of(PAIRS[0].question)


def test_isolated_questions_equal_single_conversations(tokenizer, model):
    """The block mask gives the logits of separate runs, to 1e-4."""
    writer = Writer(tokenizer)
    pixels, patches = pixels_of(draw(random_scene(3))), patch_targets(random_scene(3))
    together = collate([writer.isolated(PAIRS)], [pixels], [patches])
    alone = [collate([writer.conversation([qa])], [pixels], [patches]) for qa in PAIRS]
    values = torch.randn(1, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = picture_features(model, values)
        logits, targets = answer_logits(model, features, together)
        singles = [answer_logits(model, features, batch) for batch in alone]
    assert torch.equal(targets, torch.cat([t for _, t in singles]))
    torch.testing.assert_close(logits, torch.cat([x for x, _ in singles]), atol=1e-4, rtol=0)


def test_training_logits_are_those_of_the_model_itself(tokenizer, processor, model):
    """The hand-wired forward pass equals `model(**inputs)` on the processor's own input."""
    picture = draw(random_scene(3), 2 * PIXELS)
    pixels, patches = pixels_of(picture), patch_targets(random_scene(3))
    batch = collate([Writer(tokenizer).conversation(PAIRS)], [pixels], [patches])
    trainer = Trainer(Recipe(steps=1, look_steps=0), tokenizer)
    trainer.model = model
    text = "".join(
        f"USER: {'<image>' + chr(10) if i == 0 else ''}{qa.question} ASSISTANT: {qa.answer}</s>"
        for i, qa in enumerate(PAIRS)
    )
    inputs = processor(images=picture, text=text, return_tensors="pt")
    with torch.inference_mode():
        values = trainer.pixel_values(batch)
        torch.testing.assert_close(values, inputs["pixel_values"], atol=1e-5, rtol=0)
        ours, _ = answer_logits(model, picture_features(model, values), batch)
        theirs = model(**inputs).logits[:, :-1][batch.targets[:, 1:] != IGNORE]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_the_mask_in_small():
    blocks = torch.tensor([[0, 1, 1, 2, -1]])
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 1]]
    assert (attention_mask(blocks)[0, 0] == 0).int().tolist() == expected


def test_only_answers_are_learnt(tokenizer):
    row = Writer(tokenizer).isolated(PAIRS)
    learnt = [target for target in row.targets if target != IGNORE]
    assert tokenizer.decode(learnt) == "".join(f" {qa.answer}</s>" for qa in PAIRS)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_every_thing_owns_a_patch(index):
    scene = train_scene(index)
    shape, colour, size, label = patch_targets(scene)
    for thing in scene.things:
        mine = (shape == 1 + SHAPES.index(thing.shape)) & (
            colour == 1 + list(COLOURS).index(thing.colour)
        )
        assert mine.any()
    assert label.astype(bool).any() == any(thing.label for thing in scene.things)
    assert np.array_equal(size > 0, shape > 0)


def test_the_stream_depends_on_seed_and_step_only(tokenizer):
    first, again = Stream(tokenizer, 2, seed=1)[5], Stream(tokenizer, 2, seed=1)[5]
    other = Stream(tokenizer, 2, seed=2)[5]
    assert torch.equal(first.ids, again.ids) and torch.equal(first.pixels, again.pixels)
    assert not torch.equal(first.pixels, other.pixels)


def test_pictures_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="square, not 90 x 60"):
        pixels_of(draw(random_scene(0), (90, 60)))


def test_questions_of_one_picture_differ():
    for index in range(50):
        asked = choose_questions(train_scene(index), random.Random(index), 8)
        assert asked and len({qa.question for qa in asked}) >= len(asked) - 1


# ----------------------------------------------------------------------------- training


def test_the_rate_warms_up_twice_stays_and_ends_at_nothing():
    recipe = Recipe(steps=1_000, look_steps=400, warm_up=100, flat_until=0.6)
    assert recipe.rate(0) == recipe.rate(400) == pytest.approx(0.01)
    assert recipe.rate(200) == recipe.rate(399) == recipe.rate(599) == 1
    assert recipe.rate(800) == pytest.approx(0.5)
    assert 0 < recipe.rate(999) < 0.01
    assert recipe.patch_weight(0) == recipe.patch_weight(400) == 1
    assert recipe.patch_weight(550) == pytest.approx(0.5) and recipe.patch_weight(700) == 0
    with pytest.raises(ValueError, match="1 or more"):
        Recipe(batch_size=0)
    with pytest.raises(ValueError, match="below steps"):
        Recipe(steps=10, look_steps=10)


def test_while_looking_only_the_tower_moves(tokenizer):
    trainer = Trainer(Recipe(steps=2, look_steps=1, batch_size=2, warm_up=1), tokenizer)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    losses = trainer.train_step(Stream(tokenizer, 2, look_steps=1)[0])
    moved = {n for n, v in trainer.model.state_dict().items() if not torch.equal(v, before[n])}
    assert set(losses) == {"patch_loss"}
    assert moved and all("vision_tower" in name for name in moved)


def test_the_patch_matrix_equals_the_convolution(tokenizer):
    pixels = torch.randn(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))
    plain, fast = build_model(tokenizer), build_model(tokenizer)
    embed_patches_by_matrix(fast)
    with torch.inference_mode():
        ours, theirs = picture_features(fast, pixels), picture_features(plain, pixels)
    assert plain.state_dict().keys() == fast.state_dict().keys()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_muon_gets_matrices_and_every_parameter_has_one_optimizer(model):
    matrices, others = split_parameters(model)
    assert all(parameter.ndim == 2 for parameter in matrices)
    everything = {id(p) for p in model.parameters()}
    assert {id(p) for p in matrices} | {id(p) for p in others} == everything
    assert len(matrices) + len(others) == len(everything)


def test_sixty_steps_lower_the_loss(tokenizer):
    seen = []
    trainer = Trainer(Recipe(steps=60, look_steps=0, batch_size=8, asked=3, warm_up=10), tokenizer)
    run(trainer, seen.append, workers=0)
    losses = [entry["loss"] for entry in seen]
    assert losses[0] > 5 and losses[-1] < losses[0] / 2


def test_a_resumed_run_equals_an_uninterrupted_one(tokenizer, tmp_path):
    recipe = Recipe(steps=5, look_steps=1, batch_size=2, asked=2, warm_up=1)
    straight = Trainer(recipe, tokenizer)
    run(straight, lambda entry: None, workers=0)
    first = Trainer(recipe, tokenizer)
    stream = Stream(tokenizer, 2, recipe.seed, 2, recipe.look_steps)
    for step in range(3):
        first.train_step(stream[step])
    save_state(first, tmp_path / "state.pt")
    assert load_trainer(tmp_path / "state.pt", tokenizer, steps=9).recipe.rate(4) > recipe.rate(4)
    second = load_trainer(tmp_path / "state.pt", tokenizer)
    assert second.step == 3
    run(second, lambda entry: None, workers=0)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_a_missing_state_is_an_error_in_words(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        load_trainer(tmp_path / "none.pt", tokenizer)


# ----------------------------------------------------------------------- the saved folder


LAYOUT = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_a_saved_folder_loads_as_any_llava_does(tokenizer, processor, model, tmp_path):
    folder = tmp_path / "checkpoint"
    save(model, processor, folder)
    assert {file.name for file in folder.iterdir()} == LAYOUT
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6
    loaded = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert loaded.config.vision_feature_layer == -2
    again = AutoProcessor.from_pretrained(folder)
    pictures = [draw(random_scene(0), 336), draw(random_scene(1), (300, 200))]
    inputs = again(images=pictures, text=[prompt_of("What?")] * 2, return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, PIXELS, PIXELS)
    count = (inputs["input_ids"] == loaded.config.image_token_id).sum(dim=1)
    assert count.tolist() == [IMAGE_TOKENS] * 2 and IMAGE_TOKENS == (PIXELS // PATCH) ** 2
    with torch.inference_mode():
        ours, theirs = model(**inputs).logits, loaded(**inputs).logits
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=0)
    assert len(answer(loaded, again, pictures, ["Describe the picture.", "Why?"])) == 2


def test_the_unread_layer_changes_nothing(processor, model, tmp_path):
    save(model, processor, tmp_path / "checkpoint")
    loaded = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "checkpoint", dtype=torch.float32
    )
    values = torch.zeros(1, 3, PIXELS, PIXELS)
    with torch.inference_mode():
        states = loaded.model.vision_tower(values, output_hidden_states=True).hidden_states
    assert torch.equal(states[-2], states[-1])


SHIPPED = Path(__file__).parents[1] / "data" / "checkpoints" / "tiny-llava"


@pytest.mark.skipif(not SHIPPED.exists(), reason="the checkpoint is not here")
def test_the_shipped_checkpoint_answers():
    loaded = LlavaForConditionalGeneration.from_pretrained(SHIPPED, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(SHIPPED)
    picture = draw(random_scene(11), 336)
    given_answer = answer(loaded, processor, [picture], ["How many shapes are there?"])[0]
    assert given_answer.startswith("There ")


# --------------------------------------------------------------------------- evaluation


def graded(kind, right, given_answer):
    return Graded(0, QA(kind, "?", right), given_answer)


def test_things_in_captions_are_counted_one_by_one():
    right = "A large red circle in the middle, a small star at the top left and a square."
    assert objects_right([graded("caption", right, right)]) == 1
    wrong = "A large red circle in the middle and a square."
    assert objects_right([graded("caption", right, wrong)]) == pytest.approx(2 / 3)


def test_a_summary_counts_every_kind():
    numbers = summary(
        [
            graded("caption", "A red star.", "A red star."),
            graded("exist", "Yes.", "No."),
            graded("exist", "Yes.", "Yes."),
        ]
    )
    assert numbers["captions_exact"] == 1 and numbers["questions_right"] == 0.5
    assert numbers["kinds"]["exist"] == {"n": 2, "right": 0.5}
    assert len(numbers["mistakes"]) == 1 and "| exist | 2 | 50.0% |" in table(numbers)


def test_the_card_tells_the_run_from_its_log(model, tmp_path):
    recipe = {"steps": 9, "seed": 0, "batch_size": 32, "asked": 6, "look_steps": 2}
    start = {"recipe": recipe, "machine": "a laptop", "weights": {"where": 1}}
    entries = [
        {"start": 0, **start},
        {"step": 4, "seconds": 60.0, "loss": 3.0},
        {"start": 4, **start, "weights": {"where": 2}},
        {"step": 9, "seconds": 120.0, "loss": 0.5},
    ]
    text = "\n".join(json.dumps(entry) for entry in entries)
    (tmp_path / "training_log.jsonl").write_text(text)
    numbers = summary([graded("caption", "A.", "A."), graded("exist", "Yes.", "No.")])
    card = model_card(tmp_path, model, numbers, "the command", 112)
    assert "in 3 minutes on a laptop" in card and "3.00 when that began, 0.5000" in card
    assert "from step 4 on" in card and "| exist | 1 | 0.0% |" in card
