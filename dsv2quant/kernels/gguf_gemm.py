"""x [M, K] times a GGUF weight in the runtime layout (gguf_layout.py), transposed: `linear`.

Few tokens: by gguf_product.py, straight from the words. K may be split, as in int4_gemm.py; programs count themselves
in `GgufWeight.arrivals`, which therefore serves one call at a time.

Many tokens: the weight is dequantized into BF16, and the product is the vendor's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv2quant.kernels.checks import INTERPRETED, MULTIPROCESSORS, output
from dsv2quant.kernels.gguf_layout import DEPTH, ROWS, SPECS, GgufWeight, Spec
from dsv2quant.kernels.gguf_product import codes_of, load_scale, load_steps, load_words, operand, product
from dsv2quant.kernels.splits import finish

MANY = 128  # tokens, from which on the weight is dequantized


class Config(NamedTuple):
    rows: int  # of the weight, per program
    tokens: int
    split: int  # programs along K
    warps: int
    stages: int


@triton.jit(do_not_specialize=["M", "blocks"])
def _gemm_kernel(
    x, words, steps, multiples, lows, out, partial, arrivals, M, N, K, blocks,
    BITS: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, EVEN: tl.constexpr,
    TILES: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Program (split, rows, tokens)."""
    HEIGHT: tl.constexpr = 64 * TILES
    split, by_rows, by_tokens = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = by_rows * HEIGHT + tl.arange(0, HEIGHT)
    m = by_tokens * TOKENS + tl.arange(0, TOKENS)
    spans = (K + 127) // 128
    sums = product(
        x, m, m < M, words, steps, multiples, lows, by_rows * TILES + tl.arange(0, TILES)[:, None], blocks, n, N, K,
        split * spans // SPLIT, (split + 1) * spans // SPLIT,
        BITS, ZERO, GROUP, AFFINE, EVEN, TILES, TOKENS, STAGES, ASM,
    )  # fmt: skip
    at = out + m[:, None].to(tl.int64) * N + n[None, :]
    finish(
        sums, at, (m[:, None] < M) & (n[None, :] < N), None, partial, arrivals,
        by_tokens * tl.num_programs(1) + by_rows, split, HEIGHT, TOKENS, SPLIT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["blocks"])
