"""Muon for processors without bf16.

torch's own always orthogonalises in bf16. Where the processor has no instructions for that it takes
ten times as long as in fp32, and longer than all the rest of a training step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with the same arguments and state, in the type of the gradients."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of all matrices that have a gradient."""
        if closure is not None or any(g["adjust_lr_fn"] for g in self.param_groups):
            raise NotImplementedError("neither closures nor adjust_lr_fn")
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                kept = state.setdefault("momentum_buffer", torch.zeros_like(matrix.grad))
                kept.lerp_(matrix.grad, 1 - momentum)
                wanted = matrix.grad.lerp(kept, momentum) if group["nesterov"] else kept
                update = orthogonal(wanted, group["ns_coefficients"], group["ns_steps"])
                rows, columns = matrix.shape
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.add_(update, alpha=-rate * math.sqrt(max(1, rows / columns)))


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """(m, n) -> (m, n) with the same singular vectors and values near 1, by Newton-Schulz steps.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonal(matrix.T, coefficients, steps).T
    a, b, c = coefficients
    x = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T  # (m, m)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
