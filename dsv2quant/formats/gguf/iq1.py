"""IQ1_S and IQ1_M blocks of 256 values: each of three levels, −1, 0 and 1, that are shifted by an eighth to one side,
in groups of 8 that are points of a grid (ggml/src/ggml-quants.c, quantize_row_iq1_s_impl and quantize_row_iq1_m_impl).

A sub-block has a scale of 3 bits and a side, in IQ1_M one for each of its two groups. Of the values in ascending order
the first are −1 and the last 1: every way to cut them is tried. Equal values keep their order, as glibc's qsort has it.
"""

from __future__ import annotations

import numpy as np

from dsv2quant.formats.gguf.grids import pick
from dsv2quant.formats.gguf.lattice import load_weighted
from dsv2quant.formats.gguf.search import LANES, compiled, half_bits, nearest, put_half

_SHIFT = np.float32(0.125)
# −1, 0 and 1 on the upper side and on the lower
_U0, _U1, _U2 = np.float32(-0.875), np.float32(0.125), np.float32(1.125)
_L0, _L1, _L2 = np.float32(-1.125), np.float32(-0.125), np.float32(0.875)

_LEAST = np.finfo(np.float32).min


@compiled
def encode_iq1_s(x, importance, grid, out):  # type: ignore[no-untyped-def]
    """x float32 [blocks, 256], importance float32 [blocks of a row, 256] → out uint8 [blocks, 50]."""
    tile, weight, ranks, scale, shift, keys = _buffers(32)
    sum_x, sum_w = np.empty((33, LANES), np.float32), np.empty((33, LANES), np.float32)
    for first in range(0, len(x), LANES // 8):
        load_weighted(x, importance, first, 2.0, 0.0, tile, weight)
        alive = _rank(tile, np.float32(1e-12), ranks)
        _accumulate(tile, weight, ranks, 0, 32, sum_x, sum_w)
        cut = _cut(sum_x, sum_w, scale)
        for lane in range(LANES):
            alive[lane] &= cut[lane] >= 0
            for group in range(4):
                shift[group, lane] = -_SHIFT if cut[lane] & 1 else _SHIFT
        _settle(tile, weight, ranks, cut >> 1, alive, grid, scale, shift, keys)
        for block in range(min(LANES // 8, len(x) - first)):
            at, end = block * 8, block * 8 + 8
            _store_s(scale[at:end], shift[0, at:end], grid.codes, keys[:, at:end], out[first + block])


@compiled
def encode_iq1_m(x, importance, grid, out):  # type: ignore[no-untyped-def]
    """x float32 [blocks, 256], importance float32 [blocks of a row or 0, 256] → out uint8 [blocks, 56]."""
    tile, weight, ranks, scale, shift, keys = _buffers(16)
    sum_x, sum_w = np.empty((2, 17, LANES), np.float32), np.empty((2, 17, LANES), np.float32)
    for first in range(0, len(x), LANES // 16):
        load_weighted(x, importance, first, 2.0, 0.0, tile, weight)
        alive = _rank(tile, np.float32(1e-7), ranks)
        for half in range(2):
            _accumulate(tile, weight, ranks, half * 8, half * 8 + 8, sum_x[half], sum_w[half])
        cut = _cut_halves(sum_x, sum_w, scale)
        for lane in range(LANES):
            alive[lane] &= cut[lane] >= 0
            shift[0, lane] = -_SHIFT if cut[lane] & 2 else _SHIFT
            shift[1, lane] = -_SHIFT if cut[lane] & 1 else _SHIFT
        _settle(tile, weight, ranks, cut >> 2, alive, grid, scale, shift, keys)
        for block in range(min(LANES // 16, len(x) - first)):
            at, end = block * 16, block * 16 + 16
            _store_m(tile[:, at:end], weight[:, at:end], scale[at:end], shift[:, at:end], grid.codes, keys[:, at:end],
                     out[first + block])  # fmt: skip


@compiled
def _buffers(size):  # type: ignore[no-untyped-def]
    """Sub-blocks' values, weights and ranks [size, lane], their scales [lane], and shifts and keys [group, lane]."""
    return (
        np.empty((size, LANES), np.float32),
        np.empty((size, LANES), np.float32),
        np.empty((size, LANES), np.int32),
        np.empty(LANES, np.float32),
        np.empty((size // 8, LANES), np.float32),
        np.empty((size // 8, LANES), np.int32),
    )


@compiled
def _rank(tile, tiny, ranks):  # type: ignore[no-untyped-def]
    """ranks: how many values come before each in ascending order. Which lanes are not zero is returned."""
    alive = np.zeros(LANES, np.bool_)
    ranks[:] = 0
    for k in range(len(tile)):
        for lane in range(LANES):
            alive[lane] |= abs(tile[k, lane]) >= tiny
        for before in range(k):
            for lane in range(LANES):
                is_less = np.int32(tile[k, lane] < tile[before, lane])
                ranks[before, lane] += is_less
                ranks[k, lane] += np.int32(1) - is_less
    return alive


@compiled
def _accumulate(tile, weight, ranks, begin, end, sum_x, sum_w):  # type: ignore[no-untyped-def]
    """sum_x and sum_w [rank, lane]: Σ w·x and Σ w over elements begin … end − 1 of lower ranks."""
    sum_x[:] = 0
    sum_w[:] = 0
    for k in range(begin, end):
        for lane in range(LANES):
            at = ranks[k, lane] + np.int32(1)
            sum_x[at, lane] = weight[k, lane] * tile[k, lane]
            sum_w[at, lane] = weight[k, lane]
    for at in range(1, len(sum_x)):
        for lane in range(LANES):
            sum_x[at, lane] += sum_x[at - 1, lane]
            sum_w[at, lane] += sum_w[at - 1, lane]


# Cuts at ranks i ≤ j are numbers 64 · i + j, times the choices of sides; −1 where no weight is above zero.


@compiled
def _cut(sum_x, sum_w, scale):  # type: ignore[no-untyped-def]
    """The best cut of each lane times 2, plus 1 on the lower side, and its scale, which may be negative."""
    best, found = np.full(LANES, _LEAST), np.full(LANES, np.int32(-1))
    last = len(sum_x) - 1
    for i in range(last + 1):
        for j in range(i, last + 1):
            for lane in range(LANES):
                x0, w0 = sum_x[i, lane], sum_w[i, lane]
                x1, w1 = sum_x[j, lane] - x0, sum_w[j, lane] - w0
                x2, w2 = sum_x[last, lane] - sum_x[j, lane], sum_w[last, lane] - sum_w[j, lane]
                kept = scale[lane], best[lane], found[lane]
                number = np.int32(128 * i + 2 * j)
                xq = x0 * _U0 + x1 * _U1 + x2 * _U2
                kept = _better(xq, w0 * _U0 * _U0 + w1 * _U1 * _U1 + w2 * _U2 * _U2, number, kept)
                xq = x0 * _L0 + x1 * _L1 + x2 * _L2
                kept = _better(xq, w0 * _L0 * _L0 + w1 * _L1 * _L1 + w2 * _L2 * _L2, number + np.int32(1), kept)
                scale[lane], best[lane], found[lane] = kept
    return found


@compiled
def _better(xq, qq, number, kept):  # type: ignore[no-untyped-def]
    """(scale, score, number), or those that are kept."""
    scale, best, found = kept
    is_better = (qq > 0) & (xq * xq > best * qq)
    new = xq / qq
    return new if is_better else scale, new * xq if is_better else best, number if is_better else found


@compiled
def _cut_halves(sum_x, sum_w, scale):  # type: ignore[no-untyped-def]
    """The best cut of each lane times 4, plus 2 where the first half is on the lower side and 1 where the second is,
    and its scale. Sums are ggml's: all of a half are 1, and what comes before a rank of the cut is one less.
    """
    best, found = np.full(LANES, _LEAST), np.full(LANES, np.int32(-1))
    last = sum_x.shape[1] - 1
    for i in range(last + 1):
        for j in range(i, last + 1):
            for lane in range(LANES):
                step = sum_x[0, i, lane] + sum_x[0, j, lane]
                upper_x0, lower_x0 = sum_x[0, last, lane] * _U2 - step, sum_x[0, last, lane] * _L2 - step
                step = sum_x[1, i, lane] + sum_x[1, j, lane]
                upper_x1, lower_x1 = sum_x[1, last, lane] * _U2 - step, sum_x[1, last, lane] * _L2 - step
                upper_w0, lower_w0 = _weights_of(sum_w[0, last, lane], sum_w[0, i, lane], sum_w[0, j, lane])
                upper_w1, lower_w1 = _weights_of(sum_w[1, last, lane], sum_w[1, i, lane], sum_w[1, j, lane])
                kept = scale[lane], best[lane], found[lane]
                number = np.int32(256 * i + 4 * j)
                kept = _better(upper_x0 + upper_x1, upper_w0 + upper_w1, number, kept)
                kept = _better(upper_x0 + lower_x1, upper_w0 + lower_w1, number + np.int32(1), kept)
                kept = _better(lower_x0 + upper_x1, lower_w0 + upper_w1, number + np.int32(2), kept)
                kept = _better(lower_x0 + lower_x1, lower_w0 + lower_w1, number + np.int32(3), kept)
                scale[lane], best[lane], found[lane] = kept
    return found


@compiled
def _weights_of(total, first, second):  # type: ignore[no-untyped-def]
    """Σ w·q² of a half on the upper side and on the lower."""
    upper = total * _U2 * _U2 + first * (_U0 * _U0 - _U1 * _U1) + second * (_U1 * _U1 - _U2 * _U2)
    lower = total * _L2 * _L2 + first * (_L0 * _L0 - _L1 * _L1) + second * (_L1 * _L1 - _L2 * _L2)
    return upper, lower


@compiled
def _settle(tile, weight, ranks, cut, alive, grid, scale, shift, keys):  # type: ignore[no-untyped-def]
    """keys [group, lane] of points, and the scale, made positive, that fits them; 0 of lanes that are not alive."""
    values, weights = np.empty((LANES, len(tile)), np.float32), np.empty((LANES, len(tile)), np.float32)
    missed, any_missed = np.zeros(keys.shape, np.bool_), np.zeros(LANES, np.bool_)
    sum_xq, sum_qq = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    keys[:] = 0
    for k in range(len(tile)):
        for lane in range(LANES):
            values[lane, k], weights[lane, k] = tile[k, lane], weight[k, lane]
            level = np.int32(ranks[k, lane] >= cut[lane] >> 6) + np.int32(ranks[k, lane] >= cut[lane] & 63)
            level = np.int32(2) - level if scale[lane] < 0 else level
            keys[k // 8, lane] |= level << np.int32(2 * (k % 8))
    for group in range(len(keys)):
        for lane in range(LANES):
            shift[group, lane] = -shift[group, lane] if scale[lane] < 0 else shift[group, lane]
    for lane in range(LANES):
        scale[lane] = abs(scale[lane]) if alive[lane] else np.float32(0)
    pick(keys, values, weights, scale, alive, grid, shift, keys, missed)
    for k in range(len(tile)):
        for lane in range(LANES):
            any_missed[lane] |= missed[k // 8, lane]
            q = _value(keys[k // 8, lane], k % 8, shift[k // 8, lane])
            sum_xq[lane] += weight[k, lane] * q * tile[k, lane]
            sum_qq[lane] += weight[k, lane] * q * q
    for lane in range(LANES):
        fits = any_missed[lane] & (sum_xq[lane] > 0) & (sum_qq[lane] > 0)
        scale[lane] = sum_xq[lane] / sum_qq[lane] if fits else scale[lane]
        if not alive[lane]:
            keys[:, lane] = 0
            shift[:, lane] = _SHIFT


@compiled
def _value(key, i, shift):  # type: ignore[no-untyped-def]
    return np.float32((key >> np.int32(2 * i) & np.int32(3)) - np.int32(1)) + shift


@compiled
def _nibble(scale, d):  # type: ignore[no-untyped-def]
    """The code of 3 bits of a sub-block's scale, which is 2 · code + 1 times d."""
    v = np.float32(0.5) * ((np.float32(1) / d) * scale - np.float32(1))
    return min(max(nearest(v), np.int32(0)), np.int32(7))


@compiled
def _store_s(scale, shift, codes, keys, row):  # type: ignore[no-untyped-def]
    """A block of its sub-blocks' scales and shifts [8] and keys [4, 8]: d, codes' low 8 bits, and words of their high 3
    bits, the scale and the side."""
    top = scale.max()
    d = top / np.float32(15)
    put_half(row, 0, d * np.float32(1.125))
    for sub in range(8):
        word = np.int32(0)
        for k in range(4):
            code = codes[keys[k, sub]]
            row[2 + sub * 4 + k] = np.uint8(code & 255)
            word |= np.int32(code >> 8 << 3 * k)
        if top > 0:
            word |= _nibble(scale[sub], d) << np.int32(12) | np.int32(shift[sub] < 0) << np.int32(15)
        row[34 + sub * 2], row[35 + sub * 2] = np.uint8(word & 255), np.uint8(word >> 8)


@compiled
def _store_m(x, weight, scale, shift, codes, keys, row):  # type: ignore[no-untyped-def]
    """A block of its values and weights [16, sub-block], sub-blocks' scales [16], shifts and keys [2, 16]: codes' low 8
    bits, nibbles of their high 3 bits and the side, four words of four scales and a fourth of d."""
    top = scale.max()
    d, xq, qq = top / np.float32(15), np.float32(0), np.float32(0)
    row[48:56] = 0
    for sub in range(16):
        nibble = _nibble(scale[sub], d) if top > 0 else np.int32(0)
        row[48 + sub // 4 * 2] |= np.uint8(nibble << 3 * (sub % 4) & 255)
        row[49 + sub // 4 * 2] |= np.uint8(nibble << 3 * (sub % 4) >> 8)
        row[32 + sub] = 0
        for k in range(2):
            code = codes[keys[k, sub]]
            row[2 * sub + k] = np.uint8(code & 255)
            row[32 + sub] |= np.uint8((code >> 8 | (8 if top > 0 and shift[k, sub] < 0 else 0)) << 4 * k)
            for i in range(8):
                q = _value(keys[k, sub], i, shift[k, sub]) * np.float32(2 * nibble + 1)
                wq = weight[k * 8 + i, sub] * q
                xq += wq * x[k * 8 + i, sub]
                qq += wq * q
    if top > 0:
        half = half_bits((xq / qq if qq > 0 else d) * np.float32(1.1125))
        for part in range(4):
            row[49 + part * 2] |= np.uint8((half >> np.uint16(4 * part) & np.uint16(15)) << np.uint16(4))
