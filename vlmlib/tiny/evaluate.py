"""Measure checkpoints on held-out scenes and clips, as a user would run it.

    python -m vlmlib.tiny.evaluate data/checkpoints/tiny-llava --scenes 1000
    python -m vlmlib.tiny.evaluate data/checkpoints/tiny-* --save data/evaluation
    python -m vlmlib.tiny.evaluate data/checkpoints/tiny-llava --scenes 100 --formats

The saved fp16 weights are loaded in fp32 by `vlmlib.load` and asked one question of every kind
about every picture or clip, greedily. An answer counts if it is the right one letter by letter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .. import microscope
from ..budget import image_tokens
from ..images import ImageSource
from ..loading import load
from ..media import Video
from ..model import VisionLanguageModel
from ..quant import quantize_llm
from ..sampling import GenParams
from .clips import CLIP_KINDS, clip_questions, frames, random_clip, write_video
from .data import FRAMES, MIXES, Writer
from .model import parts
from .recipe import RECIPES
from .scenes import (
    HELD_OUT,
    KINDS,
    LABELS,
    PRINTS,
    QA,
    SHAPES,
    WORDS,
    detail_scene,
    draw,
    outline,
    questions,
    random_scene,
    train_scene,
)

GREEDY = GenParams.greedy(n_predict=128)
PRINT_KINDS = ("read_print", "find_print")
LOOKED_AT = 200
"""The first of the pictures, for which the attention is looked at."""

Progress = Callable[[int, int], None]
Change = Callable[[ImageSource], ImageSource]


@dataclass(frozen=True, slots=True)
class Graded:
    """A question with the answer a model gave, and its share of the time that took, in seconds."""

    scene: int
    qa: QA
    given: str
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        return self.given == self.qa.answer


def case(content: str, seed: int, pixels: int = 112) -> tuple[ImageSource | Video, list[QA]]:
    """The picture or clip of a seed and what is asked about it. `content` is "scene", "print"
    (pictures have their own sizes, and only the print is asked for), "clip" or "mp4": the same
    clips as files.
    """
    rng = random.Random(seed)
    if content in ("clip", "mp4"):
        clip = random_clip(seed)
        pictures = frames(clip, size=pixels)
        source = mp4(pictures) if content == "mp4" else pictures
        return Video(source, num_frames=FRAMES), clip_questions(clip, rng)
    if content == "print":
        scene = detail_scene(seed)
        return draw(scene), [qa for qa in questions(scene, rng) if qa.kind in PRINT_KINDS]
    scene = random_scene(seed)
    return draw(scene, pixels), questions(scene, rng)


def mp4(pictures: Sequence[Image.Image]) -> bytes:
    """The bytes of a video file."""
    file = BytesIO()
    write_video(file, pictures)
    return file.getvalue()


def ask_all(
    model: VisionLanguageModel, source: ImageSource | Video, asked: Sequence[str]
) -> list[str]:
    """Greedy answers to questions about one picture or clip, each asked as the first one. They
    share a cache, so the picture is read once.
    """
    media = model.prepare([source])
    cache, answers = model.new_cache(), []
    for question in asked:
        *_, last = model.stream_prompt(
            model.chat_prompt([source, question]),
            media,
            GREEDY,
            start_pos=len(cache),
            chunk_prefilling=True,
            cache=cache,
            stream_interval=GREEDY.n_predict,
            lstrip=True,
        )
        answers.append(last["text"])
    return answers


def grade(
    model: VisionLanguageModel,
    content: str,
    seeds: Sequence[int],
    pixels: int = 112,
    change: Change | None = None,
    progress: Progress | None = None,
) -> list[Graded]:
    """Ask one question of every kind about the picture or clip of every seed, see `case`; `change`
    is done to each of them before.
    """
    graded: list[Graded] = []
    for done, seed in enumerate(seeds, start=1):
        source, asked = case(content, seed, pixels)
        began = time.perf_counter()
        source = change(source) if change else source
        given = ask_all(model, source, [qa.question for qa in asked])
        share = (time.perf_counter() - began) / max(1, len(asked))
        graded += [Graded(seed, qa, text, share) for qa, text in zip(asked, given, strict=True)]
        if progress:
            progress(done, len(seeds))
    return graded


def without_detail(picture: Image.Image, pixels: int = 112) -> Image.Image:
    """The picture as sharp as in one view whose longer side has so many pixels, in its old size: it
    becomes as many tiles as before, and they show no more than that view.
    """
    width, height = picture.size
    scale = pixels / max(width, height)
    small = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    return small.resize((width, height), Image.Resampling.BICUBIC)


def attention_hits(model: VisionLanguageModel, seeds: Sequence[int]) -> tuple[list[float], int]:
    """For each layer: how often its attention, mean of all heads, peaks on the right thing when
    the model is about to say what is printed on it. The words before are those of the right answer.

    Also returns for how many pictures: not of every one can that be asked.
    """
    hits, writer = [], Writer(model)
    for seed in seeds:
        scene = detail_scene(seed)
        picture, asked = case("print", seed)
        for qa in (qa for qa in asked if qa.kind == "read_print"):
            words, printed = qa.answer.rstrip(".").rsplit(" ", 1)
            (thing,) = (thing for thing in scene.things if thing.print == printed)
            prompt, media = model.chat_prompt([picture, qa.question]), model.prepare([picture])
            said = model.tokenizer.encode(writer.gap + words, add_special_tokens=False)
            weights = microscope.attention(model, prompt, media, said).mean(dim=1)
            seen = microscope.picture_weights(model, prompt, media, weights)
            boxes = torch.cat([model.boxes(m) for m in media])
            x, y, radius = outline(thing, *picture.size)
            peaks = [peak(row, boxes, *picture.size) for row in torch.cat(seen, dim=-1)]
            hits.append([(px - x) ** 2 + (py - y) ** 2 <= radius**2 for px, py in peaks])
    return torch.tensor(hits, dtype=torch.float).mean(dim=0).tolist() if hits else [], len(hits)


def peak(weights: Tensor, boxes: Tensor, width: int, height: int) -> tuple[int, int]:
    """(x, y) of the pixel where the heat map of some weights is highest."""
    highest = int(microscope.heat_map(weights, boxes, width, height).argmax())
    return highest % width, highest // width


def by_kind(graded: Sequence[Graded]) -> dict[str, dict[str, float]]:
    """Number asked and share right of every kind."""
    table = {}
    for kind in (*KINDS, *CLIP_KINDS):
        right = [g.right for g in graded if g.qa.kind == kind]
        if right:
            table[kind] = {"n": len(right), "right": sum(right) / len(right)}
    return table


def objects_right(graded: Sequence[Graded]) -> float:
    """Share of the things in all captions that the given caption names, at their place."""
    named = total = 0
    for g in graded:
        if g.qa.kind == "caption":
            wanted, given = (set(_things_of(text)) for text in (g.qa.answer, g.given))
            named += len(wanted & given)
            total += len(wanted)
    return named / total if total else float("nan")


def _things_of(caption: str) -> list[str]:
    """`A large red circle in the middle and a ...` -> each thing with its place."""
    return re.split(r",? (?:and )?an? ", " " + caption.strip(" .").replace("A ", "a ", 1))[1:]


def summary(graded: Sequence[Graded]) -> dict:
    """All numbers of one content, ready for JSON."""
    asked = [g for g in graded if g.qa.kind != "caption"]
    captions = [g for g in graded if g.qa.kind == "caption"]
    shown = len({g.scene for g in graded})
    numbers = {
        "shown": shown,
        "seconds": sum(g.seconds for g in graded) / shown,
        "questions_right": sum(g.right for g in asked) / len(asked),
        "kinds": by_kind(graded),
        "mistakes": [
            {"seed": g.scene, "question": g.qa.question, "right": g.qa.answer, "given": g.given}
            for g in graded
            if not g.right
        ][:20],
    }
    if captions:
        numbers["captions_exact"] = sum(g.right for g in captions) / len(captions)
        numbers["objects_right"] = objects_right(graded)
    return numbers


def measure(
    model: VisionLanguageModel,
    contents: Sequence[str],
    seeds: Sequence[int],
    pixels: int = 112,
    progress: Progress | None = None,
) -> dict:
    """`summary` of each content, with visual tokens and seconds for each picture; for small print
    also without the detail that shows it, and where the attention was.
    """
    numbers = {}
    for content in contents:
        numbers[content] = summary(grade(model, content, seeds, pixels, progress=progress))
        tokens = [visual_tokens(model, content, seed, pixels) for seed in seeds]
        mean = sum(tokens) / len(tokens)
        numbers[content]["tokens"] = {"min": min(tokens), "mean": mean, "max": max(tokens)}
    if "print" in numbers:
        numbers["print"]["chance"] = chance(seeds)
        if is_tiled(model, seeds[0]):
            coarse = grade(model, "print", seeds, change=without_detail, progress=progress)
            numbers["print"]["without_detail"] = by_kind(coarse)
        hits, pictures = attention_hits(model, seeds[:LOOKED_AT])
        numbers["print"] |= {"attention_hits": hits, "attention_pictures": pictures}
    return numbers


def weight_formats(
    checkpoint: str | Path, group_size: int = 32, prompts: int = 16
) -> Iterator[tuple[str, VisionLanguageModel]]:
    """A checkpoint in 32, 16 and 4 bits a weight of its language model, one after the other, on the
    CPU; the last one searched for on some questions about training scenes.
    """
    yield "float32", load(checkpoint, device="cpu", dtype=torch.float32)
    model = load(checkpoint, device="cpu", dtype=torch.bfloat16)
    yield "bfloat16", model
    yield "int4, rounded", quantize_llm(model, group_size=group_size)
    calibration = []
    for index in range(prompts):
        scene = train_scene(index)
        asked = questions(scene, random.Random(index))
        calibration.append([draw(scene), asked[index % len(asked)].question])
    searched = quantize_llm(model, group_size=group_size, calibration=calibration)
    yield "int4, searched", searched


def visual_tokens(model: VisionLanguageModel, content: str, seed: int, pixels: int = 112) -> int:
    """Positions that the picture or clip of a seed takes."""
    source, _ = case(content, seed, pixels)
    if isinstance(source, Video):
        return sum(m.length for m in model.prepare([source]))
    return image_tokens(model, *source.size)


def is_tiled(model: VisionLanguageModel, seed: int) -> bool:
    """Whether the model looks at the picture with small print of this seed in several tiles."""
    return len(model.prepare([case("print", seed)[0]])[0].pixels) > 1


def chance(seeds: Sequence[int]) -> dict[str, float]:
    """How often those are right who see all but what the print says: who guess one of all words or
    of all numbers, or one of the things that carry a word or a number, whichever it is.
    """
    shares: dict[str, list[float]] = {kind: [] for kind in PRINT_KINDS}
    for seed in seeds:
        printed = [thing.print for thing in detail_scene(seed).things if thing.print]
        for qa in case("print", seed)[1]:
            is_word = " word " in (qa.answer if qa.kind == "read_print" else qa.question)
            pool = PRINTS if qa.kind == "read_print" else printed
            shares[qa.kind].append(1 / sum((text in WORDS) == is_word for text in pool))
    return {kind: sum(values) / len(values) for kind, values in shares.items() if values}


TITLES = {
    "scene": "Scenes",
    "print": "Small print",
    "clip": "Clips",
    "mp4": "The same clips as H.264 files",
}


def table(models: dict[str, dict]) -> str:
    """Markdown: a row for everything that `measure` says, a column for every model."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for name, numbers in models.items():
        for content, part in numbers.items():
            for what, asked, value in _rows(TITLES[content], part):
                rows.setdefault((what, asked), {})[name] = value
    lines = [f"| | asked | {' | '.join(models)} |", f"|---|---:|{'---:|' * len(models)}"]
    for (what, asked), row in rows.items():
        cells = " | ".join(row.get(name, "") for name in models)
        lines.append(f"| {what} | {asked} | {cells} |")
    return "\n".join(lines)


