"""The models with tiles that ship: they really see what is small, and what moves."""

from __future__ import annotations

import json
import random
from dataclasses import asdict

import pytest
import torch
from helpers import LAYOUTS, ids_of
from transformers import InternVLForConditionalGeneration

import vlmlib
from vlmlib import Video
from vlmlib.__main__ import main
from vlmlib.fusion import fuse
from vlmlib.tiny.evaluate import PRINT_KINDS, grade, without_detail
from vlmlib.tiny.recipe import RECIPES
from vlmlib.tiny.scenes import HELD_OUT, detail_scene, draw, questions

SIBLINGS = ("tiny-internvl", "tiny-nvila")
GREEDY = vlmlib.GenParams.greedy(n_predict=100)


@pytest.fixture(scope="module", params=SIBLINGS)
def model(request):
    return vlmlib.load(request.param, device="cpu")


@pytest.fixture(scope="module")
def internvl():
    """The model, and transformers' own class reading the same folder."""
    folder = vlmlib.DATA / "checkpoints" / "tiny-internvl"
    net = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return vlmlib.load("tiny-internvl", device="cpu"), net.eval()


def right_share(model, content, seeds, kinds=None, change=None):
    graded = grade(model, content, seeds, change=change)
    hits = [g.right for g in graded if kinds is None or g.qa.kind in kinds]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("name", SIBLINGS)
def test_is_small_and_in_the_published_layout(name):
    folder = vlmlib.DATA / "checkpoints" / name
    files = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
    assert files.keys() == LAYOUTS[name] | {"README.md", "training_log.jsonl"}
    assert sum(f.stat().st_size for f in files.values()) < 12e6


def test_a_recipe_that_is_followed_gives_as_good_a_model():
    """tiny-nvila's, from its first step to its last: as good as what ships, within two points."""
    first = vlmlib.DATA / "evaluation"
    second = first / "retrained"
    log = (second / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in log]
    recipe = RECIPES["tiny-nvila"]
    starts = [entry for entry in log if "start" in entry]
    assert starts[0]["start"] == 0 and log[-1]["step"] == recipe.steps
    assert all(entry["recipe"] == asdict(recipe) for entry in starts)
    shipped, again = (
        json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["tiny-nvila"]
        for folder in (first, second)
    )
    pairs = [(shipped[c]["questions_right"], again[c]["questions_right"]) for c in shipped]
    pairs.append((shipped["scene"]["captions_exact"], again["scene"]["captions_exact"]))
    kinds = [numbers["print"]["kinds"] for numbers in (shipped, again)]
    pairs += [tuple(of[kind]["right"] for of in kinds) for kind in PRINT_KINDS]
    assert len(pairs) == 7 and all(abs(b - a) <= 0.02 for a, b in pairs), pairs
    assert again["print"]["without_detail"]["read_print"]["right"] < 0.1


def test_describes_and_answers(model):
    assert right_share(model, "scene", HELD_OUT[:15]) > 0.9


def test_reads_small_print_and_reads_it_off_the_tiles(model):
    seeds = HELD_OUT[:25]
    assert right_share(model, "print", seeds) > 0.8
    assert right_share(model, "print", seeds, PRINT_KINDS[:1], change=without_detail) < 0.2


def test_watches_clips(model):
    assert right_share(model, "clip", HELD_OUT[:10]) > 0.8


def test_answers_about_the_clips_that_ship(model):
    folder = vlmlib.DATA / "videos"
    for name, described in json.loads((folder / "clips.json").read_text()).items():
        clip = Video(folder / name, num_frames=8)
        given = [vlmlib.answer(model, [clip, qa["question"]]) for qa in described["questions"]]
        right = [
            text == qa["answer"] for text, qa in zip(given, described["questions"], strict=True)
        ]
        assert sum(right) >= len(right) - 1, (name, given)


def test_answers_about_a_clip_in_a_terminal(capsys):
    clip = str(vlmlib.DATA / "videos" / "circle-moves-right.mp4")
    positions = []
    for frames in ("4", "8"):
        options = ["--model", "tiny-internvl", "--frames", frames, "--json"]
        assert main([clip, "What happens?", *options]) == 0
        out, err = capsys.readouterr()
        positions.append(json.loads(err)["usage"]["prompt_tokens"])
    assert "moves" in out and positions[1] - positions[0] > 4 * 16
    assert main([clip, "What happens?", "--model", "tiny-internvl", "--frames", "0"]) == 1
    assert "number of frames must be a whole number" in capsys.readouterr().err


def test_needs_the_picture(model):
    """Asked about another scene's picture it is wrong: it does not guess from the question."""
    right = []
    for seed in HELD_OUT[:20]:
        asked = questions(detail_scene(seed), random.Random(seed))
        other = draw(detail_scene(seed + 1))
        right += [vlmlib.answer(model, [other, qa.question]) == qa.answer for qa in asked[-1:]]
    assert sum(right) < 10


@torch.inference_mode()
def test_the_cache_changes_nothing(model):
    """Every token is the best one of a full recomputation of all before it."""
    picture = draw(detail_scene(HELD_OUT[3]))
    prompt, media = model.chat_prompt([picture, "Describe the picture."]), model.prepare([picture])
    said = ids_of(model.stream_prompt(prompt, media, GREEDY, trace=0))
    ids, placed = model.read(prompt, media)
    whole = fuse([*ids, *said], [model.encode(medium) for medium in placed], model.embed)
    hidden = model.net.get_decoder()(inputs_embeds=whole, use_cache=False).last_hidden_state
    best = model.net.lm_head(hidden[0, -len(said) - 1 : -1]).argmax(dim=-1)
    assert len(said) > 20 and best.tolist() == said


@pytest.mark.parametrize("content", ["picture", "clip"])
def test_greedy_ids_are_those_of_generate(internvl, content):
    model, net = internvl
    for seed in HELD_OUT[:8]:
        source = draw(detail_scene(seed))
        if content == "clip":
            clips = sorted((vlmlib.DATA / "videos").glob("*.mp4"))
            source = Video(clips[seed % len(clips)], num_frames=8)
        question = "What happens?" if content == "clip" else "Describe the picture."
        prompt, media = model.chat_prompt([source, question]), model.prepare([source])
        ids = torch.tensor([written_out(model, prompt, media)])
        theirs = net.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.cat([medium.pixels for medium in media]),
            do_sample=False,
            max_new_tokens=100,
        )[0, ids.shape[1] :]
        assert ids_of(model.stream_prompt(prompt, media, GREEDY, trace=0)) == theirs.tolist()


def written_out(model, prompt, media):
    """Prompt ids with one image token for every position of a medium, as transformers wants."""
    ids, placed = model.read(prompt, media)
    lengths = iter([medium.length for medium in placed])
    image = model.config.image_token_id
    return [
        token
        for i in ids
        for token in ([image] * next(lengths) if i == vlmlib.IMAGE_TOKEN_INDEX else [i])
    ]
