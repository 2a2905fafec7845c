"""Blocks of 32 values with one scale, and a min in Q4_1 and Q5_1 (ggml/src/ggml-quants.c, quantize_row_q4_0_ref and
_impl and their like).

IQ4_NL and IQ4_XS: 16 uneven levels; blocks of 32 with a scale, or 8 of them under one float16 scale
(ggml/src/ggml-quants.c, quantize_row_iq4_nl_impl). MXFP4: e2m1 levels under a power of two (quantize_row_mxfp4_ref).
"""

from __future__ import annotations

import numpy as np

from dsv2quant.formats.gguf.search import (
    LANES,
    TINY,
    compiled,
    level,
    load,
    load_cyclic,
    put_half,
    search_affine,
    search_levels,
    signed_peak,
    sum_squares,
    weigh,
    weigh_by_square,
)


@compiled
def encode_q8_0(x, out):  # type: ignore[no-untyped-def]
    """x float32 [blocks, 32] → out uint8 [blocks, 34]; codes are rounded half away from zero."""
    for i in range(len(x)):
        size = np.int32(0)
        for k in range(32):  # magnitudes compare as their bits do
            size = max(size, np.int32(np.float32(x[i, k]).view(np.int32) & np.int32(0x7FFFFFFF)))
        d = np.int32(size).view(np.float32) / np.float32(127)
        put_half(out[i], 0, d)
        inverse = np.float32(1) / d if d != 0 else np.float32(0)
        for k in range(32):
            v = x[i, k] * inverse
            whole = np.trunc(v)
            rest = v - whole
            up = np.float32(1) if rest >= np.float32(0.5) else np.float32(0)
            down = np.float32(1) if rest <= np.float32(-0.5) else np.float32(0)
            out[i, 2 + k] = np.uint8(np.int32(_known(whole + up - down)))


@compiled
def encode_mxfp4(x, out):  # type: ignore[no-untyped-def]
    """x float32 [blocks, 32] → out uint8 [blocks, 17]: levels are half units, 0, 1, 2, 3, 4, 6, 8 and 12.

    A value halfway between two goes to the smaller. The exponent is that of the largest magnitude less 2, as ggml has
    it from a float32 logarithm, which is rounded up just below a power of two; where it is negative, modulo 256.
    """
    for i in range(len(x)):
        top = np.float32(0)
        for k in range(32):
            top = max(top, abs(x[i, k]))
        exponent = np.int32(0)
        if top > 0:
            exponent = np.int32(np.floor(np.float32(np.log2(np.float64(top))))) + np.int32(125)
        out[i, 0] = np.uint8(exponent & np.int32(255))
        unit = _half_power(np.int32(out[i, 0]))
        for k in range(16):
            out[i, 1 + k] = _e2m1(x[i, k], unit) | _e2m1(x[i, k + 16], unit) << 4


@compiled
def _half_power(exponent):  # type: ignore[no-untyped-def]
    """2^(exponent − 128), exponent 0 … 255."""
    normal = np.int32((exponent - np.int32(1)) << np.int32(23)).view(np.float32)
    subnormal = np.int32(np.int32(0x200000) << exponent).view(np.float32)
    return normal if exponent > 1 else subnormal


@compiled
def _e2m1(v, unit):  # type: ignore[no-untyped-def]
    """The code of the level nearest to v / unit; the sign is bit 3, and no zero has it."""
    size, code = abs(v), np.uint8(0)
    code += size > np.float32(0.5) * unit
    code += size > np.float32(1.5) * unit
    code += size > np.float32(2.5) * unit
    code += size > np.float32(3.5) * unit
    code += size > np.float32(5) * unit
    code += size > np.float32(7) * unit
    code += size > np.float32(10) * unit
    return np.uint8(code | (np.uint8(8) if (v < 0) & (code > 0) else np.uint8(0)))


