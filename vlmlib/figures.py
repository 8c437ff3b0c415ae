"""Figures for notebooks: matplotlib or Pillow in, an HTML figure with caption and alt text out.

No pyplot: nothing is registered globally, and a figure appears exactly where it is returned.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's colours: told apart by colour-blind readers, on white as on dark grey.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
SKY, YELLOW, PINK, GREY = "#56B4E9", "#E69F00", "#CC79A7", "#6B6B6B"
PALETTE = (BLUE, ORANGE, GREEN, SKY, YELLOW, PINK, GREY)


@dataclass(frozen=True, slots=True)
class Shown:
    """A finished picture with its words: shown by Jupyter, and on GitHub without running."""

    png: bytes
    caption: str
    alt: str
    width: int

    @property
    def img(self) -> str:
        data = base64.b64encode(self.png).decode()
        return (
            f'<img alt="{html.escape(self.alt)}" width="{self.width}" style="max-width:100%" '
            f'src="data:image/png;base64,{data}">'
        )

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        caption = html.escape(self.caption)
        return {
            "text/plain": f"Figure: {self.caption}",
            "text/html": f"<figure>{self.img}<figcaption>{caption}</figcaption></figure>",
        }


def show(
    content: Figure | Image.Image, *, caption: str, alt: str, width: int | None = None
) -> Shown:
    """Wrap a matplotlib figure or a picture; `width` is in pixels on the page.

    `caption` says what to see in it, in a full sentence; `alt` says what is there, for those who
    cannot see it. Both must be given.
    """
    if not caption.strip() or not alt.strip():
        raise ValueError("a figure needs a caption and an alt text")
    if isinstance(content, Figure):
        return Shown(png_of(content), caption, alt, width or int(content.get_figwidth() * 100))
    buffer = io.BytesIO()
    content.save(buffer, format="PNG", optimize=True)
    return Shown(buffer.getvalue(), caption, alt, width or content.width)


def png_of(figure: Figure) -> bytes:
    """Rendered at 150 dots an inch, without any window or global state."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def axes(width: float = 7.0, height: float = 2.6, *, columns: int = 1, **labels: str):
    """A figure of `width` x `height` inches with one pair of axes, or an array of `columns` pairs.

    `labels` go to `Axes.set` of each. Returns (Figure, Axes or array of Axes).
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    panes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in panes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.set(**labels)
    return figure, panes[0] if columns == 1 else panes


def latency(
    first: float, steps: Sequence[float], *, width: float = 7.0, height: float = 2.4
) -> Figure:
    """Milliseconds per token: the first, which waits for picture and prompt, and every later one.

    `first` and `steps` are in seconds, as in a chunk's `timing`.
    """
    figure, ax = axes(width, height, xlabel="token of the answer", ylabel="ms")
    ax.bar([1], [1e3 * first], color=ORANGE, label="first: picture, prompt and sampling")
    ax.bar(range(2, len(steps) + 2), [1e3 * s for s in steps], color=BLUE, label="one decode step")
    ax.set_xlim(0.3, max(len(steps) + 1, 10) + 0.7)
    ax.set_ylim(0, 1.1e3 * max([first, *steps]) or 1)
    ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return figure
