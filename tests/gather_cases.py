"""Rows to be gathered, and what is wrong with what was."""

from __future__ import annotations

import torch

from dsv2quant.kernels.gather import PIECE, gather_rows

CASES = [(7, 5, 3), (40, PIECE, 64), (9, PIECE + 8, 20), (3, 2 * PIECE + 1, 1), (4, 16, 0)]  # rows, columns, of them


def faults(rows: int, columns: int, count: int, device: str, *, pinned: bool = False) -> list[str]:
    source = torch.randn(rows, columns, device="cpu" if pinned else device)
    if pinned:
        source = source.pin_memory()
    index = torch.randint(rows, (count,), device=device)
    got = gather_rows(source, index)
    wanted = source[index.to(source.device)].to(device)
    return [] if torch.equal(got, wanted) else [f"{(got != wanted).any(1).sum()} of {count} rows are others"]
