"""Where the time of an answer goes, and how much of it the machine's memory takes.

    python -m vlmlib.bench                                    the models that ship
    python -m vlmlib.bench internvl3-1b --dtype bfloat16      random weights, published sizes
    python -m vlmlib.bench llava-hf/llava-1.5-7b-hf           a folder, or a hub id

The stages of a first answer (preprocessing, vision tower, prefill) are timed one by one. Then the
contenders decode the same answer, in turns, in one run: this library, this library with
`fast=False`, transformers' `generate` with its streamer in a thread, the same with a static cache
and `torch.compile`, and this library with four-bit weights. All but the last must say the same
tokens, or the run fails. At last a second turn, with what the first has cached and without.

Medians stand beside the quartiles. A step reads all weights of the language model once, and the
cache: their bytes, over the time of a step, are a share of what the machine copies in a second,
which is measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from threading import Thread
from time import perf_counter
from types import MappingProxyType
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import CompileConfig, TextIteratorStreamer

from .decoding import decode
from .fusion import fuse
from .images import ImageProcessor
from .loading import load, shipped_models
from .media import Medium
from .model import VisionLanguageModel
from .nvila_checkpoint import NVILAConfig
from .quant import quantize_llm
from .sampling import GenParams
from .tiny.model import build_internvl, build_llava, build_nvila
from .tiny.scenes import draw, random_scene

FAST, PLAIN = "vlmlib", "vlmlib, fast=False"
STREAMER, COMPILED = "transformers' generate", "transformers, static cache, compiled"
INT4 = "vlmlib, four-bit weights"
QUESTION = "What do you see in this picture?"
FILLER = "Here is a red circle, and there is a blue square. "
NEVER = 1 << 30  # an id that no vocabulary has: the answer shall not end

# ------------------------------------------------------------------------ published sizes

NORMAL = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # random weights do not mind
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
}
CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
INTERN_VIT = {**CLIP_L, "image_size": 448}
SIGLIP_SO400M = {
    **INTERN_VIT,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
}
DYNAMIC_S2 = NVILAConfig(
    image_aspect_ratio="dynamic_s2",
    dynamic_s2=True,
    s2_scales="448,896,1344",
    s2_resize_output_to_scale_idx=-1,
    chat_template="qwen2",
    mm_projector_cfg={"mm_projector_type": "mlp_downsample_3x3_fix"},
)


def qwen2(width: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """Sizes of a language model of NVILA and InternVL3."""
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 151674,
        "max_position_embeddings": 32768,
    }


QWEN_HALF_B = qwen2(896, 4864, 24, 14, 2)
QWEN_1_5B = qwen2(1536, 8960, 28, 12, 2)
QWEN_7B = qwen2(3584, 18944, 28, 28, 4)


def _internvl(language: dict) -> VisionLanguageModel:
    return build_internvl(INTERN_VIT, language, ImageProcessor(448, 448, 448, *NORMAL))


def _nvila(language: dict) -> VisionLanguageModel:
    processor = ImageProcessor(448, 448, 448, *NORMAL)
    return build_nvila(SIGLIP_SO400M, language, processor, DYNAMIC_S2)


SHAPES: Mapping[str, Callable[[], VisionLanguageModel]] = MappingProxyType(
    {
        "internvl3-1b": partial(_internvl, QWEN_HALF_B),
        "internvl3-2b": partial(_internvl, QWEN_1_5B),
        "internvl3-8b": partial(_internvl, QWEN_7B),
        "nvila-2b": partial(_nvila, QWEN_1_5B),
        "nvila-8b": partial(_nvila, QWEN_7B),
        "llava-1.5-7b": partial(
            build_llava, CLIP_L, LLAMA_7B, ImageProcessor(336, 336, 336, *NORMAL)
        ),
    }
)
"""The sizes of published models, from their config.json."""


@torch.no_grad()
def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> VisionLanguageModel:
    """A model of `SHAPES` with random weights.

    What is said with random weights is a toss of a coin, which the last bits of a sum decide. So
    that all contenders can be held to the same tokens, the head is made to say the id behind the
    last one, clearly: it is the table of embeddings, shifted by a row, and they are large.
    """
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.random.fork_rng():
            torch.manual_seed(0)
            model = SHAPES[shape]()
    finally:
        torch.set_default_dtype(old)
    embeddings = model.net.get_input_embeddings().weight.normal_(std=20)
    model.net.lm_head.weight.copy_(embeddings.roll(1, dims=0)).div_(20)
    model.name = shape
    return model


# ------------------------------------------------------------------------------ contenders


@dataclass(frozen=True, slots=True)
class Request:
    """One picture and one question, the same for all contenders; `ids` are those of the prompt."""

    prompt: str
    ids: list[int]
    medium: Medium
    tokens: int

    @classmethod
    def of(cls, model: VisionLanguageModel, picture: Image.Image, tokens: int) -> Request:
        prompt = model.chat_prompt([picture, QUESTION])
        return cls(prompt, model.prompt_ids(prompt), model.prepare([picture])[0], tokens)


@dataclass(frozen=True, slots=True)
class Answer:
    """Ids but for the last, and the moment at which each token was there."""

    ids: list[int]
    times: list[float]

    @property
    def seconds_per_token(self) -> float:
        """Without the first one, which waits for the prompt."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


