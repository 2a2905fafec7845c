"""Plans and configurations of GPTQ and AWQ artifacts: who loads what, in which group size, and how engines find it."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_names import LITE_16B
from test_plan import V2_236B, fallen, reasons, schemes
from test_plan_int4 import ROUTED, UNTOUCHED

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.errors import InputError, UsageError
from dsv2quant.formats.schemes import CODECS
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan
from dsv2quant.planning.rules import RAN, ROWS, evidence
from dsv2quant.report.plans import notes, plan_text

SERVE = "float16 scales: serve in BF16, DeepSeek-V2 overflows in float16"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """dsv2-mini, and three layers of DeepSeek-V2-Lite and of DeepSeek-V2 as headers and holes."""
    folder = tmp_path_factory.mktemp("published")
    configs = {name: config | {"num_hidden_layers": 3} for name, config in (("lite", LITE_16B), ("v2", V2_236B))}
    folders = {name: tiny.write_headers(folder / name, config) for name, config in configs.items()}
    return {name: open_checkpoint(path) for name, path in (folders | {"mini": tiny.MINI}).items()}


def plan(checkpoint, name="int4-pure", *, family, group_size=None, **options):
    asked = recipe.builtin(name, method="rtn", group_size=group_size, layout=family)
    return make_plan(checkpoint, asked, **options)


def custom(rules: str):
    return recipe.parse(f"name: x\nrules: [{rules}]", "x")


@pytest.mark.parametrize(("family", "loading"), [("gptq", ("vllm",)), ("awq", ("vllm", "sglang"))])
def test_without_targets_a_plan_is_for_those_that_load_the_layout(family, loading, models):
    for name in ("lite", "v2", "mini"):
        made = plan(models[name], family=family, group_size=64)
        assert made.targets == loading
        assert fallen(made) == ({"q_b_proj"} if family == "awq" and name != "lite" else set())  # SGLang's
        assert made.schemes == {f"{family}-g64"}
        assert all(schemes(made)[role] == {"bf16"} for role in UNTOUCHED)
        assert notes(made) == [SERVE]
    own = custom(f"{{roles: ['routed.*'], scheme: {family}-g64}}")
    assert make_plan(models["lite"], own).targets == loading
    # A recipe without either layout is for all, as ever.
    assert make_plan(models["lite"], recipe.builtin("int4-pure")).targets == ("vllm", "sglang", "transformers")
    assert SERVE not in notes(make_plan(models["lite"], recipe.builtin("int4-pure", method="rtn")))


@pytest.mark.parametrize(
    ("family", "target", "why"),
    [
        ("gptq", "transformers", "keeps routed experts in 3-D parameters"),
        ("awq", "transformers", "keeps routed experts in 3-D parameters"),
        ("gptq", "sglang", "computes GPTQ experts in float16, in which DeepSeek-V2 overflows"),
    ],
)
def test_a_target_that_loads_no_such_layout_is_refused(family, target, why, models):
    with pytest.raises(UsageError, match=f"no {family} for --target {target}: it {why}"):
        plan(models["lite"], family=family, for_targets=["vllm", target])


@pytest.mark.parametrize("family", ["gptq", "awq"])
def test_what_the_group_does_not_fit_stays_bf16_and_a_note_names_the_group_that_would(family, models):
    made = plan(models["lite"], family=family)
    assert fallen(made) == {"dense.down_proj"}
    assert schemes(made)["dense.down_proj"] == {"bf16"}
    assert reasons(made, "dense.down_proj") == {"10944 columns are not a multiple of 128"}
    note = f"{family} has one group size in an artifact: --group-size 64 would quantize dense.down_proj too"
    assert f"note: {note}" in plan_text(made)
    assert notes(plan(models["v2"], family=family)) == [SERVE]
    split = plan(models["lite"], family=family, group_size=64, for_targets=["vllm"], tp=2)
    assert reasons(split, "dense.down_proj") == {"vllm: columns, 10944 / tp 2 = 5472, must be a multiple of 64"}
    assert notes(split)[1].endswith("--group-size 32 would quantize dense.down_proj too")


def test_rows_must_fill_words_on_every_gpu(tmp_path):
    odd = tiny.V2 | {
        "hidden_size": 128, "moe_intermediate_size": 256, "intermediate_size": 1040, "n_shared_experts": 1,
    }  # fmt: skip
    checkpoint = open_checkpoint(tiny.write_headers(tmp_path / "odd", odd))
    for family in ("gptq", "awq"):
        made = plan(checkpoint, family=family, group_size=32, for_targets=["vllm"], tp=4)
        # 1040 / 4 = 260 = 32.5 × 8 rows, and as many columns of down_proj.
        assert reasons(made, "dense.gate_proj") == {"vllm: rows, 1040 / tp 4 = 260, must be a multiple of 8"}
        assert schemes(made)["shared.gate_proj"] == {f"{family}-g32"}
    channel = plan(checkpoint, family="gptq", group_size=0, for_targets=["vllm"], tp=4)
    assert reasons(channel, "dense.down_proj") == {"vllm: columns, 1040 / tp 4 = 260, must be a multiple of 8"}


def test_vllm_loads_no_bf16_experts_of_another_width_from_gptq(models):
    # Lite's experts are 11 × 128 wide: on two GPUs 5.5 × 128.
    with pytest.raises(
        InputError, match=r"1408 / tp 2 = 704, must be a multiple of 128, and GPTQ experts of such a width can't stay"
    ):
        plan(models["lite"], family="gptq", for_targets=["vllm"], tp=2)
    awq = plan(models["lite"], family="awq", for_targets=["vllm"], tp=2)
    assert all(schemes(awq)[role] == {"bf16"} for role in ROUTED)
    assert notes(awq)[1].startswith("awq has one group size in an artifact: --group-size 64 would quantize")
    assert not fallen(plan(models["lite"], "int4-experts", family="gptq", group_size=64, for_targets=["vllm"], tp=2))
    # Experts that would fit may be left out: `dynamic` says so.
    left = custom(
        "{roles: ['routed.*'], scheme: bf16}, {roles: [o_proj, kv_a_proj_with_mqa, q_proj], scheme: gptq-g64}"
    )
    assert make_plan(models["lite"], left).schemes == {"gptq-g64"}


def test_sglang_needs_the_latents_projections_in_awq(models):
    message = "sglang: an AWQ artifact has no q_a_proj and kv_a_proj_with_mqa in BF16 .take --int4=pure"
    with pytest.raises(InputError, match=message):
        plan(models["v2"], "int4-experts", family="awq")
    assert not fallen(plan(models["v2"], "int4-experts", family="awq", for_targets=["vllm"]))
    assert not fallen(plan(models["lite"], "int4-experts", family="awq"))  # no query latent, so nothing is fused


def test_an_artifact_has_one_quant_method_and_one_group_size(models, cli):
    fix = "take --int4=pure or --int4=experts, or --format compressed-tensors"
    with pytest.raises(InputError, match=f"int4-mixed: mixes the quant methods compressed-tensors and gptq.*{fix}"):
        plan(models["lite"], "int4-mixed", family="gptq")
    two = custom("{roles: ['routed.*'], scheme: awq-g64}, {roles: [o_proj], scheme: awq-g128}")
    with pytest.raises(InputError, match="recipe x: mixes awq-g128 and awq-g64: in these layouts an artifact has one"):
        make_plan(models["lite"], two)
    ran = cli("plan", tiny.MINI, "--int4", "--format", "awq")
    assert (ran.code, ran.out) == (3, "")
    assert fix in ran.err


def test_planned_bytes_follow_from_the_layouts(models):
    for family, group_size in [("gptq", 128), ("gptq", 0), ("awq", 64)]:
        made = plan(models["v2"], family=family, group_size=group_size)
        nbytes = sum(len(shard.header) for shard in made.shards)
        for line in made.entries:
            rows, cols = (*line.spec.shape, 1)[:2]
            groups = cols // (group_size or cols)
            quantized = (
                rows * cols // 2 + groups * rows // 2 + 2 * groups * rows + (4 * cols if family == "gptq" else 0)
            )
            nbytes += 2 * rows * cols if line.scheme == "bf16" else quantized
        assert made.bytes_out == nbytes


def test_the_format_is_an_option_of_int4(models, cli):
    for family in ("gptq", "awq"):
        said = json.loads(cli("plan", tiny.MINI, "--int4=pure", "--format", family, "--group-size", "64", "--json").out)
        assert said["quantization_config"]["quant_method"] == family
        assert SERVE in said["notes"]
    plain = json.loads(cli("plan", tiny.MINI, "--int4=pure", "--format", "compressed-tensors", "--json").out)
    assert plain["quantization_config"]["quant_method"] == "compressed-tensors"
    for words, message in [
        (("--fp8", "--format", "gptq"), "gptq and awq go with --int4"),
        (("--int4", "--format", "gguf"), "'gguf' is not one of"),
        (("--int4=pure", "--format", "awq", "--group-size", "channel"), "awq has scales per group alone"),
    ]:
        ran = cli("plan", tiny.MINI, *words)
        assert ran.code == 2
        assert message in ran.err


def test_the_model_card_says_how_to_serve(tmp_path, cli):
    ran = cli("convert", tiny.MINI, "--int4=pure", "--method", "rtn", "--format", "awq", "-o", tmp_path / "out", "-q")
    assert ran.code == 0, ran.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"\n\nF{SERVE[1:]}.\n\n" in card
    assert "dsv2quant convert dsv2-mini --int4=pure --method rtn --format awq" in card
    assert '{roles: ["*"], scheme: awq-g128, method: rtn}' in card


def engine_modules(checkpoint) -> dict[str, list[str]]:
    """Modules that vLLM and SGLang give a quantization method, by their names there → modules of the checkpoint.

    vLLM deepseek_v2.py; SGLang adds `_with_mqa` to the fused latents. Neither asks for the router.
    """
    found: dict[str, list[str]] = {}
    latent = checkpoint.config.q_lora_rank is not None
    for weight in checkpoint.weights:
        spec = weight.spec
        parent, _, leaf = spec.module.rpartition(".")
        if len(spec.shape) != 2 or spec.role in ("embed", "router", "lm_head"):
            continue
        fused = {"gate_proj": ["gate_up_proj"], "up_proj": ["gate_up_proj"]}.get(leaf, [leaf])
        if latent and leaf in ("q_a_proj", "kv_a_proj_with_mqa"):
            fused = ["fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"]
        names = [f"{parent}.{name}" for name in fused]
        for name in [f"model.layers.{spec.layer}.mlp.experts"] if spec.role.startswith("routed.") else names:
            found.setdefault(name, []).append(spec.module)
    return found


def quantized_there(name: str, config: dict) -> bool:
    """Whether the engines quantize a module: vLLM's get_dynamic_override and SGLang's match the patterns from the
    start of the name; AWQ's lists are searched for any part of it."""
    if config["quant_method"] == "awq":
        return not any(part in name for part in config["modules_to_not_convert"])
    assert all(key.startswith("-:") for key in config["dynamic"])
    return not any(re.match(key.removeprefix("-:"), name) for key in config["dynamic"])


