"""INT4, INT3 and INT2: packing and scales bit for bit compressed-tensors', codes and searches against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fp8 import as_float32, divide, to_bf16

from dsv2quant.formats.codec import Inputs, NonFiniteError
from dsv2quant.formats.cpu import nearest_codes, rtn_scales, search_scales
from dsv2quant.formats.integers import factors, levels
from dsv2quant.formats.schemes import CODECS

SCHEMES = ("int4-g128", "int4-g64", "int4-g32", "int4-channel")
FEW = ("int3-g128", "int3-g64", "int3-g32", "int2-g128", "int2-g64", "int2-g32")
# Rows around the search's tiles of 16; columns of one and several groups.
SHAPES = [(1, 128), (3, 256), (16, 128), (17, 384), (40, 128)]
NUMPY = {"I32": np.int32, "BF16": np.uint16, "I64": np.int64}
U = 2.0**-24  # float32's largest relative rounding error


def weights(shape: tuple[int, int], dtype: str, seed: int = 0) -> np.ndarray:
    """Rows of different sizes; a zero row and -0.0."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) * np.exp2(rng.integers(-20, 8, (shape[0], 1)))).astype(np.float32)
    if shape[0] > 2:
        x[1] = 0.0
        x[2, 0] = -0.0
    return to_bf16(x) if dtype == "bf16" else x


def group_of(scheme: str, cols: int) -> int:
    return CODECS[scheme].group_size or cols


def bits_of(scheme: str) -> int:
    return CODECS[scheme].integers.bits


def flat(weight: np.ndarray) -> Inputs:
    """Inputs that make no difference between channels."""
    return Inputs(np.ones(weight.shape[1], np.float32), 1.0)


