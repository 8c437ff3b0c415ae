"""What need not be computed twice: keys and values of a sequence, features of a picture.

The key/value cache of one sequence also knows what every cached position was. So a second turn can
be compared with it: everything up to the first difference is kept, the rest is fed again. Nothing
is assumed about where the ids came from.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .errors import CacheError


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, in a buffer that doubles when it is full: a new position is
    written into its place, where a DynamicLayer copies all positions. Gradients flow to what is fed
    at once, and to nothing that was cached before.

    It also serves layers with a sliding window, which is the mask's business: what lies behind the
    window stays, so that a turn may be cropped to any length.

    buffer        (2, b, k, room, e): keys and values; what is not in use is zero. The room is a
                  power of two, so that few sizes occur.
    keys, values  (b, k, n, e): views of it, up to the last position
    """

    SMALLEST = 256
    buffer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Append (b, k, m, e) keys and values -> all keys, all values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffer = None
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        self.make_room(stop, key_states)
        self.buffer[:, :, :, start:stop] = torch.stack([key_states, value_states]).detach()
        keys, values = self.hold(stop)
        if not key_states.requires_grad:
            return keys, values
        past = (x[:, :, :start] for x in (keys, values))
        new = (key_states, value_states)
        return tuple(torch.cat(pair, dim=2) for pair in zip(past, new, strict=True))

    def append(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`update` by one position of one sequence: (2 k, e), the keys and then the values."""
        n = self.keys.shape[-2]
        self.make_room(n + 1, self.keys)
        self.buffer.select(3, n).copy_(rows.view(2, 1, -1, rows.shape[-1]))
        return self.hold(n + 1)

    def hold(self, n: int) -> tuple[Tensor, Tensor]:
        """From now on there are n positions -> their keys and values."""
        self.keys, self.values = self.buffer.narrow(3, 0, n).unbind(0)
        return self.keys, self.values

    def crop(self, max_length: int) -> None:
        """Forget the last -max_length positions; not a number of them stays, lest it be NaN: a step
        that masks them would multiply it by 0.
        """
        before = self.get_seq_length()
        super().crop(max_length)
        self.buffer[:, :, :, self.get_seq_length() : before] = 0

    def make_room(self, n: int, like: Tensor) -> None:
        """For n positions, with keys and values like these."""
        room = 0 if self.buffer is None else self.buffer.shape[3]
        if n <= room:
            return
        b, k, _, e = like.shape
        with torch.inference_mode(False):  # so that it can be written in and out of that mode
            new = like.new_zeros(2, b, k, max(self.SMALLEST, 1 << (n - 1).bit_length()), e)
        if room:
            new[:, :, :, :room] = self.buffer
        self.buffer = new

    def reorder_cache(self, *_) -> None:
        """Raises CacheError: rows of a batch, as beams are, need a cache of transformers."""
        raise CacheError("a KVCache holds one sequence: its rows cannot be chosen or repeated")

    batch_select_indices = batch_repeat_interleave = reorder_cache


class KVCache:
    """transformers' cache plus `content`, one entry a position.

    An entry is a token id, or for a picture's position a pair (digest of the picture, index).
    It is of use to the network of this very `config` only, and to one stream at a time: `writer`
    stands for the last one, `made_by` for the weights and settings that it was written with.
    """

    def __init__(self, config: PreTrainedConfig):
        self.config = weakref.ref(config)  # which a copy of the cache shares
        self.writer: object = None
        self.made_by: Hashable = None
        self.past = _growing(config)
        self.content = []

    def __len__(self) -> int:
        return len(self._content) + len(self._unread)

    @property
    def content(self) -> list[Hashable]:
        """One entry a position, see above."""
        if self._unread:
            self._content += torch.cat(self._unread)[:, 0].tolist()
            self._unread.clear()
        return self._content

    @content.setter
    def content(self, content: list[Hashable]) -> None:
        self._content, self._unread = content, []

    def add(self, token: Tensor) -> None:
        """One more position holds this (1, 1) id, which is fetched from its device when `content`
        is asked for, and not before: a GPU need not be waited for at every step.
        """
        self._unread.append(token)

    def begin(self, made_by: Hashable) -> None:
        """From position 0 with these weights and settings. What others computed goes, with the
        memory that it was kept in, which may be of another dtype or on another device.
        """
        if self.made_by not in (None, made_by):
            self.past, self.content = _growing(self.config()), []
        self.made_by = made_by

    def common_prefix(self, content: Sequence[Hashable]) -> int:
        """How many positions from the start are the same here and in `content`."""
        return common_prefix(self.content, content)

    def keep(self, n: int) -> None:
        """Forget everything behind the first `n` positions, and what a layer has got of a step that
        was broken off before it reached them all.
        """
        if not 0 <= n <= len(self):
            raise CacheError(
                f"start_pos {n} is outside of the cache, which holds {len(self)} positions"
            )
        if n < len(self):  # first, so that no layer ever has fewer positions than this tells
            del self.content[n:]
        layers, of_all = self.past.layers, self.past.get_seq_length  # linear attention counts none
        lengths = [getattr(layer, "get_seq_length", of_all)() for layer in layers]
        for layer, length in zip(layers, lengths, strict=True):
            if length > n:
                layer.crop(n - length)


def _growing(config: PreTrainedConfig) -> DynamicCache:
    past = DynamicCache(config=config.get_text_config(decoder=True))
    if {*map(type, past.layers)} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        past.layers = [GrowingLayer() for _ in past.layers]
    return past


def common_prefix(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """How many entries from the start are the same in both."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


class FeatureCache:
    """Features of the media that were seen last, by their content, up to so many bytes in all."""

    def __init__(self, limit: int = 256 << 20) -> None:
        self.limit = limit
        self._held: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def __reduce__(self):
        return FeatureCache, (self.limit,)  # a copy begins with nothing

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable, encode: Callable[[], Tensor]) -> Tensor:
        """What is held under this key, or else what `encode` makes. It is not to be written in."""
        features = self._held.get(key)
        if features is None:
            features = encode()  # two threads that ask at once may both do it
        with self._lock:
            if key not in self._held:
                self._held[key] = features
                self._bytes += features.nbytes
            self._held.move_to_end(key)
            while self._bytes > self.limit and len(self) > 1:
                _, oldest = self._held.popitem(last=False)
                self._bytes -= oldest.nbytes
        return features

    def clear(self) -> None:
        """Hold nothing any more."""
        with self._lock:
            self._held.clear()
            self._bytes = 0
