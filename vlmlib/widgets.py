"""Panels for JupyterLab: drive a stream or a chat with buttons and sliders, and stop it any time;
choose the frames of a clip; try sizes of pictures and ways of sampling, and see at once what they
change; or look at each token of an answer, and send the answer another way.

A stream runs in one thread of its own, because a callback that loops would keep the kernel from
hearing the Stop button. The thread looks at an event between tokens, writes text at most fifteen
times a second, and shows its own errors: nobody else would.
"""

from __future__ import annotations

import contextvars
import html
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log2, prod
from pathlib import Path
from time import perf_counter
from typing import Any

import ipywidgets as w
import torch
from PIL import Image, ImageOps, ImageStat
from torch import Tensor
from transformers import PretrainedConfig

from .budget import image_tokens
from .cache import KVCache, common_prefix
from .chat import Chat, Message
from .chessboard import merge_chessboard
from .course import visible
from .decoding import Chunk, TokenTrace
from .errors import ImageError, ShapeError
from .figures import (
    Shown,
    axes,
    context_bars,
    distribution,
    heat,
    latency,
    reuse,
    scales,
    show,
    sureness,
    tiling,
    timeline,
    touched,
)
from .images import ImageSource, load_image
from .internvl import NUM_IMAGE_TOKEN
from .loading import load
from .media import Medium, Video
from .microscope import attention, heat_map, picture_weights
from .model import VisionLanguageModel
from .nvila import NVILA
from .nvila_checkpoint import NVILAConfig
from .sampling import GenParams, Sampler, check_finite, entropy
from .streaming import TimeStats, stream
from .tiling import dynamic_grid, dynamic_tiles, s2_grids
from .video import get_index, load_video, uniform_indices

TEXT_EVERY = 1 / 15
PLOT_EVERY = 1 / 2
UPLOADED = "your own picture"
LABELS = {"description_width": "initial"}
Pictures = Mapping[str, Path | Image.Image] | Sequence[Path]


def _status_html(message: str, *, error: bool = False) -> str:
    style = ' style="color:var(--jp-error-color1,#B34700);font-weight:bold"' if error else ""
    return f'<span role="status"{style}>{html.escape(message)}</span>'


def _sampling(options: Mapping[str, Any]) -> tuple[w.Widget, w.Widget, w.Widget, w.Widget]:
    """Sliders for temperature, top-p, top-k and repetition penalty, all off."""
    return (
        w.FloatSlider(0.0, min=0, max=2, step=0.1, description="temperature", **options),
        w.FloatSlider(1.0, min=0.05, max=1, step=0.05, description="top-p", **options),
        w.IntSlider(0, min=0, max=100, description="top-k (0 is off)", **options),
        w.FloatSlider(1.0, min=1, max=2, step=0.05, description="repetition penalty", **options),
    )


def _loaded_pictures(pictures: Pictures) -> dict[str, Image.Image]:
    if not isinstance(pictures, Mapping):
        pictures = {Path(p).stem: p for p in pictures}
    return {name: load_image(p) for name, p in pictures.items()}


def _asking(
    pictures: Mapping[str, Image.Image], questions: Sequence[str], options: Mapping[str, Any]
) -> tuple[w.Dropdown, w.Dropdown, w.Text]:
    """Fields for a picture, an example of a question, and the question, which takes the example."""
    question = w.Text(questions[0], description="question", **options)
    examples = w.Dropdown(options=list(questions), description="examples", **options)
    examples.observe(lambda change: setattr(question, "value", change["new"]), "value")
    picture = w.Dropdown(options=list(pictures), description="picture", **options)
    return picture, examples, question


