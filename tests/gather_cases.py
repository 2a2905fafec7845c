"""Rows to be gathered, and what is wrong with what was."""

from __future__ import annotations

import torch

from dsv2quant.kernels.gather import PIECE, gather_rows, gather_tokens

CASES = [(7, 5, 3), (40, PIECE, 64), (9, PIECE + 8, 20), (3, 2 * PIECE + 1, 1), (4, 16, 0)]  # rows, columns, of them


def faults(rows: int, columns: int, count: int, device: str, *, pinned: bool = False) -> list[str]:
    source = torch.randn(rows, columns, device="cpu" if pinned else device)
    if pinned:
        source = source.pin_memory()
    index = torch.randint(rows, (count,), device=device)
    got = gather_rows(source, index)
    wanted = source[index.to(source.device)].to(device)
    return [] if torch.equal(got, wanted) else [f"{(got != wanted).any(1).sum()} of {count} rows are others"]


TOKENS = [(7, 16, 3, torch.float16), (5, 208, 2, torch.uint8), (1, 8, 1, torch.float16)]  # tokens, columns, k, dtype


def token_faults(tokens: int, columns: int, k: int, dtype: torch.dtype, device: str) -> list[str]:
    x = torch.randint(200, (tokens, columns), device=device).to(dtype)
    pairs = torch.randperm(tokens * k, device=device).int()
    same = torch.equal(gather_tokens(x, pairs, k), x[pairs.long() // k])
    return [] if same else ["other rows"]
