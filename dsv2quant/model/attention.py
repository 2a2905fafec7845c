"""Multi-head latent attention (arXiv:2405.04434, section 2.1), expanded for prefill and absorbed for decode.

The cache holds one latent c [kv_lora_rank] and one rotated key k_pe [qk_rope_head_dim] per token, shared by all heads.
Expanded: kv_b turns every cached latent into per-head keys and values. Absorbed: its K half moves into the query and
its V half behind the weighted sum of latents, so that no key or value is ever formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dsv2quant.config import ModelConfig
from dsv2quant.model.linear import Linear, RMSNorm
from dsv2quant.model.rope import Rope, softmax_scale


class LatentCache:
    """The latents and rotated keys of one layer, [batch, capacity, ·], of which the first `length` are filled."""

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._latent = torch.empty(batch, capacity, config.kv_lora_rank, dtype=dtype, device=device)
        self._k_pe = torch.empty(batch, capacity, config.qk_rope_head_dim, dtype=dtype, device=device)
        self.length = 0

    def append(self, latent: torch.Tensor, k_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add [batch, new, ·] and return everything cached. Raises ValueError beyond the capacity."""
        end = self.length + latent.shape[1]
        if end > self._latent.shape[1]:
            raise ValueError(f"the cache holds {self._latent.shape[1]} tokens, {end} were asked for")
        self._latent[:, self.length : end], self._k_pe[:, self.length : end] = latent, k_pe
        self.length = end
        return self._latent[:, :end], self._k_pe[:, :end]


@dataclass
class Attention:
    """One layer's attention. Exactly one of `q_proj` and the latent query path (`q_a_proj` … `q_b_proj`) is set."""

    config: ModelConfig
    kv_a_proj_with_mqa: Linear
    kv_a_layernorm: RMSNorm
    kv_b_proj: Linear
    o_proj: Linear
    q_proj: Linear | None = None
    q_a_proj: Linear | None = None
    q_a_layernorm: RMSNorm | None = None
    q_b_proj: Linear | None = None

    def __call__(
        self, x: torch.Tensor, rope: torch.Tensor, cache: LatentCache | None = None, absorbed: bool = False
    ) -> torch.Tensor:
        """x [batch, new, hidden] → the same shape; `rope` [new, ·] is the table of the new positions."""
        return self.o_proj(self.context(x, rope, cache, absorbed))

    def context(
        self, x: torch.Tensor, rope: torch.Tensor, cache: LatentCache | None = None, absorbed: bool = False
    ) -> torch.Tensor:
        """What `o_proj` is applied to: the heads' weighted values, [batch, new, heads · v_head_dim]."""
        c = self.config
        q = self._queries(x).unflatten(-1, (c.num_attention_heads, c.qk_head_dim)).transpose(1, 2)
        q_nope, q_pe = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)  # [batch, heads, new, ·]
        q_pe = Rope.rotate(q_pe, rope)
        latent, k_pe = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        latent, k_pe = self.kv_a_layernorm(latent), Rope.rotate(k_pe, rope)  # [batch, new, ·]
        if cache is not None:
            latent, k_pe = cache.append(latent, k_pe)  # [batch, all, ·]
        attend = self._absorbed if absorbed else self._expanded
        return attend(q_nope, q_pe, latent, k_pe).transpose(1, 2).flatten(2)

    def _queries(self, x: torch.Tensor) -> torch.Tensor:
        if self.q_proj is not None:
            return self.q_proj(x)
        assert self.q_a_proj is not None
        assert self.q_a_layernorm is not None
        assert self.q_b_proj is not None
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))

    def _expanded(
        self, q_nope: torch.Tensor, q_pe: torch.Tensor, latent: torch.Tensor, k_pe: torch.Tensor
    ) -> torch.Tensor:
        c = self.config
        kv = self.kv_b_proj(latent).unflatten(-1, (c.num_attention_heads, -1)).transpose(1, 2)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)  # [batch, heads, all, ·]
        k = torch.cat([k_nope, k_pe.unsqueeze(1).expand(-1, c.num_attention_heads, -1, -1)], -1)
        q = torch.cat([q_nope, q_pe], -1)
        # torch has no fast attention for values narrower than keys, nor for a mask that it doesn't know to be causal.
        padded = F.pad(v, (0, c.qk_head_dim - c.v_head_dim))
        causal = q.shape[2] == k.shape[2]
        mask = None if causal else _causal_mask(q.shape[2], k.shape[2], q.device)
        scale = softmax_scale(c)
        return F.scaled_dot_product_attention(q, k, padded, mask, is_causal=causal, scale=scale)[..., : c.v_head_dim]

    def _absorbed(
        self, q_nope: torch.Tensor, q_pe: torch.Tensor, latent: torch.Tensor, k_pe: torch.Tensor
    ) -> torch.Tensor:
        c = self.config
        # Engines decode with kv_b's halves dequantized to the compute dtype, and no activation is quantized here.
        kv_b = self.kv_b_proj.weight.to(latent.dtype).unflatten(0, (c.num_attention_heads, -1))
        w_k, w_v = kv_b.split([c.qk_nope_head_dim, c.v_head_dim], 1)  # [heads, ·, kv_lora_rank]
        q_latent = torch.einsum("bhqn,hnl->bhql", q_nope, w_k)
        scores = torch.einsum("bhql,bkl->bhqk", q_latent, latent) + torch.einsum("bhqr,bkr->bhqk", q_pe, k_pe)
        mask = _causal_mask(scores.shape[2], scores.shape[3], scores.device)
        scores = (scores.float() * softmax_scale(c)).masked_fill(~mask, float("-inf"))
        weights = scores.softmax(-1).to(latent.dtype)
        return torch.einsum("bhql,hvl->bhqv", torch.einsum("bhqk,bkl->bhql", weights, latent), w_v)


def _causal_mask(new: int, total: int, device: torch.device) -> torch.Tensor:
    """[new, total], true where query i, which is token total − new + i, may look at key j."""
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