@compiled
def encode_q45(x, importance, bits, affine, out):  # type: ignore[no-untyped-def]
    """Q4_0, Q5_0 and, affine, Q4_1, Q5_1: x float32 [rows, cols], importance float32 [cols or 0], bits 4 or 5.

    out uint8 [blocks, bytes].
    """
    blocks, weights = x.reshape(-1, 32), importance.reshape(-1, 32)
    energy = np.empty((len(x) // LANES + 1) * LANES, np.float32)
    for first in range(0, len(x) if len(weights) else 0, LANES):
        sum_squares(x, first, energy[first : first + LANES])
    tile, weight = np.empty((32, LANES), np.float32), np.empty((32, LANES), np.float32)
    levels, packed = np.empty((32, LANES), np.uint8), np.empty((16 + 4 * (bits == 5), LANES), np.uint8)
    scale, low = np.empty(LANES, np.float32), np.zeros(LANES, np.float32)
    start = 4 if affine else 2
    for first in range(0, len(blocks), LANES):
        load(blocks, first, tile)
        if len(weights):
            load_cyclic(weights, first, weight)
            _weigh(weight, tile, energy, first, len(weights), x.shape[1])
            if affine:
                _affine_searched(tile, weight, (1 << bits) - 1, scale, low, levels)
            else:
                search_levels(tile, weight, 1 << (bits - 1), scale, levels)
        elif affine:
            _affine(tile, (1 << bits) - 1, scale, low, levels)
        else:
            _symmetric(tile, 1 << (bits - 1), scale, levels)
        _pack(levels, packed)
        for lane in range(min(LANES, len(blocks) - first)):
            row = out[first + lane]
            put_half(row, 0, scale[lane])
            if affine:
                put_half(row, 2, low[lane])
            for k in range(len(packed)):
                row[start + k] = packed[k, lane]


@compiled
def _known(v):  # type: ignore[no-untyped-def]
    """v, or 0 where x86 has no integer for it (the scale's inverse overflowed)."""
    return v if abs(v) < np.float32(2.0**30) else np.float32(0)


@compiled
def _weigh(weight, tile, energy, first, per_row, cols):  # type: ignore[no-untyped-def]
    """weight · √(σ² + x²), σ² the mean square of the block's row."""
    spread = np.empty(LANES, np.float32)
    for lane in range(LANES):
        row = min((first + lane) // per_row, len(energy) - 1)
        spread[lane] = energy[row] / np.float32(cols)
    weigh(tile, weight, spread)


@compiled
def _symmetric(tile, nmax, scale, levels):  # type: ignore[no-untyped-def]
    inverse = np.empty(LANES, np.float32)
    signed_peak(tile, scale)
    for lane in range(LANES):
        scale[lane] = scale[lane] / np.float32(-nmax)
        inverse[lane] = np.float32(1) / scale[lane] if scale[lane] != 0 else np.float32(0)
    for k in range(32):
        for lane in range(LANES):
            v = _known(tile[k, lane] * inverse[lane] + (np.float32(nmax) + np.float32(0.5)))
            levels[k, lane] = np.uint8(np.int32(min(v, np.float32(2 * nmax - 1))))


@compiled
def _affine(tile, nmax, scale, low, levels):  # type: ignore[no-untyped-def]
    top, inverse = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for lane in range(LANES):
        low[lane] = tile[0, lane]
        top[lane] = tile[0, lane]
    for k in range(1, 32):
        for lane in range(LANES):
            v = tile[k, lane]
            low[lane] = v if v < low[lane] else low[lane]
            top[lane] = v if v > top[lane] else top[lane]
    for lane in range(LANES):
        scale[lane] = (top[lane] - low[lane]) / np.float32(nmax)
        inverse[lane] = np.float32(1) / scale[lane] if scale[lane] != 0 else np.float32(0)
    for k in range(32):
        for lane in range(LANES):
            v = _known((tile[k, lane] - low[lane]) * inverse[lane] + np.float32(0.5))
            levels[k, lane] = np.uint8(np.int32(min(v, np.float32(nmax))))


@compiled
def _affine_searched(tile, weight, nmax, scale, low, levels):  # type: ignore[no-untyped-def]
    factor, origin = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    search_affine(tile, weight, nmax, -0.9, 0.05, 36, False, scale, low, factor, origin)
    for lane in range(LANES):
        low[lane] = -low[lane]
    for k in range(32):
        for lane in range(LANES):
            levels[k, lane] = np.uint8(level(factor[lane] * (tile[k, lane] - origin[lane]), 0, nmax))


@compiled
def _pack(levels, packed):  # type: ignore[no-untyped-def]
    """levels [32, lane] of 4 bits → packed [16, lane], or of 5: four rows of their high bits, then the low ones."""
    high = len(packed) - 16
    for i in range(high):
        for lane in range(LANES):
            packed[i, lane] = 0
        for k in range(8):
            for lane in range(LANES):
                packed[i, lane] |= levels[i * 8 + k, lane] >> 4 << k
    for k in range(16):
        for lane in range(LANES):
            packed[high + k, lane] = (levels[k, lane] & 15) | (levels[k + 16, lane] & 15) << 4


@compiled
def encode_iq4(x, importance, out):  # type: ignore[no-untyped-def]
    """x float32 [blocks, 32 or 256], importance float32 [blocks of a row or 0, 32 or 256].

    out uint8 [blocks, 18] (IQ4_NL) or [blocks, 136] (IQ4_XS).
    """
    parts = x.shape[1] // 32
    subs, weights = x.reshape(-1, 32), importance.reshape(-1, 32)
    tile, weight = np.empty((32, LANES), np.float32), np.empty((32, LANES), np.float32)
    scale, spread = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    energy = np.empty(LANES, np.float32)
    for first in range(0, len(x), LANES // parts):
        load(subs, first * parts, tile)
        if len(weights):
            load_cyclic(weights, first * parts, weight)
            sum_squares(x, first, energy)
            for lane in range(LANES):
                spread[lane] = energy[lane // parts] * (np.float32(2) / np.float32(x.shape[1]))
            weigh(tile, weight, spread)
        else:
            weigh_by_square(tile, weight)
        _search(tile, weight, scale)
        for block in range(min(LANES // parts, len(x) - first)):
            if parts == 1:
                put_half(out[first + block], 0, scale[block])
                _pack_iq4(x[first + block], scale[block], out[first + block, 2:])
            else:
                _store_xs(x[first + block], scale[block * 8 : block * 8 + 8], out[first + block])


@compiled
def _search(tile, weight, scale):  # type: ignore[no-untyped-def]
    """scale[lane] of the least weighted error, of 16 candidates; a lane of zeros gets scale 0."""
    peak, trial = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    best = np.empty(LANES, np.float32)
    sum_xq, sum_qq = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    signed_peak(tile, peak)
    for step in range(16):
        for lane in range(LANES):
            if step == 0:
                trial[lane] = np.float32(1) / (-peak[lane] / np.float32(-127))
            else:
                trial[lane] = np.float32(step - 8 - 127) / peak[lane]
            sum_xq[lane] = 0
            sum_qq[lane] = 0
        for k in range(32):
            for lane in range(LANES):
                x = tile[k, lane]
                v = trial[lane] * x
                q = _value(v)
                wq = weight[k, lane] * q
                sum_xq[lane] += wq * x
                sum_qq[lane] += wq * q
        for lane in range(LANES):
            xq, qq = sum_xq[lane], sum_qq[lane]
            if step == 0:
                scale[lane] = xq / qq if qq > 0 else np.float32(0)
                best[lane] = scale[lane] * xq
            elif qq > 0 and xq * xq > best[lane] * qq:
                scale[lane] = xq / qq
                best[lane] = scale[lane] * xq
    for lane in range(LANES):
        scale[lane] = np.float32(0) if abs(peak[lane]) < TINY else scale[lane]


@compiled
def _store_xs(x, scale, row):  # type: ignore[no-untyped-def]
    top = np.float32(0)
    for j in range(8):
        top = scale[j] if abs(scale[j]) > abs(top) else top
    d = -top / np.float32(32)
    put_half(row, 0, d)
    inverse = np.float32(1) / d if d != 0 else np.float32(0)
    row[2:8] = 0
    for j in range(8):
        code = level(inverse * scale[j], -32, 31)
        _pack_iq4(x[j * 32 : j * 32 + 32], d * code, row[8 + j * 16 :])
        bits = np.uint8(np.int32(code) + 32)
        row[4 + j // 2] |= (bits & 15) << (4 * (j % 2))
        row[2 + j // 4] |= bits >> 4 << (2 * (j % 4))


@compiled
def _pack_iq4(x, scale, row):  # type: ignore[no-untyped-def]
    """The levels of x [32] under scale → row[:16]."""
    inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
    for k in range(16):
        row[k] = _level(inverse * x[k]) | _level(inverse * x[k + 16]) << 4


# A number belongs to the level whose midpoints it lies between; on a midpoint, to the upper. Written out, so that the
# compiler can do many at once.


@compiled
def _value(v):  # type: ignore[no-untyped-def]
    """The value of the level nearest to v."""
    q = np.float32(-127)
    q = q if v < np.float32(-115.5) else np.float32(-104)
    q = q if v < np.float32(-93.5) else np.float32(-83)
    q = q if v < np.float32(-74.0) else np.float32(-65)
    q = q if v < np.float32(-57.0) else np.float32(-49)
    q = q if v < np.float32(-42.0) else np.float32(-35)
    q = q if v < np.float32(-28.5) else np.float32(-22)
    q = q if v < np.float32(-16.0) else np.float32(-10)
    q = q if v < np.float32(-4.5) else np.float32(1)
    q = q if v < np.float32(7.0) else np.float32(13)
    q = q if v < np.float32(19.0) else np.float32(25)
    q = q if v < np.float32(31.5) else np.float32(38)
    q = q if v < np.float32(45.5) else np.float32(53)
    q = q if v < np.float32(61.0) else np.float32(69)
    q = q if v < np.float32(79.0) else np.float32(89)
    return q if v < np.float32(101.0) else np.float32(113)


@compiled
def _level(v):  # type: ignore[no-untyped-def]
    """The number of the level nearest to v."""
    at = np.int32(0)
    at = at if v < np.float32(-115.5) else np.int32(1)
    at = at if v < np.float32(-93.5) else np.int32(2)
    at = at if v < np.float32(-74.0) else np.int32(3)
    at = at if v < np.float32(-57.0) else np.int32(4)
    at = at if v < np.float32(-42.0) else np.int32(5)
    at = at if v < np.float32(-28.5) else np.int32(6)
    at = at if v < np.float32(-16.0) else np.int32(7)
    at = at if v < np.float32(-4.5) else np.int32(8)
    at = at if v < np.float32(7.0) else np.int32(9)
    at = at if v < np.float32(19.0) else np.int32(10)
    at = at if v < np.float32(31.5) else np.int32(11)
    at = at if v < np.float32(45.5) else np.int32(12)
    at = at if v < np.float32(61.0) else np.int32(13)
    at = at if v < np.float32(79.0) else np.int32(14)
    at = at if v < np.float32(101.0) else np.int32(15)
    return np.uint8(at)
