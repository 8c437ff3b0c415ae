"""Ask a model about pictures and clips, from a terminal: `python -m vlmlib PICTURE "question"`."""

from __future__ import annotations

import argparse
import contextlib
import json
import mimetypes
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import torch

from . import DATA, GenParams, TimeStats, Video, load, shipped_models, stream, stream_output
from .checkpoint import told
from .errors import PromptError, VlmError

EXAMPLES = f"""examples:
  python -m vlmlib data/images/three-shapes.png "What is left of the red circle?"
  python -m vlmlib data/images/three-shapes.png "Describe the picture." --temp 0.8 --seed 1
  python -m vlmlib photo.jpg "What is this?" --model llava-hf/llava-1.5-7b-hf --device cuda

Weights that do not fit into memory are not read: the error tells what would fit.
The answer goes to standard output while it is made; the summary goes to standard error, so that
the answer alone can be piped. Exit status: 0 answered, 1 bad input, 2 bad options, 130 stopped.

models that ship with the repository: {", ".join(shipped_models()) or "none"}
its pictures: {DATA / "images"}
"""


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except VlmError as e:
        print(f"vlmlib: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nvlmlib: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: nothing is left to say
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.close()
        return 0


def _run(args: argparse.Namespace) -> int:
    *files, question = args.inputs
    if not files and os.path.isfile(question):
        raise PromptError(f"{question} is a file, and no question follows it")
    sources = [Video(f, args.frames) if _is_clip(f) else Path(f) for f in files]
    params = GenParams(
        temp=args.temp,
        top_p=args.top_p,
        top_k=args.top_k,
        repeat_penalty=args.repeat_penalty,
        n_predict=args.max_tokens,
        seed=args.seed,
        stop=tuple(args.stop),
    )
    with _said(f"loading {args.model}") as progress:
        dtype = getattr(torch, args.dtype) if args.dtype else None
        model = load(
            args.model, device=args.device, dtype=dtype, quant=args.quant, progress=progress
        )
    stats, usage = TimeStats(), {}

    def chunks():
        for chunk in stream(model, [*sources, question], params):
            usage.update(chunk["usage"])
            yield chunk

    text = stream_output(chunks(), stats)
    if args.json:
        print(json.dumps({"text": text, "usage": usage, "summary": str(stats)}), file=sys.stderr)
    elif not args.quiet:
        prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
        print(f"\n{prompt} prompt + {completion} answer tokens; {stats}", file=sys.stderr)
        print(f"{model}", file=sys.stderr)
    return 0


def _is_clip(file: str) -> bool:
    kind, _ = mimetypes.guess_type(file)
    return bool(kind and kind.startswith("video/"))


@contextlib.contextmanager
def _said(what: str) -> Iterator[Callable[[int, int], None]]:
    """Tell a person at a terminal what takes so long, and how much of it is done."""

    def say(text: str, end: str = "") -> None:
        if sys.stderr.isatty():
            print(text, end=end, file=sys.stderr, flush=True)

    start = perf_counter()
    say(f"{what} ... ")
    try:
        yield lambda done, total: say(f"\r{what} ... {done / total:.0%} of {told(total)}, ")
    finally:  # an error is told on a line of its own
        say(f"{perf_counter() - start:.1f} s", end="\n")


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m vlmlib",
        description="Ask a vision-language model about pictures and clips and watch the answer "
        "come, token by token.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "inputs",
        nargs="+",
        metavar="PICTURE ... QUESTION",
        help="files of pictures or clips (none, one or several), then the question as the last "
        "argument",
    )
    p.add_argument(
        "--model",
        default="tiny-llava",
        help="a shipped model, a folder, or a hub id (default: %(default)s)",
    )
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the GPU if there is one)")
    p.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the weights (default: the checkpoint's on a GPU; float32 or, above 200 MB, "
        "bfloat16 on a CPU)",
    )
    p.add_argument(
        "--quant", choices=["int4"], help="round the language model to four bits a weight"
    )
    p.add_argument(
        "--frames", type=int, help="to look at in each clip (default: as many as the model likes)"
    )
    g = p.add_argument_group("sampling (default: always the best token)")
    g.add_argument("--temp", type=float, default=0.0, help="temperature; 0 is greedy (default: 0)")
    g.add_argument("--top-p", type=float, default=1.0, help="1 is off (default: 1)")
    g.add_argument("--top-k", type=int, default=0, help="0 is off (default: 0)")
    g.add_argument("--repeat-penalty", type=float, default=1.0, help="1 is off (default: 1)")
    g.add_argument("--seed", type=int, help="same seed, same answer (default: a fresh one)")
    g.add_argument("--max-tokens", type=int, default=512, help="answer length (default: 512)")
    g.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end here; may be repeated"
    )
    o = p.add_mutually_exclusive_group()
    o.add_argument("--quiet", action="store_true", help="no summary")
    o.add_argument("--json", action="store_true", help="summary as one JSON line")
    return p


if __name__ == "__main__":
    sys.exit(main())
