"""GGUF weights of routed experts: each pair of a token and an expert it chose, times that expert's matrix.

The arithmetic and the layout are those of gguf_product.py; a program's tokens are a tile of `Routes`, of one expert.
"""

from __future__ import annotations

import torch
import triton.language as tl

from dsv2quant.kernels.gguf_gemm import Config, check_dtype, constants, partial_sums, product, split_of, strides
from dsv2quant.kernels.gguf_layout import DEPTH, ROWS, SPECS, GgufWeight
from dsv2quant.kernels.jit import cdiv, jit
from dsv2quant.kernels.launch import INTERPRETED, finish
from dsv2quant.kernels.routing import Routes


@jit(do_not_specialize=["blocks", "choices"])
def _experts_kernel(
    x, pairs, experts, begins, ends, weights, words, steps, multiples, lows, out, partial, arrivals,
    N, K, blocks, choices, matrix_words, matrix_steps, matrix_multiples,
    BITS: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, EVEN: tl.constexpr,
    TILES: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Program (split, rows, tile of pairs)."""
    HEIGHT: tl.constexpr = 64 * TILES
    split, by_rows, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert = tl.load(experts + tile).to(tl.int64)
    if expert < 0:
        return
    place = tl.load(begins + tile) + tl.arange(0, TOKENS)
    inside = place < tl.load(ends + tile)
    pair = tl.load(pairs + place, inside, 0)
    words += expert * matrix_words
    steps += expert * matrix_steps
    if multiples is not None:
        multiples += expert * matrix_multiples
    if lows is not None:
        lows += expert * matrix_multiples
    n = by_rows * HEIGHT + tl.arange(0, HEIGHT)
    spans = (K + 127) // 128
    sums = product(
        x, pair // choices, inside, words, steps, multiples, lows, by_rows * TILES + tl.arange(0, TILES)[:, None],
        blocks, n, N, K, split * spans // SPLIT, (split + 1) * spans // SPLIT,
        BITS, ZERO, GROUP, AFFINE, EVEN, TILES, TOKENS, STAGES, ASM,
    )  # fmt: skip
    factors = None
    if weights is not None:
        factors = tl.load(weights + pair, inside, 0.0)
    at = out + pair[:, None].to(tl.int64) * N + n[None, :]
    finish(
        sums, at, inside[:, None] & (n[None, :] < N), factors, partial, arrivals,
        tile * tl.num_programs(1) + by_rows, split, HEIGHT, TOKENS, SPLIT,
    )  # fmt: skip


def experts_product(
    x: torch.Tensor,
    routes: Routes,
    choices: int,
    stack: GgufWeight,
    weights: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """Row p // choices of x [rows, K], BF16, @ (the expert of pair p)ᵀ, for all pairs p: [pairs, N] in x's dtype, or
    with `weights`, float32 of as many values as there are pairs, times these in float32.

    `choices` is 1 where x has a row of its own for each pair. Raises ValueError where shapes or dtypes don't fit.
    """
    (rows, columns), pairs = x.shape, len(routes.pairs)
    if columns != stack.columns:
        raise ValueError(f"x has {columns} columns; the stack has {stack.columns}")
    if stack.words.ndim != 6:
        raise ValueError("the weight is one matrix: need a stack")
    if rows * choices != pairs:
        raise ValueError(f"{rows} rows of x with {choices} choices each are not {pairs} pairs")
    if weights is not None and (weights.dtype != torch.float32 or weights.numel() != pairs):
        raise ValueError(f"{weights.numel()} weights of {weights.dtype} for {pairs} pairs; need float32")
    check_dtype(x.dtype)
    config = config or choose(len(routes.experts), routes.block, stack)
    out = torch.empty(pairs, stack.rows, dtype=x.dtype if weights is None else torch.float32, device=x.device)
    grid = (config.split, cdiv(stack.rows, config.rows), len(routes.experts))
    if pairs:
        _experts_kernel[grid](
            x.contiguous(), routes.pairs, routes.experts, routes.begins, routes.ends,
            None if weights is None else weights.contiguous(),
            stack.words, stack.steps, stack.multiples, stack.lows, out,
            partial_sums(stack, grid, config), stack.arrivals, stack.rows, columns, stack.words.shape[1], choices,
            *strides(stack), *constants(SPECS[stack.type]), columns % DEPTH == 0, config.rows // ROWS, config.tokens,
            config.split, config.stages, not INTERPRETED, num_warps=config.warps,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def choose(tiles: int, block: int, stack: GgufWeight) -> Config:
    """The configuration for so many tiles of pairs: K is split only where the stack has a counter for each."""
    programs = cdiv(stack.rows, ROWS) * tiles
    split = split_of(programs, stack.columns, block) if programs <= stack.arrivals.numel() else 1
    return Config(ROWS, block, split, 4 if block <= 64 else 8, 3)
