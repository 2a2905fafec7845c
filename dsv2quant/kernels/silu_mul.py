"""silu(gate) · up between an FFN's two products, and its quantization, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv2quant.formats.fp8 import BLOCK
from dsv2quant.kernels.act_quant import outputs, quantize_row
from dsv2quant.kernels.checks import INTERPRETED, check_rows

SPAN: tl.constexpr = tl.constexpr(BLOCK)
GROUPS = 8  # of one program, unless it takes a whole token
MAX_COLUMNS = 16384  # of a token quantized by one scale


@triton.jit(do_not_specialize=["scale_stride"])
def _silu_mul_kernel(
    gate_up, out, codes, scales, stride, up, scale_stride,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, GRANULARITY: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    inside = column < WIDTH
    source = gate_up + token * stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(source + up, mask=inside, other=0.0).to(tl.float32)
    found = (gate / (1.0 + tl.exp(-gate)) * other).to(gate_up.dtype.element_ty)
    row = token * WIDTH + column
    if codes is None:
        tl.store(out + row, found, mask=inside)
    else:
        first = scales if GRANULARITY == "static" else scales + token
        quantize_row(
            found.to(tl.float32), codes + row, first, group, inside, scale_stride,
            (WIDTH + SPAN - 1) // SPAN, GRANULARITY, ROUND,
        )  # fmt: skip


def silu_mul(
    gate_up: torch.Tensor,
    columns: int,
    up: int | None = None,
    *,
    quantize: str | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """h = silu(gate) · up in float32, rounded once to gate_up's dtype: [T, columns]; with `quantize` its codes and
    scales alone, as act_quant.quantize_activation returns them ('static' by `scale`, float32 [1]).

    gate_up [T, ·] is bfloat16, float16 or float32, in rows of any stride: gate in the first `columns` columns, up in
    as many from column `up` on, by default behind them.
    Raises ValueError where shapes, dtypes or layouts are others, or one scale is for more than 16384 columns.
    """
    up = columns if up is None else up
    check_rows("gate_up", gate_up, (None, None))
    tokens = gate_up.shape[0]
    if not 0 < columns <= up or up + columns > gate_up.shape[1]:
        raise ValueError(f"gate_up has {gate_up.shape[1]} columns; {columns} from 0 and from {up} on don't fit")
    if quantize == "token" and columns > MAX_COLUMNS:
        raise ValueError(f"a token of {columns} columns; at most {MAX_COLUMNS} fit in registers")
    out = codes = scales = None
    if quantize is None:
        out = torch.empty(tokens, columns, dtype=gate_up.dtype, device=gate_up.device)
    else:
        codes, scales = outputs(tokens, columns, quantize, scale, gate_up.device)
    groups = triton.cdiv(columns, BLOCK)
    taken = triton.next_power_of_2(groups) if quantize == "token" else GROUPS
    if tokens:
        _silu_mul_kernel[(tokens, triton.cdiv(groups, taken))](
            gate_up, out, codes, scales, gate_up.stride(0), up,
            0 if scales is None or scales.ndim < 2 else scales.stride(1),
            WIDTH=columns, GROUPS=taken, GRANULARITY=quantize, ROUND=INTERPRETED,
            num_warps=min(max(taken // 2, 1), 32), enable_fp_fusion=False,
        )  # fmt: skip
    return (codes, scales) if out is None else out
