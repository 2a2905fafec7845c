"""Inputs of MLA decoding for tests/mla_interpreted.py and tests/gpu/test_mla_cuda.py."""

from __future__ import annotations

import torch

from dsv2quant.kernels import reference_attention

EMPTY = torch.Tensor.new_empty


def inputs(
    batch: int, heads: int, lengths: list[int], capacity: int, rank: int, rope: int, dtype: torch.dtype,
    stored: torch.dtype, device: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, float, torch.Tensor | None]:  # fmt: skip
    """q, cache, lengths, rank, scale, cache_scale. Softmax weights of many sizes; beyond each length only NaNs."""
    generator = torch.Generator(device).manual_seed(0)
    width = rank + rope
    q = torch.randn(batch, heads, width, generator=generator, device=device) * 3
    cache = torch.randn(batch, capacity, width, generator=generator, device=device)
    ends = torch.tensor(lengths, dtype=torch.int32, device=device)
    factor = None
    if stored.itemsize == 1:
        factor = torch.tensor([0.037], device=device)
        cache = cache / factor
    cache = cache.to(stored)
    for row, length in enumerate(lengths):
        cache[row, length:].view(torch.uint8).fill_(0xFF)
    return q.to(dtype), cache, ends, rank, width**-0.5, factor


def off(got: torch.Tensor, given: tuple) -> float:
    """The largest relative Frobenius error of a sequence, against the reference in float64; infinite where a NaN is."""
    q, cache, *rest = given
    expected = reference_attention.mla_decode(q.double(), cache, *rest)
    errors = (got.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp_min(1e-30)
    return float(errors.nan_to_num(torch.inf).max())


def poisoned(*given: object, **how: object) -> torch.Tensor:
    """In place of Tensor.new_empty: nothing may rely on what is there."""
    found = EMPTY(*given, **how)
    return found.fill_(torch.nan) if found.is_floating_point() else found
