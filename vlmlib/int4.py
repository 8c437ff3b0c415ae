"""Four bits a weight: the numbers, the linear layer made of them, and the checkpoints it is in.

A group of neighbouring weights of a row shares a scale s and a zero point z, and each of them is a
whole number q from 0 to 15 that stands for w' = (q - z) s. What is kept and saved are these plain
numbers. torch's kernels want them in an order of their own, which differs from machine to machine:
it is made on first use and never saved. Which layers of a model become such ones, and how well
their numbers are chosen, is the business of `vlmlib.quant`.

Axes: o outputs (rows) and i inputs (columns) of a layer, g groups, e weights of a group; i' is i
filled up with zeros to whole groups.
Sources: llm-awq:awq/quantize/quantizer.py, pytorch:aten/src/ATen/native/cuda/int4mm.cu,
pytorch:aten/src/ATen/native/cpu/int4mm_kernel.cpp, AutoAWQ:awq/modules/linear/gemm.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import AwqConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from .errors import QuantizationError

METHOD = "vlmlib_int4"
"""What config.json calls this format, as `quantization_config.quant_method`."""

KERNEL_GROUPS = (32, 64, 128, 256)
KERNELS = {
    "cpu": torch.ops.aten._weight_int4pack_mm_for_cpu,
    "cuda": torch.ops.aten._weight_int4pack_mm,
}
KERNEL_BLOCK = 64
"""Outputs that lie together in the order of every kernel."""

KERNEL_ROWS = 64
"""Up to so many positions at once go through a kernel, whose time grows with them; for more,
16-bit weights are made and dropped again, which takes the same time for any number."""


# ---- numbers ----


@torch.no_grad()
def quantize(
    weight: Tensor, group_size: int = 128, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, i) weights -> (o, i') numbers 0..15 in uint8, (o, g) scales, (o, g) zero points in uint8.

        s = max(max - min, 1e-5) / 15    z = clamp(-round(min / s), 0, 15)
        q = clamp(round(w / s) + z, 0, 15)

    s is of type `dtype`, by default the weights' own, before it is used. So w' is off by s / 2 at
    most where w is between -z s and (15 - z) s. A group with both signs hardly leaves that range; a
    group on one side of zero and far from it does, and is cut, as in AWQ.
    """
    w = grouped(weight.float(), group_size)
    low, high = w.aminmax(dim=-1)
    scales = ((high - low).clamp(min=1e-5) / 15).to(dtype or weight.dtype)
    s = scales.float()
    zeros = (-(low / s).round()).clamp(0, 15)
    values = ((w / s[..., None]).round() + zeros[..., None]).clamp(0, 15)
    return values.flatten(1).byte(), scales, zeros.byte()


def dequantize(values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """What `quantize` gave -> (o, i') weights w' = (q - z) s, in the type of the scales."""
    q = rearrange(values, "o (g e) -> o g e", g=scales.shape[1]).to(scales.dtype)
    return ((q - zeros[..., None]) * scales[..., None]).flatten(1)


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """(o, i) -> (o, g, e), the last group filled up with zeros."""
    padded = F.pad(weight, (0, -weight.shape[1] % group_size))
    return rearrange(padded, "o (g e) -> o g e", e=group_size)


def pack(values: Tensor) -> Tensor:
    """(o, i') numbers 0..15 -> (o, i'/2) bytes; the even column is in the high half."""
    return values[:, ::2] << 4 | values[:, 1::2]


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1)


# ---- the layer ----


