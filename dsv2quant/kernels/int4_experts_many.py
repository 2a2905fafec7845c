"""The kernels of int4_experts.py for many tokens: tiles of 64 or more pairs, whose time is that of the matrix units.

A program takes as many of an expert's rows as registers hold sums of: INT4 rows are the cheaper operand to bring from
L2, and each is dequantized for a whole tile. Sums are of PARTS, one after the other, so that only one of them has
products beside its sums. A tile of few pairs takes a narrower product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv2quant.kernels.int4_experts import _check, _scales, _zeros
from dsv2quant.kernels.int4_held import MAGIC, integers, words_at
from dsv2quant.kernels.int4_layout import ROWS, Int4Experts, Stack, depth
from dsv2quant.kernels.launch import INTERPRETED, PDL, wait
from dsv2quant.kernels.routing import Routes


class Many(NamedTuple):
    """A program's share."""

    parts: int
    rows: int  # of the weight, in a part
    warps: int
    stages: int
    narrow: int = 0  # tiles of no more pairs are products of so many; 0: none


@triton.jit
def _sums(
    x, rows, present, words, scales, zeros, expert, by_rows, K, blocks, spans, groups,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, SPANS: tl.constexpr,
    STEPS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A float32 [64 · TILES, TOKENS] for each of PARTS: rows of the expert's matrix by rows of x [TOKENS]."""
    DEPTH: tl.constexpr = 16 * STEPS * SPANS
    SIZE: tl.constexpr = SPANS * 128 * STEPS
    expert = expert.to(tl.int64)
    scale_words = scales.to(tl.pointer_type(tl.int32), bitcast=True)
    if zeros is not None:
        zero_words = zeros.to(tl.pointer_type(tl.int32), bitcast=True)
    nears, pairs, sums = (), (), ()
    for p in tl.static_range(PARTS):
        block = tl.minimum((by_rows * PARTS + p) * TILES + tl.arange(0, TILES)[:, None], blocks - 1)
        nears = nears + ((expert * blocks + block)[:, :, None] * (spans * 128 * STEPS),)
        pairs = pairs + ((expert * groups * blocks + block) * 32 + tl.arange(0, 32)[None, :],)
        sums = sums + (tl.zeros((64 * TILES, TOKENS), tl.float32),)
    k = tl.arange(0, DEPTH)[:, None]
    x += rows.to(tl.int64)[None, :] * K + k
    for i in tl.range(0, spans // SPANS, num_stages=STAGES):
        # What is beyond the tile is any pair's, and isn't stored.
        value = (
            tl.load(x + i * DEPTH) if EVEN else tl.load(x + i * DEPTH, (present[None, :]) & (i * DEPTH + k < K), 0.0)
        )
        group = i if GROUPED else 0
        added = ()
        for p in tl.static_range(PARTS):
            held = words_at(words, nears[p] + i * SIZE, SPANS, STEPS, "")
            points = zeros
            if zeros is not None:
                points = tl.load(zero_words + pairs[p] + group * blocks * 32)
            low, high = _zeros(points, TILES)
            weight = integers(held, low, high, TILES, SPANS, STEPS, x.dtype.element_ty, MAGIC, ASM)
            if GROUPED:
                scale = _scales(tl.load(scale_words + pairs[p] + group * blocks * 32), TILES, scales.dtype.element_ty)
                added = added + (sums[p] + tl.dot(weight, value, input_precision="ieee") * scale[:, None],)
            else:
                added = added + (tl.dot(weight, value, sums[p], input_precision="ieee"),)
        sums = added
    if not GROUPED:
        scaled = ()
        for p in tl.static_range(PARTS):
            scale = _scales(tl.load(scale_words + pairs[p]), TILES, scales.dtype.element_ty)
            scaled = scaled + (sums[p] * scale[:, None],)
        sums = scaled
    return sums


@triton.jit
def _gate_up_tile(
    x, pairs, begin, end, expert, words, scales, zeros, out, k, N, K, blocks, spans, groups,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, SPANS: tl.constexpr,
    STEPS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    by_rows = tl.program_id(0)
    place = begin + tl.arange(0, TOKENS)
    present = place < end
    pair = tl.load(pairs + place, present, 0)
    sums = _sums(
        x, pair // k, present, words, scales, zeros, expert, by_rows, K, blocks, spans, groups,
        GROUPED, EVEN, PARTS, TILES, SPANS, STEPS, TOKENS, STAGES, MAGIC, ASM,
    )  # fmt: skip
    for p in tl.static_range(PARTS):
        gate, up = tl.split(sums[p].reshape(TILES, 4, 2, 8, TOKENS).trans(0, 1, 3, 4, 2))
        h = (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty).reshape(32 * TILES, TOKENS)
        n = (by_rows * PARTS + p) * (32 * TILES) + tl.arange(0, 32 * TILES)
        at = out + pair.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(at, tl.trans(h), present[:, None] & (n[None, :] < N))


@triton.jit(do_not_specialize=["k", "blocks", "spans", "groups"])
def _gate_up_kernel(
    x, pairs, experts, begins, ends, words, scales, zeros, out, k, N, K, blocks, spans, groups,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, SPANS: tl.constexpr,
    STEPS: tl.constexpr, TOKENS: tl.constexpr, NARROW: tl.constexpr, STAGES: tl.constexpr,
    MAGIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Program (rows, tile of pairs)."""
    wait()
    tile = tl.program_id(1)
    expert = tl.load(experts + tile)
    if expert < 0:
        return
    begin, end = tl.load(begins + tile), tl.load(ends + tile)
    if NARROW:
        if end - begin <= NARROW:
            _gate_up_tile(
                x, pairs, begin, end, expert, words, scales, zeros, out, k, N, K, blocks, spans, groups,
                GROUPED, EVEN, PARTS, TILES, SPANS, STEPS, NARROW, STAGES, MAGIC, ASM,
            )  # fmt: skip
        else:
            _gate_up_tile(
                x, pairs, begin, end, expert, words, scales, zeros, out, k, N, K, blocks, spans, groups,
                GROUPED, EVEN, PARTS, TILES, SPANS, STEPS, TOKENS, STAGES, MAGIC, ASM,
            )  # fmt: skip
    else:
        _gate_up_tile(
            x, pairs, begin, end, expert, words, scales, zeros, out, k, N, K, blocks, spans, groups,
            GROUPED, EVEN, PARTS, TILES, SPANS, STEPS, TOKENS, STAGES, MAGIC, ASM,
        )  # fmt: skip


@triton.jit
def _down_tile(
    h, weights, pairs, begin, end, expert, words, scales, zeros, out, N, K, blocks, spans, groups,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, SPANS: tl.constexpr,
    STEPS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    by_rows = tl.program_id(0)
    place = begin + tl.arange(0, TOKENS)
    present = place < end
    pair = tl.load(pairs + place, present, 0)
    sums = _sums(
        h, pair, present, words, scales, zeros, expert, by_rows, K, blocks, spans, groups,
        GROUPED, EVEN, PARTS, TILES, SPANS, STEPS, TOKENS, STAGES, MAGIC, ASM,
    )  # fmt: skip
    pair = tl.load(pairs + place, present, 0, volatile=True)  # again: registers have no room for it until now
    weight = tl.load(weights + pair, present, 0.0)
    for p in tl.static_range(PARTS):
        n = (by_rows * PARTS + p) * (64 * TILES) + tl.arange(0, 64 * TILES)
        at = out + pair.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(at, tl.trans(sums[p] * weight[None, :]), present[:, None] & (n[None, :] < N))


@triton.jit(do_not_specialize=["blocks", "spans", "groups"])
def _down_kernel(
    h, weights, pairs, experts, begins, ends, words, scales, zeros, out, N, K, blocks, spans, groups,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, SPANS: tl.constexpr,
    STEPS: tl.constexpr, TOKENS: tl.constexpr, NARROW: tl.constexpr, STAGES: tl.constexpr,
    MAGIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Program (rows, tile of pairs)."""
    wait()
    tile = tl.program_id(1)
    expert = tl.load(experts + tile)
    if expert < 0:
        return
    begin, end = tl.load(begins + tile), tl.load(ends + tile)
    if NARROW:
        if end - begin <= NARROW:
            _down_tile(
                h, weights, pairs, begin, end, expert, words, scales, zeros, out, N, K, blocks, spans, groups,
                GROUPED, EVEN, PARTS, TILES, SPANS, STEPS, NARROW, STAGES, MAGIC, ASM,
            )  # fmt: skip
        else:
            _down_tile(
                h, weights, pairs, begin, end, expert, words, scales, zeros, out, N, K, blocks, spans, groups,
                GROUPED, EVEN, PARTS, TILES, SPANS, STEPS, TOKENS, STAGES, MAGIC, ASM,
            )  # fmt: skip
    else:
        _down_tile(
            h, weights, pairs, begin, end, expert, words, scales, zeros, out, N, K, blocks, spans, groups,
            GROUPED, EVEN, PARTS, TILES, SPANS, STEPS, TOKENS, STAGES, MAGIC, ASM,
        )  # fmt: skip


def gate_up(x: torch.Tensor, routes: Routes, k: int, stack: Int4Experts, share: Many) -> torch.Tensor:
    """As int4_experts.gate_up."""
    part = stack.gate_up
    pairs = len(x) * k
    _check(x, "x", (pairs // k, part.columns), routes, pairs)
    out = x.new_empty(pairs, part.rows)
    arguments, constants, options = _launch(x, part, share, routes.block)
    _gate_up_kernel[triton.cdiv(2 * part.rows, share.rows * share.parts), len(routes.experts)](
        x, *routes[:4], *arguments[:3], out, k, *arguments[3:], **constants, **options
    )
    return out


def down(h: torch.Tensor, weights: torch.Tensor, routes: Routes, stack: Int4Experts, share: Many) -> torch.Tensor:
    """As int4_experts.down, which does not split K: float32 [tokens, k, hidden]."""
    part = stack.down
    tokens, k = weights.shape
    _check(h, "h", (tokens * k, part.columns), routes, tokens * k)
    out = torch.empty((tokens, k, part.rows), device=h.device)
    arguments, constants, options = _launch(h, part, share, routes.block)
    _down_kernel[triton.cdiv(part.rows, share.rows * share.parts), len(routes.experts)](
        h, weights, *routes[:4], *arguments[:3], out, *arguments[3:], **constants, **options
    )
    return out


def _launch(
    x: torch.Tensor, stack: Stack, share: Many, pairs: int
) -> tuple[list[torch.Tensor | int | None], dict[str, int], dict[str, bool | int]]:
    """A kernel's arguments, the constants that both have, and how it is launched."""
    _, blocks, spans, *_, steps = stack.words.shape
    groups = stack.scales.shape[1]
    block = depth(stack.columns // groups)
    arguments: list[torch.Tensor | int | None] = [stack.words, stack.scales, stack.zeros, stack.rows, stack.columns]
    arguments += [blocks, spans, groups]
    constants = {
        "GROUPED": groups > 1, "EVEN": stack.columns % block == 0, "PARTS": share.parts, "TILES": share.rows // ROWS,
        "SPANS": block // (16 * steps), "STEPS": steps, "TOKENS": pairs, "NARROW": share.narrow,
        "STAGES": share.stages, "MAGIC": MAGIC[x.dtype], "ASM": not INTERPRETED,
    }  # fmt: skip
    return arguments, constants, {"num_warps": share.warps, "enable_fp_fusion": True, "launch_pdl": PDL}
