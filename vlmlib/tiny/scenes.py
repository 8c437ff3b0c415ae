"""Scenes of coloured shapes: make them, draw them at any size, ask about them.

A scene is pure data and every picture, question and answer follows from it, so that each answer is
right by construction. Nothing here reads or changes global state: the same seed gives the same
scene, the same picture and the same questions on every machine.

Seeds are split once and for all: `HELD_OUT` for the reported numbers, `VALIDATION` for looking at
progress, `train_scene` for everything that a model learns from. `train_scene` also skips every
scene whose content (`Scene.key`) occurs in the two other sets.

    python -m vlmlib.tiny.scenes --out data/images      # draw the example pictures
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (216, 40, 40),
    "orange": (246, 140, 28),
    "yellow": (250, 222, 50),
    "green": (44, 160, 70),
    "blue": (44, 96, 220),
    "purple": (150, 64, 184),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond")
RADII = {"small": 0.24, "large": 0.44}  # fractions of the width of a place
LABELS = "ACEHJKLMPTUX24579"  # no two look alike at twelve pixels
PLACES = (
    "at the top left",
    "at the top middle",
    "at the top right",
    "at the middle left",
    "in the middle",
    "at the middle right",
    "at the bottom left",
    "at the bottom middle",
    "at the bottom right",
)
WORDS = (
    "ACE", "AGE", "AIR", "ANT", "APE", "ARM", "ART", "ASH", "AXE", "BAG", "BAR", "BAT", "BEE",
    "BOW", "BOX", "BOY", "BUD", "BUG", "BUS", "CAB", "CAP", "CAR", "CAT", "COB", "COD", "COT",
    "COW", "CUB", "CUP", "DAY", "DEN", "DEW", "DOG", "DOT", "EAR", "EEL", "EGG", "ELF", "ELK",
    "EYE", "FAN", "FIG", "FIN", "FIR", "FLY", "FOG", "FOX", "FUR", "GAP", "GEM", "GUM", "HAM",
    "HAT", "HAY", "HEN", "HIP", "HUT", "ICE", "INK", "INN", "IVY", "JAM", "JAR", "JAW", "JET",
    "JOB", "JOY", "JUG", "KEY", "KID", "KIT", "LAB", "LEG", "LID", "LIP", "LOG", "MAN", "MAP",
    "MAT", "MIX", "MOB", "MUD", "MUG", "NET", "NUT", "OAK", "OAR", "OAT", "OIL", "OWL", "PAN",
    "PAW", "PEA", "PEN", "PET", "PIE", "PIG", "PIN", "PIT", "POT", "PUP", "RAM", "RAT", "RAY",
    "RIB", "ROD", "ROW", "RUG", "RYE", "SAP", "SAW", "SEA", "SKY", "SPY", "SUN", "TAG", "TAP",
    "TAR", "TEA", "TEN", "TIE", "TIN", "TIP", "TOE", "TOP", "TOY", "TUB", "URN", "VAN", "VET",
    "WAX", "WEB", "WIG", "WOK", "YAK", "YAM", "ZIP", "ZOO",
)  # fmt: skip
DIGITS = "0124579"  # nor these at eleven; 3, 6 and 8 do
PRINTS = WORDS + tuple(a + b + c for a in DIGITS[1:] for b in DIGITS for c in DIGITS)
PRINT_HEIGHT = 11 / 336  # font size, as a fraction of the longer side of a large picture
NUMBERS = ("no", "one", "two", "three", "four", "five")
MAX_THINGS = 5


Content = TypeVar("Content")

HELD_OUT = range(2_000)
VALIDATION = range(1_000_000, 1_000_500)
TRAIN_START = 10_000_000


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape. `place` counts 0..8 in reading order; `shift` is in widths of a place.

    On a large shape there may be a `label`, one of LABELS as large as fits, or a `print`, one of
    PRINTS in a size that is lost where the whole picture is squeezed into 112 pixels.
    """

    shape: str
    colour: str
    size: str
    place: int
    label: str = ""
    shift: tuple[float, float] = (0.0, 0.0)
    scale: float = 1.0
    angle: float = 0.0
    tint: tuple[int, int, int] = (0, 0, 0)
    print: str = ""

    def __post_init__(self) -> None:
        if self.shape not in SHAPES or self.colour not in COLOURS or self.size not in RADII:
            raise ValueError(f"no such thing: {self.size} {self.colour} {self.shape}")
        if not 0 <= self.place < len(PLACES):
            raise ValueError(f"place {self.place} is not one of 0..{len(PLACES) - 1}")
        if self.label and (self.label not in set(LABELS) or self.size != "large"):
            raise ValueError(f"label {self.label!r} needs a large shape and one of {LABELS}")
        if self.print and (self.print not in PRINTS or self.size != "large" or self.label):
            raise ValueError(f"print {self.print!r} needs a large shape with nothing else on it")

    @property
    def row(self) -> int:
        return self.place // 3

    @property
    def column(self) -> int:
        return self.place % 3

    @property
    def name(self) -> str:
        """Size, colour, shape and label: `large red circle marked K`."""
        marked = f" marked {self.label}" if self.label else ""
        return f"{self.size} {self.colour} {self.shape}{marked}"


