"""Layers for the kernels: weights stay quantized, and what lies between matrix products is fused around them.

Latent attention is expanded for prefill, and absorbed to decode one token of each sequence; see attention.py. What a
layer's FFN adds to the residual stream the next layer's norm adds: until then it is pending.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.spec import Router
from dsv2quant.kernels import ops
from dsv2quant.kernels.activations import Normed
from dsv2quant.kernels.mla_prefill import is_served
from dsv2quant.model.attention import grouped, softmax_scale, weighed
from dsv2quant.model.cache import KVCache
from dsv2quant.model.experts import Stack
from dsv2quant.model.layers import RMSNorm
from dsv2quant.model.quantized import Codes, Linear, Projections, Quantization

A = TypeVar("A")
B = TypeVar("B")


class Stream(NamedTuple):
    """Hidden states [T, hidden] less what is pending: a dense or shared FFN's output, and those of the routed experts,
    weighted, float32 [T, k, hidden]."""

    x: torch.Tensor
    addend: torch.Tensor | None = None
    pairs: torch.Tensor | None = None

    def settled(self) -> torch.Tensor:
        total = self.x.float()
        if self.addend is not None:
            total = total + self.addend
        return (total if self.pairs is None else total + self.pairs.sum(1)).to(self.x.dtype)


class Step(NamedTuple):
    """One new token of each of T sequences: its position, int32 [T], the tokens there are with it, and the cosines and
    sines of all positions' rotations, float32 [positions, qk_rope_head_dim / 2, 2]."""

    positions: torch.Tensor
    lengths: torch.Tensor
    angles: torch.Tensor


@dataclass
class FusedFFN:
    """down(silu(gate(x)) · up(x))."""

    gate_up: Projections
    down: Projections

    def __call__(self, x: Normed) -> torch.Tensor:
        gate, up = self.gate_up(x.normed, codes_of(x))
        granularity, scale = self.down.quantization
        if granularity is None:
            (out,) = self.down(ops.silu_mul(gate, up))
        else:
            (out,) = self.down(None, ops.silu_mul_codes(gate, up, granularity, scale))
        return out


@dataclass
class FusedMoE:
    """Routed experts and shared ones; `router` is float32 [experts, hidden], `router_parts` the same as BF16's sum,
    and `router_bias` its correction bias, float32 [experts], if it has one."""

    routing: Router
    router: torch.Tensor
    router_parts: torch.Tensor
    router_bias: torch.Tensor | None
    experts: Stack
    shared: FusedFFN | None

    def __call__(self, x: Normed) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """The shared experts' output, the routed ones' by pair, and the chosen experts [T, k]."""
        shared = self.shared
        # On an H200, one token: 1.70 ms a step of V2-Lite with the router in the first branch, 1.93 before the fork.
        (pairs, chosen), addend = beside(
            lambda: self._routed(x), lambda: None if shared is None else shared(x), x.normed.device
        )
        return addend, pairs, chosen

    def _routed(self, x: Normed) -> tuple[torch.Tensor, torch.Tensor]:
        logits = ops.router_logits(x.normed, self.router, self.router_parts)
        weights, chosen, routes = ops.route_and_sort(logits, self.routing, self.router_bias, self.experts.wide)
        shared = self.shared
        if shared is not None and shared.gate_up.quantization.granularity != self.experts.quantization.granularity:
            x = Normed(x.residual, x.normed, None, None)  # quantized as the shared experts alone want it
        return self.experts(x, weights, chosen, routes), chosen