# g128 leaves Lite's dense.down_proj in BF16, and does not fit dsv2-mini's experts.
GROUP = {"lite": 128, "v2": 128, "mini": 64}
# Leaves whole fused modules and a layer out.
MIXED = """{roles: [kv_b_proj, 'shared.gate_proj', 'shared.up_proj'], scheme: bf16},
           {roles: ['routed.*'], layers: '2', scheme: bf16}, {roles: ['dense.*', q_proj], scheme: bf16},
           {roles: ['*_proj', 'shared.*', 'routed.*'], scheme: FAMILY-g64}"""


@pytest.mark.parametrize("family", ["gptq", "awq"])
@pytest.mark.parametrize("name", ["int4-pure", "int4-experts", MIXED])
@pytest.mark.parametrize("model", ["lite", "v2", "mini"])
def test_engines_find_every_modules_scheme(family, name, model, models):
    if name == MIXED:
        made = make_plan(models[model], custom(name.replace("FAMILY", family)), for_targets=["vllm"])
    else:
        made = plan(models[model], name, family=family, group_size=GROUP[model], for_targets=["vllm"])
    config = made.config["quantization_config"]
    of = {line.spec.module: line.scheme for line in made.entries}
    modules = engine_modules(models[model])
    for there, members in modules.items():
        assert {of[module] != "bf16" for module in members} == {quantized_there(there, config)}, there
    assert {quantized_there(there, config) for there in modules} == {True, False}
    assert not quantized_there("lm_head", config)


