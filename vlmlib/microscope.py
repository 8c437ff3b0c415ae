"""Where a model looks: attention of one token over a picture, in the picture's own coordinates.

Fast attention kernels do not give their weights out. So the sequence is read with them up to its
last position, and only that one is fed with the plain implementation: exact, at any length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import PromptError
from .fusion import fuse
from .media import Medium

if TYPE_CHECKING:
    from .model import Media, VisionLanguageModel


@torch.inference_mode()
def attention(
    model: VisionLanguageModel, prompt: str, media: Media = None, answer: Sequence[int] = ()
) -> Tensor:
    """Attention when the token behind `prompt` and the ids `answer` is chosen: (layers, heads, n),
    each row a distribution over the n positions so far, pictures expanded. Raises PromptError.
    """
    ids, media = model.read(prompt, media)
    if not (ids or answer):
        raise PromptError("there is nothing to attend to: the prompt is empty")
    features = [model.features(m, m.key) for m in media]
    inputs = fuse([*ids, *answer], features, model.embed)
    cache = model.new_cache()
    if inputs.shape[1] > 1:
        model.forward(inputs[:, :-1], 0, cache)
    decoder = model.net.get_decoder()
    with eager_attention(decoder):
        out = decoder(
            inputs_embeds=inputs[:, -1:],
            past_key_values=cache.past,
            use_cache=True,
            output_attentions=True,
        )
    return torch.stack([layer[0, :, -1] for layer in out.attentions])


@contextlib.contextmanager
def eager_attention(decoder) -> Iterator[None]:
    """Plain attention, which can show its weights; put back afterwards."""
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def picture_weights(
    model: VisionLanguageModel, prompt: str, media: Sequence[Medium], weights: Tensor
) -> list[Tensor]:
    """Split weights (..., n) over the whole sequence: one (..., medium.length) for each medium."""
    (ids, media), at, out = model.read(prompt, media), 0, []
    pictures = iter(media)
    for i in ids:
        length = next(pictures).length if i < 0 else 1
        if i < 0:
            out.append(weights[..., at : at + length])
        at += length
    return out


def heat_map(weights: Tensor, boxes: Tensor, width: int, height: int) -> Tensor:
    """(n,) weights of positions with (n, 4) boxes -> (height, width) weight per pixel.

    Each position spreads its weight evenly over its box, so the map sums to the weight of all
    positions that lie in the picture; NaN boxes are left out.
    """
    size = torch.tensor([width, height, width, height])
    known = ~boxes.isnan().any(dim=-1)
    out = torch.zeros(height, width)
    for weight, box in zip(weights[known].float().cpu(), boxes[known], strict=True):
        left, top, right, bottom = box * size
        x = _covered(left, right, width)
        y = _covered(top, bottom, height)
        out += weight * y[:, None] * x[None] / ((right - left) * (bottom - top))
    return out


def _covered(start: Tensor, end: Tensor, n: int) -> Tensor:
    """How much of each of n unit pixels lies between start and end."""
    edges = torch.arange(n)
    return (torch.minimum(end, edges + 1) - torch.maximum(start, edges)).clamp(0, 1)
