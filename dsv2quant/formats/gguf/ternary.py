"""TQ1_0 and TQ2_0: blocks of 256 values that are −d, 0 or d (ggml/src/ggml-quants.c, quantize_row_tq1_0_ref and
quantize_row_tq2_0_ref). d is the largest magnitude: what is smaller than half of it becomes zero.
"""

from __future__ import annotations

import numpy as np

from dsv2quant.formats.gguf.search import compiled, put_half


@compiled
def encode_tq1_0(x, out):  # type: ignore[no-untyped-def]
    """x float32 [blocks, 256] → out uint8 [blocks, 54]: five levels to a byte, in strides of 32, 16 and 4."""
    levels = np.zeros(260, np.int32)  # the last four are the fifth levels of the last bytes
    for i in range(len(x)):
        put_half(out[i], 52, _round(x[i], levels))
        pack_tq1_0(levels, out[i])


@compiled
def encode_tq2_0(x, out):  # type: ignore[no-untyped-def]
    """x float32 [blocks, 256] → out uint8 [blocks, 66]: four levels to a byte, in strides of 32."""
    levels = np.empty(256, np.int32)
    for i in range(len(x)):
        put_half(out[i], 64, _round(x[i], levels))
        for half in range(2):
            a = levels[half * 128 :]
            for k in range(32):
                out[i, half * 32 + k] = np.uint8(a[k] | a[k + 32] << 2 | a[k + 64] << 4 | a[k + 96] << 6)


@compiled
def _round(x, levels):  # type: ignore[no-untyped-def]
    """levels 0, 1 or 2 of −d, 0 and d, halves away from zero; d is returned. All are 1 where 1 / d is infinite."""
    size = np.int32(0)
    for k in range(256):  # magnitudes compare as their bits do
        size = max(size, np.int32(np.float32(x[k]).view(np.int32) & np.int32(0x7FFFFFFF)))
    d = np.int32(size).view(np.float32)
    inverse = np.float32(1) / d
    inverse = inverse if inverse < np.float32(np.inf) else np.float32(0)
    for k in range(256):
        v = x[k] * inverse
        levels[k] = np.int32(1) + np.int32(v >= np.float32(0.5)) - np.int32(v <= np.float32(-0.5))
    return d


@compiled
def pack_tq1_0(levels, row):  # type: ignore[no-untyped-def]
    """levels [260], the last four 0 → row[:52]."""
    _pack5(levels, row, 32)
    _pack5(levels[160:], row[32:], 16)
    _pack5(levels[240:], row[48:], 4)


@compiled
def unpack_tq1_0(row, levels):  # type: ignore[no-untyped-def]
    """The levels [260] of row[:52], as dequantize_row_tq1_0 has them."""
    _unpack5(row, levels, 32)
    _unpack5(row[32:], levels[160:], 16)
    _unpack5(row[48:], levels[240:], 4)


@compiled
def _pack5(levels, row, width):  # type: ignore[no-untyped-def]
    """row[k]: levels k, k + width … k + 4 width as the digits of a fraction in base 3, rounded up to 256ths."""
    for k in range(width):
        value = levels[k]
        for digit in range(1, 5):
            value = np.int32(value * np.int32(3) + levels[k + digit * width])
        row[k] = np.uint8((np.uint32(value) * np.uint32(256) + np.uint32(242)) // np.uint32(243))


@compiled
def _unpack5(row, levels, width):  # type: ignore[no-untyped-def]
    for k in range(width):
        fraction = row[k]
        for digit in range(5):
            tripled = np.int32(fraction) * np.int32(3)
            levels[k + digit * width] = tripled >> np.int32(8)
            fraction = np.uint8(tripled & np.int32(255))
