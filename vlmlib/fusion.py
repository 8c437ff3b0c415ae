"""How pictures enter the sequence: features take the place of placeholders.

A prompt is a list of ids in which `IMAGE_TOKEN_INDEX` stands for one picture, whatever the number
of positions its features will take.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from .tokenization import IMAGE_TOKEN_INDEX, check_placeholders


def fuse(
    ids: Sequence[int], features: Sequence[Tensor], embed: Callable[[Tensor], Tensor]
) -> Tensor:
    """Ids with placeholders, one (n_i, d) tensor a picture -> (1, n, d) input embeddings.

    `embed` maps (n,) ids to (n, d); all text goes through it in one call. Raises PlaceholderError.
    Source: LLaVA:llava/model/llava_arch.py.
    """
    check_placeholders(ids.count(IMAGE_TOKEN_INDEX), len(features))
    table = embed(torch.tensor([i for i in ids if i != IMAGE_TOKEN_INDEX], dtype=torch.long))
    pieces, at, pictures = [], 0, iter(features)
    for is_picture, run in groupby(ids, key=lambda i: i == IMAGE_TOKEN_INDEX):
        n = len(list(run))
        if is_picture:
            pieces += [next(pictures).to(table) for _ in range(n)]
        else:
            pieces.append(table[at : at + n])
            at += n
    return torch.cat(pieces or [table])[None]


def positions(
    ids: Sequence[int], lengths: Sequence[int], names: Sequence[Hashable]
) -> list[Hashable]:
    """What stands at each position after fusion: an id, or (name of the picture, index in it).

    `lengths` and `names` have one entry a picture: its number of positions and what tells it apart.
    """
    check_placeholders(ids.count(IMAGE_TOKEN_INDEX), len(lengths))
    pictures = iter(zip(lengths, names, strict=True))
    out: list[Hashable] = []
    for i in ids:
        if i == IMAGE_TOKEN_INDEX:
            n, name = next(pictures)
            out += [(name, k) for k in range(n)]
        else:
            out.append(i)
    return out


def split_at(ids: Sequence[int], lengths: Sequence[int], start: int) -> tuple[int, int, int]:
    """Where position `start` of the fused sequence lies: (ids before, pictures before, offset).

    `offset` is not 0 only where `start` falls into the middle of a picture.
    """
    at = pictures = 0
    for i, token in enumerate(ids):
        size = lengths[pictures] if token == IMAGE_TOKEN_INDEX else 1
        if at + size > start:
            return i, pictures, start - at
        at += size
        pictures += token == IMAGE_TOKEN_INDEX
    return len(ids), pictures, start - at


def digest(x: Tensor) -> str:
    """A name for a tensor's content: equal content, equal name, on every run and machine."""
    raw = x.detach().cpu().contiguous()
    return hashlib.blake2b(
        raw.view(torch.uint8).numpy().tobytes() + repr((raw.shape, raw.dtype)).encode(),
        digest_size=16,
    ).hexdigest()
