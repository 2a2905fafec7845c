"""What the compiled block quantizers share: blocks in lockstep, ggml's rounding, float16 by its bits.

ggml's x86-64 library adds a block's terms in order, without FMA. To use the vector unit and still add in that order,
`LANES` blocks are searched at a time: arrays are [element, lane] and the innermost loop runs over lanes. One thread
each; the GIL is released.

The scale searches of ggml (ggml/src/ggml-quants.c) over tiles [element, lane] of `LANES` blocks in lockstep.

A search gives each lane's scale and the factor (and origin) its levels were rounded with, so that the levels can be
computed again instead of being kept.
"""

from __future__ import annotations

import numpy as np

from dsv2quant.formats.compiled import compiled

LANES = 64
TINY = np.float32(1e-15)  # GROUP_MAX_EPS: a block whose magnitudes are all below is taken as zero

_MAGIC = np.float32(12582912)  # 1.5 × 2^23


@compiled
def nearest(v):  # type: ignore[no-untyped-def]
    """ggml's nearest_int: ties to even; beyond ±2^22 what the bits happen to say."""
    bits = np.float32(v + _MAGIC).view(np.int32)
    return np.int32(np.int32(bits & np.int32(0x7FFFFF)) - np.int32(0x400000))


@compiled
def level(v, low, high):  # type: ignore[no-untyped-def]
    """nearest(v) within [low, high], as float32."""
    return np.float32(min(max(nearest(v), np.int32(low)), np.int32(high)))


