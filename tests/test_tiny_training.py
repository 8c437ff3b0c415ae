"""Tokenizer, sequences, training, saving: each promise of the recipe, on small runs."""

import json
import random
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from einops import rearrange
from helpers import LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoProcessor,
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
)

import vlmlib
from vlmlib import IMAGE_TOKEN_INDEX, Video, split_chessboard
from vlmlib.tiny import data, evaluate, train
from vlmlib.tiny.clips import frames, random_clip
from vlmlib.tiny.data import (
    CHARACTERS,
    IGNORE,
    MIXES,
    PATCH_CLASSES,
    WRITTEN,
    Stream,
    Writer,
    attention_mask,
    choose_questions,
    close_up,
    collate,
    frame_moments,
    patch_targets,
)
from vlmlib.tiny.evaluate import (
    Graded,
    ask_all,
    case,
    chance,
    measure,
    model_card,
    objects_right,
    peak,
    summary,
    table,
    without_detail,
)
from vlmlib.tiny.model import (
    BUILDERS,
    FOLDED_TOKENS,
    IMAGE_TOKENS,
    PATCH,
    PIXELS,
    build,
    parts,
    save,
    warm_start,
)
from vlmlib.tiny.muon import Muon
from vlmlib.tiny.scenes import (
    COLOURS,
    QA,
    SHAPES,
    WORDS,
    detail_scene,
    draw,
    random_scene,
    train_detail_scene,
    train_scene,
)
from vlmlib.tiny.tokenizer import build_qwen_tokenizer, build_tokenizer
from vlmlib.tiny.train import (
    Recipe,
    Trainer,
    add_up_gradients,
    answer_logits,
    embed_patches_by_matrix,
    load_trainer,
    run,
    save_state,
    split_parameters,
    total,
)

EVERY = pytest.mark.parametrize("name", BUILDERS)
TILED = pytest.mark.parametrize("name", ["tiny-nvila", "tiny-internvl"])
WHOLE = (0.0, 0.0, 1.0, 1.0)


@cache
def shared(name: str) -> vlmlib.VisionLanguageModel:
    """Not to be changed."""
    return build(name)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(scenes=200)


PAIRS = [
    QA("count", "How many shapes are there?", "There are two shapes."),
    QA("exist", "Is there a green star?", "No."),
    QA("where", "Where is the circle?", "At the top left."),
]


def batch_of(*rows):
    """Without anything to read from the patches."""
    tiles = [sum(len(m.pixels) for m in row.media) for row in rows]
    return collate(rows, [np.zeros((t, 5, IMAGE_TOKENS), dtype=np.int64) for t in tiles])


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


def test_qwens_tokenizer_has_the_same_vocabulary_and_begins_with_nothing():
    llava, qwen = build_tokenizer(), build_qwen_tokenizer({"start_image_token": "<img>"})
    assert qwen.get_vocab().items() > llava.get_vocab().items()
    assert len(qwen) == len(llava) + 4
    assert qwen("").input_ids == []
    assert qwen("What?").input_ids == llava("What?").input_ids[1:]
    text = "<|im_start|>user\n<img>What?<|im_end|>"
    ids = qwen(text).input_ids
    assert ids[-1] == qwen.eos_token_id and qwen.decode(ids) == text
    assert qwen.bos_token is None and qwen.pad_token == "<|endoftext|>"


# --------------------------------------------------------------------------- sequences


