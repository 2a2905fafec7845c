"""INT8: numbers as compressed-tensors', activations as vLLM's, artifacts that verify, and what consumers refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.formats.codec import NonFiniteError
from dsv2quant.formats.int8 import Int8
from dsv2quant.kernels import reference
from dsv2quant.planning import consumers, recipe
from dsv2quant.planning.plan import make_plan

SCHEME = preset_name_to_scheme("W8A8", ["Linear"])


def awkward() -> torch.Tensor:
    """Rows far apart in size, of zeros, of subnormals, of ties, and with one outlier of either sign."""
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    x *= torch.exp2(8 * torch.arange(16) - 64.0)[:, None]
    x[3], x[4] = 0, 1e-39
    x[5] = torch.arange(256) / 2 - 64  # its largest magnitude is negative
    x[6, 0], x[7, 0] = 1e30, -1e30
    return x.bfloat16().float()


def torch_parts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = Int8().encode([x.numpy()])[0]
    return {
        "weight": torch.from_numpy(parts["weight"]),
        "weight_scale": torch.from_numpy(parts["weight_scale"].view(np.int16)).view(torch.bfloat16),
    }


def test_codes_and_weights_are_compressed_tensors_under_the_same_scales():
    x = awkward()
    parts = torch_parts(x)
    theirs = IntQuantizationCompressor.compress({"weight": x, "weight_scale": parts["weight_scale"].float()}, SCHEME)
    assert torch.equal(parts["weight"], theirs["weight"])
    for dtype in (torch.float32, torch.bfloat16):
        stored = parts | {"weight_scale": parts["weight_scale"].to(dtype)}
        assert torch.equal(Int8().decode(parts, dtype), IntQuantizationCompressor.decompress(stored, SCHEME)["weight"])


def test_every_rows_largest_weight_is_a_code_and_none_is_clipped():
    x = awkward()
    parts = torch_parts(x)
    scales, codes = parts["weight_scale"].float(), parts["weight"]
    large = x.abs().amax(1) >= 127 * 2.0**-126
    assert (codes[large].abs().amax(1) == 127).all()
    assert int(codes.min()) == -127
    off = (codes * scales - x).abs()
    assert (off <= scales * 0.5).all()
    assert (scales >= 2.0**-126).all()  # none is subnormal
    assert (scales[3].item(), codes[3].any().item()) == (1.0, False)


def test_source_dtypes_give_one_result_and_nan_is_refused():
    x = awkward()
    bits = x.bfloat16().view(torch.int16).numpy().view(np.uint16)
    for suffix, part in Int8().encode([bits])[0].items():
        np.testing.assert_array_equal(part, Int8().encode([x.numpy()])[0][suffix])
    with pytest.raises(NonFiniteError):
        Int8().encode([np.array([[1, np.nan]], np.float32)])


def test_activations_are_rounded_per_token():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [-1.0, 0.25, 0.0, 0.1], [0.0, 0.0, 0.0, 0.0]])
    codes, scales = reference.quantize_activation(x, "token-int8")
    assert codes.tolist() == [[127, 0, 2, -2], [-127, 32, 0, 13], [0, 0, 0, 0]]  # ties to even: 0.5, 1.5, -2.5
    assert scales.flatten().tolist() == [1.0, float(np.float32(1) / np.float32(127)), 1.0]
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    want = (codes.double() * scales.double()) @ weight.double().T
    assert torch.allclose(reference.linear(x, weight, activation="token-int8").double(), want, rtol=1e-5)


def test_an_identity_gives_kv_b_as_vllm_reads_it():
    """quant_utils.py, get_and_maybe_dequant_weights: rows of an identity, in BF16, through the layer."""
    parts = torch_parts(awkward()[5:15])
    weight = Int8().decode(parts, torch.float32)
    rows = reference.linear(torch.eye(256, dtype=torch.bfloat16), weight, activation="token-int8")
    assert torch.equal(rows.T, Int8().decode(parts, torch.bfloat16))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Of dsv2-mini, for vLLM and for transformers."""
    folder = tmp_path_factory.mktemp("int8")
    for target in ("vllm", "transformers"):
        plan = make_plan(open_checkpoint(tiny.MINI), recipe.builtin("int8"), for_targets=(target,))
        convert(plan, folder / target, command="")
    return folder


def test_everything_is_int8_for_vllm_and_experts_are_fp8_for_transformers(artifacts):
    for target, experts in (("vllm", "int8-channel"), ("transformers", "fp8-channel")):
        weights = open_checkpoint(artifacts / target).weights
        schemes = {(w.spec.role.startswith("routed."), w.scheme) for w in weights}
        assert schemes == {(False, "bf16"), (False, "int8-channel"), (True, experts)}
    config = json.loads((artifacts / "vllm" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    assert config["config_groups"] == {
        "group_0": {
            "targets": ["Linear"],
            "weights": eight | {"strategy": "channel", "dynamic": False},
            "input_activations": eight | {"strategy": "token", "dynamic": True},
            "output_activations": None,
            "format": "int-quantized",
        }
    }


def test_default_targets_load_all_of_it():
    config = open_checkpoint(tiny.MINI).config
    assert consumers.choose(None, {"bf16", "int8-channel"}, config) == ("vllm",)
    assert consumers.choose(("transformers", "vllm"), {"int8-channel"}, config) == ("vllm", "transformers")


def test_verify_and_eval_ppl(artifacts, cli, tmp_path):
    verified = cli("verify", artifacts / "vllm", "--source", tiny.MINI, "--json")
    assert verified.code == 0, verified.err
    text = tmp_path / "fox.txt"
    text.write_text("".join(f"The quick brown fox jumps over {i} lazy dogs.\n" for i in range(200)))
    words = ("--text", text, "--ctx", 64, "--limit", 4, "--reference", tiny.MINI, "--json", "-q")
    scored = cli("eval-ppl", artifacts / "vllm", *words)
    assert scored.code == 0, scored.err
    assert 0 < json.loads(scored.out)["kld"]["mean"] < 0.01


def test_a_copy_has_the_bytes_of_the_weights(artifacts):
    checkpoint = open_checkpoint(artifacts / "vllm")
    source = {weight.spec.name: weight for weight in open_checkpoint(tiny.MINI).weights}
    weight = next(w for w in checkpoint.weights if w.spec.role == "o_proj")
    original = open_checkpoint(tiny.MINI).decode(source[weight.spec.name], torch.float32)
    assert torch.equal(checkpoint.decode(weight, torch.float32), Int8().decode(torch_parts(original), torch.float32))
    assert 0.004 < float((checkpoint.decode(weight, torch.float32) - original).norm() / original.norm()) < 0.02


def test_sglang_has_no_row(cli):
    ran = cli("plan", tiny.MINI, "--int8", "--target", "sglang")
    assert (ran.code, ran.out) == (2, "")
    assert "sglang: no rule for scheme int8-channel" in ran.err
    assert ran.err.count("\n") == 1
