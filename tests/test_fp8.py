"""The FP8 codecs, bit for bit: against float64 arithmetic, torch's own conversion and compressed-tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2quant.formats.codec import Inputs, NonFiniteError
from dsv2quant.formats.e4m3 import E4M3_VALUES, MIN_SCALE
from dsv2quant.formats.fp8 import decode_block_to_float32
from dsv2quant.formats.schemes import CODECS

GRIDS = ("block", "channel", "tensor")
SHAPES = [(1, 1), (3, 5), (128, 128), (129, 127), (576, 256), (200, 704), (256, 1)]
NUMPY = {"F8_E4M3": np.uint8, "F32": np.float32}


def to_bf16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def weights(shape: tuple[int, int], dtype: str, seed: int = 0) -> np.ndarray:
    """Values over many binades, a zero row, and both zeros."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) * np.exp2(rng.integers(-12, 4, shape))).astype(np.float32)
    if shape[0] > 2:
        x[1] = 0.0
        x[2, 0] = -0.0
    return to_bf16(x) if dtype == "bf16" else x


def as_float32(weight: np.ndarray) -> np.ndarray:
    return weight if weight.dtype == np.float32 else (weight.astype(np.uint32) << 16).view(np.float32)


def divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """float32 division through float64: rounding twice is exact here, since 53 ≥ 2·24 + 2 bits."""
    return (x.astype(np.float64) / y.astype(np.float64)).astype(np.float32)


def nearest_e4m3(y: np.ndarray) -> np.ndarray:
    """Codes of the nearest values, ties to the even code, saturating: by search in the table of values."""
    magnitudes = E4M3_VALUES[:127].astype(np.float64)  # 0 … 448
    wanted = np.minimum(np.abs(y.astype(np.float64)), 448.0)
    above = np.clip(np.searchsorted(magnitudes, wanted), 1, 126)
    low, high = wanted - magnitudes[above - 1], magnitudes[above] - wanted
    code = np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)
    return (code + 128 * np.signbit(y)).astype(np.uint8)


