"""Absorbed MLA attention for many heads over a 16-bit cache, on Hopper: mla_decode.py's, whose interface it has.

With 64 heads a step's products, not its bytes, take the time, and its sums [64, 512] fill two warpgroups' registers. Of
each two steps one warpgroup makes the first's scores, the other the second's; then both take both steps' weights, each
for its half of the latents. While one weighs its scores the other's products keep the matrix units busy. Keys are read
twice from where the tensor memory accelerator put them, as keys and as values, and halves are fetched anew as soon as
nobody needs them. What one warpgroup's weights are for the other lies where the rotated keys of that step were.

The running maxima go from one to the other: the second's, of both steps, scale everything.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv2quant.kernels.jit import cdiv, gluon_jit
from dsv2quant.kernels.tiles import barrier, described

WIDTH: gl.constexpr = gl.constexpr(576)
HEADS: gl.constexpr = gl.constexpr(64)  # of a program
TOKENS: gl.constexpr = gl.constexpr(64)  # of a step
HALF: gl.constexpr = gl.constexpr(256)  # of the latents
SCORES: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SUMS: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
WEIGHTS: gl.constexpr = gl.constexpr(gl.DotOperandLayout(0, SUMS.value, 2))
BY_SCORE: gl.constexpr = gl.constexpr(gl.SliceLayout(1, SCORES.value))
BY_HEAD: gl.constexpr = gl.constexpr(gl.SliceLayout(1, SUMS.value))
STORED: gl.constexpr = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
LINE: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
OWN: gl.constexpr = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def _put(columns, keys, full, place, at, column, turned, rotated, ROTATED: gl.constexpr):
    """Fetch half a step's latents, and its rotated keys with one of the halves."""
    mbarrier.expect(full.index(place), TOKENS * (HALF + (64 if ROTATED else 0)) * 2)
    tma.async_copy_global_to_shared(columns, [at, column], full.index(place), keys.index(place % 2))
    if ROTATED:
        tma.async_copy_global_to_shared(turned, [at, 512], full.index(place), rotated.index(place % 2))


@gluon.jit
def _load(latents, turned, left, right, rotated, full, empty, first, pairs):
    """Halves 0, 1: the left ones of both steps; 2, 3: the right ones."""
    for pair in range(pairs):
        at = first + pair * 2 * TOKENS
        free = (pair + 1) % 2
        mbarrier.wait(empty.index(0), free)
        _put(latents, left, full, 0, at, 0, turned, rotated, False)
        mbarrier.wait(empty.index(3), free)
        _put(latents, right, full, 3, at + TOKENS, HALF, turned, rotated, False)
        mbarrier.wait(empty.index(2), free)
        _put(latents, right, full, 2, at, HALF, turned, rotated, True)
        mbarrier.wait(empty.index(1), free)
        _put(latents, left, full, 1, at + TOKENS, 0, turned, rotated, True)


@gluon.jit
def _scores(q_l, q_r, q_t, left, right, rotated, full, step: gl.constexpr, phase, start, end, scale):
    """Of one step, scaled, -inf from `end`."""
    scores = warpgroup_mma_init(gl.zeros([HEADS, TOKENS], gl.float32, SCORES))
    mbarrier.wait(full.index(step), phase)
    scores = warpgroup_mma(q_l, left.index(step).permute([1, 0]), scores, use_acc=False, is_async=True)
    mbarrier.wait(full.index(2 + step), phase)
    scores = warpgroup_mma(q_r, right.index(step).permute([1, 0]), scores, is_async=True)
    scores = warpgroup_mma(q_t, rotated.index(step).permute([1, 0]), scores, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    token = start + step * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(0, SCORES))
    return gl.where((token < end)[None, :], scores * scale, float("-inf"))


