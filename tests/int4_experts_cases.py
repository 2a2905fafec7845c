"""Experts of INT4 weights for the kernels' tests, of any shape."""

from __future__ import annotations

import torch

from dsv2quant.kernels.int4_layout import Int4Experts, Int4Weight, empty, fill, pack


def random_weights(
    rows: int, columns: int, group: int | None, zeros: bool, make: torch.Generator, dtype: torch.dtype = torch.bfloat16
) -> Int4Weight:
    """Codes 0 … 15, scales of many sizes whose products are of size 1; zeros 0 … 16."""
    at = make.device
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=at, generator=make)
    scales = torch.rand(columns // (group or columns), rows, device=at, generator=make).add(0.1)
    points = torch.randint(0, 17, scales.shape, device=at, generator=make) if zeros else None
    return pack(codes, scales.mul(0.4 / columns**0.5).to(dtype), points)


def random_experts(
    experts: int,
    hidden: int,
    width: int,
    group: int | None,
    zeros: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> Int4Experts:
    make = torch.Generator(device).manual_seed(0)
    stack = empty(experts, hidden, width, group, dtype, zeros, device)
    for expert in range(experts):
        gate, up = (random_weights(width, hidden, group, zeros, make, dtype) for _ in range(2))
        fill(stack, expert, gate, up, random_weights(hidden, width, group, zeros, make, dtype))
    return stack


def random_choice(tokens: int, experts: int, k: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 and experts, k different ones for each token, [tokens, k]."""
    chosen = torch.rand(tokens, experts, device=device).argsort(1)[:, :k].contiguous()
    return torch.rand(tokens, k, device=device), chosen
