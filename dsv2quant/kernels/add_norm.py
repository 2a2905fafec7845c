"""What stands before a linear layer, in one launch: sums into the residual stream, RMSNorm and quantization.

One program per token, whose row stays in registers: at few tokens the time is that of a launch and two reductions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv2quant.formats.e4m3 import BLOCK
from dsv2quant.kernels.act_quant import outputs, quantize_row
from dsv2quant.kernels.launch import INTERPRETED, PDL, check_rows, wait

SPAN: tl.constexpr = tl.constexpr(BLOCK)
MAX_COLUMNS = 16384


class Normed(NamedTuple):
    residual: torch.Tensor  # [T, H], x's dtype
    normed: torch.Tensor  # [T, H], x's dtype
    codes: torch.Tensor | None  # of normed, and their scales, as act_quant.quantize_activation returns them
    scales: torch.Tensor | None


@triton.jit(do_not_specialize=["scale_stride"])
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
    as model/linear.RMSNorm computes it. With nothing to add the residual is x itself.

    x [T, H] and addend [T, H] of one dtype (bfloat16, float16 or float32), in rows of any stride; weight [H] of the
    same; pairs float32 [T, k, H], contiguous: what a token's experts gave. `quantize`: None, or the granularity of
    act_quant.quantize_activation, 'static' by `scale`, float32 [1].
    Raises ValueError where shapes, dtypes or layouts are others, or H is above 16384.
    """
    check_rows("x", x, (None, None))
    tokens, columns = x.shape
    check_rows("weight", weight, (columns,), x.dtype)
    if columns > MAX_COLUMNS:
        raise ValueError(f"a token of {columns} columns; at most {MAX_COLUMNS} fit in registers")
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
        groups = triton.next_power_of_2(triton.cdiv(columns, BLOCK))
        _add_norm_kernel[(tokens,)](
            x, addend, pairs, weight, residual, normed, codes, scales,
            x.stride(0), 0 if addend is None else addend.stride(0),
            0 if scales is None or scales.ndim < 2 else scales.stride(1), eps,
            WIDTH=columns, PAIRS=0 if pairs is None else pairs.shape[1], HELD=held(groups), GROUPS=groups,
            GRANULARITY=quantize, ROUND=INTERPRETED, num_warps=min(max(groups // 2, 1), 32), enable_fp_fusion=False,
            launch_pdl=PDL,
        )  # fmt: skip
    return Normed(x if residual is None else residual, normed, codes, scales)


def held(groups: int) -> int:
    """Pairs in flight at once: 32 warps leave a thread 64 registers."""
    return 3 if groups > 32 else 8
