"""Train a small model on a laptop.

    python -m vlmlib.tiny.train --out data/checkpoints/tiny-llava      # the whole run
    python -m vlmlib.tiny.train --out /tmp/smoke --minutes 1           # does it learn at all?
    python -m vlmlib.tiny.train --model tiny-internvl --start data/checkpoints/tiny-llava --out ...

The recipe: Muon for the matrices inside the layers and AdamW for the rest; a warm-up, a flat
stretch and a linear decay; fp32 weights, and bf16 arithmetic where the processor has it. First the
tower learns to look: a loss reads shape, colour, size, label and small print from every picture
patch. Then all parts learn to answer, and the patch loss fades out. With `--start` a model begins
with what another one knows.

Several processes share the sequences of a step and add up their gradients; small matrices keep two
processes of one thread busier than one process of two.

Next to the checkpoint folder stands `NAME.state.pt` with all that `--resume` needs to go on
exactly as if the run had never stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from ..loading import load
from ..model import VisionLanguageModel
from ..tokenization import IMAGE_TOKEN_INDEX
from .data import IGNORE, MIXES, PATCH_CLASSES, Batch, Stream, attention_mask
from .evaluate import by_kind, grade, machine
from .model import BUILDERS, build, parts, save, warm_start
from .muon import Muon
from .recipe import RECIPES, Recipe
from .scenes import VALIDATION

Report = Callable[[dict], None]


class PatchReader(nn.Module):
    """Reads what `patch_targets` names off every patch. Thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, classes) for classes in PATCH_CLASSES)

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """(t, p, width) features, (t, c, p) classes -> mean cross-entropy of what can be read."""
        losses = []
        for plane, head in enumerate(self.heads):
            known = targets[:, plane] != IGNORE
            if known.any():
                logits = head(features[known]).float()
                weight = _mostly_things(head.out_features)
                losses.append(F.cross_entropy(logits, targets[:, plane][known], weight=weight))
        return torch.stack(losses).mean()


def _mostly_things(classes: int) -> Tensor:
    """Class weights that count an empty patch a tenth: most patches are empty."""
    return torch.tensor([0.1] + [1.0] * (classes - 1))


