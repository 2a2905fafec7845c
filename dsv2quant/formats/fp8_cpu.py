"""The compiled CPU path of the FP8 codecs (numba).

The loops work on whole rows so that they vectorize: column maxima of a 128-row strip, one scale per column, then one
pass that divides, rounds and stores. A few operations are written in LLVM IR because numba widens every small integer
to 64 bits, which costs a factor of eight in vector width. Weights come as bits: uint16 for BF16, uint32 for float32.
The functions release the GIL; they use one thread each, and callers run several tensors at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from dsv2quant.formats.amax_cpu import amax_bits, as_float, compiled, larger, magnitude, row_amax
from dsv2quant.formats.codec import check_finite
from dsv2quant.formats.e4m3 import BLOCK, E4M3_MAX, MIN_SCALE, Grid

_I8, _I32, _F32 = ir.IntType(8), ir.IntType(32), ir.FloatType()


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
def _encode_block(weight, codes, scales, infinity):  # type: ignore[no-untyped-def]
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
def _encode_channel(weight, codes, scales, infinity):  # type: ignore[no-untyped-def]
    """Fill codes [rows, cols] and scales [rows, 1]; False when a weight is not finite."""
    for i in range(weight.shape[0]):
        amax = row_amax(weight[i])
        if amax >= infinity:
            return False
        scales[i, 0] = _scale(as_float(amax))
        _encode_row(weight[i], scales[i, 0], codes[i])
    return True


@compiled
def _encode_tensor(weight, codes, scales, shared_amax):  # type: ignore[no-untyped-def]
    """Fill codes [rows, cols] and scales [1] from the bits of the largest magnitude, which may be another tensor's."""
    scales[0] = _scale(as_float(shared_amax))
    for i in range(weight.shape[0]):
        _encode_row(weight[i], scales[0], codes[i])


def encode(weights: Sequence[np.ndarray], grid: Grid) -> list[tuple[np.ndarray, np.ndarray]]:
    """(codes uint8 [out, in], scales float32) of each weight; with `tensor`, all share one scale.

    Weights are BF16 bits (uint16) or float32. Raises NonFiniteError naming the weight and the first offending index.
    """
    all_bits = [np.ascontiguousarray(w if w.dtype == np.uint16 else w.view(np.uint32)) for w in weights]
    infinity = np.uint16(0x7F80) if all_bits[0].dtype == np.uint16 else np.uint32(0x7F800000)
    if grid == "tensor":
        amaxes = [amax_bits(bits) for bits in all_bits]
        for which, amax in enumerate(amaxes):
            if amax >= infinity:
                check_finite(weights[which], which)
        shared_amax = all_bits[0].dtype.type(max(amaxes))
    encoded = []
    for which, bits in enumerate(all_bits):
        rows, cols = bits.shape
        codes = np.empty((rows, cols), np.uint8)
        if grid == "block":
            scales = np.empty((-(-rows // BLOCK), -(-cols // BLOCK)), np.float32)
            finite = _encode_block(bits, codes, scales, infinity)
        elif grid == "channel":
            scales = np.empty((rows, 1), np.float32)
            finite = _encode_channel(bits, codes, scales, infinity)
        else:
            scales = np.empty(1, np.float32)
            _encode_tensor(bits, codes, scales, shared_amax)
            finite = True
        if not finite:
            check_finite(weights[which], which)
        encoded.append((codes, scales))
    return encoded
