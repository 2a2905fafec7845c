"""The scales of a block quantizer. First for every sub-block a lane: its scale, and what its levels are to be computed
from. Then a block a lane: the scales of its sub-blocks, rounded in their turn."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv2quant.kernels.gguf.lanes import (
    EXACT,
    LANES,
    TINY,
    descend,
    extremes,
    inverse,
    level,
    load,
    magnitudes,
    nearest,
    programs,
    search_affine,
    search_symmetric,
    search_uneven,
    signed_peak,
    sum_of,
    these_lanes,
    weigh,
    weigh_by_size,
    weigh_by_square,
)


class Weights(NamedTuple):
    """How the error of each element is weighted.

    'square': x²; 'magnitude': |x|; 'size': |x| + root mean square; 'raw': importance; 'spread': importance · √(σ² + x²)
    with σ² = times · energy / size.
    """

    kind: str
    importance: torch.Tensor | None = None  # float32 [sub-blocks of a row × elements]
    per_row: int = 1  # sub-blocks of a row
    energy: torch.Tensor | None = None  # float32: Σ x² of each `per_energy` sub-blocks
    per_energy: int = 1
    times: float = 1.0
    size: float = 1.0


@triton.jit
def _weights(
    tile, lane, inside, KIND: tl.constexpr, importance, per_row, energy, per_energy, times, size, SIZE: tl.constexpr
):
    if KIND == "square":
        weights = weigh_by_square(tile, SIZE)
    elif KIND == "magnitude":
        weights = magnitudes(tile, SIZE)
    elif KIND == "size":
        weights = weigh_by_size(tile, SIZE)
    else:
        weights = load(importance, lane % per_row, inside, SIZE)
        if KIND == "spread":
            spread = tl.div_rn(times * tl.load(energy + lane // per_energy, mask=inside, other=0.0), size)
            weights = weigh(tile, weights, spread, SIZE)
    return weights


@triton.jit
def _affine_kernel(
    x, scale, depth, factor, origin, total, count,
    KIND: tl.constexpr, importance, per_row, energy, per_energy, times, size,
    NMAX: tl.constexpr, START: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, ABSOLUTE: tl.constexpr,
    SIZE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane, inside = these_lanes(count, LANES)
    tile = load(x, lane, inside, SIZE)
    weights = _weights(tile, lane, inside, KIND, importance, per_row, energy, per_energy, times, size, SIZE)
    found = search_affine(tile, weights, NMAX, START, STEP, STEPS, ABSOLUTE, SIZE)
    tl.store(scale + lane, found[0], mask=inside)
    tl.store(depth + lane, found[1], mask=inside)
    tl.store(factor + lane, found[2], mask=inside)
    tl.store(origin + lane, found[3], mask=inside)
    tl.store(total + lane, sum_of(weights, SIZE), mask=inside)


def fit_affine(
    x: torch.Tensor, weights: Weights, nmax: int, start: float, step: float, steps: int, absolute: bool = False
) -> torch.Tensor:
    """x float32 [sub-blocks, 16 or 32] → float32 [5, sub-blocks]: scale, depth, factor, origin, total weight
    (search_affine)."""
    count, size = x.shape
    out = x.new_empty(5, count)
    _affine_kernel[programs(count, LANES)](
        x, *out, count, *weights, nmax, start, step, steps, absolute, SIZE=size, LANES=LANES, **EXACT
    )
    return out


@triton.jit
def _symmetric_kernel(
    x, scale, factor, total, count,
    KIND: tl.constexpr, importance, per_row, energy, per_energy, times, size,
    NMAX: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane, inside = these_lanes(count, LANES)
    tile = load(x, lane, inside, SIZE)
    weights = _weights(tile, lane, inside, KIND, importance, per_row, energy, per_energy, times, size, SIZE)
    found = search_symmetric(tile, weights, NMAX, SIZE)
    tl.store(scale + lane, found[0], mask=inside)
    tl.store(factor + lane, found[1], mask=inside)
    tl.store(total + lane, sum_of(weights, SIZE), mask=inside)


def fit_symmetric(x: torch.Tensor, weights: Weights, nmax: int) -> torch.Tensor:
    """x float32 [sub-blocks, 16 or 32] → float32 [3, sub-blocks]: scale, factor, total weight (search_symmetric)."""
    count, size = x.shape
    out = x.new_empty(3, count)
    _symmetric_kernel[programs(count, LANES)](x, *out, count, *weights, nmax, SIZE=size, LANES=LANES, **EXACT)
    return out


@triton.jit
def _descend_kernel(x, scale, levels, count, NMAX: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr):
    lane, inside = these_lanes(count, LANES)
    found, codes = descend(load(x, lane, inside, SIZE), NMAX, SIZE)
    tl.store(scale + lane, found, mask=inside)
    for k in tl.static_range(SIZE):
        tl.store(levels + lane * SIZE + k, codes[k].to(tl.uint8), mask=inside)


def fit_by_descent(x: torch.Tensor, nmax: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x float32 [sub-blocks, 16] → scale float32 [sub-blocks] and levels uint8 [sub-blocks, 16] (make_q3_quants)."""
    count, size = x.shape
    scale, levels = x.new_empty(count), torch.empty_like(x, dtype=torch.uint8)
    _descend_kernel[programs(count, LANES)](x, scale, levels, count, nmax, SIZE=size, LANES=LANES, **EXACT)
    return scale, levels


