"""The published checkpoints of the family: how many parameters each has, and how each is planned for vLLM's GPUs."""

from __future__ import annotations

import re

import pytest
import tiny
from family_configs import ROWS, language
from test_plan import fallen, reasons, schemes

from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config
from dsv2quant.checkpoint.gguf import GgufCheckpoint
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import InputError, UsageError
from dsv2quant.evaluation.verify import bytes_compared, check_layout
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan
from dsv2quant.report.plans import notes
from dsv2quant.report.warnings import warnings

DENSE = {f"dense.{name}_proj" for name in ("gate", "up", "down")}
SHARED = {f"shared.{name}_proj" for name in ("gate", "up", "down")}
# name: (GPUs, what falls back to BF16 in block FP8, what becomes of the columns that groups of 128 don't fit)
ON_GPUS = {
    "deepseek-llm-7b": (8, DENSE, {"dense.down_proj": "int4-g32"}),  # 11008 / 8 = 1376 = 10.75 × 128 = 43 × 32
    "deepseek-llm-67b": (8, DENSE, {"dense.down_proj": "int4-g64"}),  # 22016 / 8 = 2752 = 21.5 × 128
    "deepseek-coder-1.3b": (8, DENSE, {"dense.down_proj": "bf16"}),  # 5504 / 8 = 688 = 21.5 × 32
    "deepseek-coder-6.7b": (8, DENSE, {"dense.down_proj": "int4-g32"}),
    "deepseek-coder-33b": (8, DENSE, {"dense.down_proj": "int4-g32"}),  # 19200 / 8 = 2400 = 75 × 32
    "deepseek-vl-1.3b": (8, DENSE, {"dense.down_proj": "int4-g64"}),  # 5632 / 8 = 704
    "deepseek-vl-7b": (8, DENSE, {"dense.down_proj": "int4-g32"}),
    "deepseek-moe-16b": (8, DENSE | SHARED, {"dense.down_proj": "bf16", "shared.down_proj": "int4-g32"}),
    "DeepSeek-V2": (8, set(), {}),
    "DeepSeek-V2-Lite": (8, DENSE | SHARED, {"dense.down_proj": "bf16", "shared.down_proj": "int4-g32"}),
    "deepseek-vl2-tiny": (2, DENSE, {"dense.down_proj": "int4-g32"}),
    "deepseek-vl2-small": (8, DENSE | SHARED, {"dense.down_proj": "bf16", "shared.down_proj": "int4-g32"}),
    "deepseek-vl2": (8, set(), {}),
    "DeepSeek-OCR": (2, DENSE, {"dense.down_proj": "int4-g32"}),
    "Moonlight-16B-A3B": (8, SHARED, {"shared.down_proj": "int4-g32"}),
    "Kimi-K2": (8, set(), {}),
    "kanana-2-30b-a3b": (8, SHARED, {"shared.down_proj": "int4-g64"}),
    "GigaChat3-10B-A1.8B": (8, DENSE | SHARED, {"dense.down_proj": "int4-g32", "shared.down_proj": "int4-g32"}),
    "JoyAI-LLM-Flash": (8, SHARED, {"shared.down_proj": "int4-g32"}),
    "GLM-4.7-Flash": (4, {"kv_b_proj"}, {}),  # 20 heads of 448 rows: 2240 = 17.5 × 128 a GPU
    "DeepSeek-V3": (8, set(), {}),
    "DeepSeek-V3.1": (8, set(), {}),
}


def shortened(name: str) -> dict:
    """A row's language model in BF16 with one layer of each kind and 16 experts: what rules look at stays."""
    config = language(ROWS[name].config) | {"num_hidden_layers": 2}
    if "n_routed_experts" in config:
        config |= {"n_routed_experts": 16, "first_k_dense_replace": 1}
    return {key: value for key, value in config.items() if key != "quantization_config"}


def opened(name: str, folder, **changes):
    return open_checkpoint(tiny.write_headers(folder / "model", shortened(name) | changes))


def plan(checkpoint, name: str, **options):
    asked = {key: options.pop(key) for key in ("layout", "group_size") if key in options}
    method = "rtn" if name.startswith("int4") else None
    return make_plan(checkpoint, recipe.builtin(name, method=method, **asked), **options)


@pytest.mark.parametrize("name", ROWS)
def test_the_parameters_are_as_many_as_their_makers_say(name):
    row = ROWS[name]
    config = model_config(language(row.config), "config.json")
    made = architecture(config)
    # Layers of one kind are alike, and V3's have 46,000 tensors.
    of_kind = {config.is_moe(index): index for index in range(config.num_hidden_layers)}
    sizes = {kind: sum(spec.size for spec in made.layer(index)) for kind, index in of_kind.items()}
    main = sum(sizes[config.is_moe(index)] for index in range(config.num_hidden_layers))
    main += sum(spec.size for spec in (*made.before, *made.behind))
    for said, count in ((row.billions, main), (row.with_mtp, main + sum(spec.size for spec in made.prediction()))):
        if said is not None:
            # Some round, some cut off: the count agrees to within one of the last digit.
            assert count / 1e9 == pytest.approx(float(said), abs=10.0 ** -len(said.partition(".")[2]))


