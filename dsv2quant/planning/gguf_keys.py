"""The keys of a GGUF file that say what the model is, by llama.cpp's architecture, in its converter's order.

Sources: llama.cpp conversion/base.py (TextModel.set_gguf_parameters), conversion/deepseek.py (DeepseekModel,
DeepseekV2Model), conversion/glm.py (Glm4MoeLiteModel) and conversion/llama.py (LlamaModel). They take config.json as
transformers makes it: where that knows the model, with its defaults filled in; else as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import ExpertGatingFuncType, RopeScalingType

from dsv2quant.arch.config import ModelConfig
from dsv2quant.checkpoint.gguf_config import SIGMOID_IMPLIED
from dsv2quant.storage.gguf import Value, boolean, f32, string, u32

Keys = dict[str, Value]
GATING = {"softmax": ExpertGatingFuncType.SOFTMAX, "sigmoid": ExpertGatingFuncType.SIGMOID}
# Of the others transformers' class states a head's width, which the converter writes first, and then overwrites.
_WITHOUT_WIDTH = ("glm4_moe_lite", "kimi_k2")


def model_keys(config: ModelConfig, raw: Mapping[str, Any], *, drop_expert_groups: bool) -> Keys:
    """`<architecture>.*`. `raw` is the config.json, which says what of the optional settings was written down."""
    keys = {
        "llama": _llama,
        "deepseek": _deepseek,
        "deepseek2": _deepseek2,
        "deepseek2-ocr": _deepseek2_ocr,
    }[config.gguf](config, raw, drop_expert_groups)
    return {f"{config.gguf}.{key}": value for key, value in keys.items()}


def _llama(config: ModelConfig, raw: Mapping[str, Any], _: bool) -> Keys:
    width = u32(config.v_head_dim)
    return {
        **_sizes(config, config.num_key_value_heads),
        **_rope(config, raw),
        "attention.layer_norm_rms_epsilon": f32(config.rms_norm_eps),
        "attention.key_length": width,
        "attention.value_length": width,
        "vocab_size": u32(config.vocab_size),
        "rope.dimension_count": width,
    }


def _deepseek(config: ModelConfig, raw: Mapping[str, Any], drop_expert_groups: bool) -> Keys:
    return {
        **_sizes(config, config.num_key_value_heads),
        **_rope(config, raw),
        "attention.layer_norm_rms_epsilon": f32(config.rms_norm_eps),
        **_choice(config, raw, drop_expert_groups),
        "rope.dimension_count": u32(config.v_head_dim),
        "rope.scaling.type": string(RopeScalingType.NONE.value),
        "leading_dense_block_count": u32(config.first_k_dense_replace),
        "vocab_size": u32(config.vocab_size),
        "expert_feed_forward_length": u32(config.moe_intermediate_size),
        "expert_weights_scale": f32(1.0),
        "expert_shared_count": u32(config.n_shared_experts),
    }


def _deepseek2(config: ModelConfig, raw: Mapping[str, Any], drop_expert_groups: bool) -> Keys:
    latent, rotated = config.kv_lora_rank, config.qk_rope_head_dim
    cached = {"attention.key_length": u32(latent + rotated), "attention.value_length": u32(latent)}
    return {
        **_sizes(config, 1),  # absorbed MLA: all heads share the latent
        **_rope(config, raw),
        "attention.layer_norm_rms_epsilon": f32(config.rms_norm_eps),
        **_choice(config, raw, drop_expert_groups),
        **({} if raw.get("model_type") in _WITHOUT_WIDTH else cached),
        "leading_dense_block_count": u32(config.first_k_dense_replace),
        "vocab_size": u32(config.vocab_size),
        **({} if config.q_lora_rank is None else {"attention.q_lora_rank": u32(config.q_lora_rank)}),
        "attention.kv_lora_rank": u32(latent),
        **cached,
        "attention.key_length_mla": u32(config.qk_head_dim),
        "attention.value_length_mla": u32(config.v_head_dim),
        **_experts(config),
        "rope.dimension_count": u32(rotated),
        **_yarn_end(config, raw),
    }


def _deepseek2_ocr(config: ModelConfig, raw: Mapping[str, Any], drop_expert_groups: bool) -> Keys:
    return {
        **_sizes(config, config.num_key_value_heads),
        **({"rope.freq_base": f32(config.rope_theta)} if raw.get("rope_theta") is not None else {}),
        "attention.layer_norm_rms_epsilon": f32(config.rms_norm_eps),
        **_choice(config, raw, drop_expert_groups),
        "leading_dense_block_count": u32(config.first_k_dense_replace),
        "vocab_size": u32(config.vocab_size),
        **_experts(config),
        "rope.dimension_count": u32(raw.get("qk_rope_head_dim") or 0),  # of latent attention, which it has not
    }


def _sizes(config: ModelConfig, kv_heads: int) -> Keys:
    return {
        "block_count": u32(config.num_hidden_layers),
        "context_length": u32(config.max_position_embeddings),
        "embedding_length": u32(config.hidden_size),
        "feed_forward_length": u32(config.intermediate_size),
        "attention.head_count": u32(config.num_attention_heads),
        "attention.head_count_kv": u32(kv_heads),
    }


def _choice(config: ModelConfig, raw: Mapping[str, Any], drop_expert_groups: bool) -> Keys:
    """How experts are chosen. Where config.json does not say what makes scores, neither does the converter."""
    keys = {
        "expert_count": u32(config.n_routed_experts),
        "expert_used_count": u32(config.num_experts_per_tok),
    }
    if (raw.get("n_group") is not None or config.n_group > 1) and not drop_expert_groups:
        keys["expert_group_count"] = u32(config.n_group)
    if (raw.get("topk_group") is not None or config.n_group > 1) and not drop_expert_groups:
        keys["expert_group_used_count"] = u32(config.topk_group)
    is_implied = config.scoring_func == "softmax" or (config.num_hidden_layers, config.vocab_size) in SIGMOID_IMPLIED
    if raw.get("scoring_func") is not None or not is_implied:
        keys["expert_gating_func"] = u32(GATING[config.scoring_func])
    return keys


def _experts(config: ModelConfig) -> Keys:
    keys = {
        "expert_feed_forward_length": u32(config.moe_intermediate_size),
        "expert_shared_count": u32(config.n_shared_experts),
        "expert_weights_scale": f32(config.routed_scaling_factor),
    }
    return keys | ({"expert_weights_norm": boolean(True)} if config.norm_topk_prob else {})


def _rope(config: ModelConfig, raw: Mapping[str, Any]) -> Keys:
    yarn, keys, settings = config.yarn, {}, _rope_settings(raw)
    if "linear" in (settings.get("rope_type"), settings.get("type")):
        keys = {"rope.scaling.type": string("linear"), "rope.scaling.factor": f32(config.rope_linear)}
    if yarn is not None:
        keys = {
            "rope.scaling.type": string("yarn"),
            "rope.scaling.factor": f32(yarn.factor),
            "rope.scaling.original_context_length": u32(yarn.original_max_position_embeddings),
        }
        for key in ("beta_fast", "beta_slow"):
            if settings.get(key) is not None:
                keys[f"rope.scaling.yarn_{key}"] = f32(getattr(yarn, key))
    return keys | {"rope.freq_base": f32(config.rope_theta)}


def _yarn_end(config: ModelConfig, raw: Mapping[str, Any]) -> Keys:
    if config.yarn is None or _rope_settings(raw).get("mscale_all_dim") is None:
        return {}
    return {"rope.scaling.yarn_log_multiplier": f32(0.1 * config.yarn.mscale_all_dim)}  # llama.cpp divides by 0.1 again


def _rope_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    return dict(raw.get("rope_parameters") or {}) | dict(raw.get("rope_scaling") or {})
