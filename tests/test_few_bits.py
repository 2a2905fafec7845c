"""Artifacts of INT3 and INT2: who takes them, in which groups, what calibration makes of them, and what runs them."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from calibrated import manifest
from test_names import LITE_16B
from test_plan import V2_236B, fallen, reasons, schemes

import dsv2quant as dq
from dsv2quant.allocation import space
from dsv2quant.calib import gptq, trained, tuning
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import UsageError
from dsv2quant.kernels.reference_gptq import search_scales
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan
from dsv2quant.report.plans import notes
from dsv2quant.report.usage import usage
from dsv2quant.text.calibration import load, windows

pytestmark = pytest.mark.usefixtures("one_thread")
ROUTED = ["routed.gate_proj", "routed.up_proj", "routed.down_proj"]
FEW = ("int3-mixed", "int3-experts", "int2-mixed", "int2-experts")
CTX = 32


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three layers of DeepSeek-V2-Lite and of DeepSeek-V2 as headers and holes, and dsv2-mini."""
    folder = tmp_path_factory.mktemp("published")
    configs = {"lite": LITE_16B | {"num_hidden_layers": 3}, "v2": V2_236B | {"num_hidden_layers": 3}}
    folders = {name: tiny.write_headers(folder / name, config) for name, config in configs.items()}
    return {name: open_checkpoint(path) for name, path in (folders | {"mini": tiny.MINI}).items()}


def custom(rules: str):
    return recipe.parse(f"name: x\nrules: [{rules}]", "x")


@pytest.mark.parametrize("name", FEW)
def test_experts_are_in_few_bits_and_vllm_and_transformers_take_them(name, models):
    bits, _, kind = name.partition("-")
    for checkpoint in models.values():
        made = make_plan(checkpoint, recipe.builtin(name))
        assert made.targets == ("vllm", "transformers")
        assert not fallen(made)
        assert {role for role, found in schemes(made).items() if found == {f"{bits}-g64"}} == {*ROUTED}
        assert schemes(made)["o_proj"] == {"fp8-channel" if kind == "mixed" else "bf16"}
        assert schemes(made)["kv_b_proj"] == {"bf16"}
        assert {(entry.scheme, entry.method) for entry in made.entries if entry.spec.expert is not None} == {
            (f"{bits}-g64", "gptq")
        }


@pytest.mark.parametrize(
    ("model", "by_tp"),
    [("v2", {1: "int3-g128", 4: "int3-g128", 8: "int3-g64"}), ("lite", {2: "int3-g64", 4: "int3-g32", 8: "bf16"})],
)
def test_every_share_of_an_expert_has_whole_groups(model, by_tp, models):
    for tp, scheme in by_tp.items():
        made = make_plan(models[model], recipe.builtin("int3-experts", group_size=128), for_targets=["vllm"], tp=tp)
        assert schemes(made)["routed.down_proj"] == {scheme}
        said = " ".join(reasons(made, "routed.down_proj") | reasons(made, "routed.gate_proj"))
        assert ("vllm: the experts' width" in said) == (scheme != "int3-g128")


def test_experts_of_one_group_are_taken_where_marlin_would_misread_them(models):
    kept = make_plan(models["mini"], recipe.builtin("int2-experts", group_size=128), for_targets=["vllm"])
    assert schemes(kept)["routed.down_proj"] == {"int2-g128"}
    other = make_plan(models["mini"], recipe.builtin("int4-experts"), for_targets=["vllm"])
    assert schemes(other)["routed.down_proj"] == {"int4-g64"}


def test_transformers_reads_the_experts_of_all_layers_in_one_scheme(models):
    by_layer = custom("{roles: ['routed.*'], layers: '1', scheme: int3-g64}, {roles: ['routed.*'], scheme: int2-g64}")
    assert make_plan(models["v2"], by_layer).targets == ("vllm",)
    with pytest.raises(UsageError, match="it reads all routed experts in one scheme, not in int2-g64 and int3-g64"):
        make_plan(models["v2"], by_layer, for_targets=["vllm", "transformers"])
    beside_bf16 = custom("{roles: ['routed.*'], layers: '1', scheme: bf16}, {roles: ['routed.*'], scheme: int2-g64}")
    assert "transformers" in make_plan(models["v2"], beside_bf16).targets


def test_each_layer_has_its_group_in_the_configuration(models):
    by_layer = custom("{roles: ['routed.*'], layers: '1', scheme: int3-g64}, {roles: ['routed.*'], scheme: int2-g32}")
    groups = make_plan(models["v2"], by_layer).config["quantization_config"]["config_groups"].values()
    assert [(g["weights"]["num_bits"], g["weights"]["group_size"], g["format"]) for g in groups] == [
        (2, 32, "pack-quantized"),
        (3, 64, "pack-quantized"),
    ]
    assert [r"layers\.(1)\.mlp" in g["targets"][0] for g in groups] == [False, True]


def test_what_serving_takes_is_said_by_the_plan_and_the_card(models):
    made = make_plan(models["v2"], recipe.builtin("int2-mixed"))
    needed = "int2-g64 needs vLLM's Humming kernels, and a GPU from sm75 on"
    assert f"vllm: {needed}" in notes(made)
    assert any(f"{needed}." in section for section in usage(made, chats=False))
    plain = make_plan(models["v2"], recipe.builtin("int4-mixed"))
    assert not any("Humming" in note for note in notes(plain))