def test_a_sequence_is_what_transformers_makes_of_the_text(tmp_path):
    """Training reads exactly the ids that LLaVA's own processor makes, first and second turn."""
    save(shared("tiny-llava"), tmp_path / "llava")
    processor = AutoProcessor.from_pretrained(tmp_path / "llava")
    messages = []
    for number, qa in enumerate(PAIRS):
        content = [{"type": "image"}] if number == 0 else []
        content = [*content, {"type": "text", "text": qa.question}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": qa.answer})
    text = processor.apply_chat_template(messages)
    assert text == (
        "USER: <image>\nHow many shapes are there? ASSISTANT: There are two shapes.</s>"
        "USER: Is there a green star? ASSISTANT: No.</s>"
        "USER: Where is the circle? ASSISTANT: At the top left.</s>"
    )
    picture = draw(random_scene(0))
    theirs = processor(images=picture, text=text, return_tensors="pt")
    row = Writer(shared("tiny-llava")).conversation([picture], PAIRS)
    image_id = shared("tiny-llava").config.image_token_id
    ours = [image_id if i == IMAGE_TOKEN_INDEX else i for i in row.tokens.ids]
    assert ours == theirs["input_ids"][0].tolist()
    torch.testing.assert_close(row.media[0].pixels, theirs["pixel_values"], atol=1e-5, rtol=0)


def sources_of(name):
    """A picture, a large one and, where the model takes it, a clip."""
    pictures = [[draw(random_scene(3))], [draw(detail_scene(3))]]
    clip = Video(frames(random_clip(3), frame_moments(0), PIXELS))
    return pictures if name == "tiny-llava" else [*pictures, [clip]]


@EVERY
def test_rows_are_the_conversations_that_the_model_reads(name):
    """The ids before every answer are those of the prompt that inference would write."""
    model, end = shared(name), shared(name).tokenizer.eos_token_id
    for sources in sources_of(name):
        row = Writer(model).conversation(sources, PAIRS)
        turns, ends = [], [i + 1 for i, x in enumerate(row.tokens.targets) if x == end]
        for number, qa in enumerate(PAIRS):
            turns.append(("user", [*(sources if number == 0 else []), qa.question]))
            ids, media = model.read(model.conversation_prompt(turns), model.prepare(sources))
            lengths = iter([m.length for m in media])
            whole = sum(([i] * (next(lengths) if i < 0 else 1) for i in ids), [])
            assert row.tokens.ids[: len(whole)] == whole
            answer = model.tokenizer.decode(row.tokens.ids[len(whole) : ends[number]])
            assert answer.strip() == qa.answer + model.tokenizer.eos_token
            turns.append(("assistant", [qa.answer]))
        assert ends[-1] == len(row.tokens.ids)


@EVERY
def test_isolated_questions_equal_single_conversations(name):
    """The block mask gives the logits of separate runs, to 1e-4."""
    model, sources = shared(name), sources_of(name)[-1]
    writer = Writer(model)
    together = batch_of(writer.isolated(sources, PAIRS))
    alone = [batch_of(writer.conversation(sources, [qa])) for qa in PAIRS]
    with torch.inference_mode():
        features = model.tower_features(together.pixels)
        logits, targets = answer_logits(model, features, together)
        singles = [answer_logits(model, features, batch) for batch in alone]
    assert torch.equal(targets, torch.cat([t for _, t in singles]))
    torch.testing.assert_close(logits, torch.cat([x for x, _ in singles]), atol=1e-4, rtol=0)


@EVERY
def test_training_logits_are_those_of_the_model_itself(name):
    """A padded batch gives what `encode`, `fuse` and the decoder give one picture at a time."""
    model, writer = shared(name), Writer(shared(name))
    rows = [writer.conversation(sources, PAIRS) for sources in sources_of(name)]
    batch = batch_of(*rows)
    expected = []
    with torch.inference_mode():
        ours, _ = answer_logits(model, model.tower_features(batch.pixels), batch)
        for row in rows:
            ids = [i for i in row.tokens.ids if i != IMAGE_TOKEN_INDEX]
            text = iter(model.embed(torch.tensor(ids)))
            seen = iter(torch.cat([model.encode(m) for m in row.media]))
            inputs = torch.stack(
                [next(seen if i == IMAGE_TOKEN_INDEX else text) for i in row.tokens.ids]
            )
            hidden = model.net.get_decoder()(inputs_embeds=inputs[None]).last_hidden_state
            learn = torch.tensor(row.tokens.targets[1:]) != IGNORE
            expected.append(model.net.lm_head(hidden[0, :-1][learn]))
    torch.testing.assert_close(ours, torch.cat(expected), atol=1e-4, rtol=0)


@EVERY
def test_the_first_answer_token_is_that_of_a_stream(name):
    model, sources = shared(name), sources_of(name)[-1]
    batch = batch_of(Writer(model).isolated(sources, PAIRS[:1]))
    prompt = model.chat_prompt([*sources, PAIRS[0].question])
    with torch.inference_mode():
        ours, _ = answer_logits(model, model.tower_features(batch.pixels), batch)
        streamed = model.turn(prompt, model.prepare(sources)).prefill()
    torch.testing.assert_close(ours[:1], streamed, atol=1e-4, rtol=0)


def test_the_mask_in_small():
    blocks = torch.tensor([[0, 1, 1, 2, -1]])
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 1]]
    assert (attention_mask(blocks)[0, 0] == 0).int().tolist() == expected


