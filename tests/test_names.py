"""The list of tensors that a configuration implies."""

from __future__ import annotations

import pytest
import tiny

from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.deepseek_v2 import SEQUENCE_CLASSIFICATION
from dsv2quant.arch.families import model_config
from dsv2quant.arch.spec import ROLES

LITE_16B = tiny.LITE | {
    "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "num_attention_heads": 16, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64, "num_experts_per_tok": 6,
}  # fmt: skip


def specs(raw):
    return architecture(model_config(raw, "config.json")).specs()


@pytest.mark.parametrize(
    "raw",
    [
        tiny.LITE,
        tiny.V2,
        tiny.V2 | {"attention_bias": True},
        tiny.LITE | {"first_k_dense_replace": 2, "tie_word_embeddings": True},
        tiny.LITE | {"architectures": [SEQUENCE_CLASSIFICATION]},
    ],
    ids=["lite", "v2", "biases", "tied", "classifier"],
)
def test_names_and_shapes_are_what_transformers_saves(raw, tmp_path):
    import transformers
    from safetensors import safe_open

    model = getattr(transformers, raw["architectures"][0])(tiny.transformers_config(raw))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as saved:
        theirs = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
    assert {s.name: s.shape for s in specs(raw)} == theirs


def test_parameter_counts_of_the_published_models():
    assert sum(s.size for s in specs(LITE_16B)) == 15_706_484_224


def test_roles():
    by_name = {s.name: s for s in specs(tiny.V2 | {"attention_bias": True})}
    assert all(s.role in ROLES for s in by_name.values())
    assert by_name["model.layers.0.mlp.gate_proj.weight"].role == "dense.gate_proj"
    assert by_name["model.layers.1.mlp.gate.weight"].role == "router"
    expert = by_name["model.layers.2.mlp.experts.11.down_proj.weight"]
    assert (expert.role, expert.layer, expert.expert) == ("routed.down_proj", 2, 11)
    assert by_name["model.layers.1.mlp.shared_experts.up_proj.weight"].shape == (96, 64)
    assert by_name["model.layers.1.self_attn.kv_a_proj_with_mqa.bias"].role == "bias"
    assert by_name["model.layers.1.self_attn.kv_a_proj_with_mqa.bias"].module.endswith("kv_a_proj_with_mqa")
