"""config.json of the published checkpoints of the family: what of it a model depends on, and how many parameters they
are said to have.

Transcribed from copies in public repositories where one is named, and else put together from what is said there. Keys
that a published file leaves out are left out here too: then the defaults of its own configuration class count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsv2quant.arch.families import model_config

Config = dict[str, Any]

_LLAMA: Config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "max_position_embeddings": 4096, "vocab_size": 102400,
}  # fmt: skip
# DeepSeek-LLM's paper (arXiv:2401.02954), table 2
LLM_7B = _LLAMA | {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30,
    "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
LLM_67B = _LLAMA | {
    "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 95,
    "num_attention_heads": 64, "num_key_value_heads": 8,
}  # fmt: skip

# DeepSeek-Coder's paper (arXiv:2401.14196), table 2
_CODER = _LLAMA | {
    "rope_theta": 100000, "rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 16384,
    "vocab_size": 32256,
}  # fmt: skip
CODER_1B = _CODER | {
    "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 16,
}  # fmt: skip
CODER_7B = _CODER | {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
CODER_33B = _CODER | {
    "hidden_size": 7168, "intermediate_size": 19200, "num_hidden_layers": 62,
    "num_attention_heads": 56, "num_key_value_heads": 8,
}  # fmt: skip

_VL: Config = {"architectures": ["MultiModalityCausalLM"], "model_type": "multi_modality", "torch_dtype": "bfloat16"}
VL_1B = _VL | {
    "language_config": {
        "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 16384, "model_type": "llama",
        "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 16, "torch_dtype": "float16",
        "vocab_size": 102400,
    },
}  # fmt: skip
VL_7B = _VL | {
    "language_config": {
        "max_position_embeddings": 16384, "model_type": "llama", "num_hidden_layers": 30, "torch_dtype": "float16",
        "vocab_size": 102400,
    },
}  # fmt: skip

# deepseek-moe-16b's configuration_deepseek.py, copied in several repositories
MOE_16B: Config = {
    "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "vocab_size": 102400, "hidden_size": 2048,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 16, "n_shared_experts": 2, "n_routed_experts": 64, "num_experts_per_tok": 6,
    "moe_layer_freq": 1, "first_k_dense_replace": 1, "norm_topk_prob": False, "scoring_func": "softmax",
    "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "rope_scaling": None, "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip

# RTP-LLM, the test of its DeepSeek-VL2
_VL2: Config = {"architectures": ["DeepseekVLV2ForCausalLM"], "model_type": "deepseek_vl_v2", "torch_dtype": "bfloat16"}
_PLAIN_TOWER: Config = {
    "first_k_dense_replace": 1, "hidden_size": 1280, "intermediate_size": 6848, "kv_lora_rank": None,
    "max_position_embeddings": 4096, "moe_intermediate_size": 896, "n_group": 1, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_attention_heads": 10, "num_experts_per_tok": 6, "num_hidden_layers": 12,
    "num_key_value_heads": 10, "q_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "topk_group": 1,
    "topk_method": "greedy", "torch_dtype": "bfloat16", "use_mla": False, "v_head_dim": 0, "vocab_size": 129280,
}  # fmt: skip
VL2_TINY = _VL2 | {"language_config": _PLAIN_TOWER | {"model_type": "deepseek_v2"}}
VL2_SMALL = _VL2 | {
    "language_config": {
        "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944, "max_position_embeddings": 4096,
        "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
        "num_key_value_heads": 16, "q_lora_rank": None, "topk_group": 1, "topk_method": "greedy",
        "torch_dtype": "bfloat16", "vocab_size": 129280,
    },
}  # fmt: skip
VL2_27B = _VL2 | {
    "language_config": {
        "first_k_dense_replace": 1, "hidden_size": 2560, "intermediate_size": 12288, "max_position_embeddings": 4096,
        "model_type": "deepseek_v2", "moe_intermediate_size": 1536, "n_group": 1, "n_routed_experts": 72,
        "n_shared_experts": 2, "norm_topk_prob": True, "num_experts_per_tok": 6, "q_lora_rank": None,
        "routed_scaling_factor": 2.0, "scoring_func": "sigmoid", "topk_group": 1, "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16", "vocab_size": 129280,
    },
}  # fmt: skip
# vLLM's and others' copies of DeepSeek-OCR's file
OCR: Config = {
    "architectures": ["DeepseekOCRForCausalLM"], "model_type": "deepseek_vl_v2", "torch_dtype": "bfloat16",
    "language_config": _PLAIN_TOWER
    | {"architectures": ["DeepseekV2ForCausalLM"], "max_position_embeddings": 8192, "lm_head": True, "rm_head": False},
}  # fmt: skip

_V3: Config = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False,
    "first_k_dense_replace": 1, "hidden_act": "silu", "kv_lora_rank": 512, "moe_layer_freq": 1, "n_group": 1,
    "norm_topk_prob": True, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
    "rope_scaling": None, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 1,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "v_head_dim": 128,
}  # fmt: skip
_YARN: Config = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn",
}  # fmt: skip
_FP8: Config = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
}  # fmt: skip
V3 = _V3 | {
    "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432, "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "rope_scaling": _YARN, "rope_theta": 10000,
    "routed_scaling_factor": 2.5, "topk_group": 4, "vocab_size": 129280, "quantization_config": _FP8,
}  # fmt: skip
V3_1 = V3 | {"quantization_config": _FP8 | {"scale_fmt": "ue8m0"}}
KIMI_K2 = _V3 | {
    "model_type": "kimi_k2", "hidden_size": 7168, "intermediate_size": 18432, "max_position_embeddings": 131072,
    "moe_intermediate_size": 2048, "n_routed_experts": 384, "n_shared_experts": 1, "num_attention_heads": 64,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 64, "num_nextn_predict_layers": 0,
    "q_lora_rank": 1536, "rope_scaling": _YARN | {"beta_fast": 1.0, "factor": 32.0}, "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827, "vocab_size": 163840, "quantization_config": _FP8,
}  # fmt: skip
MOONLIGHT = _V3 | {
    "hidden_size": 2048, "intermediate_size": 11264, "max_position_embeddings": 8192, "moe_intermediate_size": 1408,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "q_lora_rank": None,
    "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "routed_scaling_factor": 2.446, "vocab_size": 163840,
}  # fmt: skip
# Put together from kakao/kanana-2's README (48 layers of which one dense, 128 experts of which six and two shared,
# vocabulary 128256, context 32768); widths are those that give its 30 B of which 3 B are active.
KANANA_2 = _V3 | {
    "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 32768, "moe_intermediate_size": 768,
    "n_routed_experts": 128, "n_shared_experts": 2, "num_attention_heads": 32, "num_experts_per_tok": 6,
    "num_hidden_layers": 48, "num_key_value_heads": 32, "q_lora_rank": None, "rope_theta": 1000000.0,
    "routed_scaling_factor": 2.5, "vocab_size": 128256,
}  # fmt: skip
# Put together from the model card and optimum-intel issue 1608 (26 layers and one MTP layer behind, 64 experts).
GIGACHAT_3 = _V3 | {
    "hidden_size": 1536, "intermediate_size": 8960, "max_position_embeddings": 262144, "moe_intermediate_size": 1280,
    "n_routed_experts": 64, "n_shared_experts": 1, "num_attention_heads": 32, "num_experts_per_tok": 4,
    "num_hidden_layers": 26, "num_key_value_heads": 32, "num_nextn_predict_layers": 1, "q_lora_rank": None,
    "rope_theta": 100000.0, "routed_scaling_factor": 1.0, "v_head_dim": 192, "vocab_size": 128256,
}  # fmt: skip
# Put together from the model card's table (40 layers, hidden 2048, 32 heads, experts of 768: 8 of 256 and one shared).
JOYAI_FLASH = _V3 | {
    "hidden_size": 2048, "intermediate_size": 7168, "max_position_embeddings": 131072, "moe_intermediate_size": 768,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_attention_heads": 32, "num_experts_per_tok": 8,
    "num_hidden_layers": 40, "num_key_value_heads": 32, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "rope_theta": 32000000.0, "routed_scaling_factor": 2.5, "vocab_size": 129280,
}  # fmt: skip
# vLLM, tests/transformers_utils: the test of Glm4MoeLiteConfig
GLM_4_7_FLASH: Config = {
    "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "vocab_size": 154880,
    "hidden_size": 2048, "intermediate_size": 10240, "moe_intermediate_size": 1536, "num_hidden_layers": 47,
    "num_attention_heads": 20, "num_key_value_heads": 20, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "attention_bias": False, "max_position_embeddings": 202752, "rope_theta": 1000000.0, "rope_scaling": None,
    "partial_rotary_factor": 1.0, "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64, "v_head_dim": 256, "n_routed_experts": 64, "n_shared_experts": 1,
    "num_experts_per_tok": 4, "norm_topk_prob": True, "routed_scaling_factor": 1.8, "n_group": 1, "topk_group": 1,
    "topk_method": "noaux_tc", "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip

_V2: Config = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "attention_bias": False,
    "first_k_dense_replace": 1, "hidden_act": "silu", "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_layer_freq": 1, "n_shared_experts": 2, "norm_topk_prob": False, "num_experts_per_tok": 6,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, "scoring_func": "softmax",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
V2 = _V2 | {
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8,
    "n_routed_experts": 160, "num_attention_heads": 128, "num_hidden_layers": 60, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "routed_scaling_factor": 16.0, "topk_group": 3, "topk_method": "group_limited_greedy",
    "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip
V2_LITE = _V2 | {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 64, "num_attention_heads": 16, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "q_lora_rank": None, "routed_scaling_factor": 1.0, "topk_group": 1, "topk_method": "greedy",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A published checkpoint: its config.json, and the billions of parameters that its makers give, to the last digit
    that they give (None where they give none of the language model alone); `with_mtp` counts the MTP layers too."""

    config: Config
    billions: str | None
    source: str
    with_mtp: str | None = None


