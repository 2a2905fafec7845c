"""What the GGUF kernels share, and ggml's searches for scales: the counterpart of formats/gguf/search.py, which says
more of each; one lane is one thread here.

A lane holds its whole sub-block in registers: a tuple of SIZE tensors [LANES], element k of every lane in the k-th. So
it adds its terms in ggml's order whatever the compiler does with reductions. The rest of the identity: divisions and
square roots by div_rn and sqrt_rn, and every launch with `EXACT`, since a contraction to FMA would round once less.
"""

import torch
import triton
import triton.language as tl

LANES = 128  # sub-blocks (or blocks, or elements) of one program
TINY: tl.constexpr = tl.constexpr(1e-15)  # GROUP_MAX_EPS
MAGIC: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 × 2^23
EXACT = {"num_warps": 4, "enable_fp_fusion": False}


def programs(count: int, lanes: int) -> tuple[int]:
    return (triton.cdiv(count, lanes),)


@triton.jit
def nearest(v):
    """ggml's nearest_int: ties to even; beyond ±2^22 what the bits happen to say. A NaN gives 0, as x86's bits do; a
    GPU's NaN has others."""
    bits = (v + MAGIC).to(tl.int32, bitcast=True) & 0x7FFFFF
    return tl.where(v == v, bits, 0x400000) - 0x400000


@triton.jit
def level(v, low: tl.constexpr, high: tl.constexpr):
    """nearest(v) within [low, high], as float32; made from the bits, since GPUs convert integers slowly."""
    bits = (v + MAGIC).to(tl.int32, bitcast=True) & 0x7FFFFF
    bits = tl.where(v == v, bits, 0x400000)
    bits = tl.minimum(tl.maximum(bits, 0x400000 + low), 0x400000 + high)
    return (bits | 0x4B000000).to(tl.float32, bitcast=True) - MAGIC


@triton.jit
def truncate(v):
    """int32, toward zero; 0 where x86 has no answer (the scale's inverse overflowed)."""
    return tl.where(tl.abs(v) < 1073741824.0, v, 0.0).to(tl.int32)


@triton.jit
def half(x):
    """float32 → the float32 of the nearest float16, ties to even."""
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def inverse(x):
    """1 / x; 0 for 0."""
    return tl.where(x != 0, tl.div_rn(1.0, x), 0.0)


@triton.jit
def these_lanes(count, LANES: tl.constexpr):
    """The numbers of this program's lanes, int64, and which of them are below `count`."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    return lane, lane < count


@triton.jit
def load(values, row, inside, SIZE: tl.constexpr):
    """The SIZE float32 of row[lane] of a matrix; zeros where not `inside`."""
    tile = ()
    for k in tl.static_range(SIZE):
        tile = tile + (tl.load(values + row * SIZE + k, mask=inside, other=0.0),)
    return tile


@triton.jit
def weigh(tile, weights, spread, SIZE: tl.constexpr):
    """weight · √(spread + x²)."""
    out = ()
    for k in tl.static_range(SIZE):
        out = out + (weights[k] * tl.sqrt_rn(spread + tile[k] * tile[k]),)
    return out


@triton.jit
def weigh_by_square(tile, SIZE: tl.constexpr):
    """x²."""
    out = ()
    for k in tl.static_range(SIZE):
        out = out + (tile[k] * tile[k],)
    return out


@triton.jit
def weigh_by_size(tile, SIZE: tl.constexpr):
    """The lane's root mean square + |x|."""
    total = tl.zeros_like(tile[0])
    for k in tl.static_range(SIZE):
        total += tile[k] * tile[k]
    size = tl.sqrt_rn(tl.div_rn(total, 1.0 * SIZE))
    out = ()
    for k in tl.static_range(SIZE):
        out = out + (size + tl.abs(tile[k]),)
    return out


@triton.jit
def magnitudes(tile, SIZE: tl.constexpr):
    """|x|."""
    out = ()
    for k in tl.static_range(SIZE):
        out = out + (tl.abs(tile[k]),)
    return out


@triton.jit
def sum_of(values, SIZE: tl.constexpr):
    total = tl.zeros_like(values[0])
    for k in tl.static_range(SIZE):
        total += values[k]
    return total


@triton.jit
def signed_peak(tile, SIZE: tl.constexpr):
    """The element of largest magnitude, with its sign; the first of equals."""
    peak = tl.zeros_like(tile[0])
    for k in tl.static_range(SIZE):
        peak = tl.where(tl.abs(tile[k]) > tl.abs(peak), tile[k], peak)
    return peak


