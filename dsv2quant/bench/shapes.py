"""The published models' configurations, and the matrices that a fused runtime multiplies by."""

from __future__ import annotations

import json
from importlib import resources

from dsv2quant.config import ModelConfig
from dsv2quant.names import layer_slots

MODELS = ("v2", "v2-lite")  # deepseek-ai/DeepSeek-V2 and DeepSeek-V2-Lite


def configuration(model: str) -> ModelConfig:
    """Of one of MODELS: what its config.json says, without what does not concern the model."""
    text = resources.files("dsv2quant").joinpath("bench", "configs", f"{model}.json").read_text(encoding="utf-8")
    return ModelConfig.from_dict(json.loads(text), f"{model}.json")


def matrices(config: ModelConfig, unit: int = 1) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every weight but the routed experts', those that have an input in common as one, in which each
    has rows in multiples of `unit`."""
    layers = (*layer_slots(config, 0), *layer_slots(config, config.num_hidden_layers - 1))  # a dense one, and an MoE
    shapes = {slot.role: slot.shape for slot in layers}

    def fused(*roles: str) -> tuple[int, int]:
        rows = [shapes[role][0] for role in roles]
        return sum(-(-n // unit) * unit for n in rows) if len(rows) > 1 else rows[0], shapes[roles[0]][1]

    found = {"q + kv_a": fused("q_proj", "kv_a_proj_with_mqa")} if config.q_lora_rank is None else {
        "q_a + kv_a": fused("q_a_proj", "kv_a_proj_with_mqa"), "q_b": fused("q_b_proj")
    }  # fmt: skip
    found |= {"kv_b": fused("kv_b_proj"), "o": fused("o_proj")}
    for ffn in ("shared", "dense"):
        found[f"{ffn} gate + up"] = fused(f"{ffn}.gate_proj", f"{ffn}.up_proj")
        found[f"{ffn} down"] = fused(f"{ffn}.down_proj")
    return found
