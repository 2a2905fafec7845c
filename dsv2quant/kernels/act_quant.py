"""Activations quantized to e4m3 on a CUDA device: the bytes of reference.quantize_activation.

Scales of groups lie token after token, each group's padded to 4, so that a GEMM reads those of neighbouring tokens at
once: the layout of DeepGEMM and of cuBLASLt's 1×128 block scaling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv2quant.formats.e4m3 import BLOCK, E4M3_MAX, MIN_SCALE
from dsv2quant.kernels.launch import INTERPRETED, PDL, wait

LARGEST: tl.constexpr = tl.constexpr(E4M3_MAX)
SMALLEST_SCALE: tl.constexpr = tl.constexpr(MIN_SCALE)
MAX_COLUMNS = 65536  # a token's row lies whole in the registers of one program
ELEMENTS = 4096  # of one program where groups are short


@triton.jit
def nearest(v, E5M2: tl.constexpr):
    """v rounded to a value of e4m3, or e5m2, ties to even: below 2^-6 (2^-14) these are multiples of 2^-9 (2^-16),
    above they have 3 (2) bits."""
    SHIFT: tl.constexpr = 21 if E5M2 else 20
    EVEN: tl.constexpr = 192.0 if E5M2 else 24576.0  # 1.5 × 2^7 or 2^14, whose last bit is 2^-16 or 2^-9
    small = (v + EVEN) - EVEN
    bits = v.to(tl.int32, bitcast=True)
    large = ((bits + ((1 << SHIFT - 1) - 1) + (bits >> SHIFT & 1)) & -(1 << SHIFT)).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(v) < (2.0**-14 if E5M2 else 2.0**-6), tl.where(small == 0, v * 0.0, small), large)


@triton.jit
def magnitudes(values):
    """The bits of |values|: they are ordered as these are, with NaN above infinity, so that a NaN is not lost."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(bits):
    """The scale of values whose largest magnitude has these bits: 1 of zeros."""
    amax = bits.to(tl.float32, bitcast=True)
    return tl.maximum(tl.div_rn(tl.where(amax > 0, amax, LARGEST), LARGEST), SMALLEST_SCALE)


@triton.jit
def encoded(values, scale, ROUND: tl.constexpr):
    """Codes of values by scales of the same shape. ROUND: before the cast, since the interpreter's casts of what e4m3
    does not hold are wrong."""
    # 0 / scale is 0, but takes a division's slow path, and all other lanes of a warp wait: so did what is not inside.
    zero = values == 0
    ratio = tl.where(zero, values, tl.div_rn(tl.where(zero, scale, values), scale))
    ratio = tl.clamp(ratio, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    if ROUND:
        ratio = nearest(ratio, False)
    return ratio.to(tl.float8e4nv)


@triton.jit
def quantize_row(
    values, codes, scales, group, inside, scale_stride, GROUPS: tl.constexpr, GRANULARITY: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """Of one token: values [·, 128] of `group` [·], 0 where not `inside`, to the pointers `codes` [·, 128] and, of the
    scales, to the token's first. With 'token' the values are all of the token's."""
    if GRANULARITY == "group128":
        scale = scale_of(tl.max(magnitudes(values), 1))
        tl.store(scales + group * scale_stride, scale, mask=group < GROUPS)
        scale = scale[:, None]
    elif GRANULARITY == "token":
        scale = scale_of(tl.max(tl.max(magnitudes(values), 1), 0))
        tl.store(scales, scale)
    else:
        scale = tl.load(scales)
    tl.store(codes, encoded(values, tl.broadcast_to(scale, values.shape), ROUND), mask=inside)


@triton.jit(do_not_specialize=["M", "scale_stride"])
def _quantize_kernel(
    x, codes, scales, M, K, x_stride, scale_stride,
    GIVEN: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One group of WIDTH columns of ROWS tokens; `scale_stride` lies between the scales of two groups."""
    wait()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    column = group * WIDTH + tl.arange(0, WIDTH)
    inside = (row < M)[:, None] & (column < K)[None, :]
    values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if GIVEN:
        scale = tl.load(scales + tl.zeros_like(row))
    else:
        scale = scale_of(tl.max(magnitudes(values), 1))
        tl.store(scales + group * scale_stride + row, scale, mask=row < M)
    found = encoded(values, tl.broadcast_to(scale[:, None], [ROWS, WIDTH]), ROUND)
    tl.store(codes + row[:, None] * K + column[None, :], found, mask=inside)


def outputs(
    tokens: int, columns: int, granularity: str, scale: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales as `quantize_activation` returns them, yet to be written. Raises ValueError for another
    granularity, or a scale that is not float32 [1]."""
    codes = torch.empty(tokens, columns, dtype=torch.float8_e4m3fn, device=device)
    if granularity == "static":
        if scale is None or scale.numel() != 1 or scale.dtype != torch.float32:
            raise ValueError("static quantization takes one scale, float32 [1]")
        return codes, scale
    if granularity not in ("token", "group128"):
        raise ValueError(f"no activations are quantized by {granularity!r}; need 'group128', 'token' or 'static'")
    if granularity == "token":
        return codes, torch.empty(tokens, 1, device=device)
    groups = triton.cdiv(columns, BLOCK)
    return codes, torch.empty(groups, triton.cdiv(tokens, 4) * 4, device=device).T[:tokens]


def quantize_activation(
    x: torch.Tensor, granularity: str, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.quantize_activation, of bfloat16, float16 or float32 [M, K] with contiguous rows.

    Codes are float8_e4m3fn [M, K]; scales float32 [M, 1] of 'token', [M, ⌈K/128⌉] of 'group128' with strides
    (1, M rounded up to 4), or the given one of 'static'.
    Raises ValueError where x is no such matrix, and TypeError for bfloat16 in Triton's interpreter, which has none.
    """
    if x.ndim != 2 or x.stride(1) != 1:
        raise ValueError(f"activations of shape {tuple(x.shape)}, strides {x.stride()}: need [M, K] of contiguous rows")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"activations are {x.dtype}; need bfloat16, float16 or float32")
    if INTERPRETED and x.dtype == torch.bfloat16:
        raise TypeError("Triton's interpreter has no bfloat16")
    tokens, columns = x.shape
    if granularity == "token" and columns > MAX_COLUMNS:
        raise ValueError(f"a token of {columns} columns; at most {MAX_COLUMNS} fit in registers")
    width = triton.next_power_of_2(columns) if granularity == "token" else BLOCK
    groups = triton.cdiv(columns, width)
    codes, scales = outputs(tokens, columns, granularity, scale, x.device)
    rows = min(triton.next_power_of_2(max(tokens, 1)), max(ELEMENTS // width, 1))
    warps = min(max(rows * width // 1024, 1), 16)
    if tokens:
        _quantize_kernel[(triton.cdiv(tokens, rows), groups)](
            x, codes, scales, tokens, columns, x.stride(0), scales.stride(-1) if scales.ndim else 0,
            GIVEN=granularity == "static", ROUND=INTERPRETED, ROWS=rows, WIDTH=width,
            num_warps=warps, enable_fp_fusion=False, launch_pdl=PDL,
        )  # fmt: skip
    return codes, scales