def _rows(title: str, part: dict) -> Iterator[tuple[str, str, str]]:
    """(what, how often asked, value) of one content of one model."""
    low, high = part["tokens"]["min"], part["tokens"]["max"]
    tokens = f"{low}" if low == high else f"{low} to {high}"
    yield f"**{title}**, {part['shown']:,}: visual tokens of each", "", tokens
    yield f"{title}: seconds for each with all questions", "", f"{part['seconds']:.2f}"
    for kind, row in part["kinds"].items():
        yield f"{title}: {kind}", f"{row['n']:,}", f"{row['right']:.1%}"
    if len(part["kinds"]) > 1:
        yield f"{title}: all but captions", "", f"{part['questions_right']:.1%}"
    if "objects_right" in part:
        yield f"{title}: things in captions", "", f"{part['objects_right']:.1%}"
    for kind, row in part.get("without_detail", {}).items():
        yield f"{title}: {kind}, without detail", f"{row['n']:,}", f"{row['right']:.1%}"
    for kind, share in part.get("chance", {}).items():
        yield f"{title}: {kind}, by chance", "", f"{share:.1%}"


ABLATION = """
"Without detail": the picture is first made as small as one view of the whole and then enlarged
again, so that there are as many tiles and visual tokens as before, but nothing more to be seen in
them. What is lost is what the tiles are for.
"""

