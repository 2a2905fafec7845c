"""FP8 with static input scales: the two codecs, the runtime's arithmetic, and the scale of an MLA cache."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fp8 import expected, weights

from dsv2quant.calib.statistics import kv_scales
from dsv2quant.formats.codec import Inputs, NonFiniteError
from dsv2quant.formats.e4m3 import MIN_SCALE, scale_of, scales_of
from dsv2quant.formats.schemes import CODECS
from dsv2quant.kernels.reference import dequantize_activation, linear, quantize_activation

SHAPES = {"fp8-static": (1,), "fp8-autofp8": ()}
schemes = pytest.mark.parametrize("scheme", SHAPES)


def inputs(*amaxes: float) -> list[Inputs]:
    return [Inputs(np.ones(1, np.float32), amax) for amax in amaxes]


@schemes
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_codes_and_weight_scales_are_the_tensor_schemes_and_input_scales_amax_over_448(scheme, device, dtype):
    pair = [weights((64, 96), dtype), weights((33, 96), dtype, seed=1)]
    codec = CODECS[scheme]
    found = codec.encode(pair, device, "rtn", inputs(7.0, 0.3))
    codes, scale = expected(np.concatenate(pair), "tensor")  # both share the weights' scale
    np.testing.assert_array_equal(np.concatenate([parts["weight"] for parts in found]), codes)
    for weight, parts, amax in zip(pair, found, (7.0, 0.3), strict=True):
        layout = codec.layout(weight.shape)
        assert [(p.suffix, p.dtype, p.shape) for p in layout] == [
            ("weight", "F8_E4M3", weight.shape),
            ("weight_scale", "F32", SHAPES[scheme]),
            ("input_scale", "F32", SHAPES[scheme]),
        ]
        assert [(s, a.shape, a.nbytes) for s, a in parts.items()] == [(p.suffix, p.shape, p.nbytes) for p in layout]
        assert parts["weight_scale"] == scale
        # The nearest float32 to float32(amax) / 448: float64 holds twice the digits, and rounds alike.
        assert parts["input_scale"] == np.float32(np.float64(np.float32(amax)) / 448)
        assert parts["input_scale"].dtype == parts["weight_scale"].dtype == np.float32


@schemes
def test_decode_is_the_tensor_schemes(scheme):
    weight = weights((40, 56), "bf16")
    (parts,) = CODECS[scheme].encode([weight], inputs=inputs(1.0))
    (plain,) = CODECS["fp8-tensor"].encode([weight])

    def tensors(found):
        made = {suffix: torch.from_numpy(array) for suffix, array in found.items()}
        return made | {"weight": made["weight"].view(torch.float8_e4m3fn)}

    for dtype, scale_dtype in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.bfloat16)):
        want = CODECS["fp8-tensor"].decode(tensors(plain), dtype, scale_dtype)
        assert torch.equal(CODECS[scheme].decode(tensors(parts), dtype, scale_dtype), want)


@schemes
def test_encoding_needs_the_inputs_of_every_weight(scheme):
    pair = [weights((8, 8), "bf16"), weights((8, 8), "bf16", seed=1)]
    for known in ((), inputs(1.0)):
        with pytest.raises(ValueError, match="needs the inputs of every weight"):
            CODECS[scheme].encode(pair, inputs=known)


@schemes
def test_a_weight_that_is_not_finite_is_named(scheme):
    bad = weights((8, 8), "f32")
    bad[3, 4] = np.nan
    with pytest.raises(NonFiniteError) as error:
        CODECS[scheme].encode([weights((8, 8), "f32"), bad], inputs=inputs(1.0, 1.0))
    assert (error.value.which, error.value.index) == (1, (3, 4))


@given(st.floats(min_value=0, width=32, allow_nan=False, allow_infinity=False))
def test_one_scale_is_what_torch_makes_of_a_tensor(amax):
    assert scale_of(amax) == scales_of(torch.tensor([amax])).numpy()[0]


def test_what_was_never_seen_or_is_tiny_has_a_usable_scale():
    assert scale_of(0.0) == 1
    assert scale_of(1e-45) == np.float32(MIN_SCALE)
    for wrong in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="no largest magnitude"):
            scale_of(wrong)


def test_static_quantization_is_compressed_tensors_and_clips():
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    x = torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([float(x.abs().max()) / 2 / 448])  # half of the range that would hold all
    codes, same = quantize_activation(x, "static", scale)
    assert same is scale
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.float().abs().max() == 448
    args = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
    theirs = fake_quantize(x, scale, torch.zeros(1), args)
    assert torch.equal(dequantize_activation(codes, scale), theirs)
    assert torch.equal(quantize_activation(x.to(torch.bfloat16), "static", scale)[0].float() * scale,
                       fake_quantize(x.to(torch.bfloat16).float(), scale, torch.zeros(1), args))  # fmt: skip


def test_the_linear_layer_takes_the_given_scale():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((7, 300), (40, 300), (40,)))
    scale = torch.tensor([0.02])
    served = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()
    want = served @ weight.double().T + bias.double()
    got = linear(x, weight, bias, "static", scale)
    # 300 float32 products and sums: √300 · 2^-24
    assert (got.double() - want).norm() / want.norm() < 2e-6
    assert (linear(x, weight, bias).double() - want).norm() / want.norm() > 1e-3


def largest_over_positions(pairs: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> float:
    """The largest magnitude of rotated pairs [pairs, 2], each turned by its frequency at every position."""
    angles = positions[:, None] * frequencies  # [positions, pairs]
    first = pairs[:, 0] * np.cos(angles) - pairs[:, 1] * np.sin(angles)
    second = pairs[:, 0] * np.sin(angles) + pairs[:, 1] * np.cos(angles)
    return float(np.abs(np.stack([first, second])).max())


def test_the_kv_scale_holds_every_position_and_no_smaller_one_does():
    rng = np.random.default_rng(0)
    frequencies = 1e4 ** -(np.arange(32) / 32)
    pairs = rng.standard_normal((32, 2))
    radius = float(np.hypot(*pairs.T).max())
    scale = float(kv_scales(0.5, radius, is_mla=True)[0])
    near = largest_over_positions(pairs, np.arange(16), frequencies)
    ever = largest_over_positions(pairs, np.arange(160_000), frequencies)
    assert near < 0.999 * ever  # what a short calibration sees is not enough
    assert ever <= 448 * scale * (1 + 2e-7)  # 1 ulp of float32
    # The slowest pair turns three times, and all come closer to an axis than 0.04 radian, whose cosine is 0.9992.
    assert ever > 0.999 * 448 * scale


@pytest.mark.parametrize(("latent", "radius"), [(3.0, 2.0), (2.0, 3.0), (0.0, 3.0), (3.0, 0.0)])
def test_the_kv_scale_covers_latents_and_keys(latent, radius):
    scale = kv_scales(latent, radius, is_mla=True)[0]
    assert scale == np.float32(3.0 / 448)
    assert scale.dtype == np.float32
    # Nothing within the bound is clipped: codes of the extremes are the largest.
    codes = (torch.tensor([3.0, -3.0]) / torch.tensor(float(scale))).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert codes.float().tolist() == [448, -448]


def test_the_kv_scale_of_nothing_and_of_what_is_not_finite():
    assert kv_scales(0.0, 0.0, is_mla=True)[0] == 1
    for latent, radius in ((math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="no largest magnitude"):
            kv_scales(latent, radius, is_mla=True)[0]