class StreamPanel(w.VBox):
    """Ask a model about a picture: picture, question and sampling on top, the answer below.

    models     a vlmlib model, or names for `vlmlib.load`; a named one is loaded when first asked
    pictures   names with files or Pillow pictures; a list of files is named after them
    questions  offered in the question field; any other can be typed
    pace       tokens a second at most, so that eyes can follow; 0 is as fast as it goes. Waiting
               is left out of all timings.

    `start` and `stop` are the buttons; `wait(seconds)` waits for the stream to end.
    """

    def __init__(
        self,
        models: VisionLanguageModel | Sequence[VisionLanguageModel | str],
        pictures: Pictures,
        questions: Sequence[str],
        *,
        pace: int = 15,
        max_tokens: int = 128,
    ):
        models = [models] if isinstance(models, (str, VisionLanguageModel)) else models
        self._models = {m if isinstance(m, str) else m.name or m.family: m for m in models}
        self._pictures = self._opened(pictures)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._build_controls(questions, pace, max_tokens)
        self._build_output()
        self._picture_changed()
        super().__init__([self._controls, self._buttons, self.status, self.text, self.plot])

    _opened = staticmethod(_loaded_pictures)

    # ---- what the reader sees ----

    def _build_controls(self, questions: Sequence[str], pace: int, max_tokens: int) -> None:
        wide = w.Layout(width="25rem")
        choice = {"style": LABELS, "layout": wide}
        self.model = w.Dropdown(options=list(self._models), description="model", **choice)
        self.picture, self.examples, self.question = _asking(self._pictures, questions, choice)
        self.upload = w.FileUpload(accept="image/*", description="your own picture", layout=wide)
        slider = {**choice, "continuous_update": False}
        sliders = self.temp, self.top_p, self.top_k, self.repeat_penalty = _sampling(slider)
        self.max_tokens = w.IntSlider(
            max_tokens, min=1, max=512, description="most new tokens", **slider
        )
        self.seed = w.IntText(0, description="seed", **choice)
        self.pace = w.IntSlider(
            pace, min=0, max=100, description="tokens/s shown (0: no limit)", **slider
        )
        self.preview = w.HTML()
        self.picture.observe(self._picture_changed, "value")
        self.upload.observe(self._uploaded, "value")
        asked = [self.model, self.picture, self.upload, self.examples, self.question]
        rest = [self.max_tokens, self.seed, self.pace]
        self._controls = w.HBox(
            [
                self.preview,
                w.VBox([*asked, *sliders, *rest]),
            ],
            layout=w.Layout(flex_flow="row wrap", align_items="flex-start", grid_gap="0 1.5rem"),
        )

    def _build_output(self) -> None:
        self.start = w.Button(description="Stream", button_style="primary", icon="play")
        self.stop = w.Button(description="Stop", icon="stop", disabled=True)
        self.start.on_click(self._start)
        self.stop.on_click(lambda _: self._stopping.set())
        self._buttons = w.HBox([self.start, self.stop])
        self.status = w.HTML("ready")
        self.text = w.HTML(layout=w.Layout(min_height="4.5em"))
        self.plot = w.HTML(self._plot_html(0.0, []))
        self._say("")

    def _picture_changed(self, _=None) -> None:
        image = self._pictures[self.picture.value]
        small = image.copy()
        small.thumbnail((260, 260))
        alt = f"the chosen picture: {self.picture.value}"
        self.preview.value = show(small, caption=alt, alt=alt).img

    def _uploaded(self, change) -> None:
        if not change["new"]:
            return
        try:
            self._pictures[UPLOADED] = load_image(bytes(change["new"][0]["content"]))
        except ImageError as e:
            self._status(f"{change['new'][0]['name']}: {e}", error=True)
            return
        self.picture.options = list(self._pictures)
        self.picture.value = UPLOADED
        self._picture_changed()

    def _status(self, message: str, *, error: bool = False) -> None:
        self.status.value = _status_html(message, error=error)

    def _say(self, text: str) -> None:
        self.text.value = (
            '<div style="font-size:115%;line-height:1.4;white-space:pre-wrap" aria-label="answer">'
            f"{html.escape(text) or '&nbsp;'}</div>"
        )

    def _plot_html(self, first: float, steps: Sequence[float]) -> str:
        alt = f"milliseconds per token of the answer, {len(steps) + bool(first)} tokens so far"
        return show(latency(first, steps), caption=alt, alt=alt, width=640).img

    # ---- the stream ----

    def params(self) -> GenParams:
        """What the sliders say now."""
        return GenParams(
            temp=self.temp.value,
            top_p=self.top_p.value,
            top_k=self.top_k.value,
            repeat_penalty=self.repeat_penalty.value,
            n_predict=self.max_tokens.value,
            seed=self.seed.value,
        )

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the running stream to end; False if it did not within `seconds`."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def _start(self, _) -> None:
        if not self.wait(0):
            return
        self._stopping.clear()
        self.start.disabled, self.stop.disabled = True, False
        self._say("")
        self._status("reading the picture and the question ...")
        # With the context copied, what the thread shows belongs to this panel's cell.
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._run,), daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._stream(self._pictures[self.picture.value], self.question.value, self.params())
        except Exception as e:  # a thread's exception reaches nobody: show it here
            self._status(f"{type(e).__name__}: {e}", error=True)
        finally:
            self.start.disabled, self.stop.disabled = False, True

    def _loaded(self) -> VisionLanguageModel:
        """The chosen model; only the stream's own thread calls this."""
        model = self._models[self.model.value]
        if isinstance(model, str):
            self._status(f"loading {model} ...")
            model = self._models[self.model.value] = load(model)
        return model

    def _chunks(self, image: Image.Image, question: str, params: GenParams) -> Iterator[Chunk]:
        return stream(self._loaded(), [image, question], params)

    def _stream(self, image: Image.Image, question: str, params: GenParams) -> None:
        chunks = self._chunks(image, question, params)
        chunk, times, text_at, plot_at = None, [], 0.0, perf_counter()
        while not self._stopping.is_set():
            start = perf_counter()
            if (new := next(chunks, None)) is None:
                break
            chunk, now = new, perf_counter()
            if chunk["finish_reason"] is None:
                times.append(now - start)
            if now - text_at > TEXT_EVERY:
                self._say(chunk["text"])
                text_at = now
            if now - plot_at > PLOT_EVERY:
                self._report("streaming", chunk, times)
                plot_at = now
            if self.pace.value:
                self._stopping.wait(1 / self.pace.value)
        chunks.close()
        self._finish(chunk, times)

    def _finish(self, chunk: dict | None, times: list[float]) -> None:
        if chunk is None:
            return self._status("stopped before the first token")
        self._say(chunk["text"])
        ending = {"stop": "the model ended its answer", "length": "the token limit was reached"}
        return self._report(ending.get(chunk["finish_reason"], "stopped"), chunk, times)

    def _report(self, doing: str, chunk: dict, times: list[float]) -> None:
        self._status(f"{doing}; {self._stats(chunk, times)}")
        if times:
            self.plot.value = self._plot_html(times[0], times[1:])

    def _stats(self, chunk: dict, times: list[float]) -> TimeStats:
        stats = TimeStats(context_tokens=chunk["usage"]["prompt_tokens"])
        stats.context_times, stats.step_times = times[:1], times[1:]
        return stats


