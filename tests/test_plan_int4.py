"""Plans of the INT4 recipes: what stays BF16, which groups shapes and tensor-parallel shares allow, and their sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
from test_names import LITE_16B
from test_plan import V2_236B, fallen, reasons, schemes

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.errors import InputError
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan
from dsv2quant.report.plans import notes, plan_text
from dsv2quant.report.warnings import warnings

RECIPES = ("int4-mixed", "int4-pure", "int4-experts")
ROUTED = {"routed.gate_proj", "routed.up_proj", "routed.down_proj"}
SHARED = {"shared.gate_proj", "shared.up_proj", "shared.down_proj"}
DENSE = {"dense.gate_proj", "dense.up_proj", "dense.down_proj"}
UNTOUCHED = {"kv_b_proj", "router", "embed", "lm_head", "norm"}
EXPERTS = {"lite": "int4-g128", "v2": "int4-g128", "mini": "int4-g64"}  # dsv2-mini's experts are one group of 128 wide


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """dsv2-mini, and three layers of DeepSeek-V2-Lite and of DeepSeek-V2 as headers and holes: rules look at widths."""
    folder = tmp_path_factory.mktemp("published")
    configs = {name: config | {"num_hidden_layers": 3} for name, config in (("lite", LITE_16B), ("v2", V2_236B))}
    folders = {name: tiny.write_headers(folder / name, config) for name, config in configs.items()}
    return {name: open_checkpoint(path) for name, path in (folders | {"mini": tiny.MINI}).items()}


def plan(checkpoint, name="int4-mixed", *, method=None, group_size=None, **options):
    return make_plan(checkpoint, recipe.builtin(name, method=method, group_size=group_size), **options)


def custom(rules: str):
    return recipe.parse(f"name: x\nrules: [{rules}]", "x")


def methods(made) -> set[tuple[str, str]]:
    return {(line.scheme, line.method) for line in made.entries}


@pytest.mark.parametrize("model", ["lite", "v2", "mini"])
@pytest.mark.parametrize("name", RECIPES)
def test_what_every_recipe_leaves_in_bf16(model, name, models):
    made = plan(models[model], name)
    assert all(schemes(made)[role] == {"bf16"} for role in UNTOUCHED)
    assert not fallen(made) & UNTOUCHED  # as the recipe wants it, not as a fallback
    assert all(schemes(made)[role] == {EXPERTS[model]} for role in ROUTED)


@pytest.mark.parametrize("model", ["lite", "v2", "mini"])
def test_mixed_is_int4_experts_and_fp8_channel_for_the_rest(model, models):
    made = plan(models[model])
    assert fallen(made) == (ROUTED if model == "mini" else set())
    assert {role for role, found in schemes(made).items() if found == {EXPERTS[model]}} == ROUTED
    assert {role for role, found in schemes(made).items() if found == {"bf16"}} == UNTOUCHED
    assert made.schemes == {EXPERTS[model], "fp8-channel"}
    assert methods(made) == {("bf16", "rtn"), ("fp8-channel", "rtn"), (EXPERTS[model], "gptq")}


def test_experts_alone_leaves_everything_else_in_bf16(models):
    made = plan(models["v2"], "int4-experts")
    assert {role for role, found in schemes(made).items() if found != {"bf16"}} == ROUTED
    assert not fallen(made)


def test_pure_plans_fall_back_where_sglang_pads_nothing(models):
    # DeepSeek-V2's widths are all fine. Lite's first layer is 85.5 × 128 wide, dsv2-mini's 5.5 × 128.
    assert fallen(plan(models["v2"], "int4-pure", for_targets=["vllm"])) == set()
    v2 = plan(models["v2"], "int4-pure")
    assert fallen(v2) == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"}
    assert reasons(v2, "q_b_proj") == {"sglang: q_b_proj is read as a plain matrix"}
    plain = "sglang: the fused q_a_proj and kv_a_proj_with_mqa are read as a plain matrix"
    assert plain in reasons(v2, "q_a_proj") | reasons(v2, "kv_a_proj_with_mqa")
    lite = plan(models["lite"], "int4-pure")
    assert fallen(lite) == {"dense.down_proj"}
    assert reasons(lite, "dense.down_proj") == {"sglang: columns, 10944, must be a multiple of 128"}
    mini = plan(models["mini"], "int4-pure")
    assert fallen(mini) == ROUTED | {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "dense.down_proj"}
    assert reasons(mini, "kv_a_proj_with_mqa") == {"sglang: rows, 144, must be a multiple of 64"}
    assert reasons(mini, "q_a_proj") == {plain}
    assert "dense.down_proj [2048, 10944], 1 tensor in layer 0 → bf16: sglang: columns, 10944" in plan_text(lite)


@pytest.mark.parametrize(
    ("model", "roles", "by_tp"),
    # facts/formats.md, "Shape legality": the widest of 128, 64 and 32 that divides width / tp, or none.
    [
        ("v2", ROUTED, {1: "int4-g128", 2: "int4-g128", 4: "int4-g128", 8: "int4-g64"}),
        ("lite", ROUTED, {1: "int4-g128", 2: "int4-g64", 4: "int4-g32", 8: "bf16"}),
        ("lite", {"dense.down_proj"}, {1: "int4-g64", 2: "int4-g32", 4: "bf16", 8: "bf16"}),
        ("lite", {"shared.down_proj"}, {1: "int4-g128", 2: "int4-g128", 4: "int4-g64", 8: "int4-g32"}),
    ],
    ids=["v2-experts", "lite-experts", "lite-dense", "lite-shared"],
)
def test_groups_shrink_with_tensor_parallel_shares(model, roles, by_tp, models):
    for tp, scheme in by_tp.items():
        made = plan(models[model], "int4-pure", for_targets=["vllm"], tp=tp)
        assert all(schemes(made)[role] == {scheme} for role in roles), tp
        assert all((role in fallen(made)) == (scheme != "int4-g128") for role in roles), tp
        # Whole rows stay on one GPU in what is split along its rows.
        assert schemes(made)["shared.gate_proj"] == schemes(made)["dense.gate_proj"] == {"int4-g128"}


@pytest.mark.parametrize(
    ("model", "tp", "scheme", "reason"),
    [
        ("lite", 2, "int4-g64", "vllm: the experts' width, 1408 / tp 2 = 704, must be a multiple of 128"),
        ("lite", 4, "int4-g32", "vllm: the experts' width, 1408 / tp 4 = 352, must be a multiple of 64"),
        ("lite", 8, "bf16", "vllm: the experts' width, 1408 / tp 8 = 176, must be a multiple of 32"),
        ("v2", 8, "int4-g64", "vllm: the experts' width, 1536 / tp 8 = 192, must be a multiple of 128"),
    ],
)
def test_the_reason_for_smaller_groups_is_in_the_plan(model, tp, scheme, reason, models):
    made = plan(models[model], for_targets=["vllm"], tp=tp)
    assert fallen(made) == ROUTED
    for role in ROUTED:
        assert reasons(made, role) == {reason}
        assert schemes(made)[role] == {scheme}
    assert f" → {scheme}: {reason}" in plan_text(made)


def test_channels_have_no_group_to_fit(models):
    made = plan(models["lite"], "int4-pure", group_size=0, for_targets=["vllm"], tp=8)
    assert not fallen(made)
    assert made.schemes == {"int4-channel"}
    assert "vllm: vLLM 0.26 loads no experts in int4-channel; 0.32 does" in notes(made)


def test_sglangs_experts_need_64_columns_a_share_whatever_the_group(models):
    # Its marlin_moe pads nothing: 352 columns fill groups of 32, but no tile of 64.
    made = plan(models["lite"], for_targets=["sglang"], tp=4)
    assert all(schemes(made)[role] == {"bf16"} for role in ROUTED)
    assert reasons(made, "routed.up_proj") == {
        "sglang: the experts' width, 1408 / tp 4 = 352, must be a multiple of 64"
    }
    assert schemes(plan(models["lite"], for_targets=["sglang"], tp=2))["routed.up_proj"] == {"int4-g64"}
    assert schemes(plan(models["v2"], for_targets=["sglang"], tp=8))["routed.up_proj"] == {"int4-g64"}


@pytest.mark.parametrize("group_size", [128, 64, 32, 0])
def test_sglang_needs_128_columns_and_64_rows_a_share(group_size, models):
    made = plan(models["mini"], "int4-pure", group_size=group_size, for_targets=["sglang"], tp=4)
    rows_or_columns = {
        "kv_a_proj_with_mqa": "rows, 144, must be a multiple of 64",  # replicated, so not divided
        "q_b_proj": "rows, 384 / tp 4 = 96, must be a multiple of 64",
        "o_proj": "columns, 256 / tp 4 = 64, must be a multiple of 128",
        "shared.down_proj": "columns, 256 / tp 4 = 64, must be a multiple of 128",
        "dense.gate_proj": "rows, 704 / tp 4 = 176, must be a multiple of 64",
    }
    for role, rule in rows_or_columns.items():
        assert schemes(made)[role] == {"bf16"}
        assert reasons(made, role) == {f"sglang: {rule}"}
    assert schemes(made)["shared.gate_proj"] == {f"int4-g{group_size}" if group_size else "int4-channel"}
    # vLLM pads ragged tiles, and needs whole groups alone; experts, whose share is 32 wide, more than one.
    vllm = plan(models["mini"], "int4-pure", group_size=32, for_targets=["vllm"], tp=4)
    assert {role for role, found in schemes(vllm).items() if found == {"bf16"}} == UNTOUCHED | ROUTED | {
        "dense.down_proj"
    }


@pytest.mark.parametrize("target", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("width", "hidden", "group_size", "scheme", "rule"),
    # The engines take experts of one group to have a scale per row, and misread it.
    [
        (128, 256, 128, "int4-g64", "the experts' width, 128, must exceed the group of 128"),
        (64, 256, 64, "int4-g32", "the experts' width, 64, must exceed the group of 64"),
        (64, 256, 128, "int4-g32", "the experts' width, 64, must exceed the group of 64"),
        (256, 128, 128, "int4-g64", "the hidden size, 128, must exceed the group of 128"),
        (256, 256, 128, "int4-g128", None),
        (128, 256, 0, "int4-channel", None),
    ],
)
def test_experts_must_be_wider_than_a_group(width, hidden, group_size, scheme, rule, target, tmp_path):
    config = tiny.LITE | {"hidden_size": hidden, "moe_intermediate_size": width, "n_shared_experts": 4}
    checkpoint = open_checkpoint(tiny.write_headers(tmp_path / "x", config))
    made = plan(checkpoint, "int4-experts", group_size=group_size, for_targets=[target])
    assert all(schemes(made)[role] == {scheme} for role in ROUTED)  # gate, up and down together
    assert {reasons(made, role).pop() for role in ROUTED} == ({f"{target}: {rule}"} if rule else {""})
    free = plan(checkpoint, "int4-experts", group_size=group_size, for_targets=["transformers"])
    assert reasons(free, "routed.up_proj") in (
        {""},
        {"fused with routed.down_proj, which falls back: 64 columns are not a multiple of 128"},
    )
    if width == 256:
        halved = plan(checkpoint, "int4-experts", group_size=group_size, for_targets=[target], tp=2)
        assert schemes(halved)["routed.down_proj"] == {"int4-g64"}  # 128 columns a share


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_other_layouts_have_the_same_rule_and_no_finer_group(layout, models):
    made = make_plan(models["mini"], recipe.builtin("int4-pure", layout=layout), for_targets=["vllm"])
    reason = "vllm: the experts' width, 128, must exceed the group of 128"
    assert all(schemes(made)[role] == {"bf16"} for role in ROUTED)
    assert reasons(made, "routed.up_proj") == {reason}
    assert schemes(made)["o_proj"] == {f"{layout}-g128"}
    [warning] = warnings(made)
    assert warning.startswith("74% of what recipe int4-pure quantizes stays in BF16, 13.8")
    assert f" bits per weight in all: {reason}. What quantizes most of it: --group-size 64 (about 8." in warning
    finer = make_plan(models["mini"], recipe.builtin("int4-pure", layout=layout, group_size=64), for_targets=["vllm"])
    assert not fallen(finer)
    assert not warnings(finer)


def test_engines_need_a_hidden_size_of_whole_tiles_for_experts(tmp_path):
    odd = tiny.LITE | {"hidden_size": 192, "moe_intermediate_size": 128}
    checkpoint = open_checkpoint(tiny.write_headers(tmp_path / "odd", odd))
    made = plan(checkpoint, "int4-experts", group_size=64)
    assert reasons(made, "routed.down_proj") == {"vllm: the hidden size, 192, must be a multiple of 128 for experts"}
    assert schemes(made)["routed.down_proj"] == {"bf16"}
    alone = plan(checkpoint, "int4-experts", group_size=64, for_targets=["transformers"])
    assert schemes(alone)["routed.down_proj"] == {"int4-g64"}


def test_columns_that_no_group_divides_fall_back_for_every_consumer(tmp_path):
    odd = tiny.LITE | {"moe_intermediate_size": 72}  # 9 × 8: whole words, but no group
    checkpoint = open_checkpoint(tiny.write_headers(tmp_path / "odd", odd))
    made = plan(checkpoint, "int4-experts", for_targets=["transformers"])
    assert all(schemes(made)[role] == {"bf16"} for role in ROUTED)
    assert reasons(made, "routed.down_proj") == {"72 columns are not a multiple of 32"}
    assert reasons(made, "routed.gate_proj") == {
        "fused with routed.down_proj, which falls back: 72 columns are not a multiple of 32"
    }
    channel = plan(checkpoint, "int4-experts", group_size=0, for_targets=["transformers"])
    assert not fallen(channel)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("model", "tp"), [("lite", 1), ("lite", 2), ("lite", 4), ("lite", 8), ("mini", 2)])
def test_all_projections_of_a_layers_experts_share_a_scheme(name, model, tp, models):
    made = plan(models[model], name, tp=tp)
    by_layer: dict[int, set[str]] = {}
    for line in made.entries:
        if line.spec.role in ROUTED:
            by_layer.setdefault(line.spec.layer, set()).add(line.scheme)
    assert len(by_layer) == models[model].config.num_hidden_layers - 1
    assert all(len(found) == 1 for found in by_layer.values())


def test_a_recipe_that_splits_a_layers_experts_quantizes_none(models):
    split = custom(
        "{roles: [routed.down_proj], scheme: int4-g64, method: gptq}, {roles: ['routed.*'], scheme: int4-g128}"
    )
    made = make_plan(models["mini"], split)
    assert fallen(made) == ROUTED
    assert "different schemes" in reasons(made, "routed.down_proj").pop()
    assert methods(made) == {("bf16", "rtn")}
    by_layer = custom("{roles: ['routed.*'], layers: '2', scheme: int4-g32}, {roles: ['routed.*'], scheme: int4-g64}")
    assert not fallen(make_plan(models["mini"], by_layer))


def test_kv_b_proj_in_int4_is_for_transformers_alone(models):
    everything = custom("{roles: ['*'], scheme: int4-g128, method: gptq}")
    for target in ("vllm", "sglang"):
        made = make_plan(models["v2"], everything, for_targets=[target])
        assert schemes(made)["kv_b_proj"] == {"bf16"}
        assert reasons(made, "kv_b_proj") == {f"{target}: attention reads kv_b_proj as a plain matrix"}
    assert "attention reads kv_b_proj" in reasons(make_plan(models["v2"], everything), "kv_b_proj").pop()
    alone = make_plan(models["v2"], everything, for_targets=["transformers"])
    assert schemes(alone)["kv_b_proj"] == {"int4-g128"}
    assert fallen(alone) == {"router", "embed", "lm_head", "norm"}  # no consumer loads these quantized
    # FP8 is another matter: engines dequantize it when they load it.
    fp8 = custom("{roles: [kv_b_proj], scheme: fp8-channel}")
    assert not fallen(make_plan(models["v2"], fp8))


def test_smaller_groups_keep_the_method_and_bf16_has_none(models):
    for method in ("gptq", "mse", "rtn"):
        groups = plan(models["lite"], "int4-pure", method=method, for_targets=["vllm"], tp=2)
        assert groups.schemes == {"int4-g128", "int4-g64", "int4-g32"}
        assert {m for scheme, m in methods(groups) if scheme != "bf16"} == {method}
        fallback = plan(models["lite"], method=method, for_targets=["vllm"], tp=8)
        assert {line.method for line in fallback.entries if line.spec.role in ROUTED} == {"rtn"}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("group_size", [128, 32, 0])
def test_planned_bytes_follow_from_the_format(name, group_size, models):
    for model in ("lite", "v2"):
        made = plan(models[model], name, group_size=group_size)
        nbytes = sum(len(shard.header) for shard in made.shards)
        for line in made.entries:
            rows, cols = (*line.spec.shape, 1)[:2]
            nbytes += {
                "bf16": 2 * rows * cols,
                "fp8-channel": rows * cols + 4 * rows,
                # Codes, BF16 scales, and two int64 of shape.
                "int4-g128": rows * cols // 2 + 2 * rows * (cols // 128) + 16,
                "int4-g32": rows * cols // 2 + 2 * rows * (cols // 32) + 16,
                "int4-channel": rows * cols // 2 + 2 * rows + 16,
            }[line.scheme]
        assert made.bytes_out == nbytes


@pytest.mark.parametrize("name", RECIPES)
def test_planned_sizes_are_the_files_sizes(name, models, tmp_path):
    made = plan(models["mini"], name, method="rtn", max_shard_size=4_000_000)
    result = convert(made, tmp_path / "out", command="")
    assert len(made.shards) > 2
    for shard in made.shards:
        assert (tmp_path / "out" / shard.file).stat().st_size == shard.nbytes == result.files[shard.file]["size"]
    assert {w.spec.name: w.scheme for w in open_checkpoint(tmp_path / "out").weights} == {
        line.spec.name: line.scheme for line in made.entries
    }


def test_the_digest_covers_method_and_group_size(models):
    def digest(name: str, text: str = "", **choices: object) -> str:
        return make_plan(models["lite"], replace(recipe.builtin(name, **choices), text=text)).digest

    kinds = [{"method": m, "group_size": g} for m in ("gptq", "mse", "rtn") for g in (128, 64, 32, 0)]
    digests = {digest("int4-mixed", **choices) for choices in kinds} | {digest(name) for name in RECIPES[1:]}
    assert len(digests) == len(kinds) + 2 == 14
    assert digest("int4-mixed", **kinds[0]) == digest("int4-mixed")
    assert digest("int4-mixed", text="# as the model card shows it") not in digests


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{roles: [o_proj], scheme: fp8-channel, method: gptq}", r"rule 1: fp8-channel has no method 'gptq'.*rtn"),
        ("{roles: [o_proj], scheme: fp8-block, method: mse}", "fp8-block has no method 'mse'"),
        ("{roles: [o_proj], scheme: bf16, method: gptq}", r"bf16 has no method 'gptq' \(methods: rtn, fit\)"),
        ("{roles: [o_proj], scheme: int4-g128, method: fit}", r"no method 'fit' \(methods: rtn, mse, awq, gptq\)"),
        ("{roles: [o_proj], scheme: int4-g128, method: hqq}", "unknown method 'hqq'.*rtn, mse, awq, gptq, fit"),
        ("{roles: [o_proj], scheme: int4-g256}", "unknown scheme 'int4-g256'.*int4-g128, int4-g64, int4-g32"),
    ],
)
def test_a_method_that_a_scheme_lacks_is_named(rule, message):
    with pytest.raises(InputError, match=message):
        custom(rule)


def test_int4_does_not_mix_with_block_fp8(models):
    mixed = custom("{roles: ['routed.*'], scheme: int4-g128}, {roles: [o_proj], scheme: fp8-block}")
    with pytest.raises(InputError, match="mixes the quant methods compressed-tensors and fp8"):
        make_plan(models["mini"], mixed)