@EVERY
def test_only_answers_are_learnt(name):
    model = shared(name)
    tokens = Writer(model).isolated(sources_of(name)[0], PAIRS).tokens
    learnt = [target for target in tokens.targets if target != IGNORE]
    texts = model.tokenizer.decode(learnt).split(model.tokenizer.eos_token)
    assert [text.strip() for text in texts] == [*(qa.answer for qa in PAIRS), ""]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_every_thing_owns_a_patch(index):
    scene = train_scene(index)
    shape, colour, size, label, second, third = patch_targets(scene, (PIXELS, PIXELS))
    for thing in scene.things:
        mine = (shape == 1 + SHAPES.index(thing.shape)) & (
            colour == 1 + list(COLOURS).index(thing.colour)
        )
        assert mine.any()
    assert np.array_equal(size > 0, shape > 0)
    assert texts_read(label[None, None]) == {thing.label for thing in scene.things if thing.label}
    assert not second.any() and not third.any()


THIRDS = [(x / 3, y / 3, (x + 1) / 3, (y + 1) / 3) for y in range(3) for x in range(3)]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_small_print_is_read_from_the_tiles_that_show_it(index):
    """All print of a scene, and no other, in a grid of tiles; none of it in the whole picture."""
    scene = train_detail_scene(index)
    planes = np.stack([patch_targets(scene, scene.size, region) for region in THIRDS])
    assert planes.shape == (9, len(PATCH_CLASSES), IMAGE_TOKENS)
    for plane, classes in enumerate(PATCH_CLASSES):
        assert planes[:, plane].min() >= 0 and planes[:, plane].max() < classes
    assert texts_read(planes[:, WRITTEN]) == {thing.print for thing in scene.things if thing.print}
    assert (patch_targets(scene, scene.size, WHOLE)[WRITTEN] == IGNORE).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_a_close_up_shows_all_small_print_on_one_tile_as_large_as_in_the_tiles(index):
    scene = train_detail_scene(index)
    close = close_up(scene)
    assert close.size == (PIXELS, PIXELS) and close.things == scene.things
    assert close.print_height * PIXELS == pytest.approx(scene.print_height * 3 * PIXELS)
    planes = patch_targets(close, close.size)[None]
    assert texts_read(planes[:, WRITTEN]) == {thing.print for thing in scene.things if thing.print}


def texts_read(planes):
    """All that (t, character, p) patch targets spell."""
    letters = rearrange(planes, "t character p -> (t p) character")
    spelt = {"".join(CHARACTERS[i - 1] for i in patch if i) for patch in letters}
    return spelt - {""}


@EVERY
def test_the_stream_depends_on_seed_and_step_only(name):
    first, again, other = (Stream(shared(name), 2, seed=seed)[5][0] for seed in (1, 1, 2))
    assert torch.equal(first.ids, again.ids) and torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.patches, again.patches)
    assert first.ids.shape != other.ids.shape or not torch.equal(first.ids, other.ids)
    assert len(first.pixels) == len(first.patches) == sum(first.tiles)
    assert (first.ids == IMAGE_TOKEN_INDEX).sum() == sum(m.length for m in first.media)


def test_questions_of_one_picture_differ():
    for index in range(50):
        shown = {"scene": train_scene(index), "print": train_detail_scene(index)}
        shown["clip"] = random_clip(index)
        for mix in MIXES.values():
            for content, share in mix.items():
                asked = choose_questions(shown[content], share, random.Random(index), 8)
                assert asked and len({qa.question for qa in asked}) >= len(asked) - 1
                assert {qa.kind for qa in asked} <= {*share.weights, share.usual}


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
    for wrong in ({"warm_up": 0}, {"flat_until": 1.0}, {"patch_loss_until": 0.0}):
        with pytest.raises(ValueError, match="warm_up must be 1 or more, flat_until from 0"):
            Recipe(**wrong)


@EVERY
def test_while_looking_only_the_tower_moves(name):
    trainer = Trainer(Recipe(name, steps=2, look_steps=1, batch_size=2, warm_up=1))
    before = {key: value.clone() for key, value in trainer.parts.state_dict().items()}
    losses = trainer.train_step(Stream(trainer.model, 2, look_steps=1)[0])
    moved = {k for k, v in trainer.parts.state_dict().items() if not torch.equal(v, before[k])}
    assert set(losses) == {"patch_loss"}
    assert moved and all(key.startswith("tower.") for key in moved)