def beside(main: Callable[[], A], aside: Callable[[], B], device: torch.device) -> tuple[A, B]:
    """What both give; on a CUDA device `aside` goes to a second stream, in a graph to a second branch. What they share
    must live until both are done."""
    if device.type != "cuda":
        return main(), aside()
    current, second = torch.cuda.current_stream(device), _second_stream(device)
    second.wait_stream(current)
    with torch.cuda.stream(second):
        b = aside()
    a = main()
    current.wait_stream(second)
    return a, b


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@dataclass
class FusedLatentAttention:
    """One layer's latent attention: `qkv_a` makes the queries, or their latent, and the latent with the key; `w_k`
    [heads, qk_nope_head_dim, kv_lora_rank] and `w_v` [heads, v_head_dim, kv_lora_rank] are kv_b's halves in BF16."""

    config: ModelConfig
    qkv_a: Projections
    q_norm: RMSNorm | None
    q_b: Projections | None
    kv_norm: RMSNorm
    kv_b: Linear
    w_k: torch.Tensor
    w_v: torch.Tensor
    o: Projections

    @property
    def quantization(self) -> Quantization:
        """That of the input."""
        return self.qkv_a.quantization

    def queries(self, x: Normed) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, heads · qk_head_dim] before rotation, and latent and key [T, kv_lora_rank + qk_rope_head_dim] before norm
        and rotation."""
        q, kv = self.qkv_a(x.normed, codes_of(x))
        if self.q_b is not None:
            assert self.q_norm is not None
            n = normed(Stream(q), self.q_norm, self.q_b.quantization)
            (q,) = self.q_b(n.normed, codes_of(n))
        return q, kv

    def decode(self, x: Normed, cache: KVCache, step: Step) -> torch.Tensor:
        c = self.config
        q, kv = self.queries(x)
        absorbed = q.new_empty(len(q), c.num_attention_heads, c.kv_lora_rank + c.qk_rope_head_dim)
        nope = q.unflatten(1, (c.num_attention_heads, c.qk_head_dim))[..., : c.qk_nope_head_dim]
        scale, norm = scale_of(cache), self.kv_norm
        beside(
            lambda: ops.absorb_k(nope, self.w_k, absorbed),
            lambda: ops.append_latents(
                q,
                kv,
                norm.weight,
                norm.eps,
                step.angles,
                step.positions,
                cache.store,
                scale,
                absorbed,
                c.rope_halves,
            ),
            q.device,
        )
        mixed = ops.mla_decode(
            absorbed, cache.store, step.lengths, c.kv_lora_rank, softmax_scale(c), scale, dtype=q.dtype
        )
        (out,) = self.o(ops.absorb_v(mixed, self.w_v))
        return out

    def prefill(self, x: Normed, batch: int, rope: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        c, norm = self.config, self.kv_norm
        q, kv = self.queries(x)
        # Where a kernel has this attention it turns the queries, and reads keys and values where they lie.
        served = is_served(c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, q.dtype, q.device)
        granularity, scale = self.kv_b.quantization
        first = 0 if cache is None else cache.length
        end = first + len(rope) if cache is None else cache.room(len(rope))
        table = torch.view_as_real(rope)
        made = ops.append_prompt(
            kv,
            norm.weight,
            norm.eps,
            table,
            None if served else q,
            0 if served else c.num_attention_heads,
            cache=None if cache is None else cache.store,
            cache_scale=None if cache is None else scale_of(cache),
            first=first,
            halves=c.rope_halves,
            quantize=granularity,
            scale=scale,
        )
        latents, keys = made.latents, made.keys
        codes = None if made.codes is None or made.scales is None else (made.codes, made.scales)
        if cache is not None:
            cache.length = end
            if first:  # behind what earlier prompts left
                new = (part.unflatten(0, (batch, -1)) for part in (latents, keys))
                parts = zip(cache.known(first, kv.dtype), new, strict=True)
                latents, keys = (torch.cat(part, 1).flatten(0, 1) for part in parts)
                codes = None
        values = self.kv_b(latents, codes)
        if served:
            q, values, keys = (rows.unflatten(0, (batch, -1)) for rows in (q, values, keys))
            out = ops.mla_prefill(q, table, values, keys, softmax_scale(c), halves=c.rope_halves).flatten(0, 1)
        else:
            out = self._weighed(q, values, keys, batch)
        (out,) = self.o(out)
        return out

    def _weighed(self, q: torch.Tensor, values: torch.Tensor, keys: torch.Tensor, batch: int) -> torch.Tensor:
        """By torch's attention, of turned queries: [T, heads · v_head_dim]."""
        c = self.config
        k = ops.prompt_keys(values, keys, c.num_attention_heads, c.qk_nope_head_dim)
        q = q.unflatten(1, (c.num_attention_heads, c.qk_head_dim))
        v = values.unflatten(1, (c.num_attention_heads, -1))[..., c.qk_nope_head_dim :]
        q, k, v = (y.unflatten(0, (batch, -1)).transpose(1, 2) for y in (q, k, v))  # [batch, heads, tokens, ·]
        return weighed(q, k, v, softmax_scale(c)).flatten(2).flatten(0, 1)


