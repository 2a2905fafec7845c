"""Blocks of 32 values with one scale, and a min in Q4_1 and Q5_1 (ggml/src/ggml-quants.c, quantize_row_q4_0_ref and
_impl and their like)."""

from __future__ import annotations

import numpy as np

from dsv2quant.formats.gguf.lanes import LANES, compiled, level, load, load_cyclic, put_half, sum_squares, weigh
from dsv2quant.formats.gguf.search import search_affine, search_levels, signed_peak


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
