"""GPTQ's loops over columns and over candidate scales (calib/gptq.py), a batch of matrices in one launch.

`quantize_block` rounds up to 64 columns: a program holds them, of some rows, in registers, and takes one column after
the other out of them by a masked sum, which is exact. Its cost per weight grows with the block's width, that of the
product behind it, which reads and writes all columns to the right, falls with it; 64 is where the CPU's loop is fast
too. Divisions are by div_rn and nothing is contracted to FMA, so that codes are those of the torch loop.

`search_scales` has one program per group: all candidates beside each other, for a tile of its columns at a time. Codes
are of weights times 1 / scale, and sums are in another order than torch's: where candidates tie within float32's
rounding, either may be chosen.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from dsv2quant.formats.integers import factors, levels
from dsv2quant.kernels.gguf.lanes import MAGIC

ROWS = 16  # of one program of `quantize_block`: 127 registers of each thread of a warp, which waits for no other
EXACT = {"num_warps": 1, "enable_fp_fusion": False}
TILE = 64  # columns of a group that `search_scales` has in registers, at most
LARGEST: tl.constexpr = tl.constexpr(3.0e38)


@triton.jit
def _code(quotient, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The nearest code as float32, ties to even: adding 1.5 × 2^23 leaves no place for a fraction."""
    return (tl.minimum(tl.maximum(quotient, LOW), HIGH) + MAGIC) - MAGIC


@triton.jit
def _quantize_kernel(
    w, scales, group, u, codes, errors, begin, width, rows, columns, groups,
    LOW: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_inside, row = row < rows, matrix * rows + row
    column = tl.arange(0, WIDTH)
    inside = row_inside[:, None] & (column < width)[None, :]
    at = row[:, None] * columns + begin + column[None, :]
    group += matrix * columns + begin
    u += matrix * width * width
    tile = tl.load(w + at, mask=inside, other=0.0)  # of columns that are done, their errors
    found = tl.zeros([ROWS, WIDTH], tl.float32)
    for j in range(width):
        here = column[None, :] == j
        value = tl.sum(tl.where(here, tile, 0.0), 1)
        step = tl.load(scales + row * groups + tl.load(group + j), mask=row_inside, other=1.0)
        code = _code(tl.div_rn(value, step), LOW, HIGH)
        error = tl.div_rn(value - code * step, tl.load(u + j * width + j))
        factor = tl.load(u + j * width + column, mask=(column > j) & (column < width), other=0.0)
        tile = tl.where(here, error[:, None], tile - error[:, None] * factor[None, :])
        found = tl.where(here, code[:, None], found)
    tl.store(codes + at, found.to(tl.int8), mask=inside)
    tl.store(errors + row[:, None] * width + column[None, :], tile, mask=inside)


def quantize_block(
    w: torch.Tensor,
    scales: torch.Tensor,
    group: torch.Tensor,
    u: torch.Tensor,
    codes: torch.Tensor,
    begin: int,
    bits: int,
) -> torch.Tensor:
    """`reference_gptq.quantize_block` of float32: the same codes and errors, but for the sign of a zero.

    Raises ValueError where a shape or a dtype is another, or a tensor is not contiguous.
    """
    (batch, rows, columns), width, (low, high) = w.shape, u.shape[-1], levels(bits)
    _check("w", w, (batch, rows, columns), torch.float32)
    _check("scales", scales, (batch, rows, scales.shape[-1]), torch.float32)
    _check("group", group, (batch, columns), torch.int64)
    _check("u", u, (batch, width, width), torch.float32)
    _check("codes", codes, (batch, rows, columns), torch.int8)
    if not 0 <= begin <= columns - width:
        raise ValueError(f"{width} columns from {begin}: there are {columns}")
    errors = w.new_empty(batch, rows, width)
    _quantize_kernel[triton.cdiv(rows, ROWS), batch](
        w, scales, group, u, codes, errors, begin, width, rows, columns, scales.shape[2],
        LOW=low, HIGH=high, ROWS=ROWS, WIDTH=triton.next_power_of_2(width), **EXACT,
    )  # fmt: skip
    return errors


@triton.jit
def _bf16(x):
    """float32 → the nearest BF16 value, ties to even, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _search_kernel(
    w, importance, factors, best, columns, group,
    LOW: tl.constexpr, HIGH: tl.constexpr, CANDIDATES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    matrix, number = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    this = matrix * tl.num_programs(0) + number
    w += this * group
    importance += matrix * columns + number % (columns // group) * group
    lane, candidate = tl.arange(0, TILE), tl.arange(0, CANDIDATES)
    most = tl.zeros([TILE], tl.float32)
    for first in range(0, group, TILE):
        most = tl.maximum(most, tl.abs(tl.load(w + first + lane, mask=first + lane < group, other=0.0)))
    unit = tl.div_rn(tl.max(most, 0), 1.0 * HIGH)
    scale = _bf16(unit * tl.load(factors + candidate))
    scale = tl.where(scale != 0, scale, 1.0)
    inverse = tl.minimum(tl.maximum(tl.div_rn(1.0, scale), -LARGEST), LARGEST)  # of a subnormal it is infinite
    total = tl.zeros([TILE, CANDIDATES], tl.float32)  # candidates beside each other in a warp: no sum across its lanes
    for first in range(0, group, TILE):
        x = tl.load(w + first + lane, mask=first + lane < group, other=0.0)[:, None]
        weight = tl.load(importance + first + lane, mask=first + lane < group, other=0.0)[:, None]
        off = _code(x * inverse[None, :], LOW, HIGH) * scale[None, :] - x
        total += off * off * weight
    chosen = tl.argmin(tl.sum(total, 0), 0)  # the first of equals
    tl.store(best + this, tl.sum(tl.where(candidate == chosen, scale, 0.0), 0))


def search_scales(weight: torch.Tensor, importance: torch.Tensor, group: int, bits: int) -> torch.Tensor:
    """`reference_gptq.search_scales`: scales whose error is the least but for float32's rounding.

    Raises ValueError where a shape or a dtype is another, a tensor is not contiguous, or columns are not whole groups.
    """
    (batch, rows, columns), (low, high) = weight.shape, levels(bits)
    _check("weight", weight, (batch, rows, columns), torch.float32)
    _check("importance", importance, (batch, columns), torch.float32)
    if columns % group:
        raise ValueError(f"{columns} columns are not whole groups of {group}")
    tried = factors(bits)
    candidates = triton.next_power_of_2(len(tried))
    padded = np.pad(tried, (0, candidates - len(tried)), "edge")  # that are not the first of equals
    best = weight.new_empty(batch, rows, columns // group)
    _search_kernel[rows * (columns // group), batch](
        weight, importance, torch.from_numpy(padded).to(weight.device), best, columns, group,
        LOW=low, HIGH=high, CANDIDATES=candidates, TILE=min(TILE, triton.next_power_of_2(group)), num_warps=4,
    )  # fmt: skip
    return best


def _check(name: str, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if x.shape != shape or x.dtype != dtype or not x.is_contiguous():
        raise ValueError(f"{name} is {x.dtype}, {tuple(x.shape)}; need {dtype}, {shape}, contiguous")
