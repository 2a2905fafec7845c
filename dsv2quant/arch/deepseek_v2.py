"""DeepSeek-V2: latent attention in every layer, dense FFNs first and routed experts behind, between two norms each."""

from __future__ import annotations

from dsv2quant.arch.config import SEQUENCE_CLASSIFICATION, ModelConfig
from dsv2quant.arch.parts import FFN, MLA, MoE, embedding, final_norm, language_head, layer_norm, score_head
from dsv2quant.arch.spec import Architecture, Router, TensorSpec

ARCHITECTURE = "deepseek2"  # what llama.cpp calls it


def architecture(config: ModelConfig) -> Architecture:
    """The model of a configuration."""
    c, hidden = config, config.hidden_size
    attention = MLA(
        hidden, c.num_attention_heads, c.q_lora_rank, c.kv_lora_rank,
        c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.attention_bias,
    )  # fmt: skip
    dense = FFN("dense", hidden, c.intermediate_size)
    moe = _moe(c)

    def layer(index: int) -> list[TensorSpec]:
        at = f"model.layers.{index}"
        first, second = f"{at}.input_layernorm", f"{at}.post_attention_layernorm"
        ffn = moe if moe is not None and c.is_moe(index) else dense
        return [
            layer_norm(first, hidden, index, "attn_norm"),
            *attention.specs(index, first),
            layer_norm(second, hidden, index, "ffn_norm"),
            *ffn.specs(index, second),
        ]

    behind = [final_norm(hidden)]
    if c.architecture == SEQUENCE_CLASSIFICATION:
        behind.append(score_head(c.num_labels, hidden))
    elif not c.tie_word_embeddings:
        behind.append(language_head(c.vocab_size, hidden))
    before = (embedding(c.vocab_size, hidden),)
    return Architecture(before, c.num_hidden_layers, layer, tuple(behind), None if moe is None else moe.router)


def _moe(c: ModelConfig) -> MoE | None:
    if not c.n_routed_experts:
        return None
    normalise = c.norm_topk_prob and c.num_experts_per_tok > 1
    # DeepSeek-V2's own code (modeling_deepseek.py, MoEGate) scales only weights that it does not normalise.
    scale = 1.0 if normalise else c.routed_scaling_factor
    router = Router(c.num_experts_per_tok, c.n_group, c.topk_group, normalise=normalise, scale=scale)
    shared = FFN("shared", c.hidden_size, c.n_shared_experts * c.moe_intermediate_size) if c.n_shared_experts else None
    return MoE(router, c.n_routed_experts, FFN("routed", c.hidden_size, c.moe_intermediate_size), shared)
