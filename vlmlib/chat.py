"""A conversation: its turns, and the cache that saves reading them again.

Every turn the whole transcript is tokenised anew and compared with what the cache holds, pictures
by their content. What is the same up to the first difference is kept, the rest is fed. So nothing
can go stale: an edited turn or another picture differs, and everything behind it is read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from .decoding import Chunk
from .errors import CacheError
from .model import Part, VisionLanguageModel, as_parts, sources_of
from .sampling import GenParams

Message = tuple[str, tuple[Part, ...]]


class Chat:
    """Ask a model several times about the same pictures.

        chat = Chat(model)
        for chunk in chat.ask([image, "How many shapes are there?"]):
            print(chunk["delta"], end="", flush=True)
        for chunk in chat.ask("Where is the red one?"):
            ...

    messages          (role, parts) of all turns; change it as you like, the next turn obeys, but
                      not between a question and the end of its answer
    chunk_prefilling  feed only what is new; False feeds the whole transcript every turn
    """

    def __init__(self, model: VisionLanguageModel, *, chunk_prefilling: bool = True):
        self.model = model
        self.chunk_prefilling = chunk_prefilling
        self.messages: list[Message] = []
        self.cache = model.new_cache()

    def ask(
        self,
        parts: Sequence[Part] | str,
        gen_params: GenParams | Mapping[str, Any] | None = None,
        *,
        stream_interval: int = 1,
        trace: int | None = None,
        **changes,
    ) -> Iterator[Chunk]:
        """Stream the answer to the next user turn; parameters as in `vlmlib.stream`.

        The turn joins the conversation when its stream ends. A stream that is closed early leaves
        the answer as far as it came. Raises CacheError where it is read, and begins or ends, if
        `messages` is not what it was at the call.
        """
        params = GenParams.greedy_unless(gen_params, **changes)
        messages = [*self.messages, ("user", as_parts(parts))]
        sources = sources_of(chain.from_iterable(said for _, said in messages))
        chunks = self.model.stream_prompt(
            self.model.conversation_prompt(messages),
            self.model.prepare(sources),
            params,
            start_pos=len(self.cache),
            chunk_prefilling=self.chunk_prefilling,
            cache=self.cache,
            stream_interval=stream_interval,
            lstrip=True,
            trace=trace,
        )
        return self._remember(messages, chunks)

    def _remember(self, messages: list[Message], chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        self._check_unchanged(messages)
        text = ""
        try:
            for chunk in chunks:
                text = chunk["text"]
                yield chunk
        except GeneratorExit:  # a stream that is closed has been read as far as its reader wanted
            self._join(messages, text)
            raise
        except CacheError:
            self._check_unchanged(messages)  # which tells more
            raise
        finally:
            chunks.close()
        self._join(messages, text)

    def _join(self, messages: list[Message], text: str) -> None:
        self._check_unchanged(messages)
        self.messages = [*messages, ("assistant", (text,))]

    def _check_unchanged(self, messages: list[Message]) -> None:
        if self.messages != messages[:-1]:
            raise CacheError(
                "the conversation has changed since this question was asked: read a stream to its "
                "end before the next question, and change messages between them"
            )
