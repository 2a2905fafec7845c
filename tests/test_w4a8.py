"""W4A8: INT4 with FP8 activations, by vLLM's conditions; what tells it from INT4; and schemes that nobody knows."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from dsv2quant.arch.decoder import architecture
from dsv2quant.bench.model import configuration
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.errors import UsageError
from dsv2quant.formats.schemes import CODECS, SERVED, UNQUANTIZED
from dsv2quant.kernels.reference import quantize_activation
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.planning import consumers, recipe
from dsv2quant.planning.consumers import ROWS, TARGETS, Parallel
from dsv2quant.planning.plan import choose_schemes, make_plan
from dsv2quant.planning.rules import Refusal
from dsv2quant.storage.safetensors import read_header


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """Of dsv2-mini, for vLLM and transformers: experts too narrow for W4A8 fall back, q_a and kv_a as well."""
    out = tmp_path_factory.mktemp("w4a8") / "mini"
    convert(make_plan(open_checkpoint(tiny.MINI), recipe.builtin("w4a8", method="rtn")), out, command="")
    return out


def test_schemes_survive_the_file(artifact):
    """Parts are INT4's: the configuration tells which modules have FP8 inputs, among those of the same groups."""
    found = {(w.spec.role, w.scheme) for w in open_checkpoint(artifact).weights if w.scheme != "bf16"}
    assert found == {
        *((role, "w4a8-g128") for role in ("q_b_proj", "o_proj", "dense.gate_proj", "dense.up_proj")),
        *((f"shared.{name}_proj", "w4a8-g128") for name in ("gate", "up", "down")),
        *((f"routed.{name}_proj", "int4-g64") for name in ("gate", "up", "down")),
        *((role, "int4-g128") for role in ("q_a_proj", "kv_a_proj_with_mqa")),
        ("dense.down_proj", "int4-g64"),
    }
    groups = json.loads((artifact / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert [bool(group["input_activations"]) for group in groups] == [False, False, True]
    assert {group["format"] for group in groups} == {"pack-quantized"}


def test_bytes_are_those_of_int4():
    x = np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32)
    (ours,), (theirs,) = (CODECS[scheme].encode([x]) for scheme in ("w4a8-g128", "int4-g128"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[suffix], theirs[suffix]) for suffix in ours)


def test_inputs_of_w4a8_alone_are_quantized(artifact):
    model = Model(open_checkpoint(artifact))
    attention = next(iter(model.layers())).attention
    assert attention.q_b_proj.activation == "token"
    assert attention.q_a_proj.activation is None
    tokens = torch.arange(2, 34)[None]
    plain = Model(open_checkpoint(artifact), LoadOptions(weight_only=True)).forward(tokens)
    assert 1e-3 < float((model.forward(tokens) - plain).norm() / plain.norm()) < 0.3


# Of DeepSeek-V2 and V2-Lite: role, shape, GPUs, and what it becomes. q_a and kv_a are one matrix of 2112 rows.
CASES = [
    ("v2", "routed.gate_proj", (1536, 5120), 1, "w4a8-g128"),
    ("v2", "routed.down_proj", (5120, 1536), 2, "w4a8-g128"),
    ("v2", "routed.down_proj", (5120, 1536), 4, "int4-g128"),  # 384 is no multiple of 256
    ("v2", "q_a_proj", (1536, 5120), 1, "int4-g128"),
    ("v2", "kv_a_proj_with_mqa", (576, 5120), 1, "int4-g128"),
    ("v2", "q_b_proj", (24576, 1536), 8, "w4a8-g128"),
    ("v2", "o_proj", (5120, 16384), 8, "w4a8-g128"),
    ("v2", "shared.gate_proj", (3072, 5120), 16, "w4a8-g128"),  # 192 rows of gate, and as many of up
    ("v2", "shared.down_proj", (5120, 3072), 16, "int4-g64"),
    ("v2", "kv_b_proj", (32768, 512), 1, "bf16"),
    ("v2-lite", "routed.gate_proj", (1408, 2048), 1, "int4-g128"),
    ("v2-lite", "kv_a_proj_with_mqa", (576, 2048), 1, "int4-g128"),
    ("v2-lite", "q_proj", (3072, 2048), 1, "w4a8-g128"),
    ("v2-lite", "dense.down_proj", (2048, 10944), 1, "int4-g64"),
]


@pytest.mark.parametrize(("model", "role", "shape", "tp", "scheme"), CASES)
def test_vllms_conditions(model, role, shape, tp, scheme):
    config = configuration(model)
    everything = replace(recipe.builtin("w4a8"), rules=(recipe.Rule(("*",), None, "w4a8-g128", "rtn"),))
    specs = (*architecture(config).layer(0), *architecture(config).layer(1))
    spec = next(spec for spec in specs if spec.role == role)
    assert spec.shape == shape
    chosen = choose_schemes({spec: "bf16"}, everything, ("vllm",), Parallel(tp))
    assert chosen[spec][0] == scheme
    assert (chosen[spec][2] is None) == (scheme == "w4a8-g128")


def test_what_vllm_makes_of_the_scales():
    """The figures of formats/int4.py: convert_bf16_scales_to_fp8 on scales of several spreads."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1024, 32, 128, generator=generator).abs().amax(-1) / 7.5
    for scales in (normal, torch.randn(1024, 32, generator=generator).exp()):
        stored = scales.bfloat16().float()
        codes, row = quantize_activation(stored, "token")
        served = (codes.float() / 8).to(torch.float8_e4m3fn).float() * (row * 8)
        off = (served - stored) / stored
        assert 0.024 < float(off.square().mean().sqrt()) < 0.028
        assert 0.055 < float(off.abs().max()) < 0.06


def test_the_plan_says_what_it_needs(cli):
    ran = cli("plan", tiny.MINI, "--w4a8")
    assert ran.code == 0, ran.err
    assert "note: vllm: w4a8-g128 needs a Hopper GPU (sm90), and BF16" in ran.out
    assert "vllm: the experts' width, 128, must exceed the group of 128" in ran.out
    refused = cli("plan", tiny.MINI, "--w4a8", "--group-size", "64")
    assert (refused.code, "--w4a8 has groups of 128 columns" in refused.err) == (2, True)


def test_every_scheme_has_a_row_somewhere_and_every_row_a_scheme():
    rows = {scheme for target in TARGETS for scheme in ROWS[target]}
    read_alone = {f"gptq{bits}-g{size}" for bits in (3, 2) for size in (128, 64, 32)}  # others' files
    assert rows == CODECS.keys() - UNQUANTIZED - read_alone
    for scheme in rows:
        assert CODECS[scheme].finer in CODECS
        assert CODECS[CODECS[scheme].variant()].name == scheme


@pytest.mark.parametrize("target", TARGETS)
def test_a_scheme_without_a_row_is_refused_by_each_consumer(target, monkeypatch):
    """In a recipe it is an error, and where a fallback meets it, a reason."""
    monkeypatch.delitem(ROWS[target], "int4-g64")
    checkpoint = open_checkpoint(tiny.MINI)
    with pytest.raises(UsageError, match=f"{target}: no rule for scheme int4-g64"):
        consumers.choose([target], {"int4-g64"}, checkpoint.config)
    assert target not in consumers.choose(None, {"int4-g64"}, checkpoint.config)
    spec = next(w.spec for w in checkpoint.weights if w.spec.role == "o_proj")
    found = consumers.refusal(spec, "int4-g64", [target], Parallel())
    assert found == Refusal(f"{target}: no rule for scheme int4-g64")


UNKNOWN = "name: mine\nrules:\n  - {roles: ['*'], scheme: mxfp4}\n"


@pytest.mark.parametrize("verb", ["plan", "convert"])
def test_an_unknown_scheme_is_refused_before_anything_is_read(verb, cli, tmp_path):
    (tmp_path / "mine.yaml").write_text(UNKNOWN)
    out = ("-o", tmp_path / "out") if verb == "convert" else ()
    ran = cli(verb, tiny.MINI, "--recipe", tmp_path / "mine.yaml", *out)
    assert (ran.code, ran.out) == (3, "")
    assert "unknown scheme 'mxfp4'" in ran.err
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_scheme_of_a_callers_own_rules_is_refused():
    rules = (recipe.Rule(("*",), None, "mxfp4", "rtn"),)
    with pytest.raises(UsageError, match="unknown scheme mxfp4"):
        make_plan(open_checkpoint(tiny.MINI), replace(recipe.builtin("int8"), rules=rules))


@pytest.mark.parametrize("declared", [
    {"quant_method": "mxfp4"},
    {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}}}},
], ids=["method", "group"])  # fmt: skip
@pytest.mark.parametrize("verb", ["inspect", "verify", "eval-ppl", "generate"])
def test_a_checkpoint_in_an_unknown_scheme_is_refused(verb, declared, artifact, cli, tmp_path):
    for file in artifact.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((artifact / "config.json").read_text()) | {"quantization_config": declared}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_header(tmp_path / "model.safetensors")
    ran = cli(verb, tmp_path, *(("--prompt", "x") if verb == "generate" else ()))
    assert (ran.code, ran.out) == (3, "")
    assert "is quantized with 'mxfp4'" in ran.err or "quantization_config has weights with num_bits 4" in ran.err
    assert ran.err.count("\n") == 1


def test_what_vllm_multiplies_with_is_rounded_as_its_scales_and_products_are():
    """By hand, in float64: convert_bf16_scales_to_fp8 and cutlass_pack_scale_fp8 of vLLM 0.26."""
    table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()  # all that are positive

    def to_e4m3(x: np.ndarray) -> np.ndarray:
        """The nearest, of two the even one."""
        low = np.searchsorted(table, np.abs(x), "right") - 1
        high = np.minimum(low + 1, 126)
        below, above = np.abs(x) - table[low], table[high] - np.abs(x)
        nearest = np.where((above < below) | ((above == below) & (high % 2 == 0)), high, low)
        return np.sign(x) * table[nearest]

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 384)) * rng.uniform(0.2, 3, (6, 3)).repeat(128, 1)
    codec = CODECS["w4a8-g128"]
    (parts,) = codec.encode([weight.astype(np.float32)])
    held = {name: torch.from_numpy(x) for name, x in parts.items()}
    held["weight_scale"] = held["weight_scale"].view(torch.bfloat16)
    plain = codec.decode(held, torch.float32).double().numpy()
    scales = held["weight_scale"].float().numpy()
    codes = np.rint(plain.reshape(6, 3, 128) / scales[..., None])
    of_channel = np.abs(scales).max(1, keepdims=True) / np.float32(448)
    rounded = to_e4m3(to_e4m3((scales / of_channel).astype(float)) / 8)
    expected = to_e4m3(codes * rounded[..., None]).reshape(6, 384) * (of_channel * 8)
    got = SERVED["vllm", "w4a8-g128"](held, torch.float32).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert np.abs(expected - plain).max() > 0.02 * np.abs(plain).max()