def _dequantize_kernel(
    words, steps, multiples, lows, out, N, K, blocks, matrix_words, matrix_steps, matrix_multiples,
    BITS: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr,
    DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Program (128 columns, 64 rows, matrix)."""
    PLANES: tl.constexpr = 4 if BITS == 8 else BITS // 2
    CODE: tl.constexpr = tl.bfloat16 if ASM else tl.float32
    i, block, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    words += matrix * matrix_words
    steps += matrix * matrix_steps
    if multiples is not None:
        multiples += matrix * matrix_multiples
    if lows is not None:
        lows += matrix * matrix_multiples
    first = tl.full((1, 1), block, tl.int64) * tl.num_programs(0) * (PLANES * 512)
    n = block * 64 + tl.arange(0, 64)
    to = out + (matrix * N + n[:, None]) * K + tl.arange(0, GROUP)[None, :]
    loaded = load_words(words, first + i * (PLANES * 512), PLANES, 1)
    for unit in tl.static_range(4):
        codes = codes_of(loaded[unit], BITS, ZERO, ASM)
        step, low = load_steps(steps, i, n, N, multiples is not None, AFFINE, unit)
        for part in tl.static_range(32 // GROUP):
            at = i * 128 + unit * 32 + part * GROUP
            scale, offset = load_scale(
                step, low, multiples, lows, i, n, N, AFFINE, 128 // GROUP, unit * (32 // GROUP) + part
            )
            values = operand(codes, GROUP, part, False, 1, CODE).to(tl.float32) * scale[:, None]
            if AFFINE:
                values += offset[:, None]
            mask = (n[:, None] < N) & (at + tl.arange(0, GROUP)[None, :] < K)
            tl.store(to + at, values.to(DTYPE), mask)


def linear(
    x: torch.Tensor, weight: GgufWeight, out: torch.Tensor | None = None, config: Config | None = None
) -> torch.Tensor:
    """x [M, K] @ weight [N, K]ᵀ in x's dtype, BF16: [M, N], in `out` if given.

    Few tokens (`choose`) or with a config by one kernel, more by `dequantize` and the vendor's product.
    Raises ValueError where shapes or dtypes don't fit.
    """
    tokens, columns = x.shape
    if columns != weight.columns:
        raise ValueError(f"x has {columns} columns; the weight has {weight.columns}")
    if weight.words.ndim != 5:
        raise ValueError("the weight is a stack: need one matrix")
    check_dtype(x.dtype)
    out = output(x, weight.rows, out)
    config = config or choose(tokens, weight.rows, columns, SPECS[weight.type].group)
    if config is None:
        return torch.mm(x, dequantize(weight, x.dtype).T, out=out)
    grid = (config.split, triton.cdiv(weight.rows, config.rows), triton.cdiv(tokens, config.tokens))
    if tokens:
        _gemm_kernel[grid](
            x.contiguous(), weight.words, weight.steps, weight.multiples, weight.lows, out,
            partial_sums(weight, grid, config), weight.arrivals, tokens, weight.rows, columns, weight.words.shape[0],
            *constants(SPECS[weight.type]), columns % DEPTH == 0, config.rows // ROWS, config.tokens, config.split,
            config.stages, not INTERPRETED, num_warps=config.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def dequantize(weight: GgufWeight, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[rows, columns] in `dtype`, with the matrices of a stack before: ggml's float32 value, rounded once.

    Raises ValueError where the dtype is none of float32, BF16 and float16.
    """
    kinds = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    if dtype not in kinds:
        raise ValueError(f"{dtype} is none of {', '.join(map(str, kinds))}")
    *stack, blocks, spans, _, _, _ = weight.words.shape
    out = torch.empty(*stack, weight.rows, weight.columns, dtype=dtype, device=weight.words.device)
    matrices = stack[0] if stack else 1
    _dequantize_kernel[(spans, blocks, matrices)](
        weight.words, weight.steps, weight.multiples, weight.lows, out, weight.rows, weight.columns, blocks,
        *strides(weight), *constants(SPECS[weight.type]), kinds[dtype], not INTERPRETED,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def choose(tokens: int, rows: int, columns: int, group: int) -> Config | None:
    """The configuration for a shape; None: dequantize."""
    if tokens > MANY:
        return None
    wide = 32 if tokens <= 32 or rows <= 2048 else 64  # few rows need the more programs
    if tokens <= 16:
        wide = 8 if tokens <= 8 and group == 32 else 16
    programs = triton.cdiv(rows, ROWS) * triton.cdiv(tokens, wide)
    return Config(ROWS, wide, split_of(programs, columns, wide), 4, 3)


def split_of(programs: int, columns: int, tokens: int) -> int:
    """Parts of K with which there are enough programs, each of so many tokens, unless parts get short: with few tokens
    a program only waits for memory."""
    enough = MULTIPROCESSORS * 5 // 2 if tokens <= 16 else MULTIPROCESSORS * 2
    split = 1
    while split < 16 and programs * split < enough and columns >= 2 * split * 384:
        split *= 2
    return split


def partial_sums(weight: GgufWeight, grid: tuple[int, int, int], config: Config) -> torch.Tensor | None:
    """Room for the sums of programs, of a grid whose K is split. Raises ValueError where there are too few counters."""
    if config.split == 1:
        return None
    if grid[1] * grid[2] > weight.arrivals.numel():
        raise ValueError(f"{grid[1] * grid[2]} tiles are too many for a split of K")
    return torch.empty(grid[0] * grid[1] * grid[2] * config.rows * config.tokens, device=weight.words.device)


def check_dtype(dtype: torch.dtype) -> None:
    """Raises ValueError where x can't be of this dtype."""
    allowed = (torch.float16, torch.float32) if INTERPRETED else (torch.bfloat16,)
    if dtype not in allowed:
        raise ValueError(f"{dtype} is none of {', '.join(map(str, allowed))}")


def constants(spec: Spec) -> tuple[int, int, int, bool]:
    """BITS, ZERO, GROUP and AFFINE of the kernels."""
    return spec.bits, spec.zero, spec.group, spec.affine


def strides(weight: GgufWeight) -> tuple[int, int, int]:
    """Words from one matrix of a stack to the next in `words`, `steps`, and `multiples` and `lows`."""
    few = weight.multiples
    return weight.words[0].numel(), weight.steps[0].numel(), 0 if few is None else few[0].numel()