def test_configurations_are_those_that_the_engines_parse(models):
    gptq = plan(models["mini"], family="gptq", group_size=64).config
    dynamic = gptq["quantization_config"].pop("dynamic")
    assert gptq["quantization_config"] == {
        "quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True, "lm_head": False,
        "checkpoint_format": "gptq",
    }  # fmt: skip
    assert r"-:model\.layers\.3\.self_attn\.kv_b_proj$" in dynamic
    assert set(map(json.dumps, dynamic.values())) == {"{}"}
    assert plan(models["mini"], family="gptq", group_size=0).config["quantization_config"]["group_size"] == -1
    awq = plan(models["mini"], family="awq", group_size=32).config
    names = awq["quantization_config"].pop("modules_to_not_convert")
    assert awq["quantization_config"] == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
    }  # fmt: skip
    assert set(names) == {
        "lm_head",
        *(f"model.layers.{i}.self_attn.{name}" for i in range(4) for name in ("q_b_proj", "kv_b_proj")),
        *(f"model.layers.{i}.mlp.gate" for i in range(1, 4)),
    }
    assert gptq["torch_dtype"] == awq["torch_dtype"] == "bfloat16"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts")
    for family in ("gptq", "awq"):
        convert(plan(open_checkpoint(tiny.MINI), family=family, group_size=64), folder / family, command="")
    return folder


