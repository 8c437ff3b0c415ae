"""Short clips of coloured shapes: one thing moves, appears, vanishes or turns another colour.

As with scenes, a clip is pure data; frames, questions and answers follow from it, and the seeds
are split in the same way.

    python -m vlmlib.tiny.clips --out data/videos      # draw and encode the example clips
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from .scenes import (
    COLOURS,
    HELD_OUT,
    MAX_THINGS,
    PLACES,
    QA,
    VALIDATION,
    Pair,
    Scene,
    Thing,
    draw,
    random_scene,
    references,
    reserved_keys,
    there_are,
    unreserved,
)

WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # rows, columns
EVENTS = ("move", "appear", "vanish", "turn")
FRAMES, FPS = 16, 8


@dataclass(frozen=True, slots=True)
class Clip:
    """A scene and what becomes of the thing number `index` of it.

    scene   all things, each where it is first seen
    event   one of EVENTS
    detail  for "move" one of WAYS, by one place; for "turn" the new colour
    when    the moment, from 0 to 1, of a sudden event; a move takes the whole clip
    """

    scene: Scene
    event: str
    index: int
    detail: str = ""
    when: float = 0.5

    def __post_init__(self) -> None:
        if self.event not in EVENTS:
            raise ValueError(f"event {self.event!r} is not one of {EVENTS}")
        if self.event in ("appear", "vanish") and len(self.scene.things) < 2:
            raise ValueError("a scene must not be empty before a thing appears or when it is gone")
        if self.event == "turn" and self.detail not in set(COLOURS) - {self.thing.colour}:
            raise ValueError(f"a {self.thing.colour} thing cannot turn {self.detail!r}")
        if self.event == "move" and self.detail not in free_ways(self.scene, self.thing):
            raise ValueError(f"there is no free place {self.detail!r} of the {self.thing.name}")

    @property
    def thing(self) -> Thing:
        """The one that something happens to, as it is first seen."""
        return self.scene.things[self.index]

    @property
    def key(self) -> str:
        """Hash of the content, as `Scene.key`."""
        content = [self.scene.key, self.event, self.index, self.detail]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    @property
    def start(self) -> Scene:
        return self.at(0.0)

    @property
    def end(self) -> Scene:
        """The last frame, with a thing that moved counted to its new place."""
        if self.event != "move":
            return self.at(1.0)
        rows, columns = WAYS[self.detail]
        moved = replace(self.thing, place=self.thing.place + 3 * rows + columns)
        others = [t for i, t in enumerate(self.scene.things) if i != self.index]
        return replace(self.scene, things=tuple(sorted([*others, moved], key=lambda t: t.place)))

    def at(self, moment: float) -> Scene:
        """The scene at a moment from 0 to 1."""
        thing: Thing | None = self.thing
        if self.event == "move":
            rows, columns = WAYS[self.detail]
            x, y = self.thing.shift
            thing = replace(self.thing, shift=(x + columns * moment, y + rows * moment))
        elif self.event == "turn" and moment >= self.when:
            thing = replace(self.thing, colour=self.detail)
        elif (self.event == "appear") == (moment < self.when) and self.event != "turn":
            thing = None
        things = [*self.scene.things]
        things[self.index : self.index + 1] = [] if thing is None else [thing]
        return replace(self.scene, things=tuple(things))

    def to_dict(self) -> dict:
        return asdict(self)


def free_ways(scene: Scene, thing: Thing) -> list[str]:
    """Ways in which the next place is empty."""
    taken = {t.place for t in scene.things}
    ways = []
    for way, (rows, columns) in WAYS.items():
        row, column = thing.row + rows, thing.column + columns
        if 0 <= row < 3 and 0 <= column < 3 and 3 * row + column not in taken:
            ways.append(way)
    return ways


def random_clip(seed: int) -> Clip:
    """The clip of this seed."""
    rng = random.Random(f"clip {seed}")
    while True:
        scene = random_scene(rng.randrange(2**40), label_share=0.0)
        index = rng.randrange(len(scene.things))
        event = rng.choices(EVENTS, weights=(3, 2, 1, 2))[0]
        thing = scene.things[index]
        details = {
            "move": free_ways(scene, thing),
            "turn": [colour for colour in COLOURS if colour != thing.colour],
        }.get(event, [""])
        left = len(scene.things) > 1 or event in ("move", "turn")
        if len(scene.things) < MAX_THINGS and details and left:
            return Clip(scene, event, index, rng.choice(details), rng.uniform(0.3, 0.7))


@cache
def reserved_clips() -> frozenset[str]:
    """Keys of all held-out and validation clips."""
    return frozenset(random_clip(seed).key for seed in (*HELD_OUT, *VALIDATION))


def is_reserved(clip: Clip) -> bool:
    """Whether it is a held-out or validation clip, or begins or ends with such a scene."""
    scenes = {clip.start.key, clip.end.key}
    return clip.key in reserved_clips() or not scenes.isdisjoint(reserved_keys())


def train_clip(index: int) -> Clip:
    """Clip number `index` of the training stream, never one that `is_reserved`."""
    return unreserved(index, random_clip, is_reserved)


def frames(
    clip: Clip, moments: Sequence[float] | None = None, size: int | tuple[int, int] | None = None
) -> list[Image.Image]:
    """A picture for each of the moments from 0 to 1; None stands for FRAMES at equal distances."""
    moments = [i / (FRAMES - 1) for i in range(FRAMES)] if moments is None else moments
    return [draw(clip.at(moment), size) for moment in moments]


# ------------------------------------------------------------------- questions and answers


def ask_clip(clip: Clip, kind: str, rng: random.Random) -> QA | None:
    """A question of this kind with its answer, or None where the clip allows none."""
    if kind not in CLIP_KINDS:
        raise ValueError(f"no question kind {kind!r}; there are {', '.join(CLIP_KINDS)}")
    pair = CLIP_KINDS[kind](clip, rng)
    return QA(kind, *pair) if pair else None


def clip_questions(clip: Clip, rng: random.Random) -> list[QA]:
    """One question of every kind that this clip allows."""
    asked = (ask_clip(clip, kind, rng) for kind in CLIP_KINDS)
    return [qa for qa in asked if qa is not None]


def _ask_happens(clip: Clip, rng: random.Random) -> Pair:
    name = clip.thing.name
    question = rng.choice(("What happens?", "What happens in the video?", "What changes?"))
    return question, {
        "move": f"The {name} moves {clip.detail}.",
        "appear": f"A {name} appears {PLACES[clip.thing.place]}.",
        "vanish": f"The {name} vanishes.",
        "turn": f"The {name} turns {clip.detail}.",
    }[clip.event]


def _ask_way(clip: Clip, rng: random.Random) -> Pair:
    """Asks about the thing that moves, by a description that fits no other."""
    fitting = references(clip.scene, clip.thing)
    if clip.event != "move" or not fitting:
        return None
    the = rng.choice(fitting)
    question = rng.choice((f"Which way does the {the} move?", f"Where does the {the} move?"))
    return question, f"{clip.detail.capitalize()}."


def _ask_which(clip: Clip, rng: random.Random) -> Pair:
    verb = {"move": "moves", "appear": "appears", "vanish": "vanishes", "turn": "changes colour"}
    return f"Which shape {verb[clip.event]}?", f"The {clip.thing.name}."


def _ask_count_at_end(clip: Clip, rng: random.Random) -> Pair:
    form = rng.choice(("How many shapes are there at the end?", "How many shapes are left?"))
    return form, there_are(len(clip.end.things), "shape")


def _ask_count_at_start(clip: Clip, rng: random.Random) -> Pair:
    return "How many shapes are there at the start?", there_are(len(clip.start.things), "shape")


def _ask_where_at_end(clip: Clip, rng: random.Random) -> Pair:
    """Asks about any thing that is there at the start and at the end and keeps its name."""
    places = {t.name: t.place for t in clip.end.things}
    named = [t for t in clip.start.things if t.name in places and references(clip.start, t)]
    named = [t for t in named if len({o.name for o in clip.start.things}) == len(clip.start.things)]
    if not named or clip.event in ("appear", "turn"):
        return None
    thing = clip.thing if clip.thing in named and rng.random() < 0.5 else rng.choice(named)
    the = rng.choice(references(clip.start, thing))
    return f"Where is the {the} at the end?", f"{PLACES[places[thing.name]].capitalize()}."


CLIP_KINDS: dict[str, Callable[[Clip, random.Random], Pair]] = {
    "happens": _ask_happens,
    "way": _ask_way,
    "which": _ask_which,
    "count_at_end": _ask_count_at_end,
    "count_at_start": _ask_count_at_start,
    "where_at_end": _ask_where_at_end,
}


# --------------------------------------------------------------------------- example clips


def example_clips() -> dict[str, Clip]:
    """The clips that come with the repository, by file name."""
    light = ((250, 250, 246),) * 4
    things = (
        Thing("star", "yellow", "large", 0),
        Thing("circle", "red", "large", 3),
        Thing("square", "blue", "small", 8),
    )
    scene = Scene(things, light, size=(224, 224))
    dark = replace(scene, corners=((18, 20, 28), (26, 28, 40), (14, 16, 24), (22, 24, 34)))
    return {
        "circle-moves-right": Clip(scene, "move", 1, "right"),
        "square-appears": Clip(scene, "appear", 2),
        "star-turns-purple": Clip(dark, "turn", 0, "purple"),
        "square-moves-up": Clip(dark, "move", 2, "up"),
    }


def write_video(file: Path | BinaryIO, pictures: Sequence[Image.Image], fps: int = FPS) -> None:
    """Encode pictures as H.264 in an mp4 file. Needs PyAV, as only the making of clips does."""
    import av

    target = str(file) if isinstance(file, Path) else file
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18"})
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            for packet in stream.encode(av.VideoFrame.from_image(picture)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw and encode the example clips.")
    parser.add_argument("--out", type=Path, default=Path("data/videos"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    described = {}
    for name, clip in example_clips().items():
        write_video(options.out / f"{name}.mp4", frames(clip))
        pairs = [asdict(qa) for qa in clip_questions(clip, random.Random(0))]
        described[f"{name}.mp4"] = {"clip": clip.to_dict(), "questions": pairs}
    text = json.dumps(described, indent=1) + "\n"
    (options.out / "clips.json").write_text(text, encoding="utf-8")
    print(f"{len(described)} clips in {options.out}")


if __name__ == "__main__":
    main()