LOOKED = """
When the model is about to say what is printed on a shape, the attention of its layers, mean of all
heads, peaks on that very shape in {hits} of {pictures} pictures (first layer to last).
"""

FAMILIES = {"llava": "LLaVA-1.5", "nvila": "NVILA", "internvl": "InternVL3"}

TOWERS = {"llava": "CLIP tower", "nvila": "SigLIP tower", "internvl": "InternVL's tower"}

KNOWS = {
    "scene": "one to five shapes ({shapes}) in six colours and two sizes on a grid of three by "
    "three places, on a plain light or dark background, a large one sometimes with one of the "
    "characters {labels}",
    "print": "large shapes with a word of three letters or a number of three digits in small print",
    "clip": "clips in which one shape moves, appears, vanishes or turns another colour",
}

CARD = """---
license: apache-2.0
{library}pipeline_tag: image-text-to-text
---

# {name}

{article} {family} of {parameters:.1f} million parameters that describes drawn scenes of coloured
shapes and answers questions about them. It exists for learning: small enough to be trained, taken
apart and run on a laptop, and built like the large one.

```python
import vlmlib

model = vlmlib.load("{folder}")
print(vlmlib.answer(model, [picture, "What is left of the red circle?"]))
```
{transformers}
| part | size |
|---|---|
{sizes}
{unread}
## Training

{training}

Training data and what is measured below come from different seeds, and content with the same
things at the same places as measured content is left out of training: {reserved}.

## Measured

`{command}`: held-out seeds, one question of every kind that a picture or clip allows, plain scenes
and clips of {pixels} x {pixels} pixels, fp16 weights run in fp32, greedy decoding, the questions
about a picture one after the other on one cache. An answer counts if it is right letter by letter.
Seconds are those of {machine}.

{table}
{notes}
## What it cannot do

It knows nothing but these scenes: {knows}. On photographs, on other drawings, on two pictures at
once or on questions of another kind it answers in the same words and is wrong. "Left of" and
"right of" mean the same row, "above" and "below" the same column.

Licence: Apache-2.0, weights and pictures alike. All training data were drawn by `vlmlib.tiny`.
"""

