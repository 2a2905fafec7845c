"""x [M, K] times an INT4 weight in the runtime layout (int4_layout.py), transposed: `linear`.

Few tokens: the weight's rows are the MMA's M side (64 of them, where M tokens would fill few), and words become BF16
in the registers the MMA reads. Codes less their zero are exact integers; a group's scale multiplies its partial sum.
Where rows alone make too few programs, K is split: each program leaves its sums in float32, and the last to arrive
adds them in order, so that the result does not depend on which that is. It counts in `Int4Weight.arrivals`, which
therefore serves one call at a time. At most 16 tokens or so, and not too large a weight: int4_held.py.

Many tokens: the weight is dequantized into BF16, and the product is the vendor's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from dsv2quant.kernels import int4_held, launch
from dsv2quant.kernels.int4_held import MAGIC, Held, held_kernel, operand, zero_points
from dsv2quant.kernels.int4_layout import ROWS, Int4Weight, depth
from dsv2quant.kernels.jit import cdiv, jit
from dsv2quant.kernels.launch import INTERPRETED, MULTIPROCESSORS, PDL, finish, output, wait

HELD_WEIGHTS = 40_000_000  # of larger ones, loads that run ahead keep more under way


class Config(NamedTuple):
    rows: int  # of the weight, per program
    tokens: int
    split: int  # programs along K
    warps: int
    stages: int


@jit(do_not_specialize=["M", "blocks", "spans"])
def _gemm_kernel(
    x, words, scales, zeros, out, partial, arrivals, M, N, K, blocks, spans,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, TILES: tl.constexpr, SPANS: tl.constexpr, STEPS: tl.constexpr,
    TOKENS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Program (split, rows, tokens). spans: of a block row, padded; blocks: of 64 rows."""
    ROWS: tl.constexpr = 64 * TILES
    DEPTH: tl.constexpr = 16 * STEPS * SPANS
    split, by_rows, by_tokens = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = by_rows * TILES + tl.arange(0, TILES)[:, None]
    first = tl.minimum(tiles, blocks - 1)[:, :, None] * spans  # beyond the last rows: any, since they aren't stored
    n = by_rows * ROWS + tl.arange(0, ROWS)
    m = by_tokens * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, DEPTH)
    steps = spans // SPANS
    begin = split * steps // SPLIT
    end = (split + 1) * steps // SPLIT
    wait()

    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for i in tl.range(begin, end, num_stages=STAGES):
        mask = m[None, :] < M if EVEN else (m[None, :] < M) & (i * DEPTH + k[:, None] < K)
        tokens = tl.load(x + m[None, :] * K + (i * DEPTH + k[:, None]), mask, 0.0)
        group = i if GROUPED else 0
        low, high = zero_points(zeros, group, tiles, N)
        weight = operand(
            words, low, high, (first + i * SPANS) * (128 * STEPS), TILES, SPANS, STEPS, x.dtype.element_ty, MAGIC, ASM
        )
        if GROUPED:
            scale = tl.load(scales + i * N + n, n < N, 0.0)
            sums += tl.dot(weight, tokens, input_precision="ieee") * scale[:, None]
        else:
            sums = tl.dot(weight, tokens, sums, input_precision="ieee")
    if not GROUPED:
        sums *= tl.load(scales + n, n < N, 0.0)[:, None]

    at = out + m[:, None] * N + n[None, :]
    stored = (m[:, None] < M) & (n[None, :] < N)
    tile = by_tokens * tl.num_programs(1) + by_rows
    finish(sums, at, stored, None, partial, arrivals, tile, split, ROWS, TOKENS, SPLIT)