ROWS = {
    "deepseek-llm-7b": Row(LLM_7B, "7", "arXiv:2401.02954"),
    "deepseek-llm-67b": Row(LLM_67B, "67.4", "card: 67.4 B"),
    "deepseek-coder-1.3b": Row(CODER_1B, "1.3", "arXiv:2401.14196"),
    "deepseek-coder-6.7b": Row(CODER_7B, "6.7", "arXiv:2401.14196"),
    "deepseek-coder-33b": Row(CODER_33B, "33", "arXiv:2401.14196"),
    "deepseek-vl-1.3b": Row(VL_1B, None, ""),
    "deepseek-vl-7b": Row(VL_7B, "7", "card: built on DeepSeek-LLM 7B"),
    "deepseek-moe-16b": Row(MOE_16B, "16.4", "arXiv:2401.06066"),
    "DeepSeek-V2": Row(V2, "236", "arXiv:2405.04434"),
    "DeepSeek-V2-Lite": Row(V2_LITE, "15.7", "arXiv:2405.04434, appendix B"),
    "deepseek-vl2-tiny": Row(VL2_TINY, "3", "arXiv:2412.10302, table 2"),
    "deepseek-vl2-small": Row(VL2_SMALL, "16", "arXiv:2412.10302, table 2"),
    "deepseek-vl2": Row(VL2_27B, "27", "arXiv:2412.10302, table 2"),
    "DeepSeek-OCR": Row(OCR, "3", "arXiv:2510.18234: DeepSeek-3B-MoE"),
    "Moonlight-16B-A3B": Row(MOONLIGHT, "16", "card"),
    "Kimi-K2": Row(KIMI_K2, "1026", "card: 1 T; the hub counts 1.03 T"),
    "kanana-2-30b-a3b": Row(KANANA_2, "30", "kakao/kanana-2, README"),
    "GigaChat3-10B-A1.8B": Row(GIGACHAT_3, "10", "card"),
    "JoyAI-LLM-Flash": Row(JOYAI_FLASH, "48", "card"),
    "GLM-4.7-Flash": Row(GLM_4_7_FLASH, "30", "card: 30B-A3B"),
    "DeepSeek-V3": Row(V3, "671", "deepseek-ai/DeepSeek-V3, README: 671 B and 14 B of MTP", "685"),
    "DeepSeek-V3.1": Row(V3_1, "671", "as V3", "685"),
}