TRANSFORMERS = """
transformers loads it too, as `{class_name}`.
"""

UNREAD = """
The tower's last layer adds nothing: the layer before it is read, so it was never trained and is
stored as zeros where it would write.
"""


def model_card(
    folder: Path, model: VisionLanguageModel, numbers: dict, command: str, pixels: int
) -> str:
    """The README of a checkpoint; every number in it is computed."""
    native = model.family != "nvila"
    small_print = numbers.get("print", {})
    hits = small_print.get("attention_hits")
    tiled = "without_detail" in small_print
    known = [content for content in numbers if content in KNOWS and (content != "print" or tiled)]
    notes = ABLATION if tiled else ""
    if hits:
        shares = ", ".join(f"{h:.0%}" for h in hits)
        notes += LOOKED.format(hits=shares, pictures=small_print["attention_pictures"])
    reserved = "scenes, with small print and without"
    if "clip" in numbers:
        reserved += ", also where a clip begins or ends, and clips"
    return CARD.format(
        name=folder.name,
        folder=folder.as_posix(),
        library="library_name: transformers\n" if native else "",
        article="An" if FAMILIES[model.family][0] in "IN" else "A",
        family=FAMILIES[model.family],
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        transformers=TRANSFORMERS.format(class_name=type(model.net).__name__) if native else "",
        sizes=_sizes(folder, model),
        unread="" if model.family == "internvl" else UNREAD,
        training=_training(folder / "training_log.jsonl"),
        reserved=reserved,
        command=command,
        pixels=pixels,
        machine=machine(torch.get_num_threads()),
        table=table({folder.name: numbers}),
        notes=notes,
        knows="; ".join(KNOWS[content] for content in known).format(
            shapes=", ".join(SHAPES), labels=" ".join(LABELS)
        ),
    )