class ChatPanel(StreamPanel):
    """Talk with a model about a picture; every turn feeds only what the cache does not hold.

    Parameters as of StreamPanel. Another picture takes the place of the old one in the same
    conversation, so everything behind it is read again; another model begins a new conversation.

    `chat` is the conversation, `turns` the positions (kept, fed, drawn) of every turn.
    """

    def __init__(self, *args, **options):
        self.chat: Chat | None = None
        self.turns: list[tuple[int, int, int]] = []
        self._earlier: list[Message] = []
        self._asked = ""
        super().__init__(*args, **options)
        self.start.description, self.start.icon = "Send", "paper-plane"
        wide = w.Layout(width="auto")
        self.new = w.Button(description="New conversation", icon="trash", layout=wide)
        self.new.on_click(self._begin)
        self._buttons.children = [self.start, self.stop, self.new]

    def _begin(self, _) -> None:
        if self.wait(0):
            self.chat, self.turns, self._earlier, self._asked = None, [], [], ""
            self._say("")
            self.plot.value = self._plot_html(0.0, [])
            self._status("a new conversation")

    def _start(self, _) -> None:
        if self.wait(0):
            self._earlier = list(self.chat.messages) if self.chat else []
            self._asked = self.question.value
        super()._start(_)

    def _chunks(self, image: Image.Image, question: str, params: GenParams) -> Iterator[Chunk]:
        model = self._loaded()
        if self.chat is None or self.chat.model is not model:
            self.chat, self.turns, self._earlier = Chat(model), [], []
        self._turn, self._held = len(self.turns), list(self.chat.cache.content)
        if not self.chat.messages:
            return self.chat.ask([image, question], params)
        role, (_, *texts) = self.chat.messages[0]
        self.chat.messages[0] = (role, (image, *texts))
        return self.chat.ask(question, params)

    def _stats(self, chunk: Chunk, times: list[float]) -> str:
        usage = chunk["usage"]
        fed = usage["prompt_tokens"] - (kept := self._kept(usage["prompt_tokens"]))
        self.turns[self._turn :] = [(kept, fed, usage["completion_tokens"])]
        return f"{kept} tokens kept, {TimeStats(fed, times[:1], times[1:])}"

    def _kept(self, prompt_tokens: int) -> int:
        """What of the prompt was not fed; a stopped stream does not say, so compare the caches."""
        return common_prefix(self._held, self.chat.cache.content[: prompt_tokens - 1])

    def _say(self, text: str) -> None:
        said = [(role, [p for p in parts if isinstance(p, str)]) for role, parts in self._earlier]
        if self._asked:
            said += [("user", [self._asked]), ("assistant", [text])]
        turns = "".join(
            f'<p style="margin:0 0 .3em"><b>{html.escape(role)}:</b> {html.escape(text)}</p>'
            for role, text in ((role, " ".join(texts)) for role, texts in said)
        )
        self.text.value = (
            '<div role="log" aria-label="conversation" style="font-size:115%;line-height:1.4;'
            f'white-space:pre-wrap">{turns or "&nbsp;"}</div>'
        )

    def _plot_html(self, first: float, steps: Sequence[float]) -> str:
        kept, fed, drawn = (sum(t[i] for t in self.turns) for i in range(3))
        alt = (
            f"the positions of {len(self.turns)} turns: in all {kept} kept in the cache, {fed} fed "
            f"and {drawn} drawn"
        )
        return show(reuse(self.turns), caption=alt, alt=alt, width=640).img


