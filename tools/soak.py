"""Use vlmlib for hours: `python tools/soak.py --minutes 120 --out soak.json`.

Random streams, stops, turns, pictures, clips and mistakes on every shipped model, in one process;
its memory is read every few seconds. It must be flat: the median of the last quarter may not be
more than ROOM above that of the quarter before. Writes the readings as JSON and, beside them, a
figure as PNG; exits with 1 if memory is not flat.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter

import psutil
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import vlmlib  # noqa: E402
from vlmlib.figures import axes, png_of  # noqa: E402

ROOM = 16e6
"""Bytes by which the last quarter's memory may be above the third's. One forgotten key/value cache
of the smallest shipped model takes more than 1 MB, and there are several streams a second.
"""

FEATURES = 1 << 20
"""Bytes of features that each model may keep: so few that they are full after some pictures. At the
usual 256 MiB a model, random pictures fill them for hours, which looks like a leak and is none.
"""

READINGS = 240
"""In all, however long it takes."""

WORDS = ("What", "is", "left", "of", "the", "red", "circle?", "<image>", "{}", "😀", "None", "of")


@dataclass(slots=True)
class Soak:
    """What was done and what it took. `seconds` and `bytes` are the readings."""

    models: list[str]
    seed: int
    machine: str = f"{platform.system()} {platform.machine()}, torch {torch.__version__}"
    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    done: dict[str, int] = field(default_factory=dict)

    def read(self, seconds: float) -> None:
        gc.collect()
        self.seconds.append(round(seconds, 2))
        self.bytes.append(psutil.Process().memory_info().rss)

    @property
    def growth(self) -> float:
        """Bytes from the median of the third quarter to that of the last."""
        n = len(self.bytes) // 4
        return median(self.bytes[-n:]) - median(self.bytes[-2 * n : -n]) if n else 0.0

    @property
    def is_flat(self) -> bool:
        return self.growth <= ROOM


class User:
    """Does one random thing after the other with a model."""

    def __init__(self, model: vlmlib.VisionLanguageModel, rng: random.Random):
        self.model, self.rng = model, rng
        model.feature_cache.limit = FEATURES
        self.chat = vlmlib.Chat(model)
        self.pictures = sorted((vlmlib.DATA / "images").glob("*.*g"))
        self.clips = sorted((vlmlib.DATA / "videos").glob("*.mp4"))

    def act(self) -> str:
        """What was done, or the error that it led to."""
        acts = (
            self.stream,
            self.stop,
            self.open,
            self.turn,
            self.turn,
            self.edit,
            self.clip,
            self.err,
        )
        act = self.rng.choice(acts)
        try:
            act()
        except vlmlib.VlmError as e:
            if isinstance(e, vlmlib.ContextLengthError):
                self.chat = vlmlib.Chat(self.model)
            return type(e).__name__
        return act.__name__

    # ---- what to say ----

    def text(self) -> str:
        return " ".join(self.rng.choices(WORDS, k=self.rng.randint(0, 20)))

    def picture(self) -> Path | Image.Image:
        if self.rng.random() < 0.5:
            return self.rng.choice(self.pictures)
        size = self.rng.randint(1, 900), self.rng.randint(1, 900)
        return Image.new("RGB", size, tuple(self.rng.choices(range(256), k=3)))

    def params(self) -> vlmlib.GenParams:
        rng = self.rng
        return vlmlib.GenParams(
            temp=rng.choice((0.0, 0.7, 1.5)),
            top_k=rng.choice((0, 1, 40)),
            top_p=rng.choice((0.5, 1.0)),
            repeat_penalty=rng.choice((1.0, 1.3)),
            n_predict=rng.randint(0, 24),
            seed=rng.choice((None, 1)),
            stop=rng.choice(((), ("the", " a "), ("\n",))),
        )

    def begun(self, parts) -> object:
        cache = self.rng.choice((None, self.model.new_cache()))
        trace = self.rng.choice((None, 0, 3))
        return vlmlib.stream(self.model, parts, self.params(), cache=cache, trace=trace)

    # ---- what to do ----

    def stream(self) -> None:
        pictures = [self.picture() for _ in range(self.rng.randint(0, 2))]
        for _ in self.begun([*pictures, self.text()]):
            pass

    def stop(self) -> None:
        chunks = self.begun([self.picture(), self.text()])
        for _ in range(self.rng.randint(1, 5)):
            next(chunks, None)
        chunks.close()

    def open(self) -> None:
        """A stream that nobody reads, or not to its end."""
        chunks = self.begun([self.picture(), self.text()])
        if self.rng.random() < 0.5:
            next(chunks, None)

    def turn(self) -> None:
        first = [self.picture()] if not self.chat.messages or self.rng.random() < 0.1 else []
        chunks = self.chat.ask([*first, self.text()], self.params())
        for _ in chunks:
            if self.rng.random() < 0.05:
                chunks.close()

    def edit(self) -> None:
        """Change what was said earlier, or begin anew."""
        if not self.chat.messages or self.rng.random() < 0.2:
            self.chat = vlmlib.Chat(self.model)
        else:
            i = self.rng.randrange(len(self.chat.messages))
            self.chat.messages[i] = (self.chat.messages[i][0], (self.text(),))
        self.turn()

    def clip(self) -> None:
        """As a video where the model knows these, else its frames as pictures."""
        path, n = self.rng.choice(self.clips), self.rng.randint(1, 4)
        if self.model.family in ("internvl", "nvila"):
            parts = [vlmlib.Video(path, num_frames=n)]
        else:
            parts = vlmlib.load_video(path, lambda total, _: vlmlib.uniform_indices(total, n))
        for _ in self.begun([*parts, self.text()]):
            pass

    def err(self) -> None:
        """Something that must fail, and leave nothing behind."""
        fails = self.rng.choice(
            (
                lambda: vlmlib.load_image(self.rng.randbytes(1000)),
                lambda: self.model.stream_prompt("<image>" * 3, None, self.params()),
                lambda: vlmlib.stream(self.model, "x " * 5000),
                lambda: vlmlib.stream(self.model, [self.picture(), "\ud83d"]),
            )
        )
        fails()
        raise AssertionError("what must fail did not")


def soak(minutes: float, seed: int = 0) -> Soak:
    """Use all shipped models in turn."""
    rng = random.Random(seed)
    names = vlmlib.shipped_models()
    users = [User(vlmlib.load(name, device="cpu"), rng) for name in names]
    result, total, start = Soak(names, seed), 60 * minutes, perf_counter()
    while (now := perf_counter() - start) < total:
        if now >= len(result.bytes) * total / READINGS:
            result.read(now)
        act = rng.choice(users).act()
        result.done[act] = result.done.get(act, 0) + 1
    result.read(now)
    return result


def draw(result: Soak):
    """Memory over time."""
    minutes = [s / 60 for s in result.seconds]
    figure, ax = axes(7, 3, xlabel="minutes", ylabel="memory of the process, MB")
    ax.plot(minutes, [b / 1e6 for b in result.bytes], color="#0072B2")
    ax.set_ylim(0, 1.2 * max(result.bytes) / 1e6)
    ax.axvspan(minutes[-1] / 2, minutes[-1], color="#EEEEEE", zorder=0)
    return figure


def write(result: Soak, out: Path) -> None:
    summary = {"growth_bytes": result.growth, "is_flat": result.is_flat}
    out.write_text(json.dumps(summary | asdict(result)) + "\n")
    out.with_suffix(".png").write_bytes(png_of(draw(result)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = soak(options.minutes, options.seed)
    write(result, options.out)
    steps = ", ".join(f"{name} {n}" for name, n in sorted(result.done.items()))
    print(f"{', '.join(result.models)}: {steps}")
    print(
        f"{len(result.bytes)} readings, {result.bytes[0] / 1e6:.0f} MB at first, "
        f"{result.bytes[-1] / 1e6:.0f} MB at last, {result.growth / 1e6:+.1f} MB from the third "
        f"quarter to the last: {'flat' if result.is_flat else 'NOT FLAT'}"
    )
    sys.exit(not result.is_flat)


if __name__ == "__main__":
    main()
