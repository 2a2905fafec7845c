"""A GGUF file's deepseek2.* keys as the config.json that they were made of: the reverse of `metadata`."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np

from dsv2quant.arch.config import CAUSAL_LM
from dsv2quant.arch.deepseek_v2 import ARCHITECTURE
from dsv2quant.errors import InputError
from dsv2quant.storage.gguf import Metadata

_SOFTMAX = (0, 1)  # not said, or said
_INTEGERS = {
    "vocab_size": "vocab_size", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "moe_intermediate_size": "expert_feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "kv_lora_rank": "attention.kv_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count", "v_head_dim": "attention.value_length_mla",
    "n_routed_experts": "expert_count", "n_shared_experts": "expert_shared_count",
    "num_experts_per_tok": "expert_used_count", "first_k_dense_replace": "leading_dense_block_count",
    "max_position_embeddings": "context_length",
}  # fmt: skip


def model_config(metadata: Metadata, where: object, *, tied: bool = False) -> dict[str, Any]:
    """A config.json for ModelConfig.from_dict. `tied` says that the file has no output.weight.

    Numbers that GGUF rounded to float32 come back as the shortest decimal that rounds so: 1e-06 as it was.
    Raises InputError for another architecture, another routing than DeepSeek-V2's, or a missing key.
    """
    found = metadata["general.architecture"].value if "general.architecture" in metadata else None
    if found != ARCHITECTURE:
        raise InputError(f"its architecture is {found!r}", where=where, fix=f"only {ARCHITECTURE} files are read")
    read = _Reader(metadata, where)
    if read.integer("expert_gating_func", _SOFTMAX[0]) not in _SOFTMAX:
        raise InputError("its experts are chosen as in DeepSeek-V3", where=where, fix="only DeepSeek-V2 is read")
    n_group = read.integer("expert_group_count", 1)
    config: dict[str, Any] = {key: read.integer(name) for key, name in _INTEGERS.items()}
    key_length = read.integer("attention.key_length_mla")
    if key_length <= config["qk_rope_head_dim"]:
        raise InputError(f"key_length_mla is {key_length}", where=where, fix="it must exceed rope.dimension_count")
    config |= {
        "architectures": [CAUSAL_LM],
        "model_type": "deepseek_v2",
        "q_lora_rank": read.integer("attention.q_lora_rank", 0) or None,
        "qk_nope_head_dim": key_length - config["qk_rope_head_dim"],
        "n_group": n_group,
        "topk_group": read.integer("expert_group_used_count", 1),
        "topk_method": "group_limited_greedy" if n_group > 1 else "greedy",
        "routed_scaling_factor": read.number("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(read.value("expert_weights_norm", False)),
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": read.number("rope.freq_base", 10000.0),
        "rope_scaling": _yarn(read),
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": tied,
    }
    for name in ("bos", "eos"):
        if f"tokenizer.ggml.{name}_token_id" in metadata:
            config[f"{name}_token_id"] = metadata[f"tokenizer.ggml.{name}_token_id"].value
    return config


def _yarn(read: _Reader) -> dict[str, Any] | None:
    kind, factor = read.value("rope.scaling.type", "none"), read.number("rope.scaling.factor", 1.0)
    if kind != "yarn":
        if factor != 1:
            raise InputError(f"RoPE is scaled by {kind!r}", where=read.where, fix="only YaRN is read")
        return None
    # llama.cpp takes mscale to be mscale_all_dim, and so does every file that this package writes.
    mscale = read.number("rope.scaling.yarn_log_multiplier", 0.0 if factor == 1 else None, times=10)
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": read.integer("rope.scaling.original_context_length"),
        "beta_fast": read.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": read.number("rope.scaling.yarn_beta_slow", 1.0),
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


class _Reader:
    """Typed access to the deepseek2.* keys; one without a default must be there."""

    def __init__(self, metadata: Metadata, where: object) -> None:
        self.metadata, self.where = metadata, where

    def value(self, key: str, default: Any = None) -> Any:
        name = f"{ARCHITECTURE}.{key}"
        if name in self.metadata:
            return self.metadata[name].value
        if default is None:
            fix = "it was made by an old llama.cpp: convert the checkpoint again"
            raise InputError(f"has no {name}", where=self.where, fix=fix)
        return default

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{ARCHITECTURE}.{key} is {value!r}", where=self.where, fix="it must be an integer")
        return value

    def number(self, key: str, default: float | None = None, times: int = 1) -> float:
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
            raise InputError(f"{ARCHITECTURE}.{key} is {value!r}", where=self.where, fix="it must be a finite number")
        return float(Decimal(str(np.float32(value))) * times)
