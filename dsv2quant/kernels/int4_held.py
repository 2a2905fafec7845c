"""EXPERIMENT: int4_gemm's kernel for few tokens with all operands of a part of K held in registers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv2quant.kernels.checks import INTERPRETED
from dsv2quant.kernels.int4_gemm import _codes
from dsv2quant.kernels.int4_layout import Int4Weight


class Held(NamedTuple):
    split: int
    held: int


@triton.jit(do_not_specialize=["M"])
def _held_kernel(
    x, words, scales, out, partial, arrivals, M, N, K, spans: tl.constexpr,
    SPANS: tl.constexpr, STEPS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, HELD: tl.constexpr,
    MAGIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    DEPTH: tl.constexpr = 16 * STEPS * SPANS
    LANES: tl.constexpr = 128 * STEPS
    PART: tl.constexpr = spans // SPANS // SPLIT
    split, by_rows, by_tokens = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = by_rows * 64 + tl.arange(0, 64)
    m = by_tokens * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, DEPTH)
    block = by_rows * spans * LANES + tl.arange(0, SPANS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    sums = tl.zeros((64, TOKENS), tl.float32)
    for first in tl.range(0, PART, HELD, num_stages=1):
        held, values, factors = (), (), ()
        for i in tl.static_range(HELD):
            group = split * PART + first + i
            held = held + (tl.load(words + block + group * (SPANS * LANES), eviction_policy="evict_first"),)
            factors = factors + (tl.load(scales + group * N + n, n < N, 0.0),)
            values = values + (tl.load(x + m[None, :] * K + (group * DEPTH + k[:, None]), m[None, :] < M, 0.0),)
        tl.debug_barrier()
        if M > 0:
            for i in tl.static_range(HELD):
                eight = tl.full((SPANS, LANES), 8 * 0x10001 + MAGIC if ASM else 8, tl.int32)
                a = _codes(held[i], eight, eight, x.dtype.element_ty, MAGIC, ASM)
                a = a.reshape(SPANS, 4, 8, 4, STEPS, 2, 2, 2)  # span, warp, r, q, step, p, c, h
                a = a.trans(1, 7, 2, 0, 4, 6, 3, 5).reshape(64, DEPTH)
                sums += tl.dot(a, values[i], input_precision="ieee") * factors[i][:, None]
    at = out + m[:, None] * N + n[None, :]
    stored = (m[:, None] < M) & (n[None, :] < N)
    if SPLIT == 1:
        tl.store(at, tl.trans(sums).to(out.dtype.element_ty), stored)
    else:
        tile = by_tokens * tl.num_programs(1) + by_rows
        SIZE: tl.constexpr = 64 * TOKENS
        there = (m < M)[None, :] & (tl.arange(0, 64) >= 0)[:, None]
        cell = partial + tile * (SPLIT * SIZE) + tl.arange(0, 64)[:, None] + tl.arange(0, TOKENS)[None, :] * 64
        tl.store(cell + split * SIZE, sums, there)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLIT - 1:
            tl.store(arrivals + tile, 0)
            total = tl.zeros((64, TOKENS), tl.float32)
            for part in tl.static_range(SPLIT):
                total += tl.load(cell + part * SIZE, there, 0.0, cache_modifier=".cg")
            tl.store(at, tl.trans(total).to(out.dtype.element_ty), stored)


def launch(x: torch.Tensor, weight: Int4Weight, out: torch.Tensor, share: Held, magic: int) -> None:
    tokens, columns = x.shape
    blocks, spans, *_, steps = weight.words.shape
    wide = 16  # 8 would not be wgmma
    grid = (share.split, blocks, triton.cdiv(tokens, wide))
    partial = torch.empty(grid[0] * grid[1] * grid[2] * 64 * wide, device=x.device) if share.split > 1 else None
    _held_kernel[grid](
        x, weight.words, weight.scales, out, partial, weight.arrivals, tokens, weight.rows, columns, spans,
        SPANS=2, STEPS=steps, TOKENS=wide, SPLIT=share.split, HELD=share.held, MAGIC=magic, ASM=not INTERPRETED,
        num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
