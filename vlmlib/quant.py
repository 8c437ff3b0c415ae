"""Four-bit weights for a language model: `quantize_llm`, and the search that loses least by it.

Only the linear layers of the decoder are quantised. Embeddings, lm_head, tower and projector stay
as they are, and so do activations: W4A16. Rounding alone does it; AWQ's search, on a few prompts of
one's own, does it better. Inputs of a layer that are large on average make errors of their weights
large. So these weights are multiplied by a scale and the op before is divided by it, which changes
nothing until the weights are rounded, and then spends the sixteen numbers where they matter. And a
group whose range is cut a little has finer steps for all that is left. Both are tried, and what
lowers the error of what the layer's block puts out is kept.

Paper: https://arxiv.org/abs/2306.00978.
Sources: llm-awq:awq/quantize/auto_scale.py, llm-awq:awq/quantize/auto_clip.py.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaModel, MistralModel, PreTrainedModel, Qwen2Model

from .errors import QuantizationError
from .fusion import fuse
from .int4 import Int4Config, Int4Linear, dequantize, grouped, linears_of, quantize
from .model import Part, VisionLanguageModel, as_parts, sources_of
from .streaming import stream

SEARCHABLE = (LlamaModel, MistralModel, Qwen2Model)
RATIOS = tuple(step / 20 for step in range(20))
CUTS = tuple(1 - step / 20 for step in range(10))
"""Exponents of the mean input that are tried as scales, and shares of a group's range."""

ANSWER_TOKENS = 64
"""Length up to which the prompts are answered."""


