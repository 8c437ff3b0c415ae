"""What a picture or a clip is between its file and the language model."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from .fusion import digest


@dataclass(frozen=True, slots=True, eq=False)
class Medium:
    """One picture or clip, preprocessed and not yet encoded; it fills one placeholder.

    pixels  (t, 3, h, w): the picture, or its tiles, or the frames of a clip
    length  positions that its features will take, known before they are computed
    kind    "image" or "video"
    size    (width, height) of the original picture, where the layout of its features depends on it
    block   (rows, cols) of the tiles of the last scale (dynamic-S2)
    """

    pixels: Tensor
    length: int
    kind: str = "image"
    size: tuple[int, int] | None = None
    block: tuple[int, int] | None = None

    @property
    def key(self) -> Hashable:
        """Equal for equal content and layout: tells whether a cache holds this very medium."""
        return digest(self.pixels), self.length, self.kind, self.size, self.block
