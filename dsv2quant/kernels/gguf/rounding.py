"""The last step of a block quantizer: the levels of all elements, each by itself, one element a lane."""

import torch
import triton
import triton.language as tl

from dsv2quant.kernels.gguf.lanes import EXACT, half, inverse, level, programs, these_lanes, truncate
from dsv2quant.kernels.gguf.searches import uneven_level

ELEMENTS = 1024  # of one program


@triton.jit
def _affine_kernel(
    x, factor, origin, d, m, codes, mins, levels, count,
    NMAX: tl.constexpr, SIZE: tl.constexpr, SUBS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    at, inside = these_lanes(count, LANES)
    sub = at // SIZE
    v = tl.load(x + at, mask=inside, other=0.0)
    searched = tl.load(factor + sub, mask=inside, other=0.0) * (v - tl.load(origin + sub, mask=inside, other=0.0))
    if d is not None:
        code = tl.load(codes + sub, mask=inside, other=0).to(tl.float32)
        low = tl.load(mins + sub, mask=inside, other=0).to(tl.float32)
        step = half(tl.load(d + sub // SUBS, mask=inside, other=0.0)) * code
        low = half(tl.load(m + sub // SUBS, mask=inside, other=0.0)) * low
        searched = tl.where(step != 0, tl.div_rn(v + low, step), searched)
    tl.store(levels + at, level(searched, 0, NMAX).to(tl.int32).to(tl.uint8), mask=inside)


def levels_affine(
    x: torch.Tensor,
    factor: torch.Tensor,
    origin: torch.Tensor,
    nmax: int,
    stored: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """x float32 [sub-blocks, elements], factor and origin [sub-blocks] of its search → levels 0 … nmax, uint8 like x.

    `stored` scales: float32 d and m [blocks], yet to be rounded to float16, and their multiples uint8 [blocks, subs]; a
    sub-block whose stored scale is 0, and every one without `stored`, has the levels of its search.
    """
    d, m, codes, mins = stored or (None, None, None, None)
    levels = torch.empty_like(x, dtype=torch.uint8)
    _affine_kernel[programs(x.numel(), ELEMENTS)](
        x, factor, origin, d, m, codes, mins, levels, x.numel(), nmax,
        SIZE=x.shape[1], SUBS=1 if codes is None else codes.shape[1], LANES=ELEMENTS, **EXACT,
    )  # fmt: skip
    return levels


@triton.jit
def _symmetric_kernel(
    x, factor, d, codes, levels, count,
    NMAX: tl.constexpr, SIZE: tl.constexpr, SUBS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    at, inside = these_lanes(count, LANES)
    sub = at // SIZE
    v = tl.load(x + at, mask=inside, other=0.0)
    if factor is not None:
        times = tl.load(factor + sub, mask=inside, other=0.0)
        found = tl.where(times != 0, level(times * v, -NMAX, NMAX - 1).to(tl.int32) + NMAX, 0)
    else:
        found = tl.load(levels + at, mask=inside, other=0).to(tl.int32)
    if d is not None:
        step = half(tl.load(d + sub // SUBS, mask=inside, other=0.0))
        step = step * tl.load(codes + sub, mask=inside, other=0).to(tl.float32)
        found = tl.where(step != 0, level(tl.div_rn(v, step), -NMAX, NMAX - 1).to(tl.int32) + NMAX, found)
    tl.store(levels + at, found.to(tl.uint8), mask=inside)


def levels_symmetric(
    x: torch.Tensor,
    searched: torch.Tensor,
    nmax: int,
    stored: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """x float32 [sub-blocks, elements] → levels 0 … 2 nmax − 1, uint8 like x.

    `searched`: the factor of each sub-block's search, float32 [sub-blocks], or its levels uint8 like x (which then
    become the result). `stored`: d float32 [blocks], yet to be rounded to float16, and its multiples int8 [blocks,
    subs]; levels are of the search where the stored scale is 0, and everywhere without `stored`.
    """
    d, codes = stored or (None, None)
    kept = searched.dtype == torch.uint8
    levels = searched if kept else torch.empty_like(x, dtype=torch.uint8)
    _symmetric_kernel[programs(x.numel(), ELEMENTS)](
        x, None if kept else searched, d, codes, levels, x.numel(), nmax,
        SIZE=x.shape[1], SUBS=1 if codes is None else codes.shape[1], LANES=ELEMENTS, **EXACT,
    )  # fmt: skip
    return levels


@triton.jit
def _truncate_kernel(x, scale, low, levels, count, NMAX: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr):
    at, inside = these_lanes(count, LANES)
    v = tl.load(x + at, mask=inside, other=0.0)
    times = inverse(tl.load(scale + at // SIZE, mask=inside, other=0.0))
    if low is not None:
        v = (v - tl.load(low + at // SIZE, mask=inside, other=0.0)) * times + 0.5
        code = tl.minimum(truncate(v), NMAX)
    else:
        code = tl.minimum(truncate(v * times + (NMAX + 0.5)), 2 * NMAX - 1)
    tl.store(levels + at, code.to(tl.uint8), mask=inside)


def levels_truncated(x: torch.Tensor, scale: torch.Tensor, low: torch.Tensor | None, nmax: int) -> torch.Tensor:
    """x float32 [blocks, 32] → levels uint8 like x: 0 … nmax above `low`, or without one 0 … 2 nmax − 1 (legacy.py)."""
    levels = torch.empty_like(x, dtype=torch.uint8)
    _truncate_kernel[programs(x.numel(), ELEMENTS)](
        x, scale, low, levels, x.numel(), nmax, SIZE=x.shape[1], LANES=ELEMENTS, **EXACT
    )
    return levels


@triton.jit
def _uneven_kernel(x, scale, levels, count, SIZE: tl.constexpr, LANES: tl.constexpr):
    at, inside = these_lanes(count, LANES)
    times = inverse(tl.load(scale + at // SIZE, mask=inside, other=0.0))
    found = uneven_level(times * tl.load(x + at, mask=inside, other=0.0))
    tl.store(levels + at, found.to(tl.uint8), mask=inside)


def levels_uneven(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x float32 [sub-blocks, 32], scale float32 [sub-blocks] → the numbers of IQ4's levels, uint8 like x."""
    levels = torch.empty_like(x, dtype=torch.uint8)
    _uneven_kernel[programs(x.numel(), ELEMENTS)](x, scale, levels, x.numel(), SIZE=x.shape[1], LANES=ELEMENTS, **EXACT)
    return levels


@triton.jit
def _q8_0_kernel(x, scale, codes, count, BLOCKS: tl.constexpr):
    block, inside = these_lanes(count, BLOCKS)
    at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    v = tl.load(x + at, mask=inside[:, None], other=0.0)
    d = tl.div_rn(tl.max(tl.abs(v), 1), 127.0)
    tl.store(scale + block, d, mask=inside)
    v = v * inverse(d)[:, None]
    code = truncate(v)
    rest = tl.where(tl.abs(v) < 1073741824.0, v - code.to(tl.float32), 0.0)  # exact; half away from zero
    code += tl.where(rest >= 0.5, 1, 0) - tl.where(rest <= -0.5, 1, 0)
    tl.store(codes + at, code.to(tl.uint8), mask=inside[:, None])


def round_q8_0(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x float32 [blocks, 32] → scale float32 [blocks] and codes, int8 held as uint8, like x."""
    scale, codes = x.new_empty(len(x)), torch.empty_like(x, dtype=torch.uint8)
    blocks = ELEMENTS // 32
    _q8_0_kernel[programs(len(x), blocks)](x, scale, codes, len(x), BLOCKS=blocks, **EXACT)
    return scale, codes
