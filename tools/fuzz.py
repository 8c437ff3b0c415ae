"""Feed broken files to vlmlib: `python tools/fuzz.py --minutes 10 --seed 0`.

Files that are right are changed in random places: bytes of pictures and clips, values and bytes of
a checkpoint's JSON files, and the headers of its weights. Whatever they are then, they must load
and answer, or raise an error of vlmlib's, in HANG seconds and without growing. Anything else is a
finding, and is kept under runs/fuzz, also by later runs, to be tried again (`--again
runs/fuzz/finding-1 ...`); with findings the exit status is 1.

A crash of a library's C code ends the process; the case that did it is the one in runs/fuzz/now.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import io
import json
import random
import shutil
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from time import perf_counter

import psutil
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import noise, tiny_llava, tiny_llava_next  # noqa: E402
from nvila_helpers import nvila  # noqa: E402
from test_internvl import tiny_internvl  # noqa: E402

import vlmlib  # noqa: E402

HANG = 10
"""Seconds that no case may take."""

GROWTH = 512e6
"""Bytes by which no case may grow the process, and all of them together neither."""

HEAD = 3000
"""Bytes of a file of weights that are changed: its header, and not only numbers."""

RUNS = ROOT / "runs" / "fuzz"
TRACE = "traceback.txt"


# ---- files that are right ----


def pictures() -> Iterator[tuple[str, bytes]]:
    rgb = noise(24, 18)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    kinds = {
        "png": (rgb, {"exif": exif}),
        "jpeg": (rgb, {"exif": exif, "progressive": True}),
        "gif": (rgb.convert("P"), {"save_all": True, "append_images": [noise(24, 18, seed=1)]}),
        "webp": (rgb, {"exif": exif}),
        "bmp": (rgb, {}),
        "tiff": (rgb, {"compression": "tiff_lzw"}),
        "ppm": (rgb, {}),
        "ico": (rgb, {}),
        "tga": (rgb, {"rle": True}),
        "jpeg2000": (rgb, {}),
        "pcx": (rgb, {}),
    }
    for kind, (image, options) in kinds.items():
        image.save(buffer := io.BytesIO(), kind, **options)
        yield f"a.{kind}", buffer.getvalue()


def clips() -> Iterator[tuple[str, bytes]]:
    for path in (ROOT / "tests" / "data" / "clip.mp4", *(ROOT / "data" / "videos").glob("*.mp4")):
        yield path.name, path.read_bytes()


# ---- how they are changed ----

EVIL = (b"", b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\1", b"%s")


def broken(data: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, overwritten, cut out, doubled or moved."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not out:
            break
        at, n = rng.randrange(len(out)), rng.choice((1, 1, 2, 4, 32, 500))
        match rng.randrange(6):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + n] = rng.randbytes(n)
            case 2:
                out[at : at + 4] = rng.choice(EVIL)
            case 3:
                del out[at : at + n]
            case 4:
                out[at:at] = out[rng.randrange(len(out)) :][:n]
            case 5:
                del out[at:]
    return bytes(out)


VALUES = (
    *(None, True, False, 0, 1, -1, 2, 7, 10**6, 10**12, -(10**12), 10**400, 0.5, 1e308, 1e-308),
    *(float("nan"), float("inf"), "", "0", "evil", "../x", "\ud83d", "\0", "{{ 1 / 0 }}"),
    "x" * 5000,
    *([], [0], [[]], {}, {"a": 1}, {"model_type": "evil"}),
)


def edited(value, rng: random.Random):
    """JSON in which some value, at any depth, is another one, missing, or somewhere else."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key, chosen = rng.choice(keys), rng.random()
        if chosen < 0.1:
            del value[key]
        elif chosen < 0.2:
            value[key] = value[rng.choice(keys)]
        else:
            value[key] = edited(value[key], rng)
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice(
            (-value, value + 1, value - 1, value * 2, value // 2, str(value), [value])
        )
    return copy.deepcopy(rng.choice(VALUES))


def broken_file(name: str, data: bytes, rng: random.Random) -> bytes:
    if not name.endswith(".json"):
        return broken(data[:HEAD], rng) + data[HEAD:]
    if rng.random() < 0.2:
        return broken(data, rng)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        value = edited(value, rng)
    return json.dumps(value).encode()


# ---- what is done with them ----


def see(data: bytes) -> None:
    image = vlmlib.load_image(data)
    assert image.mode == "RGB" and 0 not in image.size
    (medium,) = MODEL.prepare([image])
    assert medium.pixels.isfinite().all()


def watch(data: bytes) -> None:
    frames = vlmlib.load_video(data, lambda n, fps: vlmlib.uniform_indices(n, 4))
    assert len(frames) == 4 and all(f.mode == "RGB" for f in frames)


def load_and_answer(folder: Path) -> None:
    model = vlmlib.load(folder, device="cpu")
    vlmlib.memory_estimate(folder)
    vlmlib.answer(model, [noise(30, 30), "what is this?"], n_predict=2)


def of_bytes(seeds: list[tuple[str, bytes]], use: Callable[[bytes], None]):
    def case(rng: random.Random) -> tuple[Path, Callable[[], None]]:
        name, data = rng.choice(seeds)
        (path := RUNS / "now" / name).write_bytes(data := broken(data, rng))
        return path, lambda: use(data)

    return case


def of_checkpoint(folder: Path):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    changeable = [name for name in files if name.endswith((".json", ".safetensors"))]

    def case(rng: random.Random) -> tuple[Path, Callable[[], None]]:
        place = RUNS / "now" / "checkpoint"
        changed = rng.choices(changeable, k=rng.choice((1, 1, 2)))
        for name, data in files.items():
            (path := place / name).parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(broken_file(name, data, rng) if name in changed else data)
        return place, lambda: load_and_answer(place)

    return case


def cases(folder: Path) -> dict[str, Callable]:
    """Kind -> random numbers -> (what lies in runs/fuzz/now, what is done with it)."""
    models = {
        "llava": MODEL,
        "shards": MODEL,
        "llava_next": tiny_llava_next(),
        "internvl": tiny_internvl(),
        "nvila": nvila("dynamic_s2"),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    (folder / "shards" / "model.safetensors").unlink()
    MODEL.net.save_pretrained(folder / "shards", max_shard_size="100KB")
    files = {"picture": of_bytes(list(pictures()), see), "clip": of_bytes(list(clips()), watch)}
    return files | {name: of_checkpoint(folder / name) for name in models}


# ---- the watch ----


class Hang(BaseException):
    """Not an Exception: nobody may take it for a broken file."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises Hang in Python code; if that never comes back from C code, the process ends."""

    def late(*_):
        raise Hang(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def outcome(act: Callable[[], None]) -> tuple[str, str]:
    """What came of it, and the traceback of what may not be."""
    before = psutil.Process().memory_info().rss
    try:
        with limited(HANG):
            act()
        found, trace = "fine", ""
    except vlmlib.VlmError as e:
        found, trace = type(e).__name__, ""
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # Hang, and PanicException of the tokenizers' Rust code
        found, trace = f"BAD {type(e).__name__}", traceback.format_exc()
    if (grown := psutil.Process().memory_info().rss - before) > GROWTH:
        found, trace = "BAD growth", f"by {grown / 1e6:.0f} MB; {trace or found}"
    return found, trace


def fuzz(minutes: float, seed: int, kinds: list[str]) -> int:
    """Number of findings."""
    for begun in ("now", "seeds"):
        shutil.rmtree(RUNS / begun, ignore_errors=True)
    (RUNS / "now").mkdir(parents=True)
    made = cases(RUNS / "seeds")
    kinds = kinds or list(made)
    counts = {kind: Counter() for kind in kinds}
    seen, slowest, start = set(), 0.0, perf_counter()
    first = psutil.Process().memory_info().rss
    number = 0
    while perf_counter() - start < 60 * minutes:
        number += 1
        rng = random.Random(f"{seed} {number}")
        kind = rng.choice(kinds)
        shutil.rmtree(RUNS / "now")
        (RUNS / "now").mkdir()
        path, act = made[kind](rng)
        began = perf_counter()
        found, trace = outcome(act)
        slowest = max(slowest, perf_counter() - began)
        counts[kind][found] += 1
        where = "\n".join(trace.strip().splitlines()[-3:])
        if trace and where not in seen:
            seen.add(where)
            free = (RUNS / f"finding-{i}" for i in count(1))
            kept = (RUNS / "now").rename(next(place for place in free if not place.exists()))
            (RUNS / "now").mkdir()
            (kept / TRACE).write_text(trace)
            print(
                f"{kept.name}, case {number}: {kind}, {path.name}: {found}\n{where}\n", flush=True
            )
    grown = psutil.Process().memory_info().rss - first
    for kind, counter in counts.items():
        words = ", ".join(f"{name} {n}" for name, n in counter.most_common())
        print(f"{kind}: {sum(counter.values())} cases: {words}")
    print(f"slowest {slowest:.1f} s, memory {grown / 1e6:+.0f} MB, {len(seen)} different findings")
    if grown > GROWTH:
        print(f"BAD growth: memory grew by more than {GROWTH / 1e6:.0f} MB")
    return len(seen) + (grown > GROWTH)


def again(path: Path) -> int:
    """Whether a file or a checkpoint's folder, or what a finding has kept of one, is a finding."""
    if (path / TRACE).exists():
        (path,) = (kept for kept in path.iterdir() if kept.name != TRACE)
    if path.is_dir():
        act = lambda: load_and_answer(path)  # noqa: E731
    else:
        use = watch if path.suffix == ".mp4" else see
        act = lambda: use(path.read_bytes())  # noqa: E731
    found, trace = outcome(act)
    print(f"{path}: {found}\n{trace}")
    return bool(trace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", default=[], help="only this, see the summary")
    parser.add_argument("--again", type=Path, nargs="+", default=[], help="cases that were kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.enable()
    warnings.simplefilter("ignore")  # of Pillow's there are thousands
    if options.again:
        sys.exit(sum(map(again, options.again)) > 0)
    sys.exit(fuzz(options.minutes, options.seed, options.kind) > 0)


MODEL = tiny_llava()

if __name__ == "__main__":
    main()
