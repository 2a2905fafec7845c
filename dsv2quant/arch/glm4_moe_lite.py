"""GLM-4.7-Flash: DeepSeek-V3's architecture with other widths and names.

Keys and defaults are those of transformers' `Glm4MoeLiteConfig`, except that no layer for prediction is implied.
"""

from __future__ import annotations

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.reading import Reader, check_choice, common, corrected_choice, latent_heads, rope

FAMILY = "glm4_moe_lite"
CAUSAL_LM = "Glm4MoeLiteForCausalLM"
MODEL_TYPES = ("glm4_moe_lite",)
_DEFAULTS = {
    "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240, "moe_intermediate_size": 1536,
    "num_hidden_layers": 47, "num_attention_heads": 20, "n_routed_experts": 64, "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.8, "norm_topk_prob": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 202752,
    "num_nextn_predict_layers": 0,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256,
}  # fmt: skip


def read(raw: Reader, architecture: str) -> ModelConfig:
    """The configuration. Raises InputError for a value of the wrong type or range, and for what is not supported."""
    fields = common(raw, _DEFAULTS)
    fields |= latent_heads(raw, _LATENT, fields["num_attention_heads"]) | rope(raw, ("yarn",))
    fields |= corrected_choice(raw, fields["n_routed_experts"], (1, 1))
    fields |= {
        "first_k_dense_replace": _first_dense(raw, fields["num_hidden_layers"]),
        "n_shared_experts": raw.integer("n_shared_experts", 1, 0),
    }
    return check_choice(ModelConfig(family=FAMILY, gguf="deepseek2", architecture=architecture, **fields), raw)


def _first_dense(raw: Reader, layers: int) -> int:
    """How many layers come first that are dense: by `mlp_layer_types`, or by `first_k_dense_replace`."""
    first: int = raw.integer("first_k_dense_replace", 1, 0)
    kinds = raw.raw.get("mlp_layer_types")
    if kinds is None:
        return first
    count = kinds.count("dense") if isinstance(kinds, list) else 0
    if kinds != ["dense"] * count + ["sparse"] * (layers - count):
        rule = f"it must be a list of {layers}: 'dense' for the first, 'sparse' for the others"
        raise raw.error("mlp_layer_types", kinds, rule)
    return count
