"""Q2_K and Q3_K blocks of 256 values, 16 sub-blocks of 16 (ggml/src/ggml-quants.c, quantize_row_q2_K_ref and _impl and
their like). As in kquants.py, levels are rounded once more with the scales as stored, unless the stored scale is 0."""

from __future__ import annotations

import numpy as np

from dsv2quant.formats.gguf.search import (
    LANES,
    TINY,
    compiled,
    fit_scales,
    level,
    load,
    load_cyclic,
    nearest,
    put_half,
    round_positive,
    search_affine,
    search_levels,
    signed_peak,
    sum_squares,
    sum_weights,
    weigh,
)


@compiled
def encode_q2_k(x, importance, out):  # type: ignore[no-untyped-def]
    """x float32 [blocks, 256], importance float32 [blocks of a row or 0, 256] → out uint8 [blocks, 84]."""
    subs, weights = x.reshape(-1, 16), importance.reshape(-1, 16)
    tile, weight = np.empty((16, LANES), np.float32), np.empty((16, LANES), np.float32)
    batch = np.empty((5, LANES * 16), np.float32)  # of each sub-block: scale, depth, factor, origin, total weight
    scale, depth, factor, origin, total = batch[0], batch[1], batch[2], batch[3], batch[4]
    energy = np.zeros(LANES, np.float32)
    levels = np.empty(256, np.uint8)
    codes, steps = np.empty((2, LANES, 16), np.uint8), np.empty((2, LANES), np.float32)
    for first in range(0, len(x), LANES):
        count = min(LANES, len(x) - first)
        if len(weights):
            sum_squares(x, first, energy)
        for at in range(0, count * 16, LANES):
            end = at + LANES
            load(subs, first * 16 + at, tile)
            if len(weights):
                load_cyclic(weights, first * 16 + at, weight)
                _weigh(tile, weight, energy, at // 16, np.float32(1), total[at:end])
                search_affine(tile, weight, 3, -0.9, 0.05, 36, False,
                              scale[at:end], depth[at:end], factor[at:end], origin[at:end])  # fmt: skip
            else:
                for k in range(16):
                    for lane in range(LANES):
                        weight[k, lane] = abs(tile[k, lane])
                search_affine(tile, weight, 3, -0.5, 0.1, 15, True,
                              scale[at:end], depth[at:end], factor[at:end], origin[at:end])  # fmt: skip
        for i, values in enumerate((scale, depth)):
            if len(weights):
                fit_scales(values, total, 15, False, steps[i], codes[i])
            else:
                round_positive(values, count, 15, 255, steps[i], codes[i])
        for lane in range(count):
            row = out[first + lane]
            d, m = put_half(row, 80, steps[0, lane]), put_half(row, 82, steps[1, lane])
            for j in range(16):
                row[j] = codes[0, lane, j] | codes[1, lane, j] << 4
                sub = lane * 16 + j
                step, low = d * np.float32(row[j] & 15), m * np.float32(row[j] >> 4)
                for k in range(16):
                    v = subs[first * 16 + sub, k]
                    fine = (v + low) / step if step != 0 else factor[sub] * (v - origin[sub])
                    levels[j * 16 + k] = np.uint8(level(fine, 0, 3))
            _pack2(levels, row[16:])


@compiled
def encode_q3_k(x, importance, out):  # type: ignore[no-untyped-def]
    """x float32 [blocks, 256], importance float32 [blocks of a row or 0, 256] → out uint8 [blocks, 110]."""
    subs, weights = x.reshape(-1, 16), importance.reshape(-1, 16)
    tile, weight = np.empty((16, LANES), np.float32), np.empty((16, LANES), np.float32)
    scale, total = np.empty(LANES * 16, np.float32), np.empty(LANES * 16, np.float32)
    found = np.empty((16, LANES), np.uint8)
    levels = np.empty((LANES * 16, 16), np.uint8)
    codes, steps = np.empty((LANES, 16), np.uint8), np.empty(LANES, np.float32)
    energy = np.zeros(LANES, np.float32)
    for first in range(0, len(x), LANES):
        count = min(LANES, len(x) - first)
        if len(weights):
            sum_squares(x, first, energy)
        for at in range(0, count * 16, LANES):
            load(subs, first * 16 + at, tile)
            if len(weights):
                load_cyclic(weights, first * 16 + at, weight)
                _weigh(tile, weight, energy, at // 16, np.float32(2), total[at : at + LANES])
                search_levels(tile, weight, 4, scale[at : at + LANES], found)
            else:
                _descend(tile, 4, scale[at : at + LANES], found)
            for lane in range(LANES):
                for k in range(16):
                    levels[at + lane, k] = found[k, lane]
        if len(weights):
            fit_scales(scale, total, 32, True, steps, codes)
        else:
            _round_signed(scale, count, steps, codes)
        for lane in range(count):
            row = out[first + lane]
            d = put_half(row, 108, steps[lane])
            row[96:108] = 0
            for j in range(16):
                code = codes[lane, j]
                row[96 + j % 8] |= (code & 15) << (4 * (j // 8))
                row[104 + j % 4] |= code >> 4 << (2 * (j // 4))
                step = d * np.float32(np.int32(code) - 32)
                if step != 0:
                    for k in range(16):
                        v = subs[(first + lane) * 16 + j, k]
                        levels[lane * 16 + j, k] = np.uint8(np.int32(level(v / step, -4, 3)) + 4)
            _pack3(levels[lane * 16 : lane * 16 + 16].reshape(-1), row)


@compiled
def _weigh(tile, weight, energy, first, times, total):  # type: ignore[no-untyped-def]
    """weight · √(σ² + x²), σ² `times` the mean square of the block, and its sum: energy is Σ x² of block
    first + lane / 16."""
    spread = np.empty(LANES, np.float32)
    for lane in range(LANES):
        spread[lane] = times * energy[first + lane // 16] / np.float32(256)
    weigh(tile, weight, spread)
    sum_weights(weight, total)


@compiled
def _descend(tile, nmax, scale, levels):  # type: ignore[no-untyped-def]
    """make_q3_quants: five passes of coordinate descent, weight x²; levels as in search_levels."""
    peak, current = np.empty(LANES, np.float32), np.empty((16, LANES), np.float32)
    sum_xl, sum_ll = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    signed_peak(tile, peak)
    for k in range(16):
        for lane in range(LANES):
            x = tile[k, lane]
            code = level(np.float32(-nmax) / peak[lane] * x, -nmax, nmax - 1)
            current[k, lane] = code
            w = x * x
            sum_xl[lane] += w * x * code
            sum_ll[lane] += w * code * code
    for _ in range(5):  # ggml stops at a pass without change: the passes left would change nothing
        for k in range(16):
            for lane in range(LANES):
                x, old = tile[k, lane], current[k, lane]
                w = x * x
                xl, ll = sum_xl[lane] - w * x * old, sum_ll[lane] - w * old * old
                code = level(x * ll / xl, -nmax, nmax - 1)
                new_xl, new_ll = xl + w * x * code, ll + w * code * code
                better = new_xl * new_xl * sum_ll[lane] > sum_xl[lane] * sum_xl[lane] * new_ll
                better = better & (xl > 0) & (new_ll > 0) & (code != old)
                current[k, lane] = code if better else old
                sum_xl[lane] = new_xl if better else sum_xl[lane]
                sum_ll[lane] = new_ll if better else sum_ll[lane]
    for lane in range(LANES):
        zero = abs(peak[lane]) < TINY
        scale[lane] = sum_xl[lane] / sum_ll[lane] if sum_ll[lane] > 0 and not zero else np.float32(0)
        for k in range(16):
            levels[k, lane] = np.uint8(0) if zero else np.uint8(np.int32(current[k, lane]) + np.int32(nmax))


@compiled
def _round_signed(values, count, steps, codes):  # type: ignore[no-untyped-def]
    for block in range(count):
        top = np.float32(0)
        for j in range(16):
            v = values[block * 16 + j]
            top = v if abs(v) > abs(top) else top
        inverse = np.float32(-32) / top
        steps[block] = np.float32(1) / inverse if top != 0 else np.float32(0)
        for j in range(16):
            code = np.int32(np.int8(nearest(inverse * values[block * 16 + j])))
            code = min(max(code, np.int32(-32)), np.int32(31)) + 32
            codes[block, j] = np.uint8(code) if top != 0 else np.uint8(0)


@compiled
def _pack2(levels, row):  # type: ignore[no-untyped-def]
    for half in range(2):
        for k in range(32):
            at = half * 128 + k
            row[half * 32 + k] = levels[at] | levels[at + 32] << 2 | levels[at + 64] << 4 | levels[at + 96] << 6


@compiled
def _pack3(levels, row):  # type: ignore[no-untyped-def]
    """The third bits → row[:32], the low two → row[32:96]."""
    row[:32] = 0
    for j in range(8):
        for k in range(32):
            row[k] |= levels[j * 32 + k] >> 2 << j
            levels[j * 32 + k] &= 3
    _pack2(levels, row[32:])
