"""Text to ids with picture placeholders, and ids back to text one at a time.

Knows tokenizers and strings; knows neither models nor pictures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import torch
from tokenizers.decoders import DecodeStream
from torch import LongTensor
from transformers import PreTrainedTokenizerBase

from .errors import PlaceholderError, PromptError

IMAGE_TOKEN = "<image>"
VIDEO_TOKEN = "<video>"
IMAGE_TOKEN_INDEX = -200  # no vocabulary has a negative id, so it cannot be mistaken for text
IGNORE_INDEX = -100


def tokenizer_image_token(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | LongTensor:
    """Tokenise the text between `<image>`s piece by piece and put `image_token_index` in the gaps.

    What the tokenizer adds in front of a text (BOS) comes once in front, what it adds behind (EOS,
    if any) once behind; without `<image>` the result is `tokenizer(prompt).input_ids`. Returns a
    list, or a (n,) LongTensor for `return_tensors="pt"`. Raises PromptError.
    Source: LLaVA:llava/mm_utils.py.
    """
    check_text(prompt)
    front, back = _special_affixes(tokenizer)
    ids = list(front)
    for i, piece in enumerate(prompt.split(IMAGE_TOKEN)):
        if i:
            ids.append(image_token_index)
        piece_ids = tokenizer(piece).input_ids
        ids += piece_ids[len(front) : len(piece_ids) - len(back)]
    ids += back
    if return_tensors is None:
        return ids
    if return_tensors == "pt":
        return torch.tensor(ids, dtype=torch.long)
    raise ValueError(f"return_tensors must be None or 'pt', got {return_tensors!r}")


def _special_affixes(tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after every text: ids of "" cut where text would go."""
    empty, probe = tokenizer("").input_ids, tokenizer("a").input_ids
    cut = 0
    while cut < len(empty) and empty[cut] == probe[cut]:
        cut += 1
    return empty[:cut], empty[cut:]


def escape_special_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Make user text safe to paste into a prompt: no placeholder or control token is left in it.

    `<image>`, `</s>`, `<|im_end|>` ... get a zero-width space after their first character: they
    read the same and tokenise as plain text.
    """
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""}
    for token in sorted({IMAGE_TOKEN, VIDEO_TOKEN} | special, key=len, reverse=True):
        text = text.replace(token, token[0] + "\u200b" + token[1:])
    return text


def check_text(prompt: str) -> None:
    """Raise PromptError for what no tokenizer takes."""
    if not isinstance(prompt, str):
        raise PromptError(f"the prompt must be a text, got {type(prompt).__name__}")
    if half := re.search(r"[\ud800-\udfff]", prompt):
        raise PromptError(
            f"the prompt has half a character, {half[0]!r}, at {half.start()}: a lone surrogate, "
            "of text that was cut or decoded wrongly"
        )


def check_placeholders(found: int, given: int, what: str = "image") -> None:
    """#placeholders must equal #media; the error names both numbers."""
    if found != given:
        raise PlaceholderError(
            f"the prompt has {found} <{what}> placeholder(s), but {given} {what}(s) were given; "
            f"if a user typed <{what}>, pass that text through escape_special_tokens first"
        )


class TextStream:
    """Ids in, readable text out, one id at a time at constant cost.

    `text` never ends in half a character and never holds a part of a stop string; text that could
    still become one is kept back until the next id decides, or until `flush`. Bytes that became no
    character are shown as U+FFFD once there is text behind them, and left out at the end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise TypeError(
                f"streaming needs a fast tokenizer (one with backend_tokenizer), "
                f"got {type(tokenizer).__name__}"
            )
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []  # of the last readable piece, and what came since
        self._readable = 0  # how many are of that piece
        self._stop = tuple(stop)
        self._held = ""
        self.text = ""

    def push(self, token_id: int) -> bool:
        """Add one id; True when the text now holds a stop string (which is cut off)."""
        self._held += self._read(token_id)
        hits = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if hits:
            self.text += self._held[: min(hits)]
            self._held = ""
            return True
        ready = len(self._held) - self._undecided()
        self.text += self._held[:ready]
        self._held = self._held[ready:]
        return False

    def _read(self, token_id: int) -> str:
        """What one more id adds. In a tokenizer with bytes, as Llama's is, a broken character also
        spoils whole ones before it that are written in bytes. tokenizers raises for that; what has
        been shown of them stays.
        """
        self._ids.append(token_id)
        try:
            new = self._stream.step(self._backend, token_id)
        except Exception:
            decode = partial(self._backend.decode, skip_special_tokens=True)
            shown = decode(self._ids[: self._readable])
            new = decode(self._ids)[len(shown) :]
            self._stream = DecodeStream(self._ids[self._readable :], skip_special_tokens=True)
        if new:
            self._ids = self._ids[self._readable :]
            self._readable = len(self._ids)
        return new or ""

    def flush(self) -> None:
        """No more ids will come: what was held back is plain text after all."""
        self.text += self._held
        self._held = ""

    def _undecided(self) -> int:
        """Length of the longest tail of the held text with which a stop string begins."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(self._held))
        tails = range(longest, 0, -1)
        return next((n for n in tails if any(s.startswith(self._held[-n:]) for s in self._stop)), 0)
