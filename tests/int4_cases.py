"""INT4 weights for the kernels' tests, of any shape."""

from __future__ import annotations

import torch

from dsv2quant.kernels.int4_layout import Int4Weight, pack


def random_weight(
    rows: int, columns: int, group: int, zeros: bool = False, ordered: bool = False, device: str = "cpu"
) -> Int4Weight:
    """Codes 0 … 15, BF16 scales of many sizes; zeros 0 … 16, columns in a random order."""
    make = torch.Generator(device).manual_seed(0)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=device, generator=make)
    scales = torch.rand(columns // group, rows, device=device, generator=make).add(0.1).mul(0.02).bfloat16()
    points = torch.randint(0, 17, scales.shape, device=device, generator=make) if zeros else None
    order = torch.randperm(columns, device=device, generator=make) if ordered else None
    return pack(codes, scales, points, order)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative Frobenius error; NaN where anything is."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())
