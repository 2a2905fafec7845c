"""Activations on their way into a linear layer, on a CUDA device: e4m3 codes, alone or in one launch with what stands
before them, sums into the residual stream and RMSNorm, or silu(gate) · up. Codes are reference.quantize_activation's.

Scales of groups lie token after token, each group's padded to 4, so that a GEMM reads those of neighbouring tokens at
once: the layout of DeepGEMM and of cuBLASLt's 1×128 block scaling. In `add_norm` one program takes a token, whose row
stays in registers: at few tokens the time is that of a launch and two reductions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv2quant.formats.e4m3 import BLOCK, E4M3_MAX, MIN_SCALE
from dsv2quant.kernels.jit import cdiv, jit, power_of_2
from dsv2quant.kernels.launch import INTERPRETED, MULTIPROCESSORS, PDL, check_rows, wait

LARGEST: tl.constexpr = tl.constexpr(E4M3_MAX)
SMALLEST_SCALE: tl.constexpr = tl.constexpr(MIN_SCALE)
SPAN: tl.constexpr = tl.constexpr(BLOCK)
QUANTIZED_COLUMNS = 65536  # of a token by one scale: its row lies whole in the registers of one program
ELEMENTS = 4096  # of one program where groups are short
FUSED_COLUMNS = 16384  # of a token that is summed or multiplied before it is quantized by one scale
GROUPS = 8  # of one program of silu_mul, unless it takes a whole token, or there are few
MANY = 8 * MULTIPROCESSORS  # tokens, from which on programs of add_norm wait for one another
FEW = 528  # groups in all: 4 programs on each multiprocessor of an H200


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
    """Codes of values by scales that broadcast to them. ROUND: before the cast, since the interpreter's casts of what
    e4m3 does not hold are wrong."""
    if ROUND:
        ratio = tl.clamp(tl.div_rn(values, tl.broadcast_to(scale, values.shape)), -LARGEST, LARGEST,
                         propagate_nan=tl.PropagateNan.ALL)  # fmt: skip
        ratio = nearest(ratio, False)
    else:
        # A division of its own for each would take most of the time. The product with the scale's reciprocal, and what
        # that leaves added, is the quotient to its last bit (P. Markstein, Computation of elementary functions on the
        # IBM RISC System/6000 processor, 1990). Where that leaves nothing exact the product has the same code.
        unit = tl.where(scale < 2.0**-60, 2.0**64, 1.0)  # so that what is left is no denormal
        inverse = tl.div_rn(tl.zeros_like(scale) + 1.0, scale * unit)
        wide = values * unit
        ratio = wide * inverse
        left = tl.fma(-ratio, tl.broadcast_to(scale * unit, values.shape), wide)
        exact = tl.fma(left, tl.broadcast_to(inverse, values.shape), ratio)
        ratio = tl.where((tl.abs(ratio) > 2.0**-100) & (tl.abs(ratio) < 2.0**20), exact, ratio)
    return ratio.to(tl.float8e4nv)  # saturates


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
        scale = tl.zeros([1, 1], tl.float32) + scale
    else:
        scale = tl.zeros([1, 1], tl.float32) + tl.load(scales)
    tl.store(codes, encoded(values, scale, ROUND), mask=inside)


@jit(do_not_specialize=["M", "scale_stride"])
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
    tl.store(codes + row[:, None] * K + column[None, :], encoded(values, scale[:, None], ROUND), mask=inside)


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
    groups = cdiv(columns, BLOCK)
    return codes, torch.empty(groups, cdiv(tokens, 4) * 4, device=device).T[:tokens]


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
    if granularity == "token" and columns > QUANTIZED_COLUMNS:
        raise ValueError(f"a token of {columns} columns; at most {QUANTIZED_COLUMNS} fit in registers")
    width = power_of_2(columns) if granularity == "token" else BLOCK
    groups = cdiv(columns, width)
    codes, scales = outputs(tokens, columns, granularity, scale, x.device)
    rows = min(power_of_2(max(tokens, 1)), max(ELEMENTS // width, 1))
    warps = min(max(rows * width // 1024, 1), 16)
    if tokens:
        _quantize_kernel[(cdiv(tokens, rows), groups)](
            x, codes, scales, tokens, columns, x.stride(0), scales.stride(-1) if scales.ndim else 0,
            GIVEN=granularity == "static", ROUND=INTERPRETED, ROWS=rows, WIDTH=width,
            num_warps=warps, enable_fp_fusion=False, launch_pdl=PDL,
        )  # fmt: skip
    return codes, scales


class Normed(NamedTuple):
    residual: torch.Tensor  # [T, H], x's dtype
    normed: torch.Tensor  # [T, H], x's dtype
    codes: torch.Tensor | None  # of normed, and their scales, as quantize_activation returns them
    scales: torch.Tensor | None


@jit(do_not_specialize=["scale_stride"])
def _add_norm_kernel(
    x, addend, pairs, weight, residual, normed, codes, scales, x_stride, addend_stride, scale_stride, eps,
    WIDTH: tl.constexpr, PAIRS: tl.constexpr, HELD: tl.constexpr, GROUPS: tl.constexpr, GRANULARITY: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """HELD: how many pairs are in registers at once."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    column = group[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    inside = column < WIDTH
    row = token * WIDTH + column
    gain = tl.load(weight + column, mask=inside, other=0.0)
    wait()
    loaded = (tl.load(x + token * x_stride + column, mask=inside, other=0.0),)
    if addend is not None:
        loaded = loaded + (tl.load(addend + token * addend_stride + column, mask=inside, other=0.0),)
    for pair in tl.static_range(min(PAIRS, HELD)):
        loaded = loaded + (tl.load(pairs + (token * PAIRS + pair) * WIDTH + column, mask=inside, other=0.0),)
    # The compiler would save registers by waiting for one load before it asks for the next. It moves no load over a
    # barrier, and no sum before a branch, which is always taken.
    tl.debug_barrier()
    if eps < 1:
        total = loaded[0].to(tl.float32)
        for i in tl.static_range(1, len(loaded)):
            total += loaded[i].to(tl.float32)
        for pair in tl.static_range(HELD, PAIRS):
            total += tl.load(pairs + (token * PAIRS + pair) * WIDTH + column, mask=inside, other=0.0)
        if residual is not None:
            rounded = total.to(x.dtype.element_ty)
            tl.store(residual + row, rounded, mask=inside)
            total = rounded.to(tl.float32)
        mean = tl.sum(tl.sum(total * total, 1), 0) / WIDTH
        unit = (total * tl.rsqrt(mean + eps)).to(x.dtype.element_ty).to(tl.float32)
        found = (unit * gain.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(normed + row, found, mask=inside)
        if codes is not None:
            first = scales if GRANULARITY == "static" else scales + token
            quantize_row(
                found.to(tl.float32), codes + row, first, group, inside, scale_stride,
                (WIDTH + SPAN - 1) // SPAN, GRANULARITY, ROUND,
            )  # fmt: skip


def add_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    addend: torch.Tensor | None = None,
    pairs: torch.Tensor | None = None,
    quantize: str | None = None,
    scale: torch.Tensor | None = None,
) -> Normed:
    """residual = x + addend + Σ_k pairs[:, k], added in this order in float32 and rounded once; normed = its RMSNorm,
    as model/layers.RMSNorm computes it. With nothing to add the residual is x itself.

    x [T, H] and addend [T, H] of one dtype (bfloat16, float16 or float32), in rows of any stride; weight [H] of the
    same; pairs float32 [T, k, H], contiguous: what a token's experts gave. `quantize`: None, or the granularity of
    quantize_activation, 'static' by `scale`, float32 [1].
    Raises ValueError where shapes, dtypes or layouts are others, or H is above 16384.
    """
    check_rows("x", x, (None, None))
    tokens, columns = x.shape
    check_rows("weight", weight, (columns,), x.dtype)
    if columns > FUSED_COLUMNS:
        raise ValueError(f"a token of {columns} columns; at most {FUSED_COLUMNS} fit in registers")
    if addend is not None:
        check_rows("addend", addend, (tokens, columns), x.dtype)
    if pairs is not None:
        check_rows("pairs", pairs, (tokens, None, columns), torch.float32)
        if not pairs.is_contiguous():
            raise ValueError("pairs must be contiguous")
    normed = torch.empty(tokens, columns, dtype=x.dtype, device=x.device)
    residual = None
    if addend is not None or pairs is not None:
        residual = torch.empty(tokens, columns, dtype=x.dtype, device=x.device)
    codes, scales = (None, None) if quantize is None else outputs(tokens, columns, quantize, scale, x.device)
    if tokens:
        groups = power_of_2(cdiv(columns, BLOCK))
        warps, at_once = share(tokens, groups)
        _add_norm_kernel[(tokens,)](
            x, addend, pairs, weight, residual, normed, codes, scales,
            x.stride(0), 0 if addend is None else addend.stride(0),
            0 if scales is None or scales.ndim < 2 else scales.stride(1), eps,
            WIDTH=columns, PAIRS=0 if pairs is None else pairs.shape[1], HELD=at_once, GROUPS=groups,
            GRANULARITY=quantize, ROUND=INTERPRETED, num_warps=warps, enable_fp_fusion=False, launch_pdl=PDL,
        )  # fmt: skip
    return Normed(x if residual is None else residual, normed, codes, scales)