@EVERY
def test_the_patch_matrix_equals_the_convolution(name):
    pixels = torch.randn(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))
    fast = build(name)
    embed_patches_by_matrix(parts(fast))
    assert not any(type(m) is torch.nn.Conv2d for m in parts(fast).modules())
    with torch.inference_mode():
        ours, theirs = fast.tower_features(pixels), shared(name).tower_features(pixels)
    assert parts(fast).state_dict().keys() == parts(shared(name)).state_dict().keys()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_muon_without_bf16_is_torchs(shape):
    """The same updates up to bf16's rounding, from the same state, over several steps."""
    generator = torch.Generator().manual_seed(1)
    start, gradients = torch.randn(shape), torch.randn(4, *shape, generator=generator)
    moved = []
    for muon in (Muon, torch.optim.Muon):
        matrix, unused = (torch.nn.Parameter(start.clone()) for _ in range(2))
        optimizer = muon([matrix, unused], lr=0.1, weight_decay=0.2)
        for gradient in gradients:
            matrix.grad = gradient.clone()
            optimizer.step()
        assert torch.equal(unused, start) and unused not in optimizer.state
        moved.append((matrix - start, optimizer.state_dict()["state"][0]["momentum_buffer"]))
    (ours, mine), (theirs, kept) = moved
    assert torch.equal(mine, kept)
    assert (ours - theirs).norm() < 0.01 * theirs.norm() and ours.norm() > 1


def test_muon_refuses_what_it_does_not_do():
    matrix = torch.nn.Parameter(torch.eye(2))
    with pytest.raises(NotImplementedError):
        Muon([matrix], adjust_lr_fn="match_rms_adamw").step()