Contender = Callable[[Request], Answer]


def by_vlmlib(request: Request, model: VisionLanguageModel, fast: bool = True) -> Answer:
    """`decode`, the loop behind all generators of this library, one chunk a token."""
    cache, times = model.new_cache(), []
    was, model.fast = model.fast, fast
    try:
        turn = model.turn(request.prompt, [request.medium], cache=cache)
        params = GenParams.greedy(n_predict=request.tokens)
        for chunk in decode(turn, model.tokenizer, params, stop_ids=()):
            if len(times) < chunk["usage"]["completion_tokens"]:  # the last chunk brings none
                times.append(perf_counter())
    finally:
        model.fast = was
    return Answer(cache.content[turn.prompt_tokens :], times)


class TimedStreamer(TextIteratorStreamer):
    """transformers' streamer, which notes when a token comes."""

    def __init__(self, tokenizer) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        first = self.next_tokens_are_prompt
        super().put(value)
        if not first:
            self.times.append(perf_counter())


def by_transformers(request: Request, model: VisionLanguageModel, **options) -> Answer:
    """`generate` in a thread, read through its streamer, as transformers' documentation does it."""
    streamer, out = TimedStreamer(model.tokenizer), []

    @torch.inference_mode()
    def work() -> None:
        try:
            embeds = fuse(request.ids, [model.encode(request.medium)], model.embed)
            out.append(
                model.net.generate(
                    inputs_embeds=embeds,
                    attention_mask=torch.ones_like(embeds[..., 0], dtype=torch.long),
                    streamer=streamer,
                    do_sample=False,
                    max_new_tokens=request.tokens,
                    eos_token_id=NEVER,
                    pad_token_id=0,
                    **options,
                )
            )
        except Exception as e:
            out.append(e)
            streamer.end()

    thread = Thread(target=work)
    thread.start()
    for _ in streamer:
        pass
    thread.join()
    if isinstance(out[0], Exception):
        raise out[0]
    return Answer(out[0][0, :-1].tolist(), streamer.times)


def compile_options() -> dict[str, Any]:
    """What makes `generate` compile its steps, on a CPU as well."""
    config = CompileConfig(fullgraph=False)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def contenders(model: VisionLanguageModel, compiled: bool, int4: bool) -> dict[str, Contender]:
    """By name, in the order of the table; the first one sets the tokens."""
    them: dict[str, Contender] = {
        FAST: partial(by_vlmlib, model=model),
        PLAIN: partial(by_vlmlib, model=model, fast=False),
        STREAMER: partial(by_transformers, model=model),
    }
    if compiled:
        them[COMPILED] = partial(by_transformers, model=model, **compile_options())
    if int4:
        them[INT4] = partial(by_vlmlib, model=quantize_llm(model))
    return them


