"""One decode step with nothing in its way: transformers' weights, plain tensor code.

transformers' modules serve every case, and for one token of a small model that generality costs
more than the arithmetic. A `FastDecoder` reads the same weights and does the one case that decoding
needs: one token of one sequence, at the end of its cache. q, k and v are one product, and so are
gate and up, of plain weights or of four-bit ones; rotation and caching are done for all heads at
once.

Axes: d width, h heads of queries, k heads of keys and of values, e their width, n positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaModel, PreTrainedModel, Qwen2Model

from .cache import KVCache
from .int4 import Int4Linear

DECODERS = (LlamaModel, Qwen2Model)
ROPES = ("default", "linear", "llama3", "yarn")  # those whose angles do not change with the length


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one decoder layer, each (out, in); an Int4Linear has its bias in it."""

    norm: Tensor
    qkv: Tensor | Int4Linear
    qkv_bias: Tensor | None
    o: Tensor | Int4Linear
    mlp_norm: Tensor
    gate_up: Tensor | Int4Linear
    down: Tensor | Int4Linear


class FastDecoder:
    """Llama's or Qwen2's decoder with its head. Shares its weights with `net`: fused matrices take
    the place of the separate ones, which become views of them.
    """

    def __init__(self, net: PreTrainedModel) -> None:
        decoder = net.get_decoder()
        config = decoder.config
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = decoder.layers[0].self_attn.head_dim
        self.eps = config.rms_norm_eps
        self.layers = [_fused(layer) for layer in decoder.layers]
        self.norm, self.head = decoder.norm.weight, net.lm_head.weight
        self.embeddings = decoder.embed_tokens.weight
        self.rotary, self.cos, self.sin = decoder.rotary_emb, None, None

    @staticmethod
    def supports(net: PreTrainedModel) -> bool:
        """Whether this is a decoder that `FastDecoder` knows, with weights that it can fuse."""
        decoder = net.get_decoder()
        if type(decoder) not in DECODERS or getattr(net.lm_head, "bias", None) is not None:
            return False
        config = decoder.config
        attentions = set(getattr(config, "layer_types", None) or ["full_attention"])
        return (
            config.hidden_act == "silu"
            and attentions == {"full_attention"}
            and decoder.rotary_emb.rope_type in ROPES
            and all(map(_is_plain, decoder.layers))
        )

    def is_current(self, net: PreTrainedModel) -> bool:
        """Whether the weights of `net` are still those that were fused: it may have been moved."""
        first = _weight(net.get_decoder().layers[0].self_attn.q_proj)
        return _address(first) == _address(self.layers[0].qkv)

    def __call__(self, token: Tensor, cache: KVCache) -> Tensor:
        """Feed one (1, 1) id behind all that `cache` holds -> (1, v) logits."""
        n = len(cache)
        cache.content.append(int(token))
        cos, sin = self._rotation(n)
        x = F.embedding(token[0], self.embeddings)  # (1, d)
        width = x.shape[1:]
        for layer, past in zip(self.layers, cache.past.layers, strict=True):
            y = F.rms_norm(x, width, layer.norm, self.eps)
            qkv = _product(y, layer.qkv, layer.qkv_bias).view(-1, self.head_dim)  # (h + 2k, e)
            qkv = torch.addcmul(qkv * cos, qkv.roll(self.head_dim // 2, -1), sin)
            keys, values = past.append(qkv[self.heads :])
            q = qkv[: self.heads].view(1, self.heads, 1, self.head_dim)
            y = F.scaled_dot_product_attention(
                q, keys, values, enable_gqa=self.heads != self.kv_heads
            )
            x = _added(x, y.view(1, -1), layer.o)
            y = F.rms_norm(x, width, layer.mlp_norm, self.eps)
            gate, up = _product(y, layer.gate_up).chunk(2, dim=-1)
            x = _added(x, F.silu(gate).mul_(up), layer.down)
        return F.linear(F.rms_norm(x, width, self.norm, self.eps), self.head)

    def _rotation(self, n: int) -> tuple[Tensor, Tensor]:
        """(h + 2k, e) cosines and sines for position n: 1 and 0 for values, which do not turn."""
        if self.cos is None or n >= len(self.cos):
            self._make_tables(max(256, 2 * n))
        return self.cos[n], self.sin[n]

    def _make_tables(self, length: int) -> None:
        like, half = self.embeddings[:1, : self.head_dim], self.head_dim // 2
        cos, sin = self.rotary(like, torch.arange(length, device=like.device)[None])  # (1, n, e)
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        turned = self.heads + self.kv_heads
        cos, sin = (x[0, :, None].repeat(1, turned + self.kv_heads, 1) for x in (cos, sin))
        cos[:, turned:], sin[:, turned:] = 1, 0
        self.cos, self.sin = cos, sin


def _product(x: Tensor, weight: Tensor | Int4Linear, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias) if isinstance(weight, Tensor) else weight(x)


def _added(x: Tensor, y: Tensor, weight: Tensor | Int4Linear) -> Tensor:
    """x plus the product of y."""
    return torch.addmm(x, y, weight.T) if isinstance(weight, Tensor) else x + weight(y)


def _is_plain(layer: nn.Module) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    outer = (attention.o_proj, mlp.down_proj, mlp.gate_proj, mlp.up_proj)
    inner = (attention.q_proj, attention.k_proj, attention.v_proj)
    kinds = {type(m) for m in (*inner, *outer)}
    return kinds in ({nn.Linear}, {Int4Linear}) and all(m.bias is None for m in outer)


def _fused(layer: nn.Module) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = _fuse([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up, _ = _fuse([mlp.gate_proj, mlp.up_proj])
    return Layer(
        norm=layer.input_layernorm.weight,
        qkv=qkv,
        qkv_bias=qkv_bias,
        o=_weight(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=gate_up,
        down=_weight(mlp.down_proj),
    )


def _weight(layer: nn.Linear | Int4Linear) -> Tensor | Int4Linear:
    return layer if isinstance(layer, Int4Linear) else layer.weight


def _address(weight: Tensor | Int4Linear) -> int:
    """Of what lies elsewhere after the layer was moved or cast."""
    return (weight.scales if isinstance(weight, Int4Linear) else weight).data_ptr()


def _fuse(parts: list) -> tuple[Tensor | Int4Linear, Tensor | None]:
    """Several layers that read one input as one, with a bias that is not in it."""
    if isinstance(parts[0], Int4Linear):
        return Int4Linear.stacked(parts, partial(_join, parts)), None
    return _join(parts, "weight"), _join(parts, "bias")


def _join(parts: list[nn.Module], name: str) -> Tensor | None:
    """Parameters or buffers of several modules as one tensor, of which they become views."""
    own = [getattr(part, name) for part in parts]
    if own[0] is None:
        return None
    joined = torch.cat([parameter.data for parameter in own])
    for parameter, piece in zip(own, joined.split([len(p) for p in own]), strict=True):
        parameter.data = piece
    return joined
