"""What a plan warns of, and expert parallelism, its best way out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
from test_names import LITE_16B
from test_plan import V2_236B, fallen, reasons, schemes
from test_plan_int4 import ROUTED

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import UsageError
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import Plan, make_plan
from dsv2quant.report.plans import plan_text
from dsv2quant.report.warnings import warnings
from dsv2quant.storage.safetensors import parse_size

NARROW = "vllm: the experts' width, 1408 / tp 8 = 176, must be a multiple of 32"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three layers of DeepSeek-V2-Lite and of DeepSeek-V2 as headers and holes, and dsv2-mini."""
    folder = tmp_path_factory.mktemp("published")
    configs = {name: config | {"num_hidden_layers": 3} for name, config in (("lite", LITE_16B), ("v2", V2_236B))}
    folders = {name: tiny.write_headers(folder / name, config) for name, config in configs.items()}
    return {name: open_checkpoint(path) for name, path in (folders | {"mini": tiny.MINI}).items()}


def plan(checkpoint, name, **options) -> Plan:
    return make_plan(checkpoint, recipe.builtin(name), **{"for_targets": ["vllm"]} | options)


def ways(made: Plan) -> dict[str, int]:
    """{options: bytes} that the plan's one warning names."""
    [warning] = warnings(made)
    found = re.findall(r"(--[^,(]+) \(about ([0-9.]+ [kMG]B)\)", warning)
    return {words: parse_size(size) for words, size in found}


def test_a_plan_that_leaves_most_in_bf16_says_so_first_and_what_would_not(models):
    made = plan(models["lite"], "int4-mixed", tp=8)
    assert all(schemes(made)[role] == {"bf16"} for role in ROUTED)
    first = plan_text(made).splitlines()[0]
    assert re.match(
        rf"warning: \d\d% of what recipe int4-mixed quantizes stays in BF16, 1\d\.\d\d bits .*: {NARROW}\.", first
    )
    # Each way is what planning it gives, up to the headers.
    planned = {
        "--ep 8": plan(models["lite"], "int4-mixed", tp=8, ep=8),
        "--tp 4": plan(models["lite"], "int4-mixed", tp=4),
        "--fp8=channel": plan(models["lite"], "fp8-channel", tp=8),
        "--group-size channel": make_plan(
            models["lite"], recipe.builtin("int4-mixed", group_size=0), for_targets=["vllm"], tp=8
        ),
    }
    said = ways(made)
    assert said.keys() == planned.keys()
    for words, other in planned.items():
        headers = sum(len(shard.header) for shard in other.shards)
        assert said[words] == pytest.approx(other.bytes_out - headers, abs=5_000_000), words
        assert not warnings(other)


def test_block_fp8_that_leaves_most_in_bf16_names_channel_scales(models):
    made = plan(models["v2"], "fp8-block", tp=8, for_targets=["sglang"])
    assert fallen(made) == ROUTED
    assert ways(made).keys() == {"--ep 8", "--tp 4", "--fp8=channel"}
    [warning] = warnings(made)
    assert "sglang: the experts' width, 1536 / tp 8 = 192, must be a multiple of 128" in warning


def test_a_few_fallbacks_are_no_warning(models):
    assert fallen(plan(models["lite"], "fp8-block"))
    for name in ("fp8-block", "fp8-channel", "fp8-tensor", "int4-mixed", "int4-pure"):
        for checkpoint in models.values():
            assert not warnings(plan(checkpoint, name, for_targets=None))


def test_where_nothing_helps_nothing_is_promised(tmp_path):
    # 72 columns: no group, at any size, and one GPU. Channels do.
    odd = tiny.GROUPED | {"moe_intermediate_size": 72}
    checkpoint = open_checkpoint(tiny.write_headers(tmp_path / "odd", odd))
    text = "{name: own, rules: [{roles: ['routed.*'], scheme: int4-g64}]}"
    made = make_plan(checkpoint, recipe.parse(text, "own"), for_targets=["transformers"])
    assert ways(made).keys() == {"--fp8=channel"}  # a recipe of one's own has no --group-size
    rounded = make_plan(checkpoint, recipe.builtin("int4-experts", group_size=64), for_targets=["transformers"])
    assert ways(rounded).keys() == {"--group-size channel", "--fp8=channel"}


def test_convert_warns_on_stderr_and_in_json(tmp_path, cli):
    # A share of 64 columns holds one group of 64: experts stay BF16 in AWQ's layout, which has one group size.
    odd = tiny.write_checkpoint(tmp_path / "model", tiny.GROUPED | {"num_hidden_layers": 2})
    options = ("--int4=pure", "--method", "rtn", "--format", "awq", "--group-size", "64", "--target", "vllm")
    ran = cli("convert", odd, *options, "-o", tmp_path / "out")
    assert ran.code == 0
    assert re.match(r"warning: \d\d% of what recipe int4-pure quantizes stays in BF16", ran.err)
    assert "--group-size 32 (about" in ran.err
    assert cli("convert", odd, *options, "-o", tmp_path / "quiet", "-q").err == ""
    again = cli("convert", odd, *options, "-o", tmp_path / "out", "--json")
    assert json.loads(again.out)["warnings"] == [ran.err.splitlines()[0].removeprefix("warning: ")]
    shown = json.loads(cli("plan", odd, *options, "--json").out)
    assert shown["warnings"] == json.loads(again.out)["warnings"]
    assert cli("convert", odd, *options, "--dry-run").out.startswith("warning: ")