@dataclass(frozen=True, slots=True)
class _Film:
    """All frames of a clip."""

    frames: list[Image.Image]
    fps: float

    @property
    def times(self) -> list[float]:
        """When each frame is shown, in seconds."""
        return [i / self.fps for i in range(len(self.frames))]


def _film(source: Path) -> _Film:
    rates: list[float] = []

    def every(n: int, fps: float) -> range:
        rates.append(fps)
        return range(n)

    return _Film(load_video(source, every), *rates)


def _middles(n: int, num: int) -> list[int]:
    return get_index(None, 1.0, n - 1, num_segments=num)


class VideoPanel(StreamPanel):
    """Ask a model about a clip: how many of its frames it gets, which, and in what order.

    clips   names with files; a list of files is named after them. All their frames are kept, so
            they should be short
    frames  how many the model gets at first

    Other parameters as of StreamPanel. `indices` are the frames that the model gets.
    """

    RULES = {
        "middles of equal parts (InternVL)": _middles,
        "equal steps, both ends (NVILA)": uniform_indices,
    }
    ORDERS = {
        "as filmed": list,
        "backwards": lambda indices: indices[::-1],
        "shuffled": lambda indices: random.Random(0).sample(indices, len(indices)),
    }

    def __init__(
        self,
        models: VisionLanguageModel | Sequence[VisionLanguageModel | str],
        clips: Mapping[str, Path] | Sequence[Path],
        questions: Sequence[str],
        *,
        frames: int = 8,
        **options,
    ):
        self._first_count = frames
        super().__init__(models, clips, questions, **options)
        controls, *below = self.children
        self.children = [controls, self.timeline, *below]

    @staticmethod
    def _opened(clips: Mapping[str, Path] | Sequence[Path]) -> dict[str, _Film]:
        if not isinstance(clips, Mapping):
            clips = {Path(c).stem: c for c in clips}
        return {name: _film(clip) for name, clip in clips.items()}

    def _build_controls(self, questions: Sequence[str], pace: int, max_tokens: int) -> None:
        super()._build_controls(questions, pace, max_tokens)
        choice = {"style": LABELS, "layout": w.Layout(width="25rem")}
        slider = {**choice, "continuous_update": False}
        self.picture.description = "clip"
        self.frame = w.IntSlider(0, min=0, description="look at frame", **slider)
        self.count = w.IntSlider(
            self._first_count, min=1, max=16, description="frames for the model", **slider
        )
        self.rule = w.Dropdown(options=list(self.RULES), description="which", **choice)
        self.order = w.Dropdown(options=list(self.ORDERS), description="order", **choice)
        self.timeline = w.HTML()
        self.frame.observe(self._frame_changed, "value")
        for control in (self.model, self.count, self.rule, self.order):
            control.observe(self._frames_changed, "value")
        shown = [self.model, self.picture, self.frame, self.count, self.rule, self.order]
        asked = [self.examples, self.question, self.pace]
        self._controls.children = [self.preview, w.VBox([*shown, *asked])]

    @property
    def indices(self) -> list[int]:
        frames = self._pictures[self.picture.value].frames
        rule, order = self.RULES[self.rule.value], self.ORDERS[self.order.value]
        return order(rule(len(frames), self.count.value))

    def _video(self, film: _Film) -> Video:
        frames = [film.frames[i] for i in self.indices]
        return Video(frames, len(frames))

    def _picture_changed(self, _=None) -> None:
        film = self._pictures[self.picture.value]
        self.frame.max, self.frame.value = len(film.frames) - 1, 0
        self._frame_changed()
        self._frames_changed()

    def _frame_changed(self, _=None) -> None:
        film, i = self._pictures[self.picture.value], self.frame.value
        small = film.frames[i].copy()
        small.thumbnail((260, 260))
        alt = f"{self.picture.value}, frame {i}, at {film.times[i]:.2f} s"
        self.preview.value = show(small, caption=alt, alt=alt).img

    def _frames_changed(self, _=None) -> None:
        """Exceptions of an observer reach nobody: shown here."""
        try:
            film, indices = self._pictures[self.picture.value], self.indices
            cost, model = "", self._models[self.model.value]
            if not isinstance(model, str):  # otherwise it is loaded when it is first asked
                positions = sum(m.length for m in model.prepare([self._video(film)]))
                cost = f"; they take {positions} positions"
            order = ", ".join(map(str, indices))
            words = f"{len(indices)} of {len(film.frames)} frames in this order: {order}{cost}"
            figure = timeline(film.frames, film.times, indices)
            self.timeline.value = show(figure, caption=words, alt=words, width=640).img
            self._status(words)
        except Exception as e:
            self._status(f"{type(e).__name__}: {e}", error=True)

    def _chunks(self, film: _Film, question: str, params: GenParams) -> Iterator[Chunk]:
        return stream(self._loaded(), [self._video(film), question], params)


