"""Inputs of plain attention's decoding for tests/gqa_interpreted.py and tests/gpu/test_gqa_cuda.py, and what results
must be."""

from __future__ import annotations

import torch
from fused_cases import PLACE

from dsv2quant.kernels import reference_attention
from dsv2quant.kernels.append_keys import append_keys

EMPTY = torch.Tensor.new_empty


def inputs(
    heads: int, groups: int, width: int, lengths: list[int], capacity: int, dtype: torch.dtype, stored: torch.dtype,
    device: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor | None]:  # fmt: skip
    """q, cache, lengths, scale, cache_scale. Softmax weights of many sizes; beyond each length only NaNs."""
    generator = torch.Generator(device).manual_seed(0)
    batch = len(lengths)
    q = torch.randn(batch, heads, width, generator=generator, device=device) * 3
    cache = torch.randn(batch, capacity, 2, groups * width, generator=generator, device=device)
    factors = None
    if stored.itemsize == 1:
        factors = torch.tensor([0.037, 0.011], device=device)
        # What e4m3 has no code for becomes NaN: among many numbers some are that far out.
        cache = (cache / factors[:, None]).clamp(-torch.finfo(stored).max, torch.finfo(stored).max)
    cache = cache.flatten(2).to(stored)
    for row, length in enumerate(lengths):
        cache[row, length:].view(torch.uint8).fill_(0xFF)
    return q.to(dtype), cache, torch.tensor(lengths, dtype=torch.int32, device=device), width**-0.5, factors


def off(got: torch.Tensor, given: tuple) -> float:
    """The largest relative Frobenius error of a sequence, against the reference in float64; infinite where a NaN is."""
    q, *rest = given
    expected = reference_attention.gqa_decode(q.double(), *rest)
    errors = (got.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp_min(1e-30)
    return float(errors.nan_to_num(torch.inf).max())


def append_faults(
    positions: list[int], heads: int, groups: int, width: int, stored: torch.dtype, dtype: torch.dtype, device: str
) -> list[str]:
    """What is wrong with queries and a cache of 7 places; the table has 9."""
    tokens, capacity = len(positions), 7
    sizes = [heads * width, groups * width, groups * width]
    generator = torch.Generator().manual_seed(5)
    both = (torch.randn(tokens, sum(sizes) + 8, generator=generator) * 3).to(device).to(dtype)
    q, k, v = both[:, : sum(sizes)].split(sizes, 1)
    angles = torch.arange(9)[:, None] * torch.exp2(-torch.arange(width // 2.0))
    table = torch.view_as_real(torch.polar(torch.full_like(angles, 1.1), angles)).contiguous().to(device)
    where = torch.tensor(positions, dtype=torch.int32, device=device)
    scale = torch.tensor([0.037, 0.011], device=device) if stored.itemsize == 1 else None
    results = []
    for run in (append_keys, reference_attention.append_keys):
        cache = torch.full((tokens, capacity, 2 * groups * width), 2.0, device=device).to(stored)
        results.append((run(q, k, v, table, where, cache, scale, width), cache))
    found = []
    # A few values round to neighbours: of float8, 2^-4 or 2^-3 apart.
    for name, got, want in zip(("queries", "cache"), *results, strict=True):
        place = {1: 2.0**-2}.get(want.element_size(), 4 * PLACE[dtype])
        least = max(4e-6, torch.finfo(want.dtype).tiny * torch.finfo(want.dtype).eps)  # a step of the smallest codes
        near = (got.double() - want.double()).abs() <= place * want.double().abs() + least
        flips = float((got.double() != want.double()).double().mean())
        if not bool(near.all()) or flips > (1.0 if want.dtype == torch.float32 else 0.01):
            found.append(f"{name}: {int((~near).sum())} far off, {flips:.2%} others")
    for row, position in enumerate(positions):
        others = [at for at in range(capacity) if at != position]
        if not bool((results[0][1][row, others].double() == 2).all()):
            found.append(f"row {row} has values at other positions than {position}")
    return found


def poisoned(*given: object, **how: object) -> torch.Tensor:
    """In place of Tensor.new_empty: nothing may rely on what is there."""
    found = EMPTY(*given, **how)
    return found.fill_(torch.nan) if found.is_floating_point() else found