@torch.inference_mode(False)
@torch.no_grad()
def quantize_llm(
    model: VisionLanguageModel,
    *,
    group_size: int = 128,
    calibration: Sequence[Sequence[Part]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VisionLanguageModel:
    """A model with four-bit weights in the linear layers of its decoder; `model` stays as it is.

    group_size   weights that share a scale. 128 is usual; smaller groups are more exact and take
                 more room: 4.2 bits a weight with 128, 4.75 with 32. Rows are filled up to whole
                 groups, so layers of a few hundred inputs want 32.
    calibration  some prompts for the search, each the pictures and texts of one turn, as
                 `vlmlib.stream` takes them; the model answers them first, since answers are what
                 its weights are for. Without any the weights are just rounded.
    progress     called with how many layers are done, and of how many

    The new model shares all other weights with `model`, so holding both costs about a quarter more
    than 16-bit weights alone; `model = quantize_llm(model)` lets go of these. With `model.quantized
    = quantize_llm(model)` the generators' `quant_llm` chooses between them. Move a model before it
    is quantised: what is shared moves with either of the two, the rest does not.

    Raises QuantizationError for a model that is quantised already, for a group size that is odd or
    below 2, for a search without prompts or in a decoder that is not one of SEARCHABLE.
    """
    config = Int4Config(group_size=group_size)
    _check(model, calibration)
    inputs = None if calibration is None else layer_inputs(model, calibration)
    net = _sharing_copy(model.net)
    layers = net.get_decoder().layers
    for done, layer in enumerate(layers, start=1):
        if inputs is None:
            for name, linear in linears_of(layer).items():
                layer.set_submodule(name, rounded(linear, group_size))
        else:
            search(layer, inputs.popleft(), group_size)
        if progress:
            progress(done, len(layers))
    config.put_into(net)
    return model.with_net(net)


def _check(model: VisionLanguageModel, calibration: Sequence | None) -> None:
    if any(isinstance(module, Int4Linear) for module in model.net.modules()):
        raise QuantizationError("the model has four-bit weights already")
    if calibration is None:
        return
    if not len(calibration):
        raise QuantizationError("calibration is empty: give some prompts, or None to round only")
    if type(decoder := model.net.get_decoder()) not in SEARCHABLE:
        names = [known.__name__ for known in SEARCHABLE]
        raise QuantizationError(
            f"the search knows the layers of {names}, not those of {type(decoder).__name__}: "
            "calibration=None rounds their weights without it"
        )


def _sharing_copy(net: PreTrainedModel) -> PreTrainedModel:
    """Modules and configuration of its own, around the same weights."""
    shared = {id(tensor): tensor for tensor in chain(net.parameters(), net.buffers())}
    return copy.deepcopy(net, shared)


def rounded(linear: nn.Linear, group_size: int, weight: Tensor | None = None) -> Int4Linear:
    """The layer with the nearest weights of four bits, to its own or to others in their place."""
    numbers = quantize(linear.weight if weight is None else weight, group_size)
    return Int4Linear.of(linear.in_features, *numbers, linear.bias)


# ---- what the layers see ----

Call = tuple[tuple, dict[str, Any]]


def layer_inputs(
    model: VisionLanguageModel, calibration: Sequence[Sequence[Part]]
) -> deque[list[Call]]:
    """For each layer of the decoder the arguments of its calls, one for a prompt and its answer."""
    decoder = model.net.get_decoder()
    texts = [_answered(model, parts) for parts in calibration]
    calls = deque([] for _ in decoder.layers)

    def watcher(into: list[Call]):
        return lambda module, args, kwargs: into.append((args, kwargs))

    hooks = [
        layer.register_forward_pre_hook(watcher(into), with_kwargs=True)
        for layer, into in zip(decoder.layers, calls, strict=True)
    ]
    try:
        for inputs in texts:
            decoder(inputs_embeds=inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _answered(model: VisionLanguageModel, parts: Sequence[Part] | str) -> Tensor:
    """(1, n, d) input embeddings of a prompt and the model's own answer to it."""
    parts = as_parts(parts)
    chunks = stream(model, parts, n_predict=ANSWER_TOKENS, trace=0)
    said = [token.id for chunk in chunks for token in chunk.get("tokens", ())]
    ids, media = model.read(model.chat_prompt(parts), model.prepare(sources_of(parts)))
    return fuse([*ids, *said], [model.encode(m) for m in media], model.embed)


@dataclass(frozen=True, slots=True)
class Group:
    """Linear layers of a decoder layer that read the same input.

    before   what makes this input, and can be divided in its place
    block    what they are part of; the error is that of its output
    linears  their names in it, "" for itself
    cut      those whose range may be cut. Not q and k: their product meets a softmax.
    """

    before: str
    block: str
    linears: tuple[str, ...]
    cut: tuple[str, ...]

    def path(self, name: str) -> str:
        """Of one of the linear layers in the decoder layer."""
        return f"{self.block}.{name}".rstrip(".")


GROUPS = (
    Group("input_layernorm", "self_attn", ("q_proj", "k_proj", "v_proj"), ("v_proj",)),
    Group("self_attn.v_proj", "self_attn.o_proj", ("",), ("",)),
    Group("post_attention_layernorm", "mlp", ("gate_proj", "up_proj"), ("gate_proj", "up_proj")),
    Group("mlp.up_proj", "mlp.down_proj", ("",), ("",)),
)


@dataclass(slots=True)
class Seen:
    """What went through a group: calls of its block with their outputs, inputs (n, i) of its
    linear layers.
    """

    calls: list[tuple[tuple, dict[str, Any], Tensor]] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)

    @property
    def x(self) -> Tensor:
        return torch.cat(self.inputs).float()

    def error(self, block: nn.Module, weights: Mapping[str, Tensor]) -> float:
        """Sum of the squared errors of the block's outputs with other weights in it."""
        total = 0.0
        for args, kwargs, wanted in self.calls:
            named = {f"{name}.weight".lstrip("."): weight for name, weight in weights.items()}
            found = _output(functional_call(block, named, args, kwargs))
            total += (found.float() - wanted.float()).square().sum().item()
        return total


def watch(layer: nn.Module, calls: Sequence[Call]) -> list[Seen]:
    """Run a decoder layer, and see what goes through each of GROUPS."""
    seen, hooks = [Seen() for _ in GROUPS], []
    for group, into in zip(GROUPS, seen, strict=True):

        def on_block(module, args, kwargs, output, into=into):
            into.calls.append((args, kwargs, _output(output)))

        def on_linear(module, args, output, into=into):
            into.inputs.append(args[0].flatten(0, -2))

        block = layer.get_submodule(group.block)
        first = layer.get_submodule(group.path(group.linears[0]))
        hooks.append(block.register_forward_hook(on_block, with_kwargs=True))
        hooks.append(first.register_forward_hook(on_linear))
    try:
        for args, kwargs in calls:
            layer(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _output(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


# ---- the search ----


def search(layer: nn.Module, calls: Sequence[Call], group_size: int) -> None:
    """Give a decoder layer four-bit weights, with the scales and cuts that lose least."""
    for group, seen in zip(GROUPS, watch(layer, calls), strict=True):
        if can_fold(layer, group):
            fold(layer, group, best_scales(layer, group, seen, group_size))
    for group, seen in zip(GROUPS, watch(layer, calls), strict=True):
        weights = cut_weights(layer, group, seen, group_size)
        for name, weight in weights.items():
            linear = layer.get_submodule(path := group.path(name))
            layer.set_submodule(path, rounded(linear, group_size, weight))


def can_fold(layer: nn.Module, group: Group) -> bool:
    """Not from o into v if queries share their values."""
    before = layer.get_submodule(group.before).weight
    return len(before) == layer.get_submodule(group.path(group.linears[0])).in_features


def best_scales(layer: nn.Module, group: Group, seen: Seen, group_size: int) -> Tensor:
    """(i,) scales s for the inputs of a group: powers of the mean |x| of each input, normalised.

    Of all RATIOS the power with the least error; the first one, 0, is plain rounding.
    """
    block, size = layer.get_submodule(group.block), seen.x.abs().mean(dim=0)
    weights = {name: block.get_submodule(name).weight for name in group.linears}
    tried = []
    for ratio in RATIOS:
        s = size.pow(ratio).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        new = {
            name: (nearest(w.float() * s, group_size, w.dtype) / s).to(w.dtype)
            for name, w in weights.items()
        }
        tried.append((seen.error(block, new), s))
    return min(tried, key=lambda pair: pair[0])[1]


def fold(layer: nn.Module, group: Group, s: Tensor) -> None:
    """Multiply the weights of a group by s, input by input, and divide what makes the input."""
    before = layer.get_submodule(group.before)
    by = s if before.weight.dim() == 1 else s[:, None]
    before.weight = _parameter(before.weight.float() / by, before.weight)
    if getattr(before, "bias", None) is not None:
        before.bias = _parameter(before.bias.float() / s, before.bias)
    for name in group.linears:
        linear = layer.get_submodule(group.path(name))
        linear.weight = _parameter(linear.weight.float() * s, linear.weight)


def cut_weights(layer: nn.Module, group: Group, seen: Seen, group_size: int) -> dict[str, Tensor]:
    """(o, i) weights of a group's layers by name, cut where that lowers the block's error."""
    block = layer.get_submodule(group.block)
    weights = {name: block.get_submodule(name).weight for name in group.linears}
    new = {name: nearest(weight, group_size) for name, weight in weights.items()}
    least = seen.error(block, new)
    for name in group.cut:
        cut = best_cuts(weights[name], seen.x, group_size)
        tried = new | {name: nearest(cut, group_size)}
        if (error := seen.error(block, tried)) < least:
            weights, new, least = weights | {name: cut}, tried, error
    return weights


def best_cuts(weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    """(o, i) weights, (n, i) inputs -> the weights, each group cut to the one of CUTS, as a share
    of its largest weight, with which rounding changes the group's part of the outputs least.
    """
    w, x = grouped(weight.float(), group_size), grouped(x, group_size)
    gram = torch.einsum("nge,ngf->gef", x, x)
    limit = w.abs().amax(dim=-1, keepdim=True)
    best, least = w, torch.full_like(limit, torch.inf)
    for share in CUTS:
        cut = w.clamp(-share * limit, share * limit)
        off = grouped(nearest(cut.flatten(1), group_size, weight.dtype).float(), group_size) - w
        error = torch.einsum("oge,gef,ogf->og", off, gram, off)[..., None]
        best = torch.where(error < least, cut, best)
        least = torch.minimum(error, least)
    return best.flatten(1)[:, : weight.shape[1]].to(weight.dtype)


def nearest(weight: Tensor, group_size: int, dtype: torch.dtype | None = None) -> Tensor:
    """(o, i) -> the weights that remain of it; `dtype` is that of the scales."""
    return dequantize(*quantize(weight, group_size, dtype))[:, : weight.shape[1]]


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype), requires_grad=like.requires_grad)