def test_experts_are_whole_under_expert_parallelism(models):
    made = plan(models["lite"], "int4-pure", tp=8, ep=8)
    assert schemes(made)["routed.down_proj"] == {"int4-g128"}
    assert not fallen(made) & ROUTED
    # All else is split over tp as ever.
    assert reasons(made, "shared.down_proj") == {"vllm: columns, 2816 / tp 8 = 352, must be a multiple of 64"}
    block = plan(models["v2"], "fp8-block", tp=8, ep=16, for_targets=["vllm", "sglang"])
    assert not fallen(block) & ROUTED
    assert block.parallel.ep == 16
    assert "for vllm, sglang at tensor-parallel size 8 and expert-parallel size 16" in plan_text(block)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {"tp": 2, "ep": 3}, "--ep 3 is no multiple of --tp 2"),
        ({}, {"tp": 4, "ep": 2}, "--ep 2 is no multiple of --tp 4"),
        ({}, {"ep": 16}, "--ep 16 does not divide 8 routed experts"),
        ({}, {"ep": 3}, "--ep 3 does not divide 8 routed experts"),
        ({"n_routed_experts": None, "n_shared_experts": None}, {"ep": 2}, "--ep 2 does not divide 0 routed experts"),
        ({"moe_intermediate_size": 49}, {"tp": 4, "ep": 4}, "--tp 4 does not divide the shared experts' width, 98"),
    ],
)
def test_expert_parallel_sizes_that_engines_refuse(config, options, message, tmp_path):
    checkpoint = open_checkpoint(tiny.write_headers(tmp_path / "x", tiny.LITE | config))
    with pytest.raises(UsageError, match=re.escape(message)):
        make_plan(checkpoint, recipe.builtin("fp8-channel"), **options)
    make_plan(checkpoint, recipe.builtin("fp8-channel"), for_targets=["transformers"], **options)


def test_vllm_gives_some_gpus_an_expert_more(models):
    assert plan(models["lite"], "fp8-channel", ep=3).parallel.ep == 3


def test_the_card_and_the_manifest_tell_the_expert_parallel_size(lite, tmp_path, cli):
    options = ("--fp8=channel", "--target", "vllm", "--tp", "2", "--ep", "4")
    assert cli("convert", lite, *options, "-o", tmp_path / "out").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "for vllm at tensor-parallel size 2 and expert-parallel size 4." in card
    assert "--target vllm --tp 2 --ep 4" in card
    manifest = json.loads((tmp_path / "out" / "dsv2quant.json").read_text())
    assert manifest["targets"] == {"consumers": ["vllm"], "tp": 2, "ep": 4}
    shown = json.loads(cli("plan", lite, *options, "--json").out)
    assert (shown["tp"], shown["ep"]) == (2, 4)
    ran = cli("plan", lite, "--gguf", "Q8_0", "--ep", "2")
    assert (ran.code, ran.out) == (2, "")
    assert "--ep does not go with --gguf" in ran.err


def test_rules_that_do_nothing_are_named(models, tmp_path, cli):
    own: Path = tmp_path / "own.yaml"
    own.write_text(
        """
name: own
rules:
  - {roles: [q_a_proj, q_b_proj], scheme: bf16}
  - {roles: [o_proj], layers: "2-3", scheme: bf16}
  - {roles: ["routed.*"], layers: "26-27", scheme: bf16}
  - {roles: ["*_proj", "routed.*", "shared.*"], scheme: fp8-channel}
  - {roles: ["kv_b*", "routed.up_proj"], scheme: fp8-tensor}
  - {roles: [lm_head, score], scheme: bf16}
"""
    )
    said = [
        "recipe own: rule 1 does nothing, because this model has no q_a_proj, q_b_proj",
        "recipe own: rule 2 names layers 3, and this model's are 0-2",
        "recipe own: rule 3 does nothing, because this model has no routed.* in layers 26-27 (its layers are 0-2)",
        "recipe own: rule 5 does nothing, because rule 4 before it decided all that it matches",
    ]
    folder = models["lite"].folder
    shown = cli("plan", folder, "--recipe", own)
    assert shown.out.splitlines()[:4] == [f"warning: {line}" for line in said]
    assert json.loads(cli("plan", folder, "--recipe", own, "--json").out)["warnings"] == said
    # What comes with the package is for the whole family.
    assert warnings(plan(models["lite"], "fp8-channel")) == []
