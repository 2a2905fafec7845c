"""Q2_K to Q6_K blocks of 256 values (ggml/src/ggml-quants.c, quantize_row_q4_K_ref and _impl and their like).

A block is 8 sub-blocks of 32 values (Q4_K, Q5_K) or 16 of 16 (Q2_K, Q3_K, Q6_K); `LANES` blocks are a batch. Levels
are rounded once more with the scales as they are stored; a sub-block whose stored scale is 0 keeps those of its search.
"""

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
    search_symmetric,
    signed_peak,
    sum_squares,
    sum_weights,
    weigh,
    weigh_by_square,
)


@compiled
def encode_q45_k(x, importance, bits, out):  # type: ignore[no-untyped-def]
    """Q4_K (bits 4) and Q5_K (5): x float32 [blocks, 256], importance float32 [blocks of a row or 0, 256].

    out uint8 [blocks, 144 or 176].
    """
    subs, nmax = x.reshape(-1, 32), (1 << bits) - 1
    weights = importance.reshape(-1, 32)
    tile, weight = np.empty((32, LANES), np.float32), np.empty((32, LANES), np.float32)
    batch = np.empty((5, LANES * 8), np.float32)  # of each sub-block: scale, depth, factor, origin, total weight
    scale, depth, factor, origin, total = batch[0], batch[1], batch[2], batch[3], batch[4]
    energy = np.zeros(LANES, np.float32)
    levels = np.empty((256,), np.uint8)
    codes, steps = np.empty((2, LANES, 8), np.uint8), np.empty((2, LANES), np.float32)
    for first in range(0, len(x), LANES):
        count = min(LANES, len(x) - first)
        if len(weights):
            sum_squares(x, first, energy)
        for at in range(0, count * 8, LANES):
            end = at + LANES
            load(subs, first * 8 + at, tile)
            if len(weights):
                load_cyclic(weights, first * 8 + at, weight)
                _weigh_by_importance(tile, weight, energy, at // 8)
                sum_weights(weight, total[at:end])
                search_affine(tile, weight, nmax, -0.9, 0.05, 36, False,
                              scale[at:end], depth[at:end], factor[at:end], origin[at:end])  # fmt: skip
            else:
                _weigh_by_size(tile, weight)
                start, count_steps = (-1.0, 20) if bits == 4 else (-0.5, 15)
                search_affine(tile, weight, nmax, start, 0.1, count_steps, False,
                              scale[at:end], depth[at:end], factor[at:end], origin[at:end])  # fmt: skip
        for i, values in enumerate((scale, depth)):
            if len(weights):
                fit_scales(values, total, 63, False, steps[i], codes[i])
            else:
                round_positive(values, count, 63, 63, steps[i], codes[i])
        for lane in range(count):
            row = out[first + lane]
            d, m = put_half(row, 0, steps[0, lane]), put_half(row, 2, steps[1, lane])
            _pack_scales(codes[0, lane], codes[1, lane], bits == 5, row)
            for j in range(8):
                sub = lane * 8 + j
                _round_affine(
                    subs[first * 8 + sub], d, m, row, j, nmax, factor[sub], origin[sub], levels[j * 32 : j * 32 + 32]
                )
            if bits == 5:
                _pack5(levels, row)
            else:
                _pack4(levels, row[16:])


@compiled
def encode_q6_k(x, importance, out):  # type: ignore[no-untyped-def]
    """x float32 [blocks, 256], importance float32 [blocks of a row or 0, 256] → out uint8 [blocks, 210]."""
    subs, weights = x.reshape(-1, 16), importance.reshape(-1, 16)
    tile, weight = np.empty((16, LANES), np.float32), np.empty((16, LANES), np.float32)
    scale, factor = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    levels = np.empty(256, np.uint8)
    for first in range(0, len(x), LANES // 16):
        load(subs, first * 16, tile)
        if len(weights):
            load_cyclic(weights, first * 16, weight)
        else:
            weigh_by_square(tile, weight)
        search_symmetric(tile, weight, 32, scale, factor)
        for block in range(min(LANES // 16, len(x) - first)):
            _store_q6_k(x[first + block], scale[block * 16 :], factor[block * 16 :], levels, out[first + block])


@compiled
def _store_q6_k(x, scale, factor, levels, row):  # type: ignore[no-untyped-def]
    top = np.float32(0)
    for j in range(16):
        top = scale[j] if abs(scale[j]) > abs(top) else top
    if abs(top) < TINY:
        row[:] = 0
        return
    inverse = np.float32(-128) / top
    d = put_half(row, 208, np.float32(1) / inverse)
    for j in range(16):
        code = np.int8(min(np.int32(127), nearest(inverse * scale[j])))
        row[192 + j] = np.uint8(code)
        step = d * np.float32(code)
        for k in range(j * 16, j * 16 + 16):
            if step != 0:
                levels[k] = np.uint8(np.int32(level(x[k] / step, -32, 31)) + 32)
            elif factor[j] != 0:
                levels[k] = np.uint8(np.int32(level(factor[j] * x[k], -32, 31)) + 32)
            else:
                levels[k] = 0
    for half in range(2):
        for k in range(32):
            a, b = levels[half * 128 + k], levels[half * 128 + 32 + k]
            c, e = levels[half * 128 + 64 + k], levels[half * 128 + 96 + k]
            row[half * 64 + k] = (a & 15) | (c & 15) << 4
            row[half * 64 + 32 + k] = (b & 15) | (e & 15) << 4
            row[128 + half * 32 + k] = a >> 4 | b >> 4 << 2 | c >> 4 << 4 | e >> 4 << 6


@compiled
def _weigh_by_size(tile, weight):  # type: ignore[no-untyped-def]
    """weight = root mean square of the lane + |x|."""
    total = np.zeros(LANES, np.float32)
    for k in range(tile.shape[0]):
        for lane in range(LANES):
            total[lane] += tile[k, lane] * tile[k, lane]
    for lane in range(LANES):
        total[lane] = np.sqrt(total[lane] / np.float32(tile.shape[0]))
    for k in range(tile.shape[0]):
        for lane in range(LANES):
            weight[k, lane] = total[lane] + abs(tile[k, lane])


@compiled
def _weigh_by_importance(tile, weight, energy, first):  # type: ignore[no-untyped-def]
    """weight · √(σ² + x²), σ² twice the mean square of the block: energy is Σ x² of block first + lane / 8."""
    spread = np.empty(LANES, np.float32)
    for lane in range(LANES):
        spread[lane] = np.float32(2) * energy[first + lane // 8] / np.float32(256)
    weigh(tile, weight, spread)


@compiled
def _pack_scales(scales, mins, clamp, row):  # type: ignore[no-untyped-def]
    """8 + 8 codes of 6 bits → row[4:16]."""
    for j in range(8):
        s, m = scales[j], mins[j]
        if clamp:
            s, m = min(s, np.uint8(63)), min(m, np.uint8(63))
        if j < 4:
            row[4 + j] = s
            row[8 + j] = m
        else:
            row[8 + j] = (s & 15) | (m & 15) << 4
            row[j] |= s >> 4 << 6
            row[4 + j] |= m >> 4 << 6


@compiled
def _round_affine(x, d, m, row, j, nmax, factor, origin, levels):  # type: ignore[no-untyped-def]
    """Levels of sub-block j with the scale and min that row[4:16] holds (get_scale_min_k4)."""
    if j < 4:
        s, n = row[4 + j] & 63, row[8 + j] & 63
    else:
        s, n = (row[8 + j] & 15) | row[j] >> 6 << 4, row[8 + j] >> 4 | row[4 + j] >> 6 << 4
    step, depth = d * np.float32(s), m * np.float32(n)
    if step != 0:
        for k in range(32):
            levels[k] = np.uint8(level((x[k] + depth) / step, 0, nmax))
    else:
        for k in range(32):
            levels[k] = np.uint8(level(factor * (x[k] - origin), 0, nmax))


@compiled
def _pack4(levels, row):  # type: ignore[no-untyped-def]
    for pair in range(4):
        for k in range(32):
            row[pair * 32 + k] = levels[pair * 64 + k] | levels[pair * 64 + 32 + k] << 4


@compiled
def _pack5(levels, row):  # type: ignore[no-untyped-def]
    row[16:48] = 0
    for pair in range(4):
        for k in range(32):
            a, b = levels[pair * 64 + k], levels[pair * 64 + 32 + k]
            row[48 + pair * 32 + k] = (a & 15) | (b & 15) << 4
            row[16 + k] |= a >> 4 << (2 * pair) | b >> 4 << (2 * pair + 1)


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
