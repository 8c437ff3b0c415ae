"""What `tools/fuzz.py` finds is kept, and can be tried again."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def fuzz(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "tools")
    import fuzz

    monkeypatch.setattr(fuzz, "RUNS", tmp_path)
    return fuzz


def fails(data: bytes) -> None:
    raise RuntimeError("not one of vlmlib's errors")


def find(fuzz, monkeypatch) -> list[str]:
    """What is kept after a run in which every case is the same finding."""
    seeds = {"picture": fuzz.of_bytes([("a.png", b"a picture" * 99)], fails)}
    monkeypatch.setattr(fuzz, "cases", lambda folder: seeds)
    assert fuzz.fuzz(minutes=1e-3, seed=0, kinds=[]) == 1
    return sorted(path.name for path in fuzz.RUNS.glob("finding-*"))


def test_findings_are_kept_from_run_to_run(fuzz, monkeypatch):
    assert find(fuzz, monkeypatch) == ["finding-1"]
    first = (fuzz.RUNS / "finding-1" / "a.png").read_bytes()
    assert find(fuzz, monkeypatch) == ["finding-1", "finding-2"]
    assert (fuzz.RUNS / "finding-1" / "a.png").read_bytes() == first


def test_a_finding_is_tried_again_by_its_folder_or_its_file(fuzz, monkeypatch):
    find(fuzz, monkeypatch)
    finding = fuzz.RUNS / "finding-1"
    for path in (finding, finding / "a.png"):
        assert not fuzz.again(path), "by now it is an ImageError, and fine"
        with monkeypatch.context() as patch:
            patch.setattr(fuzz, "see", fails)
            assert fuzz.again(path)


def test_a_kept_checkpoint_is_found_in_its_finding(fuzz, monkeypatch):
    (place := fuzz.RUNS / "finding-12" / "checkpoint").mkdir(parents=True)
    (fuzz.RUNS / "finding-12" / "traceback.txt").write_text("")
    loaded = []
    monkeypatch.setattr(fuzz, "load_and_answer", loaded.append)
    fuzz.again(fuzz.RUNS / "finding-12"), fuzz.again(place)
    assert loaded == [place, place]
