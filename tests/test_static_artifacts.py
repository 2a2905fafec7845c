"""Artifacts with static input scales, and with KV-cache scales: plans, what is written, and reading it back."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import static
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_names import LITE_16B
from test_plan import V2_236B, plan, reasons, schemes

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import InputError, UsageError
from dsv2quant.formats.quant_config import quantization_config
from dsv2quant.kernels.reference import dequantize_activation, quantize_activation
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.consumers import input_group
from dsv2quant.planning.plan import make_plan

both = pytest.mark.parametrize("scheme", static.RECIPES)
O_PROJ = "model.layers.1.self_attn.o_proj"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """DeepSeek-V2-Lite and DeepSeek-V2 as headers and holes."""
    folder = tmp_path_factory.mktemp("published")
    return {
        name: open_checkpoint(tiny.write_headers(folder / name, config))
        for name, config in (("lite", LITE_16B), ("v2", V2_236B))
    }


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """{scheme: (folder, plan)} of a tiny V2, in several shards, with KV-cache scales."""
    folder = tmp_path_factory.mktemp("static")
    source = tiny.write_checkpoint(folder / "source", tiny.V2)
    return {
        scheme: (folder / scheme, static.write(source, folder / scheme, scheme, kv=4.5, max_shard_size=10**5))
        for scheme in static.RECIPES
    }


# --- plans ---


def test_engines_take_static_scales_everywhere_but_where_attention_unpacks_kv_b(published):
    static_roles = {"q_proj", "o_proj", "routed.down_proj", "routed.gate_proj", "shared.up_proj", "dense.down_proj"}
    made = plan(published["lite"], "fp8-static")
    assert made.targets == ("vllm", "sglang", "transformers")
    assert {role for role in static_roles if schemes(made)[role] == {"fp8-static"}} == static_roles
    assert schemes(made)["kv_b_proj"] == schemes(made)["router"] == schemes(made)["lm_head"] == {"bf16"}
    assert not any(line.reason for line in made.entries)

    everywhere = recipe.parse("name: all\nrules: [{roles: [kv_b_proj], scheme: fp8-static}]", "all")
    refused = make_plan(published["lite"], everywhere, for_targets=["vllm"])
    assert "through an identity matrix" in reasons(refused, "kv_b_proj").pop()
    assert schemes(make_plan(published["lite"], everywhere, for_targets=["sglang"]))["kv_b_proj"] == {"fp8-static"}


def test_sglang_cannot_merge_the_latents_scales(published):
    made = plan(published["v2"], "fp8-static")
    assert schemes(made)["q_a_proj"] == schemes(made)["kv_a_proj_with_mqa"] == {"fp8-channel"}
    assert "without merging scales" in reasons(made, "q_a_proj").pop()
    for target in ("vllm", "transformers"):
        assert schemes(plan(published["v2"], "fp8-static", for_targets=[target]))["q_a_proj"] == {"fp8-static"}
    # Scalar scales it does take: the first of the two, which are equal.
    assert schemes(make_plan(published["v2"], static.AUTOFP8))["q_a_proj"] == {"fp8-autofp8"}


def test_autofp8_is_planned_for_the_engines_and_refused_for_transformers(published, cli):
    made = make_plan(published["lite"], static.AUTOFP8)
    assert made.targets == ("vllm", "sglang")
    assert not any(line.reason for line in made.entries)
    with pytest.raises(UsageError, match="no fp8-autofp8 for --target transformers: it knows `weight_scale_inv` alone"):
        make_plan(published["lite"], static.AUTOFP8, for_targets=["vllm", "transformers"])


def test_the_command_line_knows_static(cli):
    ran = cli("plan", tiny.MINI, "--fp8=static", "--json")
    found = json.loads(ran.out)
    assert found["recipe"] == "fp8-static"
    assert found["targets"] == ["vllm", "sglang", "transformers"]
    assert {r["scheme"] for r in found["roles"] if r["role"].startswith("routed")} == {"fp8-static"}


def test_fused_modules_and_a_layers_experts_share_an_input_scale(published):
    checkpoint = published["v2"]
    for targets, fused in ((("vllm", "sglang"), True), (("transformers",), False)):
        members: dict[str, set[str]] = {}
        for weight in checkpoint.weights:
            spec = weight.spec
            if spec.layer in (0, 7):
                members.setdefault(input_group(spec, targets), set()).add(spec.name)

        def together(first: str, second: str, members=members) -> bool:
            names = [f"model.layers.{name}.weight" for name in (first, second)]
            return any(set(names) <= group for group in members.values())

        assert together("7.mlp.experts.0.gate_proj", "7.mlp.experts.159.up_proj")
        assert together("7.mlp.experts.3.down_proj", "7.mlp.experts.4.down_proj")
        assert not together("7.mlp.experts.3.down_proj", "7.mlp.experts.3.up_proj")
        assert not together("7.self_attn.o_proj", "7.self_attn.q_b_proj")
        assert together("7.self_attn.q_a_proj", "7.self_attn.kv_a_proj_with_mqa") is fused
        assert together("0.mlp.gate_proj", "0.mlp.up_proj") is fused
        assert together("7.mlp.shared_experts.gate_proj", "7.mlp.shared_experts.up_proj") is fused


def test_declared_configurations():
    specs = [w.spec for w in open_checkpoint(tiny.MINI).weights]
    given = {scheme: {spec: rules.assign(spec)[0] for spec in specs} for scheme, rules in static.RECIPES.items()}
    tensor = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    made = quantization_config(given["fp8-static"], kv_scales=True)
    (group,) = made["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"] == group["input_activations"] == made["kv_cache_scheme"] == tensor
    assert group["format"] == made["format"] == "float-quantized"
    assert "model.layers.0.self_attn.kv_b_proj" in made["ignore"]
    assert "kv_cache_scheme" not in quantization_config(given["fp8-static"])

    made = quantization_config(given["fp8-autofp8"], kv_scales=True)
    ignored = made.pop("ignored_layers")
    assert made == {"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"}
    assert {"lm_head", "model.layers.1.mlp.gate", "model.layers.1.self_attn.kv_b_proj"} < set(ignored)
    assert not any(re.search("o_proj|experts", name) for name in ignored)
    with pytest.raises(ValueError, match="mixes the quant methods fp8-autofp8 and fp8-block: an artifact has one"):
        quantization_config(given["fp8-autofp8"] | {specs[-1]: "fp8-block"})


@both
def test_kv_scales_belong_to_kv_a_and_count_in_sizes_shards_and_digest(scheme, published):
    without, made = (
        make_plan(published["lite"], static.RECIPES[scheme], kv_scales=kv, max_shard_size=10**9) for kv in (False, True)
    )
    names = {o.name: o for line in made.entries for o in line.outputs}
    added = names.keys() - {o.name for line in without.entries for o in line.outputs}
    assert added == {f"model.layers.{i}.self_attn.{x}_scale" for i in range(27) for x in "kv"}
    shape = {"fp8-static": (1,), "fp8-autofp8": ()}[scheme]
    assert {(names[name].dtype, names[name].shape) for name in added} == {("F32", shape)}
    lines = [line for line in made.entries if line.spec.role == "kv_a_proj_with_mqa"]
    assert all([o.name.rpartition(".")[2] for o in line.outputs[-2:]] == ["k_scale", "v_scale"] for line in lines)
    assert {o.name for shard in made.shards for o in shard.outputs} == set(names)
    payload = [sum(o.nbytes for s in p.shards for o in s.outputs) for p in (without, made)]
    assert payload[1] - payload[0] == 27 * 2 * 4
    assert sum(step.bytes_out for step in made.steps) == payload[1]
    assert made.digest != without.digest
    assert made.index()["metadata"]["total_size"] == payload[1]


def test_kv_scales_keep_an_unquantized_kv_a_from_being_copied(published):
    rules = recipe.parse("name: o\nrules: [{roles: [o_proj], scheme: fp8-channel}]", "o")
    line = next(x for x in make_plan(published["lite"], rules).entries if x.spec.role == "kv_a_proj_with_mqa")
    assert line.is_copy
    line = next(
        x for x in make_plan(published["lite"], rules, kv_scales=True).entries if x.spec.role == "kv_a_proj_with_mqa"
    )
    assert not line.is_copy
    assert len(line.outputs) == 3


@pytest.mark.parametrize("rules", ["fp8-block", "nothing"])
def test_an_artifact_that_cannot_declare_kv_scales_gets_none(rules, published):
    nothing = recipe.parse("name: nothing\nrules: [{roles: ['*'], scheme: bf16}]", "nothing")
    chosen = nothing if rules == "nothing" else recipe.builtin(rules)
    with pytest.raises(InputError, match=f"recipe {rules}: its artifact can't declare KV-cache scales"):
        make_plan(published["lite"], chosen, kv_scales=True)


def test_the_plan_says_what_engines_make_of_kv_scales(published):
    from dsv2quant.report.plans import notes

    for targets, told in ((None, True), (["transformers"], False)):
        made = plan(published["lite"], "fp8-static", kv_scales=True, for_targets=targets)
        assert any("load no KV-cache scales for MLA" in note for note in notes(made)) is told
    assert not notes(plan(published["lite"], "fp8-static"))


def test_sglang_drops_a_llamas_kv_scales_of_compressed_tensors(tmp_path):
    from dsv2quant.report.plans import notes

    llama = open_checkpoint(tiny.write_headers(tmp_path / "llama", tiny.LLAMA))
    dropped = "sglang: loads no KV-cache scales of compressed-tensors (of --format autofp8 it does)"
    for layout, told in ((None, [dropped]), ("autofp8", [])):
        made = make_plan(llama, recipe.builtin("fp8-static", layout=layout), kv_scales=True)
        assert [note for note in notes(made) if "KV-cache" in note] == told


# --- reading ---


@both
def test_what_was_written_is_read(scheme, artifacts, cli):
    folder, made = artifacts[scheme]
    checkpoint = open_checkpoint(folder)
    assert {w.spec.name: w.scheme for w in checkpoint.weights} == {x.spec.name: x.scheme for x in made.entries}
    assert scheme in made.schemes
    assert list(checkpoint.kv_scales) == [0, 1, 2]
    for layer, (stored,) in checkpoint.kv_scales.items():
        assert stored.name == f"model.layers.{layer}.self_attn.k_scale"
        assert checkpoint.array(stored) == np.float32(4.5 / 448)
    shown = cli("inspect", folder)
    assert shown.code == 0
    assert scheme in shown.out
    assert "KV-cache scales: one per layer" in shown.out
    assert json.loads(cli("inspect", folder, "--json").out)["kv_scales"] == 3


@both
def test_verify_decodes_it(scheme, artifacts):
    from dsv2quant.evaluation.verify import check_layout, compare_tensors

    folder, _ = artifacts[scheme]
    artifact, source = open_checkpoint(folder), open_checkpoint(folder.parent / "source")
    check_layout(artifact, source)
    errors = compare_tensors(artifact, source, lambda nbytes: None)
    assert all(25 < e.sqnr < 40 if e.scheme == scheme else e.noise == 0 or e.scheme == "fp8-channel" for e in errors)


@both
def test_the_runtime_quantizes_every_input_with_its_stored_scale(scheme, artifacts):
    folder, _ = artifacts[scheme]
    checkpoint = open_checkpoint(folder)
    tensors = {name: t for file in checkpoint.files for name, t in load_file(folder / file).items()}
    model = Model(checkpoint)
    watched = static.watch(model)
    static_modules = {w.spec.module for w in checkpoint.weights if w.scheme == scheme}
    assert "model.layers.1.mlp.experts.5.down_proj" in static_modules
    generator = torch.Generator().manual_seed(0)
    for module, linear in watched.items():
        assert (linear.activation == "static") is (module in static_modules)
        if module in static_modules:
            weight = tensors[f"{module}.weight"].float() * tensors[f"{module}.weight_scale"]
            scale = tensors[f"{module}.input_scale"].reshape(1)
            x = torch.randn(3, weight.shape[1], generator=generator)
            served = dequantize_activation(*quantize_activation(x, "static", scale))
            assert torch.equal(linear(x), served @ weight.T)
    experts = [scale for name, scale in tensors.items() if re.search(r"\.1\.mlp\.experts\.\d+\.up.*input_scale", name)]
    assert len(experts) == 16
    assert len({float(scale) for scale in experts}) == 1

    tokens = static.some_tokens(checkpoint, 2, 24)
    exact = Model(checkpoint, LoadOptions(weight_only=True)).forward(tokens)
    served = model.forward(tokens)
    assert (served - exact).norm() / exact.norm() > 1e-3


def change(folder, out, edit, config=lambda raw: None):
    """A copy in one file with changed tensors and configuration."""
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    raw = json.loads((folder / "config.json").read_text())
    edit(tensors)
    config(raw["quantization_config"])
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(raw))
    return out


@both
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{O_PROJ}.input_scale"), f"{O_PROJ}.weight is FP8 but has no o_proj.input_scale"),
        (lambda t: t.pop(f"{O_PROJ}.weight_scale"), f"{O_PROJ}.weight is FP8 but has no o_proj.weight_scale"),
        (
            lambda t: t.update({f"{O_PROJ}.input_scale": torch.ones(64)}),
            f"{O_PROJ}.weight_scale, F32 .*does not fit a weight of shape [64, 64]",
        ),
        (
            lambda t: t.pop("model.layers.2.self_attn.v_scale"),
            "1 KV-cache scales are missing: model.layers.2.self_attn.v_scale",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.k_scale": torch.ones(4)}),
            "model.layers.0.self_attn.k_scale is F32 [4]",
        ),
    ],
)
def test_a_scale_that_is_missing_or_misshaped_is_one_clear_line(scheme, edit, message, artifacts, tmp_path, cli):
    folder = change(artifacts[scheme][0], tmp_path / "bad", edit)
    ran = cli("inspect", folder)
    assert ran.code == 3
    assert re.search(message.replace("[", r"\["), ran.err), ran.err
    assert ran.err.count("\n") == 1
    assert "Traceback" not in ran.err


def test_dynamic_and_static_inputs_of_tensor_scales_mix(tmp_path, lite, monkeypatch):
    rules = "name: both\nrules: [{roles: [o_proj], scheme: fp8-tensor}, {roles: [q_proj], scheme: fp8-static}]"
    monkeypatch.setitem(static.RECIPES, "both", recipe.parse(rules, "both"))
    static.write(lite, tmp_path / "out", "both")
    found = {w.spec.role: w.scheme for w in open_checkpoint(tmp_path / "out").weights}
    assert (found["o_proj"], found["q_proj"]) == ("fp8-tensor", "fp8-static")


def test_without_kv_scales_nothing_is_missed(artifacts, tmp_path):
    def drop(tensors):
        for name in [name for name in tensors if name.endswith(("k_scale", "v_scale"))]:
            del tensors[name]

    assert open_checkpoint(change(artifacts["fp8-autofp8"][0], tmp_path / "none", drop)).kv_scales == {}


def test_scales_that_the_configuration_does_not_declare_are_surplus(artifacts, tmp_path):
    def dynamic(config):
        for group in config["config_groups"].values():
            group["input_activations"] = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}

    kept = artifacts["fp8-static"][0]
    with pytest.raises(InputError, match=r"does not declare: .*input_scale"):
        open_checkpoint(change(kept, tmp_path / "dynamic", lambda t: None, dynamic))
    with pytest.raises(InputError, match=r"does not declare: .*k_scale"):
        open_checkpoint(change(kept, tmp_path / "kv", lambda t: None, lambda c: c.pop("kv_cache_scheme")))


def test_an_artifact_is_no_source(artifacts):
    folder, _ = artifacts["fp8-static"]
    with pytest.raises(InputError, match="already quantized"):
        make_plan(open_checkpoint(folder), recipe.builtin("fp8-channel"))
