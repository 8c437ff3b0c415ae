"""The numbers of a training run; what they do is told in `vlmlib.tiny.train`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recipe:
    """All choices of a run."""

    model: str = "tiny-llava"
    steps: int = 7_000
    look_steps: int = 2_000
    batch_size: int = 32
    asked: int = 10
    seed: int = 0
    muon_rate: float = 0.01
    adamw_rate: float = 2e-3
    weight_decay: float = 0.01
    warm_up: int = 100
    flat_until: float = 0.7
    patch_loss: float = 1.0
    patch_loss_until: float = 0.5

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.asked < 1:
            raise ValueError(f"batch_size and asked must be 1 or more: {self}")
        if not 0 <= self.look_steps < self.steps:
            raise ValueError(f"look_steps must be 0 or more and below steps: {self}")
        if self.warm_up < 1 or not 0 <= self.flat_until < 1 or self.patch_loss_until <= 0:
            raise ValueError(
                "warm_up must be 1 or more, flat_until from 0 to below 1, and patch_loss_until "
                f"above 0: {self}"
            )

    def looking(self, step: int) -> bool:
        """In the first steps the tower learns alone, from the patch loss."""
        return step < self.look_steps

    def rate(self, step: int) -> float:
        """Share of the full learning rate: warm-up in both phases, flat, then linear to zero."""
        left = (self.steps - step) / (self.steps * (1 - self.flat_until))
        since = step if self.looking(step) else step - self.look_steps
        return min(1.0, (since + 1) / self.warm_up, left)

    def patch_weight(self, step: int) -> float:
        """Weight of the patch loss: full while looking, then fading to zero."""
        speaking = (step - self.look_steps) / (self.steps - self.look_steps)
        return self.patch_loss * min(1.0, max(0.0, 1 - speaking / self.patch_loss_until))


RECIPES = {
    "tiny-llava": Recipe(),
    "tiny-internvl": Recipe(
        "tiny-internvl",
        steps=8_000,
        look_steps=2_000,
        batch_size=24,
        flat_until=0.6,
        patch_loss_until=0.8,
    ),
    "tiny-nvila": Recipe(
        "tiny-nvila",
        steps=4_000,
        look_steps=0,
        batch_size=16,
        flat_until=0.5,
        patch_loss_until=0.8,
    ),
}
"""tiny-llava begins with nothing, each other one (`--start`) with what the one before it learnt.
These take fewer pictures a step, each of many tiles.
"""