def test_a_search_has_them_where_its_consumers_do(models, tmp_path):
    few = {"int3-g64", "int2-g64"}
    recipes = space._candidates(models["v2"], False, {"targets": ["vllm"]})
    assert few <= {*recipes}
    for name in few:
        made = make_plan(models["v2"], recipes[name], for_targets=["vllm"])
        assert all(schemes(made)[role] == {name} for role in ROUTED)
        assert schemes(made)["o_proj"] == {"fp8-channel"}
    assert not few & {*space._candidates(models["v2"], False, {"targets": ["vllm", "sglang"]})}
    dense = open_checkpoint(tiny.write_checkpoint(tmp_path / "dense", tiny.LLAMA))
    assert not few & {*space._candidates(dense, False, {"targets": ["vllm"]})}


def test_a_search_is_none_of_transformers_where_there_are_experts(tmp_path, cli):
    ran = cli("search", tiny.MINI, "--bits", "5", "--target", "transformers", "-o", tmp_path / "x.yaml")
    assert ran.code == 2
    assert "it reads all routed experts in one scheme, and a search mixes theirs by layer" in ran.err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("scheme", ["int3-mixed", "int2-experts"])
@pytest.mark.parametrize("method", ["rtn", "mse", "gptq"])
def test_artifacts_are_made_verified_and_computed_with(scheme, method, wordy, fox, tmp_path, cli):
    out = tmp_path / "out"
    asked = ["--group-size", 32, "--method", method, "--calibration", fox, "--num-calibration-samples", 8]
    ran = cli("convert", wordy, f"--{scheme.replace('-', '=')}", *(asked if method != "rtn" else asked[:4]), "-o", out)
    assert ran.code == 0, ran.err
    verified = cli("verify", out, "--source", wordy, "--json")
    assert verified.code == 0, verified.err
    assert {row["scheme"] for row in json.loads(verified.out)["roles"] if row["role"] in ROUTED} == {
        f"{scheme[:4]}-g32"
    }
    artifact = open_checkpoint(out)
    name = f"{scheme[:4]}-g32"
    weights = [weight for weight in artifact.weights if weight.scheme == name]
    assert {weight.spec.role for weight in weights} == {*ROUTED}
    tokens = torch.arange(2, 34).view(2, 16)
    got, plain = (
        Model(open_checkpoint(folder), LoadOptions(weight_only=True)).forward(tokens) for folder in (out, wordy)
    )
    assert float((got - plain).norm() / plain.norm()) < 0.7
    if method != "rtn":
        scales = torch.cat([artifact.parts(weight)["weight_scale"].flatten() for weight in weights])
        assert 0.2 < float((scales < 0).float().mean()) < 0.8


def test_gptq_loses_less_than_the_search_and_that_less_than_rounding(wordy, fox, tmp_path):
    source = open_checkpoint(wordy)
    tokens = torch.from_numpy(windows(load(fox, wordy), source.tokenizer(), 16, CTX, 0))
    want = Model(source, LoadOptions()).forward(tokens).log_softmax(-1)
    lost = []
    for method in ("rtn", "mse", "gptq"):
        asked = {} if method == "rtn" else {"calibration": fox, "length": CTX, "samples": 64}
        out = tmp_path / method
        dq.convert(wordy, out, scheme="int2-experts", group_size=32, method=method, targets=["transformers"], **asked)
        found = Model(open_checkpoint(out), LoadOptions()).forward(tokens).log_softmax(-1)
        lost.append(float((want.exp() * (want - found)).sum(-1).mean()))
    assert lost[2] < lost[1] < lost[0]


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_searchs_reference_is_the_cpus(bits):
    x = torch.randn(2, 240, 128, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(2, 128, generator=torch.Generator().manual_seed(1))
    ours, cpus = search_scales(x, importance, 32, bits), gptq.best_scales(x, importance, 32, bits)
    assert float((ours == cpus).float().mean()) > 0.999  # sums in another order
    assert {*cpus.sign().unique().tolist()} == ({1.0} if bits == 4 else {-1.0, 1.0})


def test_their_codes_and_scales_are_tuned(wordy, fox, tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "RATE", 1e-2)
    monkeypatch.setattr(tuning, "STEP_TOKENS", 64)
    asked = {"scheme": "int2-experts", "group_size": 32, "targets": ["transformers"], "calibration": fox,
             "length": CTX, "samples": 16}  # fmt: skip
    dq.convert(wordy, tmp_path / "plain", **asked)
    dq.convert(wordy, tmp_path / "tuned", **asked, tune=1024)
    about = manifest(tmp_path / "tuned")["tuned"]
    assert about["accepted"]
    assert about["kld_after"] < about["kld_before"]
    plain, tuned = (open_checkpoint(tmp_path / name) for name in ("plain", "tuned"))
    moved = 0
    for before, after in zip(plain.weights, tuned.weights, strict=True):
        if before.scheme == "int2-g32":
            old, new = plain.parts(before), tuned.parts(after)
            assert torch.equal(old["weight_scale"] < 0, new["weight_scale"] < 0)
            moved += all(not torch.equal(old[part], new[part]) for part in ("weight_packed", "weight_scale"))
    assert moved
