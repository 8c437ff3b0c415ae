"""Two minutes of random use leaves memory flat; `tools/soak.py` is for hours of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "tools")
    import soak

    return soak


def test_a_mistake_that_is_no_error_ends_it(soak):
    """What `err` does must raise one of vlmlib's errors: here it chooses what does nothing."""
    user = SimpleNamespace(rng=SimpleNamespace(choice=lambda mistakes: lambda: None))
    with pytest.raises(AssertionError, match="must fail"):
        soak.User.err(user)


@pytest.mark.soak
def test_two_minutes_of_it(soak, tmp_path):
    result = soak.soak(minutes=2)
    assert result.is_flat, f"memory grew by {result.growth / 1e6:.1f} MB"
    assert {"stream", "stop", "open", "turn", "edit", "clip"} < set(result.done)
    soak.write(result, tmp_path / "soak.json")
    written = json.loads((tmp_path / "soak.json").read_text())
    assert written["is_flat"] and written["bytes"] == result.bytes
    assert (tmp_path / "soak.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("megabytes", "flat"),
    [
        ([500] * 80, True),
        ([100, 400, *[500] * 78], True),  # warming up
        ([500, 540] * 40, True),  # up and down
        ([500 + i for i in range(80)], False),  # a leak
        ([500] * 60 + [600] * 20, False),  # late
    ],
)
def test_what_counts_as_flat(soak, megabytes, flat):
    result = soak.Soak([], 0, bytes=[int(1e6 * m) for m in megabytes])
    assert result.is_flat is flat
