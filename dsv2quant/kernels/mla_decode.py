"""Absorbed MLA attention of one new token per sequence over a contiguous cache of latents (arXiv:2405.04434, 2.1).

Heads share one key per token, [latent | rotated key], whose latent part is the value, too, so a cache row is read once
for both roles and all heads. Sequences are split over programs (flash decoding); a second kernel joins their parts.

On an H200, 64 sequences of 4096 tokens and 16 heads take 85 µs from a BF16 cache, 0.82 of what its bandwidth allows.
What this kernel does slowly others do on Hopper in the models' shape: mla_decode_fp8.py a float8 cache, which takes 64
µs instead of 145, and mla_decode_ws.py many heads over a 16-bit cache, of which 128 take 151 µs instead of 272, 0.60 of
what the arithmetic allows.
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
    is_hopper,
    join,
    multiprocessors,
    padded,
    power_of_two,
    share_of,
    widened,
)
from dsv2quant.kernels.jit import cdiv, jit
from dsv2quant.kernels.launch import PDL, wait
from dsv2quant.kernels.mla_decode_fp8 import mla_decode_fp8
from dsv2quant.kernels.mla_decode_ws import mla_decode_ws

FEW_HEADS = 32  # in programs of 16; more go in programs of 64


class Blocks(NamedTuple):
    """How the work is cut: a program takes `heads` heads and, of its share of a sequence, `tokens` tokens at a time (of
    a float8 cache at least 32, see `padded`). `specialized`: by a kernel of mla_decode_fp8.py or mla_decode_ws.py,
    whose blocks and warps are fixed."""

    heads: int
    tokens: int
    splits: int
    warps: int
    stages: int
    specialized: bool = False


@jit(do_not_specialize=["splits"])
def _split_kernel(
    q, cache, lengths, cache_scale, out, lse, heads, capacity, splits, scale,
    RANK: tl.constexpr, ROPE: tl.constexpr, LATENTS: tl.constexpr, TURNED: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    wait()
    WIDTH: tl.constexpr = RANK + ROPE
    split, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    latent, turned = tl.arange(0, LATENTS), tl.arange(0, TURNED)
    length = tl.load(lengths + row)
    share = share_of(length, splits, TOKENS)
    begin = split * share
    end = tl.minimum(begin + share, length)

    q_head = q + row * heads * WIDTH + head[:, None] * WIDTH
    q_c = tl.load(q_head + latent[None, :], mask=(head < heads)[:, None] & (latent < RANK)[None, :], other=0.0)
    q_r = tl.load(q_head + RANK + turned[None, :], mask=(head < heads)[:, None] & (turned < ROPE)[None, :], other=0.0)
    gain = tl.full([HEADS], scale, tl.float32)
    if FP8:  # is multiplied as float16, which holds every code; powers of two bring the queries into its range
        stored = tl.load(cache_scale)
        q_c, q_r = q_c.to(tl.float32), q_r.to(tl.float32)
        size = power_of_two(tl.maximum(tl.max(tl.abs(q_c), 1), tl.max(tl.abs(q_r), 1)))
        gain *= size * stored
        q_c, q_r = (q_c / size[:, None]).to(tl.float16), (q_r / size[:, None]).to(tl.float16)

    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    mixed = tl.zeros([HEADS, LATENTS], tl.float32)
    base = cache + row * capacity * WIDTH
    for start in tl.range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = token < end
        key = base + token[:, None] * WIDTH
        c = tl.load(key + latent[None, :], mask=inside[:, None] & (latent < RANK)[None, :], other=0.0)
        r = tl.load(key + RANK + turned[None, :], mask=inside[:, None] & (turned < ROPE)[None, :], other=0.0)
        if FP8:
            c, r = widened(c), widened(r)
        scores = tl.dot(q_r, tl.trans(r), tl.dot(q_c, tl.trans(c)))
        scores = tl.where(inside[None, :], scores * gain[:, None], float("-inf"))
        best = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - best[:, None])
        fade = tl.exp2(top - best)
        total = total * fade + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(q_c.dtype), c, mixed * fade[:, None])
        top = best

    last = tl.where(total > 0, 1 / total, 0.0)
    if FP8:
        last *= stored
    mixed *= last[:, None]
    place = (row * splits + split) * heads + head
    kept = (head < heads)[:, None] & (latent < RANK)[None, :]
    tl.store(out + place[:, None] * RANK + latent[None, :], mixed.to(out.dtype.element_ty), mask=kept)
    tl.store(lse + place, top + tl.log2(total), mask=head < heads)


def mla_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    lengths: torch.Tensor,
    rank: int,
    scale: float,
    cache_scale: torch.Tensor | None = None,
    longest: int | None = None,
    dtype: torch.dtype = torch.float32,
    blocks: Blocks | None = None,
) -> torch.Tensor:
    """The latents as each head weighs them: `LatentAttention.mixed` for one new token, [batch, heads, rank] of `dtype`.

    q [batch, heads, rank + rope] through kv_b's K half, then the rotated part; cache [batch, capacity, rank + rope]
    likewise: bfloat16 or float16 as q is, or float8 with its one factor `cache_scale`, float32 [1]. lengths int32
    [batch], at most `longest` (by default the capacity); a length of 0 gives zeros. All contiguous, on one device.
    `longest` and `blocks` decide the speed alone; nothing is read back, so that a CUDA graph may record the call.
    Raises ValueError where a shape or dtype does not fit.
    """
    _check(q, cache, lengths, rank, cache_scale)
    (batch, heads, width), capacity = q.shape, cache.shape[1]
    fp8 = cache.dtype in FLOATS_8
    if blocks is None:
        blocks = blocks_for(q, cache, rank, longest or capacity)
    out = q.new_empty(batch, heads, rank, dtype=dtype)
    parts = out if blocks.splits == 1 else q.new_empty(batch, blocks.splits, heads, rank, dtype=torch.float32)
    lse = q.new_empty(batch, blocks.splits, heads, dtype=torch.float32)
    if blocks.specialized and cache_scale is not None:
        mla_decode_fp8(q, cache, lengths, scale * LOG2_E, cache_scale, blocks.splits, parts, lse)
    elif blocks.specialized:
        mla_decode_ws(q, cache, lengths, scale * LOG2_E, blocks.splits, parts, lse)
    else:
        _split_kernel[(cdiv(heads, blocks.heads), blocks.splits, batch)](
            q, cache, lengths, cache_scale, parts, lse, heads, capacity, blocks.splits, scale * LOG2_E,
            RANK=rank, ROPE=width - rank, LATENTS=padded(rank), TURNED=padded(width - rank),
            HEADS=blocks.heads, TOKENS=blocks.tokens, FP8=fp8,
            num_warps=blocks.warps, num_stages=blocks.stages, enable_fp_fusion=True, launch_pdl=PDL,
        )  # fmt: skip
    if blocks.splits > 1:
        join(parts, lse, lengths, out, blocks.tokens)
    return out


def blocks_for(q: torch.Tensor, cache: torch.Tensor, rank: int, longest: int) -> Blocks:
    """`blocks_of` these arguments of `mla_decode`."""
    (batch, heads, width), place = q.shape, q.device
    served = is_hopper(place) and (rank, width) == (512, 576) and cache.data_ptr() % 16 == 0
    return blocks_of(batch, heads, longest, multiprocessors(place), cache.dtype.itemsize if served else None)


def blocks_of(batch: int, heads: int, longest: int, multiprocessors: int, specialized_for: int | None = None) -> Blocks:
    """A choice for sequences of up to `longest` tokens. A multiprocessor's shared memory holds one program, and as many
    splits as then run at once were the fastest on an H200, or within 1 % of it in calls of more than 12 µs.
    `specialized_for`: the bytes of a column of the cache, where Hopper's specialized kernels serve its shape; two
    warpgroups of theirs take turns with a program's steps, of which it should have two or more."""
    many = heads > FEW_HEADS and specialized_for != 1  # which takes 16 heads at a time
    cut = Blocks(64, 64, 1, warps=8, stages=2) if many else Blocks(16, 64, 1, warps=4, stages=3)
    fitting = multiprocessors // (batch * cdiv(heads, cut.heads))
    steps = cdiv(longest, cut.tokens)
    # Programs of two steps or fewer gain less from warpgroups' turns than these cost.
    worth = many and steps > 2 * max(fitting, 1) if specialized_for == 2 else specialized_for == 1
    if worth:
        cut = cut._replace(warps=4, stages=2, specialized=True)
        steps = cdiv(steps, 2)
    return cut._replace(splits=max(1, min(fitting, steps, MAX_SPLITS)))


def _check(
    q: torch.Tensor, cache: torch.Tensor, lengths: torch.Tensor, rank: int, cache_scale: torch.Tensor | None
) -> None:
    if q.ndim != 3 or cache.ndim != 3 or q.shape[0] != cache.shape[0] or q.shape[2] != cache.shape[2]:
        raise ValueError(
            f"q is {tuple(q.shape)} and the cache {tuple(cache.shape)}; they must be [batch, heads, width] and "
            "[batch, capacity, width]"
        )
    if not 0 < rank < q.shape[2]:
        raise ValueError(f"of {q.shape[2]} columns {rank} cannot be latents")
    check_call(q, cache, lengths, cache_scale, 1)