def _sizes(folder: Path, model: VisionLanguageModel) -> str:
    """Rows of a Markdown table: what the parts are."""
    learnt = parts(model)
    vision, text = learnt["tower"].config, learnt["language"].config
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != "README.md"]
    shapes = [p.shape for p in learnt["projector"].parameters() if p.dim() == 2]
    widths = " -> ".join(str(n) for n in (shapes[0][1], *(shape[0] for shape in shapes)))
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    rows = {
        "tile": f"{model.image_processor.crop_height} px in patches of {patch}",
        "visual tokens": ", ".join(
            f"{image_tokens(model, side, side)} of a picture of {side} px" for side in (112, 336)
        ),
        TOWERS[model.family]: f"{vision.num_hidden_layers} layers of width {vision.hidden_size}",
        "projector": f"{widths}, GELU",
        text.model_type.capitalize(): f"{text.num_hidden_layers} layers of width "
        f"{text.hidden_size}, {text.vocab_size} tokens, up to "
        f"{text.max_position_embeddings:,} positions",
        "folder": f"{sum(f.stat().st_size for f in files) / 1e6:.1f} MB, weights in fp16",
    }
    return "\n".join(f"| {part} | {what} |" for part, what in rows.items())


def _training(log: Path) -> str:
    """What the training log says about the run and its parts."""
    if not log.exists():
        return "No training log came with this checkpoint."
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    starts = [entry for entry in entries if "start" in entry]
    losses = [entry for entry in entries if "loss" in entry]
    recipe = starts[-1]["recipe"]
    asked = " and then ".join(dict.fromkeys(str(entry["recipe"]["asked"]) for entry in starts))
    commands = "\n".join(map(_command, starts))
    looking = (
        f"In the first {recipe['look_steps']:,} steps the tower learnt alone to name shape, "
        "colour, size and print of every patch; then all parts"
        if recipe["look_steps"]
        else "The tower learnt to name shape, colour, size and print of every patch while all parts"
    )
    return (
        f"{_origin(starts)}, in {_seconds(entries) / 60:.0f} minutes on "
        f"{starts[-1]['machine']}:\n\n```\n{commands}\n```\n\n"
        f"{losses[-1]['step']:,} steps of {recipe['batch_size']} pictures or clips, drawn on the "
        f"fly. {looking} learnt from about {asked} questions about each picture. Loss per answer "
        f"token: {losses[0]['loss']:.2f} when that began, {losses[-1]['loss']:.4f} at the "
        f"end.{_reweighted(starts)}"
    )


def _command(start: dict) -> str:
    """What a part of the run was begun with, by its entry in the log."""
    recipe = start["recipe"]
    model = recipe.get("model", "tiny-llava")
    usual = asdict(RECIPES[model]) | {"steps": None}  # always told: a resumed run has its own
    changes = {name: recipe[name] for name in usual if recipe.get(name, usual[name]) != usual[name]}
    numbers = "".join(f" --{name.replace('_', '-')} {value}" for name, value in changes.items())
    return (
        f"python -m vlmlib.tiny.train --model {model} --out DIR{numbers}"
        + (f" --start {start['started_from']}" if start.get("started_from") else "")
        + " --compile" * start.get("compile", False)
        + (f" --resume  # from step {start['start']:,}" if start["start"] else "")
    )


def _origin(starts: Sequence[dict]) -> str:
    began_with = starts[0].get("started_from")
    return f"Begun with the weights of `{began_with}`" if began_with else "From scratch"


def _reweighted(starts: Sequence[dict]) -> str:
    """A sentence about where a run was resumed with another mix of questions."""
    steps = [f"{b['start']:,}" for a, b in pairwise(starts) if a["mix"] != b["mix"]]
    if not steps:
        return ""
    return (
        f" What was asked, and how often, changed at step {', '.join(steps)}, towards what lagged; "
        "the log has the numbers."
    )


