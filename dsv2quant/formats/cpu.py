"""The loops of the CPU's codecs, compiled (numba): the largest magnitude of an array, FP8 codes, INT4 scales and codes.

Magnitudes of floats order as their bits without the sign do, so integers are compared, and weights come as bits: BF16
as uint16, float32 as uint32. A few operations are written in LLVM IR because numba widens every small integer to 64
bits, which costs a factor of eight in vector width. FP8's loops work on whole rows so that they vectorize. INT4's
search takes 64 rows at a time, with the innermost loop over rows (of 16, checks before each loop that its arrays don't
overlap took nine times as long as the loops): each row's sum adds in order of its columns, so that the result does not
depend on the processor's vector width. All use one thread and release the GIL; callers run
several tensors at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from dsv2quant.formats.compiled import compiled
from dsv2quant.formats.e4m3 import BLOCK, E4M3_MAX, MIN_SCALE
from dsv2quant.formats.integers import factors, levels

_I8, _I32, _F32 = ir.IntType(8), ir.IntType(32), ir.FloatType()
LARGEST_FLOAT16 = np.float32(65280)  # that BF16 holds too
_LANES = 64


@intrinsic
def magnitude(context: Any, bits: Any) -> Any:
    """The bits without their sign."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.and_(args[0], ir.Constant(args[0].type, (1 << (bits.bitwidth - 1)) - 1))

    return bits(bits), codegen


@intrinsic
def larger(context: Any, x: Any, y: Any) -> Any:
    """max(x, y) of two unsigned integers of one width."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.select(b.icmp_unsigned(">", args[0], args[1]), args[0], args[1])

    return x(x, x), codegen


@intrinsic
def as_float(context: Any, bits: Any) -> Any:
    """BF16 bits (uint16) or float32 bits (uint32) → float32."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        word = (
            b.shl(b.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16)) if bits.bitwidth == 16 else args[0]
        )
        return b.bitcast(word, ir.FloatType())

    return types.float32(bits), codegen


@compiled
def row_amax(row):  # type: ignore[no-untyped-def]
    """Bits of the largest magnitude of a row."""
    most = magnitude(row[0])
    for j in range(row.size):
        most = larger(most, magnitude(row[j]))
    return most


@compiled
def amax_bits(weight):  # type: ignore[no-untyped-def]
    """Bits of the largest magnitude of a matrix."""
    most = magnitude(weight[0, 0])
    for i in range(weight.shape[0]):
        most = larger(most, row_amax(weight[i]))
    return most


@compiled
def widen(bits, out):  # type: ignore[no-untyped-def]
    """BF16 bits (uint16) → float32, both flat."""
    for i in range(bits.size):
        out[i] = as_float(bits[i])


def _i32(value: int) -> ir.Constant:
    return ir.Constant(_I32, value)


