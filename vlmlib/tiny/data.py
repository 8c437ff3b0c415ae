"""The training stream: scenes in, padded batches of token ids, pixels and targets out.

Step number s of a run always gives the same batch, so a run that stops can go on where it was.

One sequence holds one picture and several questions about it. In three sequences of four the
questions are *isolated*: each sees the picture and itself, at the positions it would have alone.
That is exactly a batch of single-turn conversations, for the price of one picture. The others are
ordinary conversations, so that a second question works too.

Axes: b sequences, n tokens, p patches.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from .model import IMAGE_TOKENS, PATCH, PIXELS
from .scenes import COLOURS, LABELS, QA, RADII, SHAPES, Scene, ask, draw, outline, train_scene
from .tokenizer import BOS, EOS, IMAGE

IGNORE = -100
PADDING = -1

WEIGHTS = {
    "count": 0.4,
    "count_shape": 2.0,
    "count_colour": 2.0,
    "where": 6.0,
    "at": 2.0,
    "colour": 1.8,
    "size": 0.8,
    "left": 6.0,
    "right": 6.0,
    "above": 6.0,
    "below": 6.0,
    "exist": 2.5,
    "read_label": 1.8,
    "find_label": 2.0,
}
"""How often each kind of question is asked; the slow learners more often."""


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


class Writer:
    """Writes questions and answers as token sequences in LLaVA's chat format."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.prefix = self._ids(f"{BOS}USER: " + IMAGE * IMAGE_TOKENS)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def isolated(self, pairs: Sequence[QA]) -> TokenRow:
        """Every question alone with the picture: one block each, positions start again."""
        sequence = self._picture()
        start = len(self.prefix)
        for block, qa in enumerate(pairs, start=1):
            prompt = self._ids(f"\n{qa.question} ASSISTANT:")
            answer = self._ids(f" {qa.answer}{EOS}")
            sequence.add(prompt, start, block, learn=False)
            sequence.add(answer, start + len(prompt), block, learn=True)
        return sequence

    def conversation(self, pairs: Sequence[QA]) -> TokenRow:
        """One question after the other; each sees all that was said before."""
        sequence = self._picture()
        opening = "\n"
        for qa in pairs:
            prompt = self._ids(f"{opening}{qa.question} ASSISTANT:")
            sequence.add(prompt, len(sequence.ids), 0, learn=False)
            answer = self._ids(f" {qa.answer}{EOS}")
            sequence.add(answer, len(sequence.ids), 0, learn=True)
            opening = "USER: "
        return sequence

    def _picture(self) -> TokenRow:
        sequence = TokenRow()
        sequence.add(self.prefix, 0, 0, learn=False)
        return sequence


@dataclass(slots=True)
class Batch:
    """One step's work, padded on the right."""

    pixels: Tensor  # (b, PIXELS, PIXELS, 3) uint8
    ids: Tensor  # (b, n)
    positions: Tensor  # (b, n)
    blocks: Tensor  # (b, n), PADDING where there is none
    targets: Tensor  # (b, n), what the token *is*; IGNORE where nothing is learnt
    patches: Tensor  # (b, 4, p): shape, colour, size, label of each patch, 0 for none


def collate(
    sequences: Sequence[TokenRow], pixels: Sequence[np.ndarray], patches: Sequence[np.ndarray]
) -> Batch:
    """Pad sequences to one length and stack everything."""
    longest = max(len(s.ids) for s in sequences)

    def padded(name: str, value: int) -> Tensor:
        rows = (getattr(s, name) for s in sequences)
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    return Batch(
        pixels=torch.from_numpy(np.stack(pixels)),
        ids=padded("ids", 0),
        positions=padded("positions", 0),
        blocks=padded("blocks", PADDING),
        targets=padded("targets", IGNORE),
        patches=torch.from_numpy(np.stack(patches)),
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


def pixels_of(picture: Image.Image) -> np.ndarray:
    """A square picture as inference sees it before normalising: (PIXELS, PIXELS, 3) uint8."""
    if picture.width != picture.height:
        raise ValueError(f"training pictures are square, not {picture.width} x {picture.height}")
    return np.array(picture.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC))


def patch_targets(scene: Scene) -> np.ndarray:
    """(4, p) classes of each patch for the auxiliary loss: shape, colour, size, label; 0 is none.

    A patch belongs to a thing if its centre lies in the thing's outline; the outline of a small
    thing is taken as three quarters of a patch wide at least, so that none goes unseen.
    """
    side = PIXELS // PATCH
    centres = (np.arange(side) + 0.5) * PATCH
    classes = np.zeros((4, side, side), dtype=np.int64)
    for thing in scene.things:
        x, y, radius = outline(thing, PIXELS, PIXELS)
        inside = np.hypot(centres[None] - x, centres[:, None] - y) <= max(radius, 0.75 * PATCH)
        values = (
            1 + SHAPES.index(thing.shape),
            1 + tuple(COLOURS).index(thing.colour),
            1 + tuple(RADII).index(thing.size),
            1 + LABELS.index(thing.label) if thing.label else 0,
        )
        for plane, value in zip(classes, values, strict=True):
            plane[inside] = value
    return classes.reshape(4, -1)


PATCH_CLASSES = (1 + len(SHAPES), 1 + len(COLOURS), 1 + len(RADII), 1 + len(LABELS))


def choose_questions(scene: Scene, rng: random.Random, count: int) -> list[QA]:
    """About `count` different questions by `WEIGHTS`; every other time a caption too."""
    kinds = rng.choices(tuple(WEIGHTS), weights=tuple(WEIGHTS.values()), k=count)
    if rng.random() < 0.5:
        kinds.append("caption")
    asked = [ask(scene, kind, rng) for kind in kinds]
    different = {qa.question: qa for qa in asked if qa}
    chosen = list(different.values()) or [ask(scene, "caption", rng)]
    rng.shuffle(chosen)
    return [_as_typed(qa, rng) for qa in chosen]


def _as_typed(qa: QA, rng: random.Random) -> QA:
    """Now and then a question in small letters or without its last sign, as people type."""
    question = qa.question.lower() if rng.random() < 0.1 else qa.question
    question = question[:-1] if rng.random() < 0.05 else question
    return QA(qa.kind, question, qa.answer)


class Stream(Dataset):
    """Item s is the batch of step s of the run with this seed; no questions in `look_steps`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        batch_size: int = 32,
        seed: int = 0,
        asked: int = 10,
        look_steps: int = 0,
    ) -> None:
        self.writer = Writer(tokenizer)
        self.batch_size = batch_size
        self.seed = seed
        self.asked = asked
        self.look_steps = look_steps

    def __getitem__(self, step: int) -> Batch:
        first = self.seed * 10**9 + step * self.batch_size
        asked = 0 if step < self.look_steps else self.asked
        rows = [self._row(first + index, asked) for index in range(self.batch_size)]
        return collate(*zip(*rows, strict=True))

    def _row(self, index: int, asked: int) -> tuple[TokenRow, np.ndarray, np.ndarray]:
        scene = train_scene(index)
        rng = random.Random(index)
        pairs = choose_questions(scene, rng, asked) if asked else []
        write = self.writer.isolated if rng.random() < 0.75 else self.writer.conversation
        picture = draw(scene, rng.choice((PIXELS,) * 8 + (2 * PIXELS, 3 * PIXELS)))
        return write(pairs), pixels_of(picture), patch_targets(scene)
