"""Figures for notebooks: matplotlib or Pillow in, a picture with caption and alt text out.

No pyplot: nothing is registered globally, and a figure appears exactly where it is returned.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .course import visible

if TYPE_CHECKING:
    from .decoding import TokenTrace

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
    content: Figure | Image.Image,
    *,
    caption: str,
    alt: str,
    width: int | None = None,
    colours: int | None = None,
) -> Shown:
    """Wrap a matplotlib figure or a picture; `width` is in pixels on the page.

    `caption` says what to see in it, in a full sentence; `alt` says what is there, for those who
    cannot see it. Both must be given. `colours`, up to 256, is how many are kept: a photograph in
    64 colours takes a quarter of the space, and hardly anyone sees it. By default a figure keeps
    256 and a picture all; 0 keeps all of a figure too, where colours tell something.
    """
    if not caption.strip() or not alt.strip():
        raise ValueError("a figure needs a caption and an alt text")
    if isinstance(content, Figure):
        png = png_of(content, 256 if colours is None else colours)
        width = width or int(content.get_figwidth() * 100)
    else:
        png, width = _saved(content), width or content.width
        png = _reduced(png, colours) if colours else png
    return Shown(png, caption, alt, width)


def _saved(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _reduced(png: bytes, colours: int) -> bytes:
    none, few = Image.Dither.NONE, Image.Quantize.MAXCOVERAGE  # keeps colours of small areas
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=none)
    if colours < 256:  # of 256 the best few are found at once, of a photograph's in many seconds
        picture = picture.convert("RGB").quantize(colours, method=few, kmeans=3, dither=none)
    return _saved(picture)


def png_of(figure: Figure, colours: int = 256) -> bytes:
    """Rendered at 150 dots an inch, in so many colours (0: all), without any window or global
    state. In 256 it takes less than half the space, and looks the same.
    """
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return _reduced(buffer.getvalue(), colours) if colours else buffer.getvalue()


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


def step_times(result: Mapping[str, Any], *, width: float = 7.0) -> Figure:
    """Milliseconds per token of every contender that `vlmlib.bench` measured, with quartiles, and
    how long it takes only to read weights and cache as fast as the machine copies.
    """
    steps = result["steps"]
    figure, ax = axes(width, 0.9 + 0.45 * len(steps), xlabel="ms per token")
    for row, (name, step) in enumerate(steps.items()):
        middle, low, high = (1e3 * step[key] for key in ("median", "low", "high"))
        bound = 1e3 * step["bytes"] / result["copy_bandwidth"]
        ours = name.startswith("vlmlib")
        ax.barh(row, middle, color=BLUE if ours else ORANGE, height=0.62)
        ax.plot([low, high], [row, row], color="black", lw=1.2)
        ax.plot([bound, bound], [row - 0.36, row + 0.36], color="black", lw=2.5)
        ax.text(max(high, bound), row, f"  {middle:.3g}", va="center")
    ax.set_yticks(range(len(steps)), list(steps))
    ax.set_xlim(0, 1.15 * max(1e3 * step["high"] for step in steps.values()))
    ax.plot([], [], color="black", lw=2.5, label="to read weights and cache once, at copy speed")
    ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    ax.invert_yaxis()
    return figure


def accuracy(evaluation: Mapping[str, Any], *, width: float = 7.0) -> Figure:
    """How often every model that `vlmlib.tiny.evaluate` measured reads small print, against the
    visual tokens of a picture: their mean and range; shares with 95 % intervals (Wilson's).
    """
    read = {name: m["print"] for name, m in evaluation.items() if "read_print" in _kinds(m)}
    labels = {"xlabel": "visual tokens of a picture", "ylabel": "small print read right, %"}
    figure, ax = axes(width, 2.8, **labels, ylim=(-5, 107))
    for number, (name, part) in enumerate(read.items()):
        asked, tokens = part["kinds"]["read_print"], part["tokens"]
        share, mean = asked["right"], tokens["mean"]
        low, high = _interval(share, asked["n"])
        across = [[mean - tokens["min"]], [tokens["max"] - mean]]
        up = [[100 * (share - low)], [100 * (high - share)]]
        words = {"label": f"{name}, {share:.1%}", "color": PALETTE[number % len(PALETTE)]}
        ax.errorbar(mean, 100 * share, up, across, "o", capsize=3, **words)
    for chance in {part["chance"]["read_print"] for part in read.values()}:
        ax.axhline(100 * chance, color=GREY, ls="--", lw=1, label=f"by chance, {chance:.1%}")
    ax.set_xlim(0, 1.1 * max((part["tokens"]["max"] for part in read.values()), default=1))
    ax.legend(frameon=False, loc="center left")
    return figure


def _kinds(measured: Mapping[str, Any]) -> Mapping[str, Any]:
    return measured.get("print", {}).get("kinds", {})


def _interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share seen in `n` tries; also right near 0 and 1."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return min(share, middle - half), max(share, middle + half)  # rounding apart, they enclose it


def distribution(
    texts: Sequence[str],
    own: Sequence[float],
    drawn: Sequence[float],
    counts: Sequence[int] | None = None,
    *,
    width: float = 7.0,
) -> Figure:
    """Tokens with the model's own probability (grey) and the one they are drawn with (blue).

    One entry a token, the best first; a token that cannot be drawn is marked "never". `counts`, how
    often each was drawn, are shown as shares of all draws.
    """
    rows = range(len(texts))
    figure, ax = axes(width, 0.27 * len(texts) + 0.8, xlabel="probability", xlim=(0, 1.1))
    bars = [ax.barh(rows, own, height=0.8, color="#D5D5D5", label="the model's own")]
    bars.append(ax.barh(rows, drawn, height=0.44, color=BLUE, label="drawn with"))
    shares = [0.0] * len(texts)
    if counts and (n := sum(counts)):
        shares = [c / n for c in counts]
        style = {"color": ORANGE, "mec": "white", "clip_on": False, "ls": "none"}
        bars += ax.plot(shares, rows, marker="D", label=f"share of {n:,} draws", **style)
    for row, *ends, p in zip(rows, own, shares, drawn, strict=True):
        words = f"{p:.1%}" if p else "never"
        ax.text(max(p, *ends) + 0.015, row, words, va="center", color="#404040")
    ax.set_yticks(rows, texts, family="monospace", parse_math=False)
    ax.invert_yaxis()
    ax.legend(handles=bars, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    return figure


def sureness(probability: float) -> str:
    """A colour for a token, black text on it can be read: pale where the model was sure of it."""
    pale, strong = np.array(to_rgb("#DCE9F2")), np.array(to_rgb(YELLOW))
    return to_hex(strong + probability**2 * (pale - strong))


def choices(tokens: Sequence[TokenTrace], *, least: float = 0.01, width: float = 7.0) -> Figure:
    """An answer, at least one token, as a strip in the colours of `sureness`, in as many lines of
    at most `width` inches as it takes.

    Below a token the model was not sure of stand its probability and, in grey, those of its
    alternatives that had at least `least`.
    """
    character, line, right = 5.5, 10.0, 72 * width - 8  # points, for 9 and 7.5 point letters
    cells, x, y, deepest = [], 0.0, 0.0, 0
    for token in tokens:
        others = [(t, p) for i, t, p in token.alternatives if i != token.id and p >= least]
        below = [f"{visible(text)} {_short(p)}" for text, p in others]
        own = [_short(token.probability)] if below or token.probability < 1 - least else []
        name = visible(token.text)
        size = max([character * len(name), *(0.85 * character * len(t) for t in below)]) + 5
        if x and x + size > right:
            x, y, deepest = 0.0, y + line * (deepest + 2.4), 0
        cells.append((x, y, size, name, own, below, token.probability))
        x, deepest = x + size + 2, max(deepest, len(own) + len(below))
    height, right = y + line * (deepest + 1.8), max(x + size for x, _, size, *_ in cells)
    figure = Figure(figsize=((right + 8) / 72, height / 72 + 0.08))
    ax = figure.add_axes((0.005, 0, 0.99, 1), xlim=(-1, right + 1), ylim=(height + 3, -2))
    ax.axis("off")
    for x, y, size, name, own, below, p in cells:
        ax.add_patch(Rectangle((x, y), size, 1.5 * line, color=sureness(p), lw=0))
        style = {"family": "monospace", "ha": "center", "va": "center", "parse_math": False}
        ax.text(x + size / 2, y + 0.78 * line, name, fontsize=9, color="black", **style)
        for k, text in enumerate([*own, *below]):
            colour, weight = ("black", "bold") if k < len(own) else ("#505050", "normal")
            at = y + line * (2.1 + k)
            ax.text(x + size / 2, at, text, fontsize=7.5, color=colour, weight=weight, **style)
    return figure


def _short(probability: float) -> str:
    return f"{probability:.2f}".lstrip("0")


def heat(ax: Axes, image: Image.Image, weights: Any) -> None:
    """Draw a picture in pale grey on `ax`, and over it (height, width) weights of any resolution:
    the larger, the more orange.
    """
    weights = np.asarray(weights, dtype=float).clip(min=0)
    paint = np.full((*weights.shape, 4), [*to_rgb(ORANGE), 0.9])
    paint[..., 3] *= weights / (weights.max() or 1)
    grey = 108 + 0.48 * np.asarray(image.convert("L"))[..., None].repeat(3, axis=-1)
    extent = (0, image.width, image.height, 0)
    ax.imshow(grey.round().astype(np.uint8), extent=extent)  # bytes: floats would become grainy
    ax.imshow((255 * paint).round().astype(np.uint8), extent=extent, interpolation="nearest")
    ax.axis("off")


def reuse(turns: Sequence[tuple[int, int, int]], *, width: float = 7.0) -> Figure:
    """The sequence at every turn of a conversation: its (kept, fed, drawn) positions in a row."""
    rows = range(1, len(turns) + 1)
    figure, ax = axes(width, 0.2 * max(len(turns), 4) + 0.8, xlabel="position", ylabel="turn")
    left = [0] * len(turns)
    parts = zip(*turns, strict=True) if turns else [()] * 3
    names = "kept in the cache", "fed: read anew", "drawn, one by one"
    for part, name, colour in zip(parts, names, (SKY, ORANGE, BLUE), strict=True):
        ax.barh(rows, part, left=left, height=0.8, color=colour, label=name)
        left = [a + b for a, b in zip(left, part, strict=True)]
    ax.set_ylim(max(len(turns), 4) + 0.6, 0.4)
    ax.set_xlim(0, 1.02 * max([*left, 100]))
    ax.set_yticks(rows)
    ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
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


def tiling(
    image: Image.Image, grid: tuple[int, int], *, thumbnail: bool = False, width: float = 4.8
) -> Figure:
    """On the left a picture under the borders of the (cols, rows) tiles of `grid`, on the right the
    numbered squares that they become; `thumbnail` adds the whole picture as the last one.
    """
    cols, rows = grid
    ratios = [image.width / image.height, (cols + 1.3 * thumbnail) / rows]
    height = min(max(width / sum(ratios), width / 5), 0.7 * width)
    figure = Figure(figsize=(width, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=ratios)
    _with_borders(left, image, (0, 0, image.width, image.height), grid, GREY)
    _with_borders(right, image, (0, 0, cols, rows), grid, "white")
    names = {(x, y): str(y * cols + x + 1) for y in range(rows) for x in range(cols)}
    if thumbnail:
        corner = cols + 0.3, rows / 2 - 0.5
        _with_borders(right, image, (*corner, corner[0] + 1, corner[1] + 1), (1, 1), "white")
        names[corner] = str(len(names) + 1)
        right.set(xlim=(0, cols + 1.3), ylim=(rows, 0))
    for (x, y), name in names.items():
        label = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        right.text(x + 0.09, y + 0.1, name, fontsize=6, va="top", bbox=label)
    return figure


def _with_borders(ax: Axes, image: Any, box, grid: tuple[int, int], colour: str) -> None:
    """A picture stretched to the box (left, top, right, bottom), cut into a grid by lines."""
    left, top, right, bottom = box
    ax.imshow(image, extent=(left, right, bottom, top), aspect="equal", interpolation="antialiased")
    x, y = (
        [low + i * (high - low) / n for i in range(1, n)]
        for n, low, high in zip(grid, (left, top), (right, bottom), strict=True)
    )
    for ground, lw in (("white", 3.0), (colour, 1.0)):
        ax.vlines(x, top, bottom, color=ground, lw=lw)
        ax.hlines(y, left, right, color=ground, lw=lw)
    ax.axis("off")


def timeline(
    frames: Sequence[Image.Image],
    times: Sequence[float],
    chosen: Sequence[int] | None = None,
    *,
    columns: int = 8,
    width: float = 7.0,
) -> Figure:
    """Frames of a clip in rows, each over its time in seconds.

    `chosen` are indices of frames in the order in which a model gets them: these are outlined, with
    their places in that order above them, and all others are pale.
    """
    high = frames[0].height / frames[0].width
    edge, below, above = 0.04, 0.22, 0.04 if chosen is None else 0.22
    row_height, rows = above + high + below, -(-len(frames) // columns)
    figure = Figure(figsize=(width, width / columns * rows * row_height))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, columns), ylim=(rows * row_height, 0))
    ax.set_autoscale_on(False)
    ax.axis("off")
    for i, (frame, time) in enumerate(zip(frames, times, strict=True)):
        left, top = i % columns + edge, i // columns * row_height + above
        right, bottom = left + 1 - 2 * edge, top + high * (1 - 2 * edge)
        places = [str(k) for k, j in enumerate(chosen or (), start=1) if j == i]
        pale = 0.3 if chosen is not None and not places else 1.0
        ax.imshow(frame, extent=(left, right, bottom, top), aspect="auto", alpha=pale)
        style = {"ha": "center", "va": "center", "fontsize": 8}
        at = (left + right) / 2, bottom + below / 2
        ax.text(*at, f"{time:.2f} s", color="black" if pale == 1 else GREY, **style)
        colour, lw = (ORANGE, 2.5) if places else ("#D5D5D5", 0.8)
        corner, size = (left, top), (right - left, bottom - top)
        ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, lw=lw))
        if places:
            order = ", ".join(places)
            ax.text(at[0], top - above / 2, order, color=ORANGE, weight="bold", **style)
    return figure


def context_bars(tokens: Mapping[str, int], context: int, *, width: float = 7.0) -> Figure:
    """How much of a context of so many positions each of some pictures takes; what does not fit
    stands out.
    """
    figure, ax = axes(width, 0.55 + 0.42 * len(tokens), xlabel="positions of the context")
    names, counts = list(tokens), list(tokens.values())
    ax.barh(names, [context] * len(names), color="#DCE9F2", height=0.62)
    ax.barh(names, [min(n, context) for n in counts], color=BLUE, height=0.62)
    ax.barh(names, [max(n - context, 0) for n in counts], left=context, color=ORANGE, height=0.62)
    for row, n in enumerate(counts):
        ax.text(n + 0.01 * context, row, f"{n:,}  ({n / context:.0%})", va="center")
    ax.axvline(context, color=GREY, lw=1.5)
    ax.set_xlim(0, 1.18 * max(context, *counts))
    ax.invert_yaxis()
    return figure


def principal_colours(features: Any) -> np.ndarray:
    """(..., c) features -> (..., 3) colours: how far each lies along the three directions in which
    they differ most, as red, green and blue between 0 and 1. The colours of one call compare.
    """
    features = np.asarray(features, dtype=float)
    flat = features.reshape(-1, features.shape[-1])
    flat = flat - flat.mean(axis=0)
    along = flat @ np.linalg.svd(flat, full_matrices=False)[2][:3].T
    along *= np.sign(along[abs(along).argmax(axis=0), range(3)])  # a direction has two ends
    reach = np.quantile(abs(along), 0.97, axis=0).clip(1e-9)
    return (along / reach / 2 + 0.5).clip(0, 1).reshape(*features.shape[:-1], 3)


def scales(
    image: Image.Image,
    grids: Sequence[tuple[int, int]],
    maps: Sequence[Any],
    *,
    tile: int,
    box: Sequence[float] | None = None,
    width: float = 7.0,
) -> Figure:
    """A picture at several scales: above, as sharp as it is there, under the borders of its
    (rows, cols) tiles of `tile` pixels a side; below, its (h, w, c) features in colours.

    box   (left, top, right, bottom) of a place, the picture reaching from 0 to 1: it is outlined,
          and below it the patches that it touches
    """
    size, whole = (image.width, image.height), (0, 0, image.width, image.height)
    height = min(2 * width / len(grids) * image.height / image.width, width) + 0.2
    figure = Figure(figsize=(width, height), layout="constrained")
    panes = figure.subplots(2, len(grids), squeeze=False).T
    flat = np.concatenate([np.asarray(m).reshape(-1, m.shape[-1]) for m in maps])
    ends = np.cumsum([m.shape[0] * m.shape[1] for m in maps])
    coloured = np.split(principal_colours(flat), ends[:-1])
    for (above, below), (rows, cols), m, colours in zip(panes, grids, maps, coloured, strict=True):
        seen = image.resize((cols * tile, rows * tile), Image.Resampling.BICUBIC)
        _with_borders(above, seen, whole, (cols, rows), GREY)
        above.set_title(f"{seen.width} × {seen.height} pixels")
        h, w, _ = m.shape
        _with_borders(below, colours.reshape(h, w, 3), whole, (1, 1), GREY)
        if box is not None:
            _outline(above, box, size)
            left, top, right, bottom = touched(box, h, w)
            _outline(below, (left / w, top / h, right / w, bottom / h), size)
    return figure


def touched(box: Sequence[float], rows: int, cols: int) -> tuple[int, int, int, int]:
    """Which patches of a grid are touched by a box (left, top, right, bottom) from 0 to 1: the
    first column and row, and those behind the last.
    """
    left, top, right, bottom = np.asarray(box) * (cols, rows, cols, rows)
    return floor(left + 1e-3), floor(top + 1e-3), ceil(right - 1e-3), ceil(bottom - 1e-3)


def _outline(ax: Axes, box: Sequence[float], size: tuple[float, float]) -> None:
    """A frame around a box, 0 to 1, of something of a size; visible on any ground."""
    left, top, right, bottom = np.asarray(box) * (*size, *size)
    for colour, width in (("white", 4), ("black", 1.5)):
        frame = {"fill": False, "edgecolor": colour, "linewidth": width, "clip_on": False}
        ax.add_patch(Rectangle((left, top), right - left, bottom - top, **frame))