class SamplingPanel(w.VBox):
    """What the next token is drawn from: sliders change it, bars show it at once.

    rows  by name: the texts of all tokens, their (v,) scores, and the ids that were seen before
    bars  this many best tokens have a bar of their own, all others share one

    `draw` is the button, `counts` how often each token was drawn since the last change.
    """

    def __init__(
        self, rows: Mapping[str, tuple[Sequence[str], Tensor, Sequence[int]]], *, bars: int = 10
    ):
        for name, (texts, scores, _) in rows.items():
            if scores.shape != (len(texts),):
                raise ShapeError(f"{name}: {len(texts)} texts, scores {tuple(scores.shape)}")
            check_finite(scores[None], step=0)
        self._rows, self._bars = rows, bars
        choice = {"style": LABELS, "layout": w.Layout(width="27rem")}
        self.row = w.Dropdown(options=list(rows), description="scores", **choice)
        sliders = self.temp, self.top_p, self.top_k, self.repeat_penalty = _sampling(choice)
        self.temp.max, self.temp.value, self.top_k.max = 3, 1, 20
        orders = [("temperature, top-p, top-k", "tinychat"), ("temperature, top-k, top-p", "hf")]
        self.order = w.Dropdown(options=orders, description="order", **choice)
        self.draw = w.Button(description="Draw 100", icon="random")
        self.draw.on_click(self._draw)
        self.status = w.HTML()
        self.plot = w.HTML()
        for control in (controls := [self.row, *sliders, self.order]):
            control.observe(self._changed, "value")
        self._changed()
        super().__init__([*controls, self.draw, self.status, self.plot])

    def params(self) -> GenParams:
        """What the sliders say now."""
        return GenParams(
            temp=self.temp.value,
            top_p=self.top_p.value,
            top_k=self.top_k.value,
            repeat_penalty=self.repeat_penalty.value,
            order=self.order.value,
            seed=0,
        )

    def _changed(self, _=None) -> None:
        _, scores, seen = self._rows[self.row.value]
        self._sampler = Sampler(self.params())
        self._scores = self._sampler.scores(scores[None].cpu(), torch.tensor([seen]).long())
        self.counts = torch.zeros(len(scores), dtype=torch.long)
        self._show()

    def _draw(self, _) -> None:
        ids = self._sampler.draw(self._scores.expand(100, -1))
        self.counts += torch.bincount(ids[:, 0], minlength=len(self.counts))
        self._show()

    def _show(self) -> None:
        texts, scores, _ = self._rows[self.row.value]
        own = scores.float().cpu().softmax(-1)
        (drawn,) = self._sampler.probabilities(self._scores)
        best = own.argsort(descending=True, stable=True)
        named, others = best[: self._bars], best[self._bars :]
        labels = [repr(texts[i]) for i in named]
        columns = [column[named].tolist() for column in (own, drawn, self.counts)]
        if len(others):
            labels.append(f"{len(others)} others")
            for column, values in zip(columns, (own, drawn, self.counts), strict=True):
                column.append(values[others].sum().item())
        words = ", ".join(f"{x} {p:.1%}" for x, p in zip(labels, columns[1], strict=True))
        count, bits = int((drawn > 0).sum()), entropy(drawn)
        possible = f"{count} of {len(drawn)} tokens can be drawn, {bits:.2f} bits"
        self.status.value = f'<span role="status">{possible}</span>'
        picture = show(distribution(labels, *columns), caption=possible, alt=words, width=640)
        self.plot.value = picture.img


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the answers in a MicroscopePanel have in common."""

    image: Image.Image
    prompt: str
    media: list[Medium]
    cache: KVCache


class MicroscopePanel(w.VBox):
    """Ask about a picture, look at any token of the answer, and send the answer another way.

    Every token is a button, pale where the model was sure. The chosen one shows where the model
    looked, and what it considered: buttons too, that take its place and let the model go on.

    pictures    names with files or Pillow pictures; a list of files is named after them
    questions   offered in the question field; any other can be typed
    best        how many tokens are offered at each position
    max_tokens  the most that the model writes in one go

    `tokens` are the answer's TokenTraces, `chosen` is the position that is looked at, `answers` the
    probability of every answer so far.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        pictures: Pictures,
        questions: Sequence[str],
        *,
        best: int = 5,
        max_tokens: int = 64,
    ):
        self._model, self._best, self._max_tokens = model, best, max_tokens
        self._pictures = _loaded_pictures(pictures)
        self._asked: _Asked | None = None
        self.tokens: list[TokenTrace] = []
        self.chosen = 0
        self.answers: dict[str, float] = {}
        self._build_controls(questions)
        self._ask()
        wrap = w.Layout(flex_flow="row wrap", align_items="flex-start", grid_gap="0 1rem")
        asked = w.VBox([self.picture, self.examples, self.question, self.ask])
        considered = w.VBox([self.layer, w.HTML("considered here:"), *self.alternatives])
        below = w.HBox([self.figure, considered], layout=wrap)
        super().__init__([asked, self.strip, self.status, below, self.said])

    def _build_controls(self, questions: Sequence[str]) -> None:
        wide = {"style": LABELS, "layout": w.Layout(width="25rem")}
        narrow = {"style": LABELS, "layout": w.Layout(width="14rem")}
        self.picture, self.examples, self.question = _asking(self._pictures, questions, wide)
        self.ask = w.Button(description="Ask", button_style="primary", icon="question")
        self.ask.on_click(self._guarded(self._ask))
        n = self._model.text_config.num_hidden_layers
        layers = [(f"layer {i + 1} of {n}", i) for i in range(n)]
        self.layer = w.Dropdown(options=layers, value=n - 1, description="attention of", **narrow)
        self.layer.observe(self._guarded(self._show), "value")
        self.alternatives = [w.Button(layout=narrow["layout"]) for _ in range(self._best)]
        for k, button in enumerate(self.alternatives):
            button.on_click(self._guarded(self._branch, k))
        self._buttons: list[w.Button] = []  # never replaced: who is on one with Tab stays there
        self.strip = w.HBox(layout=w.Layout(flex_flow="row wrap"))
        self.status, self.figure, self.said = w.HTML(), w.HTML(), w.HTML()

    def _guarded(self, act: Callable, *arguments) -> Callable:
        """For callbacks, whose exceptions reach nobody: shown here."""

        def run(_) -> None:
            try:
                act(*arguments)
            except Exception as e:
                self.status.value = _status_html(f"{type(e).__name__}: {e}", error=True)

        return run

    # ---- answers ----

    def _ask(self) -> None:
        model, image = self._model, self._pictures[self.picture.value]
        prompt = model.chat_prompt([image, self.question.value])
        self._go_on(_Asked(image, prompt, model.prepare([image]), model.new_cache()), [], 0)

    def _branch(self, k: int) -> None:
        """Put the k-th alternative in the place of the chosen token, and let the model go on."""
        token = self.tokens[self.chosen]
        id, text, p = token.alternatives[k]
        other = replace(token, id=id, text=text, probability=p, drawn_from=p)
        self._go_on(self._asked, [*self.tokens[: self.chosen], other], self.chosen)

    def _go_on(self, asked: _Asked, begun: list[TokenTrace], chosen: int) -> None:
        """If it fails, everything stays as it was."""
        new: list[TokenTrace] = []
        if not begun or begun[-1].id not in self._model.stop_token_ids:
            chunks = self._model.stream_prompt(
                asked.prompt,
                asked.media,
                GenParams.greedy(n_predict=self._max_tokens),
                answer=[token.id for token in begun],
                cache=asked.cache,
                start_pos=len(asked.cache),
                chunk_prefilling=True,
                trace=self._best,
            )
            new = [token for chunk in chunks for token in chunk["tokens"]]
        if asked is not self._asked:
            self._asked, self.answers = asked, {}
        self.tokens = begun + new
        text = self._model.tokenizer.decode([t.id for t in self.tokens], skip_special_tokens=True)
        self.answers[text.strip()] = prod(token.probability for token in self.tokens)
        rows = "".join(
            f"<tr><td>{html.escape(text)}</td><td>{p:.1%}</td></tr>"
            for text, p in self.answers.items()
        )
        head = '<tr style="text-align:left"><th>answers so far</th><th>probability</th></tr>'
        self.said.value = f'<table aria-label="answers">{head}{rows}</table>'
        self._choose(chosen)

    # ---- one token ----

    def _choose(self, i: int) -> None:
        self.chosen = i
        before = [token.id for token in self.tokens[:i]]
        model, prompt, media = self._model, self._asked.prompt, self._asked.media
        weights = attention(model, prompt, media, before).mean(dim=1)
        self._weights = torch.cat(picture_weights(model, prompt, media, weights), dim=-1)
        _, placed = model.read(prompt, media)
        self._boxes = torch.cat([model.boxes(m) for m in placed])  # (n, 4) for (layers, n) weights
        self._show()

    def _show(self) -> None:
        token = self.tokens[self.chosen]
        self._show_strip()
        for k, button in enumerate(self.alternatives):
            button.layout.display = "" if k < len(token.alternatives) else "none"
            if k < len(token.alternatives):
                id, text, p = token.alternatives[k]
                button.description, button.disabled = f"{visible(text)}  {p:.1%}", id == token.id
                button.style.button_color, button.style.text_color = sureness(p), "black"
        weights = self._weights[self.layer.value]
        small = self._asked.image.copy()
        small.thumbnail((320, 320))
        figure, ax = axes(3.2, 3.2 * small.height / small.width)
        heat(ax, small, heat_map(weights, self._boxes, *small.size))
        known = ~self._boxes.isnan().any(dim=-1)
        left, top, right, bottom = self._boxes[known][weights[known].argmax()].tolist()
        alt = (
            f"the picture, orange where layer {self.layer.value + 1} looked for this token: mostly "
            f"at {(left + right) / 2:.0%} from the left and {(top + bottom) / 2:.0%} from the top"
        )
        self.figure.value = show(figure, caption=alt, alt=alt).img
        self.status.value = _status_html(
            f"token {self.chosen + 1} of {len(self.tokens)}, {visible(token.text)}: probability "
            f"{token.probability:.1%}, surprise {-log2(max(token.probability, 1e-38)):.2f} bits, "
            f"entropy {token.entropy:.2f} bits; {weights.sum():.0%} of the layer's attention is on "
            "the picture"
        )

    def _show_strip(self) -> None:
        while len(self._buttons) < len(self.tokens):
            button = w.Button(layout=w.Layout(width="auto", margin="1px"))
            button.on_click(self._guarded(self._choose, len(self._buttons)))
            self._buttons.append(button)
        for i, (button, token) in enumerate(zip(self._buttons, self.tokens, strict=False)):
            button.description = visible(token.text)
            button.tooltip = f"token {i + 1}: {token.probability:.1%}"
            button.style.button_color = sureness(token.probability)
            button.style.text_color, button.style.font_family = "black", "monospace"
            button.style.text_decoration = "underline" if token.probability < 0.9 else None
            ink = "var(--jp-ui-font-color1, black)" if i == self.chosen else "transparent"
            button.layout.border = f"2px solid {ink}"
        self.strip.children = self._buttons[: len(self.tokens)]


