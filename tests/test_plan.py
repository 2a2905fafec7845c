"""Plans: fallbacks with their rules, sizes, shards, and the digest."""

from __future__ import annotations

import json

import pytest
import tiny
from test_names import LITE_16B

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import InputError, UsageError
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan
from dsv2quant.report.plans import notes
from dsv2quant.storage.safetensors import parse_size

V2_236B = LITE_16B | {
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60,
    "num_attention_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 160, "n_group": 8, "topk_group": 3,
    "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """DeepSeek-V2-Lite and DeepSeek-V2 as headers and holes."""
    folder = tmp_path_factory.mktemp("published")
    return {
        name: open_checkpoint(tiny.write_headers(folder / name, config))
        for name, config in (("lite", LITE_16B), ("v2", V2_236B))
    }


def plan(checkpoint, name="fp8-block", **options):
    return make_plan(checkpoint, recipe.builtin(name), **options)


def schemes(made) -> dict[str, set[str]]:
    """{role: schemes}."""
    found: dict[str, set[str]] = {}
    for line in made.entries:
        found.setdefault(line.spec.role, set()).add(line.scheme)
    return found


def reasons(made, role: str) -> set[str]:
    return {line.reason or "" for line in made.entries if line.spec.role == role}


def fallen(made) -> set[str]:
    return {line.spec.role for line in made.entries if line.reason}


def test_totals_of_the_published_models(published):
    lite, v2 = plan(published["lite"]), plan(published["v2"])
    assert lite.parameters == 15_706_484_224
    assert v2.parameters == 235_741_434_880
    assert lite.bytes_in == 2 * lite.parameters
    assert v2.bytes_in == 2 * v2.parameters
    for made, bits in ((lite, 8.268), (v2, 8.061)):
        unquantized = sum(line.spec.size for line in made.entries if line.scheme == "bf16")
        blocks = sum(-(-r // 128) * -(-c // 128) for r, c in (x.spec.shape for x in made.entries if x.scheme != "bf16"))
        headers = sum(len(shard.header) for shard in made.shards)
        assert made.bytes_out == made.parameters + unquantized + 4 * blocks + headers
        assert 8 * made.bytes_out / made.parameters == pytest.approx(bits, abs=0.001)


def test_default_block_plan_of_v2_lite(published):
    made = plan(published["lite"])
    assert schemes(made)["q_proj"] == schemes(made)["o_proj"] == schemes(made)["routed.down_proj"] == {"fp8-block"}
    # 576 rows and the 10944-wide first layer are ragged; nothing is fused with kv_a where queries are direct.
    assert fallen(made) == {"kv_a_proj_with_mqa", "dense.gate_proj", "dense.up_proj", "dense.down_proj"}
    assert "576 is not a multiple of 128" in reasons(made, "kv_a_proj_with_mqa").pop()
    assert "10944" in reasons(made, "dense.down_proj").pop()


def test_default_block_plan_of_v2_takes_q_a_along_with_kv_a(published):
    made = plan(published["v2"])
    assert fallen(made) == {"q_a_proj", "kv_a_proj_with_mqa"}
    assert "576" in reasons(made, "kv_a_proj_with_mqa").pop()
    assert reasons(made, "q_a_proj").pop().startswith("fused with kv_a_proj_with_mqa")
    assert schemes(made)["dense.down_proj"] == schemes(made)["kv_b_proj"] == {"fp8-block"}


def test_dsv2_mini_falls_back_on_144_rows_and_704_columns():
    made = plan(open_checkpoint(tiny.MINI))
    assert fallen(made) == {"q_a_proj", "kv_a_proj_with_mqa", "dense.gate_proj", "dense.up_proj", "dense.down_proj"}
    assert "144" in reasons(made, "kv_a_proj_with_mqa").pop()


def test_vllm_alone_takes_a_ragged_last_member(published):
    assert not fallen(plan(published["v2"], for_targets=["vllm"]))
    # In Lite's 10944-wide FFN, gate comes first in the fused matrix and up would start inside a block; what comes into
    # down is quantized in whole groups of 128.
    lite = plan(published["lite"], for_targets=["vllm"])
    assert fallen(lite) == {"dense.gate_proj", "dense.up_proj", "dense.down_proj"}
    assert reasons(lite, "dense.down_proj") == {"vllm: columns, 10944, must be a multiple of 128"}


def test_transformers_alone_fuses_nothing_but_experts(published):
    assert fallen(plan(published["v2"], for_targets=["transformers"])) == {"kv_a_proj_with_mqa"}


def test_tensor_parallel_shares_must_hold_whole_blocks(published):
    at = {tp: plan(published["v2"], for_targets=["vllm"], tp=tp) for tp in (2, 4, 8)}
    assert not fallen(at[2])
    assert not fallen(at[4])
    assert not fallen(at[8])  # 1536 / 8 = 192: vLLM refines the experts' blocks to 64
    assert notes(at[8]) == ["vllm: FP8 blocks of experts' shares of 192 need vLLM 0.30 or newer"]
    assert not notes(at[4])
    routed = {"routed.gate_proj", "routed.up_proj", "routed.down_proj"}
    lite = plan(published["lite"], for_targets=["sglang"], tp=2)
    assert fallen(lite) == routed | {"dense.gate_proj", "dense.up_proj", "dense.down_proj"}  # 1408 / 2 = 704
    assert not fallen(plan(published["lite"], "fp8-channel", for_targets=["sglang"], tp=2))


@pytest.mark.parametrize(
    ("width", "hidden", "tp", "unit"),
    [
        (1408, 256, 2, None),  # 704 = 11 × 64
        (1408, 256, 4, None),  # 352 = 11 × 32
        (1408, 256, 8, 32),  # 176
        (192, 256, 2, 128),  # 96 = 3 × 32, but the scales of 192 rows count whole blocks
        (256, 192, 4, 128),  # likewise along the other side
        (256, 192, 2, None),  # whole blocks need no refining
    ],
)
def test_vllm_refines_blocks_of_experts_down_to_32(width, hidden, tp, unit, tmp_path):
    config = tiny.LITE | {
        "hidden_size": hidden, "moe_intermediate_size": width, "num_attention_heads": 8, "num_hidden_layers": 2,
    }  # fmt: skip
    made = plan(open_checkpoint(tiny.write_headers(tmp_path / "x", config)), for_targets=["vllm"], tp=tp)
    reason = f"vllm: the experts' width, {width} / tp {tp} = {width // tp}, must be a multiple of {unit}"
    assert reasons(made, "routed.up_proj") == reasons(made, "routed.down_proj") == {reason if unit else ""}


def test_a_size_that_does_not_divide_the_model_is_a_usage_error(published):
    with pytest.raises(UsageError, match="--tp 3 does not divide num_attention_heads, 16"):
        plan(published["lite"], tp=3)
    plan(published["lite"], tp=3, for_targets=["transformers"])


def test_channel_scales_fit_every_shape(published):
    for checkpoint in published.values():
        made = plan(checkpoint, "fp8-channel")
        assert not fallen(made)
        assert made.schemes == {"fp8-channel"}


def test_tensor_scales_give_way_where_engines_refuse_them(published):
    lite, v2 = plan(published["lite"], "fp8-tensor"), plan(published["v2"], "fp8-tensor")
    routed = {"routed.gate_proj", "routed.up_proj", "routed.down_proj"}
    assert fallen(lite) == routed
    assert fallen(v2) == routed | {"q_a_proj", "kv_a_proj_with_mqa"}
    assert schemes(v2)["routed.up_proj"] == schemes(v2)["q_a_proj"] == {"fp8-channel"}
    assert schemes(v2)["q_b_proj"] == schemes(v2)["shared.up_proj"] == {"fp8-tensor"}
    assert "per-channel" in reasons(v2, "routed.up_proj").pop()
    only = plan(published["v2"], "fp8-tensor", for_targets=["transformers"])
    assert not fallen(only)
    assert only.schemes == {"fp8-tensor"}


def test_fused_modules_share_a_step_where_a_scale_is_shared(published):
    made = plan(published["v2"], "fp8-tensor", for_targets=["vllm"])
    together = {tuple(line.spec.role for line in step.entries) for step in made.steps if len(step.entries) > 1}
    assert together == {
        ("q_a_proj", "kv_a_proj_with_mqa"),
        ("dense.gate_proj", "dense.up_proj"),
        ("shared.gate_proj", "shared.up_proj"),
    }
    alone = plan(published["v2"], "fp8-tensor", for_targets=["transformers"])
    assert all(len(step.entries) == 1 for step in alone.steps)


def test_recipes_cannot_quantize_what_no_consumer_loads_or_split_what_is_fused():
    checkpoint = open_checkpoint(tiny.MINI)
    text = "name: x\nrules:\n  - {roles: [up_proj_missing], scheme: bf16}"
    with pytest.raises(InputError):
        recipe.parse(text, "x")
    everything = recipe.parse("name: x\nrules:\n  - {roles: ['*'], scheme: fp8-channel}", "x")
    made = make_plan(checkpoint, everything)
    assert fallen(made) == {"embed", "lm_head", "router", "norm"}
    split = recipe.parse(
        "name: x\nrules:\n  - {roles: [kv_a_proj_with_mqa, '*.up_proj'], scheme: bf16}\n"
        "  - {roles: ['*_proj', '*.gate_proj', '*.down_proj'], scheme: fp8-channel}",
        "x",
    )
    made = make_plan(checkpoint, split)
    assert {"q_a_proj", "dense.gate_proj", "shared.gate_proj", "routed.gate_proj", "routed.down_proj"} <= fallen(made)
    assert "different schemes" in reasons(made, "q_a_proj").pop()
    assert schemes(made)["dense.down_proj"] == {"fp8-channel"}


def test_one_artifact_has_one_quant_method():
    text = "name: x\nrules:\n  - {roles: ['routed.*'], scheme: fp8-block}\n  - {roles: [o_proj], scheme: fp8-channel}"
    with pytest.raises(InputError, match="mixes the quant methods compressed-tensors and fp8"):
        make_plan(open_checkpoint(tiny.MINI), recipe.parse(text, "x"))


def test_shards_hold_every_output_once_and_keep_to_their_size():
    made = plan(open_checkpoint(tiny.MINI), max_shard_size=2_500_000)
    assert [s.file for s in made.shards] == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    names = [o.name for s in made.shards for o in s.outputs]
    assert sorted(names) == sorted(o.name for line in made.entries for o in line.outputs)
    assert len(set(names)) == len(names)
    assert all(sum(o.nbytes for o in s.outputs) <= 2_500_000 for s in made.shards)
    index = made.index()
    assert index is not None
    assert index["weight_map"] == {o.name: s.file for s in made.shards for o in s.outputs}


def test_tensors_start_at_multiples_of_their_element_size(tmp_path):
    odd = tiny.LITE | {"hidden_size": 65, "vocab_size": 7, "moe_intermediate_size": 49, "n_shared_experts": 1}
    made = plan(open_checkpoint(tiny.write_checkpoint(tmp_path / "odd", odd)), "fp8-channel")
    for shard in made.shards:
        position = 0
        for output in shard.outputs:
            assert position % {"F32": 4, "BF16": 2, "F8_E4M3": 1}[output.dtype] == 0
            position += output.nbytes


def test_the_digest_covers_what_determines_the_bytes(tmp_path):
    base = plan(open_checkpoint(tiny.MINI))
    assert plan(open_checkpoint(tiny.MINI)).digest == base.digest
    others = [
        plan(open_checkpoint(tiny.MINI), "fp8-channel"),
        plan(open_checkpoint(tiny.MINI), for_targets=["vllm"]),
        plan(open_checkpoint(tiny.MINI), ep=2),
        plan(open_checkpoint(tiny.MINI), max_shard_size=3_000_000),
        plan(open_checkpoint(tiny.write_checkpoint(tmp_path / "lite", tiny.LITE))),
    ]
    assert len({made.digest for made in [base, *others]}) == 6


def test_config_declares_the_schemes_and_drops_remote_code(tmp_path):
    raw = tiny.LITE | {"auto_map": {"AutoModel": "modeling_deepseek.DeepseekV2Model"}, "torch_dtype": "float32"}
    made = plan(open_checkpoint(tiny.write_checkpoint(tmp_path / "lite", raw)), "fp8-channel")
    assert "auto_map" not in made.config
    assert made.config["torch_dtype"] == "bfloat16"
    quantization = made.config["quantization_config"]
    assert quantization["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert quantization["ignore"] == ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate", "lm_head"]


def test_block_config_lists_fused_aliases_under_both_keys():
    quantization = plan(open_checkpoint(tiny.MINI)).config["quantization_config"]
    ignored = quantization["ignored_layers"]
    assert ignored == quantization["modules_to_not_convert"]
    for name in (
        "lm_head",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.gate",
        "model.layers.3.self_attn.fused_qkv_a_proj",
        "model.layers.3.self_attn.fused_qkv_a_proj_with_mqa",
        "model.layers.3.self_attn.q_a_proj",
    ):
        assert name in ignored
    assert not any("experts" in name or "q_b_proj" in name for name in ignored)


def test_mixed_schemes_name_their_modules_without_class_names(published):
    import re

    made = plan(published["v2"], "fp8-tensor")
    groups = made.config["quantization_config"]["config_groups"]
    first, second = groups["group_0"], groups["group_1"]
    assert (first["weights"]["strategy"], second["weights"]["strategy"]) == ("channel", "tensor")
    assert not any("experts" in target for target in second["targets"])

    def matches(group, name):
        return any(re.match(target.removeprefix("re:"), name) for target in group["targets"])

    for line in made.entries:
        if line.scheme != "bf16":
            name = line.spec.module
            assert matches(first, name) == (line.scheme == "fp8-channel"), name
            assert matches(second, name) == (line.scheme == "fp8-tensor"), name
    assert matches(first, "model.layers.5.self_attn.fused_qkv_a_proj_with_mqa")
    assert matches(second, "model.layers.5.mlp.shared_experts.gate_up_proj")
    assert matches(second, "model.layers.0.mlp.gate_up_proj")
    assert not matches(second, "model.layers.5.mlp.gate")


def test_plan_command_prints_totals_schemes_and_fallbacks(published, cli):
    folder = published["v2"].folder
    ran = cli("plan", folder, "--fp8")
    assert ran.code == 0
    assert "235.74 B parameters" in ran.out
    assert "kv_a_proj_with_mqa [576, 5120], 60 tensors in layers 0-59 → bf16: transformers: 576" in ran.out
    result = json.loads(cli("plan", folder, "--fp8=channel", "--json").out)
    assert result["parameters"] == 235_741_434_880
    assert result["fallbacks"] == []
    assert {r["role"]: r["scheme"] for r in result["roles"]}["routed.down_proj"] == "fp8-channel"
    listed = cli("plan", published["lite"].folder, "-v").out
    assert "model.layers.26.self_attn.kv_a_proj_with_mqa.weight [576, 2048]" in listed


def test_plan_command_accepts_fp8_before_the_model(cli):
    assert "recipe fp8-block" in cli("plan", "--fp8", tiny.MINI).out
    assert "recipe fp8-tensor" in cli("plan", "--fp8", "tensor", tiny.MINI).out


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5MB", 1_500_000), ("2GiB", 2**31), ("4096", 4096), ("3 kb", 3000)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 potatoes", "0", "1e9", "9" * 400, "0." + "9" * 400])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)
