"""Small models to convert to GGUF, the same bits on every machine: integers of PCG64 and single float32 products.

Their vocabulary is dsv2-mini's, so that llama.cpp can run them. Each has its own shapes that a block type doesn't fit.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from gguf_cases import bell

from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config
from dsv2quant.arch.spec import TensorSpec

# As DeepSeek-V2-Lite. llama.cpp takes a model of 27 layers for it, and only then expects direct queries. Its rows of
# 32 (experts) and 192 (dense FFN) stand for 1408 and 10944, which whole blocks of 256 don't fit either.
LITE = tiny.LITE | {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 192, "moe_intermediate_size": 32,
    "num_hidden_layers": 27, "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 32,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 3, "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}  # fmt: skip
# As DeepSeek-V2: rows of whole blocks of 256 but in attn_k_b, group-limited routing.
V2 = tiny.V2 | {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 256,
    "kv_lora_rank": 256, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 64, "n_routed_experts": 8,
    "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 2,
}  # fmt: skip
# Nothing fits blocks of 256, and the expert's 40 not even blocks of 32; the embedding is the output too.
ODD = tiny.V2 | {
    "vocab_size": 4096, "hidden_size": 96, "intermediate_size": 160, "moe_intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 64,
    "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 5,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
    "norm_topk_prob": True, "routed_scaling_factor": 1.0, "tie_word_embeddings": True,
}  # fmt: skip
CONFIGS = {"tiny-lite": LITE, "tiny-v2": V2, "tiny-odd": ODD}
MODELS = ("dsv2-mini", *CONFIGS)

# The published configurations.
LITE_16B = tiny.LITE | {
    "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
    "num_experts_per_tok": 6,
}  # fmt: skip
V2_236B = tiny.V2 | {
    "vocab_size": 102400, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 160,
    "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3,
}  # fmt: skip
PUBLISHED = {"lite": LITE_16B, "v2": V2_236B}

CARD = """---
license: other
license_name: deepseek
license_link: https://example.org/LICENSE
language: [en, zh]
tags: [test, "deepseek_v2"]
base_model: dsv2quant/dsv2-mini
---
# A model of random weights
"""


def bfloat16(x: np.ndarray) -> torch.Tensor:
    """float32 → bfloat16, to nearest even."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return torch.from_numpy(rounded.astype(np.uint16)).view(torch.bfloat16)


def weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Bell-shaped rows of different sizes, some outliers, a row and a stretch of zeros, a constant row."""
    specs = architecture(model_config(config, "config.json")).specs()
    return {spec.name: bfloat16(_weight(spec)) for spec in specs}


def _weight(spec: TensorSpec) -> np.ndarray:
    rows, cols = spec.shape if len(spec.shape) == 2 else (1, *spec.shape)
    seed = zlib.crc32(spec.name.encode())
    x = bell((rows, cols), seed) * np.float32(3.5)
    if spec.role == "norm":
        return (np.float32(1) + np.float32(0.0625) * x).reshape(spec.shape)
    if spec.role != "embed":
        x *= np.float32(1 / math.sqrt(cols))
    if spec.role not in ("router", "lm_head"):
        x[seed % 7 :: 7] *= np.float32(0.375)
        x.reshape(-1)[seed % 509 :: 509] *= np.float32(11)
        x[rows // 3] = 0
        x[rows // 2, cols // 4 : cols // 2] = 0
        x[2 * rows // 3] = x[2 * rows // 3, 0]
    return x.reshape(spec.shape)


def write(folder: Path) -> dict[str, Path]:
    """Every model of MODELS, as a folder of its name; tiny-v2 in three shards, tiny-odd with a model card."""
    paths = {"dsv2-mini": tiny.MINI}
    for name, config in CONFIGS.items():
        tensors = weights(config)
        paths[name] = tiny.write_checkpoint(folder / name, config, tensors, shards=3 if name == "tiny-v2" else 1)
    (paths["tiny-odd"] / "README.md").write_text(CARD)
    return paths
