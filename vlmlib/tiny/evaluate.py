"""Measure a checkpoint on held-out scenes, as a user would run it.

    python -m vlmlib.tiny.evaluate data/checkpoints/tiny-llava --scenes 1000

The saved fp16 weights are loaded in fp32 and asked one question of every kind about every scene,
by transformers' own greedy `generate`. An answer counts if it is the right one letter by letter.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from .scenes import HELD_OUT, KINDS, LABELS, QA, SHAPES, draw, questions, random_scene

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Graded:
    """A question with the answer a model gave."""

    scene: int
    qa: QA
    given: str

    @property
    def right(self) -> bool:
        return self.given == self.qa.answer


def prompt_of(question: str) -> str:
    """A first question in LLaVA's chat format."""
    return f"USER: <image>\n{question} ASSISTANT:"


@torch.inference_mode()
def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pictures: Sequence[Image.Image],
    asked: Sequence[str],
) -> list[str]:
    """Greedy answers to one question about each picture, in one padded batch."""
    inputs = processor(
        images=list(pictures),
        text=[prompt_of(question) for question in asked],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=128)
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def grade(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    seeds: Sequence[int],
    batch_size: int = 64,
    pixels: int = 112,
    progress: Progress | None = None,
) -> list[Graded]:
    """Ask one question of every kind about the scene of every seed.

    Questions go in order of their kind, so that a batch holds answers of like length.
    """
    work = sorted(_all_questions(seeds), key=lambda item: list(KINDS).index(item[1].kind))
    graded: list[Graded] = []
    for start in range(0, len(work), batch_size):
        batch = work[start : start + batch_size]
        pictures = [draw(random_scene(seed), pixels) for seed, _ in batch]
        given = answer(model, processor, pictures, [qa.question for _, qa in batch])
        graded += [Graded(s, qa, g) for (s, qa), g in zip(batch, given, strict=True)]
        if progress:
            progress(len(graded), len(work))
    return graded


def _all_questions(seeds: Sequence[int]) -> Iterator[tuple[int, QA]]:
    for seed in seeds:
        for qa in questions(random_scene(seed), random.Random(seed)):
            yield seed, qa


def by_kind(graded: Sequence[Graded]) -> dict[str, dict[str, float]]:
    """Number asked and share right of every kind."""
    table = {}
    for kind in KINDS:
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
    """All numbers of a measurement, ready for JSON."""
    asked = [g for g in graded if g.qa.kind != "caption"]
    captions = [g for g in graded if g.qa.kind == "caption"]
    return {
        "scenes": len({g.scene for g in graded}),
        "captions_exact": sum(g.right for g in captions) / len(captions),
        "objects_right": objects_right(graded),
        "questions_right": sum(g.right for g in asked) / len(asked),
        "kinds": by_kind(graded),
        "mistakes": [
            {"seed": g.scene, "question": g.qa.question, "right": g.qa.answer, "given": g.given}
            for g in graded
            if not g.right
        ][:20],
    }


def table(numbers: dict) -> str:
    """A Markdown table with one row for every kind of question."""
    rows = ["| kind | asked | right |", "|---|---:|---:|"]
    for kind, row in numbers["kinds"].items():
        rows.append(f"| {kind} | {row['n']:,} | {row['right']:.1%} |")
    rows.append(f"| all but captions | | {numbers['questions_right']:.1%} |")
    rows.append(f"| things in captions | | {numbers['objects_right']:.1%} |")
    return "\n".join(rows)


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# tiny-llava

A LLaVA-1.5 of {parameters:.1f} million parameters that describes drawn scenes of coloured shapes
and answers questions about them. It exists for learning: small enough to be trained, taken apart
and run on a laptop, and built like the large one, `LlavaForConditionalGeneration` throughout.

```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("{folder}", dtype="float32")
processor = AutoProcessor.from_pretrained("{folder}")
prompt = "USER: <image>\\nWhat is left of the red circle? ASSISTANT:"
inputs = processor(images=picture, text=prompt, return_tensors="pt")
print(processor.decode(model.generate(**inputs)[0], skip_special_tokens=True))
```

| part | size |
|---|---|
{sizes}

The tower's last layer adds nothing: LLaVA reads the layer before it, so it was never trained and
is stored as zeros where it would write.

## Training

{training}

Training scenes and the scenes measured below come from different seeds, and a scene with the same
things at the same places as a measured one is left out of training.

## Measured

`{command}`: {scenes:,} held-out scenes, one question of every kind that a scene allows,
pictures of {pixels} x {pixels} pixels, fp16 weights run in fp32, greedy decoding. An answer
counts if it is right letter by letter.

{table}

## What it cannot do

