"""Absorbed MLA attention for many heads over a 16-bit cache, on Hopper: mla_decode.py's, whose interface it has.

With 64 heads a step's products, not its bytes, take the time. Two warpgroups split the 64 keys of the scores and the
512 latents of the sums; the tensor memory accelerator fetches one step's keys while another's are multiplied, which are
then read twice from where they lie: as keys, and as values.
"""

from __future__ import annotations

import torch
import triton
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

RANK: gl.constexpr = gl.constexpr(512)
ROPE: gl.constexpr = gl.constexpr(64)
WIDTH: gl.constexpr = gl.constexpr(576)
HEADS: gl.constexpr = gl.constexpr(64)  # of a program
TOKENS: gl.constexpr = gl.constexpr(64)  # of a step
BYTES: gl.constexpr = gl.constexpr(64 * 576 * 2)
SCORES: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
SUMS: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16]))
STORED: gl.constexpr = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
OWN: gl.constexpr = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # Triton 3.7 has it by its new name


@gluon.jit
def _fetch(latents, turned, c, r, full, first, step, pred):
    """Step `step` of the rows from `first`, into its buffer."""
    mbarrier.expect(full.index(step % 2), BYTES, pred=pred)
    tma.async_copy_global_to_shared(
        latents, [first + step * TOKENS, 0], full.index(step % 2), c.index(step % 2), pred=pred
    )
    tma.async_copy_global_to_shared(
        turned, [first + step * TOKENS, RANK], full.index(step % 2), r.index(step % 2), pred=pred
    )


@gluon.jit
def _scores(q_c, q_r, c, r, step):
    scores = warpgroup_mma_init(gl.zeros([HEADS, TOKENS], gl.float32, SCORES))
    scores = warpgroup_mma(q_c, c.index(step % 2).permute([1, 0]), scores, use_acc=False, is_async=True)
    return warpgroup_mma(q_r, r.index(step % 2).permute([1, 0]), scores, is_async=True)


@gluon.jit
def _weights(scores, top, start, end, scale):
    """(weights, the new maxima, what earlier sums fade by)."""
    token = start + gl.arange(0, TOKENS, gl.SliceLayout(0, SCORES))
    scores = gl.where((token < end)[None, :], scores * scale, float("-inf"))
    best = gl.maximum(top, gl.max(scores, 1))
    return gl.exp2(scores - best[:, None]), best, gl.exp2(top - best)