class FigurePanel(w.VBox):
    """Controls over a figure that follows them; a panel of this kind says in `draw` what to see."""

    def __init__(self, controls: Sequence[w.Widget]):
        self.figure = w.HTML()
        self.status = w.HTML()
        for control in controls:
            control.observe(self._changed, "value")
        self._changed()
        super().__init__([w.VBox(controls), self.status, self.figure])

    def draw(self) -> Shown:
        """The figure for what the controls say now; its caption is shown above it."""
        raise NotImplementedError

    def _changed(self, _=None) -> None:
        try:
            shown = self.draw()
        except Exception as e:  # an observer's exception reaches nobody: show it here
            self.status.value = _status_html(f"{type(e).__name__}: {e}", error=True)
        else:
            self.figure.value, self.status.value = shown.img, _status_html(shown.caption)


class SizePanel(FigurePanel):
    """Sliders for the size of a picture, and `controls` for what else a panel asks."""

    def __init__(self, controls: Sequence[w.Widget] = (), *, size: tuple[int, int]):
        wide = {"style": LABELS, "layout": w.Layout(width="25rem")}
        slider = {**wide, "min": 20, "max": 2400, "step": 10, "continuous_update": False}
        self.picture_width = w.IntSlider(size[0], description="picture width", **slider)
        self.picture_height = w.IntSlider(size[1], description="picture height", **slider)
        super().__init__([self.picture_width, self.picture_height, *controls])

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the picture, in pixels."""
        return self.picture_width.value, self.picture_height.value


class BudgetPanel(SizePanel):
    """What a picture of a chosen size takes of the context, for some models or configurations."""

    def __init__(
        self,
        models: Mapping[str, VisionLanguageModel | PretrainedConfig | NVILAConfig],
        context: int = 4096,
        *,
        size: tuple[int, int] = (1024, 768),
    ):
        self._models = dict(models)
        self.context = w.Dropdown(
            options=sorted({2048, 4096, 8192, 32768, context}),
            value=context,
            description="positions of the context",
            style=LABELS,
            layout=w.Layout(width="25rem"),
        )
        super().__init__([self.context], size=size)

    def draw(self) -> Shown:
        tokens = {name: image_tokens(m, *self.size) for name, m in self._models.items()}
        width, height = self.size
        caption = f"A picture of {width} × {height} pixels in {self.context.value:,} positions."
        counts = ", ".join(f"{name} {n:,}" for name, n in tokens.items())
        bars = context_bars(tokens, self.context.value)
        return show(bars, caption=caption, alt=f"bars of the positions taken: {counts}", width=640)


class TilingPanel(SizePanel):
    """How InternVL3 cuts a picture of a chosen size, and what that costs. The given picture is
    trimmed to the size's aspect, so that all stretching that is seen is the tiling's.
    """

    def __init__(
        self, picture: ImageSource, *, size: tuple[int, int] = (1280, 720), max_tiles: int = 12
    ):
        self._picture = load_image(picture)
        self.max_tiles = w.IntSlider(
            max_tiles,
            min=1,
            max=24,
            description="most tiles",
            style=LABELS,
            layout=w.Layout(width="25rem"),
            continuous_update=False,
        )
        super().__init__([self.max_tiles], size=size)

    def draw(self) -> Shown:
        (width, height), most = self.size, self.max_tiles.value
        cols, rows = dynamic_grid(width, height, 1, most)
        tiles = dynamic_tiles(width, height, 1, most, use_thumbnail=True)
        stretch = cols / rows / (width / height)
        made = f"made {max(stretch, 1 / stretch) - 1:.1%} {'wider' if stretch > 1 else 'higher'}"
        caption = (
            f"{width} × {height} pixels: {cols} × {rows} tiles"
            f"{' and the whole picture' if tiles > 1 else ''}, {tiles * NUM_IMAGE_TOKEN:,} tokens; "
            f"{'its shape is kept' if stretch == 1 else made}."
        )
        shown = (max(1, round(480 * side / max(width, height))) for side in (width, height))
        trimmed = ImageOps.fit(self._picture, tuple(shown))
        figure = tiling(trimmed, (cols, rows), thumbnail=tiles > 1, width=6.4)
        alt = f"a picture cut into {cols} columns and {rows} rows, and the tiles side by side"
        return show(figure, caption=caption, alt=alt, width=640)


class ScalesPanel(FigurePanel):
    """What an NVILA with dynamic S2 sees of a picture at each of its scales: the tiles, and below
    them, in colours, how their features differ from those of an empty sheet. A place in the picture
    is framed, and with it all patches that meet in the one position of the language model which
    shows it.

    pictures    names with files or Pillow pictures; a list of files is named after them
    """

    def __init__(self, model: NVILA, pictures: Pictures):
        self._model, self._pictures = model, _loaded_pictures(pictures)
        self._seen: dict[str, tuple[Medium, list[Tensor]]] = {}
        wide = {"style": LABELS, "layout": w.Layout(width="25rem")}
        slider = {**wide, "min": 0, "max": 100, "continuous_update": False}
        self.picture = w.Dropdown(options=list(self._pictures), description="picture", **wide)
        self.across = w.IntSlider(50, description="place, % from the left", **slider)
        self.down = w.IntSlider(50, description="place, % from the top", **slider)
        super().__init__([self.picture, self.across, self.down])

    def _look(self) -> tuple[Medium, list[Tensor]]:
        """The chosen picture as tiles, and the (h, w, c) features of each scale."""
        name, model = self.picture.value, self._model
        if name not in self._seen:
            image = self._pictures[name].convert("RGB")
            empty = Image.new("RGB", image.size, tuple(ImageStat.Stat(image).median))
            medium, plain = (model.prepare([picture])[0] for picture in (image, empty))
            grids = s2_grids(medium.block, model.vision_tower.scales)
            with torch.inference_mode():
                seen, blank = (model.tower_features(m.pixels) for m in (medium, plain))
            features = (seen - blank).float().cpu()
            parts = features.split([rows * cols for rows, cols in grids])
            maps = [merge_chessboard(p, *grid) for p, grid in zip(parts, grids, strict=True)]
            self._seen[name] = medium, [m[0].permute(1, 2, 0) for m in maps]
        return self._seen[name]

    def draw(self) -> Shown:
        (medium, maps), model = self._look(), self._model
        boxes = model.boxes(medium)
        boxes = boxes[~boxes.isnan().any(dim=-1)]  # without the line break
        first, last = boxes[:, :2], boxes[:, 2:]
        place = torch.tensor([self.across.value, self.down.value]) / 100
        k = int((((first + last) / 2 - place) / (last - first)).abs().amax(dim=1).argmin())
        parts = []
        for side, m in zip(model.vision_tower.scales, maps, strict=True):
            left, top, right, bottom = touched(boxes[k].tolist(), *m.shape[:2])
            framed = f"{bottom - top} × {right - left} of {m.shape[0]} × {m.shape[1]} patches"
            parts.append(f"of scale {side}, {framed}")
        grids = s2_grids(medium.block, model.vision_tower.scales)
        image, tiles = self._pictures[self.picture.value], [f"{r} × {c}" for r, c in grids]
        return show(
            scales(image, grids, maps, tile=model.tile_pixels, box=boxes[k].tolist(), width=5.6),
            caption=f"Framed: position {k + 1} of {len(boxes)}; {'; '.join(parts)}.",
            alt=f"{self.picture.value}, cut into {', '.join(tiles)} tiles, and features in colours",
            width=640,
            colours=128,
        )