@gluon.jit
def _cleared(values, start, end):
    """Zeros where a step's tokens are behind the end: anything may be there, of which a share of 0 may make a NaN."""
    if start + TOKENS > end:
        token = start + gl.arange(0, TOKENS, gl.SliceLayout(1, OWN))
        for j in gl.static_range(HALF // 64):
            part = values.slice(j * 64, 64, 1)
            part.store(gl.where((token < end)[:, None], part.load(OWN), 0.0))
        fence_async_shared()
        barrier()


@gluon.jit
def _faded(mixed, fade):
    return mixed * gl.convert_layout(fade, BY_HEAD)[:, None]


@gluon.jit
def _written(mixed, top, total, other_total, out, lse, heads, splits, row, split, COLUMN: gl.constexpr):
    summed = total + other_total
    by = gl.convert_layout(1 / summed, BY_HEAD)
    head = gl.program_id(0) * HEADS + gl.arange(0, HEADS, BY_HEAD)
    place = (row * splits + split) * heads + head
    latent = COLUMN + gl.arange(0, HALF, gl.SliceLayout(0, SUMS))
    at = out + place[:, None] * 512 + latent[None, :]
    gl.store(at, (mixed * by[:, None]).to(out.dtype.element_ty), mask=(head < heads)[:, None])
    if COLUMN == 0:
        gl.store(lse + place, gl.convert_layout(top + gl.log2(summed), BY_HEAD), mask=head < heads)


@gluon.jit
def _first(
    q_l, q_r, q_t, left, right, rotated, full, empty, tops, sums, told, begin, end, pairs, scale, out, lse, heads,
    splits, row, split,
):  # fmt: skip
    """The warpgroup of first steps and of the latents' left half. `told`: 0, the first's maxima are there; 1, the
    second's and its weights; 2, the first's weights; 3, 4: the sums of first and second."""
    DTYPE: gl.constexpr = left.dtype
    mixed = gl.zeros([HEADS, HALF], gl.float32, SUMS)
    top = gl.full([HEADS], float("-inf"), gl.float32, BY_SCORE)
    total = gl.zeros([HEADS], gl.float32, BY_SCORE)
    for pair in range(pairs):
        phase = pair % 2
        start = begin + pair * 2 * TOKENS
        scores = _scores(q_l, q_r, q_t, left, right, rotated, full, 0, phase, start, end, scale)
        best = gl.maximum(top, gl.max(scores, 1))
        tops.index(0).store(best)
        barrier()
        mbarrier.arrive(told.index(0), count=1)
        weights = gl.exp2(scores - best[:, None])
        fade = gl.exp2(top - best)
        total = total * fade + gl.sum(weights, 1)
        mixed = _faded(mixed, fade)
        _cleared(left.index(0), start, end)
        shares = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
        weighed = warpgroup_mma(shares, left.index(0), mixed, is_async=True)
        mbarrier.wait(told.index(1), phase)
        top = tops.index(1).load(BY_SCORE)
        fade = gl.exp2(best - top)
        rotated.index(0).store((weights * fade[:, None]).to(DTYPE))
        fence_async_shared()
        barrier()
        mbarrier.arrive(told.index(2), count=1)
        total = total * fade
        mixed, _held = warpgroup_mma_wait(0, deps=[weighed, shares])
        barrier()
        mbarrier.arrive(empty.index(0), count=1)
        mixed = _faded(mixed, fade)
        mbarrier.wait(full.index(1), phase)
        _cleared(left.index(1), start + TOKENS, end)
        mixed = warpgroup_mma(rotated.index(1), left.index(1), mixed)
        barrier()
        mbarrier.arrive(empty.index(1), count=1)
    sums.index(0).store(total)
    barrier()
    mbarrier.arrive(told.index(3), count=1)
    mbarrier.wait(told.index(4), 0)
    _written(mixed, top, total, sums.index(1).load(BY_SCORE), out, lse, heads, splits, row, split, 0)


@gluon.jit
def _second(
    q_l, q_r, q_t, left, right, rotated, full, empty, tops, sums, told, begin, end, pairs, scale, out, lse, heads,
    splits, row, split,
):  # fmt: skip
    """The warpgroup of second steps and of the latents' right half."""
    DTYPE: gl.constexpr = left.dtype
    mixed = gl.zeros([HEADS, HALF], gl.float32, SUMS)
    top = gl.full([HEADS], float("-inf"), gl.float32, BY_SCORE)
    total = gl.zeros([HEADS], gl.float32, BY_SCORE)
    for pair in range(pairs):
        phase = pair % 2
        start = begin + pair * 2 * TOKENS
        scores = _scores(q_l, q_r, q_t, left, right, rotated, full, 1, phase, start, end, scale)
        mbarrier.wait(told.index(0), phase)
        best = gl.maximum(tops.index(0).load(BY_SCORE), gl.max(scores, 1))
        weights = gl.exp2(scores - best[:, None])
        tops.index(1).store(best)
        rotated.index(1).store(weights.to(DTYPE))
        fence_async_shared()
        barrier()
        mbarrier.arrive(told.index(1), count=1)
        fade = gl.exp2(top - best)
        top = best
        total = total * fade + gl.sum(weights, 1)
        mixed = _faded(mixed, fade)
        _cleared(right.index(1), start + TOKENS, end)
        shares = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
        mixed = warpgroup_mma(shares, right.index(1), mixed)
        barrier()
        mbarrier.arrive(empty.index(3), count=1)
        mbarrier.wait(full.index(2), phase)
        _cleared(right.index(0), start, end)
        mbarrier.wait(told.index(2), phase)
        mixed = warpgroup_mma(rotated.index(0), right.index(0), mixed)
        barrier()
        mbarrier.arrive(empty.index(2), count=1)
    sums.index(1).store(total)
    barrier()
    mbarrier.arrive(told.index(4), count=1)
    mbarrier.wait(told.index(3), 0)
    _written(mixed, top, total, sums.index(0).load(BY_SCORE), out, lse, heads, splits, row, split, HALF)


@gluon.jit
def _zeros(out, heads, place):
    for j in gl.static_range(512 // 64):
        head = gl.program_id(0) * HEADS + gl.arange(0, HEADS, gl.SliceLayout(1, OWN))
        at = (place + head)[:, None] * 512 + j * 64 + gl.arange(0, 64, gl.SliceLayout(0, OWN))[None, :]
        gl.store(out + at, gl.zeros([HEADS, 64], out.dtype.element_ty, OWN), mask=(head < heads)[:, None])


@gluon_jit(do_not_specialize=["splits"])
def ws_kernel(latents, turned, q, lengths, out, lse, heads, capacity, splits, scale):
    """As mla_decode._split_kernel, of 64 heads and, a time, of twice 64 tokens."""
    gdc_wait()
    gdc_launch_dependents()
    DTYPE: gl.constexpr = q.dtype.element_ty
    split, row = gl.program_id(1), gl.program_id(2).to(gl.int64)
    length = gl.load(lengths + row)
    share = gl.cdiv(gl.cdiv(length, splits), TOKENS) * TOKENS
    begin = split * share
    end = gl.minimum(begin + share, length)
    if begin < end:
        left = gl.allocate_shared_memory(DTYPE, [2, TOKENS, HALF], latents.layout)
        right = gl.allocate_shared_memory(DTYPE, [2, TOKENS, HALF], latents.layout)
        rotated = gl.allocate_shared_memory(DTYPE, [2, TOKENS, 64], turned.layout)
        q_l = gl.allocate_shared_memory(DTYPE, [HEADS, HALF], STORED)
        q_r = gl.allocate_shared_memory(DTYPE, [HEADS, HALF], STORED)
        q_t = gl.allocate_shared_memory(DTYPE, [HEADS, 64], STORED)
        tops = gl.allocate_shared_memory(gl.float32, [2, HEADS], LINE)
        sums = gl.allocate_shared_memory(gl.float32, [2, HEADS], LINE)
        full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
        told = gl.allocate_shared_memory(gl.int64, [5, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(4):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=1)
        for i in gl.static_range(5):
            mbarrier.init(told.index(i), count=1)
        own = gl.program_id(0) * HEADS + gl.arange(0, HEADS, gl.SliceLayout(1, OWN))
        column = gl.arange(0, 64, gl.SliceLayout(0, OWN))
        at = q + (row * heads + own[:, None]) * WIDTH + column[None, :]
        for j in gl.static_range(HALF // 64):
            q_l.slice(j * 64, 64, 1).store(gl.load(at + j * 64, mask=(own < heads)[:, None], other=0.0))
            q_r.slice(j * 64, 64, 1).store(gl.load(at + (HALF + j * 64), mask=(own < heads)[:, None], other=0.0))
        q_t.store(gl.load(at + 512, mask=(own < heads)[:, None], other=0.0))
        fence_async_shared()
        barrier()
        pairs = gl.cdiv(end - begin, 2 * TOKENS)
        first = (row * capacity + begin).to(gl.int32)
        both = (
            q_l, q_r, q_t, left, right, rotated, full, empty, tops, sums, told, begin, end, pairs, scale, out, lse,
            heads, splits, row, split,
        )  # fmt: skip
        gl.warp_specialize(
            [
                (_first, both),
                (_second, both),
                (_load, (latents, turned, left, right, rotated, full, empty, first, pairs)),
            ],
            [4, 1],
            [224, 24],
        )
    else:  # joining leaves empty parts out; what is not joined is zero
        _zeros(out, heads, (row * splits + split) * heads)


def mla_decode_ws(
    q: torch.Tensor, cache: torch.Tensor, lengths: torch.Tensor, scale: float, splits: int,
    parts: torch.Tensor, lse: torch.Tensor,
) -> None:  # fmt: skip
    """The parts of `splits` shares of each sequence and their log2-sums, as mla_decode's `join` takes them."""
    (batch, heads, _), capacity = q.shape, cache.shape[1]
    latents, turned = (described(cache.view(-1, 576), 64, columns) for columns in (256, 64))
    ws_kernel[(cdiv(heads, 64), splits, batch)](
        latents, turned, q, lengths, parts, lse, heads, capacity, splits, scale, num_warps=4, launch_pdl=True
    )