@jit(do_not_specialize=["blocks", "spans"])
def _dequantize_kernel(
    words, scales, zeros, out, N, K, blocks, spans,
    GROUPED: tl.constexpr, TILES: tl.constexpr, SPANS: tl.constexpr, STEPS: tl.constexpr,
    DTYPE: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Program (columns, rows)."""
    ROWS: tl.constexpr = 64 * TILES
    DEPTH: tl.constexpr = 16 * STEPS * SPANS
    i, by_rows = tl.program_id(0), tl.program_id(1)
    tiles = by_rows * TILES + tl.arange(0, TILES)[:, None]
    first = tl.minimum(tiles, blocks - 1)[:, :, None] * spans
    n = by_rows * ROWS + tl.arange(0, ROWS)
    k = i * DEPTH + tl.arange(0, DEPTH)
    group = i if GROUPED else 0
    low, high = zero_points(zeros, group, tiles, N)
    weight = operand(words, low, high, (first + i * SPANS) * (128 * STEPS), TILES, SPANS, STEPS, DTYPE, MAGIC, ASM)
    scale = tl.load(scales + group * N + n, n < N, 0.0)
    values = (weight.to(tl.float32) * scale[:, None]).to(DTYPE)
    tl.store(out + n[:, None].to(tl.int64) * K + k[None, :], values, (n[:, None] < N) & (k[None, :] < K))


Share = Config | Held
KINDS = {"gemm": Config, "held": Held}  # in tables


def linear(
    x: torch.Tensor, weight: Int4Weight, out: torch.Tensor | None = None, config: Share | None = None
) -> torch.Tensor:
    """x [M, K] @ weight [N, K]ᵀ in x's dtype, BF16 or float16: [M, N], in `out` if given.

    Few tokens (`choose`) or with a config by one kernel, more by `dequantize` and the vendor's product.
    Raises ValueError where shapes or dtypes don't fit.
    """
    tokens, columns = x.shape
    if columns != weight.columns:
        raise ValueError(f"x has {columns} columns; the weight has {weight.columns}")
    _check(x.dtype)
    out = output(x, weight.rows, out)
    x = x[:, weight.order] if weight.order is not None else x.contiguous()
    config = config or choose(tokens, weight.rows, columns)
    if config is None:
        return torch.mm(x, _dequantized(weight, x.dtype).T, out=out)
    _gemm(x, weight, out, config)
    return out


def dequantize(weight: Int4Weight, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[rows, columns] in `dtype`: (code − zero) × scale in float32, rounded once, columns where the input has them."""
    _check(dtype)
    out = _dequantized(weight, dtype)
    return out if weight.order is None else out[:, torch.argsort(weight.order)]


def choose(tokens: int, rows: int, columns: int) -> Share | None:
    """The configuration for a shape, by this device's table or by `rule`; None: dequantize."""
    tabulated = launch.lookup("int4_gemm", rows, columns, tokens)
    if tabulated:
        return KINDS[tabulated[0]](*tabulated[1:]) if tabulated[0] in KINDS else None
    return rule(tokens, rows, columns)


def rule(tokens: int, rows: int, columns: int) -> Share | None:
    """Fitted to sweeps on an H200 with 1, 16, 64 and 256 tokens; between these, a guess."""
    if tokens <= int4_held.TOKENS and rows * columns < HELD_WEIGHTS:
        return int4_held.rule(rows, columns)
    tall = rows >= 8192
    if tokens > (256 if tall else 128):
        return None
    if tokens <= 32:  # bound by memory
        high, wide, warps, stages = 128 if tall and columns >= 4096 else 64, 16 if tokens <= 16 else 32, 4, 4
    elif tall and (tokens > 64 or columns <= 512):
        high, wide, warps, stages = 128, 64, 8, 3
    else:
        high, wide, warps, stages = 64, 64, 4, 3
    programs = cdiv(rows, high) * cdiv(tokens, wide)
    split = 1
    while split < 16 and programs * split < _enough(tokens, columns // (2 * split)):
        split *= 2
    return Config(high, wide, split, warps, stages)


def _enough(tokens: int, columns: int) -> float:
    """Programs with which K is split no further into parts of so many columns: the shorter these are, the more of the
    time goes into adding them."""
    if columns < 384:
        return 0
    return MULTIPROCESSORS * (2.5 if tokens <= 32 else 2 if columns >= 1024 else 1)


def _check(dtype: torch.dtype) -> None:
    allowed = (torch.float16, torch.float32) if INTERPRETED else (torch.float16, torch.bfloat16)
    if dtype not in allowed:
        raise ValueError(f"{dtype} is none of {', '.join(map(str, allowed))}")


def _shape(weight: Int4Weight) -> tuple[int, int, int]:
    """Blocks of rows, spans in a row, and 16-column steps in a span."""
    blocks, spans, *_, steps = weight.words.shape
    return blocks, spans, steps


def _gemm(x: torch.Tensor, weight: Int4Weight, out: torch.Tensor, share: Share) -> None:
    tokens, columns = x.shape
    blocks, spans, steps = _shape(weight)
    block = depth(weight.group)
    per_step = block // (16 * steps)
    tiles = share.rows // ROWS
    grid = (share.split, cdiv(blocks, tiles), cdiv(tokens, share.tokens))
    partial = None
    if share.split > 1:
        if grid[1] * grid[2] > len(weight.arrivals):
            raise ValueError(f"{tokens} tokens are too many for a split of K")
        partial = torch.empty(grid[0] * grid[1] * grid[2] * share.rows * share.tokens, device=x.device)
    operands = (
        x, weight.words, weight.scales, weight.zeros, out, partial, weight.arrivals, tokens, weight.rows, columns,
    )  # fmt: skip
    constants = {
        "GROUPED": len(weight.scales) > 1, "SPANS": per_step, "STEPS": steps, "TOKENS": share.tokens,
        "SPLIT": share.split, "MAGIC": MAGIC[x.dtype], "ASM": not INTERPRETED,
    }  # fmt: skip
    if isinstance(share, Held):
        part, held = int4_held.steps_of(share, columns, block)
        held_kernel[grid](
            *operands, spans, **constants, EVEN=columns == share.split * part * block and part % held == 0,
            PART=part, HELD=held, num_warps=4, num_stages=1, enable_fp_fusion=True, launch_pdl=PDL,
        )  # fmt: skip
    else:
        _gemm_kernel[grid](
            *operands, blocks, spans, **constants, EVEN=columns % block == 0, TILES=tiles, STAGES=share.stages,
            num_warps=share.warps, enable_fp_fusion=True, launch_pdl=PDL,
        )  # fmt: skip


def _dequantized(weight: Int4Weight, dtype: torch.dtype) -> torch.Tensor:
    """As `dequantize`, in the weight's own order of columns."""
    blocks, spans, steps = _shape(weight)
    block = depth(weight.group)
    per_program = block // (16 * steps)
    out = torch.empty(weight.rows, weight.columns, dtype=dtype, device=weight.words.device)
    kind = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
    _dequantize_kernel[(spans // per_program, blocks)](
        weight.words, weight.scales, weight.zeros, out, weight.rows, weight.columns, blocks, spans,
        len(weight.scales) > 1, 1, per_program, steps, kind, MAGIC[dtype], not INTERPRETED,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out
