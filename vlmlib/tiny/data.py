"""The training stream: scenes and clips in, padded batches of token ids, tiles and targets out.

Step number s of a run always gives the same batches, so a run that stops can go on where it was.

One sequence holds one picture or clip and several questions about it. In three sequences of four
the questions are *isolated*: each sees the picture and itself, at the positions it would have
alone. That is exactly a batch of single-turn conversations, for the price of one picture. The
others are ordinary conversations, so that a second question works too.

Prompts and pixels are those of the model itself, so that training reads what inference reads.

Axes: b sequences, n tokens, t tiles of all pictures, p patches of a tile, c what is read off each.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..media import Medium, Video
from ..model import VisionLanguageModel
from ..tokenization import IGNORE_INDEX as IGNORE
from ..tokenization import IMAGE_TOKEN_INDEX
from .clips import Clip, ask_clip, frames, train_clip
from .model import PATCH, PIXELS
from .scenes import (
    COLOURS,
    PRINTS,
    QA,
    RADII,
    SHAPES,
    Scene,
    ask,
    draw,
    outline,
    train_detail_scene,
    train_scene,
)

PADDING = -1

Source = Image.Image | Video

WEIGHTS = {
    "count": 0.8,
    "count_shape": 3.0,
    "count_colour": 3.0,
    "where": 3.0,
    "at": 2.0,
    "colour": 1.5,
    "size": 0.6,
    "left": 4.0,
    "right": 4.0,
    "above": 4.0,
    "below": 4.0,
    "exist": 4.0,
    "read_label": 1.8,
    "find_label": 4.0,
}
PRINT_WEIGHTS = {"read_print": 12.0, "find_print": 8.0}
CLIP_WEIGHTS = {
    "happens": 1.0,
    "way": 1.5,
    "which": 2.5,
    "count_at_end": 1.0,
    "count_at_start": 0.8,
    "where_at_end": 2.0,
}
"""How often each kind of question is asked; the slow learners more often."""


@dataclass(frozen=True, slots=True)
class Share:
    """How much of the training stream is of one content, and what is asked about it.

    weights   how often each kind of question is asked
    usual     the kind that is asked about every other one besides; it can always be asked
    close_up  share that is shown as `close_up`
    side      of a close-up, in pixels: those that the model looks at in as few tiles as it can
    """

    of_all: float
    weights: Mapping[str, float]
    usual: str
    close_up: float = 0.0
    side: int = PIXELS


SCENES_AND_CLIPS = {
    "scene": Share(0.25, WEIGHTS, "caption"),
    "print": Share(0.5, WEIGHTS | {"read_print": 20.0, "find_print": 20.0}, "caption", 0.7),
    "clip": Share(0.25, CLIP_WEIGHTS, "happens"),
}
MIXES = {
    "llava": {
        "scene": Share(0.85, WEIGHTS, "caption"),
        "print": Share(0.15, PRINT_WEIGHTS, "find_print"),
    },
    "nvila": SCENES_AND_CLIPS
    | {"print": replace(SCENES_AND_CLIPS["print"], side=2 * PIXELS)},  # its last scale's tiles
    "internvl": SCENES_AND_CLIPS,
}
"""What each family learns from. LLaVA takes no clips, and crops a picture to a square: it is asked
for small print like the others, but not for things that it may not see. NVILA enlarges what is
smaller than two tiles a side, and would learn to read letters of a size that it never meets.
"""

TO_READ = {
    "scene": Share(0.3, WEIGHTS, "caption"),
    "print": Share(0.7, PRINT_WEIGHTS, "find_print", close_up=0.9),
}
LOOKS = {"llava": MIXES["llava"], "nvila": TO_READ, "internvl": TO_READ}
"""What each family's tower looks at first: letters take it the longest to tell apart."""

FRAMES = 8
"""Of a clip, for a model to look at."""

TOGETHER = 4

CHARACTERS = sorted({character for text in PRINTS for character in text})
ENLARGED = 1.3
"""How much larger than in tiles print in a close-up may be: what is larger is learnt earlier."""
READ_FROM = 7
"""Small print is read off a tile if its font size there is so many pixels."""

CONTENTS = {"scene": train_scene, "print": train_detail_scene, "clip": train_clip}