O_PROJ = "model.layers.1.self_attn.o_proj"


def drop(suffix: str):
    return lambda config, tensors: tensors.pop(f"{O_PROJ}.{suffix}")


def declare(**changes: object):
    return lambda config, tensors: config["quantization_config"].update(changes)


def reshape(suffix: str):
    return lambda config, tensors: tensors.update({f"{O_PROJ}.{suffix}": tensors[f"{O_PROJ}.{suffix}"][:, 1:].clone()})


def widen(config: dict, tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{O_PROJ}.scales"] = tensors[f"{O_PROJ}.scales"].int()


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gptq", drop("g_idx"), "o_proj.qweight is INT4 but has no o_proj.g_idx"),
        ("gptq", drop("qzeros"), "has no o_proj.qzeros"),
        ("awq", drop("qzeros"), "has no o_proj.qzeros"),
        ("awq", drop("scales"), "has no o_proj.scales"),
        ("gptq", drop("qweight"), f"are missing: {O_PROJ}.weight"),
        ("gptq", reshape("qweight"), "qweight, I32 [32, 255], does not fit a weight of shape [256, 256]"),
        ("awq", reshape("qzeros"), "qzeros, I32 [4, 31], does not fit a weight of shape [256, 256]"),
        ("awq", widen, "scales, I32 [4, 256], does not fit"),
        ("gptq", declare(bits=8), "is GPTQ with bits 8 (only 4 or 3 or 2 is read)"),
        ("awq", declare(bits=None), "is AWQ with bits None (only 4 is read)"),
        ("gptq", declare(checkpoint_format="gptq_v2"), "GPTQ with checkpoint_format 'gptq_v2' (only 'gptq' is read)"),
        ("gptq", declare(checkpoint_format="marlin"), "GPTQ with checkpoint_format 'marlin' (only 'gptq' is read)"),
        ("awq", declare(version="gemv"), "is AWQ with version 'gemv' (only 'gemm' is read)"),
    ],
)
def test_what_is_not_such_an_artifact_is_one_line(family, change, message, artifacts, tmp_path, cli):
    folder = tmp_path / "changed"
    shutil.copytree(artifacts / family, folder)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    ran = cli("inspect", folder)
    assert (ran.code, ran.out) == (3, "")
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("error: ")


