"""The key/value cache of one sequence, which also knows what every cached position was.

Because it knows, a second turn can be compared with it: everything up to the first difference is
kept, the rest is fed again. Nothing is assumed about where the ids came from.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence

from transformers import DynamicCache, PreTrainedModel

from .errors import CacheError


class KVCache:
    """transformers' DynamicCache plus `content`, one entry a position.

    An entry is a token id, or for a picture's position a pair (digest of the picture, index).
    It is of use to one network only, and to one stream at a time: `writer` is the last one's.
    """

    def __init__(self, net: PreTrainedModel):
        self.past = DynamicCache(config=net.config.get_text_config(decoder=True))
        self.content: list[Hashable] = []
        self.writer: object = None
        self._net = weakref.ref(net)

    def __len__(self) -> int:
        return len(self.content)

    def check_net(self, net: PreTrainedModel) -> None:
        """Raise CacheError for another network than the one it was made for."""
        if self._net() is not net:
            raise CacheError("the cache is another model's: it was made by new_cache of that one")

    def common_prefix(self, content: Sequence[Hashable]) -> int:
        """How many positions from the start are the same here and in `content`."""
        pairs = enumerate(zip(self.content, content, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(self), len(content)))

    def keep(self, n: int) -> None:
        """Forget everything behind the first `n` positions."""
        if not 0 <= n <= len(self):
            raise CacheError(
                f"start_pos {n} is outside of the cache, which holds {len(self)} positions"
            )
        if (surplus := int(self.past.get_seq_length()) - n) > 0:
            self.past.crop(-surplus)
        del self.content[n:]
