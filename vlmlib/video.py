"""Videos in: which frames to look at, and those frames as pictures."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import VideoError

VideoSource = str | os.PathLike | bytes


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
    if num_segments < 1:
        raise VideoError(f"num_segments must be at least 1, got {num_segments}")
    start, end = (first_idx, max_frame) if bound is None else (round(t * fps) for t in bound)
    start, end = max(first_idx, start), min(end, max_frame)
    if start > end:
        raise VideoError(
            f"bound {bound} at {fps} frames a second leaves no frame: "
            f"first {start}, last {end} of {max_frame}"
        )
    size = (end - start) / num_segments
    return [int(start + size / 2 + np.round(size * k)) for k in range(num_segments)]


def uniform_indices(n: int, num: int) -> list[int]:
    """`num` of n frames at equal distances, the first and the last included.

    Source: VILA:llava/utils/media.py.
    """
    if n < 1 or num < 1:
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
    name = f"{len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    reader = _open(source, name)
    n = len(reader)
    indices = list(frames(n, reader.get_avg_fps()) if callable(frames) else frames)
    for i in indices:
        if not 0 <= i < n:
            raise VideoError(f"{name}: frame {i} was asked for, but it has {n} frames")
    if not indices:
        return []
    try:
        batch = reader.get_batch(indices)
    except Exception as e:
        raise VideoError(f"{name}: its frames cannot be decoded ({_first_line(e)})") from e
    # decord gives what the caller's thread has asked of it; its own arrays know asnumpy.
    array = batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)
    return [Image.fromarray(frame) for frame in array]  # (t, h, w, 3)


def _open(source: VideoSource, name: str):
    """A decord.VideoReader with at least one frame."""
    if not isinstance(source, bytes) and not Path(source).is_file():
        found = "a folder" if Path(source).is_dir() else "no such file"
        raise VideoError(f"{name}: {found}, expected a video file")
    VideoReader = _decord().VideoReader
    try:
        data = io.BytesIO(source) if isinstance(source, bytes) else name
        reader = VideoReader(data, num_threads=1)
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
