"""Projectors: their parameters' names, what they compute, how many positions they leave."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vlmlib import CheckpointError, ShapeError, build_projector, projected_side, space_to_depth
from vlmlib.projectors import KINDS

C, D = 6, 10
TWO_BY_TWO = {
    "layers.1.weight": (4 * C,),
    "layers.1.bias": (4 * C,),
    "layers.2.weight": (D, 4 * C),
    "layers.2.bias": (D,),
    "layers.4.weight": (D, D),
    "layers.4.bias": (D,),
}
PARAMETERS = {
    "identity": {},
    "linear": {"layers.weight": (D, C), "layers.bias": (D,)},
    "mlp2x_gelu": {
        "layers.0.weight": (D, C),
        "layers.0.bias": (D,),
        "layers.2.weight": (D, D),
        "layers.2.bias": (D,),
    },
    "mlp_downsample": TWO_BY_TWO,
    "mlp_downsample_2x2_fix": TWO_BY_TWO,
    "mlp_downsample_3x3_fix": {
        "layers.1.weight": (9 * C,),
        "layers.1.bias": (9 * C,),
        "layers.2.weight": (3 * C, 9 * C),
        "layers.2.bias": (3 * C,),
        "layers.4.weight": (3 * C,),
        "layers.4.bias": (3 * C,),
        "layers.5.weight": (D, 3 * C),
        "layers.5.bias": (D,),
        "layers.7.weight": (D, D),
        "layers.7.bias": (D,),
    },
}


def projector(kind: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = build_projector(kind, C, C if kind == "identity" else D)
        for p in built.parameters():  # LayerNorm's too, or a forgotten one would not be seen
            nn.init.normal_(p, mean=0.3)
    return built.eval()


def features(side: int, b: int = 2) -> torch.Tensor:
    return torch.randn(b, side * side, C, generator=torch.Generator().manual_seed(side))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_named_as_in_checkpoints(kind):
    assert {k: tuple(v.shape) for k, v in projector(kind).state_dict().items()} == PARAMETERS[kind]


def by_hand(kind: str, x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same from the parameters alone, in the order of the papers' figures."""

    def linear(x, n):
        return F.linear(x, p[f"layers.{n}.weight"], p[f"layers.{n}.bias"])

    def norm(x, n):
        return F.layer_norm(x, x.shape[-1:], p[f"layers.{n}.weight"], p[f"layers.{n}.bias"])

    if kind == "identity":
        return x
    if kind == "linear":
        return F.linear(x, p["layers.weight"], p["layers.bias"])
    if kind == "mlp2x_gelu":
        return linear(F.gelu(linear(x, 0)), 2)
    if kind == "mlp_downsample_3x3_fix":
        x = F.gelu(linear(norm(space_to_depth(x, 3), 1), 2))
        return linear(F.gelu(linear(norm(x, 4), 5)), 7)
    return linear(F.gelu(linear(norm(space_to_depth(x, 2), 1), 2)), 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [1, 4, 5, 6])
@torch.no_grad()
def test_same_as_by_hand(kind, side):
    built, x = projector(kind), features(side)
    y = built(x)
    assert y.shape == (2, projected_side(kind, side) ** 2, C if kind == "identity" else D)
    torch.testing.assert_close(y, by_hand(kind, x, built.state_dict()), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_both_names_of_the_2x2_projector_compute_the_same():
    x = features(5)
    assert torch.equal(projector("mlp_downsample")(x), projector("mlp_downsample_2x2_fix")(x))


@torch.no_grad()
def test_pictures_of_a_batch_do_not_mix():
    built, x = projector("mlp_downsample_3x3_fix"), features(7, b=3)
    alone = torch.cat([built(row[None]) for row in x])
    torch.testing.assert_close(built(x), alone, atol=1e-5, rtol=1e-5)


def test_positions_of_nvila():
    assert projected_side("mlp_downsample", 32) ** 2 == 256
    assert projected_side("mlp_downsample_3x3_fix", 33) ** 2 == 121
    assert projected_side("mlp_downsample_3x3_fix", 32) ** 2 == 121  # padded
    assert projected_side("mlp2x_gelu", 24) ** 2 == 576


@given(st.sampled_from(sorted(KINDS)), st.integers(1, 12))
def test_positions_without_computing(kind, side):
    with torch.no_grad():
        assert projector(kind)(features(side)).shape[1] == projected_side(kind, side) ** 2


@pytest.mark.parametrize(
    "call", [lambda k: build_projector(k, C, D), lambda k: projected_side(k, 4)]
)
def test_an_unknown_kind_names_the_known_ones(call):
    with pytest.raises(
        CheckpointError, match="'mlp_downsampel', expected one of .*'mlp_downsample'"
    ):
        call("mlp_downsampel")


def test_errors_name_both_widths():
    with pytest.raises(ShapeError, match="7 channels, mlp_downsample expects 6"):
        projector("mlp_downsample")(torch.zeros(1, 4, 7))
    with pytest.raises(ShapeError, match="6 channels into 10"):
        build_projector("identity", C, D)
    with pytest.raises(ShapeError, match="8 positions are not a square"):
        projector("mlp_downsample")(torch.zeros(1, 8, C))