@dataclass(slots=True)
class TokenRow:
    """Token ids with, for each, its position, its block and its target (`IGNORE`: none).

    Block 0 is seen by all later tokens; any other block is seen by itself alone.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], start: int, block: int, learn: bool) -> None:
        """Append tokens at positions from `start` on."""
        self.ids.extend(ids)
        self.positions.extend(range(start, start + len(ids)))
        self.blocks.extend([block] * len(ids))
        self.targets.extend(ids if learn else [IGNORE] * len(ids))


@dataclass(slots=True)
class Row:
    """One sequence and its media; `tokens.ids` has IMAGE_TOKEN_INDEX wherever they stand."""

    tokens: TokenRow
    media: list[Medium]


QUESTION, ANSWER = "[question]", "[answer]"


class Writer:
    """Writes questions and answers about pictures as a model reads them.

    The texts of its chat format: an answer is `gap`, its text and `end`; the next question is
    `opening`, its text and `closing`.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model = model
        asked, said = ("user", [QUESTION]), ("assistant", [ANSWER])
        first = model.conversation_prompt([asked])
        second = model.conversation_prompt([asked, said, asked])
        self.closing = first.rpartition(QUESTION)[2]
        between = second.removeprefix(first).removesuffix(QUESTION + self.closing)
        self.gap, _, rest = between.partition(ANSWER)
        self.end = model.tokenizer.eos_token
        self.opening = rest.removeprefix(self.end)

    def isolated(self, sources: Sequence[Source], pairs: Sequence[QA]) -> Row:
        """Every question alone with the pictures: one block each, positions start again."""
        row, prompts = self._begin(sources, [qa.question for qa in pairs])
        start = len(row.tokens.ids)
        for block, (qa, prompt) in enumerate(zip(pairs, prompts, strict=True), start=1):
            row.tokens.add(prompt, start, block, learn=False)
            row.tokens.add(self._answer(qa), start + len(prompt), block, learn=True)
        return row

    def conversation(self, sources: Sequence[Source], pairs: Sequence[QA]) -> Row:
        """One question after the other; each sees all that was said before."""
        row, prompts = self._begin(sources, [qa.question for qa in pairs[:1]])
        prompts += [self._ids(self.opening + qa.question + self.closing) for qa in pairs[1:]]
        for qa, prompt in zip(pairs, prompts, strict=True):
            row.tokens.add(prompt, len(row.tokens.ids), 0, learn=False)
            row.tokens.add(self._answer(qa), len(row.tokens.ids), 0, learn=True)
        return row

    def _begin(
        self, sources: Sequence[Source], questions: Sequence[str]
    ) -> tuple[Row, list[list[int]]]:
        """A row up to its last medium, and what follows there to ask each of the questions."""
        media = self.model.prepare(sources)
        text = self.model.chat_prompt([*sources, QUESTION])
        ids, placed = self.model.read(text, media)
        head = ids[: _behind_media(ids)]
        row, lengths = Row(TokenRow(), placed), iter([m.length for m in placed])
        for i in head:
            run = [i] * next(lengths) if i == IMAGE_TOKEN_INDEX else [i]
            row.tokens.add(run, len(row.tokens.ids), 0, learn=False)
        prompts = [self.model.read(text.replace(QUESTION, q), media)[0] for q in questions]
        return row, [prompt[len(head) :] for prompt in prompts]

    def _answer(self, qa: QA) -> list[int]:
        return self._ids(self.gap + qa.answer + self.end)

    def _ids(self, text: str) -> list[int]:
        return self.model.tokenizer.encode(text, add_special_tokens=False)


def _behind_media(ids: Sequence[int]) -> int:
    """Where the text begins that follows the last medium."""
    return len(ids) - ids[::-1].index(IMAGE_TOKEN_INDEX)


@dataclass(slots=True)
class Batch:
    """Some sequences, padded on the right."""

    pixels: Tensor  # (t, 3, h, w)
    tiles: list[int]  # how many of them each medium has
    media: list[Medium]  # of all sequences in order, without their pixels
    ids: Tensor  # (b, n), IMAGE_TOKEN_INDEX where the features of media go
    positions: Tensor  # (b, n)
    blocks: Tensor  # (b, n), PADDING where there is none
    targets: Tensor  # (b, n), what the token *is*; IGNORE where nothing is learnt
    patches: Tensor  # (t, c, p), see `patch_targets`