def encode(
    weight: np.ndarray, scheme: str, method: str = "rtn", inputs: Inputs | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(codes, unpacked by compressed-tensors, and scales float32)."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    (parts,) = CODECS[scheme].encode([weight], method=method, inputs=[inputs or flat(weight)])
    codes = unpack_from_int32(torch.from_numpy(parts["weight_packed"]), bits_of(scheme), torch.Size(weight.shape))
    return codes.numpy(), as_float32(parts["weight_scale"])


def spread(scales: np.ndarray, cols: int) -> np.ndarray:
    return scales.repeat(cols // scales.shape[1], 1)


def expected_rtn(weight: np.ndarray, scheme: str) -> tuple[np.ndarray, np.ndarray]:
    x = as_float32(weight)
    rows, cols = x.shape
    amax = np.abs(x).reshape(rows, -1, group_of(scheme, cols)).max(2)
    scales = as_float32(to_bf16(divide(amax, np.full_like(amax, {4: 7.5, 3: 3.5, 2: 1.5}[bits_of(scheme)]))))
    scales[scales == 0] = 1
    # Two BF16 values: the exact quotient is never so near a tie that float32 would move it there.
    quotient = x.astype(np.float64) / spread(scales, cols)
    quotient = quotient if weight.dtype == np.uint16 else divide(x, spread(scales, cols)).astype(np.float64)
    return np.clip(np.rint(quotient), *levels(bits_of(scheme))), scales


def assert_rtn(weight: np.ndarray, scheme: str) -> None:
    codes, scales = encode(weight, scheme)
    want_codes, want_scales = expected_rtn(weight, scheme)
    np.testing.assert_array_equal(scales, want_scales)
    np.testing.assert_array_equal(codes, want_codes)


def candidate_errors(x: np.ndarray, importance: np.ndarray, group: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Every candidate scale [rows, groups, factors] and, in float64, what it loses."""
    low, high = levels(bits)
    amax = np.abs(x).reshape(len(x), -1, group).max(2)
    unit = divide(amax, np.full_like(amax, high))
    scales = as_float32(to_bf16(unit[..., None] * factors(bits))).astype(np.float64)
    scales[scales == 0] = 1
    values = x.astype(np.float64).reshape(len(x), -1, 1, group)
    weighted = np.broadcast_to(importance.astype(np.float64), x.shape).reshape(values.shape)
    steps = scales[..., None]
    lost = weighted * (np.clip(np.rint(values / steps), low, high) * steps - values) ** 2
    return scales, lost.sum(-1)


def assert_searched(x: np.ndarray, importance: np.ndarray, group: int, bits: int = 4) -> int:
    """The scale of least error, up to what float32 can tell; how many groups have another than float64's choice.

    In float32 each term is rounded four times (the difference, twice, and two products) and the sum of `group` terms
    as often. A quotient of 8 or less is off by 8 U, and rounding it to the wrong side of a tie makes a term larger by
    (1/2 + 8U)² / (1/2 - 8U)² ≈ 1 + 64 U. Two candidates within twice that can change places.
    """
    got = search_scales(x, importance, group, bits)
    scales, errors = candidate_errors(x, importance, group, bits)
    assert (scales == got[..., None]).any(-1).all()
    of_got = np.where(scales == got[..., None], errors, np.inf).min(-1)
    assert (of_got <= errors.min(-1) * (1 + 2 * (group + 68) * U)).all()
    best = np.take_along_axis(scales, errors.argmin(-1)[..., None], -1)[..., 0]
    return int((best != got).sum())


@pytest.mark.parametrize("scheme", SCHEMES + FEW)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rtn_codes_and_scales_equal_float64_arithmetic(scheme, dtype, shape):
    assert_rtn(weights(shape, dtype), scheme)


@pytest.mark.parametrize("shape", [(1, 8), (5, 24), (17, 1000)])
def test_channels_need_only_whole_words(shape):
    assert CODECS["int4-channel"].refusal(shape) is None
    assert_rtn(weights(shape, "bf16"), "int4-channel")


def test_ties_round_to_even_and_ends_are_clamped():
    row = np.array([7.5, -7.5, 6.5, 5.5, 0.5, -0.5, 1.5, -2.5], np.float32)  # the scale is a power of two
    for scale in (1.0, 2.0**-30, 2.0**20):
        codes, scales = encode(row[None] * np.float32(scale), "int4-channel")
        assert scales == scale
        assert codes.tolist() == [[7, -8, 6, 6, 0, 0, 2, -2]]


def test_scales_at_ties_round_to_even():
    halfway = 1 + (2 * np.arange(128, dtype=np.float32) + 1) / 256  # between neighbours among BF16's 8 bits
    scales = rtn_scales(7.5 * halfway[:, None].repeat(32, 1), 32)
    np.testing.assert_array_equal(scales[:, 0], as_float32(to_bf16(halfway)))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 3),
    st.sampled_from(SCHEMES + FEW),
    st.sampled_from(["bf16", "f32"]),
    st.integers(0),
)
def test_any_shape(rows, groups, scheme, dtype, seed):
    cols = groups * (CODECS[scheme].group_size or 8)
    weight = weights((rows, cols), dtype, seed)
    assert_rtn(weight, scheme)
    rng = np.random.default_rng(seed)
    importance = rng.chisquare(1, (rng.choice([1, rows]), cols)).astype(np.float32)
    assert_searched(as_float32(weight), importance, group_of(scheme, cols), bits_of(scheme))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32))
def test_any_finite_row(row):
    assert_rtn(np.array([row], np.float32), "int4-g32")


@pytest.mark.parametrize("method", ["rtn", "mse"])
@pytest.mark.parametrize("scheme", ["int4-g32", "int3-g32", "int2-g32"])
def test_zero_and_tiny_weights_have_usable_scales(method, scheme):
    smallest = np.full((2, 32), 1e-45, np.float32)  # amax / 7 underflows to zero in BF16
    for x in (np.zeros((2, 32), np.float32), np.full((2, 32), -0.0, np.float32), smallest):
        codes, scales = encode(x, scheme, method)
        assert (scales == 1).all()
        assert not codes.any()


def test_subnormal_scales_are_scales_too():
    codes, scales = encode(np.full((2, 32), -(2.0**-126), np.float32), "int4-g32")
    np.testing.assert_array_equal(scales, np.float32(17 * 2.0**-133))  # 2^-126 / 7.5 = 17.07 · 2^-133
    assert (codes == -8).all()


@pytest.mark.parametrize("scheme", SCHEMES + FEW)
@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_packing_equals_compressed_tensors(scheme, method):
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    weight = weights((17, 384), "f32")
    (parts,) = CODECS[scheme].encode([weight], method=method, inputs=[flat(weight)])
    ours = {name: torch.from_numpy(array) for name, array in parts.items()}
    scales = torch.from_numpy(as_float32(parts["weight_scale"]))
    bits = bits_of(scheme)
    low, high = levels(bits)
    codes = nearest_codes(weight, scales.numpy(), low, high)
    assert set(np.unique(codes)) == set(range(low, high + 1))
    assert torch.equal(ours["weight_packed"], pack_to_int32(torch.from_numpy(codes), bits))
    # Their compressor takes codes with our scales, in float32: in BF16 it would round the quotients.
    args = scheme_of(scheme)
    theirs = PackedQuantizationCompressor.compress({"weight": torch.from_numpy(weight), "weight_scale": scales}, args)
    assert torch.equal(ours["weight_packed"], theirs["weight_packed"])
    assert torch.equal(ours["weight_shape"], theirs["weight_shape"])
    # and gives the weights that we do.
    for dtype in (torch.float32, torch.bfloat16):
        ours["weight_scale"] = scales.to(torch.bfloat16)
        stored = ours | {"weight_scale": scales.to(dtype)}
        plain = PackedQuantizationCompressor.decompress(stored, args)["weight"]
        assert plain.dtype == dtype
        assert torch.equal(plain, CODECS[scheme].decode(ours, dtype))


def scheme_of(scheme: str):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    size = CODECS[scheme].group_size
    group = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    args = QuantizationArgs(num_bits=bits_of(scheme), type="int", symmetric=True, dynamic=False, **group)
    return QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")


def test_the_scale_of_every_bf16_amax_is_compressed_tensors():
    from compressed_tensors.quantization.utils import calculate_qparams

    bits = np.arange(0x7F80, dtype=np.uint16)  # every finite magnitude
    amax = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    theirs, _ = calculate_qparams(-amax, amax, scheme_of("int4-g32").weights)
    ours = rtn_scales(as_float32(bits)[:, None].repeat(32, 1), 32)
    # Up to 3 · 2^-133 the scale underflows: ours is then 1, theirs an epsilon.
    np.testing.assert_array_equal(ours[4:, 0], theirs[4:].float().numpy())
    assert (ours[:4] == 1).all()


@pytest.mark.parametrize("group", [32, 64, 128, 384])
@pytest.mark.parametrize("kind", ["equal", "per column", "per weight"])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_searched_scales_equal_a_search_in_float64(group, kind, dtype, bits):
    x = as_float32(weights((50, 384), dtype, seed=group))
    shape = {"equal": (1, 1), "per column": (1, 384), "per weight": x.shape}[kind]
    rng = np.random.default_rng(group)
    importance = np.ones((1, 384), np.float32) if kind == "equal" else rng.chisquare(1, shape).astype(np.float32)
    if kind != "equal":
        importance[:, ::7] = 0
    others = assert_searched(x, importance, group, bits)
    assert others <= 2  # of 50 to 600 groups: ties within 2^-15 are rare


def test_a_row_is_searched_alike_whatever_stands_beside_it():
    x, importance = as_float32(weights((50, 128), "f32")), weights((50, 128), "f32", seed=1) ** 2
    together = search_scales(x, importance, 32)
    for i in range(50):
        np.testing.assert_array_equal(search_scales(x[i : i + 1], importance[i : i + 1], 32), together[i : i + 1])
    shared = importance[3:4]
    np.testing.assert_array_equal(search_scales(x, shared, 32), search_scales(x, shared.repeat(50, 0), 32))


def test_importance_decides_whom_the_scale_serves():
    x = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32)
    x[:, 0] = 6.0  # an outlier: all 16 levels reach it, or serve the others
    only, never = np.full((1, 64), 1e-6, np.float32), np.ones((1, 64), np.float32)
    only[0, 0], never[0, 0] = 1, 0

    def error(importance: np.ndarray) -> np.ndarray:
        scales = search_scales(x, importance, 64)
        return np.abs(nearest_codes(x, scales) * scales - x)

    assert error(only)[:, 0].max() < 0.02 < 1 < error(never)[:, 0].min()
    assert error(never)[:, 1:].mean() < 0.7 * error(only)[:, 1:].mean()
    np.testing.assert_array_equal(search_scales(x, never, 64), search_scales(x, never * 1024, 64))


@pytest.mark.parametrize("bits", [3, 2])
def test_the_sign_of_a_scale_gives_the_code_more_to_the_side_that_needs_it(bits):
    """Weights that are a grid's codes, and the same turned round: both are found without loss."""
    low, high = levels(bits)
    codes = np.random.default_rng(0).integers(low, high + 1, (20, 64)).astype(np.float32)
    codes[:, ::8] = low
    for x in (codes, -codes):
        scales = search_scales(x, np.ones((1, 64), np.float32), 64, bits)
        turned = nearest_codes(x, scales, low, high) * scales
        assert (np.sign(scales) == np.sign(x[0, 0] * low)).all()
        assert np.abs(turned - x).max() < 0.05  # the candidates stand 2% apart


@pytest.mark.parametrize("method", ["mse", "awq"])
def test_mse_is_the_search_weighted_by_the_inputs_and_loses_less_than_rtn(method):
    importance = np.random.default_rng(1).chisquare(1, 384).astype(np.float32)
    for scheme in SCHEMES:
        weight = weights((40, 384), "bf16")
        x, group = as_float32(weight), group_of(scheme, 384)
        codes, scales = encode(weight, scheme, method, Inputs(importance, 1.0))
        np.testing.assert_array_equal(scales, search_scales(x, importance[None], group))
        np.testing.assert_array_equal(codes, nearest_codes(x, scales))
        plain_codes, plain_scales = encode(weight, scheme)
        lost = (importance * (codes * spread(scales, 384) - x) ** 2).sum()
        assert lost < 0.9 * (importance * (plain_codes * spread(plain_scales, 384) - x) ** 2).sum()


@pytest.mark.parametrize("scheme", SCHEMES + FEW)
@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_layout_predicts_what_encode_returns(scheme, method):
    codec = CODECS[scheme]
    for shape in ((1, 128), (17, 384)):
        (parts,) = codec.encode([weights(shape, "bf16")], method=method, inputs=[flat(np.empty(shape))])
        assert [(suffix, array.shape, array.dtype) for suffix, array in parts.items()] == [
            (part.suffix, part.shape, NUMPY[part.dtype]) for part in codec.layout(shape)
        ]
        assert [array.nbytes for array in parts.values()] == [part.nbytes for part in codec.layout(shape)]
        assert parts["weight_shape"].tolist() == list(shape)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_decode_is_the_float32_product_rounded_once(scheme):
    weight = weights((17, 384), "bf16")
    codec = CODECS[scheme]
    (encoded,) = codec.encode([weight])
    codes, scales = encode(weight, scheme)
    parts = {suffix: torch.from_numpy(array) for suffix, array in encoded.items()}
    parts["weight_scale"] = parts["weight_scale"].view(torch.bfloat16)
    exact = codes.astype(np.float64) * spread(scales, 384)
    want = torch.from_numpy(exact.astype(np.float32))  # a product of 4 and 8 bits: exact in float32 too
    assert (want.double().numpy() == exact).all()
    assert torch.equal(codec.decode(parts, torch.float32), want)
    assert torch.equal(codec.decode(parts, torch.bfloat16), want.to(torch.bfloat16))
    assert torch.equal(codec.decode(parts, torch.float32, torch.bfloat16), want)
    # Half a step; and 7.5 steps reach amax only up to the scale's own rounding by 2^-8, where 8 is clamped to 7.
    error = np.abs(exact - as_float32(weight))
    assert (error <= spread(scales, 384) * (0.5 + 7.5 * 2.0**-8)).all()
    wide = parts["weight_scale"].float() * 1.001  # scales that BF16 can't hold, as other tools may store them
    product = torch.from_numpy(codes).float() * wide.repeat_interleave(384 // scales.shape[1], 1)
    rounded = torch.from_numpy(codes).float() * wide.bfloat16().float().repeat_interleave(384 // scales.shape[1], 1)
    assert not torch.equal(product, rounded)
    assert torch.equal(codec.decode(parts | {"weight_scale": wide}, torch.bfloat16), product.to(torch.bfloat16))
    assert torch.equal(codec.decode(parts | {"weight_scale": wide}, torch.float32, torch.bfloat16), rounded)


@pytest.mark.parametrize(
    ("scheme", "unit"), [("int4-g128", 128), ("int4-g64", 64), ("int4-g32", 32), ("int4-channel", 8)]
)
def test_columns_must_fill_whole_groups_and_words(scheme, unit):
    codec = CODECS[scheme]
    assert codec.refusal((3, 5 * unit)) is None
    for cols in (5 * unit + 1, 5 * unit + unit // 2, unit - 1):
        assert codec.refusal((128, cols)) == f"{cols} columns are not a multiple of {unit}"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", ["rtn", "mse"])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_with_its_first_index(scheme, method, dtype, value):
    x = weights((40, 256), "f32")
    x[13, 7] = x[17, 255] = value
    bad = to_bf16(x) if dtype == "bf16" else x
    with pytest.raises(NonFiniteError) as error:
        CODECS[scheme].encode([weights((40, 256), dtype), bad], method=method, inputs=[flat(x)] * 2)
    assert (error.value.which, error.value.index) == (1, (13, 7))
