"""Static FP8 and KV-cache scales from a statistics file, as `convert` writes them."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from test_statistics import calibration

from dsv2quant.arch.decoder import architecture
from dsv2quant.calib.calibrate import calibrate
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan


@pytest.fixture(scope="module", params=["lite", "v2"])
def source(request, tmp_path_factory, one_thread):
    """(checkpoint, statistics, the statistics file's tensors)."""
    folder = tmp_path_factory.mktemp(request.param)
    config = {"lite": tiny.LITE, "v2": tiny.V2}[request.param]
    checkpoint = open_checkpoint(tiny.write_checkpoint(folder / "model", config))
    statistics = calibrate(checkpoint, folder / "stats.safetensors", calibration())
    return checkpoint, statistics, load_file(folder / "stats.safetensors")


def over_448(amax: float) -> np.float32:
    return np.float32(amax) / np.float32(448)


def largest(stored: dict[str, np.ndarray], module: str) -> float:
    """The largest input of a module, by the file's names for inputs."""
    parent, _, leaf = module.rpartition(".")
    if parent.endswith("shared_experts") and leaf != "down_proj":
        return stored[f"{parent.rpartition('.')[0]}.gate.amax"].max()
    leaf = {"up_proj": "gate_proj", "q_proj": "kv_a_proj_with_mqa", "q_a_proj": "kv_a_proj_with_mqa"}.get(leaf, leaf)
    return stored[f"{parent}.{leaf}.amax"].max()


@pytest.mark.parametrize("layout", [None, "autofp8"], ids=["compressed-tensors", "autofp8"])
def test_input_scales_are_the_largest_input_of_what_shares_one(layout, source, tmp_path):
    checkpoint, statistics, stored = source
    plan = make_plan(checkpoint, recipe.builtin("fp8-static", layout=layout), for_targets=["vllm"], kv_scales=True)
    convert(plan, tmp_path / "out", command="", statistics=statistics)
    written = load_file_bits(tmp_path / "out" / "model.safetensors")
    inputs = {name.removesuffix(".input_scale"): x for name, x in written.items() if name.endswith(".input_scale")}
    groups = defaultdict(list)
    for spec in architecture(checkpoint.config).specs():
        if spec.module in inputs and spec.name.endswith(".weight"):
            half = "w2" if spec.role.endswith("down_proj") else "w13"
            routed = spec.role.startswith("routed.")
            groups[f"{spec.layer}.experts.{half}" if routed else spec.module].append(spec.module)
    assert sum(map(len, groups.values())) == len(inputs) > 60
    for modules in groups.values():
        want = over_448(max(largest(stored, module) for module in modules))
        for module in modules:
            assert inputs[module].item() == want, module
            assert inputs[module].shape == (() if layout else (1,))
    for layer in range(checkpoint.config.num_hidden_layers):
        at = f"model.layers.{layer}.self_attn"
        want = over_448(max(stored[f"{at}.kv_b_proj.amax"].max(), stored[f"{at}.k_pe_radius"].max()))
        assert written[f"{at}.k_scale"].item() == written[f"{at}.v_scale"].item() == want
    artifact = open_checkpoint(tmp_path / "out")
    assert set(artifact.kv_scales) == set(range(checkpoint.config.num_hidden_layers))
    linear = next(iter(Model(artifact).layers())).attention.o_proj
    assert linear.activation == "static"
    assert linear.input_scale == inputs["model.layers.0.self_attn.o_proj"].item()


def load_file_bits(path) -> dict[str, np.ndarray]:
    """Float32 tensors of a file."""
    return {name: x.numpy() for name, x in load_torch(path).items() if x.dtype == torch.float32}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_kv_scales_go_with_every_compressed_tensors_recipe(method, source, tmp_path):
    checkpoint, statistics, stored = source
    text = f"name: x\nrules: [{{roles: [kv_a_proj_with_mqa, o_proj], scheme: int4-channel, method: {method}}}]"
    asked = recipe.parse(text, "test")
    plain = make_plan(checkpoint, asked, for_targets=["transformers"])
    plan = make_plan(checkpoint, asked, for_targets=["transformers"], kv_scales=True)
    using = {"calibration": calibration()} if method == "gptq" else {"statistics": statistics}
    convert(plan, tmp_path / "kv", command="", **using)
    convert(plain, tmp_path / "plain", command="", calibration=using.get("calibration"))
    ours, without = (load_torch(tmp_path / name / "model.safetensors") for name in ("kv", "plain"))
    added = {name: x.item() for name, x in ours.items() if name not in without}
    assert all(torch.equal(ours[name], x) for name, x in without.items())
    want = {}
    for layer in range(checkpoint.config.num_hidden_layers):
        at = f"model.layers.{layer}.self_attn"
        value = over_448(max(stored[f"{at}.kv_b_proj.amax"].max(), stored[f"{at}.k_pe_radius"].max()))
        want |= {f"{at}.k_scale": value, f"{at}.v_scale": value}
    assert added == want
    scheme = json.loads((tmp_path / "kv" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"], scheme["strategy"]) == (8, "float", "tensor")


def test_the_command_line_takes_statistics_and_layout(tmp_path, cli, wordy, fox):
    stats = tmp_path / "stats"
    few = ("--num-calibration-samples", "3", "--calibration", fox)
    assert cli("calibrate", wordy, "-o", stats, *few, "-q").code == 0
    command = ("convert", wordy, "--fp8=static", "--format", "autofp8", "--kv-scales")
    ran = cli(*command, "--statistics", stats, "-o", tmp_path / "a")
    assert ran.code == 0, ran.err
    card = (tmp_path / "a" / "README.md").read_text()
    assert "--fp8=static --format autofp8 --kv-scales --statistics stats\n" in card
    # Without statistics it measures by itself, with the same result.
    ran = cli(*command, *few, "-o", tmp_path / "b")
    assert ran.code == 0, ran.err
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fp8=static", "--format", "gptq"), "gptq and awq go with --int4, autofp8 with --fp8=static"),
        (("--int4", "--format", "autofp8"), "autofp8 with --fp8=static"),
        (("--fp8", "--format", "autofp8"), "autofp8 with --fp8=static"),
        (("--fp8=channel", "--statistics", "{stats}"), "no method of this recipe uses them"),
        (("--int4", "--statistics", "{stats}"), "gptq calibrates by itself"),
        (
            ("--fp8=static", "--statistics", "{stats}", "--calibration", "{fox}"),
            "nothing of this recipe calibrates here",
        ),
    ],
)
def test_wrong_usage(options, message, tmp_path, cli, wordy, fox):
    words = [option.format(stats=tmp_path / "stats", fox=fox) for option in options]
    ran = cli("convert", wordy, *words, "-o", tmp_path / "out")
    assert ran.code == 2
    assert message in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fp8=static", "--statistics", "{none}"), "no such file (give the file that `dsv2quant calibrate` made)"),
        (("--fp8", "--kv-scales"), "its artifact can't declare KV-cache scales"),
    ],
)
def test_bad_input(options, message, tmp_path, cli, wordy):
    ran = cli("convert", wordy, *(option.format(none=tmp_path / "none") for option in options), "-o", tmp_path / "out")
    assert ran.code == 3
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
