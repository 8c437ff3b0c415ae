"""Figures for notebooks: matplotlib or Pillow in, a picture with caption and alt text out.

No pyplot: nothing is registered globally, and a figure appears exactly where it is returned.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

# Okabe and Ito's colours: told apart by colour-blind readers, on white as on dark grey.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
SKY, YELLOW, PINK, GREY = "#56B4E9", "#E69F00", "#CC79A7", "#6B6B6B"
PALETTE = (BLUE, ORANGE, GREEN, SKY, YELLOW, PINK, GREY)


@dataclass(frozen=True, slots=True)
class Shown:
    """A finished picture with its words, for Jupyter and for pages made of saved notebooks.

    The picture is a PNG output with its alt text in the metadata, where nbconvert looks for it; the
    caption is an output of its own, with the alt text to unfold, since JupyterLab gives pictures
    none. Not one piece of HTML, because sanitisers, as GitHub's, may drop pictures in HTML.
    """

    png: bytes
    caption: str
    alt: str
    width: int

    @property
    def img(self) -> str:
        """For HTML, as widgets show it."""
        data = base64.b64encode(self.png).decode()
        return (
            f'<img alt="{html.escape(self.alt)}" width="{self.width}" style="max-width:100%" '
            f'src="data:image/png;base64,{data}">'
        )

    def __str__(self) -> str:
        return f"Figure: {self.alt}"

    def _ipython_display_(self) -> None:
        from IPython.display import display

        picture = {"image/png": base64.b64encode(self.png).decode(), "text/plain": str(self)}
        about = {"image/png": {"alt": self.alt, "width": self.width}}
        display(picture, metadata=about, raw=True)
        words = f"<details><summary>Picture in words</summary>{html.escape(self.alt)}</details>"
        caption = f"<p><em>{html.escape(self.caption)}</em></p>{words}"
        display({"text/html": caption, "text/plain": self.caption}, raw=True)


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
    """Rendered at 150 dots an inch, in 256 colours, without any window or global state."""
    FigureCanvasAgg(figure)
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    few = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(buffer, format="PNG", optimize=True)  # less than half the size, and looks the same
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
    figure, ax = axes(width, height, xlabel="token of the answer", ylabel="ms for this token")
    ax.bar([1], [1e3 * first], color=ORANGE, label="first: picture, prompt and sampling")
    ax.bar(range(2, len(steps) + 2), [1e3 * s for s in steps], color=BLUE, label="one decode step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlim(0.3, max(len(steps) + 1, 10) + 0.7)
    ax.set_ylim(0, 1.1e3 * max([first, *steps]) or 1)
    ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return figure


def patches(ax: Axes, values: Any, rows: int, cols: int, marked: tuple[int, int], **options):
    """Draw on `ax` a picture, or (rows, cols) values, under a grid of patches; `marked` is the
    (row, column) of one that is outlined. `options` go to `imshow`, whose result is returned.
    """
    mesh = ax.imshow(values, extent=(-0.5, cols - 0.5, rows - 0.5, -0.5), **options)
    ax.set(xticks=range(cols), yticks=range(rows), xlabel="column", ylabel="row")
    ax.hlines([i - 0.5 for i in range(1, rows)], -0.5, cols - 0.5, color=GREY, lw=0.5)
    ax.vlines([i - 0.5 for i in range(1, cols)], -0.5, rows - 0.5, color=GREY, lw=0.5)
    row, column = marked
    for colour, width in (("white", 5), ("black", 2)):  # visible on any ground
        corner = column - 0.5, row - 0.5
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=width))
    return mesh
