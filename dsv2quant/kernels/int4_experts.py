"""Routed experts of INT4 weights over BF16 tokens: `gate_up` and `down`, one launch each for all experts.

As int4_gemm.py, by whose operand the weights are read: they are the MMA's M side, 64 or more rows of one expert, and a
tile of pairs (routing.py) is its N side. A program of `gate_up` has the same rows of gate and up. Tiles that are not
needed return at once. Where few tokens make few programs of `down`, K is split among more: each split's sums are a row
of its own, to be added with those of the token's experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv2quant.kernels.checks import INTERPRETED, MULTIPROCESSORS
from dsv2quant.kernels.int4_layout import depth
from dsv2quant.kernels.int4_operand import MAGIC, operand
from dsv2quant.kernels.int4_stack import Int4Experts, Stack
from dsv2quant.kernels.routing import Routes


class Config(NamedTuple):
    rows: int  # of each matrix, per program
    split: int  # programs along K: of `down` alone
    warps: int
    stages: int


@triton.jit
def _scales(words, TILES: tl.constexpr, DTYPE: tl.constexpr):
    """Pairs [TILES, 32] of rows r and r + 8 → float32 [64 · TILES]."""
    if DTYPE.is_bf16():
        low, high = (words << 16).to(tl.float32, bitcast=True), (words & -0x10000).to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.join(low, high).reshape(TILES, 4, 8, 2).trans(0, 1, 3, 2).reshape(64 * TILES)


@triton.jit
def _sums(
    x, rows, present, words, scales, zeros, matrix, by_rows, split, K, blocks, spans, groups,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, MATRICES: tl.constexpr, TILES: tl.constexpr, SPANS: tl.constexpr,
    STEPS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, MAGIC: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """float32 [MATRICES · 64 · TILES, TOKENS]: rows of the matrices `matrix` and on, by rows of x [TOKENS]."""
    BLOCKS: tl.constexpr = MATRICES * TILES
    DEPTH: tl.constexpr = 16 * STEPS * SPANS
    tile = tl.arange(0, BLOCKS)[:, None]
    of = (matrix + tile // TILES).to(tl.int64)
    block = tl.minimum(by_rows * TILES + tile % TILES, blocks - 1)  # beyond the last: any, since it isn't stored
    first = (of * blocks + block)[:, :, None] * (spans * 128 * STEPS)
    pair = (of * groups * blocks + block) * 32 + tl.arange(0, 32)[None, :]
    scale_words = scales.to(tl.pointer_type(tl.int32), bitcast=True) + pair
    if zeros is not None:
        zero_words = zeros.to(tl.pointer_type(tl.int32), bitcast=True) + pair
    k = tl.arange(0, DEPTH)
    x += rows.to(tl.int64)[None, :] * K + k[:, None]
    steps = spans // SPANS
    begin = split * steps // SPLIT
    end = (split + 1) * steps // SPLIT

    sums = tl.zeros((64 * BLOCKS, TOKENS), tl.float32)
    for i in tl.range(begin, end, num_stages=STAGES):
        mask = present[None, :] if EVEN else present[None, :] & (i * DEPTH + k[:, None] < K)
        tokens = tl.load(x + i * DEPTH, mask, 0.0)
        group = i if GROUPED else 0
        if zeros is None:
            low = tl.full((BLOCKS, 32), 8, tl.int32)
            high = low
        else:
            both = tl.load(zero_words + group * blocks * 32)
            low, high = both & 0xFFFF, both >> 16
        weight = operand(
            words, low, high, first + i * (SPANS * 128 * STEPS), BLOCKS, SPANS, STEPS, x.dtype.element_ty, MAGIC, ASM
        )
        if GROUPED:
            scale = _scales(tl.load(scale_words + group * blocks * 32), BLOCKS, scales.dtype.element_ty)
            sums += tl.dot(weight, tokens, input_precision="ieee") * scale[:, None]
        else:
            sums = tl.dot(weight, tokens, sums, input_precision="ieee")
    if not GROUPED:
        sums *= _scales(tl.load(scale_words), BLOCKS, scales.dtype.element_ty)[:, None]
    return sums


@triton.jit
def _place(pairs, begins, ends, tile, TOKENS: tl.constexpr):
    """A tile's pairs [TOKENS], and which of them there are."""
    place = tl.load(begins + tile) + tl.arange(0, TOKENS)
    present = place < tl.load(ends + tile)
    return tl.load(pairs + place, present, 0), present


