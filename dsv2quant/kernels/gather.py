"""Rows gathered by a GPU: of an array in the host's page-locked memory, over its bus, and of tokens for experts.

Of the former the processors would have to write a copy first. A row is read in whole pieces of a kilobyte and more, so
that the bus is as busy as with one long copy.
"""

from __future__ import annotations

import torch
import triton.language as tl

from dsv2quant.kernels.jit import cdiv, jit, power_of_2
from dsv2quant.kernels.launch import PDL, wait

PIECE = 1024  # columns that a program has on their way at once, of each row


@jit
def _gather_kernel(source, index, out, columns, PIECE: tl.constexpr):
    """Program (row, piece)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    inside = column < columns
    values = tl.load(source + tl.load(index + row) * columns + column, mask=inside)
    tl.store(out + row * columns + column, values, mask=inside)


def gather_rows(source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`source[index]` on the index's device: source contiguous [rows, columns] there or in page-locked memory of the
    host, index int64 [n] of rows that there are → [n, columns].

    Raises ValueError where a shape or a dtype is another, or the source is not contiguous.
    """
    if source.ndim != 2 or not source.is_contiguous():
        raise ValueError(f"source is {tuple(source.shape)}; need [rows, columns], contiguous")
    if index.ndim != 1 or index.dtype != torch.int64 or not index.is_contiguous():
        raise ValueError(f"index is {index.dtype}, {tuple(index.shape)}; need int64, [n], contiguous")
    out = torch.empty(len(index), source.shape[1], dtype=source.dtype, device=index.device)
    if out.numel():
        grid = len(index), cdiv(source.shape[1], PIECE)
        _gather_kernel[grid](source, index, out, source.shape[1], PIECE=PIECE, num_warps=4)
    return out


@jit(do_not_specialize=["k"])
def _gather_tokens_kernel(x, pairs, out, k, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Program: a pair."""
    wait()
    place = tl.program_id(0).to(tl.int64)
    token = (tl.load(pairs + place) // k).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < COLUMNS
    tl.store(out + place * COLUMNS + column, tl.load(x + token * COLUMNS + column, mask=inside), mask=inside)


def gather_tokens(x: torch.Tensor, pairs: torch.Tensor, k: int) -> torch.Tensor:
    """`x[pairs // k]`: x contiguous [tokens, columns], of columns that are 4 bytes or multiples of them, and pairs
    int32 [n] → [n, columns]."""
    out = torch.empty(len(pairs), x.shape[1], dtype=x.dtype, device=x.device)
    source, target = x.view(torch.int32), out.view(torch.int32)
    columns = source.shape[1]
    width = power_of_2(columns)
    if len(out):
        _gather_tokens_kernel[(len(out),)](
            source, pairs, target, k, COLUMNS=columns, WIDTH=width, num_warps=min(max(width // 256, 1), 8),
            launch_pdl=PDL,
        )  # fmt: skip
    return out