# ------------------------------------------------------------------------------- measuring


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return {"median": median(samples), "low": low, "high": high}


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """How long something takes, until the device has done it."""
    is_cuda = device.type == "cuda"
    wait = partial(torch.cuda.synchronize, device) if is_cuda else (lambda: None)
    wait()
    start = perf_counter()
    work()
    wait()
    return perf_counter() - start


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, that one large copy reaches; the best of ten."""
    source = torch.ones((4 << 30) if device.type == "cuda" else (256 << 20), dtype=torch.uint8)
    source = source.to(device)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    copy()
    return 2 * source.numel() / min(seconds(copy, device) for _ in range(10))


def bytes_per_step(model: VisionLanguageModel, positions: int) -> int:
    """What must be read for one token: weights of decoder and head, and the cache."""
    decoder, config = model.net.get_decoder(), model.text_config
    weights = {x.data_ptr(): x for x in (*decoder.parameters(), *decoder.buffers())}
    weights.pop(decoder.get_input_embeddings().weight.data_ptr())  # one row of it, unless it is
    head = model.net.lm_head.weight  # the head, too
    heads = config.num_key_value_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    cache = 2 * config.num_hidden_layers * heads * positions * head.element_size()
    return sum(x.nbytes for x in weights.values()) + head.nbytes + cache


def race(
    entries: Mapping[str, Contender],
    request: Request,
    repeats: int,
    device: torch.device,
    progress: Progress,
) -> tuple[dict[str, list[float]], dict[str, str], dict[str, int]]:
    """Let all answer in turns, each one first once: seconds per token of each, why some could not
    run, and on a GPU the most memory that each took, beside all weights and whatever else was there
    before it.

    Raises RuntimeError if two do not say the same.
    """
    samples: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    peaks: dict[str, int] = {}
    expected = None
    for name, contender in entries.items():  # warm up, compile, compare
        progress(f"{name}: warm-up")
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        try:
            answer = contender(request)
            contender(request)
        except Exception as e:
            if name in (FAST, PLAIN):
                raise
            failed[name] = f"{type(e).__name__}: {e}".splitlines()[0][:300]
            continue
        expected = expected or answer.ids
        if name != INT4 and answer.ids != expected:
            raise RuntimeError(f"{name} says {answer.ids}, {FAST} says {expected}")
        samples[name] = []
        if device.type == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated(device) - before
    for i in range(repeats):
        names = list(samples)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            progress(f"{name}: {i + 1} of {repeats}")
            gc.collect()
            samples[name].append(entries[name](request).seconds_per_token)
    return samples, failed, peaks


def stages(
    model: VisionLanguageModel, picture: Image.Image, request: Request, repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds of what comes before the second token, each stage by itself."""
    medium, device = request.medium, model.device

    def prefill() -> None:
        turn = model.turn(request.prompt, [medium])
        next(decode(turn, model.tokenizer, GenParams.greedy(n_predict=1), stop_ids=()))

    with torch.inference_mode():
        prefill()  # from now on the features are held
        works = {
            "preprocess": lambda: model.prepare([picture]),
            "vision": lambda: model.encode(medium),
            "prefill": prefill,
        }
        samples = [
            {name: seconds(work, device) for name, work in works.items()} for _ in range(repeats)
        ]
    table = {name: spread([sample[name] for sample in samples]) for name in works}
    table["first token"] = spread([sum(sample.values()) for sample in samples])
    return table


def second_turn(
    model: VisionLanguageModel, picture: Image.Image, history: int, repeats: int
) -> dict[str, Any]:
    """Seconds to the first token of a second question, behind so many positions or a few more (the
    picture's included): with the cache of the first turn, and with everything fed again.
    """
    params = GenParams.greedy(n_predict=1)
    media, cache, said = model.prepare([picture]), model.new_cache(), FILLER
    visual = sum(m.length - 1 for m in media)
    while visual + len(model.prompt_ids(model.chat_prompt([picture, said]))) < history:
        said += FILLER
    first: list = [("user", [picture, said]), ("assistant", ["Yes."])]
    before = model.conversation_prompt(first[:1])
    prompt = model.conversation_prompt([*first, ("user", [QUESTION])])

    def ask(prompt: str, start_pos: int, cache=None) -> dict[str, Any]:
        turn = model.turn(prompt, media, start_pos=start_pos, cache=cache)
        return list(decode(turn, model.tokenizer, params, stop_ids=()))[-1]["timing"]

    held = ask(before, 0, cache)["context_tokens"]
    samples: dict[str, list[float]] = {"kept": [], "fed again": []}
    for i in range(repeats + 1):
        cache.keep(held)
        kept, fed = ask(prompt, held, cache), ask(prompt, 0)
        if i:  # the first time is a warm-up
            samples["kept"].append(kept["context_time"])
            samples["fed again"].append(fed["context_time"])
    return {"history": held, **{name: spread(times) for name, times in samples.items()}}


Progress = Callable[[str], None]


