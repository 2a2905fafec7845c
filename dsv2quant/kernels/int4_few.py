"""Routed experts of INT4 weights over at most eight BF16 tokens: int4_experts.py's `gate_up` and `down`.

The time is that of reading weights, and of what stands around it: a launch, one wait for memory, one sum. So a program
takes few rows over the whole of K, each of its warps a part of the columns, and asks for all it needs before it
computes anything. Words become the operand of `mma.sync` as they become that of `wgmma` (int4_layout.py): of 16 rows,
both have the same elements in the same threads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv2quant.kernels.checks import INTERPRETED
from dsv2quant.kernels.int4_gemm import MAGIC, _codes
from dsv2quant.kernels.int4_layout import depth
from dsv2quant.kernels.int4_stack import Int4Experts, Stack
from dsv2quant.kernels.routing import Routes

MOST: tl.constexpr = tl.constexpr(8)  # tokens: the N side of `mma.sync`, so that a tile's pairs are its first 8


class Share(NamedTuple):
    rows: int  # of each matrix, per program
    warps: int  # among which a program's columns are split
    rounds: int = 1
    late: bool = True
    registers: int | None = None
    one: bool = True


@triton.jit
def _scales(words, DTYPE: tl.constexpr):
    """Pairs [WARPS, PARTS, 8] of rows r and r + 8 → float32 [WARPS, 16 · PARTS]."""
    if DTYPE.is_bf16():
        low, high = (words << 16).to(tl.float32, bitcast=True), (words & -0x10000).to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.join(low, high).trans(0, 1, 3, 2).reshape(words.shape[0], 16 * words.shape[1])


@triton.jit
def _here(values):
    """The values: not pure, so that the compiler converts their layout behind it and not where they are loaded."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [values], values.dtype, is_pure=False, pack=2)


