"""inspect and verify: what an artifact holds, whether it is whole, and how far it is from its source."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from dsv2quant import recipe
from dsv2quant.checkpoint import Checkpoint
from dsv2quant.convert import convert
from dsv2quant.plan import make_plan
from dsv2quant.writer import STATE_FILE


@pytest.fixture(scope="module")
def artifact(lite, tmp_path_factory):
    out = tmp_path_factory.mktemp("artifact") / "out"
    convert(make_plan(Checkpoint.open(lite), recipe.builtin("fp8-channel")), out, command="")
    return out


def test_inspect_lists_roles_schemes_and_configuration(artifact, cli):
    ran = cli("inspect", artifact)
    assert ran.code == 0
    assert "routed.down_proj    fp8-channel" in ran.out
    assert "3 of 8 routed, 2 shared, width 48, from layer 1" in ran.out
    assert "YaRN factor 40 over 32" in ran.out
    result = json.loads(cli("inspect", artifact, "--json").out)
    assert result["schema"] == "dsv2quant.inspect/2"
    assert result["parameters"] == sum(w.slot.size for w in Checkpoint.open(artifact).weights)
    assert result["quantization_config"]["quant_method"] == "compressed-tensors"
    roles = {r["role"]: r["scheme"] for r in result["roles"]}
    assert (roles["o_proj"], roles["router"]) == ("fp8-channel", "bf16")


def test_verify_measures_what_consumers_decode(lite, artifact, cli):
    ran = cli("verify", artifact, "--source", lite, "--json", "-q")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    source, written = load_file(lite / "model.safetensors"), load_file(artifact / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    decoded = (written[name].float() * written[name.replace(".weight", ".weight_scale")]).to(torch.bfloat16)
    members = [n for n in source if n.endswith("o_proj.weight")]
    signal = sum(float(source[n].double().square().sum()) for n in members)
    noise = 0.0
    for n in members:
        back = (written[n].float() * written[n.replace(".weight", ".weight_scale")]).to(torch.bfloat16)
        noise += float((back.double() - source[n].double()).square().sum())
    role = next(r for r in result["roles"] if r["role"] == "o_proj")
    assert role["sqnr_db"] == pytest.approx(10 * np.log10(signal / noise), rel=1e-5)
    assert role["max_error"] >= float((decoded.float() - source[name].float()).abs().max())
    exact = next(r for r in result["roles"] if r["role"] == "embed")
    assert (exact["sqnr_db"], exact["max_error"]) == (None, 0)
    assert len(result["worst"]) == 5
    assert result["worst"][0]["sqnr_db"] <= result["worst"][-1]["sqnr_db"]
    text = cli("verify", artifact, "--source", lite, "-q").out
    assert "files match the manifest" in text
    assert "worst tensors:" in text


def change_byte(path, at=-100):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_byte(f / "model.safetensors"), "model.safetensors: size or sha256 differs"),
        (lambda f: change_byte(f / "tokenizer.json"), "tokenizer.json: size or sha256 differs"),
        (lambda f: (f / "tokenizer_config.json").unlink(), "tokenizer_config.json is missing"),
        (lambda f: (f / STATE_FILE).touch(), "the conversion is unfinished"),
        (lambda f: (f / "dsv2quant.json").write_text('{"files": {}}'), "does not list model.safetensors"),
        (lambda f: (f / "dsv2quant.json").write_text("{}"), "lists no files"),
        (lambda f: (f / "dsv2quant.json").write_text('{"files": {"model.safetensors": {}, "../x": {}}}'), "differs"),
    ],
)
def test_damage_is_found(damage, message, artifact, tmp_path, cli):
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    damage(copy)
    ran = cli("verify", copy, "-q")
    assert ran.code == 3
    assert message in ran.err
    assert ran.err.count("\n") == 1


def test_another_source_is_refused(artifact, tmp_path, cli):
    other = tiny.write_checkpoint(tmp_path / "other", tiny.LITE | {"v_head_dim": 24})
    ran = cli("verify", artifact, "--source", other, "-q")
    assert ran.code == 3
    assert "other is another model" in ran.err