@triton.jit
def search_symmetric(tile, weight, NMAX: tl.constexpr, SIZE: tl.constexpr):
    """make_qx_quants → (scale, factor)."""
    peak = signed_peak(tile, SIZE)
    scale = tl.zeros_like(peak)
    best = tl.zeros_like(peak)
    factor = tl.zeros_like(peak)
    number = tl.zeros_like(peak)  # of the candidate
    for _ in range(19):
        first = number == 0
        shift = tl.where(first, 0.0, tl.where(number < 10, number - 10, number - 9))  # 0, then −9 … 9 without 0
        trial = tl.div_rn(-(NMAX + 0.1 * shift), peak)
        xl, ll = _symmetric_sums(tile, weight, trial, NMAX, SIZE)
        better = first | ((ll > 0) & (xl * xl > best * ll))
        scale = tl.where(better, tl.where(ll != 0, tl.div_rn(xl, ll), 0.0), scale)
        best = tl.where(better, scale * xl, best)
        factor = tl.where(better, trial, factor)
        number += 1.0
    zero = tl.abs(peak) < TINY
    return tl.where(zero, 0.0, scale), tl.where(zero, 0.0, factor)


@triton.jit
def _symmetric_sums(tile, weight, factor, NMAX: tl.constexpr, SIZE: tl.constexpr):
    """Σ w·x·code, Σ w·code²."""
    sum_xl = tl.zeros_like(factor)
    sum_ll = tl.zeros_like(factor)
    for k in tl.static_range(SIZE):
        code = level(factor * tile[k], -NMAX, NMAX - 1)
        sum_xl += weight[k] * tile[k] * code
        sum_ll += weight[k] * code * code
    return sum_xl, sum_ll


@triton.jit
def extremes(tile, SIZE: tl.constexpr):
    """The least and the largest element."""
    low = tile[0]
    top = tile[0]
    for k in tl.static_range(1, SIZE):
        low = tl.where(tile[k] < low, tile[k], low)
        top = tl.where(tile[k] > top, tile[k], top)
    return low, top


