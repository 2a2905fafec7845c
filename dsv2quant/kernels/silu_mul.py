"""silu(gate) · up between an FFN's two products, and its quantization, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv2quant.formats.e4m3 import BLOCK
from dsv2quant.kernels.act_quant import outputs, quantize_row
from dsv2quant.kernels.launch import INTERPRETED, PDL, check_rows, wait

SPAN: tl.constexpr = tl.constexpr(BLOCK)
GROUPS = 8  # of one program, unless it takes a whole token, or there are few
FEW = 528  # groups in all: 4 programs on each multiprocessor of an H200
MAX_COLUMNS = 16384  # of a token quantized by one scale


@triton.jit(do_not_specialize=["scale_stride"])
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
    if granularity == "token" and columns > MAX_COLUMNS:
        raise ValueError(f"a token of {columns} columns; at most {MAX_COLUMNS} fit in registers")
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
    groups = triton.cdiv(columns, BLOCK)
    taken = triton.next_power_of_2(groups) if granularity == "token" else 1 if tokens * groups <= FEW else GROUPS
    if tokens:
        _silu_mul_kernel[(tokens, triton.cdiv(groups, taken))](
            gate, up, out, codes, scales, gate.stride(0), up.stride(0),
            0 if scales is None or scales.ndim < 2 else scales.stride(1),
            WIDTH=columns, GROUPS=taken, GRANULARITY=granularity, ROUND=INTERPRETED,
            num_warps=min(max(taken // 2, 1), 32), enable_fp_fusion=False, launch_pdl=PDL,
        )  # fmt: skip