@dataclass(frozen=True, slots=True)
class Scene:
    """One to five things in reading order, and how the picture of them looks.

    `corners` are the background colours of the four corners, `gain` is the brightness and `noise`
    the standard deviation of the grain, in grey levels of 255. `size` is that of the picture in
    pixels, (width, height), unless it is drawn at another one; `print_height` is the font size of
    small print, as a fraction of the longer side.
    """

    things: tuple[Thing, ...]
    corners: tuple[tuple[int, int, int], ...] = ((255, 255, 255),) * 4
    gain: float = 1.0
    noise: float = 0.0
    noise_seed: int = 0
    size: tuple[int, int] = (112, 112)
    print_height: float = PRINT_HEIGHT

    def __post_init__(self) -> None:
        places = [thing.place for thing in self.things]
        if not 1 <= len(places) <= MAX_THINGS:
            raise ValueError(f"a scene holds 1 to {MAX_THINGS} things, not {len(places)}")
        if places != sorted(set(places)):
            raise ValueError(f"things must be in reading order, one for each place: {places}")

    @property
    def key(self) -> str:
        """Hash of what is where; looks (jitter, background, grain) do not change it."""
        content = [
            (t.shape, t.colour, t.size, t.place, t.label, *([t.print] if t.print else []))
            for t in self.things
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Scene:
        """The inverse of `to_dict`, also after a trip through JSON."""
        things = (
            Thing(**{**t, "shift": tuple(t["shift"]), "tint": tuple(t["tint"])})
            for t in data["things"]
        )
        corners = tuple(tuple(c) for c in data["corners"])
        size = tuple(data["size"])
        return cls(**{**data, "things": tuple(things), "corners": corners, "size": size})


# --------------------------------------------------------------------------- making scenes


def random_scene(seed: int, label_share: float = 0.4) -> Scene:
    """The scene of this seed; `label_share` of its large shapes carry a label."""
    rng = random.Random(seed)
    count = rng.choices(range(1, MAX_THINGS + 1), weights=(2, 3, 4, 5, 5))[0]
    places = sorted(rng.sample(range(len(PLACES)), count))
    labels = rng.sample(LABELS, count)
    things: list[Thing] = []
    for place, label in zip(places, labels, strict=True):
        things.append(_random_thing(rng, place, label, label_share, things))
    return Scene(
        things=tuple(things),
        corners=_random_background(rng),
        gain=rng.uniform(0.88, 1.06),
        noise=rng.choice((0.0, rng.uniform(0, 7))),
        noise_seed=rng.randrange(2**31),
    )


FORMATS = {
    "square": (range(9), 1.0),
    "wide": ((0, 1, 2, 6, 7, 8), 2 / 3),
    "tall": ((0, 2, 3, 5, 6, 8), 3 / 2),
}
"""Of pictures with small print: the places that are used, and height / width. A wide picture is cut
into two rows of tiles, a tall one into two columns; what lay on the cut could not be read."""


def detail_scene(seed: int) -> Scene:
    """The scene with small print of this seed: large pictures, square, wide or tall. One thing at
    least carries print.
    """
    rng = random.Random(f"small print {seed}")
    count = rng.choices(range(2, MAX_THINGS + 1), weights=(2, 3, 3, 2))[0]
    places, aspect = FORMATS[rng.choice(("square", "square", "wide", "tall"))]
    prints = rng.sample(WORDS, count), rng.sample(PRINTS[len(WORDS) :], count)
    things: list[Thing] = []
    for place, *choices in zip(sorted(rng.sample(places, count)), *prints, strict=True):
        thing = _random_thing(rng, place, "", 0.0, things)
        printed = not things or thing.size == "large" or rng.random() < 0.5
        what = rng.choice(choices)
        small_shift = (thing.shift[0] / 4, thing.shift[1] / 4)
        large = replace(thing, size="large", print=what, shift=small_shift)
        things.append(large if printed else thing)
    longer = rng.randint(300, 372)
    ratio = aspect * rng.uniform(0.95, 1.05)
    size = (longer, longer * ratio) if ratio < 1 else (longer / ratio, longer)
    return Scene(
        things=tuple(things),
        corners=_random_background(rng),
        gain=rng.uniform(0.88, 1.06),
        noise=rng.choice((0.0, rng.uniform(0, 5))),
        noise_seed=rng.randrange(2**31),
        size=(round(size[0]), round(size[1])),
    )


def _random_thing(
    rng: random.Random, place: int, label: str, label_share: float, others: Sequence[Thing]
) -> Thing:
    """A random thing; one in three shares its shape or its colour with an earlier one."""
    shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    if others and rng.random() < 1 / 3:
        twin = rng.choice(others)
        shape, colour = rng.choice(((twin.shape, colour), (shape, twin.colour)))
    size = rng.choice(tuple(RADII))
    slack = 0.04 if size == "large" else 0.16
    return Thing(
        shape=shape,
        colour=colour,
        size=size,
        place=place,
        label=label if size == "large" and rng.random() < label_share else "",
        shift=(rng.uniform(-slack, slack), rng.uniform(-slack, slack)),
        scale=rng.uniform(0.93, 1.05),
        angle=rng.uniform(-9, 9),
        tint=tuple(rng.randint(-12, 12) for _ in range(3)),
    )


def _random_background(rng: random.Random) -> tuple[tuple[int, int, int], ...]:
    """Four corner colours near one base: light in six of ten scenes, else dark."""
    low, high = (196, 255) if rng.random() < 0.6 else (0, 56)
    grey = rng.uniform(low, high)
    tint = [rng.uniform(-14, 14) for _ in range(3)]
    spread = rng.choice((0, 14))

    def corner() -> tuple[int, int, int]:
        base = grey + rng.uniform(-spread, spread)
        return tuple(round(min(255, max(0, base + t))) for t in tint)

    return tuple(corner() for _ in range(4))


@cache
def reserved_keys() -> frozenset[str]:
    """Keys of all held-out and validation scenes: no model may train on these."""
    seeds = (*HELD_OUT, *VALIDATION)
    return frozenset(make(seed).key for make in (random_scene, detail_scene) for seed in seeds)


def is_reserved(scene: Scene) -> bool:
    """Whether it is a held-out or validation scene."""
    return scene.key in reserved_keys()


def train_scene(index: int, label_share: float = 0.6) -> Scene:
    """Scene number `index` of the training stream, never one that `is_reserved`."""
    return unreserved(index, lambda seed: random_scene(seed, label_share), is_reserved)


def train_detail_scene(index: int) -> Scene:
    """Number `index` of the training stream with small print, never one that `is_reserved`."""
    return unreserved(index, detail_scene, is_reserved)


def unreserved(
    index: int, make: Callable[[int], Content], reserved: Callable[[Content], bool]
) -> Content:
    """Number `index` of what `make` makes of the training seeds, past all that is reserved."""
    if index < 0:
        raise ValueError(f"the training stream starts at 0, not {index}")
    for attempt in range(100):
        content = make(TRAIN_START + 100 * index + attempt)
        if not reserved(content):
            return content
    raise RuntimeError(f"training scene {index}: a hundred seeds in a row are reserved")


# -------------------------------------------------------------------------- drawing scenes


def draw(
    scene: Scene, size: int | tuple[int, int] | None = None, supersample: int = 3
) -> Image.Image:
    """The picture of a scene at any size in pixels, a side or (width, height); None is its own."""
    size = scene.size if size is None else size
    width, height = (size, size) if isinstance(size, int) else size
    big = (width * supersample, height * supersample)
    canvas = Image.new("RGB", (2, 2))
    canvas.putdata(scene.corners)
    canvas = canvas.resize(big, Image.Resampling.BILINEAR)
    brush = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw_thing(brush, thing, big, scene.print_height)
    return _develop(canvas.resize((width, height), Image.Resampling.BOX), scene)


def outline(thing: Thing, width: float, height: float) -> tuple[float, float, float]:
    """Centre x, centre y and radius of a thing, in pixels of a `width` x `height` picture."""
    x = (thing.column + 0.5 + thing.shift[0]) * width / 3
    y = (thing.row + 0.5 + thing.shift[1]) * height / 3
    return x, y, RADII[thing.size] * thing.scale * min(width, height) / 3


def _draw_thing(
    brush: ImageDraw.ImageDraw, thing: Thing, canvas_size: tuple[int, int], print_height: float
) -> None:
    x, y, radius = outline(thing, *canvas_size)
    shades = zip(COLOURS[thing.colour], thing.tint, strict=True)
    fill = tuple(min(255, max(0, shade + tint)) for shade, tint in shades)
    if thing.shape == "circle":
        brush.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    else:
        brush.polygon(_corners(thing.shape, x, y, radius, math.radians(thing.angle)), fill=fill)
    if text := thing.label or thing.print:
        ink = "black" if 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 127 else "white"
        size = 1.1 * radius if thing.label else print_height * max(canvas_size)
        brush.text((x, y), text, fill=ink, font=_font(round(size)), anchor="mm")


def _corners(
    shape: str, x: float, y: float, radius: float, turn: float
) -> list[tuple[float, float]]:
    """Corner points in pixels; `turn` in radians, clockwise."""
    unit = {
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "triangle": [_polar(1.15, third / 3) for third in range(3)],
        "star": [_polar(1.12 if k % 2 == 0 else 0.56, k / 10) for k in range(10)],
        "diamond": [(0.0, -1.12), (0.92, 0.0), (0.0, 1.12), (-0.92, 0.0)],
    }[shape]
    cos, sin = math.cos(turn), math.sin(turn)
    return [(x + radius * (u * cos - v * sin), y + radius * (u * sin + v * cos)) for u, v in unit]


def _polar(radius: float, part: float) -> tuple[float, float]:
    """The point `part` of a full turn clockwise from the top."""
    return radius * math.sin(2 * math.pi * part), -radius * math.cos(2 * math.pi * part)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, the same on every machine."""
    return ImageFont.load_default(size)


def _develop(picture: Image.Image, scene: Scene) -> Image.Image:
    """Brightness and grain."""
    pixels = np.asarray(picture, dtype=np.float32) * scene.gain
    if scene.noise:
        grain = np.random.default_rng(scene.noise_seed)
        pixels += scene.noise * grain.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


# ------------------------------------------------------------------- questions and answers


@dataclass(frozen=True, slots=True)
class QA:
    """A question about a scene, the one right answer, and which kind of question it is."""

    kind: str
    question: str
    answer: str


def questions(scene: Scene, rng: random.Random) -> list[QA]:
    """One question of every kind that this scene allows."""
    asked = (ask(scene, kind, rng) for kind in KINDS)
    return [qa for qa in asked if qa is not None]


def ask(scene: Scene, kind: str, rng: random.Random) -> QA | None:
    """A question of this kind with its answer, or None where the scene allows none."""
    if kind not in KINDS:
        raise ValueError(f"no question kind {kind!r}; there are {', '.join(KINDS)}")
    pair = KINDS[kind](scene, rng)
    return QA(kind, *pair) if pair else None


Pair = tuple[str, str] | None


def caption(scene: Scene) -> str:
    """All things in reading order: `A large red circle at the top left and a small ...`."""
    parts = [f"a {thing.name} {PLACES[thing.place]}" for thing in scene.things]
    text = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
    return text[0].upper() + text[1:] + "."


def _ask_caption(scene: Scene, rng: random.Random) -> Pair:
    return rng.choice(CAPTION_PROMPTS), caption(scene)


CAPTION_PROMPTS = (
    "Describe the picture.",
    "Describe this picture.",
    "Describe the image.",
    "What do you see?",
    "What is in the picture?",
    "What is in this picture?",
    "What is in the image?",
    "What does the picture show?",
)


def there_are(count: int, noun: str) -> str:
    return f"There is one {noun}." if count == 1 else f"There are {NUMBERS[count]} {noun}s."


def _how_many(noun: str, rng: random.Random) -> str:
    return rng.choice((f"How many {noun}s are there?", f"How many {noun}s do you see?",
                       f"Count the {noun}s."))  # fmt: skip


def _ask_count(scene: Scene, rng: random.Random) -> Pair:
    return _how_many("shape", rng), there_are(len(scene.things), "shape")


def _ask_count_shape(scene: Scene, rng: random.Random) -> Pair:
    """Four times in five about a shape that is there."""
    there = [thing.shape for thing in scene.things]
    shape = rng.choice(there) if rng.random() < 0.8 else rng.choice(SHAPES)
    return _how_many(shape, rng), there_are(there.count(shape), shape)


def _ask_count_colour(scene: Scene, rng: random.Random) -> Pair:
    there = [thing.colour for thing in scene.things]
    colour = rng.choice(there) if rng.random() < 0.8 else rng.choice(tuple(COLOURS))
    return _how_many(f"{colour} shape", rng), there_are(there.count(colour), f"{colour} shape")


def references(scene: Scene, thing: Thing) -> list[str]:
    """Every description that fits this thing and nothing else in the scene, shortest first."""
    descriptions: tuple[Callable[[Thing], str], ...] = (
        lambda t: t.shape,
        lambda t: f"{t.colour} {t.shape}",
        lambda t: f"{t.size} {t.shape}",
        lambda t: f"{t.size} {t.colour} {t.shape}",
    )
    return [
        describe(thing)
        for describe in descriptions
        if [describe(other) for other in scene.things].count(describe(thing)) == 1
    ]


def _pick(scene: Scene, rng: random.Random, wanted: Callable[[Thing], bool] = bool) -> Thing | None:
    """A random thing that is `wanted` and can be told apart by a description."""
    things = [t for t in scene.things if wanted(t) and references(scene, t)]
    return rng.choice(things) if things else None


def _the(scene: Scene, thing: Thing, rng: random.Random, without: str = "") -> str | None:
    """A unique description of a thing that does not use the word `without`."""
    fitting = [r for r in references(scene, thing) if without not in r.split()]
    usual = f"{thing.colour} {thing.shape}"
    if usual in fitting and rng.random() < 0.5:
        return usual
    return rng.choice(fitting) if fitting else None


def _ask_where(scene: Scene, rng: random.Random) -> Pair:
    thing = _pick(scene, rng)
    if thing is None:
        return None
    place = PLACES[thing.place]
    return f"Where is the {_the(scene, thing, rng)}?", place[0].upper() + place[1:] + "."


def _ask_at(scene: Scene, rng: random.Random) -> Pair:
    """What is at a place; one time in six the place is empty."""
    taken = {thing.place: thing for thing in scene.things}
    empty = [place for place in range(len(PLACES)) if place not in taken]
    place = rng.choice(empty) if rng.random() < 1 / 6 else rng.choice(tuple(taken))
    question = rng.choice((f"What is {PLACES[place]}?", f"Which shape is {PLACES[place]}?"))
    return question, f"A {taken[place].name}." if place in taken else "Nothing."


def _ask_colour(scene: Scene, rng: random.Random) -> Pair:
    thing = _pick(scene, rng)
    the = thing and _the(scene, thing, rng, without=thing.colour)
    if not the:
        return None
    question = rng.choice((f"What colour is the {the}?", f"Which colour does the {the} have?",
                           f"What color is the {the}?"))  # fmt: skip
    return question, f"{thing.colour.capitalize()}."


def _ask_size(scene: Scene, rng: random.Random) -> Pair:
    thing = _pick(scene, rng)
    the = thing and _the(scene, thing, rng, without=thing.size)
    if not the:
        return None
    question = rng.choice((f"How big is the {the}?", f"What size is the {the}?",
                           f"Is the {the} large or small?"))  # fmt: skip
    return question, f"{thing.size.capitalize()}."


def beside(scene: Scene, thing: Thing, relation: str) -> list[Thing]:
    """All things left of, right of (same row), above or below (same column) a thing."""
    tests: dict[str, Callable[[Thing], bool]] = {
        "left of": lambda t: t.row == thing.row and t.column < thing.column,
        "right of": lambda t: t.row == thing.row and t.column > thing.column,
        "above": lambda t: t.column == thing.column and t.row < thing.row,
        "below": lambda t: t.column == thing.column and t.row > thing.row,
    }
    return [other for other in scene.things if tests[relation](other)]


def _ask_beside(relation: str, *forms: str) -> Callable[[Scene, random.Random], Pair]:
    """Asks only where exactly one thing lies that way, in the same row or column."""

    def ask_beside(scene: Scene, rng: random.Random) -> Pair:
        thing = _pick(scene, rng, lambda t: len(beside(scene, t, relation)) == 1)
        if thing is None:
            return None
        question = rng.choice(forms).format(the=_the(scene, thing, rng))
        return question, f"A {beside(scene, thing, relation)[0].name}."

    return ask_beside


def _ask_exist(scene: Scene, rng: random.Random) -> Pair:
    """Half yes, half no; a no mixes the colours and shapes that are there where it can."""
    there = {(t.colour, t.shape) for t in scene.things}
    if rng.random() < 0.5:
        colour, shape = rng.choice(sorted(there))
    else:
        colours, shapes = sorted({c for c, _ in there}), sorted({s for _, s in there})
        pools = [(colours, shapes), (colours, SHAPES), (tuple(COLOURS), shapes)]
        rng.shuffle(pools)
        absent = next(
            [(c, s) for c in cs for s in ss if (c, s) not in there]
            for cs, ss in [*pools, (tuple(COLOURS), SHAPES)]
            if any((c, s) not in there for c in cs for s in ss)
        )
        colour, shape = rng.choice(absent)
    article = "an" if colour == "orange" else "a"
    forms = ("Is there {a} {x}?", "Do you see {a} {x}?", "Is there {a} {x} in the picture?")
    question = rng.choice(forms).format(a=article, x=f"{colour} {shape}")
    return question, "Yes." if (colour, shape) in there else "No."


def _sign(label: str) -> str:
    return f"number {label}" if label.isdigit() else f"letter {label}"


def _ask_read(scene: Scene, rng: random.Random) -> Pair:
    """What a shape is marked with; `Nothing.` where it carries no label."""
    labelled = rng.random() < 0.85
    thing = _pick(
        scene, rng, lambda t: bool(t.label) == labelled and t.size == "large" and not t.print
    )
    if thing is None:
        return None
    forms = ["What is written on the {the}?"]
    if thing.label:
        forms.append(f"What {_sign(thing.label)[:6]} is on the {{the}}?")
    question = rng.choice(forms).format(the=_the(scene, thing, rng))
    return question, f"The {_sign(thing.label)}." if thing.label else "Nothing."


def _ask_find(scene: Scene, rng: random.Random) -> Pair:
    """Which shape carries a label; every label occurs once in a scene."""
    labelled = [thing for thing in scene.things if thing.label]
    if not labelled:
        return None
    thing = rng.choice(labelled)
    question = rng.choice((f"Which shape carries the {_sign(thing.label)}?",
                           f"Which shape is marked {thing.label}?"))  # fmt: skip
    return question, f"The {thing.size} {thing.colour} {thing.shape}."


def _printed(text: str) -> str:
    return f"number {text}" if text.isdigit() else f"word {text}"


def _ask_read_print(scene: Scene, rng: random.Random) -> Pair:
    """What small print a shape carries."""
    thing = _pick(scene, rng, lambda t: bool(t.print))
    if thing is None:
        return None
    what = _printed(thing.print)
    forms = (f"What {what.split()[0]} is on the {{the}}?", "What is printed on the {the}?")
    return rng.choice(forms).format(the=_the(scene, thing, rng)), f"The {what}."


def _ask_find_print(scene: Scene, rng: random.Random) -> Pair:
    """Which shape carries a word or number; each occurs once in a scene."""
    printed = [thing for thing in scene.things if thing.print]
    if not printed:
        return None
    thing = rng.choice(printed)
    verb = rng.choice(("carries", "has"))
    question = f"Which shape {verb} the {_printed(thing.print)}?"
    return question, f"The {thing.size} {thing.colour} {thing.shape}."


KINDS: dict[str, Callable[[Scene, random.Random], Pair]] = {
    "caption": _ask_caption,
    "count": _ask_count,
    "count_shape": _ask_count_shape,
    "count_colour": _ask_count_colour,
    "where": _ask_where,
    "at": _ask_at,
    "colour": _ask_colour,
    "size": _ask_size,
    "left": _ask_beside(
        "left of", "What is left of the {the}?", "What is to the left of the {the}?"
    ),
    "right": _ask_beside(
        "right of", "What is right of the {the}?", "What is to the right of the {the}?"
    ),
    "above": _ask_beside("above", "What is above the {the}?", "Which shape is above the {the}?"),
    "below": _ask_beside("below", "What is below the {the}?", "Which shape is below the {the}?"),
    "exist": _ask_exist,
    "read_label": _ask_read,
    "find_label": _ask_find,
    "read_print": _ask_read_print,
    "find_print": _ask_find_print,
}


# ------------------------------------------------------------------------ example pictures


def example_scenes() -> dict[str, Scene]:
    """The pictures that come with the repository, by file name."""
    light, dark = ((250, 250, 246),) * 4, ((18, 20, 28), (26, 28, 40), (14, 16, 24), (22, 24, 34))
    left_of = Scene(
        (
            Thing("square", "blue", "small", 3),
            Thing("circle", "red", "large", 4, "K"),
            Thing("star", "yellow", "large", 8),
        ),
        light,
    )
    letters = Scene(
        (
            Thing("square", "green", "large", 0, "A"),
            Thing("circle", "blue", "large", 2, "7"),
            Thing("diamond", "orange", "large", 4, "X"),
            Thing("triangle", "purple", "large", 7, "4"),
        ),
        ((232, 238, 244),) * 4,
    )
    one_colour = Scene(
        (
            Thing("circle", "red", "large", 0),
            Thing("star", "red", "small", 2),
            Thing("square", "red", "large", 5, "M"),
            Thing("triangle", "red", "small", 6),
        ),
        ((244, 240, 230), (230, 232, 236), (250, 246, 240), (236, 232, 228)),
    )
    night = Scene(
        (
            Thing("star", "yellow", "large", 0, "2", angle=6),
            Thing("circle", "orange", "small", 2, shift=(0.1, -0.1)),
            Thing("diamond", "green", "large", 6, shift=(0.03, 0.0)),
            Thing("square", "purple", "small", 8, angle=-8),
        ),
        dark,
    )
    single = Scene((Thing("triangle", "green", "large", 4, "P"),), light)
    sizes = Scene(
        (
            Thing("circle", "blue", "small", 1),
            Thing("circle", "blue", "large", 3, "E"),
            Thing("circle", "purple", "large", 5),
            Thing("circle", "orange", "small", 7),
        ),
        ((222, 226, 220),) * 4,
    )
    five = Scene(
        (
            Thing("diamond", "purple", "small", 0, angle=5),
            Thing("square", "orange", "large", 1, "H", angle=-4),
            Thing("star", "blue", "large", 3),
            Thing("triangle", "yellow", "small", 5, shift=(-0.1, 0.05)),
            Thing("circle", "green", "large", 8, "9", shift=(-0.02, -0.03)),
        ),
        ((46, 48, 52), (34, 36, 40), (50, 50, 54), (30, 32, 38)),
    )
    square = Scene(
        (
            Thing("circle", "red", "large", 0, print="FOX"),
            Thing("square", "blue", "large", 2, print="472", angle=5),
            Thing("star", "yellow", "small", 4),
            Thing("diamond", "green", "large", 7, print="SUN"),
            Thing("triangle", "orange", "large", 8, print="921"),
        ),
        light,
        size=(336, 336),
    )
    wide = Scene(
        (
            Thing("star", "purple", "large", 0, print="KEY"),
            Thing("circle", "orange", "large", 2, print="150"),
            Thing("square", "green", "large", 7, print="OWL", angle=-5),
        ),
        dark,
        size=(372, 248),
    )
    tall = Scene(
        (
            Thing("triangle", "blue", "large", 0, print="TEA"),
            Thing("circle", "yellow", "large", 5, print="507"),
            Thing("diamond", "red", "large", 6, print="219", angle=4),
            Thing("square", "purple", "small", 8),
        ),
        ((232, 238, 244),) * 4,
        size=(240, 360),
    )
    return {
        "three-shapes": left_of,
        "letters-and-numbers": letters,
        "all-red": one_colour,
        "dark-background": night,
        "one-triangle": single,
        "four-circles": sizes,
        "five-shapes": five,
        "small-print": square,
        "small-print-wide": wide,
        "small-print-tall": tall,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the example pictures.")
    parser.add_argument("--out", type=Path, default=Path("data/images"))
    parser.add_argument("--size", type=int, default=336, help="side of plain scenes in pixels")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    described = {}
    for name, scene in example_scenes().items():
        detailed = any(thing.print for thing in scene.things)
        picture = draw(scene, None if detailed else options.size)
        picture.save(options.out / f"{name}.png", optimize=True)
        pairs = [asdict(qa) for qa in questions(scene, random.Random(0))]
        described[f"{name}.png"] = {"scene": scene.to_dict(), "questions": pairs}
    text = json.dumps(described, indent=1) + "\n"
    (options.out / "scenes.json").write_text(text, encoding="utf-8")
    print(f"{len(described)} pictures in {options.out}")


if __name__ == "__main__":
    main()
