"""Pairs of a token and an expert sorted by expert, where they are many: two launches that count, and then place them.

A program counts the pairs of each expert in its chunk. Where a chunk's pairs of an expert begin is then how many pairs
lower experts have in all, and this one in the chunks before; a program adds that up for its own chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv2quant.kernels.jit import cdiv, jit, power_of_2
from dsv2quant.kernels.launch import PDL, wait

PIECE = 512  # pairs counted at once: of a chunk, a multiple
SLICE = 128  # pairs placed at once
ROWS = 32  # chunks added up at once
CHUNKS = 256  # at most, unless one has more than LARGEST pairs
LARGEST = 4096


@triton.jit
def tiles_of(counts, tile_experts, begins, ends, tiles, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """The tiles of all experts, which have `counts` [BINS] pairs."""
    expert = tl.arange(0, BINS)
    needed = (counts + BLOCK - 1) // BLOCK
    after = tl.cumsum(needed, 0)
    end = tl.cumsum(counts, 0)
    for i in range(tl.max(needed, 0)):
        tile = after - needed + i
        begin = end - counts + i * BLOCK
        tl.store(tile_experts + tile, expert, mask=i < needed)
        tl.store(begins + tile, begin, mask=i < needed)
        tl.store(ends + tile, tl.minimum(begin + BLOCK, end), mask=i < needed)
    for first in range(0, tiles, BINS):
        tile = first + tl.arange(0, BINS)
        idle = (tile >= tl.max(after, 0)) & (tile < tiles)
        tl.store(tile_experts + tile, -1, mask=idle)
        tl.store(begins + tile, 0, mask=idle)
        tl.store(ends + tile, 0, mask=idle)


@jit(do_not_specialize=["count", "chunk"])
def _count_kernel(chosen, counts, count, chunk, EXPERTS: tl.constexpr, BINS: tl.constexpr, PIECE: tl.constexpr):
    """counts [chunks, BINS]: pairs of each expert in a chunk."""
    wait()
    found = tl.zeros([BINS], tl.int32)
    for first in range(0, chunk, PIECE):
        pair = tl.program_id(0) * chunk + first + tl.arange(0, PIECE)
        found += tl.histogram(tl.load(chosen + pair, mask=pair < count, other=BINS - 1).to(tl.int32), BINS)
    expert = tl.arange(0, BINS)
    tl.store(counts + tl.program_id(0) * BINS + expert, tl.where(expert < EXPERTS, found, 0))


@jit(do_not_specialize=["count", "chunk", "chunks", "tiles"])
def _place_kernel(
    chosen, counts, pairs, tile_experts, begins, ends, count, chunk, chunks, tiles,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program 0: the tiles. Each other: the places of a chunk's pairs."""
    wait()
    own = tl.program_id(0) - 1
    expert = tl.arange(0, BINS)
    total, before = tl.zeros([BINS], tl.int32), tl.zeros([BINS], tl.int32)
    for first in range(0, chunks, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        found = tl.load(counts + row * BINS + expert[None, :], mask=row < chunks, other=0)
        total += tl.sum(found, 0)
        before += tl.sum(tl.where(row < own, found, 0), 0)
    if own < 0:
        tiles_of(total, tile_experts, begins, ends, tiles, BLOCK, BINS)
    else:
        begin = tl.cumsum(total, 0) - total + before
        number = tl.arange(0, SLICE)
        earlier = number[None, :] < number[:, None]
        for first in range(0, chunk, SLICE):
            pair = own * chunk + first + number
            key = tl.load(chosen + pair, mask=pair < count, other=BINS - 1).to(tl.int32)
            is_expert = key[:, None] == expert[None, :]
            other = tl.load(chosen + pair, mask=pair < count, other=BINS - 1).to(tl.int32)
            rank = tl.sum((earlier & (other[None, :] == key[:, None])).to(tl.int32), 1)
            place = tl.sum(tl.where(is_expert, begin[None, :], 0), 1) + rank
            tl.store(pairs + place, pair, mask=pair < count)
            begin += tl.sum(is_expert.to(tl.int32), 0)


def place(
    chosen: torch.Tensor,
    pairs: torch.Tensor,
    tile_experts: torch.Tensor,
    begins: torch.Tensor,
    ends: torch.Tensor,
    experts: int,
    block: int,
) -> None:
    """Fills what routing.Routes consists of, for `chosen` [tokens, k], contiguous integers."""
    count, bins = chosen.numel(), power_of_2(experts + 1)
    chunk = PIECE
    while chunk < LARGEST and cdiv(count, chunk) > CHUNKS:
        chunk *= 2
    chunks = cdiv(count, chunk)
    counts = torch.empty(chunks, bins, dtype=torch.int32, device=chosen.device)
    if count:
        _count_kernel[(chunks,)](
            chosen, counts, count, chunk, EXPERTS=experts, BINS=bins, PIECE=PIECE, num_warps=4, launch_pdl=PDL
        )
        _place_kernel[(1 + chunks,)](
            chosen, counts, pairs, tile_experts, begins, ends, count, chunk, chunks, len(tile_experts),
            EXPERTS=experts, BINS=bins, BLOCK=block, SLICE=SLICE, ROWS=ROWS, num_warps=8, launch_pdl=PDL,
        )  # fmt: skip
