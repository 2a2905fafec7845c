"""Rows of an array in the host's page-locked memory, gathered by the GPU itself over its bus.

The processors would have to write a copy of the rows first. A row is read in whole pieces of a kilobyte and more, so
that the bus is as busy as with one long copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PIECE = 1024  # columns that a program has on their way at once, of each row


@triton.jit
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
        grid = len(index), triton.cdiv(source.shape[1], PIECE)
        _gather_kernel[grid](source, index, out, source.shape[1], PIECE=PIECE, num_warps=4)
    return out
