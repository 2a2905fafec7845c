"""IQ2 and IQ3 blocks of 256 values, whose magnitudes are groups of 8 or 4 odd levels, each a point of a grid
(ggml/src/ggml-quants.c, quantize_row_iq2_xxs_impl and its like).

A sub-block of 16 or 32 values has a scale of 4 bits. Scales are tried one after the other: a group that is rounded to
no point of the grid takes the nearest of its neighbours. In some types the signs of 8 values are 7 bits, as their
number is even: where it isn't, the value that matters least changes its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsv2quant.formats.gguf.grids import grid, pick
from dsv2quant.formats.gguf.search import (
    LANES,
    compiled,
    load,
    load_cyclic,
    nearest,
    put_half,
    search_positive,
    sum_squares,
    weigh,
)


class Search(NamedTuple):
    """How a type looks for its scales."""

    size: int  # of a sub-block
    even: bool  # signs are 7 bits for 8 values
    tiny: float  # a sub-block whose magnitudes are all below is zero
    times: float  # of the block's mean square in weights with importance, √(times · mean + x²)
    floor: float  # of that in weights without: floor · times · mean + x²
    tries: int  # scales to each side of the first
    step: float  # between them, in levels of the largest value
    refit: int  # of the groups, once a scale is found: 0 those off the grid, 1 all where one is, 2 all
    fudge: float  # of the block's scale


_SEARCHES = {
    "IQ2_XXS": Search(32, True, 1e-15, 1.0, 0.0, 6, 0.1, 2, 1.0),
    "IQ2_XS": Search(16, True, 1e-15, 1.0, 0.0, 9, 0.1, 0, 1.0),
    "IQ2_S": Search(16, False, 1e-8, 2.0, 0.25, 9, 0.1, 0, 0.9875),
    "IQ3_XXS": Search(32, True, 1e-8, 2.0, 0.0, 15, 0.2, 0, 1.0125),
    "IQ3_S": Search(32, False, 2.0**-149, 2.0, 0.0, 9, 0.2, 1, 1.033),
}


def encode(name: str, x: np.ndarray, importance: np.ndarray, out: np.ndarray) -> None:
    """x float32 [blocks, 256], importance float32 [blocks of a row or 0, 256] → out uint8 [blocks, bytes]."""
    _encode(x, importance, grid(name), _SEARCHES[name], out)


@compiled
def _encode(x, importance, grid, search, out):  # type: ignore[no-untyped-def]
    size, subs = search.size, 256 // search.size
    tile, weight = np.empty((size, LANES), np.float32), np.empty((size, LANES), np.float32)
    scale, signs = np.empty(LANES, np.float32), np.empty((size // 8, LANES), np.uint8)
    codes = np.empty((size // grid.values.shape[1], LANES), np.int32)
    for first in range(0, len(x), LANES // subs):
        load_weighted(x, importance, first, search.times, search.floor, tile, weight)
        _take_signs(tile, weight, search.even, signs)
        _search(tile, weight, grid, search, scale, codes)
        for lane in range(LANES):
            if scale[lane] < 0:
                scale[lane] = -scale[lane]
                for k in range(len(signs)):
                    signs[k, lane] ^= np.uint8(127 if search.even else 255)
        for block in range(min(LANES // subs, len(x) - first)):
            at, end = block * subs, block * subs + subs
            _store(scale[at:end], codes[:, at:end], signs[:, at:end], np.float32(search.fudge), out[first + block])


@compiled
def load_weighted(x, importance, first, times, floor, tile, weight):  # type: ignore[no-untyped-def]
    """Sub-blocks from block `first` on, and as weights importance · √(σ² + x²), or without importance floor · σ² + x²;
    σ² is `times` the mean square of the block."""
    size = len(tile)
    subs, spread = 256 // size, np.empty(LANES, np.float32)
    load(x.reshape(-1, size), first * subs, tile)
    sum_squares(x[: first + LANES // subs], first, spread)
    for lane in range(LANES - 1, -1, -1):
        spread[lane] = np.float32(times) * spread[lane // subs] / np.float32(256)
    if len(importance):
        load_cyclic(importance.reshape(-1, size), first * subs, weight)
        weigh(tile, weight, spread)
        return
    for k in range(size):
        for lane in range(LANES):
            weight[k, lane] = np.float32(floor) * spread[lane] + tile[k, lane] * tile[k, lane]


@compiled
def _take_signs(tile, weight, even, signs):  # type: ignore[no-untyped-def]
    """Leave magnitudes in the tile and put signs [group of 8, lane] as bits, the first in the lowest. Where they must
    be `even`, one value may stay negative, and the eighth bit is left out."""
    for group in range(tile.shape[0] // 8):
        for lane in range(LANES):
            bits, odd = np.int32(0), np.int32(0)
            least, at = np.float32(np.inf), np.int32(0)
            for i in range(8):
                x = tile[group * 8 + i, lane]
                matters = weight[group * 8 + i, lane] * x * x
                if x < 0:
                    tile[group * 8 + i, lane] = -x
                    bits |= np.int32(1) << i
                    odd ^= np.int32(1)
                if i == 0 or matters < least:
                    least, at = matters, np.int32(i)
            if even and odd:
                tile[group * 8 + at, lane] = -tile[group * 8 + at, lane]
                bits ^= np.int32(1) << at
            signs[group, lane] = np.uint8(bits & np.int32(127 if even else 255))


@compiled
def _search(tile, weight, grid, search, scale, codes):  # type: ignore[no-untyped-def]
    """scale [lane] and codes [group, lane] of the least weighted error; 0 and −1 of a lane of zeros. Until the end,
    codes are keys."""
    values, roots = np.empty((LANES, len(tile)), np.float32), np.empty((LANES, len(tile)), np.float32)
    for lane in range(LANES):
        for k in range(len(tile)):
            values[lane, k], roots[lane, k] = tile[k, lane], np.sqrt(weight[k, lane])
    top = np.float32(5 if grid.values.shape[1] == 8 else 15)
    span, trial, unit = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    sum_xq, sum_qq = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    best, alive, better = np.zeros(LANES, np.float32), np.empty(LANES, np.bool_), np.empty(LANES, np.bool_)
    keys, picked = np.empty(codes.shape, np.int32), np.zeros(codes.shape, np.int32)
    off, missed = np.full(codes.shape, search.refit != 0), np.zeros(codes.shape, np.bool_)
    _begin(tile, weight, search, top, span, alive, scale)
    codes[:] = 0
    for step in range(-search.tries, search.tries + 1):
        for lane in range(LANES):
            trial[lane] = (top + np.float32(step) * np.float32(search.step)) / span[lane]
            unit[lane] = np.float32(1) / trial[lane]
        _keys(tile, trial, keys)
        pick(keys, values, roots, unit, alive, grid, None, picked, missed)
        _sums(tile, weight, picked, sum_xq, sum_qq)
        for lane in range(LANES):
            xq, qq = sum_xq[lane], sum_qq[lane]
            better[lane] = (qq > 0) & (xq * xq > best[lane] * qq)
            scale[lane] = xq / qq if better[lane] else scale[lane]
            best[lane] = scale[lane] * xq if better[lane] else best[lane]
        _keep(better, picked, codes)
        _keep(better, missed, off)
    _refit(off, search.refit, scale, alive, trial, better)
    _keys(tile, trial, keys)
    pick(keys, values, roots, scale, better, grid, None, picked, missed)
    for group in range(len(codes)):
        for lane in range(LANES):
            if better[lane] and (search.refit or off[group, lane]):
                codes[group, lane] = picked[group, lane]
    _sums(tile, weight, codes, sum_xq, sum_qq)
    for lane in range(LANES):
        scale[lane] = sum_xq[lane] / sum_qq[lane] if better[lane] & (sum_qq[lane] > 0) else scale[lane]
        scale[lane] = scale[lane] if alive[lane] else np.float32(0)
        for group in range(len(codes)):
            codes[group, lane] = grid.codes[codes[group, lane]] if alive[lane] else np.int32(-1)


@compiled
def _begin(tile, weight, search, top, span, alive, scale):  # type: ignore[no-untyped-def]
    """What the largest level is tried for, which lanes are not zero, and the first scale."""
    for lane in range(LANES):
        span[lane] = tile[0, lane]
    for k in range(1, len(tile)):
        for lane in range(LANES):
            span[lane] = tile[k, lane] if tile[k, lane] > span[lane] else span[lane]
    for lane in range(LANES):
        alive[lane] = span[lane] >= np.float32(search.tiny)
        scale[lane] = span[lane] / top
    if search.refit == 2:
        levels = np.empty(tile.shape, np.uint8)
        search_positive(tile, weight, 4, scale, levels)
        for lane in range(LANES):
            span[lane] = scale[lane] * np.float32(3)
            alive[lane] = alive[lane] and span[lane] > 0


@compiled
def _keep(better, new, kept):  # type: ignore[no-untyped-def]
    for group in range(len(kept)):
        for lane in range(LANES):
            kept[group, lane] = new[group, lane] if better[lane] else kept[group, lane]


@compiled
def _refit(off, refit, scale, alive, trial, again):  # type: ignore[no-untyped-def]
    """Which lanes are rounded again, with the scale that was found."""
    for lane in range(LANES):
        again[lane] = refit == 2
        trial[lane] = np.float32(1) / scale[lane]
    for group in range(len(off)):
        for lane in range(LANES):
            again[lane] |= off[group, lane]
    for lane in range(LANES):
        again[lane] &= alive[lane] & (scale[lane] > 0)


@compiled
def _keys(tile, trial, keys):  # type: ignore[no-untyped-def]
    """keys [group, lane] of the values times trial, rounded to values 2 l + 1 of levels l."""
    width = len(tile) // len(keys)
    bits, last = (2, np.int32(2)) if width == 8 else (3, np.int32(7))
    keys[:] = 0
    for group in range(len(keys)):
        for i in range(width):
            for lane in range(LANES):
                v = np.float32(0.5) * (trial[lane] * tile[group * width + i, lane] - np.float32(1))
                keys[group, lane] |= min(max(nearest(v), np.int32(0)), last) << np.int32(bits * i)


@compiled
def _sums(tile, weight, keys, sum_xq, sum_qq):  # type: ignore[no-untyped-def]
    """Per lane Σ w·x·q and Σ w·q² with the values of keys [group, lane]."""
    width = len(tile) // len(keys)
    bits, mask = (2, np.int32(3)) if width == 8 else (3, np.int32(7))
    sum_xq[:] = 0
    sum_qq[:] = 0
    for group in range(len(keys)):
        for i in range(width):
            for lane in range(LANES):
                q = np.float32(np.int32(2) * (keys[group, lane] >> np.int32(bits * i) & mask) + np.int32(1))
                w = weight[group * width + i, lane]
                sum_xq[lane] += w * tile[group * width + i, lane] * q
                sum_qq[lane] += w * q * q


_IQ2_XXS, _IQ2_XS, _IQ2_S, _IQ3_XXS, _IQ3_S = 66, 74, 82, 98, 110  # bytes of a block


@compiled
def _store(scale, codes, signs, fudge, row):  # type: ignore[no-untyped-def]
    """A block of its sub-blocks' scales [subs], codes [groups, subs] and signs [groups of 8, subs]; the length of row
    says the type."""
    top, kind = np.float32(0), len(row)
    for sub in range(len(scale)):
        top = max(top, scale[sub])
    d = top / np.float32(31)
    row[:] = 0
    put_half(row, 0, d * fudge)
    if top == 0 and kind not in (_IQ2_S, _IQ3_S):
        return
    nibbles = np.zeros(len(scale), np.uint8)
    for sub in range(len(scale)):
        if top > 0:
            v = np.float32(0.5) * ((np.float32(1) / d) * scale[sub] - np.float32(1))
            nibbles[sub] = np.uint8(min(max(nearest(v), np.int32(0)), np.int32(15)))
        if codes[0, sub] < 0 and kind != _IQ3_S:
            codes[:, sub] = 0
            signs[:, sub] = 0
    if kind in (_IQ2_XXS, _IQ3_XXS):
        _store_words(nibbles, codes, signs, row)
    elif kind == _IQ2_XS:
        for sub in range(16):
            for k in range(2):
                at, word = 2 + sub * 4 + k * 2, codes[k, sub] | np.int32(signs[k, sub]) << 9
                row[at], row[at + 1] = np.uint8(word & 255), np.uint8(word >> 8)
            row[66 + sub // 2] |= nibbles[sub] << (4 * (sub % 2))
    elif kind == _IQ2_S:
        for sub in range(16):
            for k in range(2):
                at = sub * 2 + k
                row[2 + at] = np.uint8(codes[k, sub] & 255)
                row[34 + at] = signs[k, sub]
                row[66 + at // 4] |= np.uint8(codes[k, sub] >> 8 << (2 * (at % 4)))
            row[74 + sub // 2] |= nibbles[sub] << (4 * (sub % 2))
    else:
        _store_iq3_s(nibbles, codes, signs, row)


@compiled
def _store_words(nibbles, codes, signs, row):  # type: ignore[no-untyped-def]
    """IQ2_XXS and IQ3_XXS: codes of 8 bits, and words of four times 7 signs below the scale's 4 bits. The words follow
    the codes of their sub-block, in IQ3_XXS those of the block."""
    groups = len(codes)
    for sub in range(8):
        start = 2 + sub * 8
        for k in range(groups):
            row[start + k] = np.uint8(codes[k, sub])
        word = np.uint32(nibbles[sub]) << np.uint32(28)
        for k in range(4):
            word |= np.uint32(signs[k, sub]) << np.uint32(7 * k)
        start = start + 4 if groups == 4 else 66 + sub * 4
        for k in range(4):
            row[start + k] = np.uint8((word >> np.uint32(8 * k)) & np.uint32(255))


@compiled
def _store_iq3_s(nibbles, codes, signs, row):  # type: ignore[no-untyped-def]
    """As ggml has it, codes and signs behind a sub-block of zeros lie in its place, and high bits in their own."""
    at = 0
    for sub in range(8):
        row[106 + sub // 2] |= nibbles[sub] << (4 * (sub % 2))
        if codes[0, sub] < 0:
            continue
        for k in range(8):
            row[2 + at * 8 + k] = np.uint8(codes[k, sub] & 255)
            row[66 + sub] |= np.uint8(codes[k, sub] >> 8 << k)
        for k in range(4):
            row[74 + at * 4 + k] = signs[k, sub]
        at += 1