@pytest.mark.parametrize("name", ROWS)
def test_plans_for_vllm_over_its_gpus(name, tmp_path):
    checkpoint = opened(name, tmp_path)
    gpus, blocks, groups = ON_GPUS[name]
    split = {"for_targets": ["vllm"], "tp": gpus, "ep": gpus if checkpoint.config.n_routed_experts else 1}
    assert not fallen(plan(checkpoint, "fp8-channel", **split))
    made = plan(checkpoint, "fp8-block", **split)
    assert fallen(made) == blocks
    assert all(schemes(made)[role] == {"bf16"} for role in blocks)
    made = plan(checkpoint, "int4-pure", **split)
    assert {entry.spec.role: entry.scheme for entry in made.entries if entry.reason} == groups


def test_gpus_beyond_the_heads_of_keys_have_the_same_ones(tmp_path):
    # 8 heads of keys on 16 GPUs: each has one, of 128 rows; 4 would leave it half of what it has.
    checkpoint = opened("deepseek-llm-67b", tmp_path, intermediate_size=16384)
    made = plan(checkpoint, "fp8-block", for_targets=["vllm"], tp=16)
    assert not fallen(made)
    with pytest.raises(UsageError, match="--tp 12 does not divide num_attention_heads, 64"):
        plan(checkpoint, "fp8-block", for_targets=["vllm"], tp=12)
    checkpoint = opened("deepseek-llm-67b", tmp_path / "6", num_attention_heads=60, num_key_value_heads=6, head_dim=128)
    with pytest.raises(UsageError, match="--tp 4 neither divides num_key_value_heads, 6, nor is a multiple of it"):
        plan(checkpoint, "fp8-channel", for_targets=["vllm"], tp=4)


def test_dense_models_load_gptq_and_awq_everywhere(tmp_path):
    checkpoint = opened("deepseek-llm-67b", tmp_path)
    for layout in ("gptq", "awq"):
        made = plan(checkpoint, "int4-pure", layout=layout)
        assert made.targets == ("vllm", "sglang", "transformers")
        assert not fallen(made)
        assert notes(made) == []  # nothing overflows in float16
    # optimum makes every linear of a layer a GPTQ one.
    checkpoint = opened("deepseek-coder-1.3b", tmp_path / "1.3b")
    split = {"layout": "gptq", "for_targets": ["vllm", "transformers"], "tp": 8}
    with pytest.raises(InputError, match="transformers: a GPTQ artifact has no linear of a layer in BF16"):
        plan(checkpoint, "int4-pure", **split)
    assert fallen(plan(checkpoint, "int4-pure", **split | {"layout": "awq"})) == {"dense.down_proj"}


def test_int4_for_experts_alone_is_no_int4_of_a_dense_model(tmp_path):
    made = plan(opened("deepseek-llm-7b", tmp_path), "int4-mixed")
    assert made.schemes == {"fp8-channel"}
    assert warnings(made) == ["recipe int4-mixed: no weight here becomes int4-g128: take --int4=pure"]


def test_sglang_finds_no_block_scales_of_a_llama(tmp_path):
    checkpoint = opened("deepseek-llm-7b", tmp_path)
    assert plan(checkpoint, "fp8-block").targets == ("vllm", "transformers")
    assert "sglang" in plan(checkpoint, "fp8-channel").targets
    with pytest.raises(UsageError, match="no fp8-block for --target sglang: it loads no block scales of a Llama"):
        plan(checkpoint, "fp8-block", for_targets=["sglang"])


def test_experts_beside_plain_attention_are_vllms_alone_and_attention_in_one_scheme(tmp_path):
    checkpoint = opened("deepseek-moe-16b", tmp_path)
    for name in ("fp8-channel", "fp8-block", "int4-pure"):
        assert plan(checkpoint, name).targets == ("vllm",)
    for target, why in (
        ("sglang", "it computes the experts of models without latent attention from plain weights alone"),
        ("transformers", "it has no class for experts beside plain attention"),
    ):
        with pytest.raises(UsageError, match=f"--target {target}: {why}"):
            plan(checkpoint, "fp8-channel", for_targets=[target])
    # vLLM makes attention's modules without names: one scheme, whose group takes a module without one.
    with pytest.raises(InputError, match="vllm: attention is in bf16, and it has no names there to find that by"):
        plan(checkpoint, "int4-experts")
    for name, scheme in (("int4-mixed", 8), ("int4-pure", 4)):
        groups = plan(checkpoint, name).config["quantization_config"]["config_groups"].values()
        taking = [group for group in groups if any(re.match(target[3:], "") for target in group["targets"])]
        assert [group["weights"]["num_bits"] for group in taking] == [scheme]


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    return opened("DeepSeek-V3", tmp_path_factory.mktemp("v3"))