@triton.jit
def _sums(
    x, pair, k, present, words, scales, zeros, matrix, by_rows, K, blocks, spans, groups,
    GROUPED: tl.constexpr, MATRICES: tl.constexpr, TILES: tl.constexpr, SPANS: tl.constexpr, STEPS: tl.constexpr,
    TOKENS: tl.constexpr, WARPS: tl.constexpr, HELD: tl.constexpr, WHOLE: tl.constexpr, MAGIC: tl.constexpr,
    ASM: tl.constexpr, LATE: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """float32 [MATRICES · 16 · TILES, MOST], of which TOKENS count: rows of the matrices `matrix` and on, by rows pair // k of x.

    Warp w takes the columns of blocks i · WARPS + w, which are a group's; WHOLE: there are HELD · WARPS of them.
    """
    PARTS: tl.constexpr = MATRICES * TILES
    LANES: tl.constexpr = 32 * STEPS
    DEPTH: tl.constexpr = 16 * STEPS * SPANS
    ROWS: tl.constexpr = 16 * PARTS
    SHAPE: tl.constexpr = (WARPS, PARTS, SPANS, LANES)
    part = tl.arange(0, PARTS)
    tile = tl.minimum(by_rows * TILES + part % TILES, 4 * blocks - 1)  # beyond the last: any, since it isn't stored
    of = (matrix + part // TILES).to(tl.int64)
    warp = tl.arange(0, WARPS)
    # The order of dimensions gives a thread 16 bytes, a warp 512 and each warp its own columns.
    span = warp[:, None, None, None] * SPANS + tl.arange(0, SPANS)[:, None]
    near = ((of * blocks + tile // 4) * spans * 4 + tile % 4)[:, None, None] + span * 4
    near = words + near * LANES + tl.arange(0, LANES)
    row = ((of * groups * blocks + tile // 4) * 32 + tile % 4 * 8)[:, None] + tl.arange(0, 8)
    scale_words = scales.to(tl.pointer_type(tl.int32), bitcast=True) + row
    if zeros is not None:
        zero_words = zeros.to(tl.pointer_type(tl.int32), bitcast=True) + row
    if TOKENS > 1 or MATRICES == 1:
        x += (pair // k).to(tl.int64)[None, None, :] * K
    column = warp[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, :, None]
    there = present[None, None, :]
    sums = tl.zeros((WARPS, ROWS, MOST), tl.float32)
    for first in tl.range(0, HELD * ROUNDS, HELD, num_stages=1):
        held, of_rows, points, tokens = (), (), (), ()
        for i in tl.static_range(HELD):
            step = (first + i) * WARPS + warp
            at = near + (first + i) * (WARPS * SPANS * 4 * LANES)
            if WHOLE:
                held = held + (tl.load(at, eviction_policy="evict_first"),)
            else:
                inside = step[:, None, None, None] * SPANS < spans
                held = held + (tl.load(at, inside, 0, eviction_policy="evict_first"),)
            group = tl.minimum(step, groups - 1)[:, None, None] if GROUPED else step[:, None, None] * 0
            of_rows = of_rows + (tl.load(scale_words + group * blocks * 32),)
            if zeros is not None:
                points = points + (tl.load(zero_words + group * blocks * 32),)
        for i in tl.static_range(HELD):
            inside = there if WHOLE else there & ((first + i) * (WARPS * DEPTH) + column < K)
            tokens = tokens + (tl.load(x + (first + i) * (WARPS * DEPTH) + column, inside, 0.0),)
        # One wait for all of them: the compiler moves no load over a barrier, and no use of one before a branch, which is
        # always taken.
        tl.debug_barrier()
        if K > 0:
            for i in tl.static_range(HELD):
                if zeros is None:
                    low = tl.full((WARPS, PARTS, 8), 8, tl.int32)
                    high = low
                else:
                    low, high = points[i] & 0xFFFF, points[i] >> 16
                if ASM:
                    low, high = low * 0x10001 + MAGIC, high * 0x10001 + MAGIC
                low = tl.broadcast_to(low[:, :, None, :, None], (WARPS, PARTS, SPANS, 8, 4 * STEPS)).reshape(SHAPE)
                high = tl.broadcast_to(high[:, :, None, :, None], (WARPS, PARTS, SPANS, 8, 4 * STEPS)).reshape(SHAPE)
                values = _codes(held[i], low, high, x.dtype.element_ty, MAGIC, ASM)
                values = values.reshape(
                    WARPS, PARTS, SPANS, 8, 4, STEPS, 2, 2, 2
                )  # warp, part, span, r, q, step, p, c, h
                weight = values.trans(0, 1, 8, 3, 2, 5, 4, 7, 6).reshape(WARPS, ROWS, DEPTH)
                columns = (
                    tokens[i].reshape(WARPS, STEPS * SPANS, 2, 4, 2, TOKENS).trans(0, 1, 3, 2, 4, 5)
                )  # c, q → q, c
                columns = columns.reshape(WARPS, DEPTH, 1, TOKENS)
                columns = tl.broadcast_to(_here(columns) if LATE else columns, (WARPS, DEPTH, MOST // TOKENS, TOKENS))
                columns = columns.reshape(WARPS, DEPTH, MOST)
                found = tl.dot(weight, columns, input_precision="ieee")
                sums += found * _scales(of_rows[i], scales.dtype.element_ty)[:, :, None]
    return tl.sum(sums, 0)


@triton.jit
def _place(pairs, begins, ends, tile, TOKENS: tl.constexpr):
    """A tile's pairs [TOKENS], and which of them there are: with one token, each tile has one."""
    if TOKENS == 1:
        place = tile + tl.arange(0, 1)
        present = place >= 0
    else:
        place = tl.load(begins + tile) + tl.arange(0, TOKENS)
        present = place < tl.load(ends + tile)
    return tl.load(pairs + place, present, 0), present


@triton.jit
def _store(out, values, pair, present, by_rows, N):
    """[MOST, rows of a program] to the rows `pair` [TOKENS] of out."""
    ROWS: tl.constexpr = values.shape[1]
    TOKENS: tl.constexpr = pair.shape[0]
    n = by_rows * ROWS + tl.arange(0, ROWS)
    row = tl.broadcast_to(pair[None, :], (MOST // TOKENS, TOKENS)).reshape(MOST).to(tl.int64)
    stored = tl.broadcast_to(present[None, :], (MOST // TOKENS, TOKENS)).reshape(MOST) & (tl.arange(0, MOST) < TOKENS)
    tl.store(out + row[:, None] * N + n[None, :], values.to(out.dtype.element_ty), stored[:, None] & (n[None, :] < N))


@triton.jit(do_not_specialize=["k", "blocks", "spans", "groups"])
def _gate_up_kernel(
    x, pairs, experts, begins, ends, words, scales, zeros, out, k, N, K, blocks, spans, groups,
    GROUPED: tl.constexpr, TILES: tl.constexpr, SPANS: tl.constexpr, STEPS: tl.constexpr, TOKENS: tl.constexpr,
    WARPS: tl.constexpr, HELD: tl.constexpr, WHOLE: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr,
    LATE: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Program (rows, tile of pairs)."""
    by_rows, tile = tl.program_id(0), tl.program_id(1)
    expert = tl.load(experts + tile)
    pair, present = _place(pairs, begins, ends, tile, TOKENS)
    if expert < 0:
        return
    sums = _sums(
        x, pair, k, present, words, scales, zeros, expert * 2, by_rows, K, blocks, spans, groups,
        GROUPED, 2, TILES, SPANS, STEPS, TOKENS, WARPS, HELD, WHOLE, MAGIC, ASM, LATE, ROUNDS,
    )  # fmt: skip
    ROWS: tl.constexpr = 16 * TILES
    gate, up = tl.split(tl.trans(sums.reshape(2, ROWS, MOST), 2, 1, 0))
    h = gate / (1 + tl.exp(-gate)) * up
    _store(out, h, pair, present, by_rows, N)


@triton.jit(do_not_specialize=["blocks", "spans", "groups"])
def _down_kernel(
    h, weights, pairs, experts, begins, ends, words, scales, zeros, out, N, K, blocks, spans, groups,
    GROUPED: tl.constexpr, TILES: tl.constexpr, SPANS: tl.constexpr, STEPS: tl.constexpr, TOKENS: tl.constexpr,
    WARPS: tl.constexpr, HELD: tl.constexpr, WHOLE: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr,
    LATE: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Program (rows, tile of pairs)."""
    by_rows, tile = tl.program_id(0), tl.program_id(1)
    expert = tl.load(experts + tile)
    pair, present = _place(pairs, begins, ends, tile, TOKENS)
    if expert < 0:
        return
    factors = tl.load(weights + pair, present, 0.0)
    sums = _sums(
        h, pair, 1, present, words, scales, zeros, expert, by_rows, K, blocks, spans, groups,
        GROUPED, 1, TILES, SPANS, STEPS, TOKENS, WARPS, HELD, WHOLE, MAGIC, ASM, LATE, ROUNDS,
    )  # fmt: skip
    _store(
        out,
        tl.trans(sums * tl.broadcast_to(factors[None, :], (MOST // TOKENS, TOKENS)).reshape(MOST)[None, :]),
        pair,
        present,
        by_rows,
        N,
    )


def gate_up(x: torch.Tensor, routes: Routes, k: int, stack: Int4Experts, share: Share) -> torch.Tensor:
    part = stack.gate_up
    out = x.new_empty(len(x) * k, part.rows)
    arguments, constants, grid = _launch(x, part, routes, share, len(x))
    _gate_up_kernel[grid](
        x, *routes[:4], *arguments[:3], out, k, *arguments[3:], *constants,
        num_warps=share.warps, maxnreg=share.registers, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def down(h: torch.Tensor, weights: torch.Tensor, routes: Routes, stack: Int4Experts, share: Share) -> torch.Tensor:
    part = stack.down
    tokens, k = weights.shape
    out = torch.empty((tokens, k, part.rows), device=h.device)
    arguments, constants, grid = _launch(h, part, routes, share, tokens)
    _down_kernel[grid](
        h, weights, *routes[:4], *arguments[:3], out, *arguments[3:], *constants,
        num_warps=share.warps, maxnreg=share.registers, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _launch(
    x: torch.Tensor, stack: Stack, routes: Routes, share: Share, tokens: int
) -> tuple[list[object], list[object], tuple[int, int]]:
    """A kernel's arguments, its constants and its grid of rows and tiles."""
    _, _, blocks, spans, *_, steps = stack.words.shape
    groups = stack.scales.shape[2]
    block = depth(stack.columns // groups)
    count = triton.cdiv(stack.columns, block)
    tokens = triton.next_power_of_2(tokens) if share.one else MOST.value
    held = triton.cdiv(count, share.warps * share.rounds)
    arguments = [stack.words, stack.scales, stack.zeros, stack.rows, stack.columns, blocks, spans, groups]
    constants = [
        groups > 1, share.rows // 16, block // (16 * steps), steps, tokens, share.warps, held,
        stack.columns == held * share.rounds * share.warps * block, MAGIC[x.dtype], not INTERPRETED, share.late and not INTERPRETED, share.rounds,
    ]  # fmt: skip
    return arguments, constants, (triton.cdiv(stack.rows, share.rows), len(routes.experts))
