"""The first step of a block quantizer: for every sub-block its scale, and what its levels are to be computed from."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv2quant.kernels.gguf.lanes import (
    EXACT,
    LANES,
    load,
    magnitudes,
    programs,
    sum_of,
    these_lanes,
    weigh,
    weigh_by_size,
    weigh_by_square,
)
from dsv2quant.kernels.gguf.searches import (
    descend,
    extremes,
    search_affine,
    search_symmetric,
    search_uneven,
    signed_peak,
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
