"""One decode step with nothing in its way: transformers' weights, plain tensor code.

transformers' modules serve every case, and for one token of a small model that generality costs
more than the arithmetic. A `FastDecoder` reads the same weights and does the one case that decoding
needs: one token of one sequence, at the end of its cache. q, k and v are one product, and so are
gate and up, of plain weights or of four-bit ones; rotation and caching are done for all heads at
once. On an NVIDIA GPU the step is recorded as a CUDA graph, so that Python is out of the way too.
The draw is not in it: every request has its own few kernels for that (`vlmlib.sampling`). They are
launched one by one, while the GPU is busy with the step.

Axes: d width, h heads of queries, k heads of keys and of values, e their width, n positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, LlamaModel, PreTrainedModel, Qwen2Model

from .cache import KVCache
from .int4 import Int4Linear, joined

DECODERS = (LlamaModel, Qwen2Model)
ROPES = ("default", "linear", "llama3", "yarn")  # those whose angles do not change with the length

Append = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(2 k, e) keys and then values of a position -> those of all, (1, k, n, e) each."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one decoder layer, (in, out); an Int4Linear has its bias in it."""

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
        self.norm, self.head = decoder.norm.weight, _matrix(net.lm_head)
        self.embeddings = decoder.embed_tokens.weight
        self.mean_square = None
        if self.embeddings.is_cpu and self.embeddings.dtype == torch.float32:
            eps, d = torch.full((1, 1), self.eps), self.embeddings.shape[1]
            self.mean_square = partial(torch.addmm, eps, alpha=1 / d)
        self.rotary = decoder.rotary_emb
        self.table = self.embeddings.new_empty(0, 2, 1, self.head_dim)
        heads = torch.arange(self.heads + 2 * self.kv_heads, device=self.embeddings.device)
        self.turns = (heads < self.heads + self.kv_heads)[:, None]  # values do not
        self.rolled = torch.arange(self.head_dim, device=heads.device).roll(self.head_dim // 2)
        self.still = self.embeddings.new_tensor([1, 0])[:, None, None]
        self.addresses = _addresses(net)
        self.records_graphs = self.embeddings.is_cuda
        self.graphs: WeakKeyDictionary[Cache, StepGraph] = WeakKeyDictionary()
        self.last: StepGraph | None = None

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
        return _addresses(net) == self.addresses

    @torch.no_grad()
    def __call__(self, token: Tensor, cache: KVCache) -> Tensor:
        """Feed one (1, 1) id behind all that `cache` holds -> (1, v) logits, without gradients."""
        n, layers = len(cache), cache.past.layers
        if self.records_graphs:
            logits = self._graph(cache)(token, n)
            for layer in layers:
                layer.hold(n + 1)
        else:
            rotation = self.rotations(n + 1)[n]
            logits = self.logits(token, rotation, [layer.append for layer in layers])
        cache.add(token)
        return logits

    def logits(
        self,
        token: Tensor,
        rotation: Tensor,
        appends: Sequence[Append],
        mask: Tensor | None = None,
    ) -> Tensor:
        """(1, 1) id -> (1, v)

        rotation  (2, 1, e) of its position, see `rotations`
        appends   for each layer, see Append
        mask      (1, n), added to the scores of the positions that `appends` return
        """
        cos, sin = torch.where(self.turns, rotation, self.still).unbind(0)  # (h + 2k, e)
        x = self.embeddings.index_select(0, token[0])  # (1, d)
        for layer, append in zip(self.layers, appends, strict=True):
            y = self.normed(x, layer.norm)
            qkv = _product(y, layer.qkv, layer.qkv_bias).view(-1, self.head_dim)  # (h + 2k, e)
            qkv = torch.addcmul(qkv * cos, qkv.index_select(1, self.rolled), sin)
            q, kv = qkv.split_with_sizes((self.heads, 2 * self.kv_heads))
            keys, values = append(kv)
            # Queries that share their keys stand in a row, as if they were positions.
            q = q.view(1, self.kv_heads, -1, self.head_dim)
            y = F.scaled_dot_product_attention(q, keys, values, mask)
            x = _product(y.reshape(1, -1), layer.o, added=x)
            y = self.normed(x, layer.mlp_norm)
            gate, up = _product(y, layer.gate_up).chunk(2, dim=-1)
            x = _product(F.silu(gate).mul_(up), layer.down, added=x)
        return torch.mm(self.normed(x, self.norm), self.head)

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """F.rms_norm of (1, d). A CPU has no kernel for it: in float32 fewer operations do."""
        if self.mean_square is None:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return x * self.mean_square(x, x.T).rsqrt() * weight

    def rotations(self, length: int) -> Tensor:
        """(n, 2, 1, e) cosines and sines of so many positions or more. The sines of the first half
        of e are negative: what is turned is x cos + roll(x, e / 2) sin.
        """
        if length > len(self.table):
            positions = torch.arange(max(256, 2 * length), device=self.embeddings.device)
            cos, sin = self.rotary(self.embeddings, positions[None])  # (1, n, e)
            sin[..., : self.head_dim // 2] *= -1
            self.table = torch.stack([cos[0], sin[0]], dim=1)[:, :, None]
        return self.table

    def _graph(self, cache: KVCache) -> StepGraph:
        """For a cache with room for one more position: its own; the last one, if no cache uses it
        any more, since recording takes as long as many steps; or a new one.

        A graph holds the memory of its cache. All but the last one go when their cache goes or has
        outgrown them.
        """
        past = cache.past
        for layer in past.layers:
            layer.make_room(len(cache) + 1, layer.keys)
        graph = self.graphs.get(past)
        if graph is None or not graph.is_of(past):
            graph = self.last
            if graph is not None and graph.fits(past):
                graph.move_in(past)
            else:
                graph = StepGraph(self, past)
            self.graphs[past] = graph
        self.last = graph
        return graph


class StepGraph:
    """A step in a cache of a fixed size, recorded as a CUDA graph: one launch instead of hundreds.

    A graph does the same on the same memory each time. So the position is a number in that memory,
    new keys and values are written where it says, and attention reads all the room there is, with
    what lies behind the position masked.
    """

    @torch.inference_mode(False)  # so that its numbers can be written in and out of that mode
    def __init__(self, decoder: FastDecoder, past: Cache) -> None:
        self.decoder, self.user = ref(decoder), ref(past)  # the decoder holds the graph
        self.buffers = [layer.buffer for layer in past.layers]
        room, device = self.buffers[0].shape[3], self.buffers[0].device
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.positions = torch.arange(room, device=device)
        self.rotations = decoder.rotations(room)  # held here: the decoder may make longer ones
        self.replay: Callable[[], Tensor] | None = None

    def is_of(self, past: Cache) -> bool:
        """Whether the cache still lies in the memory that the graph works on."""
        return all(
            layer.buffer is own for layer, own in zip(past.layers, self.buffers, strict=True)
        )

    def fits(self, past: Cache) -> bool:
        """Whether the memory is free, or was outgrown by this cache, and is of the right size."""
        same_size = past.layers[0].buffer.shape == self.buffers[0].shape
        return same_size and self.user() in (None, past)

    def move_in(self, past: Cache) -> None:
        """From now on the cache lies in this memory."""
        self.user = ref(past)
        for layer, own in zip(past.layers, self.buffers, strict=True):
            n = layer.get_seq_length()
            layer.buffer = own.copy_(layer.buffer)
            layer.hold(n)

    def __call__(self, token: Tensor, n: int) -> Tensor:
        """(1, 1) id for position n -> (1, v) logits"""
        self.token.copy_(token)
        self.at.fill_(n)
        if self.replay is None:
            logits = self.run()  # once as it is: kernels load and warm up outside of a graph
            self.replay = record(self.run, self.token.device)
            return logits
        return self.replay().clone()  # the next step writes over it

    def run(self) -> Tensor:
        rotation = self.rotations.index_select(0, self.at)[0]
        appends = [partial(_write, buffer, self.at) for buffer in self.buffers]
        mask = torch.zeros_like(self.positions, dtype=rotation.dtype)
        mask = mask.masked_fill(self.positions > self.at, -torch.inf)[None]
        return self.decoder().logits(self.token, rotation, appends, mask)


def record(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A function as a CUDA graph -> what does the same again, and returns the same tensor."""
    graph, how = torch.cuda.CUDAGraph(), {"capture_error_mode": "thread_local"}
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=side_stream(device), **how):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@lru_cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """To record on. torch's own is on the GPU that recorded first, whichever is to record now."""
    return torch.cuda.Stream(device)


def _write(buffer: Tensor, at: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`GrowingLayer.append` at a position that is known on the device only."""
    buffer.index_copy_(3, at, rows.view(2, 1, -1, 1, rows.shape[-1]))
    return buffer.unbind(0)


def _product(x: Tensor, weight: Tensor | Int4Linear, added: Tensor | None = None) -> Tensor:
    """Of (1, i) -> (1, o), and what is to be added."""
    if isinstance(weight, Tensor):
        return torch.mm(x, weight) if added is None else torch.addmm(added, x, weight)
    return weight(x) if added is None else added + weight(x)


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
        o=_matrix(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=gate_up,
        down=_matrix(mlp.down_proj),
    )


def _matrix(layer: nn.Linear | Int4Linear) -> Tensor | Int4Linear:
    return layer if isinstance(layer, Int4Linear) else layer.weight.detach().T


def _addresses(net: PreTrainedModel) -> list[int]:
    """Of all weights; others if they were moved, cast or exchanged."""
    decoder = net.get_decoder()
    weights = chain(decoder.parameters(), decoder.buffers(), net.lm_head.parameters())
    return [weight.data_ptr() for weight in weights]


def _fuse(parts: list) -> tuple[Tensor | Int4Linear, Tensor | None]:
    """Several layers that read one input as one, with a bias that is not in it."""
    if isinstance(parts[0], Int4Linear):
        return Int4Linear.stacked(parts), None
    return joined(parts, "weight").T, joined(parts, "bias")
