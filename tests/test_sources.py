"""Sources that are quantized already, as they are published: what they decode to, and where their codes stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from calibrated import WINDOWS, calibration, planned, rules, run
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor as Packed
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file
from test_compressed_tensors import compressed, scheme_of
from test_convert import tensors

from dsv2quant.arch.spec import LINEAR_ROLES
from dsv2quant.calib.collect import collect
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.errors import InputError
from dsv2quant.formats.e4m3 import E8M0_VALUES
from dsv2quant.formats.schemes import CODECS
from dsv2quant.planning import recipe
from dsv2quant.planning.gguf_plan import Options, make_gguf_plan
from dsv2quant.planning.plan import Plan, make_plan
from dsv2quant.report.plans import notes

Tensors = dict[str, torch.Tensor]
# Rows and columns of two blocks, or of one and a half.
WIDE = tiny.GROUPED | {
    "hidden_size": 256, "intermediate_size": 192, "moe_intermediate_size": 128, "num_hidden_layers": 2,
    "n_routed_experts": 2, "num_experts_per_tok": 1, "n_shared_experts": 1, "v_head_dim": 32,
    "q_lora_rank": 64, "vocab_size": 4096,
}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
# As Kimi-K2-Thinking has it: INT4 experts, and all else that is listed in BF16.
KIMI = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {"group_0": {
        "input_activations": None, "output_activations": None, "targets": ["Linear"],
        "weights": {
            "actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4,
            "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
        },
    }},
}  # fmt: skip
O_PROJ = "model.layers.1.self_attn.o_proj"


def linears(folder: Path) -> dict[str, str]:
    """{module: role} of the matrices that sources quantize."""
    weights = open_checkpoint(folder).weights
    return {w.spec.module: w.spec.role for w in weights if w.spec.role in LINEAR_ROLES}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("wide") / "wide", WIDE)


@pytest.fixture(scope="module")
def blocks(wide: Path) -> tuple[Tensors, Tensors]:
    return with_powers_of_two(wide)


def with_powers_of_two(wide: Path) -> tuple[Tensors, Tensors]:
    """FP8 blocks whose scales are powers of two, float32, as DeepSeek-V3.1 stores them; and the float32 values."""
    generator = torch.Generator().manual_seed(1)
    stored = tensors(wide)
    values = {name: tensor.float() for name, tensor in stored.items()}
    for module in linears(wide):
        codes = (stored[f"{module}.weight"].float() * 40).to(torch.float8_e4m3fn)
        rows, cols = codes.shape
        shape = -(-rows // 128), -(-cols // 128)
        scales = torch.randint(-9, -3, shape, generator=generator).float().exp2()
        stored |= {f"{module}.weight": codes, f"{module}.weight_scale_inv": scales}
        per_weight = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
        values[f"{module}.weight"] = codes.float() * per_weight
    return stored, values


def write_blocks(folder: Path, stored: Tensors, dtype: torch.dtype, **words: Any) -> Path:
    cast = {name: t.to(dtype) if name.endswith("scale_inv") else t for name, t in stored.items()}
    return tiny.write_checkpoint(folder, WIDE | {"quantization_config": FP8 | words}, cast)


def plan_for_vllm(model: Path, name: str | recipe.Recipe, **options: Any) -> Plan:
    chosen = recipe.builtin(name, **options) if isinstance(name, str) else name
    return make_plan(open_checkpoint(model), chosen, for_targets=["vllm"])


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.dtype == wanted.dtype and torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def test_e8m0_is_torchs():
    codes = torch.arange(256, dtype=torch.uint8)
    wanted = codes.view(torch.float8_e8m0fnu).float().numpy()
    np.testing.assert_array_equal(E8M0_VALUES, wanted)
    assert E8M0_VALUES[0] > 0


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.bfloat16, torch.float16, torch.float32])
def test_fp8_blocks_keep_codes_and_scales(dtype, blocks, tmp_path):
    """Whatever holds them, be it e8m0's bytes; and they say how they are served."""
    stored, values = blocks
    model = write_blocks(tmp_path / "model", stored, dtype, scale_fmt="ue8m0")
    source = open_checkpoint(model)
    for weight in source.weights:
        assert torch.equal(source.decode(weight, torch.float32), values[weight.spec.name]), weight.spec.name
    run(plan_for_vllm(model, "fp8-block"), tmp_path / "out")
    written = tensors(tmp_path / "out")
    kept = [name for name in written if name.endswith("_scale_inv")]
    assert len(kept) > 10
    assert all(same(written[name], stored[name]) for name in kept)
    assert all(same(written[name[: -len("_scale_inv")]], stored[name[: -len("_scale_inv")]]) for name in kept)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["scale_fmt"] == "ue8m0"


