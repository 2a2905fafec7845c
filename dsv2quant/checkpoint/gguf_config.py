"""The config.json that a GGUF file's keys were made of, by llama.cpp's architecture: what gguf_keys.py writes, back.

Defaults are those of llama.cpp's models (src/models/llama.cpp, deepseek.cpp, deepseek2.cpp, deepseek2ocr.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np

from dsv2quant.arch import deepseek_moe, deepseek_v2, deepseek_v3, llama
from dsv2quant.errors import InputError
from dsv2quant.storage.gguf import Metadata

Config = dict[str, Any]
_SOFTMAX, _SIGMOID = 1, 2  # expert_gating_func; 0 says as little as nothing
SIGMOID_IMPLIED = ((47, 154880), (48, 154880))  # layers and vocabulary: GLM-4.7-Flash's (src/models/deepseek2.cpp)
_INTEGERS = {
    "vocab_size": "vocab_size", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}  # fmt: skip
_EXPERTS = {
    "moe_intermediate_size": "expert_feed_forward_length", "n_routed_experts": "expert_count",
    "n_shared_experts": "expert_shared_count", "num_experts_per_tok": "expert_used_count",
    "first_k_dense_replace": "leading_dense_block_count",
}  # fmt: skip


def config_json(metadata: Metadata, where: object, *, tied: bool = False, biased: bool = False) -> Config:
    """The config.json, for `model_config`. `tied` says that the file has no output.weight, `biased` that attention has
    biases.

    Numbers that GGUF rounded to float32 come back as the shortest decimal that rounds so: 1e-06 as it was.
    Raises InputError for another architecture, a model of it that is not the family's, or a missing key.
    """
    found = metadata["general.architecture"].value if "general.architecture" in metadata else None
    if found not in _READ:
        raise InputError(f"its architecture is {found!r}", where=where, fix=f"read are {', '.join(_READ)}")
    read = _Reader(metadata, where, found)
    config: Config = {key: read.integer(name) for key, name in _INTEGERS.items()}
    config["num_hidden_layers"] -= read.integer("nextn_predict_layers", 0)  # those for multi-token prediction
    config |= {
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": read.number("rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "attention_bias": biased,
        "tie_word_embeddings": tied,
    }
    config |= _READ[found](read, config)
    for name in ("bos", "eos"):
        if f"tokenizer.ggml.{name}_token_id" in metadata:
            config[f"{name}_token_id"] = metadata[f"tokenizer.ggml.{name}_token_id"].value
    return config


def _llama(read: _Reader, config: Config) -> Config:
    if read.integer("expert_count", 0):
        raise InputError("has experts, as Mixtral has", where=read.where, fix="of llama files dense ones are read")
    return {
        "architectures": [llama.CAUSAL_LM],
        "model_type": llama.MODEL_TYPES[0],
        "num_key_value_heads": read.integer("attention.head_count_kv", config["num_attention_heads"]),
        "head_dim": read.integer("attention.key_length", 0) or None,
        "rope_scaling": read.rope_scaling(),
    }


def _deepseek(read: _Reader, config: Config) -> Config:
    return {
        "architectures": [deepseek_moe.CAUSAL_LM],
        "model_type": deepseek_moe.MODEL_TYPES[0],
        "num_key_value_heads": read.integer("attention.head_count_kv", config["num_attention_heads"]),
        **{key: read.integer(name) for key, name in _EXPERTS.items()},
        "moe_layer_freq": 1,
    }


def _deepseek2(read: _Reader, config: Config) -> Config:
    rotated, key_length = read.integer("rope.dimension_count"), read.integer("attention.key_length_mla")
    if key_length <= rotated:
        raise InputError(f"key_length_mla is {key_length}", where=read.where, fix="it must exceed rope.dimension_count")
    return {
        **_chosen(read, config),
        "q_lora_rank": read.integer("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": read.integer("attention.kv_lora_rank"),
        "qk_nope_head_dim": key_length - rotated,
        "qk_rope_head_dim": rotated,
        "v_head_dim": read.integer("attention.value_length_mla"),
        "rope_scaling": read.rope_scaling(),
    }


def _deepseek2_ocr(read: _Reader, config: Config) -> Config:
    return {**_chosen(read, config), "use_mla": False}


def _chosen(read: _Reader, config: Config) -> Config:
    """Experts, and the class that chooses them so."""
    implied = (config["num_hidden_layers"], config["vocab_size"]) in SIGMOID_IMPLIED
    gating = read.integer("expert_gating_func", 0) or (_SIGMOID if implied else _SOFTMAX)
    if gating not in (_SOFTMAX, _SIGMOID):
        fix = f"read are {_SOFTMAX}, softmax, and {_SIGMOID}, sigmoid"
        raise InputError(f"expert_gating_func is {gating}", where=read.where, fix=fix)
    n_group = read.integer("expert_group_count", 1)
    found = {key: read.integer(name) for key, name in _EXPERTS.items()} | {
        "n_group": n_group,
        "topk_group": read.integer("expert_group_used_count", 1),
        "routed_scaling_factor": read.number("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(read.value("expert_weights_norm", False)),
        "moe_layer_freq": 1,
    }
    if gating == _SIGMOID:
        is_latent = read.architecture == deepseek_v2.GGUF
        family = deepseek_v3 if is_latent else deepseek_v2
        names = {"architectures": [family.CAUSAL_LM], "model_type": family.MODEL_TYPES[0]}
        return found | names | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    method = "group_limited_greedy" if n_group > 1 else "greedy"
    names = {"architectures": [deepseek_v2.CAUSAL_LM], "model_type": deepseek_v2.MODEL_TYPES[0]}
    return found | names | {"scoring_func": "softmax", "topk_method": method}


class _Reader:
    """Typed access to the architecture's keys; one without a default must be there."""

    def __init__(self, metadata: Metadata, where: object, architecture: str) -> None:
        self.metadata, self.where, self.architecture = metadata, where, architecture

    def value(self, key: str, default: Any = None) -> Any:
        name = f"{self.architecture}.{key}"
        if name in self.metadata:
            return self.metadata[name].value
        if default is None:
            fix = "it was made by an old llama.cpp: convert the checkpoint again"
            raise InputError(f"has no {name}", where=self.where, fix=fix)
        return default

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{self.architecture}.{key} is {value!r}", where=self.where, fix="it must be an integer")
        return value

    def number(self, key: str, default: float | None = None, times: int = 1) -> float:
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
            what = f"{self.architecture}.{key} is {value!r}"
            raise InputError(what, where=self.where, fix="it must be a finite number")
        return float(Decimal(str(np.float32(value))) * times)

    def rope_scaling(self) -> Config | None:
        """As config.json has it. llama.cpp takes mscale to be mscale_all_dim, as every file that this package writes
        has them."""
        kind, factor = self.value("rope.scaling.type", "none"), self.number("rope.scaling.factor", 1.0)
        if kind == "linear":
            return {"type": "linear", "factor": factor}
        if kind != "yarn":
            if factor != 1:
                raise InputError(f"RoPE is scaled by {kind!r}", where=self.where, fix="read are linear and yarn")
            return None
        mscale = self.number("rope.scaling.yarn_log_multiplier", 0.0 if factor == 1 else None, times=10)
        return {
            "type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": self.integer("rope.scaling.original_context_length"),
            "beta_fast": self.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": self.number("rope.scaling.yarn_beta_slow", 1.0),
            "mscale": mscale,
            "mscale_all_dim": mscale,
        }


_READ: dict[str, Callable[[_Reader, Config], Config]] = {
    "llama": _llama, "deepseek": _deepseek, deepseek_v2.GGUF: _deepseek2, deepseek_v2.GGUF_PLAIN: _deepseek2_ocr,
}  # fmt: skip