def share(tokens: int, groups: int) -> tuple[int, int]:
    """A program's warps, and pairs in flight at once. Few tokens: as many as make one token fast; 32 warps leave a
    thread 64 registers. Many: so that several programs run on a multiprocessor."""
    if tokens > MANY:
        return max(groups // 16, 2), 2
    return min(max(groups // 2, 1), 32), 3 if groups > 32 else 8


@jit(do_not_specialize=["scale_stride"])
def _silu_mul_kernel(
    gate, up, out, codes, scales, gate_stride, up_stride, scale_stride,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, GRANULARITY: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    wait()
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    inside = column < WIDTH
    a = tl.load(gate + token * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + token * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    found = (a / (1.0 + tl.exp(-a)) * b).to(gate.dtype.element_ty)
    row = token * WIDTH + column
    if codes is None:
        tl.store(out + row, found, mask=inside)
    else:
        first = scales if GRANULARITY == "static" else scales + token
        quantize_row(
            found.to(tl.float32), codes + row, first, group, inside, scale_stride,
            (WIDTH + SPAN - 1) // SPAN, GRANULARITY, ROUND,
        )  # fmt: skip


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """h = silu(gate) · up in float32, rounded once to their dtype: [T, columns].

    gate and up, [T, columns], are bfloat16, float16 or float32, in rows of any strides: parts of one product.
    Raises ValueError where shapes, dtypes or layouts are others.
    """
    _check_gates(gate, up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch_silu_mul(gate, up, out, None, None, None)
    return out


def silu_mul_codes(
    gate: torch.Tensor, up: torch.Tensor, granularity: str, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`silu_mul`, quantized: its codes and scales alone, as `quantize_activation` returns them ('static' by `scale`,
    float32 [1]). Also raises ValueError where one scale is for more than 16384 columns."""
    _check_gates(gate, up)
    tokens, columns = gate.shape
    if granularity == "token" and columns > FUSED_COLUMNS:
        raise ValueError(f"a token of {columns} columns; at most {FUSED_COLUMNS} fit in registers")
    codes, scales = outputs(tokens, columns, granularity, scale, gate.device)
    _launch_silu_mul(gate, up, None, codes, scales, granularity)
    return codes, scales


def _check_gates(gate: torch.Tensor, up: torch.Tensor) -> None:
    check_rows("gate", gate, (None, None))
    check_rows("up", up, tuple(gate.shape), gate.dtype)


def _launch_silu_mul(
    gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None, codes: torch.Tensor | None,
    scales: torch.Tensor | None, granularity: str | None,
) -> None:  # fmt: skip
    tokens, columns = gate.shape
    groups = cdiv(columns, BLOCK)
    taken = power_of_2(groups) if granularity == "token" else 1 if tokens * groups <= FEW else GROUPS
    if tokens:
        _silu_mul_kernel[(tokens, cdiv(groups, taken))](
            gate, up, out, codes, scales, gate.stride(0), up.stride(0),
            0 if scales is None or scales.ndim < 2 else scales.stride(1),
            WIDTH=columns, GROUPS=taken, GRANULARITY=granularity, ROUND=INTERPRETED,
            num_warps=min(max(taken // 2, 1), 32), enable_fp_fusion=False, launch_pdl=PDL,
        )  # fmt: skip
