"""Small multimodal checkpoints with random weights, under the names that the published ones have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch

Tensors = dict[str, torch.Tensor]
V2 = {key: value for key, value in tiny.WORDY.items() if key != "torch_dtype"} | {"q_lora_rank": 64}


def siglip(prefix: str, dtype: torch.dtype) -> Tensors:
    """What a vision tower of timm's has (DeepSeek-VL, siglip_vit.py), of one block."""
    shapes = {
        "patch_embed.proj.weight": (16, 3, 4, 4), "patch_embed.proj.bias": (16,), "pos_embed": (1, 9, 16),
        "blocks.0.norm1.weight": (16,), "blocks.0.attn.qkv.weight": (48, 16), "blocks.0.attn.qkv.bias": (48,),
        "blocks.0.mlp.fc1.weight": (32, 16), "blocks.0.mlp.fc2.weight": (16, 32), "norm.weight": (16,),
    }  # fmt: skip
    return {f"{prefix}{name}": torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Kind:
    """A model around a language model: its config.json given that of the language model, and what it calls tensors."""

    around: Callable[[dict[str, Any]], dict[str, Any]]
    rename: Callable[[str], str]
    others: Callable[[], Tensors]
    inner: dict[str, Any]


def _vl2() -> Tensors:
    return siglip("vision.", torch.float32) | {
        "projector.layers.0.weight": torch.randn(128, 64).bfloat16(), "projector.layers.0.bias": torch.randn(128),
        "image_newline": torch.randn(128).half(), "view_seperator": torch.randn(128).bfloat16(),
    }  # fmt: skip


def _ocr() -> Tensors:
    return siglip("model.vision_model.", torch.bfloat16) | {
        "model.sam_model.neck.0.weight": torch.randn(8, 16, 1, 1).bfloat16(),
        "model.vision_model.embeddings.position_ids": torch.arange(9)[None],
        "model.projector.layers.weight": torch.randn(128, 64).bfloat16(),
        "model.image_newline": torch.randn(128).bfloat16(), "model.view_seperator": torch.randn(128).bfloat16(),
    }  # fmt: skip


def _vl() -> Tensors:
    return siglip("vision_model.vision_tower.", torch.float16) | {
        "aligner.layers.0.weight": torch.randn(128, 16).half(), "aligner.layers.0.bias": torch.randn(128).half(),
        "aligner.layers.2.weight": torch.randn(128, 128).half(), "aligner.layers.2.bias": torch.randn(128).half(),
    }  # fmt: skip


def _kimi() -> Tensors:
    return siglip("vision_tower.encoder.", torch.bfloat16) | {
        "multi_modal_projector.pre_norm.weight": torch.randn(16).bfloat16(),
        "multi_modal_projector.linear_1.weight": torch.randn(64, 16).bfloat16(),
    }  # fmt: skip


KINDS = {
    # what transformers' LlamaConfig has by default is left out
    "deepseek-vl": Kind(
        lambda inner: {
            "architectures": ["MultiModalityCausalLM"], "model_type": "multi_modality", "torch_dtype": "float16",
            "language_config": inner, "vision_config": {"cls": "CLIPVisionTower", "model_type": "vision"},
            "aligner_config": {"cls": "MlpProjector", "model_type": "aligner"},
        },
        "language_model.{}".format, _vl,
        {
            "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 16384, "model_type": "llama",
            "num_attention_heads": 4, "num_hidden_layers": 2, "torch_dtype": "float16", "vocab_size": 4096,
        },
    ),
    "kimi-vl": Kind(
        lambda inner: {
            "architectures": ["KimiVLForConditionalGeneration"], "model_type": "kimi_vl", "torch_dtype": "bfloat16",
            "auto_map": {"AutoConfig": "configuration_kimi_vl.KimiVLConfig"}, "text_config": inner,
            "vision_config": {"model_type": "moonvit"},
        },
        "language_model.{}".format, _kimi,
        tiny.V3 | {
            "vocab_size": 4096, "num_hidden_layers": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
            "num_experts_per_tok": 2, "num_nextn_predict_layers": 0, "rope_scaling": None,
        },
    ),
    # config.json of deepseek-vl2 names no class, and its language model's dtype is the whole's
    "deepseek-vl2": Kind(
        lambda inner: {
            "model_type": "deepseek_vl_v2", "torch_dtype": "bfloat16", "tile_tag": "2D", "language_config": inner,
            "vision_config": {"model_type": "vision", "layers": 1}, "projector_config": {"model_type": "mlp_projector"},
        },
        "language.{}".format, _vl2, V2 | {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}},
    ),
    "deepseek-ocr": Kind(
        lambda inner: {
            "architectures": ["DeepseekOCRForCausalLM"], "model_type": "deepseek_vl_v2", "torch_dtype": "bfloat16",
            "auto_map": {"AutoModel": "modeling_deepseekocr.DeepseekOCRForCausalLM"}, "language_config": inner,
            "vision_config": {"width": {"clip-l-14-224": {"layers": 1}}}, "hidden_size": 128,
        },
        "{}".format, _ocr, tiny.PLAIN_V2 | {key: tiny.WORDY[key] for key in ("vocab_size", "num_hidden_layers")},
    ),
}  # fmt: skip


def write(folder: Path, kind: str, shards: int = 1, **extra: torch.Tensor) -> tuple[Path, Tensors]:
    """(a checkpoint's folder, the tensors that are not its language model's)."""
    made = KINDS[kind]
    others = made.others()
    weights = {made.rename(name): tensor for name, tensor in tiny.random_weights(made.inner).items()}
    config = made.around(made.inner) | {"vocab_size": made.inner["vocab_size"]}
    tiny.write_checkpoint(folder, config, weights | others | extra, shards)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    return folder, others
