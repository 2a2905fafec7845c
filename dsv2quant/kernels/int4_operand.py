"""INT4 weights in the runtime layout (int4_layout.py) on their way to the matrix units: what kernels share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

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
