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
from dsv2quant.model.cache import LatentCache
from dsv2quant.model.linear import Linear, RMSNorm
from dsv2quant.model.rope import Rope, softmax_scale


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
        q_nope, q_pe, latent, k_pe = self.projected(x, rope)
        if cache is not None:
            latent, k_pe = cache.append(latent, k_pe, as_stored=absorbed)  # [batch, all, ·]
        if absorbed:
            return self.values(self.mixed(q_nope, q_pe, latent, k_pe))
        return self.expanded(q_nope, q_pe, latent, k_pe)

    def projected(
        self, x: torch.Tensor, rope: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [batch, heads, new, ·] without and with position, and the latents and rotated keys that the cache
        takes, [batch, new, ·]."""
        c = self.config
        q = self._queries(x).unflatten(-1, (c.num_attention_heads, c.qk_head_dim)).transpose(1, 2)
        q_nope, q_pe = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_pe = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        return q_nope, Rope.rotate(q_pe, rope), self.kv_a_layernorm(latent), Rope.rotate(k_pe, rope)

    def expanded(
        self, q_nope: torch.Tensor, q_pe: torch.Tensor, latent: torch.Tensor, k_pe: torch.Tensor
    ) -> torch.Tensor:
        """What `o_proj` is applied to, [batch, new, heads · v_head_dim], from the latents [batch, all, ·]."""
        return expanded(self.config, self.kv_b_proj(latent), q_nope, q_pe, k_pe)

    def mixed(self, q_nope: torch.Tensor, q_pe: torch.Tensor, latent: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
        """Absorbed: the latents [batch, all, ·] as each query weighs them, [batch, heads, new, kv_lora_rank]."""
        c = self.config
        w_k, _ = self._halves(latent.dtype)
        q = torch.cat([torch.einsum("bhqn,hnl->bhql", q_nope, w_k), q_pe], -1)
        # The one key that all heads share, which serves as the value, too: its rotated end is cut off.
        k = torch.cat([latent, k_pe], -1).unsqueeze(1).expand(-1, c.num_attention_heads, -1, -1)
        return _attend(q, k, k, softmax_scale(c))[..., : c.kv_lora_rank]

    def values(self, mixed: torch.Tensor) -> torch.Tensor:
        """What `o_proj` is applied to, [batch, new, heads · v_head_dim], of what `mixed` returns."""
        _, w_v = self._halves(mixed.dtype)
        return torch.einsum("bhql,hvl->bqhv", mixed, w_v).flatten(2)

    def _queries(self, x: torch.Tensor) -> torch.Tensor:
        if self.q_proj is not None:
            return self.q_proj(x)
        assert self.q_a_proj is not None
        assert self.q_a_layernorm is not None
        assert self.q_b_proj is not None
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))

    def _halves(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """kv_b_proj's halves for keys and values, [heads, ·, kv_lora_rank]. Engines decode with them dequantized to the
        compute dtype, and no activation is quantized there."""
        return halves(self.config, self.kv_b_proj.weight.to(dtype))


def expanded(
    c: ModelConfig, kv: torch.Tensor, q_nope: torch.Tensor, q_pe: torch.Tensor, k_pe: torch.Tensor
) -> torch.Tensor:
    """The heads' weighted values [batch, new, heads · v_head_dim]: of kv_b_proj's output kv [batch, all, ·], queries
    [batch, heads, new, ·] and rotated keys [batch, all, ·]."""
    kv = kv.unflatten(-1, (c.num_attention_heads, -1)).transpose(1, 2)
    k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)  # [batch, heads, all, ·]
    k = torch.cat([k_nope, k_pe.unsqueeze(1).expand(-1, c.num_attention_heads, -1, -1)], -1)
    q = torch.cat([q_nope, q_pe], -1)
    # torch has no fast attention for values narrower than keys.
    padded = F.pad(v, (0, max(0, c.qk_head_dim - c.v_head_dim)))
    return _attend(q, k, padded, softmax_scale(c))[..., : c.v_head_dim].transpose(1, 2).flatten(2)


def halves(c: ModelConfig, kv_b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """kv_b_proj's weight [heads · ·, kv_lora_rank] as its halves for keys and values, [heads, ·, kv_lora_rank]."""
    return kv_b.unflatten(0, (c.num_attention_heads, -1)).split([c.qk_nope_head_dim, c.v_head_dim], 1)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last tokens' queries [batch, heads, new, ·] to all [batch, heads, all, ·]."""
    causal = q.shape[2] == k.shape[2]  # said by flag where it is the usual one: no fast attention takes it as a mask
    mask = None if causal else _causal_mask(q.shape[2], k.shape[2], q.device)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)


def _causal_mask(new: int, total: int, device: torch.device) -> torch.Tensor:
    """[new, total], true where query i, which is token total − new + i, may look at key j."""
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
