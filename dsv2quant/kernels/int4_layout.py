"""The layout INT4 weights have while they run: the on-disk layouts are repacked into it once, when a model is loaded.

A block of 64 rows by `span` columns is contiguous, and thread t of a warp group finds its share in one load: the
operand of `wgmma` that is held in registers (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16"), 16 columns
at a time. Thread t = (warp, r, q) has of each 16 columns one word of eight codes,

    row = 16 · warp + 8 · h + r      column = 8 · c + 2 · q + p      nibble 4 · p + 2 · c + h

so that a word, shifted by 0, 4, 8 and 12 bits, holds the pairs p = 0, 1 of four registers 16 bits apart. `span` is 64,
a load of 16 bytes, or 32 where groups are of 32 columns. Rows are padded to 64 and columns to whole blocks, with 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dsv2quant.formats.awq import ORDER
from dsv2quant.formats.int4 import (
    GROUP_INDEX,
    OFFSET,
    PER_WORD,
    group_of_columns,
    unpack_words,
    unpack_zero_points,
)

ROWS = 64  # of a block: the rows of one wgmma
GROUPS = (32, 64, 128)
_AWQ_INVERSE = [ORDER.index(i) for i in range(PER_WORD)]
# block, warp, h, r, span, step, c, q, p → block, span, warp, r, q, step, p, c, h
_TO_BLOCKS = (0, 4, 1, 3, 7, 5, 8, 6, 2)
_FROM_BLOCKS = tuple(_TO_BLOCKS.index(i) for i in range(9))


class Int4Weight(NamedTuple):
    """weight[n, k] = (code − zero[g, n]) × scale[g, n], g = k // group, of columns in `order`."""

    words: torch.Tensor  # int32 [⌈rows / 64⌉, padded columns / span, 4, 8, 4, span / 16]
    scales: torch.Tensor  # float32 [groups, rows]: exact for BF16 and float16
    zeros: torch.Tensor | None  # int32 [groups, rows], 0 … 16; None: all 8
    order: torch.Tensor | None  # int64 [columns]: the input's column that each column meets; None: its own
    arrivals: torch.Tensor  # int32 [4 · ⌈rows / 64⌉], zero between calls: see int4_gemm.py
    rows: int
    columns: int

    @property
    def group(self) -> int:
        """Columns to a scale."""
        return self.columns // len(self.scales)


def depth(group: int) -> int:
    """Columns that the kernels take at a time: columns are padded to a multiple."""
    return group if group in GROUPS else 128


def pack(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None, order: torch.Tensor | None = None
) -> Int4Weight:
    """Codes uint8 [rows, columns], 0 … 15, scales of BF16, float16 or float32 and zeros [groups, rows].

    Raises ValueError where the groups are not of 32, 64, 128 or all columns.
    """
    (rows, columns), groups = codes.shape, len(scales)
    group = columns // groups
    if group * groups != columns or (group not in GROUPS and groups > 1):
        raise ValueError(f"{columns} columns in {groups} groups: groups are of 32, 64, 128 or all columns")
    block = depth(group)
    span = min(block, 64)
    padded = F.pad(codes, (0, -columns % block, 0, -rows % ROWS), value=OFFSET)
    blocks = padded.reshape(-1, 4, 2, 8, padded.shape[1] // span, span // 16, 2, 4, 2).permute(_TO_BLOCKS)
    nibbles = blocks.reshape(*blocks.shape[:6], PER_WORD)
    words = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).contiguous().view(torch.int32).squeeze(-1)
    if zeros is not None:
        zeros = None if bool((zeros == OFFSET).all()) else zeros.to(torch.int32).contiguous()
    arrivals = torch.zeros(4 * len(words), dtype=torch.int32, device=codes.device)
    return Int4Weight(words, scales.float().contiguous(), zeros, order, arrivals, rows, columns)