def test_other_schemes_are_made_of_the_values(blocks, tmp_path):
    stored, values = blocks
    model = write_blocks(tmp_path / "model", stored, torch.float8_e8m0fnu, scale_fmt="ue8m0")
    run(plan_for_vllm(model, "fp8-channel"), tmp_path / "out")
    (encoded,) = CODECS["fp8-channel"].encode([values[f"{O_PROJ}.weight"].numpy()])
    written = tensors(tmp_path / "out")
    assert written[f"{O_PROJ}.weight"].view(torch.uint8).numpy().tobytes() == encoded["weight"].tobytes()
    assert np.array_equal(written[f"{O_PROJ}.weight_scale"].numpy(), encoded["weight_scale"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "scale_fmt" not in config["quantization_config"]


def test_groups_that_would_keep_codes_are_named(kimi):
    plan = plan_for_vllm(kimi[0], "int4-experts", group_size=64)
    assert "the source has INT4: --group-size 32 keeps its codes" in notes(plan)


def test_powers_of_two_are_declared_only_of_all_scales(blocks, tmp_path):
    stored, values = blocks
    plain = {name: t for name, t in stored.items() if name != f"{O_PROJ}.weight_scale_inv"}
    plain[f"{O_PROJ}.weight"] = values[f"{O_PROJ}.weight"].bfloat16()
    for folder, given, words in (("mixed", plain, {"scale_fmt": "ue8m0"}), ("silent", stored, {})):
        model = write_blocks(tmp_path / folder, given, torch.float32, **words)
        plan = plan_for_vllm(model, "fp8-block")
        assert "scale_fmt" not in plan.config["quantization_config"], folder


@pytest.mark.parametrize(
    ("dtype", "value", "words", "message"),
    [
        (torch.float32, 0.3, {"scale_fmt": "ue8m0"}, r"o_proj\.weight_scale_inv is no power of two"),
        (torch.float32, float("nan"), {}, r"o_proj\.weight_scale_inv is NaN, .* at \[1, 0\]"),
        (torch.float8_e8m0fnu, float("nan"), {}, r"o_proj\.weight_scale_inv is NaN, .* at \[1, 0\]"),
    ],
)
def test_scales_that_are_not_what_they_should_be_are_named(dtype, value, words, message, blocks, tmp_path):
    stored = dict(blocks[0])
    scales = stored[f"{O_PROJ}.weight_scale_inv"].clone()
    scales[1, 0] = value
    model = write_blocks(tmp_path / "model", stored | {f"{O_PROJ}.weight_scale_inv": scales}, dtype, **words)
    with pytest.raises(InputError, match=message):
        run(plan_for_vllm(model, "fp8-block"), tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"weight_block_size": [64, 128]}, r"is FP8 in blocks of \[64, 128\].*only \[128, 128\] is read"),
        ({"modules_to_not_convert": [O_PROJ]}, "o_proj is quantized, but quantization_config lists it as left out"),
        ({"ignored_layers": [f"language_{O_PROJ}"]}, "o_proj is quantized, but quantization_config lists it"),
    ],
)
def test_fp8_that_is_not_what_config_json_says_is_an_error(words, message, blocks, tmp_path):
    model = write_blocks(tmp_path / "model", blocks[0], torch.float32, **words)
    with pytest.raises(InputError, match=message):
        open_checkpoint(model)


# INT4


