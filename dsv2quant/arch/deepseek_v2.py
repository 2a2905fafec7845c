"""DeepSeek-V2: latent attention, dense FFNs first and routed experts behind.

Keys and defaults are those of DeepSeek's own `configuration_deepseek.py` (published with the V2 checkpoints), not of
transformers, whose class has other defaults. The language models of DeepSeek-VL2 and DeepSeek-OCR are of this family,
too: the largest chooses experts as DeepSeek-V3 does, and the smallest have plain attention (`use_mla: false`, Llama's).
"""

from __future__ import annotations

from typing import Any

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.reading import (
    LATENT,
    Reader,
    check_choice,
    common,
    corrected_choice,
    groups,
    latent_heads,
    plain_heads,
    rope,
)

FAMILY = "deepseek_v2"
GGUF, GGUF_PLAIN = "deepseek2", "deepseek2-ocr"
CAUSAL_LM = "DeepseekV2ForCausalLM"
SEQUENCE_CLASSIFICATION = "DeepseekV2ForSequenceClassification"
MODEL_TYPES = ("deepseek_v2", "deepseek")  # the latter in early revisions
_DEFAULTS = {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "moe_intermediate_size": 1407,
    "num_hidden_layers": 30, "num_attention_heads": 32, "n_routed_experts": 0, "n_shared_experts": 0,
    "num_experts_per_tok": 0, "routed_scaling_factor": 1.0, "norm_topk_prob": False, "first_k_dense_replace": 0,
    "moe_layer_freq": 1, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
}  # fmt: skip


def read(raw: Reader, architecture: str) -> ModelConfig:
    """The configuration. Raises InputError for a value of the wrong type or range, and for what is not supported."""
    fields = common(raw, _DEFAULTS)
    heads = fields["num_attention_heads"]
    if raw.boolean("use_mla", True):
        fields |= latent_heads(raw, LATENT, heads) | rope(raw, ("yarn",))
    else:
        fields |= plain_heads(raw, fields["hidden_size"], heads) | rope(raw, ())
    choice, gguf = _choice(raw, fields["n_routed_experts"]), GGUF if fields.get("kv_lora_rank") else GGUF_PLAIN
    config = ModelConfig(family=FAMILY, gguf=gguf, architecture=architecture, **fields, **choice)
    return check_choice(config, raw)


def _choice(raw: Reader, n_routed: int) -> dict[str, Any]:
    # 'gready' is the default's spelling in DeepSeek's configuration class.
    method = raw.require("topk_method", "greedy", ("greedy", "gready", "group_limited_greedy", "noaux_tc"))
    if method == "noaux_tc" and n_routed:  # DeepSeek-VL2's MoEGate
        return corrected_choice(raw, n_routed, (1, 1))
    raw.require("scoring_func", "softmax", ("softmax",))
    if method != "group_limited_greedy" or not n_routed:
        return {}
    return dict(groups(raw, n_routed, raw.integer("n_group", None), raw.integer("topk_group", None)))
