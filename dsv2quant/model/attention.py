"""Multi-head latent attention (arXiv:2405.04434, section 2.1), expanded for prefill and absorbed for decode; plain
attention, of heads that may share keys and values; and rotary position embedding, plain, by linear scaling, and by YaRN
with DeepSeek's mscale.

The cache holds one latent c [kv_lora_rank] and one rotated key k_pe [qk_rope_head_dim] per token, shared by all heads.
Expanded: kv_b turns every cached latent into per-head keys and values. Absorbed: its K half moves into the query and
its V half behind the weighted sum of latents, so that no key or value is ever formed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dsv2quant.arch.config import ModelConfig, Yarn
from dsv2quant.model.cache import Cache
from dsv2quant.model.layers import Linear, RMSNorm, Served, Stage, Stages

QUERIES = 128  # of a block, or fewer,
SCORES = 1 << 23  # so that there are so many at a time


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 · mscale · ln(factor) + 1 (arXiv:2309.00071, eq. 22, with DeepSeek's mscale; `yarn_get_mscale`)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """1/√(qk head dim), times mscale(mscale_all_dim)² under YaRN (`DeepseekV2Attention.__init__`)."""
    scale = config.qk_head_dim**-0.5
    if config.yarn is not None and config.yarn.mscale_all_dim:
        scale *= yarn_mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return scale


class Rope:
    """Rotates pairs of the last dimension, which has qk_rope_head_dim elements: (2i, 2i + 1), or by halves
    (i, i + qk_rope_head_dim / 2), as Llama does."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        dim = config.qk_rope_head_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        frequencies = 1.0 / config.rope_theta**exponents / config.rope_linear  # [dim/2], radians per position
        self._magnitude = 1.0
        if config.yarn is not None:
            yarn = config.yarn
            frequencies = _yarn_frequencies(frequencies, yarn, dim, config.rope_theta)
            self._magnitude = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
        self._frequencies = frequencies.to(device)

    def table(self, positions: torch.Tensor) -> torch.Tensor:
        """Complex rotations [tokens, dim/2] of integer positions [tokens]."""
        angles = positions.float()[:, None] * self._frequencies
        return torch.polar(torch.full_like(angles, self._magnitude), angles)

    @staticmethod
    def pairs(x: torch.Tensor, halves: bool) -> torch.Tensor:
        """What turns together of x [..., dim], side by side: [..., dim / 2, 2]."""
        return x.unflatten(-1, (2, -1)).transpose(-1, -2) if halves else x.unflatten(-1, (-1, 2))

    @staticmethod
    def rotate(x: torch.Tensor, table: torch.Tensor, halves: bool) -> torch.Tensor:
        """Rotate x [..., tokens, dim] in float32; back in x's dtype."""
        pairs = Rope.pairs(x.float(), halves)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * table)
        return (turned.transpose(-1, -2) if halves else turned).flatten(-2).to(x.dtype)


def _yarn_frequencies(frequencies: torch.Tensor, yarn: Yarn, dim: int, theta: float) -> torch.Tensor:
    """Blend extrapolated and interpolated frequencies: pairs that turn more than beta_fast times over the original
    context keep theirs, those under beta_slow turns are divided by the factor (`DeepseekV2YarnRotaryEmbedding`)."""

    def pair_with(turns: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), dim - 1)
    span = high - low or 0.001
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return frequencies / yarn.factor * interpolated + frequencies * (1 - interpolated)


class Attention(ABC):
    """One layer's attention: the stages before its output, `context`, and the last one."""

    o_proj: Linear

    @abstractmethod
    def context(
        self, x: torch.Tensor, rope: torch.Tensor, cache: Cache | None = None, absorbed: bool = False
    ) -> Stages[torch.Tensor]:
        """The stages before: x → the heads' weighted values, [batch, new, heads · v_head_dim]. What `absorbed` reads of
        the cache it reads as it is stored."""

    def output(self, context: torch.Tensor) -> Stages[torch.Tensor]:
        """The last stage: what `context` returns → [..., hidden]."""
        yield Stage((self.o_proj,), context)
        return self.o_proj(context)

    def stages(
        self, x: torch.Tensor, rope: torch.Tensor, cache: Cache | None = None, absorbed: bool = False
    ) -> Stages[torch.Tensor]:
        """x [batch, new, hidden] → the same shape; `rope` [new, ·] is the table of the new positions."""
        return (yield from self.output((yield from self.context(x, rope, cache, absorbed))))


