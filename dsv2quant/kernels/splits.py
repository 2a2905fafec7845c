"""How the programs among which K is split bring their sums together."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finish(
    sums, at, stored, factors, partial, arrivals, tile, split,
    HEIGHT: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Store [HEIGHT, TOKENS] `at` [TOKENS, HEIGHT] where `stored`, times the `factors` of tokens: by the last of SPLIT
    programs of a tile, which adds all their sums in order."""
    sums = tl.trans(sums)
    if SPLIT == 1:
        _store(sums, at, stored, factors)
    else:
        SIZE: tl.constexpr = HEIGHT * TOKENS
        cell = partial + tile.to(tl.int64) * (SPLIT * SIZE) + tl.arange(0, TOKENS)[:, None] * HEIGHT
        cell += tl.arange(0, HEIGHT)[None, :]
        tl.store(cell + split * SIZE, sums, stored)
        tl.debug_barrier()  # every thread's sums are out before this program counts itself
        if tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLIT - 1:
            tl.store(arrivals + tile, 0)
            total = tl.zeros((TOKENS, HEIGHT), tl.float32)
            for part in tl.static_range(SPLIT):
                total += tl.load(cell + part * SIZE, stored, 0.0, cache_modifier=".cg")
            _store(total, at, stored, factors)


@triton.jit
def _store(sums, at, stored, factors):
    if factors is not None:
        sums *= factors[:, None]
    tl.store(at, sums.to(at.dtype.element_ty), stored)
