"""Small DeepSeek-V2 checkpoints with random weights, written with the safetensors library itself."""

from __future__ import annotations

import copy
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.deepseek_v2 import CAUSAL_LM
from dsv2quant.arch.families import model_config

MINI = Path(__file__).parent.parent / "examples" / "dsv2-mini"
YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip

# As DeepSeek-V2-Lite: direct queries, greedy routing.
LITE: dict[str, Any] = {
    "architectures": [CAUSAL_LM], "model_type": "deepseek_v2", "torch_dtype": "bfloat16", "vocab_size": 160,
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8, "n_shared_experts": 2,
    "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax",
    "rms_norm_eps": 1e-6, "rope_theta": 10000, "rope_scaling": YARN, "hidden_act": "silu", "attention_bias": False,
    "max_position_embeddings": 1280, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
# As DeepSeek-V2: latent queries, group-limited routing, routed weights scaled by 16.
V2 = LITE | {
    "q_lora_rank": 40, "n_routed_experts": 16, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
}  # fmt: skip
# The same with columns that groups of 32 fit.
GROUPED = LITE | {"hidden_size": 128, "moe_intermediate_size": 64}
GROUPED_V2 = V2 | {"hidden_size": 128, "moe_intermediate_size": 64, "q_lora_rank": 64}
# Fits dsv2-mini's tokenizer; a dense layer and an MoE layer.
WORDY = GROUPED | {"vocab_size": 4096, "num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2}
# As DeepSeek-LLM 67B and DeepSeek-Coder: heads that share keys and values, linear RoPE scaling.
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 160,
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_scaling": {"type": "linear", "factor": 4.0}, "hidden_act": "silu", "attention_bias": False,
    "max_position_embeddings": 1280, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
# As deepseek-moe-16b.
DEEPSEEK_MOE = LLAMA | {
    "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "moe_intermediate_size": 64,
    "num_key_value_heads": 4, "rope_scaling": None, "n_routed_experts": 8, "n_shared_experts": 2,
    "num_experts_per_tok": 3, "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": False,
    "scoring_func": "softmax",
}  # fmt: skip
# As DeepSeek-V3: sigmoid scores, a correction bias, groups by their best two, a layer for multi-token prediction.
V3 = GROUPED_V2 | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "n_shared_experts": 1,
    "num_experts_per_tok": 3, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
# As GLM-4.7-Flash: its heads are wider in values than in keys that aren't rotated.
GLM4 = V3 | {
    "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "n_group": 1, "topk_group": 1,
    "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 32, "routed_scaling_factor": 1.8,
    "rope_scaling": None, "rope_theta": 1000000.0, "rms_norm_eps": 1e-5, "num_nextn_predict_layers": 0,
}  # fmt: skip
# As DeepSeek-OCR's language model: DeepSeek-V2's experts with plain attention.
PLAIN_V2 = GROUPED | {
    "use_mla": False, "rope_scaling": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0,
    "kv_lora_rank": None,
}  # fmt: skip
FAMILY = {"llama": LLAMA, "deepseek-moe": DEEPSEEK_MOE, "v3": V3, "glm4": GLM4, "plain-v2": PLAIN_V2}
# V2-Lite's true awkward widths (576 = 4.5 × 128, 1408, 2816, 10944 = 85.5 × 128) in a model that is small elsewhere.
AWKWARD = LITE | {
    "hidden_size": 256, "intermediate_size": 10944, "moe_intermediate_size": 1408, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def random_weights(
    config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Every tensor of the model: norms near 1, matrices scaled so that activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in architecture(model_config(config, "config.json")).specs():
        noise = torch.randn(spec.shape, generator=generator)
        if spec.role == "norm":
            value = 1 + 0.1 * noise
        elif spec.role in ("embed", "bias"):
            value = noise
        elif spec.role == "router_bias":
            value = 0.1 * noise
        else:
            value = noise * spec.shape[-1] ** -0.5
        tensors[spec.name] = value if spec.role == "router_bias" else value.to(dtype)
    return tensors


def write_checkpoint(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None, shards: int = 1
) -> Path:
    """A checkpoint folder, with dsv2-mini's tokenizer beside the weights, or what of it the vocabulary has room for."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = random_weights(config) if tensors is None else tensors
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        names = np.array_split(list(tensors), shards)
        files = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
        for file, members in zip(files, names, strict=True):
            save_file({str(n): tensors[str(n)] for n in members}, folder / file, {"format": "pt"})
        weight_map = {str(n): file for file, members in zip(files, names, strict=True) for n in members}
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(MINI / name, folder / name)
    if config["vocab_size"] < 4096:
        (folder / "tokenizer.json").write_text(_tokenizer(config["vocab_size"]))
    return folder


@cache
def _tokenizer(size: int) -> str:
    """The first tokens of dsv2-mini's tokenizer, without merges."""
    raw = json.loads((MINI / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = raw["model"]["vocab"]
    raw["model"] |= {"vocab": {token: number for token, number in vocabulary.items() if number < size}, "merges": []}
    return json.dumps(raw)


def transformers_config(config: dict[str, Any]) -> Any:
    """The same configuration as transformers' class, which writes into the dictionaries it is given."""
    from transformers import DeepseekV2Config

    return DeepseekV2Config(**copy.deepcopy(config))


def write_headers(folder: Path, config: dict[str, Any], shard_size: int = 8_600_000_000) -> Path:
    """A checkpoint of any size that is headers and holes: sparse files of the right length."""
    from dsv2quant.storage.safetensors import Output, Shard

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    outputs = [
        Output(s.name, "BF16", s.shape, 2 * s.size) for s in architecture(model_config(config, "config.json")).specs()
    ]
    groups: list[list[Any]] = [[]]
    size = 0
    for output in outputs:
        if groups[-1] and size + output.nbytes > shard_size:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.nbytes
    files = [f"model-{i:05d}-of-{len(groups):06d}.safetensors" for i in range(1, len(groups) + 1)]
    for file, members in zip(files, groups, strict=True):
        shard = Shard(file, tuple(members))
        with (folder / file).open("wb") as out:
            out.write(shard.header)
            out.truncate(shard.nbytes)
    weight_map = {o.name: file for file, members in zip(files, groups, strict=True) for o in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