def expected(weight: np.ndarray, grid: str) -> tuple[np.ndarray, np.ndarray]:
    x = as_float32(weight)
    rows, cols = x.shape
    if grid == "block":
        padded = np.zeros((-(-rows // 128) * 128, -(-cols // 128) * 128), np.float32)
        padded[:rows, :cols] = np.abs(x)
        amax = padded.reshape(padded.shape[0] // 128, 128, -1, 128).max((1, 3))
    elif grid == "channel":
        amax = np.abs(x).max(1, keepdims=True)
    else:
        amax = np.abs(x).max().reshape(1)
    scale = np.maximum(divide(amax, np.full_like(amax, 448)), np.float32(MIN_SCALE))
    scale[amax == 0] = 1
    spread = scale.repeat(128, 0).repeat(128, 1)[:rows, :cols] if grid == "block" else np.broadcast_to(scale, x.shape)
    return nearest_e4m3(divide(x, spread)), scale


def encode(weight: np.ndarray, grid: str, device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    (parts,) = CODECS[f"fp8-{grid}"].encode([weight], device)
    codes, scales = parts.values()
    return codes, scales


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_equal_float64_arithmetic(grid, dtype, shape):
    weight = weights(shape, dtype)
    codes, scales = encode(weight, grid)
    want_codes, want_scales = expected(weight, grid)
    np.testing.assert_array_equal(scales, want_scales)
    np.testing.assert_array_equal(codes, want_codes)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_torch_path_gives_the_same_bytes(grid, dtype, shape):
    weight = weights(shape, dtype, seed=1)
    for compiled, torched in zip(encode(weight, grid), encode(weight, grid, "cpu:0"), strict=True):
        assert compiled.dtype == torched.dtype
        np.testing.assert_array_equal(compiled, torched)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_layout_predicts_what_encode_returns(grid, shape):
    codec = CODECS[f"fp8-{grid}"]
    (parts,) = codec.encode([weights(shape, "bf16")])
    assert [(suffix, array.shape, array.dtype) for suffix, array in parts.items()] == [
        (part.suffix, part.shape, NUMPY[part.dtype]) for part in codec.layout(shape)
    ]
    assert [array.nbytes for array in parts.values()] == [part.nbytes for part in codec.layout(shape)]


def test_every_bf16_value_rounds_as_torch_rounds():
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    x = as_float32(bits)
    bits = bits[np.abs(x) <= 448].reshape(1, -1)  # the largest is 448, so that the scale is exactly 1
    codes, scales = encode(bits, "tensor")
    assert scales[0] == 1
    theirs = torch.from_numpy(as_float32(bits)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(codes, theirs)
    np.testing.assert_array_equal(codes, nearest_e4m3(as_float32(bits)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=300))
def test_any_finite_row(row):
    weight = np.array([row], np.float32)
    for grid in GRIDS:
        codes, scales = encode(weight, grid)
        want_codes, want_scales = expected(weight, grid)
        np.testing.assert_array_equal(scales, want_scales)
        np.testing.assert_array_equal(codes, want_codes)


def test_the_table_of_values_is_torchs():
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(E4M3_VALUES, theirs)


@pytest.mark.parametrize("grid", GRIDS)
def test_zero_and_tiny_weights_have_usable_scales(grid):
    codes, scales = encode(np.zeros((2, 3), np.float32), grid)
    assert (scales == 1).all()
    assert not codes.any()
    codes, scales = encode(np.full((2, 3), 1e-45, np.float32), grid)  # amax / 448 underflows to zero
    assert (scales == np.float32(MIN_SCALE)).all()
    assert not codes.any()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_with_its_first_index(grid, device, dtype, value):
    x = weights((200, 150), "f32")
    x[130, 7] = x[170, 149] = value
    bad = to_bf16(x) if dtype == "bf16" else x
    with pytest.raises(NonFiniteError) as error:
        CODECS[f"fp8-{grid}"].encode([weights((200, 150), dtype), bad], device)
    assert (error.value.which, error.value.index) == (1, (130, 7))


def test_a_group_shares_one_scale():
    small, large = weights((64, 32), "bf16"), weights((32, 32), "bf16", seed=2)
    for device in ("cpu", "cpu:0"):
        first, second = CODECS["fp8-tensor"].encode([small, large], device)
        _, alone = expected(np.concatenate([small, large]), "tensor")
        np.testing.assert_array_equal(first["weight_scale"], alone)
        np.testing.assert_array_equal(second["weight_scale"], alone)
        np.testing.assert_array_equal(
            np.concatenate([first["weight"], second["weight"]]), expected(np.concatenate([small, large]), "tensor")[0]
        )


@pytest.mark.parametrize("grid", GRIDS)
def test_decode_is_the_float32_product_rounded_once(grid):
    weight = weights((200, 704), "bf16")
    codec = CODECS[f"fp8-{grid}"]
    (encoded,) = codec.encode([weight])
    parts = {suffix: torch.from_numpy(array) for suffix, array in encoded.items()}
    parts["weight"] = parts["weight"].view(torch.float8_e4m3fn)
    scale = parts[codec.layout((200, 704))[1].suffix].numpy()
    if grid == "block":
        scale = scale.repeat(128, 0).repeat(128, 1)[:200, :704]
    exact = E4M3_VALUES[encoded["weight"]].astype(np.float64) * scale.astype(np.float64)
    want = torch.from_numpy(exact.astype(np.float32))  # a product of 4 and 24 bits: float64 is exact
    assert torch.equal(codec.decode(parts, torch.float32), want)
    assert torch.equal(codec.decode(parts, torch.bfloat16), want.to(torch.bfloat16))
    rounded = torch.from_numpy(scale).to(torch.bfloat16).float() * parts["weight"].float()
    assert torch.equal(codec.decode(parts, torch.bfloat16, torch.bfloat16), rounded.to(torch.bfloat16))
    # Half a step of 3 mantissa bits, and half of the subnormal step below amax / 448 · 2^-6.
    error = np.abs(want.numpy() - as_float32(weight))
    assert (error <= np.maximum(np.abs(as_float32(weight)) * 2.0**-4, scale * 2.0**-10) * (1 + 1e-6)).all()


def test_block_decode_without_torch_equals_decode():
    (encoded,) = CODECS["fp8-block"].encode([weights((200, 704), "bf16")])
    codes, scales = encoded["weight"], encoded["weight_scale_inv"]
    parts = {"weight": torch.from_numpy(codes).view(torch.float8_e4m3fn), "weight_scale_inv": torch.from_numpy(scales)}
    ours = decode_block_to_float32(codes, scales)
    np.testing.assert_array_equal(ours, CODECS["fp8-block"].decode(parts, torch.float32).numpy())


@pytest.mark.parametrize("grid", ["channel", "tensor"])
def test_scales_and_codes_equal_compressed_tensors(grid):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=8, type="float", strategy=grid, symmetric=True, dynamic=False)
    weight = weights((200, 704), "f32")
    weight[1:3] = 1  # their scale of an all-zero row is an epsilon, ours is 1; and they lose the sign of zero
    x = torch.from_numpy(weight)
    least, most = (x.amin(1, keepdim=True), x.amax(1, keepdim=True)) if grid == "channel" else (x.min(), x.max())
    scale, zero_point = calculate_qparams(least, most, args)
    theirs = quantize(x, scale, zero_point, args, dtype=torch.float8_e4m3fn)
    codes, scales = encode(weight, grid)
    np.testing.assert_array_equal(scales, scale.numpy())
    np.testing.assert_array_equal(codes, theirs.view(torch.uint8).numpy())


def test_no_encoding_aliases_its_input():
    # convert reads every step into the same buffer
    for codec in CODECS.values():
        weight = weights((256, 128), "bf16")
        (parts,) = codec.encode([weight], inputs=[Inputs(np.ones(128, np.float32), 1.0)])
        assert not any(np.shares_memory(array, weight) for array in parts.values())
