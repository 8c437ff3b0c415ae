"""Write notebooks/README.md, the illustrated map of the course: `python tools/draw_map.py`.

All of it is taken from the notebooks: titles and times from their metadata, what leads to what from
the links in their cards, the pictures from their saved outputs.
"""

from __future__ import annotations

import html
import io
import json
import re
import textwrap
from base64 import b64decode, b64encode
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
LANES = {
    "What a picture becomes": ("00", "01", "02", "03", "04", "05", "09"),
    "How an answer comes": ("06", "07", "08", "10"),
    "What makes it fast": ("11", "12"),
    "Large models, small models": ("13", "14", "15"),
}
BOX, GAP = (122, 126), 13  # pixels: width and height of a box, and from one to the next
LANE, WIDTH = BOX[1] + 44, 7 * (BOX[0] + GAP) + GAP
PICTURE = 66  # the height of its picture

OPENING = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" \
font-family="Helvetica, Arial, sans-serif">
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" \
orient="auto"><path d="M0 0 8 4 0 8z" fill="#444444"/></marker></defs>"""

PAGE = """# The course, as a map

<!-- written by tools/draw_map.py from the notebooks themselves -->

![{alt}](map.svg)

Begin with [00](00_start_here.ipynb); after it each can be opened on its own. An arrow leads from
what helps to know first. All together take about {hours:.0f} hours, exercises included.

| notebook | time | hardware | you will learn |
|---|---|---|---|
{rows}
"""
ROW = "| [{s.number} · {s.title}]({s.file}) | {s.minutes} min | {s.hardware} | {s.learn} |"


@dataclass(frozen=True, slots=True)
class Stop:
    """A notebook on the map."""

    file: str
    title: str
    minutes: int
    hardware: str
    learn: str
    after: tuple[str, ...]  # numbers of the notebooks that its card names as helpful before
    picture: bytes  # a PNG file

    @property
    def number(self) -> str:
        return self.file[:2]


def stop(path: Path) -> Stop:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    about = dict(notebook["metadata"]["vlmlib"])
    card = "".join(notebook["cells"][0]["source"])
    (before,) = re.findall(r"\*\*Before you start\*\*(.*)", card)
    outputs = [o for c in notebook["cells"] for o in c.get("outputs", ())]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    shown = pictures[about.pop("picture", 0)]
    png = b64decode("".join(shown["data"]["image/png"]))
    after = tuple(re.findall(r"\]\((\d\d)_", before))
    return Stop(path.name, after=after, picture=_thumbnail(png), **about)


def _thumbnail(png: bytes) -> bytes:
    """Twice as many pixels as are shown, for fine screens."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture = ImageOps.pad(picture, (2 * BOX[0] - 16, 2 * PICTURE), color="white")
    buffer = io.BytesIO()
    picture.quantize(64).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def draw(stops: dict[str, Stop]) -> str:
    """The map as SVG: a lane for each part of the course, boxes in it, arrows between them."""
    lanes = {name: [n for n in numbers if n in stops] for name, numbers in LANES.items()}
    lanes = {name: numbers for name, numbers in lanes.items() if numbers}
    corners = {
        number: (GAP + column * (BOX[0] + GAP), 32 + row * LANE)
        for row, numbers in enumerate(lanes.values())
        for column, number in enumerate(numbers)
    }
    parts = [OPENING.format(width=WIDTH, height=len(lanes) * LANE)]
    for row, name in enumerate(lanes):
        top, fill = row * LANE, ("#EEF4F9", "#FBF4EC")[row % 2]
        parts.append(f'<rect y="{top}" width="{WIDTH}" height="{LANE}" fill="{fill}"/>')
        parts.append(_text(GAP, top + 21, name, 14, "#3C3C3C", "bold"))
    parts += [_box(stops[number], *corner) for number, corner in corners.items()]
    parts += [
        _arrow(corners[before], corner)
        for number, corner in corners.items()
        for before in stops[number].after
        if before in corners and before != "00"  # which is before all of them
    ]
    return "\n".join([*parts, "</svg>\n"])


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    """To the box beside, over those between, or to another lane."""
    (x, y), (to_x, to_y), (w, h) = start, end, BOX
    if y == to_y and 0 < to_x - x < 2 * w:
        path = f"M{x + w} {y + h / 2}H{to_x}"
    elif y == to_y:
        path = f"M{x + w / 2} {y}C{x + w / 2} {y - 20} {to_x + w / 2} {y - 20} {to_x + w / 2} {y}"
    else:
        y, to_y = (y + h, to_y) if y < to_y else (y, to_y + h)
        x, to_x, middle = x + w / 2, to_x + w / 2, (y + to_y) / 2
        path = f"M{x} {y}C{x} {middle} {to_x} {middle} {to_x} {to_y}"
    return f'<path d="{path}" fill="none" stroke="#444444" marker-end="url(#tip)"/>'


def _box(stop: Stop, x: int, y: int) -> str:
    lines = textwrap.wrap(stop.title, 18)
    under = y + PICTURE + 21
    parts = [
        f'<rect x="{x}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="5" fill="#FFFFFF" '
        'stroke="#0072B2"/>',
        f'<image x="{x + 4}" y="{y + 3}" width="{BOX[0] - 8}" height="{PICTURE}" '
        f'href="data:image/png;base64,{b64encode(stop.picture).decode()}"/>',
        _text(x + 7, under, stop.number, 14, "#0072B2", "bold"),
        _text(x + BOX[0] - 52, under, f"{stop.minutes:>3} min", 11, "#555555"),
        *(_text(x + 7, under + 16 + 14 * i, line, 12, "#111111") for i, line in enumerate(lines)),
    ]
    return "\n".join(parts)


def _text(x: float, y: float, words: str, size: int, colour: str, weight: str = "normal") -> str:
    style = f'font-size="{size}" fill="{colour}" font-weight="{weight}"'
    return f'<text x="{x}" y="{y}" {style}>{html.escape(words)}</text>'


def page(stops: dict[str, Stop]) -> str:
    """The Markdown of notebooks/README.md."""
    lanes = (
        f"{name}: {', '.join(f'{n} {stops[n].title}' for n in numbers if n in stops)}"
        for name, numbers in LANES.items()
        if any(n in stops for n in numbers)
    )
    rows = (ROW.format(s=s) for s in stops.values())
    hours = sum(s.minutes for s in stops.values()) / 60
    return PAGE.format(alt="; ".join(lanes), hours=hours, rows="\n".join(rows))


def files(folder: Path = NOTEBOOKS) -> dict[str, str]:
    """What is written into the folder of the notebooks, by name."""
    stops = {path.name[:2]: stop(path) for path in sorted(folder.glob("[0-9]*.ipynb"))}
    return {"README.md": page(stops), "map.svg": draw(stops)}


def main() -> None:
    for name, text in files().items():
        (NOTEBOOKS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
