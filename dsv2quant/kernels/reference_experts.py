"""Torch twins of the kernels for routed experts: see reference.py."""

from __future__ import annotations

import torch

from dsv2quant.kernels.routing import Routes, tiles_needed


def sort_pairs(chosen: torch.Tensor, experts: int, block: int) -> Routes:
    """`chosen` [tokens, k], experts of each token, sorted by expert and cut into tiles of `block`."""
    flat = chosen.flatten()
    pairs = flat.argsort(stable=True)
    counts = flat.bincount(minlength=experts)
    tiles = [
        (expert, begin + first, begin + min(first + block, count))
        for expert, (count, begin) in enumerate(zip(counts.tolist(), (counts.cumsum(0) - counts).tolist(), strict=True))
        for first in range(0, count, block)
    ]
    tiles += [(-1, 0, 0)] * (tiles_needed(len(flat), experts, block) - len(tiles))
    table = torch.tensor(tiles, dtype=torch.int32, device=chosen.device).view(-1, 3)
    return Routes(pairs.to(torch.int32), *(column.contiguous() for column in table.unbind(1)), block)


def combine(pairs: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Weighted outputs of pairs, float32 [tokens, k, hidden] → their sums over k, rounded once, [tokens, hidden]."""
    return pairs.sum(1).to(dtype)
