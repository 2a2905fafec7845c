"""IQ4_NL and IQ4_XS: 16 uneven levels; blocks of 32 with a scale, or 8 of them under one float16 scale
(ggml/src/ggml-quants.c, quantize_row_iq4_nl_impl)."""

from __future__ import annotations

import numpy as np

from dsv2quant.formats.gguf.lanes import (
    LANES,
    TINY,
    compiled,
    level,
    load,
    load_cyclic,
    put_half,
    sum_squares,
    weigh,
    weigh_by_square,
)
from dsv2quant.formats.gguf.search import signed_peak


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
                _pack(x[first + block], scale[block], out[first + block, 2:])
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
        _pack(x[j * 32 : j * 32 + 32], d * code, row[8 + j * 16 :])
        bits = np.uint8(np.int32(code) + 32)
        row[4 + j // 2] |= (bits & 15) << (4 * (j % 2))
        row[2 + j // 4] |= bits >> 4 << (2 * (j % 4))


@compiled
def _pack(x, scale, row):  # type: ignore[no-untyped-def]
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
