"""How pictures enter the sequence: features take the place of placeholders.

A prompt is a list of ids in which `IMAGE_TOKEN_INDEX` stands for one picture, whatever the number
of positions its features will take.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .errors import ContextLengthError, ShapeError
from .tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, check_placeholders


def fuse(
    ids: Sequence[int], features: Sequence[Tensor], embed: Callable[[Tensor], Tensor]
) -> Tensor:
    """Ids with placeholders, one (n_i, d) tensor a picture -> (1, n, d) input embeddings.

    `embed` maps (n,) ids to (n, d); all text goes through it in one call. Raises PlaceholderError.
    Source: LLaVA:llava/model/llava_arch.py.
    """
    check_placeholders(ids.count(IMAGE_TOKEN_INDEX), len(features))
    table = embed(torch.tensor([i for i in ids if i != IMAGE_TOKEN_INDEX], dtype=torch.long))
    pieces, at, pictures = [], 0, iter(features)
    for is_picture, run in groupby(ids, key=lambda i: i == IMAGE_TOKEN_INDEX):
        n = len(list(run))
        if is_picture:
            pieces += [next(pictures).to(table) for _ in range(n)]
        else:
            pieces.append(table[at : at + n])
            at += n
    return torch.cat(pieces or [table])[None]


def positions(
    ids: Sequence[int], lengths: Sequence[int], names: Sequence[Hashable]
) -> list[Hashable]:
    """What stands at each position after fusion: an id, or (name of the picture, index in it).

    `lengths` and `names` have one entry a picture: its number of positions and what tells it apart.
    """
    check_placeholders(ids.count(IMAGE_TOKEN_INDEX), len(lengths))
    pictures = iter(zip(lengths, names, strict=True))
    out: list[Hashable] = []
    for i in ids:
        if i == IMAGE_TOKEN_INDEX:
            n, name = next(pictures)
            out += [(name, k) for k in range(n)]
        else:
            out.append(i)
    return out


def split_at(ids: Sequence[int], lengths: Sequence[int], start: int) -> tuple[int, int, int]:
    """Where position `start` of the fused sequence lies: (ids before, pictures before, offset).

    `offset` is not 0 only where `start` falls into the middle of a picture.
    """
    at = pictures = 0
    for i, token in enumerate(ids):
        size = lengths[pictures] if token == IMAGE_TOKEN_INDEX else 1
        if at + size > start:
            return i, pictures, start - at
        at += size
        pictures += token == IMAGE_TOKEN_INDEX
    return len(ids), pictures, start - at


def digest(x: Tensor) -> str:
    """A name for a tensor's content: equal content, equal name, on every run and machine."""
    raw = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    name = hashlib.sha256(raw)
    name.update(repr((x.shape, x.dtype)).encode())
    return name.hexdigest()[:32]


