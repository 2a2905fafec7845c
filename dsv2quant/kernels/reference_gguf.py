"""Torch twins of the kernels for GGUF weights: see reference.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsv2quant.kernels.gguf_layout import SPECS, GgufWeight, unpack


def dequantize_gguf(weight: GgufWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[rows, columns], or a stack: step × multiple × (code − zero) + offset in float32, rounded once to `dtype`."""
    spec, columns = SPECS[weight.type], weight.columns
    codes, halves, multiples = unpack(weight)
    parts = [half.float() for half in halves]
    if multiples:
        per_block = spec.values // spec.group
        parts = [a.repeat_interleave(per_block, -1) * b for a, b in zip(parts, multiples, strict=True)]
        parts[1:] = [-part for part in parts[1:]]  # such blocks have offsets to subtract
    scale, *offset = (part.repeat_interleave(columns // part.shape[-1], -1) for part in parts)
    values = (codes.view(torch.int8) if spec.bits == 8 else codes.short() - spec.zero).float() * scale
    return (values + offset[0] if offset else values).to(dtype)


def linear_gguf(x: torch.Tensor, weight: GgufWeight) -> torch.Tensor:
    """x [M, K] @ weight [N, K]ᵀ in float64, in x's dtype."""
    return F.linear(x.double(), dequantize_gguf(weight).double()).to(x.dtype)


def experts_product(
    x: torch.Tensor, chosen: torch.Tensor, stack: GgufWeight, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """x [tokens, K], or [tokens · k, K] with a row for each pair, by the experts `chosen` [tokens, k] and times
    `weights` [tokens, k]: [tokens · k, N] in float64."""
    flat = chosen.flatten()
    rows = x.repeat_interleave(len(flat) // len(x), 0).double()
    out = rows.new_empty(len(flat), stack.rows)
    for expert, matrix in enumerate(dequantize_gguf(stack)):
        out[flat == expert] = F.linear(rows[flat == expert], matrix.double())
    return out if weights is None else out * weights.flatten().double().unsqueeze(1)