@dataclass
class FusedGroupedAttention:
    """One layer's plain attention: `qkv` makes queries, keys and values."""

    config: ModelConfig
    qkv: Projections
    o: Projections

    @property
    def quantization(self) -> Quantization:
        """That of the input."""
        return self.qkv.quantization

    def decode(self, x: Normed, cache: KVCache, step: Step) -> torch.Tensor:
        c, scale = self.config, scale_of(cache)
        q, k, v = self.qkv(x.normed, codes_of(x))
        q = ops.append_keys(q, k, v, step.angles, step.positions, cache.store, scale, c.qk_head_dim)
        (out,) = self.o(ops.gqa_decode(q, cache.store, step.lengths, softmax_scale(c), scale).flatten(1))
        return out

    def prefill(self, x: Normed, batch: int, rope: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        q, k, v = (y.unflatten(0, (batch, -1)) for y in self.qkv(x.normed, codes_of(x)))  # [batch, new, ·]
        (out,) = self.o(grouped(self.config, q, k, v, rope, cache, as_stored=False).flatten(0, 1))
        return out


def scale_of(cache: KVCache) -> torch.Tensor | None:
    """As kernels take it: of a float8 cache."""
    return cache.scale if cache.store.dtype.itemsize == 1 else None


@dataclass
class FusedLayer:
    """A decoder layer."""

    input_norm: RMSNorm
    attention: FusedLatentAttention | FusedGroupedAttention
    post_attention_norm: RMSNorm
    ffn: FusedFFN | FusedMoE

    def decode(self, stream: Stream, cache: KVCache, step: Step) -> tuple[Stream, torch.Tensor | None]:
        """One token of each sequence: (the stream behind this layer, chosen experts [T, k] or None)."""
        x = self.normed(stream)
        return self._feed_forward(x.residual, self.attention.decode(x, cache, step))

    def __call__(
        self, x: torch.Tensor, rope: torch.Tensor, cache: KVCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prefill, x [batch, new, hidden]: as DecoderLayer's."""
        stream, chosen = self.prefill(self.normed(Stream(x.flatten(0, 1))), len(x), rope, cache)
        return stream.settled().view_as(x), chosen

    def normed(self, stream: Stream) -> Normed:
        """What the layer begins with. The stream, whose pairs are large, may be forgotten then."""
        return normed(stream, self.input_norm, self.attention.quantization)

    def prefill(
        self, x: Normed, batch: int, rope: torch.Tensor, cache: KVCache | None, *, last: bool = False
    ) -> tuple[Stream, torch.Tensor | None]:
        """`normed` of the tokens of `batch` sequences, one sequence's after the other: (the stream behind this layer,
        chosen experts [T, k] or None); `last`: of each sequence's last token alone, which is all that the next one
        needs where no layer follows."""
        residual, attended = x.residual, self.attention.prefill(x, batch, rope, cache)
        if last:
            residual, attended = (rows.unflatten(0, (batch, -1))[:, -1] for rows in (residual, attended))
        return self._feed_forward(residual, attended)

    def decoded(self, x: torch.Tensor, rope: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token by token: as DecoderLayer's."""
        angles = torch.view_as_real(rope)
        out, experts = [], []
        for t in range(x.shape[1]):
            position = torch.full((len(x),), t, dtype=torch.int32, device=x.device)
            step = Step(position, position + 1, angles)
            stream, chosen = self.decode(Stream(x[:, t].contiguous()), cache, step)
            out.append(stream.settled())
            experts.append(chosen)
        chosen_by_token = [e for e in experts if e is not None]
        return torch.stack(out, 1), torch.stack(chosen_by_token, 1) if chosen_by_token else None

    def _feed_forward(self, residual: torch.Tensor, attended: torch.Tensor) -> tuple[Stream, torch.Tensor | None]:
        if isinstance(self.ffn, FusedFFN):
            x = normed(Stream(residual, attended), self.post_attention_norm, self.ffn.gate_up.quantization)
            return Stream(x.residual, self.ffn(x)), None
        shared = self.ffn.shared
        wanted = self.ffn.experts.quantization if shared is None else shared.gate_up.quantization
        x = normed(Stream(residual, attended), self.post_attention_norm, wanted)
        addend, pairs, chosen = self.ffn(x)
        return Stream(x.residual, addend, pairs), chosen


def normed(stream: Stream, norm: RMSNorm, quantization: Quantization) -> Normed:
    """The stream with what was pending added, and its norm, quantized as asked."""
    granularity, scale = quantization
    return ops.add_norm(
        stream.x, norm.weight, norm.eps, addend=stream.addend, pairs=stream.pairs, quantize=granularity, scale=scale
    )


def codes_of(x: Normed) -> Codes | None:
    return None if x.codes is None or x.scales is None else (x.codes, x.scales)