def prepare_inputs_labels_for_multimodal(
    model,
    input_ids: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    past_key_values: Any,
    labels: Tensor | None,
    images: Any,
    image_sizes: Any = None,
    *,
    padding_side: str = "right",
    model_max_length: int | None = None,
    truncate: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Any, Tensor | None, Tensor | None]:
    """A padded batch of (b, n) ids, with one IMAGE_TOKEN_INDEX a picture -> LLaVA's six values:

    (None, position_ids, attention_mask, past_key_values, inputs_embeds, labels)

    model           has embed((n,) ids) -> (n, d), or, by LLaVA's name, `embed_tokens` on it or on
                    its get_model(); and encode_images(images) -> one (n_i, d) tensor a picture,
                    which also gets `image_sizes` if given
    attention_mask  (b, n), 0 where `input_ids` is padding, which is dropped; pictures are in the
                    order of the batch's placeholders
    labels          (b, n), becomes (b, n'), IGNORE_INDEX for pictures and padding
    padding_side    of the results; "left" for decoding
    model_max_length  by default the model's `context_len`, if it has one
    truncate        cut what exceeds `model_max_length`; otherwise it is an error

    What was None stays None, except for the mask where padding was needed. Without pictures, and
    for the single id of a decoding step, nothing changes and inputs_embeds is None.
    Raises PlaceholderError, ContextLengthError, ShapeError.
    Source: LLaVA:llava/model/llava_arch.py.
    """
    if model_max_length is None:
        model_max_length = getattr(model, "context_len", None)
    has_placeholder = bool((input_ids == IMAGE_TOKEN_INDEX).any())
    if not has_placeholder and (images is None or input_ids.shape[1] == 1):
        return input_ids, position_ids, attention_mask, past_key_values, None, labels
    mask = attention_mask
    if mask is None:
        mask = torch.ones_like(input_ids, dtype=torch.bool)
    rows = _without_padding(input_ids, mask, "input_ids")
    row_labels = rows if labels is None else _without_padding(labels, mask, "labels")
    groups = _encode(model, images, image_sizes, rows)
    embed = _embedding_of(model, input_ids.device)
    embeds = [fuse(r.tolist(), g, embed)[0] for r, g in zip(rows, groups, strict=True)]
    targets = [_fuse_labels(*row) for row in zip(rows, row_labels, groups, strict=True)]
    check_lengths([len(e) for e in embeds], None if truncate else model_max_length)
    embeds, targets = ([x[:model_max_length] for x in xs] for xs in (embeds, targets))
    spans = [torch.arange(len(e), device=input_ids.device) for e in embeds]
    pad = partial(pad_sequence, batch_first=True, padding_side=padding_side)
    new_mask = pad([torch.ones_like(span, dtype=mask.dtype) for span in spans])
    if attention_mask is None and new_mask.all():
        new_mask = None
    return (
        None,
        None if position_ids is None else pad(spans),
        new_mask,
        past_key_values,
        pad(embeds),
        None if labels is None else pad(targets, padding_value=IGNORE_INDEX),
    )


def _embedding_of(model, device: torch.device) -> Callable[[Tensor], Tensor]:
    if hasattr(model, "embed"):
        return model.embed
    table = getattr(model, "embed_tokens", None) or model.get_model().embed_tokens
    return lambda ids: table(ids.to(device))


def _without_padding(x: Tensor, mask: Tensor, name: str) -> list[Tensor]:
    """(b, n) and its mask -> b tensors (n_i,)."""
    if x.shape != mask.shape:
        raise ShapeError(f"{name} is {tuple(x.shape)}, the attention mask {tuple(mask.shape)}")
    return [row[kept.bool()] for row, kept in zip(x, mask, strict=True)]


def _encode(model, images: Any, image_sizes: Any, rows: Sequence[Tensor]) -> list[list[Tensor]]:
    """Features of all pictures, as many to a row of ids as it has placeholders."""
    sizes = [] if image_sizes is None else [image_sizes]
    features = [] if images is None else list(model.encode_images(images, *sizes))
    counts = [int((row == IMAGE_TOKEN_INDEX).sum()) for row in rows]
    check_placeholders(sum(counts), len(features))
    rest = iter(features)
    return [list(islice(rest, n)) for n in counts]


def _fuse_labels(row: Tensor, labels: Tensor, features: Sequence[Tensor]) -> Tensor:
    """(n,) ids and labels -> (n',) labels, IGNORE_INDEX where pictures are."""
    ignored = [labels.new_full((len(f), 1), IGNORE_INDEX) for f in features]
    text = labels[row != IMAGE_TOKEN_INDEX]
    return fuse(row.tolist(), ignored, lambda _: text[:, None])[0, :, 0]


def check_lengths(lengths: list[int], limit: int | None) -> None:
    """Raises ContextLengthError that names the lengths if one of them exceeds the limit."""
    if limit is not None and max(lengths) > limit:
        raise ContextLengthError(
            f"with their pictures the prompts take {lengths} positions, but model_max_length is "
            f"{limit}"
        )