def unpack(weight: Int4Weight) -> torch.Tensor:
    """The codes, uint8 [rows, columns]: the inverse of `pack`."""
    words = weight.words
    nibbles = unpack_words(words.reshape(-1, 1)).to(torch.uint8).view(*words.shape, 2, 2, 2)
    codes = nibbles.permute(_FROM_BLOCKS).reshape(len(words) * ROWS, -1)
    return codes[: weight.rows, : weight.columns].contiguous()


def join(weights: Sequence[Int4Weight]) -> Int4Weight | None:
    """One weight of the rows of all, each's padded to a multiple of 64; None where columns are grouped or ordered
    differently."""
    first = weights[0]
    if any(w.order is not None or (w.columns, w.group) != (first.columns, first.group) for w in weights):
        return None
    ends = [len(w.words) * ROWS - w.rows for w in weights[:-1]] + [0]  # rows of padding behind each
    scales = torch.cat([F.pad(w.scales, (0, end)) for w, end in zip(weights, ends, strict=True)], 1)
    zeros = None
    if any(w.zeros is not None for w in weights):
        all_zeros = [
            torch.full_like(w.scales, OFFSET, dtype=torch.int32) if w.zeros is None else w.zeros for w in weights
        ]
        zeros = torch.cat([F.pad(z, (0, end), value=OFFSET) for z, end in zip(all_zeros, ends, strict=True)], 1)
    words = torch.cat([w.words for w in weights])
    return Int4Weight(
        words, scales, zeros, None, torch.cat([w.arrivals for w in weights]), scales.shape[1], first.columns
    )


def from_compressed_tensors(parts: Mapping[str, torch.Tensor]) -> Int4Weight:
    """`weight_packed` int32 [rows, columns / 8] and `weight_scale` [rows, groups]; of others' files also
    `weight_zero_point` and `weight_g_idx` (formats/int4.py). Raises as `_scattered`."""
    codes, scales = unpack_words(parts["weight_packed"]).to(torch.uint8), parts["weight_scale"].T
    zeros, group = unpack_zero_points(parts), group_of_columns(parts)
    if zeros is not None:
        zeros = zeros.T
    return pack(codes, scales, zeros) if group is None else _scattered(codes, scales, zeros, group, GROUP_INDEX)


def from_gptq(parts: Mapping[str, torch.Tensor]) -> Int4Weight:
    """`qweight` int32 [columns / 8, rows], `qzeros` (less one), `scales` and `g_idx` of version 1 (formats/gptq.py).
    Raises as `_scattered`."""
    codes = unpack_words(parts["qweight"].T).to(torch.uint8)
    return _scattered(codes, parts["scales"], unpack_words(parts["qzeros"]) + 1, parts["g_idx"].long(), "g_idx")


def _scattered(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group: torch.Tensor, name: str
) -> Int4Weight:
    """`pack` of columns whose groups are `group` [columns]: scattered ones are gathered, and the columns then have an
    order. Raises ValueError where groups don't have as many columns each."""
    columns, count = len(group), len(scales)
    order = torch.argsort(group, stable=True)
    whole = torch.arange(columns, device=group.device) // (columns // count)
    if not torch.equal(group[order], whole):
        raise ValueError(f"{name} does not name each of {count} groups for {columns // count} of {columns} columns")
    if torch.equal(group, whole):
        return pack(codes, scales, zeros)
    return pack(codes[:, order], scales, zeros, order)


def from_awq(parts: Mapping[str, torch.Tensor]) -> Int4Weight:
    """`qweight` int32 [columns, rows / 8], `qzeros` [groups, rows / 8], `scales` of version gemm (formats/awq.py)."""
    codes, zeros = (
        unpack_words(parts[name]).to(torch.uint8).unflatten(1, (-1, PER_WORD))[:, :, _AWQ_INVERSE].flatten(1)
        for name in ("qweight", "qzeros")
    )
    return pack(codes.T, parts["scales"], zeros)
