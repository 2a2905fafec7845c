"""Routed experts of INT4 weights over BF16 tokens: `gate_up` and `down`, one launch each for all experts.

As int4_gemm.py, by whose operand the weights are read: they are the MMA's M side, 64 or more rows of one expert, and a
tile of pairs (routing.py) is its N side. Rows of gate and up alternate (int4_stack.py), so that a thread's sums are of
both. Tiles that are not needed return at once. Where few tokens make few programs of `down`, K is split among more:
each split's sums are a row of its own, to be added with those of the token's experts. Where few programs run at all,
each asks for as much as it can hold before it computes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv2quant.kernels import int4_prefill
from dsv2quant.kernels.int4_held import MAGIC, integers, words_at
from dsv2quant.kernels.int4_layout import ROWS, Int4Experts, Stack, depth
from dsv2quant.kernels.jit import cdiv, jit
from dsv2quant.kernels.launch import INTERPRETED, MULTIPROCESSORS, PDL, wait
from dsv2quant.kernels.routing import Routes


class Config(NamedTuple):
    rows: int  # of the weight, per program
    split: int  # programs along K: of `down` alone
    warps: int
    stages: int  # of the loop over K; 1 where it holds more than a step
    held: int = 1  # steps, of a group or 128 columns each, that a program asks for at once


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
def _zeros(words, TILES: tl.constexpr):
    """Pairs [TILES, 32] of rows r and r + 8 → int32 of each, 8 without words."""
    if words is None:
        low = tl.full((TILES, 32), 8, tl.int32)
        high = low
    else:
        low, high = words & 0xFFFF, words >> 16
    return low, high


@triton.jit
def _sums(
    x, rows, present, words, scales, zeros, expert, by_rows, split, K, blocks, spans, groups,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, TILES: tl.constexpr, SPANS: tl.constexpr, STEPS: tl.constexpr,
    TOKENS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, HELD: tl.constexpr, MAGIC: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """float32 [64 · TILES, TOKENS]: rows of the expert's matrix by rows of x [TOKENS]. EVEN: a program's columns are
    whole steps, in whole HELDs."""
    DEPTH: tl.constexpr = 16 * STEPS * SPANS
    SIZE: tl.constexpr = SPANS * 128 * STEPS
    POLICY: tl.constexpr = "evict_first" if HELD > 1 else ""
    expert = expert.to(tl.int64)
    block = by_rows * TILES + tl.arange(0, TILES)[:, None]
    block = tl.minimum(block, blocks - 1)  # beyond the last: any, since it isn't stored
    near = (expert * blocks + block)[:, :, None] * (spans * 128 * STEPS)
    pair = (expert * groups * blocks + block) * 32 + tl.arange(0, 32)[None, :]
    scale_words = scales.to(tl.pointer_type(tl.int32), bitcast=True) + pair
    if zeros is not None:
        zero_words = zeros.to(tl.pointer_type(tl.int32), bitcast=True) + pair
    k = tl.arange(0, DEPTH)[:, None]
    x += rows.to(tl.int64)[None, :] * K + k
    steps = spans // SPANS
    begin = split * steps // SPLIT
    end = (split + 1) * steps // SPLIT

    sums = tl.zeros((64 * TILES, TOKENS), tl.float32)
    for first in tl.range(begin, end, HELD, num_stages=STAGES):
        held, points, factors, values = (), (), (), ()
        for j in tl.static_range(HELD):
            i = first + j if EVEN else tl.minimum(first + j, end - 1)  # beyond the last: any, since x is 0 there
            group = i if GROUPED else 0
            held = held + (words_at(words, near + i * SIZE, SPANS, STEPS, POLICY),)
            if zeros is not None:
                points = points + (tl.load(zero_words + group * blocks * 32),)
            if GROUPED:
                factors = factors + (tl.load(scale_words + group * blocks * 32),)
        if HELD > 1:
            wait()
        for j in tl.static_range(HELD):
            i = first + j
            mask = present[None, :] if EVEN else present[None, :] & (i * DEPTH + k < tl.minimum(end * DEPTH, K))
            values = values + (tl.load(x + i * DEPTH, mask, 0.0),)
        # One wait for all of them: the compiler moves no load over a barrier, and no use of one before a branch, which
        # is always taken.
        if HELD > 1:
            tl.debug_barrier()
        if HELD == 1 or K > 0:
            for j in tl.static_range(HELD):
                low, high = _zeros(points[j] if zeros is not None else None, TILES)
                weight = integers(held[j], low, high, TILES, SPANS, STEPS, x.dtype.element_ty, MAGIC, ASM)
                if GROUPED:
                    scale = _scales(factors[j], TILES, scales.dtype.element_ty)
                    sums += tl.dot(weight, values[j], input_precision="ieee") * scale[:, None]
                else:
                    sums = tl.dot(weight, values[j], sums, input_precision="ieee")
    if not GROUPED:
        sums *= _scales(tl.load(scale_words), TILES, scales.dtype.element_ty)[:, None]
    return sums


@triton.jit
def _place(pairs, begins, ends, tile, TOKENS: tl.constexpr):
    """A tile's pairs [TOKENS], and which of them there are."""
    place = tl.load(begins + tile) + tl.arange(0, TOKENS)
    present = place < tl.load(ends + tile)
    return tl.load(pairs + place, present, 0), present