@compiled
def half_bits(x):  # type: ignore[no-untyped-def]
    """float32 → the bits of the nearest float16, ties to even; too large becomes infinity."""
    bits = np.float32(x).view(np.uint32)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if size > np.uint32(0x7F800000):
        return np.uint16(sign | np.uint32(0x7E00))
    if size >= np.uint32(0x477FF000):
        return np.uint16(sign | np.uint32(0x7C00))
    if size < np.uint32(0x38800000):  # subnormal: adding 0.5 rounds to a multiple of 2^-24
        rounded = np.float32(size.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
    else:
        odd = (size >> np.uint32(13)) & np.uint32(1)
        rounded = (size + np.uint32(0xFFF) + odd - np.uint32(0x38000000)) >> np.uint32(13)
    return np.uint16(sign | rounded)


@compiled
def half_value(bits):  # type: ignore[no-untyped-def]
    """The bits of a float16 → float32."""
    bits = np.uint32(bits)
    size = bits & np.uint32(0x7FFF)
    if size < np.uint32(0x400):
        value = np.float32(size) * np.float32(2.0**-24)
    elif size >= np.uint32(0x7C00):
        value = np.uint32((size << np.uint32(13)) | np.uint32(0x7F800000)).view(np.float32)
    else:
        value = np.uint32((size << np.uint32(13)) + np.uint32(0x38000000)).view(np.float32)
    return -value if bits & np.uint32(0x8000) else value


@compiled
def put_half(out, at, x):  # type: ignore[no-untyped-def]
    """Write x as a float16 to out[at : at + 2], little-endian, and return the value it holds now."""
    bits = half_bits(x)
    out[at] = np.uint8(bits & np.uint16(0xFF))
    out[at + 1] = np.uint8(bits >> np.uint16(8))
    return half_value(bits)


@compiled
def load(blocks, first, tile):  # type: ignore[no-untyped-def]
    """tile[k, lane] = blocks[first + lane, k]; zero beyond the last block."""
    count = min(LANES, blocks.shape[0] - first)
    for lane in range(count):
        for k in range(tile.shape[0]):
            tile[k, lane] = blocks[first + lane, k]
    for lane in range(count, LANES):
        for k in range(tile.shape[0]):
            tile[k, lane] = 0


@compiled
def load_cyclic(blocks, first, tile):  # type: ignore[no-untyped-def]
    """tile[k, lane] = blocks[(first + lane) % len(blocks), k]: what one row holds of a matrix of equal rows."""
    row = first % blocks.shape[0]
    for lane in range(LANES):
        for k in range(tile.shape[0]):
            tile[k, lane] = blocks[row, k]
        row += 1
        if row == blocks.shape[0]:
            row = 0


@compiled
def weigh(tile, weight, spread):  # type: ignore[no-untyped-def]
    """weight · √(spread[lane] + x²)."""
    for k in range(tile.shape[0]):
        for lane in range(LANES):
            weight[k, lane] *= np.sqrt(spread[lane] + tile[k, lane] * tile[k, lane])


@compiled
def weigh_by_square(tile, weight):  # type: ignore[no-untyped-def]
    """weight = x²."""
    for k in range(tile.shape[0]):
        for lane in range(LANES):
            weight[k, lane] = tile[k, lane] * tile[k, lane]


@compiled
def sum_squares(blocks, first, total):  # type: ignore[no-untyped-def]
    """total[lane] = Σ_k blocks[first + lane, k]²; zero beyond the last block."""
    total[:] = 0
    count = min(LANES, blocks.shape[0] - first)
    for k in range(blocks.shape[1]):
        for lane in range(count):
            x = blocks[first + lane, k]
            total[lane] += x * x


@compiled
def sum_weights(weight, total):  # type: ignore[no-untyped-def]
    """total[lane] = Σ_k weight."""
    total[:] = 0
    for k in range(weight.shape[0]):
        for lane in range(LANES):
            total[lane] += weight[k, lane]


@compiled
def signed_peak(tile, peak):  # type: ignore[no-untyped-def]
    """peak[lane] = the element of largest magnitude, with its sign; the first of equals."""
    peak[:] = 0
    for k in range(tile.shape[0]):
        for lane in range(LANES):
            x = tile[k, lane]
            peak[lane] = x if abs(x) > abs(peak[lane]) else peak[lane]


@compiled
def search_symmetric(tile, weight, nmax, scale, factor):  # type: ignore[no-untyped-def]
    """make_qx_quants (rmse_type 1): x ≈ scale · code, code = −nmax … nmax − 1; code = nearest(factor · x).

    A lane of zeros gets scale 0 and factor 0.
    """
    peak, trial = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    sum_xl, sum_ll = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    best = np.empty(LANES, np.float32)
    signed_peak(tile, peak)
    for step in range(19):
        shift = 0 if step == 0 else (step - 10 if step < 10 else step - 9)  # 0, then −9 … 9 without 0
        for lane in range(LANES):
            trial[lane] = -(np.float32(nmax) + np.float32(0.1) * np.float32(shift)) / peak[lane]
            sum_xl[lane] = 0
            sum_ll[lane] = 0
        for k in range(tile.shape[0]):
            for lane in range(LANES):
                x, w = tile[k, lane], weight[k, lane]
                code = level(trial[lane] * x, -nmax, nmax - 1)
                sum_xl[lane] += w * x * code
                sum_ll[lane] += w * code * code
        for lane in range(LANES):
            xl, ll = sum_xl[lane], sum_ll[lane]
            if step == 0:
                scale[lane] = xl / ll if ll != 0 else np.float32(0)
                best[lane] = scale[lane] * xl
                factor[lane] = trial[lane]
            elif ll > 0 and xl * xl > best[lane] * ll:
                scale[lane] = xl / ll
                best[lane] = scale[lane] * xl
                factor[lane] = trial[lane]
    for lane in range(LANES):
        if abs(peak[lane]) < TINY:
            scale[lane] = 0
            factor[lane] = 0


@compiled
def search_affine(tile, weight, nmax, start, step, steps, absolute, scale, depth, factor, origin):  # type: ignore[no-untyped-def]
    """make_qkx2_quants and make_qkx3_quants: x ≈ scale · code − depth, code = 0 … nmax.

    code = nearest(factor · (x − origin)). Candidates are factors (nmax + start + i · step) / (max − min) for i = 0 …
    steps; the error is weighted, squared or absolute. As in ggml, an accepted candidate's min replaces the block's for
    the candidates after it.
    """
    levels = np.empty((tile.shape[0], LANES), np.float32)
    top, low = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    sum_w, sum_x = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    sum_l, sum_ll = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    sum_xl, error = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    trial, least = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    new_scale, new_low = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    fits = np.empty(LANES, np.bool_)
    _range_and_sums(tile, weight, low, top, sum_w, sum_x)
    for lane in range(LANES):
        low[lane] = np.float32(0) if low[lane] > 0 else low[lane]
        factor[lane] = np.float32(nmax) / (top[lane] - low[lane])
        scale[lane] = np.float32(1) / factor[lane]
        origin[lane] = low[lane]
    _levels(tile, nmax, factor, low, levels)
    _error(tile, weight, levels, scale, low, absolute, least)
    for lane in range(LANES):
        if top[lane] <= low[lane]:  # a constant block: no candidate is to pass
            scale[lane] = 0
            factor[lane] = 0
            least[lane] = -np.inf
    for i in range(steps + 1):
        for lane in range(LANES):
            reach = np.float32(start) + np.float32(step) * np.float32(i) + np.float32(nmax)
            trial[lane] = reach / (top[lane] - low[lane])
        _sums(tile, weight, nmax, trial, low, levels, sum_l, sum_ll, sum_xl)
        for lane in range(LANES):
            w, wx, wl, wll, wxl = sum_w[lane], sum_x[lane], sum_l[lane], sum_ll[lane], sum_xl[lane]
            det = w * wll - wl * wl
            fitted = (wll * wx - wl * wxl) / det
            new_scale[lane] = wxl / wll if fitted > 0 else (w * wxl - wx * wl) / det
            new_low[lane] = np.float32(0) if fitted > 0 else fitted
            fits[lane] = det > 0
        _error(tile, weight, levels, new_scale, new_low, absolute, error)
        for lane in range(LANES):
            better = fits[lane] & (error[lane] < least[lane])
            least[lane] = error[lane] if better else least[lane]
            factor[lane] = trial[lane] if better else factor[lane]
            origin[lane] = low[lane] if better else origin[lane]
            scale[lane] = new_scale[lane] if better else scale[lane]
            low[lane] = new_low[lane] if better else low[lane]
    for lane in range(LANES):
        depth[lane] = -low[lane]


@compiled
def _range_and_sums(tile, weight, low, top, sum_w, sum_x):  # type: ignore[no-untyped-def]
    """The least and the largest element of each lane, and per lane Σ w, Σ w·x."""
    for lane in range(LANES):
        top[lane] = tile[0, lane]
        low[lane] = tile[0, lane]
        sum_w[lane] = weight[0, lane]
        sum_x[lane] = weight[0, lane] * tile[0, lane]  # not added to 0: it may be −0
    for k in range(1, tile.shape[0]):
        for lane in range(LANES):
            x, w = tile[k, lane], weight[k, lane]
            low[lane] = x if x < low[lane] else low[lane]
            top[lane] = x if x > top[lane] else top[lane]
            sum_w[lane] += w
            sum_x[lane] += w * x


@compiled
def _levels(tile, nmax, factor, low, levels):  # type: ignore[no-untyped-def]
    for k in range(tile.shape[0]):
        for lane in range(LANES):
            levels[k, lane] = level(factor[lane] * (tile[k, lane] - low[lane]), 0, nmax)


@compiled
def _sums(tile, weight, nmax, factor, low, levels, sum_l, sum_ll, sum_xl):  # type: ignore[no-untyped-def]
    """levels, and per lane Σ w·code, Σ w·l², Σ w·code·x."""
    sum_l[:] = 0
    sum_ll[:] = 0
    sum_xl[:] = 0
    for k in range(tile.shape[0]):
        for lane in range(LANES):
            x = tile[k, lane]
            code = level(factor[lane] * (x - low[lane]), 0, nmax)
            levels[k, lane] = code
            wl = weight[k, lane] * code
            sum_l[lane] += wl
            sum_ll[lane] += wl * code
            sum_xl[lane] += wl * x


@compiled
def _error(tile, weight, levels, scale, low, absolute, error):  # type: ignore[no-untyped-def]
    """error[lane] = Σ_k weight · |scale · level + low − x|, or of its square."""
    error[:] = 0
    for k in range(tile.shape[0]):
        for lane in range(LANES):
            off = scale[lane] * levels[k, lane] + low[lane] - tile[k, lane]
            error[lane] += weight[k, lane] * (abs(off) if absolute else off * off)


@compiled
def search_positive(tile, weight, nmax, scale, levels):  # type: ignore[no-untyped-def]
    """make_qp_quants: x ≈ scale · code, code = 0 … nmax in levels uint8 [element, lane].

    A lane of zeros gets scale 0.
    """
    n = tile.shape[0]
    top, factor = np.zeros(LANES, np.float32), np.empty(LANES, np.float32)
    trial, unit = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    error, least = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    sum_xl, sum_ll = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    for k in range(n):
        for lane in range(LANES):
            top[lane] = tile[k, lane] if tile[k, lane] > top[lane] else top[lane]
    for step in range(9):
        shift = 0 if step == 0 else (step - 5 if step < 5 else step - 4)  # 0, then −4 … 4 without 0
        for lane in range(LANES):
            trial[lane] = (np.float32(0.1) * np.float32(shift) + np.float32(nmax)) / top[lane]
            unit[lane] = np.float32(1) / trial[lane]
            error[lane] = 0
        for k in range(n):
            for lane in range(LANES):
                code = nearest(trial[lane] * tile[k, lane])
                code = code & np.int32(0xFF) if step == 0 else min(code, np.int32(nmax))
                off = tile[k, lane] - unit[lane] * np.float32(code)
                error[lane] += weight[k, lane] * off * off
        for lane in range(LANES):
            if step == 0 or error[lane] < least[lane]:
                least[lane] = error[lane]
                factor[lane] = trial[lane]
    for k in range(n):
        for lane in range(LANES):
            x, w = tile[k, lane], weight[k, lane]
            code = min(nearest(factor[lane] * x), np.int32(nmax))
            levels[k, lane] = np.uint8(code & np.int32(0xFF))
            sum_xl[lane] += w * x * np.float32(code)
            sum_ll[lane] += w * np.float32(code) * np.float32(code)
    for _ in range(5):  # ggml stops at a pass without change: the passes left would change nothing
        for k in range(n):
            for lane in range(LANES):
                x, w, old = tile[k, lane], weight[k, lane], np.float32(levels[k, lane])
                xl = sum_xl[lane] - w * x * old
                ll = sum_ll[lane] - w * old * old
                code = min(nearest(x * ll / xl), np.int32(nmax))
                value = np.float32(code)
                new_xl, new_ll = xl + w * x * value, ll + w * value * value
                better = new_xl * new_xl * sum_ll[lane] > sum_xl[lane] * sum_xl[lane] * new_ll
                better = better & (xl > 0) & (ll > 0) & (value != old)
                levels[k, lane] = np.uint8(code & np.int32(0xFF)) if better else levels[k, lane]
                sum_xl[lane] = new_xl if better else sum_xl[lane]
                sum_ll[lane] = new_ll if better else sum_ll[lane]
    for lane in range(LANES):
        zero = top[lane] < TINY
        scale[lane] = sum_xl[lane] / sum_ll[lane] if sum_ll[lane] > 0 and not zero else np.float32(0)
        if zero:
            for k in range(n):
                levels[k, lane] = 0


@compiled
def search_levels(tile, weight, nmax, scale, levels):  # type: ignore[no-untyped-def]
    """search_symmetric with its levels 0 … 2 nmax − 1 as uint8 [element, lane]; 0 in a lane of zeros."""
    factor = np.empty(LANES, np.float32)
    search_symmetric(tile, weight, nmax, scale, factor)
    for k in range(tile.shape[0]):
        for lane in range(LANES):
            code = np.uint8(np.int32(level(factor[lane] * tile[k, lane], -nmax, nmax - 1)) + np.int32(nmax))
            levels[k, lane] = code if factor[lane] != 0 else np.uint8(0)


# The scales of a block's sub-blocks are values to round themselves: values and total weights [LANES * sub-blocks] →
# steps [LANES] and codes uint8 [LANES, sub-blocks].


@compiled
def round_positive(values, count, nmax, limit, steps, codes):  # type: ignore[no-untyped-def]
    """To the nearest of 0 … nmax times a step; a code that leaves this range is cut to 8 bits, and to `limit`."""
    subs = codes.shape[1]
    for block in range(count):
        top = np.float32(0)
        for j in range(subs):
            top = max(top, values[block * subs + j])
        inverse = np.float32(nmax) / top if top > 0 else np.float32(0)
        steps[block] = top / np.float32(nmax)
        for j in range(subs):
            code = nearest(inverse * values[block * subs + j])
            codes[block, j] = min(np.uint8(limit), np.uint8(code & np.int32(0xFF)))


@compiled
def fit_scales(values, total, nmax, signed, steps, codes):  # type: ignore[no-untyped-def]
    """With the least weighted error: search_positive, or search_levels where `signed`."""
    subs = codes.shape[1]
    tile, weight = np.empty((subs, LANES), np.float32), np.empty((subs, LANES), np.float32)
    levels = np.empty((subs, LANES), np.uint8)
    load(values.reshape(-1, subs), 0, tile)
    load(total.reshape(-1, subs), 0, weight)
    if signed:
        search_levels(tile, weight, nmax, steps, levels)
    else:
        search_positive(tile, weight, nmax, steps, levels)
    for lane in range(LANES):
        for j in range(subs):
            codes[lane, j] = levels[j, lane]
