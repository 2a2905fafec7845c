"""Attention of one new token per sequence over a contiguous cache of keys and values, each of which a group of heads
shares (arXiv:2305.13245): grouped-query attention, and with groups of one head multi-head attention.

A program takes one group, whose heads read a key and a value once, and its split of a sequence (flash decoding); a
second kernel joins the parts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from dsv2quant.kernels.decoding import (
    FLOATS_8,
    LOG2_E,
    MAX_SPLITS,
    check_call,
    join,
    multiprocessors,
    padded,
    power_of_two,
    share_of,
    widened,
)
from dsv2quant.kernels.jit import cdiv, jit
from dsv2quant.kernels.launch import PDL, wait

MAX_GROUP, MAX_WIDTH = 16, 256  # heads of one key, which are the rows of a matrix product; a head's elements


class Blocks(NamedTuple):
    """How the work is cut: of its split of a sequence a program takes so many `tokens` at a time (of a float8 cache at
    least 32, see `padded`)."""

    tokens: int
    splits: int
    warps: int
    stages: int


@jit(do_not_specialize=["splits"])
def _split_kernel(
    q, cache, lengths, cache_scale, out, lse, groups, capacity, splits, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Program (group, split, sequence). A group's heads are the first GROUP of ROWS, the rows of a matrix product."""
    wait()
    group, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    member, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    heads, head = groups * GROUP, group * GROUP + member
    length = tl.load(lengths + row)
    share = share_of(length, splits, TOKENS)
    begin = split * share
    end = tl.minimum(begin + share, length)

    kept = (member < GROUP)[:, None] & (column < WIDTH)[None, :]
    queries = tl.load(q + (row * heads + head)[:, None] * WIDTH + column[None, :], mask=kept, other=0.0)
    gain = tl.full([ROWS], scale, tl.float32)
    if FP8:  # is multiplied as float16, which holds every code
        queries = queries.to(tl.float32)
        size = power_of_two(tl.max(tl.abs(queries), 1))
        gain *= size * tl.load(cache_scale)
        queries = (queries / size[:, None]).to(tl.float16)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, COLUMNS], tl.float32)
    stride = 2 * groups * WIDTH  # of a token's keys, and then its values
    base = cache + row * capacity * stride + group * WIDTH
    for start in tl.range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = token < end
        there = inside[:, None] & (column < WIDTH)[None, :]
        place = base + token.to(tl.int64)[:, None] * stride + column[None, :]
        keys = tl.load(place, mask=there, other=0.0)
        values = tl.load(place + groups * WIDTH, mask=there, other=0.0)
        if FP8:
            keys, values = widened(keys), widened(values)
        scores = tl.dot(queries, tl.trans(keys))
        scores = tl.where(inside[None, :], scores * gain[:, None], float("-inf"))
        best = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - best[:, None])
        fade = tl.exp2(top - best)
        total = total * fade + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(queries.dtype), values, mixed * fade[:, None])
        top = best

    last = tl.where(total > 0, 1 / total, 0.0)
    if FP8:
        last *= tl.load(cache_scale + 1)
    mixed *= last[:, None]
    part = (row * splits + split) * heads + head
    tl.store(out + part[:, None] * WIDTH + column[None, :], mixed.to(out.dtype.element_ty), mask=kept)
    tl.store(lse + part, top + tl.log2(total), mask=member < GROUP)


def gqa_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    cache_scale: torch.Tensor | None = None,
    longest: int | None = None,
    blocks: Blocks | None = None,
) -> torch.Tensor:
    """Each head's weighted values, [batch, heads, width] of q's dtype: softmax(`scale` · q · keysᵀ) · values.

    q [batch, heads, width], rotated; cache [batch, capacity, 2 · groups · width], of each token the rotated keys of all
    groups and then their values, where a group's heads follow one another: bfloat16 or float16 as q is, or float8 with
    the factors of keys and of values, `cache_scale`, float32 [2]. lengths int32 [batch], at most `longest` (by default
    the capacity); a length of 0 gives zeros. All contiguous, on one device. Heads are of at most
    MAX_WIDTH elements, groups of at most MAX_GROUP heads.
    `longest` and `blocks` decide the speed alone; nothing is read back, so that a CUDA graph may record the call.
    Raises ValueError where a shape or dtype does not fit.
    """
    groups = _groups(q, cache)
    check_call(q, cache, lengths, cache_scale, 2)
    (batch, heads, width), capacity = q.shape, cache.shape[1]
    if blocks is None:
        blocks = blocks_of(batch, groups, width, longest or capacity, multiprocessors(q.device))
    out = torch.empty_like(q)
    parts = out if blocks.splits == 1 else q.new_empty(batch, blocks.splits, heads, width, dtype=torch.float32)
    lse = q.new_empty(batch, blocks.splits, heads, dtype=torch.float32)
    _split_kernel[(groups, blocks.splits, batch)](
        q, cache, lengths, cache_scale, parts, lse, groups, capacity, blocks.splits, scale * LOG2_E,
        GROUP=heads // groups, WIDTH=width, COLUMNS=padded(width), ROWS=MAX_GROUP, TOKENS=blocks.tokens,
        FP8=cache.dtype in FLOATS_8,
        num_warps=blocks.warps, num_stages=blocks.stages, enable_fp_fusion=True, launch_pdl=PDL,
    )  # fmt: skip
    if blocks.splits > 1:
        join(parts, lse, lengths, out, blocks.tokens)
    return out


def blocks_of(batch: int, groups: int, width: int, longest: int, multiprocessors: int) -> Blocks:
    """A choice for sequences of up to `longest` tokens: as many splits as run at once. A multiprocessor's shared memory
    holds three programs."""
    cut = Blocks(tokens=64 if width <= 128 else 32, splits=1, warps=4, stages=3)
    fitting = 3 * multiprocessors // (batch * groups)
    return cut._replace(splits=max(1, min(fitting, cdiv(longest, cut.tokens), MAX_SPLITS)))


def _groups(q: torch.Tensor, cache: torch.Tensor) -> int:
    """How many keys a token of the cache has. Raises ValueError where shapes do not fit."""
    if q.ndim != 3 or cache.ndim != 3 or q.shape[0] != cache.shape[0] or cache.shape[2] % (2 * q.shape[2]):
        raise ValueError(
            f"q is {tuple(q.shape)} and the cache {tuple(cache.shape)}; they must be [batch, heads, width] and "
            "[batch, capacity, 2 · groups · width]"
        )
    heads, width = q.shape[1:]
    groups = cache.shape[2] // (2 * width)
    if heads % groups or heads // groups > MAX_GROUP:
        raise ValueError(f"{heads} heads share {groups} keys; a key serves 1 to {MAX_GROUP} heads")
    if width > MAX_WIDTH:
        raise ValueError(f"a head has {width} columns; at most {MAX_WIDTH} are computed")
    return groups