@pytest.mark.parametrize(
    ("capabilities", "half"),
    [
        ({"avx2": True, "avx512_bf16": False, "l2_cache_size": 524288}, False),
        ({"avx2": True, "avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({}, False),
    ],
)
def test_bf16_only_where_the_processor_has_it(monkeypatch, capabilities, half):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    trainer = Trainer(Recipe(steps=4, look_steps=0, batch_size=2))
    assert trainer.half is half and isinstance(trainer.optimizers[0], Muon) is not half
    dtypes = []
    head = trainer.reader.heads[0]
    head.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    trainer.train_step(Stream(trainer.model, 2)[0])
    assert dtypes == [torch.bfloat16 if half else torch.float32]


@EVERY
def test_muon_gets_matrices_and_every_parameter_has_one_optimizer(name):
    matrices, others = split_parameters(parts(shared(name)))
    assert len(matrices) > 50 and all(parameter.ndim == 2 for parameter in matrices)
    everything = {id(p) for p in shared(name).parameters()}
    assert {id(p) for p in matrices} | {id(p) for p in others} == everything
    assert len(matrices) + len(others) == len(everything)


@EVERY
def test_sequences_in_several_batches_count_as_in_one(name, monkeypatch):
    seen = []
    for together in (4, 1):
        monkeypatch.setattr(data, "TOGETHER", together)
        trainer = Trainer(Recipe(name, steps=9, look_steps=0, batch_size=4, asked=3, warm_up=1))
        work = Stream(trainer.model, 4, asked=3)[0]
        assert len(work) == 4 // together
        seen.append([trainer.train_step(work) for _ in range(2)])
    for one, many in zip(*seen, strict=True):
        assert one["loss"] == pytest.approx(many["loss"], rel=0.02)


def test_sixty_steps_lower_the_loss():
    seen = []
    trainer = Trainer(Recipe(steps=60, look_steps=0, batch_size=8, asked=3, warm_up=10))
    run(trainer, seen.append, workers=0, every_steps=25)
    assert [entry["step"] for entry in seen] == [1, 10, 25, 50, 60]
    losses = [entry["loss"] for entry in seen]
    assert losses[0] > 5 and losses[-1] < losses[0] / 2


@TILED
def test_some_steps_on_one_batch_lower_the_loss(name, tmp_path):
    recipe = Recipe(name, steps=12, look_steps=0, batch_size=2, asked=2, warm_up=2)
    trainer = Trainer(recipe)
    batch = Stream(trainer.model, 2, asked=2)[0]
    losses = [trainer.train_step(batch)["loss"] for _ in range(12)]
    assert losses[-1] < losses[0] / 2
    save(trainer.model, tmp_path / name)
    loaded = vlmlib.load(tmp_path / name, device="cpu")
    with torch.inference_mode():
        seen = [m.tower_features(batch[0].pixels[:1]) for m in (trainer.model, loaded)]
    torch.testing.assert_close(*seen, atol=5e-2, rtol=0)


@EVERY
def test_a_resumed_run_equals_an_uninterrupted_one(name, tmp_path):
    recipe = Recipe(name, steps=4, look_steps=1, batch_size=2, asked=2, warm_up=1)
    straight = Trainer(recipe)
    run(straight, lambda entry: None, workers=0)
    first = Trainer(recipe)
    stream = Stream(first.model, 2, recipe.seed, 2, recipe.look_steps)
    for step in range(2):
        first.train_step(stream[step])
    save_state(first, tmp_path / "state.pt")
    assert load_trainer(tmp_path / "state.pt", steps=9).recipe.rate(3) > recipe.rate(3)
    second = load_trainer(tmp_path / "state.pt")
    assert second.step == 2 and second.model.family == first.model.family
    run(second, lambda entry: None, workers=0)
    for key, value in straight.parts.state_dict().items():
        assert torch.equal(value, second.parts.state_dict()[key]), key


def test_two_processes_train_as_one_does(tmp_path):
    """The same losses to rounding: the gradients of both are added up before every step."""
    seen = []
    for processes in ("1", "2"):
        out = tmp_path / processes
        command = "--steps 10 --look-steps 0 --batch-size 4 --asked 2 --warm-up 1 --workers 0"
        train.main(
            ["--out", str(out), "--processes", processes, "--threads", processes, *command.split()]
        )
        log = [json.loads(line) for line in (out / "training_log.jsonl").open()]
        seen.append([entry for entry in log if "seconds" in entry])
        assert vlmlib.load(out, device="cpu").family == "llava"
    for one, two in zip(*seen, strict=True):
        assert one["step"] == two["step"]
        assert one["loss"] == pytest.approx(two["loss"], rel=0.005)
    assert seen[0][-1]["loss"] < 0.9 * seen[0][0]["loss"]


def test_gradients_of_one_process_stay_as_they_are():
    weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    weights[0].grad = torch.tensor([1.0, 2.0])
    add_up_gradients(weights)
    assert weights[0].grad.tolist() == [1, 2] and weights[1].grad is None
    assert total(1, 2.5) == [1, 2.5]


def test_every_sequence_of_a_step_is_in_one_process_only():
    whole, *shares = (
        Stream(shared("tiny-llava"), 4, asked=2, part=part)[3] for part in ((0, 1), (0, 2), (1, 2))
    )
    lengths = [
        sorted((b.blocks >= 0).sum(dim=1).tolist()) for b in (whole[0], *(s[0] for s in shares))
    ]
    assert lengths[0] == sorted(lengths[1] + lengths[2])


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that stopped: a model begun with another one, its log and its state."""
    out = tmp_path_factory.mktemp("run") / "mine"
    out.mkdir()
    trainer = Trainer(Recipe("tiny-internvl", steps=9, look_steps=2, batch_size=2))
    save_state(trainer, out.with_name("mine.state.pt"))
    first = {"start": 0, "started_from": "data/checkpoints/tiny-llava"}
    (out / "training_log.jsonl").write_text(json.dumps(first) + "\n")
    return out


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--model tiny-internvl --start data/checkpoints/tiny-llava",
        "--start ./data/checkpoints/tiny-llava/ --steps 12 --batch-size 2 --compile",
    ],
)
def test_a_run_is_resumed_by_what_it_was_begun_with(begun, options, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "train", seen.append)
    train.main(["--out", str(begun), "--resume", "--processes", "1", *options.split()])
    assert seen[0].resume


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--model tiny-llava", "another --model;"),
        ("--start data/checkpoints/tiny-internvl", "another --start;"),
        ("--batch-size 3 --steps 12 --muon-rate 0.5", "another --batch-size, --muon-rate;"),
    ],
)
def test_what_a_resumed_run_would_not_obey_is_an_error(begun, options, named, capsys):
    with pytest.raises(SystemExit):
        train.main(["--out", str(begun), "--resume", *options.split()])
    assert f"mine.state.pt was begun with {named}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([4.0, 1.9], None),
        ([4.0, 2.1], "the loss fell from 4.00 to 2.10 only"),
        ([], "no answer was learnt from"),
    ],
)
def test_a_run_against_the_clock_may_look_first(losses, words, tmp_path, monkeypatch):
    """It fails unless the loss of the answers halves, from where that begins."""
    entries = [{"step": 1, "patch_loss": 9.0}, *({"step": 2, "loss": loss} for loss in losses)]
    monkeypatch.setattr(train, "run", lambda trainer, report, *_, **__: list(map(report, entries)))
    command = "--minutes 1 --steps 9 --look-steps 1 --processes 1"
    arguments = ["--out", str(tmp_path / "out"), *command.split()]
    if words is None:
        train.main(arguments)
        return
    with pytest.raises(SystemExit, match=words):
        train.main(arguments)


def test_a_missing_state_is_an_error_in_words(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        load_trainer(tmp_path / "none.pt")


def test_an_unknown_model_is_an_error_in_words():
    with pytest.raises(ValueError, match="no model 'tiny-flamingo'; there are tiny-llava"):
        build("tiny-flamingo")


@TILED
def test_a_warm_start_sees_what_llava_sees(name):
    """The same features of a whole picture, though the towers differ; and the same words."""
    source, model = vlmlib.load("tiny-llava", device="cpu"), build(name)
    before = {key: value.clone() for key, value in parts(model).state_dict().items()}
    copied = warm_start(model, source)
    picture = draw(random_scene(3))
    with torch.inference_mode():
        theirs = source.tower_features(source.prepare([picture])[0].pixels)
        ours = model.tower_features(source.prepare([picture])[0].pixels)
    assert torch.cosine_similarity(ours, theirs, dim=-1).mean() > 0.99
    word = source.tokenizer.convert_tokens_to_ids("Ġcircle")
    assert torch.equal(model.embed(torch.tensor([word])), source.embed(torch.tensor([word])))
    for key, value in parts(model).state_dict().items():
        assert key in copied or key == "head.weight" or torch.equal(value, before[key]), key


def test_a_warm_start_sees_what_internvl_sees():
    """The same features of a tile, and the same rows for it behind the projector, once the tiles'
    rows are taken out of NVILA's map of the whole picture.
    """
    source, model = build("tiny-internvl", seed=3), build("tiny-nvila", seed=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in parts(source).named_parameters():
            if "lambda" in name or "projector" in name and parameter.ndim == 1:
                parameter.uniform_(0.5, 2, generator=generator)
    picture = draw(detail_scene(5))
    (theirs,), (ours,) = source.prepare([picture]), model.prepare([picture])
    rows, cols = ours.block
    tiles = rows * cols
    assert torch.equal(theirs.pixels[:tiles], ours.pixels[-tiles:]) and tiles > 3

    def seen():
        side = rows * 4, cols * 4  # a tile is 4 x 4 positions; a line break follows the last
        projected = model.encode(ours)[:-1].unflatten(0, side)
        return (
            model.tower_features(ours.pixels[-tiles:]),
            rearrange(
                split_chessboard(rearrange(projected, "h w d -> 1 d h w"), rows, cols),
                "t d h w -> (t h w) d",
            ),
        )

    with torch.inference_mode():
        wanted = source.tower_features(theirs.pixels[:tiles]), source.encode(theirs)[: tiles * 16]
        before = seen()
        copied = warm_start(model, source)
        after = seen()
    assert {name.split(".")[0] for name in copied} == {"tower", "language", "projector"}
    alike = torch.nn.functional.cosine_similarity  # but for the class token, which SigLIP has not
    for name, least, *features in zip(
        ("tower", "rows"), (0.98, 0.95), before, after, wanted, strict=True
    ):
        was, now = (alike(f, features[-1], dim=-1) for f in features[:2])
        assert now.min() > least > was.max(), name


def test_a_warm_start_of_the_same_family_is_a_copy():
    source, model = vlmlib.load("tiny-llava", device="cpu"), build("tiny-llava")
    assert set(warm_start(model, source)) == dict(parts(model).named_parameters()).keys()
    for ours, theirs in zip(model.parameters(), source.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# ----------------------------------------------------------------------- the saved folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    for name in BUILDERS:
        save(shared(name), root / name)
    return root


@EVERY
def test_a_saved_folder_is_loaded_as_it_was(name, folders):
    folder, model = folders / name, shared(name)
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {file.relative_to(folder).as_posix() for file in files} == LAYOUTS[name]
    assert sum(file.stat().st_size for file in files) < 12e6
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}
    assert not list(folders.glob(".*"))
    loaded = vlmlib.load(folder, device="cpu")
    assert loaded.stop_token_ids == model.stop_token_ids
    for sources in sources_of(name):
        prompt = model.chat_prompt([*sources, "What?"])
        assert loaded.chat_prompt([*sources, "What?"]) == prompt
        (ids, media), (ours, mine) = (m.read(prompt, m.prepare(sources)) for m in (loaded, model))
        assert ids == ours and [m.length for m in media] == [m.length for m in mine]
        with torch.inference_mode():
            logits = [m.turn(prompt, m.prepare(sources)).prefill() for m in (loaded, model)]
        torch.testing.assert_close(*logits, atol=2e-2, rtol=0)


@EVERY
def test_saving_leaves_the_model_alone(name, tmp_path):
    model = build(name)
    before = [p.clone() for p in model.parameters()]
    save(model, tmp_path / "a")
    save(model, tmp_path / "a")
    assert model.dtype == torch.float32
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_transformers_loads_the_llava_folder(folders):
    net = LlavaForConditionalGeneration.from_pretrained(
        folders / "tiny-llava", dtype=torch.float32
    ).eval()
    assert net.config.vision_feature_layer == -2
    processor = AutoProcessor.from_pretrained(folders / "tiny-llava")
    model = vlmlib.load(folders / "tiny-llava", device="cpu")
    picture = draw(random_scene(1), (300, 200))
    prompt = model.chat_prompt([picture, "What?"])
    inputs = processor(images=[picture], text=[prompt], return_tensors="pt")
    assert (inputs["input_ids"] == net.config.image_token_id).sum() == IMAGE_TOKENS
    assert IMAGE_TOKENS == (PIXELS // PATCH) ** 2
    with torch.inference_mode():
        theirs = net(**inputs).logits[:, -1]
        ours = model.turn(prompt, model.prepare([picture])).prefill()
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_transformers_loads_the_internvl_folder(folders):
    net = InternVLForConditionalGeneration.from_pretrained(
        folders / "tiny-internvl", dtype=torch.float32
    ).eval()
    model = vlmlib.load(folders / "tiny-internvl", device="cpu")
    picture = draw(detail_scene(1))
    (medium,) = model.prepare([picture])
    assert medium.length == len(medium.pixels) * FOLDED_TOKENS and len(medium.pixels) > 4
    prompt = model.chat_prompt([picture, "What?"])
    assert prompt.count("<IMG_CONTEXT>\n") == 1
    slot = "<img>" + "<IMG_CONTEXT>" * medium.length + "</img>"
    ids = model.tokenizer(prompt.replace("<IMG_CONTEXT>", slot), return_tensors="pt").input_ids
    with torch.inference_mode():
        theirs = net(input_ids=ids, pixel_values=medium.pixels).logits[:, -1]
        ours = model.turn(prompt, [medium]).prefill()
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-nvila"])
def test_the_unread_layer_changes_nothing(name, folders):
    tower = parts(vlmlib.load(folders / name, device="cpu"))["tower"]
    with torch.inference_mode():
        out = tower(torch.zeros(1, 3, PIXELS, PIXELS), output_hidden_states=True)
    assert torch.equal(out.hidden_states[-2], out.hidden_states[-1])


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
    assert len(numbers["mistakes"]) == 1


def test_questions_on_one_cache_are_answered_as_if_alone():
    model = vlmlib.load("tiny-llava", device="cpu")
    picture, asked = case("scene", 5)
    texts = [qa.question for qa in asked]
    assert ask_all(model, picture, texts) == [vlmlib.answer(model, [picture, q]) for q in texts]


@pytest.mark.parametrize("size", [(336, 336), (350, 231), (220, 330)])
def test_without_detail_a_picture_is_what_one_view_shows(size):
    """Squeezed into the view it is as before; at its own size the print is gone."""
    picture = draw(detail_scene(2), size)
    coarse = without_detail(picture)
    assert coarse.size == picture.size
    view = [round(side * PIXELS / max(size)) for side in size]

    def apart(a, b):
        return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float))

    bicubic = Image.Resampling.BICUBIC
    assert apart(coarse.resize(view, bicubic), picture.resize(view, bicubic)).mean() < 2
    assert apart(coarse, picture).max() > 100
    assert apart(without_detail(coarse), coarse).mean() < 2


def test_a_peak_is_where_the_weight_is():
    boxes = torch.tensor([[0, 0, 0.5, 1], [0.5, 0, 1, 0.5], [float("nan")] * 4])
    x, y = peak(torch.tensor([1.0, 2.0, 9.0]), boxes, 20, 10)
    assert x >= 10 and y < 5


@TILED
def test_all_is_measured_and_in_the_card(name, folders, monkeypatch):
    monkeypatch.setattr("vlmlib.tiny.evaluate.GREEDY", vlmlib.GenParams.greedy(n_predict=4))
    model = vlmlib.load(folders / name, device="cpu")
    numbers = measure(model, ["scene", "print", "clip"], range(1), pixels=56)
    assert numbers["print"]["without_detail"].keys() == numbers["print"]["kinds"].keys()
    assert numbers["print"]["chance"].keys() == numbers["print"]["kinds"].keys()
    assert len(numbers["print"]["attention_hits"]) == 4
    assert numbers["print"]["attention_pictures"] == 1
    card = model_card(folders / name, model, numbers, "the command", 56)
    for word in ("**Small print**", "**Clips**", "without detail", "visual tokens", "# " + name):
        assert word in card
    json.dumps(numbers)


def test_tables_and_a_figure_are_saved(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmlib.tiny.evaluate.GREEDY", vlmlib.GenParams.greedy(n_predict=4))
    copies = [shutil.copytree(folders / name, tmp_path / name) for name in BUILDERS]
    options = ["--scenes", "2", "--content", "print", "--save", str(tmp_path / "saved")]
    evaluate.main([*map(str, copies[:2]), *options])
    evaluate.main([str(copies[2]), *options])  # the others stay
    numbers = json.loads((tmp_path / "saved" / "evaluation.json").read_text())
    assert numbers.keys() == {copy.name for copy in copies}
    words = (tmp_path / "saved" / "evaluation.md").read_text()
    assert all(name in words for name in numbers)
    assert (tmp_path / "saved" / "small-print.png").read_bytes().startswith(b"\x89PNG")
    assert all("**Small print**" in (copy / "README.md").read_text() for copy in copies)


@pytest.mark.parametrize("options", ["--scenes 0", "--seed -100 --scenes 100", "--seed 1990"])
def test_only_what_is_held_out_is_measured(options, tmp_path):
    with pytest.raises(SystemExit, match="only the seeds from 0 to 1999 are held out"):
        evaluate.main([str(tmp_path), *options.split()])


def test_broken_numbers_are_found_before_hours_of_measuring(tmp_path):
    (tmp_path / "evaluation.json").write_text('{"tiny-llava": ')
    with pytest.raises(SystemExit, match="evaluation.json is no JSON"):
        evaluate.main([str(tmp_path / "nothing here"), "--save", str(tmp_path)])


def test_folders_of_one_name_are_not_measured_together(tmp_path):
    with pytest.raises(SystemExit, match="two folders have the name tiny: measure them one by one"):
        evaluate.main([str(tmp_path / "a" / "tiny"), str(tmp_path / "b" / "tiny")])


def test_chance_is_one_in_as_many_as_there_are():
    for seed in range(20):
        prints = {thing.print for thing in detail_scene(seed).things if thing.print}
        numbers = {text for text in prints if text.isdigit()}
        share = chance([seed])
        assert 1 / share["find_print"] in (len(numbers), len(prints - numbers))
        assert share.get("read_print", 1 / len(WORDS)) in (1 / len(WORDS), 1 / 294)


def test_the_card_tells_the_run_from_its_log(folders):
    recipe = {"steps": 9, "seed": 0, "batch_size": 32, "asked": 6, "look_steps": 2}
    start = {"recipe": recipe, "machine": "a laptop", "mix": {"where": 1}}
    entries = [
        {"start": 0, **start, "started_from": "data/first", "compile": True},
        {"step": 4, "seconds": 60.0, "loss": 3.0},
        {"start": 4, **start, "mix": {"where": 2}},
        {"step": 9, "seconds": 120.0, "loss": 0.5},
    ]
    text = "\n".join(json.dumps(entry) for entry in entries)
    log = folders / "tiny-llava" / "training_log.jsonl"
    log.write_text(text)
    numbers = summary([graded("caption", "A.", "A."), graded("exist", "Yes.", "No.")])
    numbers = {"scene": numbers | {"tokens": {"min": 64, "mean": 64, "max": 64}}}
    assert "| Scenes: exist | 1 | 0.0% | 0.0% |" in table({"one": numbers, "two": numbers})
    card = model_card(folders / "tiny-llava", shared("tiny-llava"), numbers, "the command", 112)
    log.unlink()
    command = "python -m vlmlib.tiny.train --model tiny-llava --out DIR --steps 9 --look-steps 2"
    assert f"{command} --asked 6 --start data/first --compile\n" in card
    assert f"{command} --asked 6 --resume  # from step 4\n" in card, "of older runs it is not said"
    assert "in 3 minutes on a laptop" in card and "3.00 when that began, 0.5000" in card
    assert "changed at step 4" in card and "| Scenes: exist | 1 | 0.0% |" in card
    assert "Begun with the weights of `data/first`" in card


def test_a_close_up_fills_the_tiles_that_a_model_looks_at_anyway():
    """So that its print is as large in them as that of a large picture: NVILA enlarges less."""
    scene = train_detail_scene(3)
    for name, tiles in (("tiny-internvl", 1), ("tiny-nvila", 1 + 4)):
        model = build(name, seed=0)
        side = MIXES[model.family]["print"].side
        (medium,) = model.prepare([draw(close_up(scene, 1.0, side))])
        assert len(medium.pixels) == tiles
        grid = 1 if tiles == 1 else medium.block[0]
        in_tile = close_up(scene, 1.0, side).print_height * PIXELS * grid
        assert in_tile == pytest.approx(scene.print_height * 3 * PIXELS)