@pytest.mark.parametrize(
    ("family", "changes"),
    [("awq", {"version": "GEMM"}), ("awq", {"bits": "absent", "w_bit": 4}), ("gptq", {"checkpoint_format": "absent"})],
)
def test_others_spellings_are_read(family, changes, artifacts, tmp_path, cli):
    folder = tmp_path / "changed"
    shutil.copytree(artifacts / family, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    config["quantization_config"] = {k: v for k, v in config["quantization_config"].items() if v != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    assert cli("inspect", folder).code == 0


@pytest.mark.parametrize("bits", [3, 2])
def test_fewer_bits_in_gptqs_layout_are_read_and_taken_by_none(bits, artifacts, models, tmp_path, cli):
    folder, scheme = tmp_path / "few", f"gptq{bits}-g64"
    shutil.copytree(artifacts / "gptq", folder)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    config["quantization_config"]["bits"] = bits
    (folder / "config.json").write_text(json.dumps(config))
    plain = {weight.spec.module: weight for weight in models["mini"].weights}
    modules = [name for name, weight in plain.items() if weight.spec.expert is not None]
    for module in modules:  # the rest keeps four, as GPTQModel's `dynamic` has it
        (parts,) = CODECS[scheme].encode([models["mini"].parts(plain[module])["weight"].float().numpy()])
        tensors |= {f"{module}.{suffix}": torch.from_numpy(part) for suffix, part in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    found = open_checkpoint(folder)
    assert {weight.spec.module for weight in found.weights if weight.scheme == scheme} == {*modules}
    assert {weight.scheme for weight in found.weights} == {"bf16", "gptq-g64", scheme}
    tokens = torch.arange(2, 34).view(1, 32)
    got, want = (Model(which, LoadOptions()).forward(tokens) for which in (found, models["mini"]))
    assert 0.02 < float((got - want).norm() / want.norm()) < {3: 0.4, 2: 1.0}[bits]
    with pytest.raises(UsageError, match=f"no rule for scheme {scheme} .it is made for no consumer"):
        make_plan(models["mini"], custom(f"{{roles: ['routed.*'], scheme: {scheme}}}"))


def test_a_damaged_g_idx_is_one_line(artifacts, tmp_path, cli):
    folder = tmp_path / "changed"
    shutil.copytree(artifacts / "gptq", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{O_PROJ}.g_idx"][7] = 99
    save_file(tensors, folder / "model.safetensors")
    ran = cli("eval-ppl", folder, "--ctx", "32", "--limit", "1", "-q")
    assert ran.code == 3
    assert f"{O_PROJ}: g_idx names groups beyond its 4" in ran.err
    assert "Traceback" not in ran.err


def test_every_row_says_what_it_stands_on():
    stands = {target: {scheme: evidence(target, scheme) for scheme in rows} for target, rows in ROWS.items()}
    assert all(RAN[target].keys() <= rows.keys() for target, rows in stands.items())
    assert {scheme for scheme, on in stands["vllm"].items() if on.startswith("read")} == {
        "gptq-g32", "gptq-channel", "awq-g32", *(f"int{bits}-g{size}" for bits in (3, 2) for size in (128, 64, 32)),
    }  # fmt: skip
    assert stands["sglang"]["int4-g128"] == "run, SGLang 0.5.16 on a GPU"
    assert stands["sglang"]["awq-g64"] == "read, SGLang 0.5.23"
    assert stands["transformers"]["fp8-block"] == "run, transformers 5.23.0 on a CPU"
