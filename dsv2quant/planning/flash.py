# ruff: noqa: F841 (a name that nobody reads keeps its tensor in memory)
"""`--prefill flash`: this tool's torch runtime in BF16, whose attention makes no scores.

Sources: model/runtime.py (`Model.next_logits`), model/load.py (`DecoderLayer.stages`), model/attention.py,
model/cache.py, model/layers.py. A cache for the whole context is made first; the prompt goes through in one pass, and
only its last tokens' logits are made. vLLM and SGLang, which also make no scores, go through a prompt in pieces and
hold less than this beside weights and cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv2quant.planning.allocator import Tensor
from dsv2quant.planning.prefill import Pass

COMPLEX = 8  # bytes


@dataclass
class Flash(Pass):
    """The pass of a GPU; the cache has `cached` bytes per number."""

    cached: int = 2

    def run(self) -> None:
        """The prompt. Raises OutOfMemory."""
        c, share = self.c, self.share
        each = self.tokens * sum(share.cached_widths) * self.cached
        cache = [self.new(each, "cache") for _ in share.layers]
        x = self.made(c.hidden_size)
        rope = self.new(COMPLEX * self.length * c.qk_rope_head_dim // 2)
        for layer in share.layers:
            x = self.layer(layer)
        if share.has_head:
            logits = self.new(2 * self.batch * share.outputs, "logits")
        del x

    def layer(self, layer: int) -> Tensor:
        """The output of a layer, whose input its caller holds."""
        hidden = self.norm(self.c.hidden_size)
        attended = self.latent_attention() if self.c.is_mla else self.attention()
        del hidden
        x = self.made(self.c.hidden_size)
        hidden = self.norm(self.c.hidden_size)
        out = self.experts(layer) if self.c.is_moe(layer) else self.ffn(self.share.ffn(layer))
        return self.made(self.c.hidden_size)

    def rotated(self, width: int) -> Tensor:
        """RoPE in float32 (`Rope.rotate`): pairs side by side, their products with the table, and these back in order
        where halves turn together."""
        x = self.wide(width)
        pairs = self.wide(width)
        turned = self.wide(width)
        del pairs
        flat = self.wide(width) if self.c.rope_halves else None
        return self.made(width)

    def stored(self, width: int) -> Tensor | None:
        """What the cache makes of new numbers (`KVCache.append`): BF16 is read where it is stored; FP8 is scaled and
        cut in float32, and the pass goes on with a copy of what it has."""
        if self.cached != 1:
            return None if self.cached == 2 else self.made(width)
        wide = self.wide(width)
        wide = self.wide(width)
        wide = self.wide(width)
        codes = self.new(self.tokens * width)
        del wide, codes
        return self.made(width)

    def attention(self) -> Tensor:
        heads, kv_heads, width = self.share.heads, self.share.kv_heads, self.c.qk_head_dim
        q, k = self.product(heads * width), self.product(kv_heads * width)
        turned = self.rotated(heads * width), self.rotated(kv_heads * width)
        del q, k
        v = self.made(kv_heads * width)
        flat = self.made(kv_heads * width)
        read = self.stored(kv_heads * width), self.stored(kv_heads * width)
        del flat
        weighted = self.weighted(heads * width)
        del read, v, turned
        out = self.made(self.c.hidden_size)
        del weighted
        return out

    def weighted(self, width: int) -> Tensor:
        """Values as attention weighs them, and beside them a float32 logarithm for each head and token."""
        weighted = self.made(width)
        logarithms = self.wide(self.share.heads)
        del logarithms
        return weighted

    def latent_attention(self) -> Tensor:
        """Expanded; values are padded to the keys' width."""
        c, heads = self.c, self.share.heads
        queries = None
        if c.q_lora_rank is not None:
            latent = self.product(c.q_lora_rank)
            queries = self.norm(c.q_lora_rank)
            del latent
        compressed = self.product(c.kv_lora_rank + c.qk_rope_head_dim)
        latent, k_pe = self.norm(c.kv_lora_rank), self.rotated(c.qk_rope_head_dim)
        del compressed
        read = self.stored(c.kv_lora_rank), self.stored(c.qk_rope_head_dim)
        q = self.made(heads * c.qk_head_dim)
        q_pe = self.rotated(heads * c.qk_rope_head_dim)
        kv = self.made(heads * (c.qk_nope_head_dim + c.v_head_dim))
        keys, joined = self.made(heads * c.qk_head_dim), self.made(heads * c.qk_head_dim)
        padded = self.made(heads * c.qk_head_dim) if c.qk_head_dim > c.v_head_dim else None
        weighted = self.weighted(heads * max(c.qk_head_dim, c.v_head_dim))
        if padded is not None:
            weighted = self.made(heads * c.v_head_dim)
        del queries, latent, k_pe, read, q, q_pe, kv, keys, joined, padded
        out = self.made(c.hidden_size)
        del weighted
        return out

    def experts(self, layer: int) -> Tensor:
        """`MoE.stages`: one expert after the other is added to a sum in float32."""
        c = self.c
        scores = self.wide(c.hidden_size)
        logits = self.wide(c.n_routed_experts)
        del scores, logits
        summed = self.wide(c.hidden_size)
        rows = self.new(2 * self.routed * c.hidden_size)
        made = self.expert()
        wide, weighted = (self.new(4 * self.routed * c.hidden_size) for _ in range(2))
        del wide
        before = self.new(4 * self.routed * c.hidden_size)
        del rows, made, weighted, before
        out = self.made(c.hidden_size)
        del summed
        if c.n_shared_experts:
            shared = self.ffn(self.share.ffn(layer))
            out = self.made(c.hidden_size)
        return out