@triton.jit
def search_affine(
    tile, weight, NMAX: tl.constexpr, START: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
    ABSOLUTE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """make_qkx2_quants and make_qkx3_quants → (scale, depth, factor, origin)."""
    low, top = extremes(tile, SIZE)
    sum_w = weight[0]
    sum_x = weight[0] * tile[0]  # not added to 0: it may be −0
    for k in tl.static_range(1, SIZE):
        sum_w += weight[k]
        sum_x += weight[k] * tile[k]
    low = tl.where(low > 0, 0.0, low)
    constant = top <= low  # no candidate is to pass
    scale = tl.zeros_like(low)
    factor = tl.zeros_like(low)
    origin = low
    least = tl.zeros_like(low)
    number = tl.full(low.shape, -1.0, tl.float32)  # of the candidate; the first is the plain range
    for _ in range(STEPS + 2):
        first = number < 0
        trial = tl.div_rn(tl.where(first, 1.0 * NMAX, START + STEP * number + NMAX), top - low)
        levels, wl, wll, wxl = _affine_sums(tile, weight, trial, low, NMAX, SIZE)
        det = sum_w * wll - wl * wl
        fitted = tl.div_rn(wll * sum_x - wl * wxl, det)
        new_scale = tl.where(fitted > 0, tl.div_rn(wxl, wll), tl.div_rn(sum_w * wxl - sum_x * wl, det))
        new_scale = tl.where(first, tl.div_rn(1.0, trial), new_scale)
        new_low = tl.where(first, low, tl.where(fitted > 0, 0.0, fitted))
        error = _error(tile, weight, levels, new_scale, new_low, ABSOLUTE, SIZE)
        better = (first | ((det > 0) & (error < least))) & (constant == 0)
        least = tl.where(better, error, least)
        factor = tl.where(better, trial, factor)
        origin = tl.where(better, low, origin)
        scale = tl.where(better, new_scale, scale)
        low = tl.where(better, new_low, low)
        number += 1.0
    return scale, low * -1.0, factor, origin  # Triton's -low is 0 − low, which has no −0


@triton.jit
def _affine_sums(tile, weight, factor, low, NMAX: tl.constexpr, SIZE: tl.constexpr):
    """The levels, Σ w·code, Σ w·code², Σ w·code·x."""
    levels = ()
    sum_l = tl.zeros_like(factor)
    sum_ll = tl.zeros_like(factor)
    sum_xl = tl.zeros_like(factor)
    for k in tl.static_range(SIZE):
        code = level(factor * (tile[k] - low), 0, NMAX)
        levels = levels + (code,)
        wl = weight[k] * code
        sum_l += wl
        sum_ll += wl * code
        sum_xl += wl * tile[k]
    return levels, sum_l, sum_ll, sum_xl


@triton.jit
def _error(tile, weight, levels, scale, low, ABSOLUTE: tl.constexpr, SIZE: tl.constexpr):
    """Σ weight · |scale · level + low − x|, or of its square."""
    error = tl.zeros_like(scale)
    for k in tl.static_range(SIZE):
        off = scale * levels[k] + low - tile[k]
        if ABSOLUTE:
            error += weight[k] * tl.abs(off)
        else:
            error += weight[k] * (off * off)
    return error


@triton.jit
def descend(tile, NMAX: tl.constexpr, SIZE: tl.constexpr):
    """make_q3_quants → (scale, codes 0 … 2 NMAX − 1 as SIZE tensors int32; 0 in a lane of zeros)."""
    peak = signed_peak(tile, SIZE)
    factor = tl.div_rn(-1.0 * NMAX, peak)
    codes = ()
    sum_xl = tl.zeros_like(peak)
    sum_ll = tl.zeros_like(peak)
    for k in tl.static_range(SIZE):
        code = level(factor * tile[k], -NMAX, NMAX - 1)
        codes = codes + (code,)
        w = tile[k] * tile[k]
        sum_xl += w * tile[k] * code
        sum_ll += w * code * code
    for _ in range(5):
        codes, sum_xl, sum_ll = _descend_once(tile, codes, sum_xl, sum_ll, NMAX, SIZE)
    zero = tl.abs(peak) < TINY
    scale = tl.where((sum_ll > 0) & (tl.abs(peak) >= TINY), tl.div_rn(sum_xl, sum_ll), 0.0)
    out = ()
    for k in tl.static_range(SIZE):
        out = out + (tl.where(zero, 0, codes[k].to(tl.int32) + NMAX),)
    return scale, out


@triton.jit
def _descend_once(tile, codes, sum_xl, sum_ll, NMAX: tl.constexpr, SIZE: tl.constexpr):
    out = ()
    for k in tl.static_range(SIZE):
        w = tile[k] * tile[k]
        old = codes[k]
        xl = sum_xl - w * tile[k] * old
        ll = sum_ll - w * old * old
        code = level(tl.div_rn(tile[k] * ll, xl), -NMAX, NMAX - 1)
        new_xl = xl + w * tile[k] * code
        new_ll = ll + w * code * code
        better = new_xl * new_xl * sum_ll > sum_xl * sum_xl * new_ll
        better = better & (xl > 0) & (new_ll > 0) & (code != old)
        out = out + (tl.where(better, code, old),)
        sum_xl = tl.where(better, new_xl, sum_xl)
        sum_ll = tl.where(better, new_ll, sum_ll)
    return out, sum_xl, sum_ll


@triton.jit
def search_uneven(tile, weight, SIZE: tl.constexpr):
    """The scale of an IQ4 sub-block: of 16 candidates, the one of the least weighted error."""
    peak = signed_peak(tile, SIZE)
    scale = tl.zeros_like(peak)
    best = tl.zeros_like(peak)
    reach = tl.full(peak.shape, -135.0, tl.float32)  # the first candidate is −127; then −7 − 127 … 7 − 127
    for _ in range(16):
        first = reach == -135
        trial = tl.where(first, tl.div_rn(1.0, tl.div_rn(peak, 127.0)), tl.div_rn(reach, peak))
        xq, qq = _uneven_sums(tile, weight, trial, SIZE)
        better = first | ((qq > 0) & (xq * xq > best * qq))
        scale = tl.where(better, tl.where(qq > 0, tl.div_rn(xq, qq), 0.0), scale)
        best = tl.where(better, scale * xq, best)
        reach += 1.0
    return tl.where(tl.abs(peak) < TINY, 0.0, scale)


@triton.jit
def _uneven_sums(tile, weight, factor, SIZE: tl.constexpr):
    """Σ w·q·x, Σ w·q², q the value of the level nearest to factor · x."""
    sum_xq = tl.zeros_like(factor)
    sum_qq = tl.zeros_like(factor)
    for k in tl.static_range(SIZE):
        q = uneven_value(factor * tile[k])
        wq = weight[k] * q
        sum_xq += wq * tile[k]
        sum_qq += wq * q
    return sum_xq, sum_qq


@triton.jit
def uneven_value(v):
    """The value of the level nearest to v; on a midpoint, of the upper."""
    values = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0,
              1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)  # fmt: skip
    return _choose(v, values)


@triton.jit
def uneven_level(v):
    """The number of the level nearest to v; on a midpoint, of the upper."""
    return _choose(v, (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))


@triton.jit
def _choose(v, choices):
    middles = (-115.5, -93.5, -74.0, -57.0, -42.0, -28.5, -16.0, -4.5, 7.0, 19.0, 31.5, 45.5, 61.0, 79.0, 101.0)
    chosen = tl.where(v < middles[0], choices[0], choices[1])
    for i in tl.static_range(1, 15):
        chosen = tl.where(v < middles[i], chosen, choices[i + 1])
    return chosen


@triton.jit
def _energy_kernel(x, energy, count, size, LANES: tl.constexpr):
    lane, inside = these_lanes(count, LANES)
    total = tl.zeros([LANES], tl.float32)
    for part in range(size // 32):
        tile = load(x, lane * (size // 32) + part, inside, 32)
        for k in tl.static_range(32):
            total += tile[k] * tile[k]
    tl.store(energy + lane, total, mask=inside)


def energies(x: torch.Tensor, size: int) -> torch.Tensor:
    """Σ x² of every `size` (a multiple of 32) consecutive values, in order: float32 [x.numel() / size]."""
    energy = x.new_empty(x.numel() // size)
    _energy_kernel[programs(len(energy), LANES)](x, energy, len(energy), size, LANES=LANES, **EXACT)
    return energy