def collate(rows: Sequence[Row], patches: Sequence[np.ndarray]) -> Batch:
    """Pad sequences to one length and put everything together; (t, c, p) patch targets a row."""
    longest = max(len(row.tokens.ids) for row in rows)
    media = [m for row in rows for m in row.media]

    def padded(name: str, value: int) -> Tensor:
        lists = (getattr(row.tokens, name) for row in rows)
        return torch.tensor([x + [value] * (longest - len(x)) for x in lists])

    return Batch(
        pixels=torch.cat([m.pixels for m in media]),
        tiles=[len(m.pixels) for m in media],
        media=[replace(m, pixels=torch.empty(0)) for m in media],
        ids=padded("ids", 0),
        positions=padded("positions", 0),
        blocks=padded("blocks", PADDING),
        targets=padded("targets", IGNORE),
        patches=torch.from_numpy(np.concatenate(patches)),
    )


def attention_mask(blocks: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(b, n) blocks -> (b, 1, n, n), to be added to the scores: 0 where the row may see the column.

    A token sees earlier tokens of block 0 and of its own block. Padding sees itself, because a
    softmax over nothing is not a number.
    """
    length = blocks.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    shared = blocks[:, None, :] == 0
    same = blocks[:, :, None] == blocks[:, None, :]
    hidden = ~(causal & (shared | same))[:, None]
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)


Region = Sequence[float]


def close_up(scene: Scene, enlarged: float = 1.0, side: int = PIXELS) -> Scene:
    """A scene with small print on a square of `side` pixels, the print as large as in the tiles of
    a large picture, or `enlarged` so many times: more practice in reading for the same work.
    """
    large = 3 * PIXELS  # side of a large picture in tiles
    print_height = scene.print_height * enlarged * large / side
    return replace(scene, size=(side, side), print_height=print_height)


def patch_targets(scene: Scene, size: tuple[int, int], region: Region = (0, 0, 1, 1)) -> np.ndarray:
    """(6, p) classes of each patch of a tile for the auxiliary loss: shape, colour, size and three
    characters of what is written there, label or small print; 0 is none.

    size    (width, height) of the picture
    region  what the tile shows of it, as in `Medium.regions`

    A patch belongs to a thing and to its label if its centre lies in the thing's outline, and to
    its small print if it lies in the box of the text; both are taken as one and a half patches wide
    at least, so that none goes unseen. Small print below READ_FROM pixels is IGNOREd.
    """
    side = PIXELS // PATCH
    (width, height), (left, top, right, bottom) = size, region
    patch = (right - left) * width / side, (bottom - top) * height / side
    steps = np.arange(side) + 0.5
    centres_x = left * width + steps[None] * patch[0]
    centres_y = top * height + steps[:, None] * patch[1]
    letter = scene.print_height * max(size)
    classes = np.zeros((len(PATCH_CLASSES), side, side), dtype=np.int64)
    for thing in scene.things:
        x, y, radius = outline(thing, width, height)
        away = centres_x - x, centres_y - y
        inside = np.hypot(*away) <= max(radius, 0.75 * max(patch))
        values = (
            1 + SHAPES.index(thing.shape),
            1 + tuple(COLOURS).index(thing.colour),
            1 + tuple(RADII).index(thing.size),
        )
        for plane, value in zip(classes, values, strict=False):
            plane[inside] = value
        if thing.print:
            half = 0.35 * letter * len(thing.print), 0.35 * letter
            reach = [max(h, 0.75 * p) for h, p in zip(half, patch, strict=True)]
            inside = (abs(away[0]) <= reach[0]) & (abs(away[1]) <= reach[1])
        for plane, character in zip(classes[WRITTEN], thing.label or thing.print, strict=False):
            plane[inside] = 1 + CHARACTERS.index(character)
    if letter * PATCH / max(patch) < READ_FROM and any(thing.print for thing in scene.things):
        classes[WRITTEN] = IGNORE
    return rearrange(classes, "c y x -> c (y x)")


PATCH_CLASSES = tuple(1 + len(values) for values in (SHAPES, COLOURS, RADII, *[CHARACTERS] * 3))
WRITTEN = slice(3, None)
"""The classes that are characters."""


def frame_moments(offset: float) -> list[float]:
    """When a model looks at a clip: 0 begins and ends with its first and last frame, as NVILA does;
    0.5 takes the middle of equal parts, as InternVL does.
    """
    return [(i + offset) / (FRAMES - 1 + 2 * offset) for i in range(FRAMES)]


def choose_questions(shown: Scene | Clip, share: Share, rng: random.Random, count: int) -> list[QA]:
    """About `count` different questions by their weights; every other time the usual one too."""
    pose = ask_clip if isinstance(shown, Clip) else ask
    kinds = rng.choices(tuple(share.weights), weights=tuple(share.weights.values()), k=count)
    if rng.random() < 0.5:
        kinds.append(share.usual)
    asked = [pose(shown, kind, rng) for kind in kinds]
    different = {qa.question: qa for qa in asked if qa}
    chosen = list(different.values()) or [pose(shown, share.usual, rng)]
    rng.shuffle(chosen)
    return [_as_typed(qa, rng) for qa in chosen]


def _as_typed(qa: QA, rng: random.Random) -> QA:
    """Now and then a question in small letters or without its last sign, as people type."""
    question = qa.question.lower() if rng.random() < 0.1 else qa.question
    question = question[:-1] if rng.random() < 0.05 else question
    return QA(qa.kind, question, qa.answer)


class Stream(Dataset):
    """Item s is the work of step s of the run with this seed; no questions in `look_steps`.

    Of `part` (i, n) that is every n-th sequence from number i on: the share of one of n processes.
    The sequences come in batches of `TOGETHER`, sorted by length: scenes, tiled pictures and clips
    differ so much that half of one large batch would be padding.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        batch_size: int = 32,
        seed: int = 0,
        asked: int = 10,
        look_steps: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.writer = Writer(model)
        self.mixes = LOOKS[model.family], MIXES[model.family]
        self.batch_size = batch_size
        self.seed = seed
        self.asked = asked
        self.look_steps = look_steps
        self.part = part

    def __getitem__(self, step: int) -> list[Batch]:
        first = self.seed * 10**9 + step * self.batch_size
        asked = 0 if step < self.look_steps else self.asked
        mine = range(self.part[0], self.batch_size, self.part[1])
        rows = [self._row(first + index, asked) for index in mine]
        rows.sort(key=lambda pair: len(pair[0].tokens.ids))
        groups = [rows[i : i + TOGETHER] for i in range(0, len(rows), TOGETHER)]
        batches = [collate(*zip(*group, strict=True)) for group in groups]
        for batch in batches:
            batch.pixels = batch.pixels.bfloat16()  # half as much to hand on
        return batches

    def _row(self, index: int, asked: int) -> tuple[Row, np.ndarray]:
        mix = self.mixes[asked > 0]
        shares = [share.of_all for share in mix.values()]
        (content,) = random.Random(f"content {index}").choices(tuple(mix), shares)
        shown, rng, share = CONTENTS[content](index), random.Random(index), mix[content]
        pairs = choose_questions(shown, share, rng, asked) if asked else []
        write = self.writer.isolated if rng.random() < 0.75 else self.writer.conversation
        size = rng.choice((PIXELS,) * 8 + (2 * PIXELS, 3 * PIXELS))
        moments = frame_moments(rng.uniform(0, 0.5))
        if share.close_up and rng.random() < share.close_up:
            shown = close_up(shown, rng.uniform(1, ENLARGED), share.side)
        if content == "clip":
            pictures = frames(shown, moments, PIXELS)
        else:
            pictures = [draw(shown, size if content == "scene" else None)]
        row = write([Video(pictures)] if content == "clip" else pictures, pairs)
        regions = torch.cat([m.shown for m in row.media]).tolist()
        scenes = map(shown.at, moments) if content == "clip" else [shown] * len(regions)
        tiles = zip(scenes, regions, strict=True)
        return row, np.stack([patch_targets(s, pictures[0].size, r) for s, r in tiles])
