"""int4_gemm's product for few tokens: a program asks for all it can hold before it computes.

The time is that of reading the weight, and of what stands around it: a launch, one wait for memory, one sum. So the
words of several steps are under way at once, the first of them while the kernel before this one still runs.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from dsv2quant.kernels.chain import wait
from dsv2quant.kernels.checks import MULTIPROCESSORS
from dsv2quant.kernels.int4_layout import ROWS
from dsv2quant.kernels.int4_operand import integers, words_at, zero_points
from dsv2quant.kernels.splits import finish

TOKENS = 16  # 8 would not be wgmma
MOST = 12  # steps held: of more, scales and zeros would not fit into registers


class Held(NamedTuple):
    """A program's share: one of `split` parts of K, of which it holds `held` times 128 columns at a time."""

    split: int
    held: int

    @property
    def rows(self) -> int:
        return ROWS

    @property
    def tokens(self) -> int:
        return TOKENS


def rule(rows: int, columns: int) -> Held:
    """Programs that all run at once, four to a multiprocessor, each with 512 columns or more."""
    steps = triton.cdiv(columns, 128)
    split = max(1, min(4 * MULTIPROCESSORS // triton.cdiv(rows, ROWS), steps // 4))
    part = triton.cdiv(steps, split)
    return Held(split, triton.cdiv(part, triton.cdiv(part, 6)))


def steps_of(share: Held, columns: int, block: int) -> tuple[int, int]:
    """The most steps of `block` columns that a part of all columns has, and how many of them are held."""
    part = triton.cdiv(triton.cdiv(columns, block), share.split)
    return part, triton.cdiv(part, triton.cdiv(part, min(share.held * 128 // block, MOST)))


@triton.jit(do_not_specialize=["M", "spans"])
def held_kernel(
    x, words, scales, zeros, out, partial, arrivals, M, N, K, spans,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, SPANS: tl.constexpr, STEPS: tl.constexpr, TOKENS: tl.constexpr,
    SPLIT: tl.constexpr, PART: tl.constexpr, HELD: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Program (split, rows, tokens). spans: of a block row, padded; PART: the most steps of a split; EVEN: all splits
    have as many, in whole HELDs, and columns are whole steps."""
    DEPTH: tl.constexpr = 16 * STEPS * SPANS
    split, by_rows, by_tokens = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    block = by_rows + tl.zeros((1, 1), tl.int32)
    n = by_rows * 64 + tl.arange(0, 64)
    m = by_tokens * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, DEPTH)
    steps = spans // SPANS
    begin = split * steps // SPLIT
    end = (split + 1) * steps // SPLIT

    sums = tl.zeros((64, TOKENS), tl.float32)
    for first in tl.range(0, PART, HELD, num_stages=1):  # once or more: each program has to wait
        held, lows, highs, factors, values = (), (), (), (), ()
        for i in tl.static_range(HELD):
            step = begin + first + i
            if not EVEN:  # beyond the part: any, since x is 0 there
                step = tl.minimum(step, tl.maximum(end - 1, 0))
            at = (block[:, :, None] * spans + step * SPANS) * (128 * STEPS)
            held = held + (words_at(words, at, SPANS, STEPS, "evict_first"),)
            group = step if GROUPED else 0
            low, high = zero_points(zeros, group, block, N)
            lows, highs = lows + (low,), highs + (high,)
            if GROUPED:
                factors = factors + (tl.load(scales + group * N + n, n < N, 0.0),)
        wait()
        for i in tl.static_range(HELD):
            step = begin + first + i
            column = step * DEPTH + k[:, None]
            mask = m[None, :] < M if EVEN else (m[None, :] < tl.where(step < end, M, 0)) & (column < K)
            values = values + (tl.load(x + m[None, :] * K + column, mask, 0.0),)
        # One wait for all of them: the compiler moves no load over a barrier, and no use of one before a branch, which
        # is always taken.
        tl.debug_barrier()
        if M > 0:
            for i in tl.static_range(HELD):
                weight = integers(held[i], lows[i], highs[i], 1, SPANS, STEPS, x.dtype.element_ty, MAGIC, ASM)
                if GROUPED:
                    sums += tl.dot(weight, values[i], input_precision="ieee") * factors[i][:, None]
                else:
                    sums = tl.dot(weight, values[i], sums, input_precision="ieee")
    if not GROUPED:
        sums *= tl.load(scales + n, n < N, 0.0)[:, None]

    at = out + m[:, None] * N + n[None, :]
    stored = (m[:, None] < M) & (n[None, :] < N)
    tile = by_tokens * tl.num_programs(1) + by_rows
    finish(sums, at, stored, None, partial, arrivals, tile, split, 64, TOKENS, SPLIT)
