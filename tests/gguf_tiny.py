"""Small models to convert to GGUF, the same bits on every machine: integers of PCG64 and single float32 products.

Their vocabulary is dsv2-mini's, so that llama.cpp can run them. Each has its own shapes that a block type doesn't fit.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from family_configs import LLM_7B, LLM_67B, MOE_16B
from gguf_cases import bell

from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config
from dsv2quant.arch.spec import TensorSpec
from dsv2quant.storage import gguf as container
from dsv2quant.storage.gguf import u32

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
# As DeepSeek-LLM 67B and DeepSeek-Coder: four heads of queries share keys and values, linear RoPE; with biases.
LLAMA = tiny.LLAMA | {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 9,
    "num_attention_heads": 8, "num_key_value_heads": 2, "attention_bias": True,
}  # fmt: skip
# As deepseek-moe-16b: its experts' rows of 32 stand for 1408.
MOE = tiny.DEEPSEEK_MOE | {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2,
}  # fmt: skip
# As DeepSeek-V3: a correction bias, and a layer for prediction that llama.cpp does not take.
V3 = tiny.V3 | {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 64,
    "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
}  # fmt: skip
# As GLM-4.7-Flash, whose heads are wider in values than in keys.
GLM4 = tiny.GLM4 | {
    "vocab_size": 4104, "hidden_size": 256, "intermediate_size": 160, "moe_intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 64,
    "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 64, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip
# As DeepSeek-OCR's language model.
OCR = tiny.PLAIN_V2 | {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 160, "moe_intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1,
}  # fmt: skip
DEEPSEEK_V2 = {"tiny-lite": LITE, "tiny-v2": V2, "tiny-odd": ODD}
FAMILY = {"tiny-llama": LLAMA, "tiny-moe": MOE, "tiny-v3": V3, "tiny-glm4": GLM4, "tiny-ocr": OCR}
CONFIGS = DEEPSEEK_V2 | FAMILY
MODELS = ("dsv2-mini", *CONFIGS)
PRE_TOKENIZERS = {"tiny-glm4": "glm4"}  # of the others it is deepseek-llm

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
# Not published: llama.cpp takes a model of 80 layers for Llama 2 70B, and one of 8 experts for Mixtral 8x7B.
LLAMA_80 = LLM_7B | {"num_hidden_layers": 80, "num_key_value_heads": 16}
MOE_8 = MOE_16B | {"n_routed_experts": 8, "moe_intermediate_size": 1792}
PUBLISHED = {
    "lite": LITE_16B, "v2": V2_236B, "7b": LLM_7B, "67b": LLM_67B, "moe": MOE_16B, "80": LLAMA_80, "8": MOE_8,
}  # fmt: skip

# GLM's own (its tokenizer.json), spelled out here.
GLM_SPLIT = {
    "type": "Split", "behavior": "Isolated", "invert": False,
    "pattern": {
        "Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
        "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    },
}  # fmt: skip
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GLM_TOKENS = ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|observation|>")

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
    return {
        spec.name: torch.from_numpy(_weight(spec)) if spec.role == "router_bias" else bfloat16(_weight(spec))
        for spec in specs
    }


def _weight(spec: TensorSpec) -> np.ndarray:
    rows, cols = spec.shape if len(spec.shape) == 2 else (1, *spec.shape)
    seed = zlib.crc32(spec.name.encode())
    x = bell((rows, cols), seed) * np.float32(3.5)
    if spec.role == "norm":
        return (np.float32(1) + np.float32(0.0625) * x).reshape(spec.shape)
    if spec.role == "router_bias":
        return (np.float32(0.0625) * x).reshape(spec.shape)
    if spec.role != "embed":
        x *= np.float32(1 / math.sqrt(cols))
    if spec.role not in ("router", "lm_head"):
        x[seed % 7 :: 7] *= np.float32(0.375)
        x.reshape(-1)[seed % 509 :: 509] *= np.float32(11)
        x[rows // 3] = 0
        x[rows // 2, cols // 4 : cols // 2] = 0
        x[2 * rows // 3] = x[2 * rows // 3, 0]
    return x.reshape(spec.shape)


def write(folder: Path, models: Iterable[str] = MODELS) -> dict[str, Path]:
    """Models as folders of their names; tiny-v2 in three shards, tiny-odd with a model card."""
    paths = {name: tiny.MINI for name in models if name not in CONFIGS}
    for name, config in ((name, CONFIGS[name]) for name in models if name in CONFIGS):
        tensors = weights(config)
        paths[name] = tiny.write_checkpoint(folder / name, config, tensors, shards=3 if name == "tiny-v2" else 1)
    if "tiny-odd" in paths:
        (paths["tiny-odd"] / "README.md").write_text(CARD)
    for name in PRE_TOKENIZERS.keys() & paths.keys():
        _use_glm_tokens(paths[name])
    return paths


def with_keys(path: Path, numbers: Mapping[str, int]) -> Path:
    """A file beside `path` with other numbers among its keys, and no more."""
    opened, data = container.read(path), path.read_bytes()
    metadata = dict(opened.metadata) | {key: u32(value) for key, value in numbers.items()}
    changed = path.with_name(f"changed-{path.name}")
    changed.write_bytes(container.pack_header(metadata, opened.tensors) + data[opened.data_start :])
    return changed


def _use_glm_tokens(folder: Path) -> None:
    """Give a folder GLM's pre-tokenizer and control tokens; its settings name no BOS."""
    path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    raw, said = (json.loads(file.read_text(encoding="utf-8")) for file in (path, settings))
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [GLM_SPLIT, BYTES]}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    raw["added_tokens"] += [plain | {"id": 4096 + i, "content": token} for i, token in enumerate(GLM_TOKENS)]
    first, after = ({"SpecialToken": {"id": token, "type_id": 0}} for token in GLM_TOKENS[1:3])
    known = {token: {"id": token, "ids": [4096 + GLM_TOKENS.index(token)], "tokens": [token]} for token in GLM_TOKENS}
    single = [first, after, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    raw["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}
    for key in ("bos_token", "add_bos_token", "chat_template"):
        said.pop(key, None)
    path.write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")
    settings.write_text(json.dumps(said | {"eos_token": GLM_TOKENS[0]}), encoding="utf-8")
