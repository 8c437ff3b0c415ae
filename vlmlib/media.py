"""What a picture or a clip is between its file and the language model."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .errors import ShapeError, VideoError
from .fusion import digest
from .images import ImageSource
from .video import VideoSource, load_video


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """A clip in a conversation, beside its pictures and texts.

    source      a file name, the bytes of a file, or the frames as a list of pictures
    num_frames  how many frames to look at; None leaves it to the model
    bound       (start, end) in seconds of the part to look at; None is all of it
    """

    source: VideoSource | Sequence[ImageSource]
    num_frames: int | None = None
    bound: tuple[float, float] | None = None

    @property
    def is_file(self) -> bool:
        return isinstance(self.source, (str, os.PathLike, bytes))

    def frames(self, indices: Callable[[int, float], Sequence[int]]) -> list[ImageSource]:
        """The pictures that `indices(n, fps)` names, of n frames. Raises VideoError."""
        if self.is_file:
            return load_video(self.source, indices)
        frames = self.source
        if not isinstance(frames, Sequence):
            raise VideoError(
                "expected a file name, the bytes of a file or a list of frames, got "
                f"{type(frames).__name__}"
            )
        if not frames or self.bound is not None:
            raise VideoError("a list of frames must not be empty, and has no bound in seconds")
        return [frames[i] for i in indices(len(frames), 1.0)]


@dataclass(frozen=True, slots=True, eq=False)
class Medium:
    """One picture or clip, preprocessed and not yet encoded; it fills one placeholder.

    pixels  (t, 3, h, w): the picture, or its tiles, or the frames of a clip
    length  positions that its features will take, known before they are computed
    kind    "image" or "video"
    size    (width, height) of the original picture, where the layout of its features depends on it
    block   (rows, cols) of the tiles of the last scale (dynamic-S2)
    regions (t, 4): the part of the original that each tile or frame shows, as (left, top, right,
            bottom) with the original from 0 to 1; None where only pixel values are known
    """

    pixels: Tensor
    length: int
    kind: str = "image"
    size: tuple[int, int] | None = None
    block: tuple[int, int] | None = None
    regions: Tensor | None = None

    @property
    def shown(self) -> Tensor:
        """`regions`. Raises ShapeError where they are not known."""
        if self.regions is None:
            raise ShapeError("pixel values do not tell what they show: use media of `prepare`")
        return self.regions

    @property
    def key(self) -> Hashable:
        """Equal for equal content and layout: tells whether a cache holds this very medium."""
        return digest(self.pixels), self.length, self.kind, self.size, self.block


def check_kinds(media: Mapping[str, Any]) -> None:
    """Raise ShapeError for media of a kind that there is not."""
    if unknown := sorted(map(str, set(media) - {"image", "video"})):
        raise ShapeError(f"media must be under 'image' and 'video', got {unknown}")