@gluon.jit(do_not_specialize=["splits"])
def tma_kernel(latents, turned, q, lengths, out, lse, heads, capacity, splits, scale):
    """As mla_decode._split_kernel, of 64 heads and, a time, of 64 tokens."""
    gdc_wait()
    gdc_launch_dependents()
    BY_HEAD: gl.constexpr = gl.SliceLayout(1, SUMS)
    split, row = gl.program_id(1), gl.program_id(2).to(gl.int64)
    length = gl.load(lengths + row)
    share = gl.cdiv(gl.cdiv(length, splits), TOKENS) * TOKENS
    begin = split * share
    end = gl.minimum(begin + share, length)
    steps = gl.cdiv(end - begin, TOKENS)
    mixed = gl.zeros([HEADS, RANK], gl.float32, SUMS)
    top = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([HEADS, TOKENS], gl.float32, SCORES)
    if begin < end:
        first = (row * capacity + begin).to(gl.int32)
        c = gl.allocate_shared_memory(q.dtype.element_ty, [2, TOKENS, RANK], latents.layout)
        r = gl.allocate_shared_memory(q.dtype.element_ty, [2, TOKENS, ROPE], turned.layout)
        full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(full.index(i), count=1)
        fence_async_shared()
        barrier()
        _fetch(latents, turned, c, r, full, first, 0, True)
        _fetch(latents, turned, c, r, full, first, 1, steps > 1)

        q_c = gl.allocate_shared_memory(q.dtype.element_ty, [HEADS, RANK], STORED)
        q_r = gl.allocate_shared_memory(q.dtype.element_ty, [HEADS, ROPE], STORED)
        weights = gl.allocate_shared_memory(q.dtype.element_ty, [HEADS, TOKENS], STORED)
        own = gl.program_id(0) * HEADS + gl.arange(0, HEADS, gl.SliceLayout(1, OWN))
        column = gl.arange(0, 64, gl.SliceLayout(0, OWN))
        at = q + (row * heads + own[:, None]) * WIDTH + column[None, :]
        for j in gl.static_range(RANK // 64):
            q_c.slice(j * 64, 64, 1).store(gl.load(at + j * 64, mask=(own < heads)[:, None], other=0.0))
        q_r.store(gl.load(at + RANK, mask=(own < heads)[:, None], other=0.0))
        fence_async_shared()
        barrier()

        mbarrier.wait(full.index(0), 0)
        scores = warpgroup_mma_wait(0, deps=[_scores(q_c, q_r, c, r, 0)])
        total, top, fade = _weights(scores, top, begin, end, scale)
        weights.store(total.to(q.dtype.element_ty))
        fence_async_shared()
        barrier()
        for step in range(1, steps):
            weighed = warpgroup_mma(weights, c.index((step - 1) % 2), mixed, is_async=True)
            mbarrier.wait(full.index(step % 2), (step // 2) % 2)
            coming = _scores(q_c, q_r, c, r, step)
            mixed = warpgroup_mma_wait(2, deps=[weighed])
            barrier()  # all warps are through with the step before
            _fetch(latents, turned, c, r, full, first, step + 1, step + 1 < steps)
            scores = warpgroup_mma_wait(0, deps=[coming])
            shares, top, fade = _weights(scores, top, begin + step * TOKENS, end, scale)
            weights.store(shares.to(q.dtype.element_ty))
            total = total * fade[:, None] + shares
            mixed = mixed * gl.convert_layout(fade, BY_HEAD)[:, None]
            fence_async_shared()
            barrier()
        last = c.index((steps - 1) % 2)
        if steps * TOKENS > end - begin:  # behind the end there may be anything, of which a share of 0 may make a NaN
            token = begin + (steps - 1) * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(1, OWN))
            for j in gl.static_range(RANK // 64):
                part = last.slice(j * 64, 64, 1)
                part.store(gl.where((token < end)[:, None], part.load(OWN), 0.0))
            fence_async_shared()
            barrier()
        mixed = warpgroup_mma(weights, last, mixed)

    summed = gl.sum(total, 1)
    by = gl.convert_layout(gl.where(summed > 0, 1 / summed, 0.0), BY_HEAD)
    head = gl.program_id(0) * HEADS + gl.arange(0, HEADS, BY_HEAD)
    place = (row * splits + split) * heads + head
    latent = gl.arange(0, RANK, gl.SliceLayout(0, SUMS))
    at = out + place[:, None] * RANK + latent[None, :]
    gl.store(at, (mixed * by[:, None]).to(out.dtype.element_ty), mask=(head < heads)[:, None])
    gl.store(lse + place, gl.convert_layout(top + gl.log2(summed), BY_HEAD), mask=head < heads)


def mla_decode_tma(
    q: torch.Tensor, cache: torch.Tensor, lengths: torch.Tensor, scale: float, splits: int,
    parts: torch.Tensor, lse: torch.Tensor,
) -> None:  # fmt: skip
    """The parts of `splits` shares of each sequence and their log2-sums, as mla_decode's `join` takes them."""
    (batch, heads, _), capacity = q.shape, cache.shape[1]
    kind = gl.bfloat16 if cache.dtype == torch.bfloat16 else gl.float16
    latents, turned = (
        TensorDescriptor.from_tensor(
            cache.view(-1, 576), [64, columns], gl.NVMMASharedLayout.get_default_for([64, columns], kind)
        )
        for columns in (512, 64)
    )
    tma_kernel[(triton.cdiv(heads, 64), splits, batch)](
        latents, turned, q, lengths, parts, lse, heads, capacity, splits, scale, num_warps=8, launch_pdl=True
    )