def language(config: Config) -> Config:
    """The language model's own configuration."""
    return dict(config.get("language_config", config))


def small(config: Config) -> Config:
    """The same model with a dense layer and one of experts, few heads and experts, and the vocabulary of dsv2-mini.

    What makes a row what it is stays: the widths of heads and latents, the routing, RoPE, and what every width leaves
    behind blocks and groups of up to 256.
    """
    inner = language(config)
    c = model_config(inner, "config.json")
    hidden = _narrow(c.hidden_size)
    heads = 4 if c.is_mla else hidden // c.v_head_dim
    changes: Config = {
        "hidden_size": hidden, "intermediate_size": _narrow(c.intermediate_size), "num_hidden_layers": 2,
        "num_attention_heads": heads, "vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 1,
        "num_key_value_heads": heads if c.num_key_value_heads == c.num_attention_heads else 1,
    }  # fmt: skip
    if c.n_routed_experts:
        changes |= {
            "moe_intermediate_size": _narrow(c.moe_intermediate_size), "first_k_dense_replace": 1,
            "n_routed_experts": 2 * max(c.num_experts_per_tok, c.n_group),
        }  # fmt: skip
    return config | {"language_config": inner | changes} if "language_config" in config else config | changes


def as_deep(config: Config) -> Config:
    """The small model with all of its layers where llama.cpp tells by them, and once by the vocabulary, that a model
    has no latents of queries."""
    inner = language(config)
    c, made = model_config(inner, "config.json"), small(config)
    if not c.is_mla or c.q_lora_rank is not None:
        return made
    changes: Config = {"num_hidden_layers": c.num_hidden_layers}
    if c.num_hidden_layers == 48:
        changes["vocab_size"] = c.vocab_size
    return (
        made | {"language_config": made["language_config"] | changes} if "language_config" in made else made | changes
    )


def _narrow(width: int) -> int:
    """A width below 512 that leaves the same behind a division by 256."""
    return width if width < 512 else 256 + width % 256
