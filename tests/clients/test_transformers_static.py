"""Static input scales in transformers: what it takes of compressed-tensors' layout, and that it loses AutoFP8's."""

from __future__ import annotations

import pytest
import static
import tiny
import torch
from test_transformers import DTYPES, like_transformers, load, their_weight

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model

# Tensor scales for every consumer are mixed with channel scales, for transformers alone not.
ARTIFACTS = {"every consumer": None, "transformers": ("transformers",)}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """{name: folder} of dsv2-mini."""
    folder = tmp_path_factory.mktemp("static")
    for i, targets in enumerate(ARTIFACTS.values()):
        static.write(tiny.MINI, folder / str(i), "fp8-static", for_targets=targets)
    return {name: folder / str(i) for i, name in enumerate(ARTIFACTS)}


@pytest.mark.parametrize("name", ARTIFACTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dequantize", [False, True])
def test_weights_and_scales_are_ours_and_logits_our_runtimes(name, dtype, dequantize, artifacts, one_library):
    folder, torch_dtype = artifacts[name], DTYPES[dtype]
    theirs = load(folder, torch_dtype, dequantize)
    given = {module: child.input_scale for module, child in theirs.named_modules() if hasattr(child, "input_scale")}
    checkpoint = open_checkpoint(folder)
    tokens = static.some_tokens(checkpoint, 2, 24)
    with torch.inference_mode():
        want = theirs(tokens).logits.double()
    state = theirs.state_dict()  # after the first forward pass, which is when compressed-tensors decompresses
    rounding = torch.bfloat16 if torch_dtype == torch.bfloat16 and not dequantize else None
    for weight in checkpoint.weights:
        routed = weight.spec.role.startswith("routed.")
        ours = checkpoint.decode(weight, torch_dtype, scale_dtype=None if routed else rounding)
        assert torch.equal(their_weight(state, weight.spec.name), ours), weight.spec.name
        # Experts are no modules there: their input scales are dropped, and their inputs not quantized.
        takes_inputs = weight.scheme == "fp8-static" and not dequantize and not routed
        assert (weight.spec.module in given) is takes_inputs, weight.spec.name
        if takes_inputs:
            scale = checkpoint.tensor(weight.parts["input_scale"])
            assert torch.equal(given[weight.spec.module], scale.to(rounding or torch.float32))

    options = LoadOptions(torch_dtype, "cpu", dequantize, rounding)
    model = Model(checkpoint, options)
    assert all(torch.equal(static.watch(model)[module].input_scale, scale.float()) for module, scale in given.items())
    got = like_transformers(checkpoint, options).forward(tokens).double()
    error = float((got - want).norm() / want.norm())
    if torch_dtype == torch.float32:
        assert error < (1e-5 if dequantize else 1e-2)  # as for the other schemes: see test_transformers.py
        if not dequantize:  # the engines quantize experts' inputs too, and that is another result
            served = Model(checkpoint, options).forward(tokens).double()
            assert float((served - want).norm() / want.norm()) > 2 * error
    else:
        exact = like_transformers(checkpoint, LoadOptions(weight_only=dequantize)).forward(tokens).double()
        assert error < 2 * float((want - exact).norm() / exact.norm())


def test_kv_scales_are_taken_for_the_latent_and_for_the_rotated_key(tmp_path, lite, monkeypatch):
    """One scale for the latent under `k`, one for k_pe under `v`: what is cached is e4m3 of both, nothing clipped."""
    import compressed_tensors.modeling.kvcache as cache

    magnitude = 6.0
    static.write(lite, tmp_path / "out", "fp8-static", kv=magnitude)
    theirs = load(tmp_path / "out", torch.float32, False)
    scale = torch.tensor([magnitude / 448])
    for layer in range(3):
        assert torch.equal(theirs.state_dict()[f"model.layers.{layer}.self_attn.k_scale"], scale)
        assert torch.equal(theirs.state_dict()[f"model.layers.{layer}.self_attn.v_scale"], scale)
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    plain = cache.forward_quantize

    def spy(module, value, name, args):
        quantized = plain(module, value, name, args)
        seen.append((name, value, quantized))
        return quantized

    monkeypatch.setattr(cache, "forward_quantize", spy)
    checkpoint = open_checkpoint(tmp_path / "out")
    with torch.inference_mode():
        theirs(static.some_tokens(checkpoint, 2, 24))
    config = checkpoint.config
    assert [(name, value.shape[-1]) for name, value, _ in seen] == [
        ("k", config.kv_lora_rank), ("v", config.qk_rope_head_dim)
    ] * 3  # fmt: skip
    for _, value, quantized in seen:
        assert value.abs().max() <= magnitude
        want = (value / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        assert torch.equal(quantized, want)


def test_autofp8_does_not_load(tmp_path, lite):
    """Its scales are unknown there, and the codes are taken for weights."""
    static.write(lite, tmp_path / "out", "fp8-autofp8")
    theirs = load(tmp_path / "out", torch.bfloat16, False)
    checkpoint = open_checkpoint(tmp_path / "out")
    weight = next(w for w in checkpoint.weights if w.spec.role == "o_proj")
    codes = checkpoint.tensor(weight.parts["weight"])
    assert torch.equal(theirs.get_parameter(weight.spec.name).float(), codes.float())
    assert codes.float().norm() > 100 * checkpoint.decode(weight, torch.float32).norm()
