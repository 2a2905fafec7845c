"""GGUF files of DeepSeek-V2 models, written with the gguf library: they share nothing with our code but the K-quants'
encoders, which the library lacks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants

from dsv2quant.formats.gguf.blocks import encode

# Rows of whole blocks of 256 but in attn_k_b and attn_q_b; grouped routing; fits dsv2-mini's tokenizer.
CONFIG = tiny.V2 | {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256,
    "num_hidden_layers": 2, "q_lora_rank": 64, "kv_lora_rank": 256, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
}  # fmt: skip
Types = Callable[[str], str]  # a tensor's name → its block type


def stacked(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A model's tensors under the names of the gguf library's map: experts stacked, kv_b_proj split per head."""
    names = get_tensor_name_map(MODEL_ARCH.DEEPSEEK2, config["num_hidden_layers"])
    found: dict[str, np.ndarray] = {}
    experts: dict[str, list[np.ndarray]] = {}
    for name, tensor in tensors.items():
        value = tensor.float().numpy()
        if name.endswith("kv_b_proj.weight"):
            heads = value.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
            nope = config["qk_nope_head_dim"]
            split = {"k_b_proj": heads[:, :nope].transpose(0, 2, 1), "v_b_proj": heads[:, nope:]}
            for part, half in split.items():
                found[names.get_name(name.replace("kv_b_proj", part), (".weight",))] = np.ascontiguousarray(half)
        elif ".mlp.experts." in name:
            at, rest = name.split(".experts.")
            experts.setdefault(f"{at}.experts.{rest.partition('.')[2]}", []).append(value)
        else:
            found[names.get_name(name, (".weight", ".bias"))] = value
    return found | {names.get_name(name, (".weight",)): np.stack(parts) for name, parts in experts.items()}


def quantized(values: np.ndarray, kind: str) -> np.ndarray:
    """The bytes of a block type, uint8 [..., rows, bytes of a row]."""
    try:
        data = quants.quantize(values, GGMLQuantizationType[kind])
    except NotImplementedError:
        rows = encode(kind, values.reshape(-1, values.shape[-1]))
        data = rows.reshape(*values.shape[:-1], -1)
    return data.view(np.uint8)


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    types: Types,
    *,
    tokenizer: bool = True,
    change: Callable[[GGUFWriter], object] = lambda writer: None,
    tensors_per_file: int = 0,
) -> dict[str, np.ndarray]:
    """Write the arrays as the block types that `types` names; returns their bytes."""
    writer = GGUFWriter(path, "deepseek2", split_max_tensors=tensors_per_file)
    add_metadata(writer, config)
    if tokenizer:
        add_tokenizer(writer)
    change(writer)
    data = {name: quantized(values, types(name)) for name, values in arrays.items()}
    for name, raw in data.items():
        kind = GGMLQuantizationType[types(name)]
        if kind == GGMLQuantizationType.F32:
            writer.add_tensor(name, raw.view(np.float32))
        elif kind == GGMLQuantizationType.F16:
            writer.add_tensor(name, raw.view(np.float16))
        else:
            writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return data


def add_metadata(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """The keys that llama.cpp's converter writes for a DeepSeek-V2 (conversion/deepseek.py)."""
    c = config
    writer.add_file_type(15)  # Q4_K_M
    writer.add_vocab_size(c["vocab_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(float(c["rope_theta"]))
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_key_length(c["kv_lora_rank"] + c["qk_rope_head_dim"])
    writer.add_value_length(c["kv_lora_rank"])
    writer.add_key_length_mla(c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
    writer.add_value_length_mla(c["v_head_dim"])
    writer.add_rope_dimension_count(c["qk_rope_head_dim"])
    if c["q_lora_rank"]:
        writer.add_q_lora_rank(c["q_lora_rank"])
    writer.add_kv_lora_rank(c["kv_lora_rank"])
    writer.add_leading_dense_block_count(c["first_k_dense_replace"])
    writer.add_expert_count(c["n_routed_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_expert_shared_count(c["n_shared_experts"])
    writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    writer.add_expert_weights_scale(c["routed_scaling_factor"])
    writer.add_expert_group_count(c["n_group"])
    writer.add_expert_group_used_count(c["topk_group"])
    yarn = c["rope_scaling"]
    writer.add_string("deepseek2.rope.scaling.type", "yarn")
    writer.add_rope_scaling_factor(yarn["factor"])
    writer.add_rope_scaling_orig_ctx_len(yarn["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_log_mul(0.1 * yarn["mscale_all_dim"])
    writer.add_rope_scaling_yarn_beta_fast(yarn["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(yarn["beta_slow"])


def add_tokenizer(writer: GGUFWriter) -> None:
    """dsv2-mini's vocabulary and merges."""
    raw = json.loads((tiny.MINI / "tokenizer.json").read_text())
    added = {token["id"]: token["content"] for token in raw["added_tokens"]}
    tokens = {number: token for token, number in raw["model"]["vocab"].items()} | added
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-llm")
    writer.add_token_list([tokens[number] for number in sorted(tokens)])
    writer.add_token_types([3 if number in added else 1 for number in sorted(tokens)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)


def keep_plain(types: Types) -> Types:
    """`types`, but F32 for what llama-quantize never quantizes."""
    return lambda name: "F32" if name.endswith("_norm.weight") or "ffn_gate_inp" in name else types(name)


def mixed(name: str) -> str:
    """Block types as in a Q4_K_M: attn_k_b and attn_q_b have rows that blocks of 256 don't fit."""
    kinds = {
        "attn_k_b": "Q5_0",
        "attn_q_b": "Q5_1",
        "attn_output": "Q4_0",
        "ffn_down_exps": "Q6_K",
        "output": "Q6_K",
        "attn_v_b": "Q8_0",
    }
    return kinds.get(name.split(".")[-2], "Q4_K")


MIXED = keep_plain(mixed)


def decoded(
    config: Mapping[str, Any], data: Mapping[str, np.ndarray], types: Types, names: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors `names` as float32, from the library's own decoding of the bytes."""
    values = {name: quants.dequantize(raw, GGMLQuantizationType[types(name)]) for name, raw in data.items()}
    mapped = get_tensor_name_map(MODEL_ARCH.DEEPSEEK2, config["num_hidden_layers"])
    found = {}
    for name in names:
        if name.endswith("kv_b_proj.weight"):
            at = f"blk.{name.split('.')[2]}."
            k_b, v_b = values[f"{at}attn_k_b.weight"], values[f"{at}attn_v_b.weight"]
            value = np.concatenate([np.concatenate([k.T, v]) for k, v in zip(k_b, v_b, strict=True)])
        elif ".mlp.experts." in name:
            at, rest = name.split(".experts.")
            expert, _, leaf = rest.partition(".")
            value = values[mapped.get_name(f"{at}.experts.{leaf}", (".weight",))][int(expert)]
        else:
            value = values[mapped.get_name(name, (".weight", ".bias"))]
        found[name] = torch.from_numpy(np.array(value, np.float32))
    return found