@triton.jit(do_not_specialize=["k", "blocks", "spans", "groups"])
def _gate_up_kernel(
    x, pairs, experts, begins, ends, words, scales, zeros, out, k, N, K, blocks, spans, groups,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, SPANS: tl.constexpr, STEPS: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Program (rows, tile of pairs)."""
    by_rows, tile = tl.program_id(0), tl.program_id(1)
    expert = tl.load(experts + tile)
    if expert < 0:
        return
    pair, present = _place(pairs, begins, ends, tile, TOKENS)
    sums = _sums(
        x, pair // k, present, words, scales, zeros, expert * 2, by_rows, 0, K, blocks, spans, groups,
        GROUPED, EVEN, 2, ROWS // 64, SPANS, STEPS, TOKENS, 1, STAGES, MAGIC, ASM,
    )  # fmt: skip
    gate, up = tl.split(tl.trans(sums.reshape(2, ROWS, TOKENS), 2, 1, 0))
    h = gate / (1 + tl.exp(-gate)) * up
    n = by_rows * ROWS + tl.arange(0, ROWS)
    at = out + pair.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, h.to(out.dtype.element_ty), present[:, None] & (n[None, :] < N))


@triton.jit(do_not_specialize=["blocks", "spans", "groups"])
def _down_kernel(
    h, weights, pairs, experts, begins, ends, words, scales, zeros, out, N, K, blocks, spans, groups,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, SPANS: tl.constexpr, STEPS: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (split, rows, tile of pairs)."""
    split, by_rows, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert = tl.load(experts + tile)
    if expert < 0:
        return
    pair, present = _place(pairs, begins, ends, tile, TOKENS)
    sums = _sums(
        h, pair, present, words, scales, zeros, expert, by_rows, split, K, blocks, spans, groups,
        GROUPED, EVEN, 1, ROWS // 64, SPANS, STEPS, TOKENS, SPLIT, STAGES, MAGIC, ASM,
    )  # fmt: skip
    sums *= tl.load(weights + pair, present, 0.0)[None, :]
    n = by_rows * ROWS + tl.arange(0, ROWS)
    at = out + (pair.to(tl.int64) * SPLIT + split)[:, None] * N + n[None, :]
    tl.store(at, tl.trans(sums), present[:, None] & (n[None, :] < N))


def gate_up(x: torch.Tensor, routes: Routes, k: int, stack: Int4Experts, config: Config | None = None) -> torch.Tensor:
    """silu(gate · x) · (up · x) of each pair: x BF16 [tokens, hidden] → [tokens · k, width], row = number of the pair.

    Sums and the product are float32, rounded once. Raises ValueError where shapes or dtypes don't fit, or for a config
    that splits K.
    """
    part = stack.gate_up
    pairs = len(x) * k
    _check(x, "x", (pairs // k, part.columns), routes, pairs)
    config = config or choose(len(routes.experts), part, routes.block)
    if config.split > 1:
        raise ValueError("gate_up does not split K")
    out = x.new_empty(pairs, part.rows)
    arguments, constants, grid = _launch(x, part, routes, config)
    if pairs:
        _gate_up_kernel[grid](
            x, *routes[:4], *arguments[:3], out, k, *arguments[3:], *constants,
            num_warps=config.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def down(
    h: torch.Tensor, weights: torch.Tensor, routes: Routes, stack: Int4Experts, config: Config | None = None
) -> torch.Tensor:
    """The weighted outputs of pairs: h BF16 [tokens · k, width], weights float32 [tokens, k] → float32
    [tokens, k · split, hidden], of which the sum over dim 1 is the experts' output.

    Raises ValueError where shapes or dtypes don't fit.
    """
    part = stack.down
    tokens, k = weights.shape
    _check(h, "h", (tokens * k, part.columns), routes, tokens * k)
    if weights.dtype != torch.float32 or not weights.is_contiguous():
        raise ValueError("weights must be contiguous float32")
    config = config or choose(len(routes.experts), part, routes.block)
    out = torch.empty((tokens, k * config.split, part.rows), device=h.device)
    arguments, constants, grid = _launch(h, part, routes, config)
    if tokens:
        _down_kernel[config.split, *grid](
            h, weights, *routes[:4], *arguments[:3], out, *arguments[3:], *constants, config.split,
            num_warps=config.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def choose(tiles: int, stack: Stack, block: int) -> Config:
    """The configuration for so many tiles of `block` pairs: fitted on an H200, to 1 … 16 tokens of DeepSeek-V2 and
    V2-Lite; for larger blocks, less closely."""
    down = stack.words.shape[1] == 1
    if block > 32:
        return Config(64, 1, 4 if down else 8, 3)
    if not down:
        return Config(64, 1, 4, 4)
    if tiles * triton.cdiv(stack.rows, 128) >= MULTIPROCESSORS:
        return Config(128, 1, 4, 4)
    return Config(64, 2 if stack.columns > 128 else 1, 4, 4)  # 128 columns may be one step, which can't be split


def _check(x: torch.Tensor, name: str, shape: tuple[int, int], routes: Routes, pairs: int) -> None:
    dtypes = (torch.float16, torch.float32) if INTERPRETED else (torch.bfloat16, torch.float16)
    if x.dtype not in dtypes or x.shape != shape or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, of shape {shape} and one of {', '.join(map(str, dtypes))}")
    if len(routes.pairs) != pairs:
        raise ValueError(f"the routes are of {len(routes.pairs)} pairs, not {pairs}")


def _launch(
    x: torch.Tensor, stack: Stack, routes: Routes, config: Config
) -> tuple[list[object], list[object], tuple[int, int]]:
    """A kernel's arguments, its constants and its grid of rows and tiles."""
    _, _, blocks, spans, *_, steps = stack.words.shape
    groups = stack.scales.shape[2]
    block = depth(stack.columns // groups)
    arguments = [stack.words, stack.scales, stack.zeros, stack.rows, stack.columns, blocks, spans, groups]
    constants = [
        groups > 1, stack.columns % block == 0, config.rows,
        block // (16 * steps), steps, routes.block, config.stages, MAGIC[x.dtype], not INTERPRETED,
    ]  # fmt: skip
    return arguments, constants, (triton.cdiv(stack.rows, config.rows), len(routes.experts))
