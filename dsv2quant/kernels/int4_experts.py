"""Routed experts of INT4 weights over BF16 tokens: `gate_up` and `down`, one launch each for all experts.

As int4_gemm.py, by whose operand the weights are read: they are the MMA's M side, 64 or more rows of one expert, and a
tile of pairs (routing.py) is its N side. A program of `gate_up` has the same rows of gate and up. Tiles that are not
needed return at once. Few tokens would make few programs: theirs have fewer rows, whose columns warps share. Or K is
split among programs: `down` leaves each split's sums as a row of its own, to be added with those of the token's
experts; in `gate_up` the last program to arrive adds them, in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv2quant.kernels.int4_gemm import INTERPRETED, MAGIC, _codes, _operand
from dsv2quant.kernels.int4_layout import depth
from dsv2quant.kernels.int4_stack import ARRIVALS, Int4Experts, Stack
from dsv2quant.kernels.routing import Routes

NARROW = 8  # tokens of whom no expert has more: they fill the least width that MMA units have


class Config(NamedTuple):
    rows: int  # of each matrix, per program
    split: int  # programs along K
    warps: int
    stages: int
    registers: None = None


class Few(NamedTuple):
    """Of few pairs."""

    rows: int  # of each matrix, per program: 16 or 32
    parts: int  # spans that a program takes at once, of which each warp has its own
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most

    @property
    def split(self) -> int:
        """A program has all of K."""
        return 1


@triton.jit
def _scales(words, TILES: tl.constexpr, DTYPE: tl.constexpr):
    """Pairs [TILES, 32] of rows r and r + 8 → float32 [64 · TILES]."""
    low, high = _halves(words, DTYPE)
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
        weight = _operand(
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
def _few_sums(
    x, rows, present, words, scales, zeros, matrix, by_rows, K, blocks, spans, groups,
    GROUPED: tl.constexpr, MATRICES: tl.constexpr, BANDS: tl.constexpr, SPANS: tl.constexpr, STEPS: tl.constexpr,
    TOKENS: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """As `_sums`, of 16 · BANDS rows of each matrix. Warps have spans of their own, PARTS at once, and add their sums
    at the end: many loads are on their way though rows are few.

    By `mma.sync`, whose operand of 16 rows is that of one warp in 64 rows of `wgmma`. Both operands have columns in the
    order step, q, c, p: so the compiler has a thread's side by side where it sees them joined."""
    WIDTH: tl.constexpr = 16 * STEPS
    TILES: tl.constexpr = MATRICES * BANDS
    part = tl.arange(0, PARTS)[None, :, None]
    tile = tl.arange(0, TILES)[:, None, None]
    band = by_rows * BANDS + tile % BANDS
    block = tl.minimum(band // 4, blocks - 1)  # beyond the last: any, since it isn't stored
    of = (matrix + tile // BANDS).to(tl.int64)
    words += ((of * blocks + block) * spans + part) * (128 * STEPS) + band % 4 * (32 * STEPS)
    words += tl.arange(0, 32 * STEPS)[None, None, :]
    pair = (of * groups * blocks + block) * 32 + band % 4 * 8 + tl.arange(0, 8)[None, None, :]
    scale_words = scales.to(tl.pointer_type(tl.int32), bitcast=True) + pair
    if zeros is not None:
        zero_words = zeros.to(tl.pointer_type(tl.int32), bitcast=True) + pair
    k = tl.arange(0, PARTS)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, :, None]
    x += rows.to(tl.int64)[None, None, :] * K + k

    sums = tl.zeros((TILES * PARTS, 16, TOKENS), tl.float32)
    for first in tl.range(0, spans, PARTS, num_stages=STAGES):
        tokens = tl.load(x + first * WIDTH, present[None, None, :] & (first * WIDTH + k < K), 0.0)
        tokens = tokens.reshape(PARTS, STEPS, 2, 4, 2, TOKENS).trans(0, 1, 3, 2, 4, 5).reshape(PARTS, WIDTH, TOKENS)
        tokens = tl.broadcast_to(tokens[None], (TILES, PARTS, WIDTH, TOKENS)).reshape(TILES * PARTS, WIDTH, TOKENS)
        loaded = tl.load(words + first * (128 * STEPS), first + part < spans, 0)
        group = tl.minimum(first + part, spans - 1) // SPANS if GROUPED else tl.zeros_like(part)
        scale = tl.load(scale_words + group * blocks * 32)
        if zeros is None:
            low = tl.full((TILES, PARTS, 8), 8, tl.int32)
            high = low
        else:
            both = tl.load(zero_words + group * blocks * 32)
            low, high = both & 0xFFFF, both >> 16
        if ASM:
            low, high = low * 0x10001 + MAGIC, high * 0x10001 + MAGIC
        SHAPE: tl.constexpr = (TILES, PARTS, 32 * STEPS)
        low = tl.broadcast_to(low[:, :, :, None], (TILES, PARTS, 8, 4 * STEPS)).reshape(SHAPE)
        high = tl.broadcast_to(high[:, :, :, None], (TILES, PARTS, 8, 4 * STEPS)).reshape(SHAPE)
        values = _codes(loaded, low, high, x.dtype.element_ty, MAGIC, ASM)
        values = values.reshape(TILES, PARTS, 8, 4, STEPS, 2, 2, 2)  # tile, part, r, q, step, p, c, h
        weight = values.trans(0, 1, 7, 2, 4, 3, 6, 5).reshape(TILES * PARTS, 16, WIDTH)
        low_scale, high_scale = _halves(scale, scales.dtype.element_ty)
        factors = tl.join(low_scale, high_scale).trans(0, 1, 3, 2).reshape(TILES * PARTS, 16)
        sums += tl.dot(weight, tokens, input_precision="ieee") * factors[:, :, None]
    return tl.sum(sums.reshape(TILES, PARTS, 16, TOKENS), 1).reshape(16 * TILES, TOKENS)


@triton.jit
def _halves(words, DTYPE: tl.constexpr):
    """The two scales in each of `words`, float32."""
    if DTYPE.is_bf16():
        low, high = (words << 16).to(tl.float32, bitcast=True), (words & -0x10000).to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _place(pairs, begins, ends, tile, TOKENS: tl.constexpr):
    """A tile's pairs [TOKENS], and which of them there are."""
    place = tl.load(begins + tile) + tl.arange(0, TOKENS)
    present = place < tl.load(ends + tile)
    return tl.load(pairs + place, present, 0), present


@triton.jit(do_not_specialize=["k", "blocks", "spans", "groups"])
def _gate_up_kernel(
    x, pairs, experts, begins, ends, words, scales, zeros, out, partial, arrivals, k, N, K, blocks, spans, groups,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, SPANS: tl.constexpr,
    STEPS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, MAGIC: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Program (split, rows, tile of pairs). PARTS: by `_few_sums`."""
    split, by_rows, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert = tl.load(experts + tile)
    if expert < 0:
        return
    pair, present = _place(pairs, begins, ends, tile, TOKENS)
    if PARTS:
        sums = _few_sums(
            x, pair // k, present, words, scales, zeros, expert * 2, by_rows, K, blocks, spans, groups,
            GROUPED, 2, ROWS // 16, SPANS, STEPS, TOKENS, PARTS, STAGES, MAGIC, ASM,
        )  # fmt: skip
    else:
        sums = _sums(
            x, pair // k, present, words, scales, zeros, expert * 2, by_rows, split, K, blocks, spans, groups,
            GROUPED, EVEN, 2, ROWS // 64, SPANS, STEPS, TOKENS, SPLIT, STAGES, MAGIC, ASM,
        )  # fmt: skip

    if SPLIT == 1:
        gate, up = tl.split(tl.trans(sums.reshape(2, ROWS, TOKENS), 2, 1, 0))
    else:
        counter = tile * tl.num_programs(1) + by_rows
        SIZE: tl.constexpr = 2 * ROWS * TOKENS
        partial += counter.to(tl.int64) * (SPLIT * SIZE) + tl.arange(0, TOKENS)[:, None] * (2 * ROWS)
        tl.store(partial + split * SIZE + tl.arange(0, 2 * ROWS)[None, :], tl.trans(sums), present[:, None])
        tl.debug_barrier()  # every thread's sums are out before this program counts itself
        if tl.atomic_add(arrivals + counter, 1, sem="acq_rel") < SPLIT - 1:
            return
        tl.store(arrivals + counter, 0)
        partial += tl.arange(0, ROWS)[None, :]
        gate, up = tl.zeros((TOKENS, ROWS), tl.float32), tl.zeros((TOKENS, ROWS), tl.float32)
        for part in tl.static_range(SPLIT):
            gate += tl.load(partial + part * SIZE, present[:, None], 0.0, cache_modifier=".cg")
            up += tl.load(partial + part * SIZE + ROWS, present[:, None], 0.0, cache_modifier=".cg")
    h = gate / (1 + tl.exp(-gate)) * up
    n = by_rows * ROWS + tl.arange(0, ROWS)
    at = out + pair.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, h.to(out.dtype.element_ty), present[:, None] & (n[None, :] < N))


@triton.jit(do_not_specialize=["blocks", "spans", "groups"])
def _down_kernel(
    h, weights, pairs, experts, begins, ends, words, scales, zeros, out, N, K, blocks, spans, groups,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, SPANS: tl.constexpr,
    STEPS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, MAGIC: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Program (split, rows, tile of pairs). PARTS: by `_few_sums`."""
    split, by_rows, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert = tl.load(experts + tile)
    if expert < 0:
        return
    pair, present = _place(pairs, begins, ends, tile, TOKENS)
    if PARTS:
        sums = _few_sums(
            h, pair, present, words, scales, zeros, expert, by_rows, K, blocks, spans, groups,
            GROUPED, 1, ROWS // 16, SPANS, STEPS, TOKENS, PARTS, STAGES, MAGIC, ASM,
        )  # fmt: skip
    else:
        sums = _sums(
            h, pair, present, words, scales, zeros, expert, by_rows, split, K, blocks, spans, groups,
            GROUPED, EVEN, 1, ROWS // 64, SPANS, STEPS, TOKENS, SPLIT, STAGES, MAGIC, ASM,
        )  # fmt: skip
    sums *= tl.load(weights + pair, present, 0.0)[None, :]
    n = by_rows * ROWS + tl.arange(0, ROWS)
    at = out + (pair.to(tl.int64) * SPLIT + split)[:, None] * N + n[None, :]
    tl.store(at, tl.trans(sums), present[:, None] & (n[None, :] < N))


def gate_up(
    x: torch.Tensor, routes: Routes, k: int, stack: Int4Experts, config: Config | Few | None = None
) -> torch.Tensor:
    """silu(gate · x) · (up · x) of each pair: x BF16 [tokens, hidden] → [tokens · k, width], row = number of the pair.

    A token's experts must differ. Sums and the product are float32, rounded once. Raises ValueError where shapes or
    dtypes don't fit.
    """
    part = stack.gate_up
    pairs = len(x) * k
    _check(x, "x", (pairs // k, part.columns), routes, pairs)
    out = x.new_empty(pairs, part.rows)
    config = config or choose(len(x), part, routes.block)
    arguments, constants, grid = _launch(x, part, routes, len(x), config)
    partial = arrivals = None
    if config.split > 1:
        if grid[1] * grid[2] > ARRIVALS:
            raise ValueError(f"{len(x)} tokens are too many for a split of K")
        partial = torch.empty(grid[0] * grid[1] * grid[2] * 2 * config.rows * routes.block, device=x.device)
        arrivals = stack.arrivals
    if pairs:
        _gate_up_kernel[grid](
            x, *routes[:4], *arguments[:3], out, partial, arrivals, k, *arguments[3:], *constants,
            num_warps=config.warps, maxnreg=config.registers, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def down(
    h: torch.Tensor, weights: torch.Tensor, routes: Routes, stack: Int4Experts, config: Config | Few | None = None
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
    config = config or choose(tokens, part, routes.block)
    out = torch.empty((tokens, k * config.split, part.rows), device=h.device)
    arguments, constants, grid = _launch(h, part, routes, tokens, config)
    if tokens:
        _down_kernel[grid](
            h, weights, *routes[:4], *arguments[:3], out, *arguments[3:], *constants,
            num_warps=config.warps, maxnreg=config.registers, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def choose(tokens: int, stack: Stack, block: int) -> Config | Few:
    """The configuration for so many tokens, whose pairs are in tiles of `block`: fitted on an H200."""
    down = stack.words.shape[1] == 1
    if tokens <= NARROW:
        return Few(32 if down else 16, 8, 8, 4, 64)  # four programs share a multiprocessor's registers
    if block > 32:
        return Config(64, 1, 4 if down else 8, 3)
    return Config(128 if down else 64, 1, 4, 4)


def _check(x: torch.Tensor, name: str, shape: tuple[int, int], routes: Routes, pairs: int) -> None:
    dtypes = (torch.float16, torch.float32) if INTERPRETED else (torch.bfloat16, torch.float16)
    if x.dtype not in dtypes or x.shape != shape or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, of shape {shape} and one of {', '.join(map(str, dtypes))}")
    if len(routes.pairs) != pairs:
        raise ValueError(f"the routes are of {len(routes.pairs)} pairs, not {pairs}")


def _launch(
    x: torch.Tensor, stack: Stack, routes: Routes, tokens: int, config: Config | Few
) -> tuple[list[object], list[object], tuple[int, int, int]]:
    """A kernel's arguments, its constants and its grid."""
    parts, wide = 0, routes.block
    if isinstance(config, Few):
        parts, wide = config.parts, NARROW if tokens <= NARROW else wide
    _, _, blocks, spans, *_, steps = stack.words.shape
    groups = stack.scales.shape[2]
    block = depth(stack.columns // groups)
    arguments = [stack.words, stack.scales, stack.zeros, stack.rows, stack.columns, blocks, spans, groups]
    constants = [
        groups > 1, stack.columns % block == 0, config.rows, parts,
        block // (16 * steps), steps, wide, config.split, config.stages, MAGIC[x.dtype], not INTERPRETED,
    ]  # fmt: skip
    return arguments, constants, (config.split, triton.cdiv(stack.rows, config.rows), len(routes.experts))
