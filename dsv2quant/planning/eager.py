# ruff: noqa: F841, RUF059 (a name that nobody reads keeps its tensor in memory)
"""`--prefill eager`: transformers as it was when DeepSeek-LLM came out (4.35.2, November 2023), from the prompt to the
first token that `generate` decodes.

Sources: models/llama/modeling_llama.py (`LlamaAttention.forward`, `LlamaDecoderLayer.forward`, `LlamaModel.forward`,
`LlamaForCausalLM.forward`), modeling_attn_mask_utils.py, generation/utils.py (`greedy_search`); of latent attention and
routed experts the modeling_deepseek.py that DeepSeek-V2's checkpoints carry (`DeepseekV2Attention.forward`,
`DeepseekV2MoE.moe_infer`); of several GPUs accelerate 0.24 (hooks.py, `AlignDevicesHook`).

Attention makes scores [batch, heads, length, length]: in BF16 the product, its division by √width and its sum with the
mask, two of them at a time; then the softmax has a float32 copy and its float32 result beside the BF16 input, 10 bytes
per score. Logits of all tokens are there in BF16 and float32. `generate` keeps the prompt's logits and cache while the
next token's pass makes a longer cache beside it. MLA is cached as full keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv2quant.planning.allocator import Tensor
from dsv2quant.planning.prefill import Pass

BF16, WIDE = 2, 4


@dataclass
class Eager(Pass):
    """The passes of a GPU. The prompt lies on the CPU where there are several, so that logits go back there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._cache: list[tuple[Tensor, ...]] = []

    def run(self) -> None:
        """The prompt and one token. Raises OutOfMemory."""
        embedded = x = self.made(self.c.hidden_size)  # of a later GPU, the layer's input from the one before
        mask = self.mask() if self.share.has_embedding else None
        for layer in self.share.layers:
            x = self.layer(x, layer)
        if self.share.has_head:
            x = self.norm(self.c.hidden_size)
        del embedded, mask
        logits = self.logits() if self.share.has_head else None
        del x
        self.decode()

    def mask(self) -> Tensor:
        """[batch, 1, length, length] of causal and padding masks (`AttentionMaskConverter.to_4d`)."""
        square = self.length**2
        causal = self.new(WIDE * square)
        causal = self.new(BF16 * square)
        padding = self.new(BF16 * self.batch * square)
        inverted = self.new(BF16 * self.batch * square)
        del padding
        is_masked = self.new(self.batch * square)
        expanded = self.new(BF16 * self.batch * square)
        del inverted, is_masked
        return self.new(BF16 * self.batch * square)

    def layer(self, x: Tensor, layer: int) -> Tensor:
        """The output of a decoder layer; x, its input, stays."""
        # Later GPUs get the mask once for each layer.
        mask = None if self.share.has_embedding else self.new(BF16 * self.batch * self.length**2)
        hidden = self.norm(self.c.hidden_size)
        hidden = self.latent_attention() if self.c.is_mla else self.attention()
        residual = self.made(self.c.hidden_size)
        hidden = self.norm(self.c.hidden_size)
        hidden = self.experts(layer) if self.c.is_moe(layer) else self.ffn(self.share.ffn(layer))
        return self.made(self.c.hidden_size)

    def attention(self) -> Tensor:
        """Plain attention. Where there are several texts a batched product copies what is not laid out by head:
        queries, and keys and values that no repetition has laid out anew."""
        heads, kv_heads, width = self.share.heads, self.share.kv_heads, self.c.qk_head_dim
        q, k, v = self.product(heads * width), self.product(kv_heads * width), self.product(kv_heads * width, "cache")
        q, k = self.rotated(heads, kv_heads)
        self._cache.append((k, v))
        repeated = [self.made(heads * width) for _ in "kv" if kv_heads < heads]
        copies = self.batch > 1
        laid = [self.made(heads * width) for copied in (copies, copies and kv_heads == heads) if copied]
        scores = self.scores(laid)
        laid = [self.made(heads * width)] if copies and kv_heads == heads else []
        return self.output(heads * width, laid)

    def rotated(self, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
        """Queries and keys (`apply_rotary_pos_emb`): x · cos + (−x₂, x₁) · sin."""
        width = self.c.qk_rope_head_dim
        cos, sin = self.made(width), self.made(width)

        def turned(heads: int, kind: str) -> Tensor:
            first = self.made(heads * width)
            negative = self.made(heads * width // 2)
            halves = self.made(heads * width)
            del negative
            second = self.made(heads * width)
            del halves
            return self.made(heads * width, kind)

        return turned(heads, "activations"), turned(kv_heads, "cache")

    def scores(self, laid: list[Tensor]) -> Tensor:
        """The weights of values; `laid` goes once queries and keys are multiplied."""
        numbers = self.batch * self.share.heads * self.length**2
        scores = self.new(BF16 * numbers)
        laid.clear()
        scores = self.new(BF16 * numbers)  # divided
        scores = self.new(BF16 * numbers)  # masked
        copy = self.new(WIDE * numbers)
        weights = self.new(WIDE * numbers)
        del copy
        scores = self.new(BF16 * numbers)
        del weights
        return scores

    def output(self, width: int, laid: list[Tensor]) -> Tensor:
        """The heads' weighted values, laid out by token, and what o_proj makes of them."""
        weighted = self.made(width)
        laid.clear()
        weighted = self.made(width)
        return self.made(self.c.hidden_size)

    def latent_attention(self) -> Tensor:
        """MLA, expanded: the cache has every head's keys, and as values a view of what kv_b_proj gives."""
        c, heads = self.c, self.share.heads
        if c.q_lora_rank is not None:
            latent = self.product(c.q_lora_rank)
            latent = self.norm(c.q_lora_rank)
            q = self.product(heads * c.qk_head_dim)
            del latent
        else:
            q = self.product(heads * c.qk_head_dim)
        compressed = self.product(c.kv_lora_rank + c.qk_rope_head_dim)
        normed = self.norm(c.kv_lora_rank)
        kv = self.made(heads * (c.qk_nope_head_dim + c.v_head_dim), "cache")
        del normed
        rotated = self.rotated(heads, 1)
        queries = self.made(heads * c.qk_head_dim)
        keys = self.made(heads * c.qk_head_dim, "cache")
        self._cache.append((keys, kv))
        scores = self.scores([])
        laid = [self.made(heads * c.v_head_dim)] if self.batch > 1 else []
        out = self.output(heads * c.v_head_dim, laid)
        del q
        return out

    def experts(self, layer: int) -> Tensor:
        """Routed and shared experts; a token's `k` rows are gathered, put together, brought back in order and summed in
        float32. The experts have even shares of them, and one stands for those that follow."""
        c, k = self.c, self.c.num_experts_per_tok
        gathered = self.made(k * c.hidden_size)
        made = self.expert()
        made = self.made(k * c.hidden_size)  # of all
        del gathered
        joined = self.made(k * c.hidden_size)
        ordered = self.made(k * c.hidden_size)
        weighted = self.wide(k * c.hidden_size)
        summed = self.wide(c.hidden_size)
        del weighted
        out = self.made(c.hidden_size)
        del made, joined, ordered, summed
        if c.n_shared_experts:
            shared = self.ffn(self.share.ffn(layer))
            out = self.made(c.hidden_size)
        return out

    def logits(self) -> Tensor:
        """Of all tokens (`logits.float()`)."""
        rounded = self.product(self.share.outputs, "logits")
        return self.new(WIDE * self.tokens * self.share.outputs, "logits")

    def decode(self) -> None:
        """The next token's pass, which keeps the old cache until its own is whole (`torch.cat` in every layer)."""
        rows, c = self.batch * (self.length + 1), self.c
        widths = (c.qk_head_dim, c.v_head_dim)
        heads = self.share.heads if c.is_mla else self.share.kv_heads
        made = [[self.new(BF16 * rows * heads * width, "cache") for width in widths] for _ in self._cache]