def _seconds(entries: Sequence[dict]) -> float:
    """Time of all parts of a run: each counts its own seconds from 0."""
    total = last = 0.0
    for entry in [*entries, {"start": None}]:
        if "start" in entry:
            total, last = total + last, 0.0
        last = entry.get("seconds", last)
    return total


def machine(threads: int) -> str:
    """One line about where something was run."""
    return f"{platform.machine()}, {threads} of {os.cpu_count()} cores, torch {torch.__version__}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    if options.scenes < 1 or options.seed not in HELD_OUT or _seeds(options)[-1] not in HELD_OUT:
        raise SystemExit(f"only the seeds from 0 to {len(HELD_OUT) - 1} are held out")
    names = [folder.name for folder in options.checkpoint]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SystemExit(f"two folders have the name {', '.join(twice)}: measure them one by one")
    everything = _measured_before(options.save) if options.save else {}
    for folder in options.checkpoint:
        if options.formats:
            formats = _measure_formats(folder, options)
            print(f"{table(formats)}\n")
            everything |= formats
        else:
            everything[folder.name] = _measure_and_write_card(folder, options)
    if options.save:
        _save(everything, options.save)


def _measured_before(folder: Path) -> dict[str, dict]:
    """The numbers of models that were measured earlier."""
    file = folder / "evaluation.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as e:
        raise SystemExit(f"{file} is no JSON ({e}): move it away, or --save elsewhere") from e


def _save(everything: dict[str, dict], folder: Path) -> None:
    """Write the numbers, their table and the figure."""
    from ..figures import accuracy, png_of  # Matplotlib, which training need not load

    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / "evaluation.staging"
    staging.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    staging.replace(folder / "evaluation.json")
    (folder / "evaluation.md").write_text(table(everything) + "\n", encoding="utf-8")
    if any("print" in numbers for numbers in everything.values()):
        (folder / "small-print.png").write_bytes(png_of(accuracy(everything)))


def _measure_and_write_card(folder: Path, options: argparse.Namespace) -> dict:
    model = load(folder, device="cpu", dtype=torch.float32)
    contents = _contents(model, options)
    began = time.monotonic()

    def progress(done: int, total: int) -> None:
        seconds = time.monotonic() - began
        words = f"{folder.name}: {done:,} of {total:,} pictures or clips, {seconds:.0f} s "
        if done % 20 == 0 or done == total:
            print(f"\r{words}", end="", flush=True)

    numbers = measure(model, contents, _seeds(options), options.pixels, progress)
    print(f"\n\n{table({folder.name: numbers})}\n")
    command = (
        f"python -m vlmlib.tiny.evaluate {folder.as_posix()} "
        f"--scenes {options.scenes} --seed {options.seed} --pixels {options.pixels}"
    )
    card = model_card(folder, model, numbers, command, options.pixels)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return numbers


def _measure_formats(folder: Path, options: argparse.Namespace) -> dict[str, dict]:
    return {
        f"{folder.name}, {name}": measure(
            model, _contents(model, options), _seeds(options), options.pixels
        )
        for name, model in weight_formats(folder)
    }


def _contents(model: VisionLanguageModel, options: argparse.Namespace) -> list[str]:
    learnt = list(MIXES[model.family])
    return options.content or learnt + ["mp4"] * ("clip" in learnt)


def _seeds(options: argparse.Namespace) -> range:
    return range(options.seed, options.seed + options.scenes)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure checkpoints on held-out scenes and clips and write their model cards."
    )
    parser.add_argument("checkpoint", type=Path, nargs="+")
    parser.add_argument("--scenes", type=int, default=1_000, help="how many of each content")
    parser.add_argument("--seed", type=int, default=0, help="first held-out seed")
    parser.add_argument("--pixels", type=int, default=112, help="side of plain scenes and clips")
    parser.add_argument(
        "--content", choices=tuple(TITLES), action="append", help="default: what it learnt from"
    )
    parser.add_argument(
        "--formats", action="store_true", help="compare 32, 16 and 4 bits a weight; no card"
    )
    parser.add_argument("--save", type=Path, help="folder for the table, a figure and the numbers")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