class Trainer:
    """Model, patch reader, two optimizers and the number of the next step.

    The patch reader and the optimizers see the model as its `parts`.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.step = 0
        self.half = computes_in_bf16()
        self.model = build(recipe.model, recipe.seed)
        self.parts = parts(self.model)
        for name in ("tower", "language"):
            self.parts[name].set_attn_implementation("eager")  # backwards, on a CPU, the fastest
        embed_patches_by_matrix(self.parts)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.reader = PatchReader(self.parts["tower"].config.hidden_size)
        self.optimizers = self._build_optimizers()

    def _build_optimizers(self) -> list[torch.optim.Optimizer]:
        matrices, others = split_parameters(self.parts)
        r = self.recipe
        muon = torch.optim.Muon if self.half else Muon
        return [
            muon(matrices, lr=r.muon_rate, weight_decay=r.weight_decay),
            torch.optim.AdamW(
                [*others, *self.reader.parameters()],
                lr=r.adamw_rate,
                betas=(0.9, 0.95),
                weight_decay=r.weight_decay,
            ),
        ]

    def train_step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One update from all batches together, those of the other processes of the run too;
        returns the mean losses by name.
        """
        self._set_rates()
        weight = self.recipe.patch_weight(self.step)
        tiles, answers = total(
            sum(len(batch.pixels) for batch in batches),
            sum(int(learnt(batch).sum()) for batch in batches),
        )
        sums: Counter[str] = Counter()
        for batch in batches:
            losses = {}
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half):
                features = self.model.tower_features(batch.pixels)
                if weight:
                    share = len(batch.pixels) / tiles
                    losses["patch_loss"] = self.reader(features, batch.patches) * share
                if not self.recipe.looking(self.step):
                    logits, targets = answer_logits(self.model, features, batch)
                    summed = F.cross_entropy(logits.float(), targets, reduction="sum")
                    losses["loss"] = summed / answers
            sums.update({name: loss.item() for name, loss in losses.items()})
            (losses.get("loss", 0) + weight * losses.get("patch_loss", 0)).backward()
        add_up_gradients([*self.parts.parameters(), *self.reader.parameters()])
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return dict(zip(sums, total(*sums.values()), strict=True))

    def _set_rates(self) -> None:
        share = self.recipe.rate(self.step)
        full = (self.recipe.muon_rate, self.recipe.adamw_rate)
        for optimizer, rate in zip(self.optimizers, full, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * share

    def compile(self) -> None:
        """The layers as compiled code, a fifth faster; the numbers are the same up to rounding."""
        for module in self.parts.modules():
            if isinstance(module, GradientCheckpointingLayer):  # what transformers calls a layer
                module.compile(dynamic=True)

    def state(self) -> dict:
        return {
            "step": self.step,
            "recipe": asdict(self.recipe),
            "parts": self.parts.state_dict(),
            "reader": self.reader.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state(self, state: dict) -> None:
        """The inverse of `state`; the recipe stays the trainer's own."""
        self.step = state["step"]
        self.parts.load_state_dict(state["parts"])
        self.reader.load_state_dict(state["reader"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def computes_in_bf16() -> bool:
    """Whether this processor has instructions for bf16; one that has none is ten times slower in it
    than in fp32.
    """
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


def part() -> tuple[int, int]:
    """The number of this process of the run, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(*numbers: float) -> list[float]:
    """Each number summed over all processes of the run; all must ask."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def add_up_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum the gradients over all processes of the run; what none of them used still has none."""
    if not dist.is_initialized():
        return
    users = total(*(parameter.grad is not None for parameter in parameters))
    used = [parameter for parameter, count in zip(parameters, users, strict=True) if count]
    for parameter in used:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = [parameter.grad for parameter in used]
    summed = nn.utils.parameters_to_vector(gradients)
    dist.all_reduce(summed)
    nn.utils.vector_to_parameters(summed, gradients)


class PatchMatrix(nn.Conv2d):
    """A patch embedding as one matrix product: the same numbers, much faster backwards."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(b, 3, h, w) pictures -> (b, width, rows, columns)."""
        y, x = self.kernel_size
        patches = rearrange(pixel_values, "b c (h y) (w x) -> b h w (c y x)", y=y, x=x)
        out = F.linear(patches, self.weight.flatten(1), self.bias)
        return rearrange(out, "b h w d -> b d h w")


def embed_patches_by_matrix(root: nn.Module) -> None:
    """Put a `PatchMatrix` with the same weights in the place of every convolution of patches."""
    for parent in list(root.modules()):
        for name, old in list(parent.named_children()):
            if type(old) is nn.Conv2d and old.kernel_size == old.stride:
                shape = (old.in_channels, old.out_channels, old.kernel_size, old.stride)
                new = PatchMatrix(*shape, bias=old.bias is not None)
                new.weight, new.bias = old.weight, old.bias
                setattr(parent, name, new)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices inside layers, for Muon; embeddings, norms, biases and the rest, for AdamW)."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inside = ".layer" in name or "projector" in name
        (matrices if inside and parameter.ndim == 2 else others).append(parameter)
    return matrices, others


def answer_logits(
    model: VisionLanguageModel, features: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Logits (answer tokens, vocabulary) for every token to be learnt, and what it is; features
    (t, p, c) are the tower's.
    """
    tiles = features.split(batch.tiles)
    projected = [model.project(f, m) for f, m in zip(tiles, batch.media, strict=True)]
    placed = batch.ids == IMAGE_TOKEN_INDEX
    embeddings = model.embed(batch.ids.masked_fill(placed, 0))
    values = torch.cat(projected).to(embeddings.dtype)
    hidden = model.net.get_decoder()(
        inputs_embeds=embeddings.masked_scatter(placed[..., None], values),
        attention_mask=attention_mask(batch.blocks, projected[0].dtype),
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    learn = learnt(batch)
    return model.net.lm_head(hidden[:, :-1][learn]), batch.targets[:, 1:][learn]


def learnt(batch: Batch) -> Tensor:
    """(b, n - 1) whether the token after each is to be learnt."""
    return batch.targets[:, 1:] != IGNORE


def run(
    trainer: Trainer,
    report: Report,
    checkpoint: Callable[[], None] | None = None,
    every_minutes: float = 3.0,
    probe_minutes: float = 10.0,
    minutes: float | None = None,
    workers: int = 1,
    every_steps: int = 50,
) -> None:
    """Train to the last step of the recipe, or until `minutes` are over.

    `report` gets one dictionary every `every_steps` steps and one for every probe of the validation
    scenes; `checkpoint` is called every few minutes and at the end. Of several processes only the
    first one does any of this.
    """
    if part()[0]:
        report, checkpoint, probe_minutes = _silent, None, float("inf")
    began = saved = probed = time.monotonic()
    for work in steps_ahead(trainer, workers):
        losses = trainer.train_step(work)
        now = time.monotonic()
        (over,) = total(bool(minutes) and now - began > 60 * minutes)
        if over or trainer.step % every_steps == 0 or trainer.step in (1, 10, trainer.recipe.steps):
            report({"step": trainer.step, "seconds": round(now - began, 1), **losses})
        if checkpoint and now - saved > 60 * every_minutes:
            checkpoint()
            saved = time.monotonic()
        if "loss" not in losses:
            probed = now  # nothing to ask yet
        if now - probed > 60 * probe_minutes:
            report({"step": trainer.step, "probe": probe(trainer)})
            probed = time.monotonic()
        if over:
            break
    if checkpoint:
        checkpoint()


def _silent(entry: dict) -> None:
    """What the other processes report."""


def steps_ahead(trainer: Trainer, workers: int) -> Iterator[list[Batch]]:
    """The work of the trainer's next step and of all after it, made in the background."""
    r = trainer.recipe
    stream = Stream(trainer.model, r.batch_size, r.seed, r.asked, r.look_steps, part())
    yield from DataLoader(
        stream,
        batch_size=None,
        sampler=range(trainer.step, r.steps),
        num_workers=workers,
        prefetch_factor=2 if workers else None,
    )


def probe(trainer: Trainer, scenes: int = 32) -> dict[str, float]:
    """Share of right answers of each kind on a few validation scenes and clips."""
    table = {}
    with torch.compiler.set_stance("force_eager"):  # every question has another length
        for content in MIXES[trainer.model.family]:
            table |= by_kind(grade(trainer.model, content, VALIDATION[:scenes]))
    return {kind: round(row["right"], 3) for kind, row in table.items()}


def save_state(trainer: Trainer, path: Path) -> None:
    """Write the state whole or not at all."""
    staging = path.with_suffix(".staging")
    torch.save(trainer.state(), staging)
    staging.replace(path)


def load_trainer(path: Path, steps: int | None = None) -> Trainer:
    """A trainer that goes on where the state file stopped; only the number of steps may change."""
    if not path.exists():
        raise FileNotFoundError(f"nothing to resume: {path} does not exist")
    state = torch.load(path, weights_only=True)
    recipe = Recipe(**state["recipe"])
    trainer = Trainer(replace(recipe, steps=steps or recipe.steps))
    trainer.load_state(state)
    return trainer


def state_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.state.pt")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    if options.processes == 1:
        return train(options)
    with TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(_process, (options, folder), options.processes)
        except torch.multiprocessing.ProcessExitedException as error:
            raise SystemExit(error.exit_code) from error


def _process(number: int, options: argparse.Namespace, folder: str) -> None:
    """One of the processes of a run; they meet in a file in the folder."""
    meeting = (Path(folder) / "meeting").as_uri()
    dist.init_process_group("gloo", meeting, rank=number, world_size=options.processes)
    try:
        train(options)
    finally:
        dist.destroy_process_group()


def train(options: argparse.Namespace) -> None:
    """The run that the command line asks for, or this process's share of it."""
    torch.set_num_threads(max(1, options.threads // options.processes))
    logging.disable_progress_bar()
    log = options.out / "training_log.jsonl"
    if options.resume:
        trainer = load_trainer(state_path(options.out), options.steps)
    else:
        trainer = Trainer(_recipe(options))
        if options.start:
            warm_start(trainer.model, load(options.start, device="cpu"))
    if options.compile:
        trainer.compile()
    recipe = trainer.recipe
    losses: list[float] = []
    began, first = time.monotonic(), trainer.step

    def report(entry: dict) -> None:
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        done = trainer.step - first
        left = (recipe.steps - trainer.step) * (time.monotonic() - began) / max(1, done)
        print(f"{json.dumps(entry)}  ({left / 60:.0f} minutes left)", flush=True)
        if "loss" in entry:
            losses.append(entry["loss"])

    def checkpoint() -> None:
        save_state(trainer, state_path(options.out))
        save(trainer.model, options.out)

    if not part()[0]:
        options.out.mkdir(parents=True, exist_ok=True)
        if not options.resume:
            log.unlink(missing_ok=True)
        report(
            {
                "start": trainer.step,
                "recipe": asdict(recipe),
                "mix": {name: asdict(share) for name, share in MIXES[trainer.model.family].items()},
                "started_from": options.start and options.start.as_posix(),
                "compile": options.compile,
                "machine": machine(options.threads),
            }
        )
    run(trainer, report, checkpoint, minutes=options.minutes, workers=options.workers)
    if options.minutes and not part()[0]:
        if not losses:
            raise SystemExit("no answer was learnt from: give it more minutes, or --look-steps 0")
        if not losses[-1] < 0.5 * losses[0]:
            raise SystemExit(f"the loss fell from {losses[0]:.2f} to {losses[-1]:.2f} only")


def _recipe(options: argparse.Namespace) -> Recipe:
    """The recipe of a fresh run; a run against the clock starts to answer at once."""
    usual, given = RECIPES[options.model or Recipe().model], _given(options)
    steps = given.get("steps", usual.steps)
    look_steps = 0 if options.minutes else min(usual.look_steps, steps // 3)
    return replace(usual, **{"look_steps": look_steps, **given})


def _given(options: argparse.Namespace) -> dict:
    """Those fields of the recipe that the command line names."""
    given = {f.name: getattr(options, f.name) for f in fields(Recipe)}
    return {name: value for name, value in given.items() if value is not None}


def _changed(options: argparse.Namespace) -> list[str]:
    """Options that are not those of the run that is to be resumed; of these only --steps may be."""
    state, log = state_path(options.out), options.out / "training_log.jsonl"
    if not state.exists():
        return []  # `load_trainer` says it
    recipe = Recipe(**torch.load(state, weights_only=True, mmap=True)["recipe"])
    given = _given(options).items()
    names = [name for name, value in given if value != getattr(recipe, name) and name != "steps"]
    if options.start and log.exists():
        begun = json.loads(log.open(encoding="utf-8").readline()).get("started_from", options.start)
        if begun is None or Path(begun).resolve() != options.start.resolve():
            names.append("start")
    return [f"--{name.replace('_', '-')}" for name in names]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small model.")
    parser.add_argument("--model", choices=tuple(BUILDERS), help=f"default {Recipe().model}")
    parser.add_argument("--start", type=Path, help="folder of the small model to begin with")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    cores = os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=cores, help=f"of all, default {cores}")
    parser.add_argument(
        "--processes", type=int, default=min(4, cores), help=f"default {min(4, cores)}"
    )
    parser.add_argument("--workers", type=int, default=1, help="for each one, to make data")
    parser.add_argument(
        "--compile", action="store_true", help="the layers: faster, and needs a C++ compiler"
    )
    parser.add_argument("--minutes", type=float, help="stop then; fail unless the loss halved")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the saved state; only --steps may change"
    )
    numbers = parser.add_argument_group("numbers of the recipe")
    for field in fields(Recipe):
        if field.name != "model":
            option = f"--{field.name.replace('_', '-')}"
            usual = ", ".join(
                dict.fromkeys(f"{getattr(r, field.name):g}" for r in RECIPES.values())
            )
            numbers.add_argument(option, type=type(field.default), help=f"default {usual}")
    options = parser.parse_args(arguments)
    if options.resume and (changed := _changed(options)):
        parser.error(
            f"{state_path(options.out)} was begun with another {', '.join(changed)}; of a resumed "
            "run only --steps may change"
        )
    return options


if __name__ == "__main__":
    main()