def measure(
    model: VisionLanguageModel,
    picture: Image.Image | None = None,
    *,
    tokens: int = 64,
    repeats: int = 5,
    compiled: bool = True,
    int4: bool = False,
    history: int = 1000,
    progress: Progress = lambda words: None,
) -> dict[str, Any]:
    """All of the above as one dictionary that JSON can hold; times in seconds, sizes in bytes.

    tokens    length of the answer; it does not end before
    repeats   how often each contender answers, besides two times to warm up
    history   positions of the first turn, picture included, but at most half of the context
    compiled  whether transformers with static cache and `torch.compile` is among them
    int4      whether four-bit weights are; the memory must hold both
    progress  told what is done
    """
    if tokens < 2 or repeats < 1:
        raise ValueError(f"expected tokens >= 2 and repeats >= 1, got {tokens} and {repeats}")
    picture = picture or draw(random_scene(0), 336)
    request = Request.of(model, picture, tokens)
    device, length = model.device, len(request.ids) - 1 + request.medium.length
    progress("copy bandwidth")
    bandwidth = copy_bandwidth(device)
    progress("stages")
    before = stages(model, picture, request, repeats)
    progress("second turn")
    later = second_turn(model, picture, min(history, model.context_len // 2), repeats)
    entries = contenders(model, compiled, int4)
    samples, failed, peaks = race(entries, request, repeats, device, progress)
    steps = {}
    for name, times in samples.items():
        of = entries[name].keywords["model"]
        size = bytes_per_step(of, length + tokens // 2)
        share = size / median(times) / bandwidth
        steps[name] = {**spread(times), "bytes": size, "bandwidth_share": share}
        if name in peaks:
            steps[name]["peak_memory"] = peaks[name]
    return {
        "model": model.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": machine(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "prompt_tokens": length,
        "visual_tokens": request.medium.length,
        "tokens": tokens,
        "repeats": repeats,
        "copy_bandwidth": bandwidth,
        "stages": before,
        "second_turn": later,
        "steps": steps,
        "failed": failed,
    }


def machine(device: torch.device) -> str:
    """One line about where something was measured."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    instructions = torch.backends.cpu.get_cpu_capability()  # such as AVX2
    return f"{_processor_name()} ({instructions}), {torch.get_num_threads()} threads"


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


# ------------------------------------------------------------------------------- reporting


def table(result: Mapping[str, Any]) -> str:
    """What was measured, as a table of Markdown."""
    rows = [
        f"**{result['model']}**, {result['parameters'] / 1e6:,.0f} M parameters in "
        f"{result['dtype']} on {result['machine']}; {result['prompt_tokens']} positions of prompt, "
        f"{result['visual_tokens']} of them visual; torch {result['versions']['torch']}, "
        f"transformers {result['versions']['transformers']}",
        "",
        "| | ms | quartiles | |",
        "|---|---:|---:|---|",
    ]
    rows += [_row(name, times, "") for name, times in result["stages"].items()]
    rival = result["steps"].get(STREAMER)
    for name, step in result["steps"].items():
        words = [f"{step['bandwidth_share']:.0%} of copy bandwidth"]
        if rival and name != STREAMER:
            words.insert(0, f"{rival['median'] / step['median']:.2f} x {STREAMER}")
        if "peak_memory" in step:
            words.append(f"{step['peak_memory'] / 1e9:.2f} GB beside the weights")
        rows.append(_row(f"a token, {name}", step, ", ".join(words)))
    turn = result["second_turn"]
    ratio = turn["fed again"]["median"] / turn["kept"]["median"]
    behind = f"behind {turn['history']:,} positions"
    rows.append(_row("second turn, cache kept", turn["kept"], f"{ratio:.1f} x faster, {behind}"))
    rows.append(_row("second turn, all fed again", turn["fed again"], behind))
    rows += [f"| a token, {name} | | | not run: {why} |" for name, why in result["failed"].items()]
    rows += ["", f"Copy bandwidth: {result['copy_bandwidth'] / 1e9:,.1f} GB/s."]
    return "\n".join(rows)


def _row(name: str, times: Mapping[str, float], words: str) -> str:
    ms = (1e3 * times[key] for key in ("median", "low", "high"))
    middle, low, high = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in ms)
    return f"| {name} | {middle} | {low} to {high} | {words} |"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = options.dtype and getattr(torch, options.dtype)
    for name in options.model:
        if name in SHAPES:
            model = random_model(name, device, dtype or torch.bfloat16)
        else:
            model = load(name, device=device, dtype=dtype)
        result = measure(
            model,
            tokens=options.tokens,
            repeats=options.repeats,
            compiled=options.compile,
            int4=options.int4,
            progress=lambda words, name=name: print(f"{name}: {words}", file=sys.stderr),
        )
        print(f"{table(result)}\n")
        line = json.dumps(result)
        if options.save:
            options.save.mkdir(parents=True, exist_ok=True)
            file = options.save / f"{Path(name).name}-{result['dtype']}-{device.type}.json"
            file.write_text(f"{line}\n", encoding="utf-8")
            from .figures import png_of, step_times  # Matplotlib, which a table does without

            file.with_suffix(".png").write_bytes(png_of(step_times(result)))
        print(f"{line}\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vlmlib.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = ", ".join(SHAPES)
    parser.add_argument(
        "model", nargs="*", default=shipped_models(), help=f"folder, hub id, or one of {names}"
    )
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, default 64")
    parser.add_argument("--repeats", type=int, default=5, help="of each contender, default 5")
    parser.add_argument("--int4", action="store_true", help="four-bit weights, too")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write JSON and figure there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