class Int4Linear(nn.Module):
    """nn.Linear with weights of four bits, for inference.

    packed  (o, i'/2) uint8, see `pack`
    scales  (o, g), of the type that is computed in
    zeros   (o, g) uint8
    bias    (o,) or None

    Up to KERNEL_ROWS positions at once in bfloat16 go through torch's kernel, if the size of the
    groups is one of KERNEL_GROUPS and the outputs are a multiple of 16 (on CUDA: of 8, and the GPU
    is an Ampere or newer). Everything else multiplies by `dequantize()`. What is made for the
    kernel on first use takes as much memory as the plain numbers; moving the layer drops it.
    """

    _whole: tuple[Int4Linear, int] | None = None  # a layer it is a part of, and its place there

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int = 128,
        bias: bool = False,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.group_size = group_size
        groups = -(-in_features // group_size)
        whole = {"dtype": torch.uint8, "device": device}
        self.register_buffer("packed", torch.zeros(out_features, groups * group_size // 2, **whole))
        self.register_buffer("scales", torch.zeros(out_features, groups, device=device))
        self.register_buffer("zeros", torch.zeros(out_features, groups, **whole))
        self.register_buffer("bias", torch.zeros(out_features, device=device) if bias else None)

    @classmethod
    def of(
        cls, in_features: int, values: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None
    ) -> Int4Linear:
        """A layer of what `quantize` gives."""
        group_size = values.shape[1] // scales.shape[1]
        layer = cls(in_features, len(values), group_size, bias is not None, device="meta")
        layer.packed, layer.scales, layer.zeros = pack(values), scales, zeros
        layer.bias = None if bias is None else bias.detach()
        return layer

    @classmethod
    def stacked(cls, parts: Sequence[Int4Linear]) -> Int4Linear:
        """One layer with the outputs of all parts, which become views of it. Parts that are whole
        KERNEL_BLOCKs of it also share what is made for the kernel.
        """
        first, ends = parts[0], list(accumulate(part.out_features for part in parts))
        bias = first.bias is not None
        layer = cls(first.in_features, ends[-1], first.group_size, bias, device="meta")
        for name, _ in list(layer.named_buffers()):
            setattr(layer, name, joined(parts, name))
        for part, end in zip(parts, ends, strict=True):
            part._forget()
            part._whole = (layer, end - part.out_features)
        return layer

    def dequantize(self) -> Tensor:
        """(o, i) weights, of the type of the scales."""
        return dequantize(unpack(self.packed), self.scales, self.zeros)[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) -> (..., o)"""
        if not self._is_for_kernel(x) or self._for_kernel is None:
            return F.linear(x, self.dequantize(), self.bias)
        weights, factors = self._for_kernel
        rows = x.reshape(-1, self.in_features)
        if missing := -self.in_features % self.group_size:
            rows = F.pad(rows, (0, missing))
        y = KERNELS[x.device.type](rows.contiguous(), weights, self.group_size, factors)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def _is_for_kernel(self, x: Tensor) -> bool:
        few = 0 < x.numel() <= KERNEL_ROWS * self.in_features
        in_bfloat16 = x.dtype == self.scales.dtype == torch.bfloat16
        return few and in_bfloat16 and not (x.requires_grad and torch.is_grad_enabled())

    @cached_property
    def _for_kernel(self) -> tuple[Tensor, Tensor] | None:
        """Weights in the kernel's order, and (g, o, 2) scales and zero points; None if there is no
        kernel for such a layer. To a kernel a weight is (q - 8) s + z', so z' is (8 - z) s.
        """
        device = self.packed.device
        if self.group_size not in KERNEL_GROUPS or not _has_kernel(device, self.out_features):
            return None
        zeros = (8 - self.zeros.to(self.scales.dtype)) * self.scales
        factors = torch.stack([self.scales.T, zeros.T], dim=-1).contiguous()
        whole, start = self._whole or (self, 0)
        if whole is self or start % KERNEL_BLOCK or self.out_features % KERNEL_BLOCK:
            return _in_kernel_order(self.packed), factors
        weights, _ = whole._for_kernel
        outputs = whole.out_features // len(weights)  # of one row
        return weights[start // outputs : (start + self.out_features) // outputs], factors

    def _forget(self) -> None:
        """Make for the kernel again what is made of other numbers now."""
        for layer in (self, *(self._whole or ())[:1]):
            layer.__dict__.pop("_for_kernel", None)

    def _apply(self, *args, **kwargs):
        self._forget()
        self._whole = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self._forget()
        return super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )


def _in_kernel_order(packed: Tensor) -> Tensor:
    if packed.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack(packed).int(), 1)
    tiles = 2 * packed.shape[1] // 16  # of 16 inputs; the more of them lie together, the better
    together = next(n for n in (8, 4, 2) if tiles % n == 0)
    return torch.ops.aten._convert_weight_to_int4pack(packed.contiguous(), together)


def _has_kernel(device: torch.device, outputs: int) -> bool:
    if device.type == "cpu":
        return outputs % 16 == 0
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and outputs % 8 == 0 and torch.cuda.get_device_capability(device) >= (8, 0)


def joined(modules: Sequence[nn.Module], name: str) -> Tensor | None:
    """Parameters or buffers of that name as one tensor, of which they become views."""
    own = [getattr(module, name) for module in modules]
    if own[0] is None:
        return None
    with torch.inference_mode(own[0].is_inference()):  # what can be trained stays so
        whole = torch.cat([tensor.data for tensor in own])
        for tensor, piece in zip(own, whole.split([len(t) for t in own]), strict=True):
            tensor.data = piece
    return whole


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """Names and plain linear layers in a module."""
    return {name: m for name, m in module.named_modules() if type(m) is nn.Linear}


# ---- checkpoints ----


@dataclass(frozen=True, slots=True)
class Int4Config:
    """`quantization_config` of a checkpoint. Raises QuantizationError.

    layout                  "plain" as `Int4Linear` stores it; "awq" as AutoAWQ's GEMM does
    modules_to_not_convert  names of linear layers of the decoder that have their 16 bits
    """

    group_size: int = 128
    layout: str = "plain"
    modules_to_not_convert: list[str] | None = None
    quant_method: str = METHOD

    def __post_init__(self):
        size = self.group_size
        if not isinstance(size, int) or size < 2 or size % 2 or self.layout not in LAYOUTS:
            raise QuantizationError(
                f"{METHOD} with group_size {size!r} and layout {self.layout!r}: expected an even "
                f"group_size of at least 2 and one of {list(LAYOUTS)}"
            )

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Int4Config | None:
        """From a config.json; None if nothing is quantised."""
        parts = (config, *(config.get(name) or {} for name in ("text_config", "llm_config")))
        found = next((c for part in parts if (c := part.get("quantization_config"))), None)
        if found is None:
            return None
        method = found.get("quant_method")
        if method == "awq":
            return cls._of_awq(found)
        unknown = found.keys() - {f.name for f in fields(cls)}
        if method != METHOD or unknown:
            raise QuantizationError(
                f"quantization_config has quant_method {method!r} and unknown {sorted(unknown)}: "
                f"only {METHOD!r} and 'awq' can be read"
            )
        return cls(**found)

    @classmethod
    def _of_awq(cls, config: Mapping[str, Any]) -> Int4Config:
        found = AwqConfig.from_dict(config)
        if (found.bits, found.format, found.zero_point) != (4, "gemm", True):
            raise QuantizationError(
                f"AWQ with bits {found.bits}, version {str(found.format)!r} and zero_point "
                f"{found.zero_point}: only 4, 'gemm' and True can be read"
            )
        skipped = found.modules_to_not_convert
        return cls(group_size=found.group_size, layout="awq", modules_to_not_convert=skipped)

    def put_into(self, net: PreTrainedModel) -> None:
        """Its config.json is to say that its layers are Int4Linear."""
        vars(net.config.get_text_config(decoder=True)).pop("quantization_config", None)
        net.config.quantization_config = asdict(replace(self, layout="plain"))


def expect_int4(net: PreTrainedModel, config: Int4Config | None) -> PreTrainedModel:
    """Give its decoder the layers that a checkpoint holds; until it is read, they are on "meta"."""
    if config is None:
        return net
    decoder, make = net.get_decoder(), LAYOUTS[config.layout]
    prefix = next(name for name, module in net.named_modules() if module is decoder)
    for name, linear in linears_of(decoder.layers).items():
        full = f"{prefix}.layers.{name}".lstrip(".")
        if should_convert_module(full, config.modules_to_not_convert):
            sizes = (linear.in_features, linear.out_features, config.group_size)
            decoder.layers.set_submodule(name, make(*sizes, linear.bias is not None, "meta"))
    return net


def unpack_net(net: PreTrainedModel, config: Int4Config | None) -> PreTrainedModel:
    """After reading: every four-bit layer becomes an `Int4Linear`."""
    if config is not None:
        for name, module in list(net.named_modules()):
            if isinstance(module, AwqLinear):
                net.set_submodule(name, module.unpacked())
        config.put_into(net)
    return net


AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Bit at which each of eight neighbouring outputs begins in a word of AutoAWQ's GEMM layout: the
word holds outputs 0, 2, 4, 6, 1, 3, 5, 7, the first in its lowest bits."""


class AwqLinear(nn.Module):
    """A linear layer as AutoAWQ's GEMM checkpoints hold it, to be `unpacked` after loading.

    qweight (i, o/8) int32, qzeros (g, o/8) int32, scales (g, o), bias (o,) or None
    """

    def __init__(self, in_features, out_features, group_size, bias=False, device=None):
        super().__init__()
        if in_features % group_size or out_features % 8:
            raise QuantizationError(
                f"an AWQ layer of {in_features} inputs in groups of {group_size} and of "
                f"{out_features} outputs: expected whole groups, and a multiple of 8 outputs"
            )
        words = {"dtype": torch.int32, "device": device}
        groups = in_features // group_size
        self.register_buffer("qweight", torch.zeros(in_features, out_features // 8, **words))
        self.register_buffer("qzeros", torch.zeros(groups, out_features // 8, **words))
        self.register_buffer("scales", torch.zeros(groups, out_features, device=device))
        self.register_buffer("bias", torch.zeros(out_features, device=device) if bias else None)

    def unpacked(self) -> Int4Linear:
        values, zeros = (unpack_awq(words).T.contiguous() for words in (self.qweight, self.qzeros))
        scales = self.scales.T.contiguous()
        return Int4Linear.of(len(self.qweight), values, scales, zeros, self.bias)


def unpack_awq(words: Tensor) -> Tensor:
    """(n, o/8) int32 -> (n, o) numbers 0..15 in uint8."""
    shifts = torch.tensor(AWQ_SHIFTS, dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts & 15).flatten(1).byte()


LAYOUTS = {"plain": Int4Linear, "awq": AwqLinear}