@jit(do_not_specialize=["k", "blocks", "spans", "groups"])
def _gate_up_kernel(
    x, pairs, experts, begins, ends, words, scales, zeros, out, k, N, K, blocks, spans, groups,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, TILES: tl.constexpr, SPANS: tl.constexpr, STEPS: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, HELD: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Program (rows, tile of pairs)."""
    wait()
    by_rows, tile = tl.program_id(0), tl.program_id(1)
    expert = tl.load(experts + tile)
    if expert < 0:
        return
    pair, present = _place(pairs, begins, ends, tile, TOKENS)
    sums = _sums(
        x, pair // k, present, words, scales, zeros, expert, by_rows, 0, K, blocks, spans, groups,
        GROUPED, EVEN, TILES, SPANS, STEPS, TOKENS, 1, STAGES, HELD, MAGIC, ASM,
    )  # fmt: skip
    gate, up = tl.split(sums.reshape(TILES, 4, 2, 8, TOKENS).trans(0, 1, 3, 4, 2))
    h = (gate / (1 + tl.exp(-gate)) * up).reshape(32 * TILES, TOKENS)
    n = by_rows * (32 * TILES) + tl.arange(0, 32 * TILES)
    at = out + pair.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, tl.trans(h).to(out.dtype.element_ty), present[:, None] & (n[None, :] < N))


@jit(do_not_specialize=["blocks", "spans", "groups"])
def _down_kernel(
    h, weights, pairs, experts, begins, ends, words, scales, zeros, out, N, K, blocks, spans, groups,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, TILES: tl.constexpr, SPANS: tl.constexpr, STEPS: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, HELD: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (split, rows, tile of pairs)."""
    # gate_up starts this kernel when the routes are there: before it waits it may ask for weights.
    if HELD == 1:
        wait()
    split, by_rows, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert = tl.load(experts + tile)
    if expert < 0:
        return
    pair, present = _place(pairs, begins, ends, tile, TOKENS)
    sums = _sums(
        h, pair, present, words, scales, zeros, expert, by_rows, split, K, blocks, spans, groups,
        GROUPED, EVEN, TILES, SPANS, STEPS, TOKENS, SPLIT, STAGES, HELD, MAGIC, ASM,
    )  # fmt: skip
    wait()  # has been, unless this split has no columns
    sums *= tl.load(weights + pair, present, 0.0)[None, :]
    n = by_rows * (64 * TILES) + tl.arange(0, 64 * TILES)
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
    config = config or choose(len(routes.experts), stack, routes.block)[0]
    if config.split > 1:
        raise ValueError("gate_up does not split K")
    out = x.new_empty(pairs, part.rows)
    arguments, constants, options = _launch(x, part, config, routes.block)
    if pairs:
        _gate_up_kernel[cdiv(2 * part.rows, config.rows), len(routes.experts)](
            x, *routes[:4], *arguments[:3], out, k, *arguments[3:], **constants, **options
        )
    return out


def down(
    h: torch.Tensor, weights: torch.Tensor, routes: Routes, stack: Int4Experts, config: Config | None = None
) -> torch.Tensor:
    """The weighted outputs of pairs: h BF16 [tokens · k, width], weights float32 [tokens, k] → float32
    [tokens, k · split, hidden], of which the sum over dim 1 is the experts' output. Routes are read while the kernel
    right before this one runs: it must not be the one that makes them, and is `gate_up`.

    Raises ValueError where shapes or dtypes don't fit.
    """
    part = stack.down
    tokens, k = weights.shape
    _check(h, "h", (tokens * k, part.columns), routes, tokens * k)
    _check_weights(weights)
    config = config or choose(len(routes.experts), stack, routes.block)[1]
    out = torch.empty((tokens, k * config.split, part.rows), device=h.device)
    arguments, constants, options = _launch(h, part, config, routes.block)
    if tokens:
        _down_kernel[config.split, cdiv(part.rows, config.rows), len(routes.experts)](
            h, weights, *routes[:4], *arguments[:3], out, *arguments[3:], **constants, SPLIT=config.split, **options
        )
    return out


def experts(x: torch.Tensor, weights: torch.Tensor, routes: Routes, stack: Int4Experts) -> torch.Tensor:
    """`down` of `gate_up`: between them in the order of `routes.pairs` where a kernel for many tokens takes both."""
    k = weights.shape[1]
    shares = int4_prefill.choose(x, routes, stack)
    if shares is None:
        return down(gate_up(x, routes, k, stack), weights, routes, stack)
    _check(x, "x", (len(weights), stack.gate_up.columns), routes, weights.numel())
    _check_weights(weights)
    h = int4_prefill.gate_up(x, routes, k, stack, shares[0])
    return int4_prefill.down(h, weights, routes, stack, shares[1])


def choose(tiles: int, stack: Int4Experts, block: int) -> tuple[Config, Config]:
    """The configurations of `gate_up` and `down` for so many tiles of `block` pairs: fitted on an H200, to 1 … 64
    tokens of DeepSeek-V2 and V2-Lite."""
    if block > 32:
        return Config(128, 1, 8, 3), Config(64, 1, 4, 3)
    programs = tiles * cdiv(2 * stack.gate_up.rows, ROWS)
    if programs > 5 * MULTIPROCESSORS:
        return Config(128, 1, 4, 4), Config(128, 1, 4, 4)
    few = tiles * cdiv(stack.down.rows, ROWS) <= 2 * MULTIPROCESSORS
    split = 2 if few and stack.down.columns > 128 else 1  # 128 columns may be one step
    held = 8 if programs <= 3 * MULTIPROCESSORS else 4
    return Config(64, 1, 4, 1, held), Config(64, split, 4, 1, 6 if stack.down.columns % 512 else 4)


def _check(x: torch.Tensor, name: str, shape: tuple[int, int], routes: Routes, pairs: int) -> None:
    dtypes = (torch.float16, torch.float32) if INTERPRETED else (torch.bfloat16, torch.float16)
    if x.dtype not in dtypes or x.shape != shape or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, of shape {shape} and one of {', '.join(map(str, dtypes))}")
    if len(routes.pairs) != pairs:
        raise ValueError(f"the routes are of {len(routes.pairs)} pairs, not {pairs}")


def _check_weights(weights: torch.Tensor) -> None:
    if weights.dtype != torch.float32 or not weights.is_contiguous():
        raise ValueError("weights must be contiguous float32")


def _launch(
    x: torch.Tensor, stack: Stack, config: Config, pairs: int
) -> tuple[list[torch.Tensor | int | None], dict[str, int], dict[str, bool | int]]:
    """A kernel's arguments, the constants that both have, and how it is launched."""
    _, blocks, spans, *_, steps = stack.words.shape
    groups = stack.scales.shape[1]
    block = depth(stack.columns // groups)
    shares = config.split * config.held if config.held > 1 else 1
    arguments: list[torch.Tensor | int | None] = [stack.words, stack.scales, stack.zeros, stack.rows, stack.columns]
    arguments += [blocks, spans, groups]
    constants = {
        "GROUPED": groups > 1, "EVEN": stack.columns % (shares * block) == 0, "TILES": config.rows // ROWS,
        "SPANS": block // (16 * steps), "STEPS": steps, "TOKENS": pairs, "STAGES": config.stages, "HELD": config.held,
        "MAGIC": MAGIC[x.dtype], "ASM": not INTERPRETED,
    }  # fmt: skip
    return arguments, constants, {"num_warps": config.warps, "enable_fp_fusion": True, "launch_pdl": PDL}
