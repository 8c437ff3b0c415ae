"""From the width of a vision tower to that of a language model: NVILA's and LLaVA's projectors.

Parameters are named as in NVILA's checkpoints: `layers.N.weight`, where folding pixels into
channels is layer 0 and has none. Source: VILA:llava/model/multimodal_projector/base_projector.py.
"""

from __future__ import annotations

from torch import Tensor, nn

from .chessboard import space_to_depth
from .errors import CheckpointError, ShapeError


class SpaceToDepth(nn.Module):
    """(b, n, c) -> (b, n / factor ** 2, factor ** 2 * c), see `space_to_depth`."""

    def __init__(self, factor: int):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return space_to_depth(x, self.factor)

    def extra_repr(self) -> str:
        return str(self.factor)


class Projector(nn.Module):
    """(b, n, c) features -> (b, m, d); m is `projected_side` squared for n = side squared."""

    def __init__(self, kind: str, c_in: int, layers: nn.Module):
        super().__init__()
        self.kind = kind
        self.c_in = c_in
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.c_in:
            raise ShapeError(
                f"features have {x.shape[-1]} channels, {self.kind} expects {self.c_in}"
            )
        return self.layers(x)


def _identity(c: int, d: int) -> nn.Module:
    if c != d:
        raise ShapeError(f"an identity cannot turn {c} channels into {d}")
    return nn.Identity()


def _mlp(c: int, d: int) -> nn.Module:
    return nn.Sequential(nn.Linear(c, d), nn.GELU(), nn.Linear(d, d))


def _downsample_2x2(c: int, d: int) -> nn.Module:
    return nn.Sequential(SpaceToDepth(2), nn.LayerNorm(4 * c), *_mlp(4 * c, d))


def _downsample_3x3(c: int, d: int) -> nn.Module:
    return nn.Sequential(
        SpaceToDepth(3),
        nn.LayerNorm(9 * c),
        nn.Linear(9 * c, 3 * c),
        nn.GELU(),
        nn.LayerNorm(3 * c),
        *_mlp(3 * c, d),
    )


# kind -> (how to build the layers, how many positions a side become one)
KINDS = {
    "identity": (_identity, 1),
    "linear": (nn.Linear, 1),
    "mlp2x_gelu": (_mlp, 1),
    "mlp_downsample": (_downsample_2x2, 2),
    "mlp_downsample_2x2_fix": (_downsample_2x2, 2),
    "mlp_downsample_3x3_fix": (_downsample_3x3, 3),
}


def build_projector(kind: str, c_in: int, d_out: int) -> Projector:
    """A projector with fresh weights, by the name that checkpoints call it. Raises CheckpointError.

    c_in is the tower's width, times the number of scales where there are several (3 * 1152).
    """
    make, _ = _known(kind)
    return Projector(kind, c_in, make(c_in, d_out))


def projected_side(kind: str, side: int) -> int:
    """side x side positions in -> how many a side come out: 32 -> 16 for `mlp_downsample`. Raises
    CheckpointError for a kind that is not known.
    """
    return -(-side // folded(kind))


def folded(kind: str) -> int:
    """How many positions a side a projector folds into one."""
    _, factor = _known(kind)
    return factor


def _known(kind: str):
    if kind not in KINDS:
        raise CheckpointError(f"unknown projector {kind!r}, expected one of {list(KINDS)}")
    return KINDS[kind]