It knows nothing but these scenes: one to five shapes ({shapes}) in six colours and two sizes on a
grid of three by three places, on a plain light or dark background, a large one sometimes with one
of the characters {labels}. On photographs, on other drawings, on two pictures at once or on
questions of another kind it answers in the same words and is wrong. "Left of" and "right of" mean
the same row, "above" and "below" the same column.

Licence: Apache-2.0, weights and pictures alike. All training data were drawn by
`vlmlib/tiny/scenes.py`.
"""


def model_card(
    folder: Path, model: LlavaForConditionalGeneration, numbers: dict, command: str, pixels: int
) -> str:
    """The README of a checkpoint; every number in it is computed."""
    return CARD.format(
        folder=folder.as_posix(),
        parameters=model.num_parameters() / 1e6,
        sizes=_sizes(folder, model),
        training=_training(folder / "training_log.jsonl"),
        command=command,
        scenes=numbers["scenes"],
        pixels=pixels,
        table=table(numbers),
        shapes=", ".join(SHAPES),
        labels=" ".join(LABELS),
    )


def _sizes(folder: Path, model: LlavaForConditionalGeneration) -> str:
    vision, text = model.config.vision_config, model.config.text_config
    size = sum(file.stat().st_size for file in folder.glob("*") if file.name != "README.md")
    rows = {
        "picture": f"{vision.image_size} px in patches of {vision.patch_size}: "
        f"{model.config.image_seq_length} tokens",
        "CLIP tower": f"{vision.num_hidden_layers} layers of width {vision.hidden_size}, "
        f"feature layer {model.config.vision_feature_layer} without CLS",
        "projector": f"{vision.hidden_size} -> {text.hidden_size} -> {text.hidden_size}, GELU",
        "Llama": f"{text.num_hidden_layers} layers of width {text.hidden_size}, "
        f"{text.vocab_size} tokens, up to {text.max_position_embeddings:,} positions",
        "folder": f"{size / 1e6:.1f} MB, weights in fp16",
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
    commands = "\n".join(
        f"python -m vlmlib.tiny.train --out DIR --steps {entry['recipe']['steps']}"
        + (f" --resume  # from step {entry['start']:,}" if entry["start"] else "")
        for entry in starts
    )
    return (
        f"From scratch, in {_seconds(entries) / 60:.0f} minutes on "
        f"{starts[-1]['machine']}:\n\n```\n{commands}\n```\n\n"
        f"{losses[-1]['step']:,} steps of {recipe['batch_size']} pictures, drawn on the fly. In "
        f"the first {recipe['look_steps']:,} steps the tower learnt alone to name shape, colour, "
        f"size and label of every patch; then all parts learnt from about {asked} "
        f"questions about each picture. Loss per answer token: {losses[0]['loss']:.2f} when that "
        f"began, {losses[-1]['loss']:.4f} at the end.{_reweighted(starts)}"
    )


def _reweighted(starts: Sequence[dict]) -> str:
    """A sentence about where a run was resumed with other question weights."""
    steps = [f"{b['start']:,}" for a, b in pairwise(starts) if a["weights"] != b["weights"]]
    if not steps:
        return ""
    return (
        f" Kinds of question that lagged were asked more often from step {', '.join(steps)} on; "
        "the log has the weights."
    )


def _seconds(entries: Sequence[dict]) -> float:
    """Time of all parts of a run: each counts its own seconds from 0."""
    total = last = 0.0
    for entry in [*entries, {"start": None}]:
        if "start" in entry:
            total, last = total + last, 0.0
        last = entry.get("seconds", last)
    return total


def load(folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The saved model in fp32, and its processor."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    if options.seed + options.scenes > len(HELD_OUT):
        raise SystemExit(f"only the seeds below {len(HELD_OUT)} are held out")
    model, processor = load(options.checkpoint)
    began = time.monotonic()

    def progress(done: int, total: int) -> None:
        left = (time.monotonic() - began) * (total - done) / done
        print(f"\r{done:,} of {total:,} questions, {left:.0f} s left ", end="", flush=True)

    seeds = range(options.seed, options.seed + options.scenes)
    graded = grade(model, processor, seeds, pixels=options.pixels, progress=progress)
    numbers = summary(graded)
    print(f"\n\n{table(numbers)}")
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    command = (
        f"python -m vlmlib.tiny.evaluate {options.checkpoint} "
        f"--scenes {options.scenes} --seed {options.seed} --pixels {options.pixels}"
    )
    card = model_card(options.checkpoint, model, numbers, command, options.pixels)
    (options.checkpoint / "README.md").write_text(card, encoding="utf-8")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure a checkpoint on held-out scenes and write its model card."
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scenes", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0, help="first held-out seed")
    parser.add_argument("--pixels", type=int, default=112, help="side of the drawn pictures")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
