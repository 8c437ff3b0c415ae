"""What every notebook must have.

That the saved outputs are what the cells give, and that the solutions solve the exercises, is
nbval's part: `make test` runs it beside this.
"""

from __future__ import annotations

import html
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbval_solutions import SOLUTION

from vlmlib.course import check

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
UNANSWERED = "not answered yet"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
IMG = re.compile(r"<img\s[^>]*>")  # not InternVL's token <img>
CAPTION = re.compile(
    r"<p><em>(.{15,})</em></p><details><summary>Picture in words</summary>(.{15,})</details>"
)
MINUTES = re.compile(r"(\d+) minutes?(?:\.\*|\)\*)")  # behind an objective or an exercise's title


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.stem)
def notebook(request):
    nb = nbformat.read(request.param, as_version=4)
    nb.path = request.param
    return nb


def code_cells(nb):
    return [c for c in nb.cells if c.cell_type == "code"]


def output_texts(nb):
    for cell in code_cells(nb):
        for output in cell.outputs:
            data = output.get("data", {"text/plain": output.get("text", "")})
            yield from (v for v in data.values() if isinstance(v, str))


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_card_and_metadata_agree(notebook):
    about, first = notebook.metadata["vlmlib"], notebook.cells[0].source
    assert set(about) - {"picture"} == {"title", "minutes", "hardware", "learn"}
    assert first.startswith(f"# {notebook.path.name[:2]} · {about['title']}\n")
    for row in ("You will learn", "Before you start", "Hardware"):
        assert f"**{row}**" in first
    assert f"| **Time** | {about['minutes']} minutes |" in first


def test_the_map_shows_the_notebooks_as_they_are(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    draw_map = importlib.import_module("draw_map")
    pictures = re.compile(r"base64,[^\"]*")  # another machine may compress them differently
    on_map = [number for lane in draw_map.LANES.values() for number in lane]
    assert {path.name[:2] for path in NOTEBOOKS} <= set(on_map)
    for name, text in draw_map.files().items():
        saved = (ROOT / "notebooks" / name).read_text(encoding="utf-8")
        assert pictures.sub("", saved) == pictures.sub("", text), f"{name}: run tools/draw_map.py"


def test_cells_are_short(notebook):
    for cell in code_cells(notebook):
        lines = cell.source.splitlines()
        assert 0 < len(lines) <= 25, cell.source
        assert max(map(len, lines)) <= 88, cell.source


def test_saved_outputs_are_complete_and_clean(notebook):
    cells = code_cells(notebook)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert "widgets" not in notebook.metadata
    assert notebook.path.stat().st_size < 1.5e6
    for cell in cells:
        assert not [o for o in cell.outputs if o.output_type == "error"]
        assert not [o for o in cell.outputs if o.get("name") == "stderr"]
    for text in output_texts(notebook):
        assert not re.search(r"(?<![\w./])/(home|root|work|Users|tmp)/", text), text[:500]


def test_every_picture_has_alt_text_and_every_figure_a_caption(notebook):
    """Every picture is a PNG output, followed by its caption, a sentence, and its alt text."""
    pictures = 0
    for text in [*output_texts(notebook), *(c.source for c in notebook.cells)]:
        assert not IMG.search(text) and "![](" not in text, "use vlmlib.figures.show"
    for cell in code_cells(notebook):
        for output, after in zip(cell.outputs, [*cell.outputs[1:], {}], strict=False):
            if "image/png" in output.get("data", {}):
                pictures += 1
                assert len(output.metadata["image/png"]["alt"]) > 15
                caption, words = CAPTION.fullmatch(after["data"]["text/html"]).groups()
                assert caption[0].isupper() and caption.rstrip("”").endswith((".", "?", "!"))
                assert html.unescape(words) == output.metadata["image/png"]["alt"]
    assert pictures


def test_minutes_add_up(notebook):
    """The card's time is that of all sections and exercises, to a fifth."""
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    parts = [int(m) for m in MINUTES.findall(text)]
    assert abs(sum(parts) - notebook.metadata["vlmlib"]["minutes"]) <= 0.2 * sum(parts), parts


def test_links_lead_somewhere(notebook):
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            continue
        for target in LINK.findall(cell.source):
            if not target.startswith(("https://", "#")):
                assert (notebook.path.parent / target.split("#")[0]).exists(), target


def test_exercises_start_unanswered_and_have_hint_and_solution(notebook):
    saved = [t for t in output_texts(notebook) if UNANSWERED in t]
    exercises = [c for c in code_cells(notebook) if "exercise" in c.metadata.get("tags", [])]
    assert len(exercises) >= 3 and len(saved) == len(exercises)
    for cell in exercises:
        before = notebook.cells[notebook.cells.index(cell) - 1].source
        assert "<summary>Hint</summary>" in before and SOLUTION.search(before)


def nbval(*arguments, cwd=ROOT):
    plugin = "-p", "tests.nbval_solutions"
    assert " ".join(plugin) in (ROOT / "Makefile").read_text()  # without it nothing is solved
    command = [sys.executable, "-m", "pytest", *plugin, "--nbval", "-q"]
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([*command, *arguments], cwd=cwd, env=path, capture_output=True, text=True)
    return run.stdout


def test_every_exercise_is_checked_unanswered_and_solved():
    exercises = [
        cell
        for path in NOTEBOOKS
        for cell in code_cells(nbformat.read(path, as_version=4))
        if "exercise" in cell.metadata.get("tags", [])
    ]
    collected = nbval("--collect-only", "notebooks").splitlines()
    for name in ("Solution", "Solved"):
        assert sum(f"::{name} " in line for line in collected) == len(exercises)


@pytest.mark.parametrize("solution, passed", [("answer = 3", 5), ("answer = 4", 4), ("1 / 0", 2)])
def test_only_a_right_solution_passes(tmp_path, solution, passed):
    text = f"<details><summary>Solution</summary>\n\n```python\n{solution}\n```\n</details>"
    checks = "from vlmlib.course import check\ncheck(answer, lambda a: a == 3, 'no')"
    nb = nbformat.v4.new_notebook()
    exercise = nbformat.v4.new_code_cell("answer = ...", execution_count=1)
    exercise.metadata["tags"] = ["exercise"]
    shown = nbformat.v4.new_output(
        "execute_result", {"text/plain": repr(check(..., bool, "no"))}, execution_count=2
    )
    checked = nbformat.v4.new_code_cell(checks, execution_count=2, outputs=[shown])
    last = nbformat.v4.new_code_cell("assert answer is not ...", execution_count=3)
    nb.cells = [nbformat.v4.new_markdown_cell(text), exercise, checked, last]
    nbformat.write(nb, tmp_path / "exercise.ipynb")
    end = nbval("exercise.ipynb", cwd=tmp_path).splitlines()[-1]
    assert f"{passed} passed" in end, end
    assert ("failed" in end) == (passed < 5)


def test_a_wrong_answer_is_not_right():
    assert check(..., lambda a: False, "think again").startswith(UNANSWERED)
    assert check(3, lambda a: a == 3, "think again") == "right"
    with pytest.raises(AssertionError, match="think again"):
        check(4, lambda a: a == 3, "think again")