@dataclass
class LatentAttention(Attention):
    """Latent attention. Exactly one of `q_proj` and the latent query path (`q_a_proj` … `q_b_proj`) is set."""

    config: ModelConfig
    kv_a_proj_with_mqa: Linear
    kv_a_layernorm: RMSNorm
    kv_b_proj: Linear
    o_proj: Linear
    q_proj: Linear | None = None
    q_a_proj: Linear | None = None
    q_a_layernorm: RMSNorm | None = None
    q_b_proj: Linear | None = None

    def context(
        self, x: torch.Tensor, rope: torch.Tensor, cache: Cache | None = None, absorbed: bool = False
    ) -> Stages[torch.Tensor]:
        """kv_b_proj comes once more for each of its halves where attention is absorbed."""
        c, q_linear, served = self.config, self.q_proj, Served(x)
        q_input: torch.Tensor | Served = served
        if q_linear is None:
            assert self.q_a_proj is not None
            assert self.q_a_layernorm is not None
            assert self.q_b_proj is not None
            yield Stage((self.q_a_proj, self.kv_a_proj_with_mqa), x)
            q_linear, q_input = self.q_b_proj, self.q_a_layernorm(self.q_a_proj(served))
            yield Stage((q_linear,), q_input)
        else:
            yield Stage((q_linear, self.kv_a_proj_with_mqa), x)
        latent, k_pe = self.kv_a_proj_with_mqa(served).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        latent, k_pe = self.kv_a_layernorm(latent), Rope.rotate(k_pe, rope, c.rope_halves)
        if cache is not None:
            latent, k_pe = cache.append(latent, k_pe, as_stored=absorbed)  # [batch, all, ·]
        yield Stage((self.kv_b_proj,), latent, beside=self.q_proj is None)
        q = q_linear(q_input).unflatten(-1, (c.num_attention_heads, c.qk_head_dim)).transpose(1, 2)
        q_nope, q_pe = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)  # [batch, heads, new, ·]
        q_pe = Rope.rotate(q_pe, rope, c.rope_halves)
        if not absorbed:
            return expanded(c, self.kv_b_proj(latent), q_nope, q_pe, k_pe)
        yield Stage((self.kv_b_proj,), q_nope, half="k")
        mixed = self.mixed(q_nope, q_pe, latent, k_pe)
        yield Stage((self.kv_b_proj,), mixed, half="v")
        return self.values(mixed)

    def mixed(self, q_nope: torch.Tensor, q_pe: torch.Tensor, latent: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
        """Absorbed: the latents [batch, all, ·] as each query weighs them, [batch, heads, new, kv_lora_rank]."""
        c = self.config
        w_k, _ = self._halves(latent.dtype)
        q = torch.cat([torch.einsum("bhqn,hnl->bhql", q_nope, w_k), q_pe], -1)
        # The one key that all heads share, which serves as the value, too: its rotated end is cut off.
        k = torch.cat([latent, k_pe], -1).unsqueeze(1).expand(-1, c.num_attention_heads, -1, -1)
        return _attend(q, k, k, softmax_scale(c))[..., : c.kv_lora_rank]

    def values(self, mixed: torch.Tensor) -> torch.Tensor:
        """The heads' weighted values, [batch, new, heads · v_head_dim], of what `mixed` returns."""
        _, w_v = self._halves(mixed.dtype)
        return torch.einsum("bhql,hvl->bqhv", mixed, w_v).flatten(2)

    def _halves(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """kv_b_proj's halves for keys and values, [heads, ·, kv_lora_rank]. Engines decode with them dequantized to the
        compute dtype, and no activation is quantized there."""
        return halves(self.config, self.kv_b_proj.weight.to(dtype))


@dataclass
class GroupedAttention(Attention):
    """Plain attention: each of num_key_value_heads heads of keys and values serves as many of queries."""

    config: ModelConfig
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear

    def context(
        self, x: torch.Tensor, rope: torch.Tensor, cache: Cache | None = None, absorbed: bool = False
    ) -> Stages[torch.Tensor]:
        yield Stage((self.q_proj, self.k_proj, self.v_proj), x)
        served = Served(x)
        q, k, v = self.q_proj(served), self.k_proj(served), self.v_proj(served)
        return grouped(self.config, q, k, v, rope, cache, as_stored=absorbed)


def grouped(
    c: ModelConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: torch.Tensor, cache: Cache | None,
    *, as_stored: bool,
) -> torch.Tensor:  # fmt: skip
    """The heads' weighted values [batch, new, heads · width], of queries in that shape and of keys and values [batch,
    new, kv heads · width], before rotation; those of earlier tokens are the cache's."""
    q, k = (Rope.rotate(_by_head(x, c.qk_head_dim), rope, c.rope_halves) for x in (q, k))  # [batch, heads, new, ·]
    v = _by_head(v, c.v_head_dim)
    if cache is not None:
        known = cache.append(*(x.transpose(1, 2).flatten(2) for x in (k, v)), as_stored=as_stored)
        k, v = (_by_head(x, c.v_head_dim) for x in known)  # [batch, kv heads, all, width]
    return weighed(q, k, v, softmax_scale(c)).flatten(2)


def _by_head(x: torch.Tensor, width: int) -> torch.Tensor:
    """[batch, tokens, heads · width] → [batch, heads, tokens, width]."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def expanded(
    c: ModelConfig, kv: torch.Tensor, q_nope: torch.Tensor, q_pe: torch.Tensor, k_pe: torch.Tensor
) -> torch.Tensor:
    """The heads' weighted values [batch, new, heads · v_head_dim]: of kv_b_proj's output kv [batch, all, ·], queries
    [batch, heads, new, ·] and rotated keys [batch, all, ·]."""
    kv = kv.unflatten(-1, (c.num_attention_heads, -1)).transpose(1, 2)
    k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)  # [batch, heads, all, ·]
    k = torch.cat([k_nope, k_pe.unsqueeze(1).expand(-1, c.num_attention_heads, -1, -1)], -1)
    q = torch.cat([q_nope, q_pe], -1)
    return weighed(q, k, v, softmax_scale(c)).flatten(2)


def halves(c: ModelConfig, kv_b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """kv_b_proj's weight [heads · ·, kv_lora_rank] as its halves for keys and values, [heads, ·, kv_lora_rank]."""
    return kv_b.unflatten(0, (c.num_attention_heads, -1)).split([c.qk_nope_head_dim, c.v_head_dim], 1)


def weighed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """`_attend`, [batch, new, heads, values' width]: of values that may be narrower than keys."""
    if q.is_cpu and q.dtype == torch.float32 and q.shape[2] == k.shape[2] and not torch.is_grad_enabled():
        return _by_blocks(q, k, v, scale)
    return _at_once(q, k, v, scale)


def _at_once(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The same by torch's own attention, of which none is fast for values narrower than keys."""
    narrower, width = q.shape[-1] - v.shape[-1], v.shape[-1]
    padded = F.pad(v, (0, narrower)) if narrower > 0 else v
    return _attend(q, k, padded, scale, is_grouped=q.shape[1] != k.shape[1])[..., :width].transpose(1, 2)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, is_grouped: bool = False
) -> torch.Tensor:
    """Causal attention of the last tokens' queries [batch, heads, new, ·] to all [batch, heads, all, ·], of which
    several heads of queries may share one."""
    causal = q.shape[2] == k.shape[2]  # said by flag where it is the usual one: no fast attention takes it as a mask
    mask = None if causal else _causal_mask(q.shape[2], k.shape[2], q.device)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=is_grouped)


def _by_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The same of as many queries as keys, window by window and some queries at a time: on a CPU with AVX-512 in two
    thirds of the time, since values needn't be padded and no keys behind a block are looked at."""
    batch, heads, tokens, _ = q.shape
    shared = heads // k.shape[1]
    out = q.new_empty(batch, tokens, heads, v.shape[-1])
    block = max(16, min(QUERIES, SCORES // (heads * tokens)))
    later = torch.full((block, block), -torch.inf, device=q.device).triu(1)
    for entry in range(batch):
        queries = q[entry] * scale
        keys, values = (x[entry].repeat_interleave(shared, 0) for x in (k, v))  # [heads, tokens, ·]
        for first in range(0, tokens, block):
            last = min(first + block, tokens)
            scores = queries[:, first:last] @ keys[:, :last].mT  # [heads, block, tokens]
            scores[:, :, first:] += later[: last - first, : last - first]
            out[entry, first:last] = (scores.softmax(-1) @ values[:, :last]).transpose(0, 1)
    return out


def _causal_mask(new: int, total: int, device: torch.device) -> torch.Tensor:
    """[new, total], true where query i, which is token total − new + i, may look at key j."""
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
