"""The prompt formats of the original LLaVA checkpoints, which bring no chat template of their own.

Source of the formats: LLaVA:llava/conversation.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from .errors import PromptError

_CURIOUS = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)


@dataclass(slots=True)
class Conversation:
    """Turns in one of three styles; `get_prompt()` writes them down. Raises ValueError for another
    style.

    style  "two": `system sep ROLE: text sep ROLE: text sep2`; "chatml": every turn ends with `sep`;
           "inst": user turns in [INST] ... [/INST], answers end with `sep2`
    """

    system: str
    roles: tuple[str, str]
    style: str
    sep: str
    sep2: str = ""
    messages: list[tuple[str, str | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.style not in ("two", "chatml", "inst"):
            raise ValueError(f"style must be 'two', 'chatml' or 'inst', got {self.style!r}")

    def copy(self) -> Conversation:
        """With a list of messages of its own."""
        return replace(self, messages=list(self.messages))

    def append_message(self, role: str, message: str | None) -> None:
        """Add a turn; None leaves it open, for the model to fill."""
        if role not in self.roles:
            raise ValueError(f"role must be one of {self.roles}, got {role!r}")
        self.messages.append((role, message))

    def set_system(self, text: str) -> None:
        """What the model is told before the first turn, with the head that the style puts there."""
        self.system = f"<|im_start|>system\n{text}" if self.style == "chatml" else text

    @property
    def stop_str(self) -> str:
        """What ends an answer."""
        return self.sep if self.style == "chatml" else self.sep2

    def get_prompt(self) -> str:
        """All turns so far as one text. Raises PromptError if the roles do not take turns, the user
        first, in a style that cannot say otherwise.
        """
        roles = [role for role, _ in self.messages]
        if self.style != "chatml" and any(r != self.roles[i % 2] for i, r in enumerate(roles)):
            raise PromptError(f"roles must take turns, {self.roles[0]!r} first, got {roles}")
        return {"two": self._two, "chatml": self._chatml, "inst": self._inst}[self.style]()

    def _two(self) -> str:
        ends = (self.sep, self.sep2)
        turns = (
            f"{role}:" if text is None else f"{role}: {text}{ends[i % 2]}"
            for i, (role, text) in enumerate(self.messages)
        )
        return self.system + self.sep + "".join(turns)

    def _chatml(self) -> str:
        turns = (role if text is None else role + text + self.sep for role, text in self.messages)
        return self.system + self.sep + "".join(turns)

    def _inst(self) -> str:
        system = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if self.system else ""
        out = ""
        for i, (_, text) in enumerate(self.messages):
            if text is None:
                continue
            if i % 2:
                out += f" {text} {self.sep2}"
            else:
                out += f"{self.sep}[INST] {system if i == 0 else ''}{text} [/INST]"
        return out.lstrip(self.sep) if self.sep else out


_VICUNA = Conversation(_CURIOUS.format(who="user"), ("USER", "ASSISTANT"), "two", " ", "</s>")

conv_templates: Mapping[str, Conversation] = MappingProxyType(
    {
        "vicuna_v1": _VICUNA,
        "llava_v1": replace(_VICUNA, system=_CURIOUS.format(who="human"), messages=[]),
        "mistral_instruct": Conversation("", ("USER", "ASSISTANT"), "inst", "", "</s>"),
        "chatml_direct": Conversation(
            "<|im_start|>system\nAnswer the questions.",
            ("<|im_start|>user\n", "<|im_start|>assistant\n"),
            "chatml",
            "<|im_end|>",
        ),
    }
)
"""By LLaVA's names; `.copy()` one before you append to it."""