@triton.jit
def _uneven_kernel(
    x, scale, count,
    KIND: tl.constexpr, importance, per_row, energy, per_energy, times, size,
    SIZE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane, inside = these_lanes(count, LANES)
    tile = load(x, lane, inside, SIZE)
    weights = _weights(tile, lane, inside, KIND, importance, per_row, energy, per_energy, times, size, SIZE)
    tl.store(scale + lane, search_uneven(tile, weights, SIZE), mask=inside)


def fit_uneven(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """x float32 [sub-blocks, 32] → scale float32 [sub-blocks] (search_uneven)."""
    count, size = x.shape
    scale = x.new_empty(count)
    _uneven_kernel[programs(count, LANES)](x, scale, count, *weights, SIZE=size, LANES=LANES, **EXACT)
    return scale


@triton.jit
def _range_kernel(
    x, scale, low, count, NMAX: tl.constexpr, AFFINE: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr
):
    lane, inside = these_lanes(count, LANES)
    tile = load(x, lane, inside, SIZE)
    if AFFINE:
        least, top = extremes(tile, SIZE)
        tl.store(scale + lane, tl.div_rn(top - least, 1.0 * NMAX), mask=inside)
        tl.store(low + lane, least, mask=inside)
    else:
        tl.store(scale + lane, tl.div_rn(signed_peak(tile, SIZE), -1.0 * NMAX), mask=inside)


def fit_range(x: torch.Tensor, nmax: int, affine: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x float32 [blocks, 32] → scale and, where `affine`, low, float32 [blocks]: no search, the range divided."""
    count, size = x.shape
    scale, low = x.new_empty(2, count)
    _range_kernel[programs(count, LANES)](x, scale, low, count, nmax, affine, SIZE=size, LANES=LANES, **EXACT)
    return scale, low


@triton.jit
def search_positive(tile, weight, NMAX: tl.constexpr, SIZE: tl.constexpr):
    """make_qp_quants → (scale, codes 0 … NMAX as SIZE tensors int32)."""
    top = tl.zeros_like(tile[0])
    for k in tl.static_range(SIZE):
        top = tl.where(tile[k] > top, tile[k], top)
    factor = tl.zeros_like(top)
    least = tl.zeros_like(top)
    number = tl.zeros_like(top)  # of the candidate
    for _ in range(9):
        first = number == 0
        shift = tl.where(first, 0.0, tl.where(number < 5, number - 5, number - 4))  # 0, then −4 … 4 without 0
        trial = tl.div_rn(0.1 * shift + NMAX, top)
        error = _positive_error(tile, weight, trial, first, NMAX, SIZE)
        better = first | (error < least)
        factor = tl.where(better, trial, factor)
        least = tl.where(better, error, least)
        number += 1.0
    codes = ()
    sum_xl = tl.zeros_like(top)
    sum_ll = tl.zeros_like(top)
    for k in tl.static_range(SIZE):
        code = tl.minimum(nearest(factor * tile[k]), NMAX)
        codes = codes + (code & 0xFF,)
        value = code.to(tl.float32)
        sum_xl += weight[k] * tile[k] * value
        sum_ll += weight[k] * value * value
    for _ in range(5):
        codes, sum_xl, sum_ll = _descend_positive(tile, weight, codes, sum_xl, sum_ll, NMAX, SIZE)
    zero = top < TINY
    scale = tl.where((sum_ll > 0) & (top >= TINY), tl.div_rn(sum_xl, sum_ll), 0.0)
    return scale, _zero_where(zero, codes, SIZE)


@triton.jit
def _positive_error(tile, weight, factor, first, NMAX: tl.constexpr, SIZE: tl.constexpr):
    unit = tl.div_rn(1.0, factor)
    error = tl.zeros_like(factor)
    for k in tl.static_range(SIZE):
        code = nearest(factor * tile[k])
        code = tl.where(first, code & 0xFF, tl.minimum(code, NMAX))
        off = tile[k] - unit * code.to(tl.float32)
        error += weight[k] * off * off
    return error


@triton.jit
def _descend_positive(tile, weight, codes, sum_xl, sum_ll, NMAX: tl.constexpr, SIZE: tl.constexpr):
    """One pass: each element in turn to the code that fits what the others leave, where that fits better."""
    out = ()
    for k in tl.static_range(SIZE):
        old = codes[k].to(tl.float32)
        xl = sum_xl - weight[k] * tile[k] * old
        ll = sum_ll - weight[k] * old * old
        code = tl.minimum(nearest(tl.div_rn(tile[k] * ll, xl)), NMAX)
        value = code.to(tl.float32)
        new_xl = xl + weight[k] * tile[k] * value
        new_ll = ll + weight[k] * value * value
        better = new_xl * new_xl * sum_ll > sum_xl * sum_xl * new_ll
        better = better & (xl > 0) & (ll > 0) & (value != old)
        out = out + (tl.where(better, code & 0xFF, codes[k]),)
        sum_xl = tl.where(better, new_xl, sum_xl)
        sum_ll = tl.where(better, new_ll, sum_ll)
    return out, sum_xl, sum_ll


@triton.jit
def _zero_where(zero, codes, SIZE: tl.constexpr):
    out = ()
    for k in tl.static_range(SIZE):
        out = out + (tl.where(zero, 0, codes[k]),)
    return out


@triton.jit
def _positive_kernel(
    values, total, steps, codes, count,
    NMAX: tl.constexpr, LIMIT: tl.constexpr, SUBS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane, inside = these_lanes(count, LANES)
    tile = load(values, lane, inside, SUBS)
    if total is not None:
        step, found = search_positive(tile, load(total, lane, inside, SUBS), NMAX, SUBS)
        for j in tl.static_range(SUBS):
            tl.store(codes + lane * SUBS + j, found[j].to(tl.uint8), mask=inside)
    else:
        top = tl.zeros_like(tile[0])
        for j in tl.static_range(SUBS):
            top = tl.where(tile[j] > top, tile[j], top)
        step = tl.div_rn(top, 1.0 * NMAX)
        factor = tl.where(top > 0, tl.div_rn(1.0 * NMAX, top), 0.0)
        for j in tl.static_range(SUBS):
            code = tl.minimum(nearest(factor * tile[j]) & 0xFF, LIMIT)
            tl.store(codes + lane * SUBS + j, code.to(tl.uint8), mask=inside)
    tl.store(steps + lane, step, mask=inside)


def round_positive(
    values: torch.Tensor, total: torch.Tensor | None, subs: int, nmax: int, limit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """values float32 [blocks × subs] → steps float32 [blocks], codes uint8 [blocks, subs] (formats/gguf/search.py).

    With the `total` weight of each sub-block as fit_scales, without as round_positive.
    """
    count = len(values) // subs
    steps, codes = values.new_empty(count), values.new_empty(count, subs, dtype=torch.uint8)
    _positive_kernel[programs(count, LANES)](
        values, total, steps, codes, count, nmax, limit, SUBS=subs, LANES=LANES, **EXACT
    )
    return steps, codes


@triton.jit
def _signed_kernel(values, total, steps, codes, count, SUBS: tl.constexpr, LANES: tl.constexpr):
    lane, inside = these_lanes(count, LANES)
    tile = load(values, lane, inside, SUBS)
    if total is not None:
        step, factor = search_symmetric(tile, load(total, lane, inside, SUBS), 32, SUBS)
        for j in tl.static_range(SUBS):
            code = tl.where(factor != 0, level(factor * tile[j], -32, 31) + 32, 0.0)
            tl.store(codes + lane * SUBS + j, code.to(tl.int32).to(tl.uint8), mask=inside)
    else:
        top = signed_peak(tile, SUBS)
        factor = tl.div_rn(-32.0, top)
        step = inverse(factor)
        step = tl.where(top != 0, step, 0.0)
        for j in tl.static_range(SUBS):
            code = nearest(factor * tile[j]) << 24 >> 24  # as int8
            code = tl.minimum(tl.maximum(code, -32), 31) + 32
            tl.store(codes + lane * SUBS + j, tl.where(top != 0, code, 0).to(tl.uint8), mask=inside)
    tl.store(steps + lane, step, mask=inside)


def round_signed(values: torch.Tensor, total: torch.Tensor | None, subs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Q3_K: values float32 [blocks × subs] → steps float32 [blocks], codes + 32 uint8 [blocks, subs].

    With the `total` weight of each sub-block as fit_scales, without as _round_signed (formats/gguf/kquants.py).
    """
    count = len(values) // subs
    steps, codes = values.new_empty(count), values.new_empty(count, subs, dtype=torch.uint8)
    _signed_kernel[programs(count, LANES)](values, total, steps, codes, count, SUBS=subs, LANES=LANES, **EXACT)
    return steps, codes


@triton.jit
def _q6_k_kernel(values, factor, steps, codes, count, SUBS: tl.constexpr, LANES: tl.constexpr):
    lane, inside = these_lanes(count, LANES)
    tile = load(values, lane, inside, SUBS)
    top = signed_peak(tile, SUBS)
    zero = tl.abs(top) < TINY
    times = tl.div_rn(-128.0, top)
    tl.store(steps + lane, tl.where(zero, 0.0, tl.div_rn(1.0, times)), mask=inside)
    for j in tl.static_range(SUBS):
        code = tl.minimum(nearest(times * tile[j]), 127)
        tl.store(codes + lane * SUBS + j, tl.where(zero, 0, code).to(tl.int8), mask=inside)
        tl.store(factor + lane * SUBS + j, tl.zeros_like(top), mask=inside & zero)


def round_q6_k(values: torch.Tensor, factor: torch.Tensor, subs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """values float32 [blocks × subs] → steps float32 [blocks], codes int8 [blocks, subs].

    A block of magnitudes below TINY is to be all zero: its `factor` becomes 0.
    """
    count = len(values) // subs
    steps, codes = values.new_empty(count), values.new_empty(count, subs, dtype=torch.int8)
    _q6_k_kernel[programs(count, LANES)](values, factor, steps, codes, count, SUBS=subs, LANES=LANES, **EXACT)
    return steps, codes


@triton.jit
def _round_uneven_kernel(values, steps, codes, count, SUBS: tl.constexpr, LANES: tl.constexpr):
    lane, inside = these_lanes(count, LANES)
    tile = load(values, lane, inside, SUBS)
    step = tl.div_rn(signed_peak(tile, SUBS), -32.0)
    tl.store(steps + lane, step, mask=inside)
    factor = inverse(step)
    for j in tl.static_range(SUBS):
        code = level(factor * tile[j], -32, 31)
        tl.store(codes + lane * SUBS + j, (code.to(tl.int32) + 32).to(tl.uint8), mask=inside)
        tl.store(values + lane * SUBS + j, step * code, mask=inside)


def round_uneven(values: torch.Tensor, subs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """IQ4_XS: values float32 [blocks × subs] → steps float32 [blocks], codes + 32 uint8 [blocks, subs].

    `values` become step · code, the step not yet rounded to float16.
    """
    count = len(values) // subs
    steps, codes = values.new_empty(count), values.new_empty(count, subs, dtype=torch.uint8)
    _round_uneven_kernel[programs(count, LANES)](values, steps, codes, count, SUBS=subs, LANES=LANES, **EXACT)
    return steps, codes
