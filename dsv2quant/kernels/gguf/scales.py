"""The second step of a block quantizer: the scales of a block's sub-blocks rounded in their turn, one block a lane."""

import torch
import triton
import triton.language as tl

from dsv2quant.kernels.gguf.lanes import EXACT, LANES, TINY, inverse, level, load, nearest, programs, these_lanes
from dsv2quant.kernels.gguf.searches import search_positive, search_symmetric, signed_peak


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

    With the `total` weight of each sub-block as fit_scales, without as _round_signed (formats/gguf/lowbits.py).
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
def _uneven_kernel(values, steps, codes, count, SUBS: tl.constexpr, LANES: tl.constexpr):
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
    _uneven_kernel[programs(count, LANES)](values, steps, codes, count, SUBS=subs, LANES=LANES, **EXACT)
    return steps, codes
