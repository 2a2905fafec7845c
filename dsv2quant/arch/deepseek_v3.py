"""DeepSeek-V3 and R1, and what has their architecture: Moonlight, Kimi-K2, Kanana-2, GigaChat3, JoyAI.

Latent attention, as DeepSeek-V2's; experts are chosen by sigmoid scores with a correction bias, of the groups whose
best two are best; layers for multi-token prediction follow the others. Keys and defaults are those of DeepSeek's own
`configuration_deepseek.py` (published with the V3 checkpoints), except that no layer for prediction is implied.
"""

from __future__ import annotations

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.reading import LATENT, Reader, check_choice, common, corrected_choice, latent_heads, rope

FAMILY = "deepseek_v3"
CAUSAL_LM = "DeepseekV3ForCausalLM"
SEQUENCE_CLASSIFICATION = "DeepseekV3ForSequenceClassification"
MODEL_TYPES = ("deepseek_v3", "kimi_k2")
_DEFAULTS = {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "n_routed_experts": 256, "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True, "moe_layer_freq": 1, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096, "num_nextn_predict_layers": 0,
}  # fmt: skip
_COUNTS = {"n_shared_experts": 1, "first_k_dense_replace": 3}  # each may be 0


def read(raw: Reader, architecture: str) -> ModelConfig:
    """The configuration. Raises InputError for a value of the wrong type or range, and for what is not supported."""
    fields = common(raw, _DEFAULTS) | {key: raw.integer(key, default, 0, 4096) for key, default in _COUNTS.items()}
    fields |= latent_heads(raw, LATENT, fields["num_attention_heads"]) | rope(raw, ("yarn",))
    fields |= corrected_choice(raw, fields["n_routed_experts"], (8, 4))
    return check_choice(ModelConfig(family=FAMILY, gguf="deepseek2", architecture=architecture, **fields), raw)
