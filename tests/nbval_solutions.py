"""Each exercise's solution, run in the notebook's own kernel: a plugin beside nbval.

Behind the cell that checks an exercise, and finds it unanswered, come two more: the solution out
of the text before the exercise, and the same check again, which must then say 'right'. What the
notebook does after that must still be what it has saved: an answered exercise breaks nothing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

import nbformat
import pytest
from nbval.plugin import IPyNbCell

SOLUTION = re.compile(r"<summary>Solution</summary>\s*```python\n(.*?)```", re.DOTALL)
CHECK = re.compile(r"^check\(", re.M)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [each for item in items for each in with_solution(item)]


def with_solution(item: pytest.Item) -> Iterator[pytest.Item]:
    """The item, and if it is the cell that checks an exercise, the two that follow from it."""
    yield item
    if not isinstance(item, IPyNbCell) or not CHECK.search(item.cell.source):
        return
    cells = item.parent.nb.cells
    before = cells[: cells.index(item.cell)]
    k = max(i for i, c in enumerate(before) if "exercise" in c.metadata.get("tags", []))
    solution = SOLUTION.search(before[k - 1].source).group(1)
    yield behind(item, IPyNbCell, "Solution", solution, check=False)
    right = nbformat.v4.new_output("execute_result", {"text/plain": "'right'"})
    yield behind(item, Solved, "Solved", item.cell.source, [right], check=True)


class Solved(IPyNbCell):
    """A check whose result counts; what it prints beside that is up to it."""

    def compare_outputs(self, test: list, ref: list) -> bool:
        return super().compare_outputs(
            [o for o in test if o.output_type == ref[0].output_type], ref
        )


def behind(item, kind, name, source, outputs=(), **options) -> IPyNbCell:
    """A cell of that kind for the same kernel, named after the item."""
    return kind.from_parent(
        item.parent,
        name=f"{name} {item.cell_num}",
        cell_num=item.cell_num,
        cell=nbformat.v4.new_code_cell(source, execution_count=1, outputs=list(outputs)),
        options=defaultdict(bool, options),
    )