@intrinsic
def _e4m3(context: Any, x: Any) -> Any:
    """float32 → e4m3 code (uint8): round to nearest even, saturating at ±448; x must not be NaN."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        bits = b.bitcast(args[0], _I32)
        sign = b.and_(b.lshr(bits, _i32(24)), _i32(0x80))
        magnitude = b.and_(bits, _i32(0x7FFFFFFF))
        # From 2^-6 on: drop 20 of 23 mantissa bits with the carry of rounding, rebias the exponent (127 - 7) << 3.
        odd = b.and_(b.lshr(magnitude, _i32(20)), _i32(1))
        rounded = b.lshr(b.add(b.add(magnitude, _i32(0x7FFFF)), odd), _i32(20))
        normal = b.sub(rounded, _i32(120 << 3))
        normal = b.select(b.icmp_signed("<", normal, _i32(0x7E)), normal, _i32(0x7E))
        # Below: multiples of 2^-9. Adding 2^14, whose last place is 2^-9, rounds; its low bits are then the code.
        shifted = b.bitcast(b.fadd(b.bitcast(magnitude, _F32), ir.Constant(_F32, 16384.0)), _I32)
        subnormal = b.sub(shifted, _i32(0x46800000))
        is_subnormal = b.icmp_signed("<", magnitude, _i32(0x3C800000))
        return b.trunc(b.or_(b.select(is_subnormal, subnormal, normal), sign), _I8)

    return types.uint8(types.float32), codegen


@compiled
def _scale(amax):  # type: ignore[no-untyped-def]
    if amax == np.float32(0):
        return np.float32(1)
    return max(amax / np.float32(E4M3_MAX), np.float32(MIN_SCALE))


@compiled
def _column_amax(row, most):  # type: ignore[no-untyped-def]
    for j in range(row.size):
        most[j] = larger(most[j], magnitude(row[j]))


@compiled
def _encode_row(row, scale, codes):  # type: ignore[no-untyped-def]
    for j in range(row.size):
        codes[j] = _e4m3(as_float(row[j]) / scale)


@compiled
def _encode_row_by_column(row, scale, codes):  # type: ignore[no-untyped-def]
    for j in range(row.size):
        codes[j] = _e4m3(as_float(row[j]) / scale[j])


@compiled
def encode_block(weight, codes, scales, infinity):  # type: ignore[no-untyped-def]
    """Fill codes [rows, cols] and scales [⌈rows/128⌉, ⌈cols/128⌉]; False when a weight is not finite."""
    rows, cols = weight.shape
    most = np.empty(cols, weight.dtype)
    scale = np.empty(cols, np.float32)
    for strip in range(scales.shape[0]):
        first, last = strip * BLOCK, min((strip + 1) * BLOCK, rows)
        most[:] = 0
        for i in range(first, last):
            _column_amax(weight[i], most)
        for block in range(scales.shape[1]):
            left, right = block * BLOCK, min((block + 1) * BLOCK, cols)
            amax = row_amax(most[left:right])
            if amax >= infinity:
                return False
            scales[strip, block] = _scale(as_float(amax))
            scale[left:right] = scales[strip, block]
        for i in range(first, last):
            _encode_row_by_column(weight[i], scale, codes[i])
    return True


@compiled
def encode_channel(weight, codes, scales, infinity):  # type: ignore[no-untyped-def]
    """Fill codes [rows, cols] and scales [rows, 1]; False when a weight is not finite."""
    for i in range(weight.shape[0]):
        amax = row_amax(weight[i])
        if amax >= infinity:
            return False
        scales[i, 0] = _scale(as_float(amax))
        _encode_row(weight[i], scales[i, 0], codes[i])
    return True


@compiled
def encode_rows(weight, codes, scales, shared_amax):  # type: ignore[no-untyped-def]
    """Fill codes [rows, cols] and scales [1] from the bits of the largest magnitude, which may be another tensor's."""
    scales[0] = _scale(as_float(shared_amax))
    for i in range(weight.shape[0]):
        _encode_row(weight[i], scales[0], codes[i])


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 → the nearest BF16 value, ties to even, as float32; x must be finite."""
    bits = x.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(
        np.float32
    )


def round_to_float16(x: np.ndarray) -> np.ndarray:
    """float32 → a near positive value that BF16 and float16 both hold, from 2^-24 to 65280, as float32.

    Rounded to BF16 first: below 2^-17, where float16's spacing is 2^-24, it has no more bits than BF16 either.
    """
    return np.clip(round_to_bf16(x), np.float32(2.0**-24), LARGEST_FLOAT16).astype(np.float16).astype(np.float32)


def rtn_scales(weight: np.ndarray, group: int, bits: int = 4) -> np.ndarray:
    """amax / 7.5 of each group, rounded to BF16: weight float32 [rows, cols] → [rows, cols / group].

    The range is that of 16 levels, of fewer bits of fewer (compressed-tensors, quantization/utils/helpers.py,
    calculate_qparams). All-zero groups get scale 1.
    """
    scales = round_to_bf16(group_amax(weight, group) / np.float32((2**bits - 1) / 2))
    return np.where(scales > 0, scales, np.float32(1))


def search_scales(weight: np.ndarray, importance: np.ndarray, group: int, bits: int = 4) -> np.ndarray:
    """The BF16 scale of each group with the least Σ importance · (code × scale − weight)², of `factors`.

    weight float32 [rows, cols], importance float32 [1 or rows, cols] → float32 [rows, cols / group].
    """
    low, high = levels(bits)
    unit = group_amax(weight, group) / np.float32(high)
    candidates = round_to_bf16(unit[:, :, None] * factors(bits))  # [rows, groups, factors]
    candidates = np.where(candidates != 0, candidates, np.float32(1))
    best = candidates[:, :, 0].copy()
    limits = np.float32(low), np.float32(high)
    _search(np.ascontiguousarray(weight), np.ascontiguousarray(importance), candidates, best, *limits)
    return best


def nearest_codes(weight: np.ndarray, scales: np.ndarray, low: int = -8, high: int = 7) -> np.ndarray:
    """int8 codes from `low` to `high` nearest to weight / scale, ties to even."""
    codes = np.empty(weight.shape, np.int8)
    _round(np.ascontiguousarray(weight), scales, codes, np.float32(low), np.float32(high))
    return codes


def group_amax(weight: np.ndarray, group: int) -> np.ndarray:
    """The largest magnitude of each group, float32 [rows, cols / group]."""
    return np.abs(weight).reshape(len(weight), -1, group).max(-1)


@compiled
def _round(weight, scales, codes, low, high):  # type: ignore[no-untyped-def]
    rows, cols = weight.shape
    group = cols // scales.shape[1]
    for i in range(rows):
        for g in range(scales.shape[1]):
            scale = scales[i, g]
            for j in range(g * group, (g + 1) * group):
                codes[i, j] = np.int8(min(max(np.rint(weight[i, j] / scale), low), high))


@compiled
def _search(weight, importance, candidates, best, low, high):  # type: ignore[no-untyped-def]
    rows, cols = weight.shape
    groups, factors = candidates.shape[1], candidates.shape[2]
    group = cols // groups
    tile = np.zeros((group, _LANES), np.float32)
    weights = np.zeros((group, _LANES), np.float32)
    scale, error = np.ones(_LANES, np.float32), np.empty(_LANES, np.float32)
    least = np.empty(_LANES, np.float32)
    for first in range(0, rows, _LANES):
        lanes = min(_LANES, rows - first)
        for g in range(groups):
            for lane in range(lanes):
                row = first + lane
                at = row if importance.shape[0] > 1 else 0
                for k in range(group):
                    tile[k, lane] = weight[row, g * group + k]
                    weights[k, lane] = importance[at, g * group + k]
            least[:] = np.inf
            for f in range(factors):
                for lane in range(lanes):
                    scale[lane] = candidates[first + lane, g, f]
                _errors(tile, weights, scale, error, low, high)
                for lane in range(lanes):
                    if error[lane] < least[lane]:
                        least[lane] = error[lane]
                        best[first + lane, g] = scale[lane]


@compiled
def _errors(tile, weights, scale, error, low, high):  # type: ignore[no-untyped-def]
    """error[lane] = Σ_k weights · (code × scale − tile)²."""
    error[:] = 0
    for k in range(tile.shape[0]):
        for lane in range(_LANES):
            x = tile[k, lane]
            code = min(max(np.rint(x / scale[lane]), low), high)
            off = code * scale[lane] - x
            error[lane] += weights[k, lane] * off * off
