"""int4_gemm's product for few tokens: a program asks for all it can hold before it computes.

The time is that of reading the weight, and of what stands around it: a launch, one wait for memory, one sum. So the
words of several steps are under way at once, the first of them while the kernel before this one still runs.

INT4 weights in the runtime layout (int4_layout.py) on their way to the matrix units: what kernels share.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv2quant.kernels.int4_layout import ROWS
from dsv2quant.kernels.jit import cdiv, jit
from dsv2quant.kernels.launch import MULTIPROCESSORS, finish, wait

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
    steps = cdiv(columns, 128)
    split = max(1, min(4 * MULTIPROCESSORS // cdiv(rows, ROWS), steps // 4))
    part = cdiv(steps, split)
    return Held(split, cdiv(part, cdiv(part, 6)))


def steps_of(share: Held, columns: int, block: int) -> tuple[int, int]:
    """The most steps of `block` columns that a part of all columns has, and how many of them are held."""
    part = cdiv(cdiv(columns, block), share.split)
    return part, cdiv(part, cdiv(part, min(share.held * 128 // block, MOST)))


@jit(do_not_specialize=["M", "spans"])
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


# A 16-bit float whose lowest mantissa bits are an integer's: 128 + u in BF16, 1024 + u in float16.
MAGIC = {torch.bfloat16: 0x43004300, torch.float16: 0x64006400, torch.float32: 0}


def _assembly(kind: str, magic: int) -> str:
    """Words $8 and zeros $9 (of rows h = 0) and $10 → four registers of two values, 16 bits each of $0 … $7."""
    lines = [".reg .b32 a<4>, b<3>;"]
    lines += [f"shr.u32 b{i}, $8, {4 * i + 4};" for i in range(3)]
    for i, source in enumerate(("$8", "b0", "b1", "b2")):
        lines.append(f"lop3.b32 a{i}, {source}, 0x000f000f, {magic:#x}, 0xea;")
        lines.append(f"sub.{kind}x2 a{i}, a{i}, ${9 + i % 2};")
        lines.append(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, a{i};")
    return "{\n" + "\n".join(lines) + "\n}"


_BF16: tl.constexpr = tl.constexpr(_assembly("bf16", MAGIC[torch.bfloat16]))
_F16: tl.constexpr = tl.constexpr(_assembly("f16", MAGIC[torch.float16]))


@triton.jit
def codes(words, low, high, DTYPE: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr):
    """words [...] → code − zero as DTYPE [..., p, c, h], with the zeros `low` of h = 0 and `high` of h = 1.

    ASM takes zeros as pairs of MAGIC + zero; without it they are integers.
    """
    if ASM:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            _F16 if DTYPE.is_fp16() else _BF16,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r",
            [words, low, high],
            (tl.int16,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        a, b = (words & 15) - low, (words >> 16 & 15) - low
        c, d = (words >> 4 & 15) - high, (words >> 20 & 15) - high
        e, f = (words >> 8 & 15) - low, (words >> 24 & 15) - low
        g, h = (words >> 12 & 15) - high, (words >> 28 & 15) - high
    joined = tl.join(tl.join(tl.join(a, b), tl.join(e, f)), tl.join(tl.join(c, d), tl.join(g, h)))
    return joined.to(DTYPE, bitcast=True) if ASM else joined.to(DTYPE)


@triton.jit
def zero_points(zeros, group, tiles, N):
    """Zeros of rows h = 0 and h = 1 of the blocks `tiles` [TILES, 1], int32 [TILES, 32] each: by warp and r, since
    threads of the same q have the same rows."""
    if zeros is None:
        low = tl.full((tiles.shape[0], 32), 8, tl.int32)
        high = low
    else:
        thread = tl.arange(0, 32)
        row = tiles * 64 + (thread // 8 * 16 + thread % 8)[None, :]
        at = zeros + group * N + row
        low, high = tl.load(at, row < N, 8), tl.load(at + 8, row + 8 < N, 8)
    return low, high


@triton.jit
def words_at(words, block, SPANS: tl.constexpr, STEPS: tl.constexpr, POLICY: tl.constexpr):
    """[TILES, SPANS, 128 · STEPS] words, from offsets `block` [TILES, 1, 1] on."""
    LANES: tl.constexpr = 128 * STEPS
    return tl.load(
        words + block + tl.arange(0, SPANS)[None, :, None] * LANES + tl.arange(0, LANES), eviction_policy=POLICY
    )


@triton.jit
def integers(
    loaded, low, high, TILES: tl.constexpr, SPANS: tl.constexpr, STEPS: tl.constexpr,
    DTYPE: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Those of `words_at` as the operand [64 · TILES, 16 · STEPS · SPANS]: codes less zeros."""
    SHAPE: tl.constexpr = (TILES, SPANS, 128 * STEPS)
    if ASM:
        low, high = low * 0x10001 + MAGIC, high * 0x10001 + MAGIC
    low = tl.broadcast_to(low[:, None, :, None], (TILES, SPANS, 32, 4 * STEPS)).reshape(SHAPE)
    high = tl.broadcast_to(high[:, None, :, None], (TILES, SPANS, 32, 4 * STEPS)).reshape(SHAPE)
    values = codes(loaded, low, high, DTYPE, MAGIC, ASM)
    values = values.reshape(TILES, SPANS, 4, 8, 4, STEPS, 2, 2, 2)  # block, span, warp, r, q, step, p, c, h
    return values.trans(0, 2, 8, 3, 1, 5, 7, 4, 6).reshape(64 * TILES, 16 * STEPS * SPANS)


@triton.jit
def operand(
    words, low, high, block,
    TILES: tl.constexpr, SPANS: tl.constexpr, STEPS: tl.constexpr,
    DTYPE: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The weight's integers [64 · TILES, 16 · STEPS · SPANS] at offsets `block` [TILES, 1, 1] of `words`."""
    return integers(words_at(words, block, SPANS, STEPS, ""), low, high, TILES, SPANS, STEPS, DTYPE, MAGIC, ASM)
