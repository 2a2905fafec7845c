"""How every family puts its parts together: attention and a feed-forward part in every layer, each behind a norm.

Dense FFNs come first and routed experts behind; layers for multi-token prediction follow the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.deepseek_v2 import GGUF_PLAIN
from dsv2quant.arch.parts import (
    FFN,
    GQA,
    MLA,
    MoE,
    embedding,
    final_norm,
    language_head,
    layer_norm,
    prediction_ends,
    score_head,
)
from dsv2quant.arch.spec import Architecture, Router, TensorSpec


def architecture(config: ModelConfig) -> Architecture:
    """The model of a configuration."""
    c, hidden = config, config.hidden_size
    attention = _attention(c)
    dense, moe = FFN("dense", hidden, c.intermediate_size), _moe(c)

    def layer(index: int) -> list[TensorSpec]:
        return list(decoder_layer(index, moe if moe is not None and c.is_moe(index) else dense))

    def decoder_layer(index: int, ffn: FFN | MoE) -> Iterator[TensorSpec]:
        at = f"model.layers.{index}"
        first, second = f"{at}.input_layernorm", f"{at}.post_attention_layernorm"
        yield layer_norm(first, hidden, index, "attn_norm")
        yield from attention.specs(index, first)
        yield layer_norm(second, hidden, index, "ffn_norm")
        yield from ffn.specs(index, second)

    def prediction() -> list[TensorSpec]:
        indices = range(c.num_hidden_layers, c.num_hidden_layers + c.num_nextn_predict_layers)
        specs = [
            spec
            for i in indices
            for spec in (*prediction_ends(i, c.vocab_size, hidden), *decoder_layer(i, moe or dense))
        ]
        return [replace(spec, is_prediction=True, gguf_name=None) for spec in specs]

    behind = [final_norm(hidden)]
    if c.is_classifier:
        behind.append(score_head(c.num_labels, hidden))
    elif not c.tie_word_embeddings:
        behind.append(language_head(c.vocab_size, hidden))
    before = (embedding(c.vocab_size, hidden),)
    router = None if moe is None else moe.router
    return Architecture(before, c.num_hidden_layers, layer, tuple(behind), router, prediction)


def _attention(c: ModelConfig) -> MLA | GQA:
    hidden, heads = c.hidden_size, c.num_attention_heads
    if not c.is_mla:
        # Of llama.cpp's models with plain attention deepseek2-ocr alone turns halves (src/models/deepseek2.cpp).
        is_paired = c.gguf != GGUF_PLAIN
        return GQA(hidden, heads, c.num_key_value_heads, c.v_head_dim, c.attention_bias, is_paired)
    return MLA(
        hidden, heads, c.q_lora_rank, c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim,
        c.attention_bias,
    )  # fmt: skip


def _moe(c: ModelConfig) -> MoE | None:
    if not c.n_routed_experts:
        return None
    # DeepSeek-V2's MoEGate does not scale what it normalises; it does that for several experts alone.
    normalise = c.norm_topk_prob and (c.scale_normalised or c.num_experts_per_tok > 1)
    scale = c.routed_scaling_factor if c.scale_normalised or not normalise else 1.0
    router = Router(
        c.num_experts_per_tok, c.n_group, c.topk_group, normalise, scale, c.scoring_func, c.group_score, c.router_bias
    )
    shared = FFN("shared", c.hidden_size, c.n_shared_experts * c.moe_intermediate_size) if c.n_shared_experts else None
    return MoE(router, c.n_routed_experts, FFN("routed", c.hidden_size, c.moe_intermediate_size), shared)