def test_a_layer_for_prediction_stays_in_bf16_and_is_named_as_each_engine_names_it(v3):
    made = plan(v3, "fp8-channel")
    mine = {entry.spec: entry.scheme for entry in made.entries if entry.spec.is_prediction}
    assert {spec.layer for spec in mine} == {2}
    assert set(mine.values()) == {"bf16", "f32"}
    assert [note for note in notes(made) if "prediction" in note] == [
        "the layer for multi-token prediction, 2, stays in BF16, 1.87 GB: a rule that names it quantizes it"
    ]
    ignored = made.config["quantization_config"]["ignore"]
    assert {
        "model.layers.2.eh_proj", "model.layers.2.self_attn.fused_qkv_a_proj", "model.layers.2.self_attn.o_proj",
        "model.layers.2.mlp.experts", "model.layers.2.mlp.shared_experts.gate_up_proj", "model.layers.2.mlp.gate",
        "model.layers.2.shared_head.head",
        # SGLang
        "model.eh_proj", "model.decoder.self_attn.fused_qkv_a_proj_with_mqa", "model.decoder.self_attn.o_proj",
        "model.decoder.mlp.experts", "model.decoder.mlp.shared_experts.gate_up_proj", "model.shared_head.head",
    } <= set(ignored)  # fmt: skip
    assert "model.layers.1.self_attn.o_proj" not in ignored
    assert not [name for name in ignored if name.endswith(("norm", "e_score_correction_bias"))]


def test_a_rule_that_names_the_layer_for_prediction_quantizes_it(v3):
    rules = (
        "[{roles: ['routed.*'], layers: '1-2', scheme: int4-g128}, {roles: ['*'], layers: '0-2', scheme: fp8-channel}]"
    )
    made = make_plan(v3, recipe.parse(f"name: mine\nrules: {rules}", "mine"), for_targets=["vllm", "sglang"])
    assert {entry.scheme for entry in made.entries if entry.spec.is_prediction and not entry.spec.keep} == {
        "int4-g128", "fp8-channel"
    }  # fmt: skip
    assert not [note for note in notes(made) if "prediction" in note]
    groups = made.config["quantization_config"]["config_groups"]
    assert groups["group_0"]["targets"][0] == r"re:model\.(layers\.\d+|decoder)\.mlp\.experts\.\d+\.gate_proj$"


def test_sglang_loads_no_layer_for_prediction_beside_awq(v3):
    made = plan(v3, "int4-pure", layout="awq")
    assert made.targets == ("vllm", "sglang")
    assert notes(made)[-1].startswith("sglang: it does not load such a layer beside AWQ")


def test_what_is_said_of_biases_is_not_said_of_llama(tmp_path):
    note = "vLLM and SGLang build DeepSeek's attention without biases and can't load this model"
    assert note in notes(plan(opened("DeepSeek-V2-Lite", tmp_path / "v2", attention_bias=True), "fp8-channel"))
    assert note not in notes(plan(opened("deepseek-llm-7b", tmp_path / "llm", attention_bias=True), "fp8-channel"))


def test_reasons_name_the_share(tmp_path):
    made = plan(opened("deepseek-llm-67b", tmp_path), "fp8-block", for_targets=["vllm"], tp=8)
    assert reasons(made, "dense.down_proj") == {"vllm: columns, 22016 / tp 8 = 2752, must be a multiple of 128"}


def test_verify_misses_no_layer_for_prediction_where_it_has_no_place(tmp_path, monkeypatch):
    folder = tiny.write_checkpoint(tmp_path / "whole", tiny.V3)
    without = tiny.random_weights(tiny.V3 | {"num_nextn_predict_layers": 0})
    lost = open_checkpoint(tiny.write_checkpoint(tmp_path / "lost", tiny.V3, without))
    with pytest.raises(InputError, match=r"is another model: model.layers.3.eh_proj.weight"):
        check_layout(lost, open_checkpoint(folder))
    monkeypatch.setattr(type(lost), "leaves_out_prediction", GgufCheckpoint.leaves_out_prediction)
    check_layout(lost, open_checkpoint(folder))
    assert bytes_compared(lost, open_checkpoint(folder)) == bytes_compared(lost, lost)
