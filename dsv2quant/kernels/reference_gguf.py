"""Torch twins of the kernels for GGUF weights: see reference.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsv2quant.kernels.gguf_layout import SPECS, GgufWeight, unpack
from dsv2quant.kernels.routing import Routes


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
    x: torch.Tensor, routes: Routes, choices: int, stack: GgufWeight, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """gguf_experts.experts_product, whose sums are in float64."""
    out = torch.empty(len(routes.pairs), stack.rows, dtype=torch.float64, device=x.device)
    table = torch.stack([routes.experts, routes.begins, routes.ends], 1)
    for expert, begin, end in table[routes.experts >= 0].tolist():
        pairs = routes.pairs[begin:end].long()
        out[pairs] = F.linear(x[pairs // choices].double(), dequantize_gguf(matrix_of(stack, expert)).double())
    return out.to(x.dtype) if weights is None else (out * weights.view(-1, 1)).float()


def matrix_of(stack: GgufWeight, expert: int) -> GgufWeight:
    """One of a stack's matrices."""
    return stack._replace(
        words=stack.words[expert],
        steps=stack.steps[expert],
        multiples=None if stack.multiples is None else stack.multiples[expert],
        lows=None if stack.lows is None else stack.lows[expert],
        arrivals=stack.arrivals[expert],
    )
