"""INT4 product of very few tokens: int4_gemm's y [M, N] = x [M, K] · w [N, K]ᵀ without a split of K over programs.

The time is that of reading w, and of what stands around it: a launch, one wait for memory, one sum. So a program takes
few rows over the whole of K and asks for all it can hold before it computes. Each warp has a span of 64 columns (32
where groups are of 32) of its own, and the MMA of one warp, m16n8k16, whose operand of 16 rows is that of the layout's
warp; the warps' sums are added at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv2quant.kernels.checks import INTERPRETED
from dsv2quant.kernels.int4_layout import Int4Weight

STRIP: tl.constexpr = tl.constexpr(16)  # rows of one MMA


class Vector(NamedTuple):
    """A program's share: `rows` of w, 16, 32 or 64, by `warps` that each read a span of columns at once; `held` spans
    of each are in registers before any is used."""

    rows: int
    warps: int
    held: int


@triton.jit
def _by_lane(values, PER_LANE: tl.constexpr):
    """[WARPS, 32] → [WARPS, 32 · PER_LANE], each so many times in a row."""
    WARPS: tl.constexpr = values.shape[0]
    return tl.broadcast_to(values[:, :, None], (WARPS, 32, PER_LANE)).reshape(WARPS, 32 * PER_LANE)


@triton.jit(do_not_specialize=["M"])
def _vector_kernel(
    x, words, scales, zeros, out, M, N, K, spans: tl.constexpr,
    PER_GROUP: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr, STRIPS: tl.constexpr, WARPS: tl.constexpr,
    HELD: tl.constexpr, TOKENS: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """spans: of a row, padded; PER_GROUP: spans of a group."""
    SPAN: tl.constexpr = 16 * STEPS
    DTYPE: tl.constexpr = x.dtype.element_ty
    first_strip = tl.program_id(0) * STRIPS
    first_token = tl.program_id(1) * TOKENS
    thread = tl.arange(0, WARPS * 32)
    lane = thread % 32
    totals = (tl.zeros((WARPS, STRIP, TOKENS), tl.float32),) * STRIPS
    for first in tl.range(0, spans, WARPS * HELD, num_stages=1):
        held, values, factors, points = (), (), (), ()
        for i in tl.static_range(HELD):
            span = first + i * WARPS + tl.arange(0, WARPS)
            near = span if spans % (WARPS * HELD) == 0 else tl.minimum(span, spans - 1)
            for s in tl.static_range(STRIPS):
                strip = first_strip + s
                at = words + (strip // 4 * spans + near)[:, None] * (128 * STEPS) + strip % 4 * (32 * STEPS)
                held = held + (tl.load(at + tl.arange(0, 32 * STEPS)[None, :], eviction_policy="evict_first"),)
        tl.debug_barrier()  # the weights' are asked for first: theirs is the longest way
        for i in tl.static_range(HELD):
            own = first + i * WARPS + thread // 32
            group = (own if spans % (WARPS * HELD) == 0 else tl.minimum(own, spans - 1)) // PER_GROUP
            for s in tl.static_range(STRIPS):
                row = (first_strip + s) * STRIP + lane // 4
                cell = group * N + row
                factors = factors + (tl.load(scales + cell, row < N, 0.0).reshape(WARPS, 32),)
                factors = factors + (tl.load(scales + cell + 8, row + 8 < N, 0.0).reshape(WARPS, 32),)
                if zeros is not None:
                    points = points + (tl.load(zeros + cell, row < N, 8).reshape(WARPS, 32),)
                    points = points + (tl.load(zeros + cell + 8, row + 8 < N, 8).reshape(WARPS, 32),)
            if DIRECT:
                for t in tl.static_range(TOKENS // 8):
                    token = first_token + t * 8 + lane // 4
                    for c in tl.static_range(2 * STEPS):
                        pair = own * (SPAN // 2) + c * 4 + lane % 4
                        mask = token < M if EVEN else (token < M) & (pair < K // 2)
                        at = x.to(tl.pointer_type(tl.int32)) + token * (K // 2) + pair
                        values = values + (tl.load(at, mask, 0).reshape(WARPS, 32),)
            else:
                token = first_token + tl.arange(0, TOKENS)[None, None, :]
                span = first + i * WARPS + tl.arange(0, WARPS)
                column = span[:, None, None] * SPAN + tl.arange(0, SPAN)[None, :, None]
                mask = token < M if EVEN else (token < M) & (column < K)
                values = values + (tl.load(x + token * K + column, mask, 0.0),)
        # One wait for all of them: the compiler moves no load over a barrier, and no use of one before a branch, which
        # is always taken.
        tl.debug_barrier()
        if M > 0:
            for i in tl.static_range(HELD):
                if DIRECT:
                    b = _fragments(values, i, STEPS, TOKENS, DTYPE)
                else:
                    b = values[i].reshape(WARPS, STEPS, 2, 4, 2, TOKENS).trans(0, 1, 3, 2, 4, 5).reshape(WARPS, SPAN, TOKENS)
                found = ()
                for s in tl.static_range(STRIPS):
                    if zeros is None:
                        low = tl.full((WARPS, 32), 8, tl.int32)
                        high = low
                    else:
                        low, high = points[2 * (i * STRIPS + s)], points[2 * (i * STRIPS + s) + 1]
                    if ASM:
                        low, high = low * 0x10001 + MAGIC, high * 0x10001 + MAGIC
                    a = _codes(held[i * STRIPS + s], _by_lane(low, STEPS), _by_lane(high, STEPS), DTYPE, MAGIC, ASM)
                    a = a.reshape(WARPS, 8, 4, STEPS, 2, 2, 2)  # warp, r, q, step, p, c, h
                    a = a.trans(0, 6, 1, 3, 2, 5, 4).reshape(WARPS, STRIP, SPAN)
                    product = tl.dot(a, b, input_precision="ieee")
                    scale = _factors(factors[2 * (i * STRIPS + s)], factors[2 * (i * STRIPS + s) + 1], TOKENS)
                    found = found + (totals[s] + product * scale,)
                totals = found
    total = tl.sum(_joined(totals, 0, STRIPS), 0)
    if STRIPS == 2:
        total = total.trans(2, 0, 1).reshape(2 * STRIP, TOKENS)
    if STRIPS == 4:
        total = total.trans(3, 2, 0, 1).reshape(4 * STRIP, TOKENS)
    row = first_strip * STRIP + tl.arange(0, STRIPS * STRIP)[:, None]
    token = first_token + tl.arange(0, TOKENS)[None, :]
    tl.store(out + token * N + row, total.to(out.dtype.element_ty), (token < M) & (row < N))


@triton.jit
def _factors(low, high, TOKENS: tl.constexpr):
    """Scales [WARPS, 32] of rows h = 0 and h = 1, by r and q → [WARPS, 16, TOKENS], in a thread's own sums."""
    WARPS: tl.constexpr = low.shape[0]
    both = tl.join(low, high).reshape(WARPS, 8, 4, 2)[:, :, :, :, None]
    every = tl.broadcast_to(both, (WARPS, 8, 4, 2, TOKENS // 4)).reshape(WARPS, 8, 4, 2, TOKENS // 8, 2)
    return every.trans(0, 3, 1, 4, 2, 5).reshape(WARPS, 16, TOKENS)


@triton.jit
def _joined(values, first: tl.constexpr, count: tl.constexpr):
    """`count` tensors [WARPS, 32] from `first` on → [WARPS, 32, …2, 2], the first index is the highest bit."""
    if count == 1:
        return values[first]
    else:
        return tl.join(_joined(values, first, count // 2), _joined(values, first + count // 2, count // 2))


@triton.jit
def _fragments(values, i: tl.constexpr, STEPS: tl.constexpr, TOKENS: tl.constexpr, DTYPE: tl.constexpr):
    """Pairs as they were loaded → [WARPS, SPAN, TOKENS]."""
    COUNT: tl.constexpr = TOKENS // 8 * 2 * STEPS
    pairs = _joined(values, i * COUNT, COUNT)
    both = tl.join((pairs & 0xFFFF).to(tl.int16), (pairs >> 16).to(tl.int16)).to(DTYPE, bitcast=True)
    WARPS: tl.constexpr = pairs.shape[0]
    # join puts the outermost choice last: (c, step …, tile) reversed
    if TOKENS == 16 and STEPS == 4:
        both = both.reshape(WARPS, 8, 4, 2, 2, 2, 2, 2)  # warp, n, q, c, step low, step high, tile, p
        return both.trans(0, 5, 4, 2, 3, 7, 6, 1).reshape(WARPS, 64, 16)
    if TOKENS == 8 and STEPS == 4:
        both = both.reshape(WARPS, 8, 4, 2, 2, 2, 2)
        return both.trans(0, 5, 4, 2, 3, 6, 1).reshape(WARPS, 64, 8)
    if TOKENS == 16 and STEPS == 2:
        both = both.reshape(WARPS, 8, 4, 2, 2, 2, 2)
        return both.trans(0, 4, 2, 3, 6, 5, 1).reshape(WARPS, 32, 16)
    if TOKENS == 8 and STEPS == 2:
        both = both.reshape(WARPS, 8, 4, 2, 2, 2)
        return both.trans(0, 4, 2, 3, 5, 1).reshape(WARPS, 32, 8)


def launch(x: torch.Tensor, weight: Int4Weight, out: torch.Tensor, share: Vector, magic: int, direct: bool) -> None:
    """What int4_gemm.linear has checked."""
    tokens, columns = x.shape
    _, spans, *_, steps = weight.words.shape
    span = 16 * steps
    wide = 8 if tokens <= 8 else 16
    _vector_kernel[(triton.cdiv(weight.rows, share.rows), triton.cdiv(tokens, wide))](
        x, weight.words, weight.scales, weight.zeros, out, tokens, weight.rows, columns, spans,
        PER_GROUP=max(1, -(-weight.group // span)), EVEN=columns % span == 0 and spans % (share.warps * share.held) == 0,
        STEPS=steps, STRIPS=share.rows // 16, WARPS=share.warps, HELD=share.held, TOKENS=wide, MAGIC=magic,
        ASM=not INTERPRETED, DIRECT=direct,
        num_warps=share.warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


from dsv2quant.kernels.int4_gemm import _codes  # noqa: E402
