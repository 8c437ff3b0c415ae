"""What the notebooks share besides the subject itself: tables, checks, the map of the course."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a header; a table in a notebook, aligned text on a console."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def __str__(self) -> str:
        cells = [[str(c) for c in row] for row in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(c.ljust(n) for c, n in zip(row, widths, strict=True)) for row in cells]
        return "\n".join(line.rstrip() for line in [*lines, self.caption] if line)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def row(cells: Iterable[Any], tag: str) -> str:
            style = "text-align:left;vertical-align:top"
            shown = (c.html if isinstance(c, Link) else html.escape(str(c)) for c in cells)
            return "<tr>" + "".join(f'<{tag} style="{style}">{c}</{tag}>' for c in shown) + "</tr>"

        body = "".join(row(r, "td") for r in self.rows)
        style = "caption-side:bottom;text-align:left;white-space:nowrap"
        words = html.escape(self.caption)
        caption = f'<caption style="{style}">{words}</caption>' if words else ""
        head = f"<thead>{row(self.header, 'th')}</thead>"
        return f"<table>{caption}{head}<tbody>{body}</tbody></table>"


@dataclass(frozen=True, slots=True)
class Link:
    """A table cell that leads to a file beside the notebook."""

    text: str
    target: str

    def __str__(self) -> str:
        return self.text

    @property
    def html(self) -> str:
        return f'<a href="{html.escape(self.target)}">{html.escape(self.text)}</a>'


@dataclass(frozen=True, slots=True)
class Strip:
    """Tokens in a row, each over its id; `marked` ids stand out. Long rows are broken.

    A table, so that it stays readable where colours are dropped, as on GitHub.
    """

    ids: Sequence[int]
    texts: Sequence[str]
    marked: Sequence[int] = ()
    caption: str = ""
    columns: int = 16

    def __str__(self) -> str:
        return " ".join(f"{text!r}:{i}" for i, text in zip(self.ids, self.texts, strict=True))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def cell(i: int, content: str) -> str:
            colours = "#E69F00" if i in self.marked else "#DCE9F2"
            style = (
                f"background:{colours};color:black;padding:1px 5px;text-align:center;"
                "font-family:monospace;white-space:pre;border:1px solid white"
            )
            content = f"<b>{content}</b>" if i in self.marked else content
            return f'<td style="{style}">{content}</td>'

        lines = []
        for start in range(0, len(self.ids), self.columns):
            ids = self.ids[start : start + self.columns]
            texts = self.texts[start : start + self.columns]
            shown = [html.escape(visible(text)) for text in texts]
            above = "".join(map(cell, ids, shown))
            below = "".join(map(cell, ids, map(str, ids)))
            lines.append(f"<table><tr>{above}</tr><tr>{below}</tr></table>")
        return "".join(lines) + f"<p><em>{html.escape(self.caption)}</em></p>"


def visible(text: str) -> str:
    """The text of a token with its spaces and line breaks to be seen."""
    return text.replace("\n", "⏎").replace(" ", "␣")


def check(answer: Any, test: Callable[[Any], bool], hint: str) -> str:
    """The reader's answer against a test: not answered, right, or an AssertionError with a hint.

    An exercise starts as `...`, so that a notebook runs through before it is solved.
    """
    if answer is ...:
        return "not answered yet: put your answer in place of the ..."
    assert test(answer), f"not yet: {hint}"
    return "right"


def course_map(folder: Path = NOTEBOOKS) -> Table:
    """The notebooks that are there, with what each says of itself in its metadata."""
    rows = []
    for path in sorted(folder.glob("[0-9]*.ipynb")):
        about: Mapping = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("vlmlib", {})
        rows.append(
            (
                path.name[:2],
                Link(about.get("title", path.stem), path.name),
                f"{about.get('minutes', '?')} min",
                about.get("hardware", ""),
                about.get("learn", ""),
            )
        )
    return Table(["", "notebook", "time", "hardware", "you will learn"], rows)
