"""Videos in: which frames to look at, and those frames as pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from .checkpoint import free_memory, told
from .errors import VideoError

VideoSource = str | os.PathLike | bytes

MOST_FRAMES = 2**16
"""Of a video at once; no context holds as many."""


def span(
    bound: tuple[float, float] | None, fps: float, last: int, first: int = 0
) -> tuple[int, int]:
    """The frames at the start and end of `bound`, in seconds, and from `first` to `last`.

    Raises VideoError where that leaves nothing.
    """
    try:
        start, end = (first, last) if bound is None else (round(t * fps) for t in bound)
    except (TypeError, ValueError, OverflowError):
        raise VideoError(
            f"bound must be (start, end) in seconds, got {bound!r} at {fps} frames a second"
        ) from None
    start, end = max(first, start), min(end, last)
    if start > end:
        raise VideoError(
            f"bound {bound} at {fps} frames a second leaves no frame: "
            f"first {start}, last {end} of {last}"
        )
    return start, end


def _check_number(num: int) -> None:
    if not isinstance(num, Integral) or isinstance(num, bool) or not 1 <= num <= MOST_FRAMES:
        raise VideoError(
            f"the number of frames must be a whole number from 1 to {MOST_FRAMES}, got {num!r}"
        )


def get_index(
    bound: tuple[float, float] | None,
    fps: float,
    max_frame: int,
    first_idx: int = 0,
    num_segments: int = 32,
) -> list[int]:
    """The middle frames of `num_segments` equal parts of a video.

    bound       (start, end) in seconds, None is all of it
    max_frame   index of the last frame
    first_idx   index of the first frame that may be taken

    Raises VideoError where `bound` leaves nothing.
    Source: llm-awq:tinychat/models/internvl/media.py.
    """
    _check_number(num_segments)
    start, end = span(bound, fps, max_frame, first_idx)
    size = (end - start) / num_segments
    return [int(start + size / 2 + np.round(size * k)) for k in range(num_segments)]


def uniform_indices(n: int, num: int) -> list[int]:
    """`num` of n frames at equal distances, the first and the last included. Raises VideoError.

    Source: VILA:llava/utils/media.py.
    """
    _check_number(num)
    if n < 1:
        raise VideoError(f"cannot take {num} frame(s) out of {n}")
    return np.round(np.linspace(0, n - 1, num)).astype(int).tolist()


def load_video(
    source: VideoSource, frames: Sequence[int] | Callable[[int, float], Sequence[int]]
) -> list[Image.Image]:
    """The frames with these indices, in this order, as RGB pictures.

    source   a file name, or the bytes of a file
    frames   indices; or a function of (number of frames, frames a second) that returns them, e.g.
             lambda n, fps: uniform_indices(n, 8)

    Raises VideoError that names the source.
    """
    if not isinstance(source, (str, os.PathLike, bytes)):
        raise VideoError(
            f"expected a file name or the bytes of a file, got {type(source).__name__}"
        )
    if isinstance(source, bytes):  # as a file: decord's own way to read memory reads beyond its end
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            (path := Path(folder) / "clip").write_bytes(source)
            return _read(path, f"{len(source)} bytes", frames)
    return _read(source, os.fspath(source), frames)


def _read(path: str | os.PathLike, name: str, frames) -> list[Image.Image]:
    reader = _open(path, name)
    n = len(reader)
    chosen = frames(n, reader.get_avg_fps()) if callable(frames) else frames
    if not isinstance(chosen, (Sequence, np.ndarray)):
        raise VideoError(f"frames must be a list of numbers, got {chosen!r}")
    for i in chosen:
        if not isinstance(i, Integral) or not 0 <= i < n:
            raise VideoError(f"{name}: frame {i} was asked for, but it has {n} frames")
    if not len(chosen):
        return []
    try:
        _check_room(name, len(chosen), reader[chosen[0]].shape)
        batch = reader.get_batch(chosen)
    except VideoError:
        raise
    except Exception as e:
        raise VideoError(f"{name}: its frames cannot be decoded ({_first_line(e)})") from e
    # decord gives what the caller's thread has asked of it; its own arrays know asnumpy.
    array = batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)
    return [Image.fromarray(frame) for frame in array]  # (t, h, w, 3)


def _check_room(name: str, n: int, shape: Sequence[int]) -> None:
    """For n frames (h, w, 3), as decord has them and as pictures: it ends the process without."""
    need, free = n * shape[0] * shape[1] * (3 + 4), free_memory(torch.device("cpu"))
    if need > free:
        raise VideoError(
            f"{name}: {n} frames of {shape[1]} x {shape[0]} pixels take {told(need)}, and "
            f"{told(free)} of memory are free"
        )


def _open(path: str | os.PathLike, name: str):
    """A decord.VideoReader with at least one frame."""
    if not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else "no such file"
        raise VideoError(f"{name}: {found}, expected a video file")
    VideoReader = _decord().VideoReader
    try:
        reader = VideoReader(os.fspath(path), num_threads=1)
        if not len(reader):
            raise ValueError("it has 0 frames")
    except Exception as e:  # decord raises RuntimeError, AssertionError, DECORDError, ...
        raise VideoError(f"{name}: not a video that can be read ({_first_line(e)})") from e
    return reader


def _decord():
    try:
        import decord
    except (ImportError, OSError) as e:
        raise VideoError(
            f"videos need the package decord (decord2 on a Mac or an ARM machine): {e}"
        ) from e
    return decord


def _first_line(e: Exception) -> str:
    return next(iter(str(e).strip().splitlines()), type(e).__name__)
