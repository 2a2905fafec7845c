"""x [M, K] times a GGUF weight in the runtime layout (gguf_layout.py), transposed: `linear`.

Few tokens: by gguf_product.py, straight from the words. K may be split, as in int4_gemm.py; programs count themselves
in `GgufWeight.arrivals`, which therefore serves one call at a time.

Many tokens: the weight is dequantized into BF16, and the product is the vendor's.

What the kernels for GGUF weights share, of programs of 64 · TILES of a weight's rows: codes as the MMA takes them,
scales, and a program's sums.

The weight's rows are the MMA's M side, and words become BF16 in the registers the MMA reads. Codes less their zero are
exact integers; a group's scale multiplies its partial sum in float32. An offset takes the group's sum of x, which the
MMA makes too, of ones for a weight: so it lies as the partial sums do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv2quant.formats.gguf.layouts import Spec
from dsv2quant.kernels.gguf_layout import DEPTH, ROWS, SPECS, GgufWeight, held_bits
from dsv2quant.kernels.jit import cdiv, jit
from dsv2quant.kernels.launch import INTERPRETED, MULTIPROCESSORS, finish, output

MANY = 128  # tokens, from which on the weight is dequantized


class Config(NamedTuple):
    rows: int  # of the weight, per program
    tokens: int
    split: int  # programs along K
    warps: int
    stages: int


@jit(do_not_specialize=["M", "blocks"])
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


@jit(do_not_specialize=["blocks"])
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
    grid = (config.split, cdiv(weight.rows, config.rows), cdiv(tokens, config.tokens))
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
    programs = cdiv(rows, ROWS) * cdiv(tokens, wide)
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
    return held_bits(spec), spec.zero, spec.group, spec.affine


def strides(weight: GgufWeight) -> tuple[int, int, int]:
    """Words from one matrix of a stack to the next in `words`, `steps`, and `multiples` and `lows`."""
    few = weight.multiples
    return weight.words[0].numel(), weight.steps[0].numel(), 0 if few is None else few[0].numel()


NARROW: tl.constexpr = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9))


@triton.constexpr_function
def _assembly(bits: int, zero: int) -> str:
    """The words of 32 columns → 16 registers of two BF16, (step, c, h) by p: codes less `zero`.

    0x4300 is 128 in BF16, whose last mantissa bit is then 1, so that codes of up to 7 bits are put there; if `zero` is
    −128, nothing is left to do. A byte's sign is 128 to subtract, in the bit that makes 0x4300 256.
    """
    planes = {4: 2, 6: 3, 8: 4}[bits]
    words = [f"${16 + i}" for i in range(planes)]
    lines = [".reg .b32 a, b, s;"]
    for step in range(2):
        for i in range(4):  # 2c + h
            out = 2 * (4 * step + i)
            if bits == 8:
                lines += [
                    f"shr.u32 s, {words[2 * step + i // 2]}, {8 * (i % 2)};",
                    "lop3.b32 a, s, 0x007f007f, 0x43004300, 0xea;",
                    "lop3.b32 b, s, 0x00800080, 0x43004300, 0xea;",
                    "sub.bf16x2 a, a, b;",
                ]
            else:
                lines += [f"shr.u32 s, {words[step]}, {4 * i};", "lop3.b32 a, s, 0x000f000f, 0x43004300, 0xea;"]
                if bits == 6:
                    shift = 2 * (4 * step + i) - 4
                    lines += [
                        f"{'shr.u32' if shift > 0 else 'shl.b32'} s, {words[2]}, {abs(shift)};",
                        "lop3.b32 a, s, 0x00300030, a, 0xea;",
                    ]
                if zero > -128:
                    lines += [f"mov.b32 b, {(0x4300 + zero) * 0x10001:#x};", "sub.bf16x2 a, a, b;"]
            lines.append(f"mov.b32 {{${out}, ${out + 1}}}, a;")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.jit
def codes_of(words, BITS: tl.constexpr, ZERO: tl.constexpr, ASM: tl.constexpr):
    """A tuple of the words of 32 columns → codes − zero: 16 tensors like a word, (step, c, h, p). ASM makes bits of
    BF16 of them, without it they are integers."""
    if ASM:
        codes = tl.inline_asm_elementwise(
            _assembly(BITS, ZERO),
            "=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h" + ",r" * (4 if BITS == 8 else BITS // 2),
            words,
            (tl.int16,) * 16,
            is_pure=True,
            pack=1,
        )
    else:
        codes = ()
        for i in tl.static_range(16):
            STEP: tl.constexpr = i // 8
            FIELD: tl.constexpr = i // 2 % 4  # 2c + h
            P: tl.constexpr = i % 2
            if BITS == 8:
                code = words[2 * STEP + FIELD // 2] << (24 - 16 * P - 8 * (FIELD % 2)) >> 24
            else:
                code = words[STEP] >> (16 * P + 4 * FIELD) & 15
                if BITS == 6:
                    code += (words[2] >> (16 * P + 8 * STEP + 2 * FIELD) & 3) << 4
            codes = codes + (code - ZERO,)
    return codes


@triton.jit
def _pairs(codes, FIRST: tl.constexpr):
    """8 of the codes → [..., p, c, h]."""
    h0 = tl.join(tl.join(codes[FIRST], codes[FIRST + 1]), tl.join(codes[FIRST + 4], codes[FIRST + 5]))
    h1 = tl.join(tl.join(codes[FIRST + 2], codes[FIRST + 3]), tl.join(codes[FIRST + 6], codes[FIRST + 7]))
    return tl.join(h0, h1)


@triton.jit
def operand(
    codes, GROUP: tl.constexpr, STEP: tl.constexpr, ORDERED: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr
):
    """codes of words [TILES, 128] → [64 · TILES, GROUP]: both steps, or the one asked for. ORDERED: its columns are
    as in `narrow_columns`."""
    if GROUP == 32:
        values = tl.join(_pairs(codes, 0), _pairs(codes, 8)).reshape(TILES, 4, 8, 4, 2, 2, 2, 2)  # …, p, c, h, s
        values = values.trans(0, 1, 6, 2, 7, 3, 5, 4) if ORDERED else values.trans(0, 1, 6, 2, 7, 5, 3, 4)
    else:
        values = _pairs(codes, 8 * STEP).reshape(TILES, 4, 8, 4, 2, 2, 2).trans(0, 1, 6, 2, 5, 3, 4)
    values = values.reshape(64 * TILES, GROUP)
    return values.to(DTYPE, bitcast=True) if values.dtype == tl.int16 else values.to(DTYPE)


@triton.jit
def narrow_columns():
    """Those of a group of 32 in the order in which each thread has four neighbours of each 16. Before 3.9, Triton makes
    no `wgmma` for 8 tokens, and takes what was joined for bytes: the kWidth of its dot operand is 4."""
    column = tl.arange(0, 32)
    column = (column & 16) + (column >> 1 & 1) * 8 + (column >> 2 & 3) * 2 + (column & 1)
    return tl.max_contiguous(tl.multiple_of(column, 2), 2)


@triton.jit
def _half(word, HIGH: tl.constexpr):
    """One of a word's two float16, in float32."""
    return (word >> (16 * HIGH)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _multiple(word, BYTE: tl.constexpr):
    """A byte less 128, in float32: put into the mantissa of 2^23."""
    return (word >> (8 * BYTE) & 255 | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def load_words(words, first, PLANES: tl.constexpr, TILES: tl.constexpr):
    """The words of 128 columns, which begin at first [TILES, 1]: of each 32, a tuple of [TILES, 128] for each plane."""
    w0 = ()
    w1 = ()
    w2 = ()
    w3 = ()
    for plane in tl.static_range(PLANES):
        loaded = tl.load(words + first + (plane * 512 + tl.arange(0, 512))[None, :])
        even, odd = tl.split(loaded.reshape(TILES, 128, 2, 2))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        w0 = w0 + (a,)
        w1 = w1 + (b,)
        w2 = w2 + (c,)
        w3 = w3 + (d,)
    return w0, w1, w2, w3


@triton.jit
def load_steps(steps, i, n, N, SUPER: tl.constexpr, AFFINE: tl.constexpr, UNIT: tl.constexpr):
    """float32 step and, if AFFINE, that of offsets, of rows n and 32 columns of the i-th 128."""
    if SUPER:
        word = tl.load(steps + (i // 2) * N + n, n < N, 0)
    elif AFFINE:
        word = tl.load(steps + (i * 4 + UNIT) * N + n, n < N, 0)
    else:
        word = tl.load(steps + (i * 2 + UNIT // 2) * N + n, n < N, 0)
    return _half(word, 0 if SUPER or AFFINE else UNIT % 2), _half(word, 1)


@triton.jit
def load_scale(step, low, multiples, lows, i, n, N, AFFINE: tl.constexpr, GROUPS: tl.constexpr, AT: tl.constexpr):
    """float32 scale and, if AFFINE, offset, of rows n and group AT of GROUPS in the i-th 128 columns."""
    if multiples is not None:
        step *= _multiple(tl.load(multiples + (i * (GROUPS // 4) + AT // 4) * N + n, n < N, 0), AT % 4)
        if AFFINE:
            low *= _multiple(tl.load(lows + (i * (GROUPS // 4) + AT // 4) * N + n, n < N, 0), AT % 4)
            low *= -1.0  # before 3.9, Triton's −low is 0 − low, which has no −0
    return step, low


@triton.jit
def product(
    x, place, inside, words, steps, multiples, lows, tiles, blocks, n, N, K, begin, end,
    BITS: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, EVEN: tl.constexpr,
    TILES: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """float32 [64 · TILES, TOKENS]: rows n, in the blocks `tiles` [TILES, 1] of `blocks`, by the rows `place` [TOKENS]
    of x that are `inside`, over the columns 128 · begin … 128 · end. EVEN: K is a multiple of 128."""
    PLANES: tl.constexpr = 4 if BITS == 8 else BITS // 2
    HEIGHT: tl.constexpr = 64 * TILES
    BASE: tl.constexpr = -128 if AFFINE else ZERO  # of codes: to take it away from the offset is less work
    spans = (K + 127) // 128
    first = tl.minimum(tiles, blocks - 1).to(tl.int64) * spans * (PLANES * 512)
    ORDERED: tl.constexpr = NARROW and TOKENS < 16 and GROUP == 32
    column = narrow_columns() if ORDERED else tl.arange(0, GROUP)
    values = x + place[None, :].to(tl.int64) * K + column[:, None]
    limit = tl.where(inside, K, 0)  # K is whole groups
    total = tl.zeros((HEIGHT, TOKENS), tl.float32)
    one = tl.full((TILES, 128), 0x3F80, tl.int16) if ASM else tl.full((TILES, 128), 1, tl.int32)
    ones = operand((one,) * 16, GROUP, 0, ORDERED, TILES, x.dtype.element_ty)
    for i in tl.range(begin, end, num_stages=STAGES):
        loaded = load_words(words, first + i * (PLANES * 512), PLANES, TILES)
        for unit in tl.static_range(4):
            codes = codes_of(loaded[unit], BITS, BASE, ASM)
            step, low = load_steps(steps, i, n, N, multiples is not None, AFFINE, unit)
            for part in tl.static_range(32 // GROUP):
                at = i * 128 + unit * 32 + part * GROUP
                tokens = tl.load(values + at, (inside if EVEN else at < limit)[None, :], 0.0)
                scale, offset = load_scale(
                    step, low, multiples, lows, i, n, N, AFFINE, 128 // GROUP, unit * (32 // GROUP) + part
                )
                weight = operand(codes, GROUP, part, ORDERED, TILES, x.dtype.element_ty)
                total += tl.dot(weight, tokens, input_precision="ieee") * scale[:, None]
                if AFFINE:
                    total += tl.dot(ones, tokens, input_precision="ieee") * (offset + BASE * scale)[:, None]
    return total
