"""DeepSeekMoE (deepseek-moe-16b, GigaChat-20B): Llama's attention with DeepSeek-V2's experts.

Keys and defaults are those of DeepSeek's own `configuration_deepseek.py`, published with deepseek-moe-16b; its
`MoEGate` takes the best by softmax, and scales nothing.
"""

from __future__ import annotations

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.reading import Reader, check_choice, common, plain_heads, rope

FAMILY = "deepseek"
CAUSAL_LM = "DeepseekForCausalLM"
MODEL_TYPES = ("deepseek",)
_DEFAULTS = {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "moe_intermediate_size": 1407,
    "num_hidden_layers": 30, "num_attention_heads": 32, "n_routed_experts": 0, "n_shared_experts": 0,
    "num_experts_per_tok": 0, "norm_topk_prob": False, "first_k_dense_replace": 0, "moe_layer_freq": 1,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
}  # fmt: skip


def read(raw: Reader, architecture: str) -> ModelConfig:
    """The configuration. Raises InputError for a value of the wrong type or range, and for what is not supported."""
    raw.require("scoring_func", "softmax", ("softmax",))
    fields = common(raw, _DEFAULTS) | rope(raw, ("linear",))
    fields |= plain_heads(raw, fields["hidden_size"], fields["num_attention_heads"])
    return check_choice(ModelConfig(family=FAMILY, gguf="deepseek", architecture=architecture, **fields), raw)