def write_int4(
    folder: Path, wide: Path, *, dtype: torch.dtype = torch.bfloat16, asymmetric: bool = False, **words: Any
) -> tuple[Path, Path]:
    """Experts in INT4 as compressed-tensors' own compressor stores them, the shapes in int32 as Kimi-K2-Thinking has
    them; and the same checkpoint with what it decompresses to."""
    scheme, stored, plain = scheme_of(32, asymmetric), tensors(wide), tensors(wide)
    for module, role in linears(wide).items():
        if role.startswith("routed."):
            parts = compressed(stored.pop(f"{module}.weight"), scheme, dtype)
            parts["weight_shape"] = parts["weight_shape"].to(torch.int32)
            stored |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
            exact = parts | {"weight_scale": parts["weight_scale"].float()}
            plain[f"{module}.weight"] = Packed.decompress(exact, scheme)["weight"]
    config = json.loads(json.dumps(KIMI | words))
    config["config_groups"]["group_0"]["weights"]["symmetric"] = not asymmetric
    packed = tiny.write_checkpoint(folder / "packed", WIDE | {"quantization_config": config}, stored)
    return packed, tiny.write_checkpoint(folder / "plain", WIDE, plain)


@pytest.fixture(scope="module")
def kimi(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_int4(tmp_path_factory.mktemp("kimi"), wide)


def experts(folder: Path) -> dict[str, torch.Tensor]:
    """Every expert's weight as the runtime reads it, in float32."""
    found = open_checkpoint(folder)
    routed = [weight for weight in found.weights if weight.spec.role.startswith("routed.")]
    return {weight.spec.name: found.decode(weight, torch.float32) for weight in routed}


@pytest.mark.parametrize("layout", [None, "gptq", "awq"])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_int4_in_groups_as_large_keeps_its_codes(method, layout, kimi, tmp_path):
    """Whatever the method, which then needs no calibration."""
    plan = plan_for_vllm(kimi[0], "int4-experts", group_size=32, layout=layout, method=method)
    assert f"6 matrices keep the codes and scales that the source has, as {layout or 'int4'}-g32" in notes(plan)
    convert(plan, tmp_path / "out", command="")
    source, written = experts(kimi[0]), experts(tmp_path / "out")
    assert source.keys() == written.keys()
    assert all(torch.equal(written[name], values) for name, values in source.items())
    if layout is None:
        before, after = tensors(kimi[0]), tensors(tmp_path / "out")
        packed = [name for name in before if "weight_packed" in name or "weight_scale" in name]
        assert len(packed) == 2 * len(source)
        assert all(same(after[name], before[name]) for name in packed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_of_a_wider_dtype_are_rounded_and_codes_kept(dtype, wide, tmp_path):
    model, _ = write_int4(tmp_path, wide, dtype=dtype)
    convert(plan_for_vllm(model, "int4-experts", group_size=32), tmp_path / "out", command="")
    before, after = tensors(model), tensors(tmp_path / "out")
    scales = [name for name in before if name.endswith("weight_scale")]
    assert scales
    for name in scales:
        assert same(after[name], before[name].bfloat16())
        assert same(after[name.replace("_scale", "_packed")], before[name.replace("_scale", "_packed")])


def test_scales_that_float16_has_not_are_an_error(wide, tmp_path):
    model, _ = write_int4(tmp_path, wide)
    stored = tensors(model)
    name = next(name for name in stored if name.endswith("down_proj.weight_scale"))
    stored[name][3, 1] = 1e6
    tiny.write_checkpoint(model, json.loads((model / "config.json").read_text()), stored)
    plan = plan_for_vllm(model, "int4-experts", group_size=32, layout="gptq")
    with pytest.raises(InputError, match="values too large for the float16 scales of gptq-g32"):
        convert(plan, tmp_path / "out", command="")


def test_gguf_keeps_its_codes_in_blocks_of_32(kimi, tmp_path):
    plan = make_gguf_plan(open_checkpoint(kimi[0]), Options("Q4_0"))
    assert "6 matrices keep the codes and scales that the source has, as Q4_0" in plan.notes
    convert(plan, tmp_path / "m.gguf")
    source, found = experts(kimi[0]), {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    for name in ("gate", "up", "down"):
        wanted = [source[f"model.layers.1.mlp.experts.{n}.{name}_proj.weight"] for n in range(2)]
        tensor = found[f"blk.1.ffn_{name}_exps.weight"]
        assert np.array_equal(dequantize(tensor.data, tensor.tensor_type), torch.stack(wanted).numpy())


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("to", ["fp8-channel", "GGUF"])
def test_other_schemes_are_made_of_what_it_decompresses_to(to, asymmetric, kimi, wide, tmp_path):
    sources = write_int4(tmp_path, wide, asymmetric=True) if asymmetric else kimi
    made: list[Any] = []
    for model in sources:
        out = tmp_path / f"{model.name}.gguf"
        if to == "GGUF":
            convert(make_gguf_plan(open_checkpoint(model), Options("Q8_0")), out)
            made.append([(tensor.name, tensor.data.tobytes()) for tensor in GGUFReader(out).tensors])
        else:
            convert(plan_for_vllm(model, to), out, command="")
            made.append((out / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_asymmetric_codes_are_not_kept(wide, tmp_path):
    model, _ = write_int4(tmp_path, wide, asymmetric=True)
    plan = plan_for_vllm(model, "int4-experts", group_size=32)
    assert not any("keeps its codes" in note for note in notes(plan))
    assert not any(entry.is_kept for entry in plan.entries)
    assert {entry.method for entry in plan.entries if entry.spec.role.startswith("routed.")} == {"gptq"}


def test_what_is_kept_stands_beside_what_is_calibrated(kimi, tmp_path):
    """GPTQ chooses o_proj's codes behind experts that stay."""
    plan = planned(kimi[0], rules('{roles: [o_proj, "routed.*"], scheme: int4-g32, method: gptq}'))
    made = run(plan, tmp_path / "out", calibration(WINDOWS, 16))
    assert {outcome.role for outcome in made.outcomes} == {"o_proj"}
    source, written = experts(kimi[0]), experts(tmp_path / "out")
    assert all(torch.equal(written[name], values) for name, values in source.items())


def test_kept_fp8_is_served_with_quantized_activations_in_calibration(wide, tmp_path):
    """As FP8 that is made is: the stream that GPTQ sees is the artifact's, whatever its source."""
    text = '{roles: ["routed.*"], scheme: int4-g32, method: gptq}, {roles: [o_proj, q_proj], scheme: fp8-channel}'
    first = tmp_path / "fp8"
    run(planned(wide, rules("{roles: [o_proj, q_proj], scheme: fp8-channel}")), first)
    run(planned(first, rules(text)), tmp_path / "kept", calibration(WINDOWS, 16))
    values = {
        weight.spec.name: open_checkpoint(first).decode(weight, torch.float32)
        for weight in open_checkpoint(first).weights
    }
    again = tiny.write_checkpoint(tmp_path / "again", WIDE, values)
    run(planned(again, rules(text)), tmp_path / "made", calibration(WINDOWS, 16))
    kept, made = tensors(tmp_path / "kept"), tensors(tmp_path / "made")
    packed = [name for name in made if name.endswith("weight_packed")]
    assert packed
    assert all(torch.equal(kept[name], made[name]) for name in packed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"ignore": ["lm_head", r"re:.*experts\.0\.down.*"]}, r"experts\.0\.down_proj is quantized, but .* left out"),
        ({"ignore": ["re:(*"]}, r"quantization_config has 're:\(\*' in ignore, which is no pattern"),
    ],
)
def test_int4_that_is_not_what_config_json_says_is_an_error(words, message, wide, tmp_path):
    model, _ = write_int4(tmp_path, wide, **words)
    with pytest.raises(InputError, match=message):
        open_checkpoint(model)


@pytest.mark.parametrize("source", ["INT4", "FP8"])
def test_statistics_are_those_of_the_values(source, kimi, blocks, tmp_path):
    if source == "INT4":
        model, plain = kimi
    else:
        model = write_blocks(tmp_path / "model", blocks[0], torch.float8_e8m0fnu, scale_fmt="ue8m0")
        plain = tiny.write_checkpoint(tmp_path / "plain", WIDE, blocks[1])
    found, wanted = {}, {}
    for folder, into in ((model, found), (plain, wanted)):
        work = tmp_path / f"{folder.name}-work"
        work.mkdir()
        collect(open_checkpoint(folder), work, calibration(2, 16))
        for file in sorted(work.glob("layer-*.safetensors")):
            into.update({f"{file.stem}.{name}": tensor for name, tensor in load_file(file).items()})
    assert wanted
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
