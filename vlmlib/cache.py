"""The key/value cache of one sequence, which also knows what every cached position was.

Because it knows, a second turn can be compared with it: everything up to the first difference is
kept, the rest is fed again. Nothing is assumed about where the ids came from.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence

from transformers import DynamicCache, PreTrainedConfig

from .errors import CacheError


class KVCache:
    """transformers' DynamicCache plus `content`, one entry a position.

    An entry is a token id, or for a picture's position a pair (digest of the picture, index).
    It is of use to the network of this very `config` only, and to one stream at a time: `writer`
    stands for the last one.
    """

    def __init__(self, config: PreTrainedConfig):
        self.past = DynamicCache(config=config.get_text_config(decoder=True))
        self.content: list[Hashable] = []
        self.config = weakref.ref(config)  # which a copy of the cache shares
        self.writer: object = None

    def __len__(self) -> int:
        return len(self.content)

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
