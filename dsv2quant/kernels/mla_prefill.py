"""Causal attention of a prompt's expanded latent attention, on Hopper: keys of 128 columns of each head and 64 that all
heads share, values of 128.

Keys and values are read where kv_b_proj put them and the shared columns where the cache has them, queries as q_proj
made them, turned on the way: nothing is joined, padded or copied before. The tensor memory accelerator fetches keys and
values two steps ahead; a step's scores are weighed while the values of the step before are summed.
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

NOPE, ROPE, VALUES = 128, 64, 128  # columns of a head's keys, of those that all share, of a head's values
QUERIES = 128  # of a program
TOGETHER = 16  # heads whose keys the L2 holds at once
LOG2_E = 1.4426950408889634
barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # Triton 3.7 has it by its new name


@gluon.jit
def _fetch_keys(keys, shared_keys, k, k_r, full, row, column, step, pred, KEYS: gl.constexpr):
    mbarrier.expect(full.index(step % 2), KEYS * (128 + 64) * 2, pred=pred)
    at = row + step * KEYS
    tma.async_copy_global_to_shared(keys, [at, column], full.index(step % 2), k.index(step % 2), pred=pred)
    tma.async_copy_global_to_shared(shared_keys, [at, 0], full.index(step % 2), k_r.index(step % 2), pred=pred)


@gluon.jit
def _fetch_values(keys, v, full, row, column, step, pred, KEYS: gl.constexpr):
    mbarrier.expect(full.index(step % 2), KEYS * 128 * 2, pred=pred)
    tma.async_copy_global_to_shared(
        keys, [row + step * KEYS, column + 128], full.index(step % 2), v.index(step % 2), pred=pred
    )


@gluon.jit
def _scores(q_c, q_r, k, k_r, step, KEYS: gl.constexpr, SCORES: gl.constexpr):
    scores = warpgroup_mma_init(gl.zeros([128, KEYS], gl.float32, SCORES))
    scores = warpgroup_mma(q_c, k.index(step % 2).permute([1, 0]), scores, use_acc=False, is_async=True)
    return warpgroup_mma(q_r, k_r.index(step % 2).permute([1, 0]), scores, is_async=True)


@gluon.jit
def _seen(scores, known, step, KEYS: gl.constexpr, SCORES: gl.constexpr):
    """-inf where key is at or behind what a query may look at."""
    key = step * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
    return gl.where(key[None, :] < known[:, None], scores, float("-inf"))


@gluon.jit
def _weights(scores, top, scale):
    """(weights, the new maxima, what earlier sums fade by)."""
    best = gl.maximum(top, gl.max(scores, 1))
    return gl.exp2(scores * scale - (best * scale)[:, None]), best, gl.exp2((top - best) * scale)


@gluon.jit(do_not_specialize=["heads", "new", "total"])
def prefill_kernel(
    keys, shared_keys, q, turns, out, heads, new, total, q_batch, q_token, scale,
    HALVES: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Program (head and block of queries, sequence). `keys`, `shared_keys` describe kv [batch · all, heads · 256] and
    the shared columns [batch · all, 64]."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    STORED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    OWN: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    BY_QUERY: gl.constexpr = gl.SliceLayout(1, SCORES)
    DTYPE: gl.constexpr = q.dtype.element_ty
    blocks = gl.cdiv(new, 128)
    # Some heads at a time, whose keys the L2 holds; of these the blocks that see most come first.
    place = gl.program_id(0)
    group = place // (16 * blocks)
    together = gl.minimum(heads - group * 16, 16)
    within = place - group * 16 * blocks
    head = group * 16 + within % together
    first = (blocks - 1 - within // together) * 128
    sequence = gl.program_id(1)
    before = total - new
    row = sequence * total
    steps = gl.cdiv(gl.minimum(before + first + 128, total), KEYS)
    whole = (before + first + 1) // KEYS  # steps that every query sees all of

    k = gl.allocate_shared_memory(DTYPE, [2, KEYS, 128], keys.layout)
    k_r = gl.allocate_shared_memory(DTYPE, [2, KEYS, 64], shared_keys.layout)
    v = gl.allocate_shared_memory(DTYPE, [2, KEYS, 128], keys.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()
    barrier()
    for i in gl.static_range(2):
        _fetch_keys(keys, shared_keys, k, k_r, k_full, row, head * 256, i, i < steps, KEYS)
        _fetch_values(keys, v, v_full, row, head * 256, i, i < steps, KEYS)

    q_c = gl.allocate_shared_memory(DTYPE, [128, 128], STORED)
    q_r = gl.allocate_shared_memory(DTYPE, [128, 64], STORED)
    query = first + gl.arange(0, 128, gl.SliceLayout(1, OWN))
    at = q + sequence.to(gl.int64) * q_batch + query.to(gl.int64)[:, None] * q_token + head * 192
    for j in gl.static_range(2):
        column = j * 64 + gl.arange(0, 64, gl.SliceLayout(0, OWN))
        q_c.slice(j * 64, 64, 1).store(gl.load(at + column[None, :], mask=(query < new)[:, None], other=0.0))
    pair = gl.arange(0, 32, gl.SliceLayout(0, OWN))
    known = (query < new)[:, None] & (pair >= 0)[None, :]
    turn = turns + (query[:, None] * 32 + pair[None, :]) * 2
    cosine = gl.load(turn, mask=known, other=0.0)
    sine = gl.load(turn + 1, mask=known, other=0.0)
    STEP: gl.constexpr = 1 if HALVES else 2
    APART: gl.constexpr = 32 if HALVES else 1
    a = gl.load(at + 128 + pair[None, :] * STEP, mask=known, other=0.0).to(gl.float32)
    b = gl.load(at + 128 + APART + pair[None, :] * STEP, mask=known, other=0.0).to(gl.float32)
    both = gl.join(a * cosine - b * sine, a * sine + b * cosine)  # [128, 32, 2]
    if HALVES:
        both = gl.permute(both, [0, 2, 1])
    q_r.store(gl.convert_layout(gl.reshape(both, [128, 64]).to(DTYPE), OWN))
    fence_async_shared()
    barrier()

    may = before + first + gl.arange(0, 128, BY_QUERY) + 1  # keys that a query sees
    top = gl.full([128], float("-inf"), gl.float32, BY_QUERY)
    mixed = gl.zeros([128, 128], gl.float32, SUMS)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma_wait(0, deps=[_scores(q_c, q_r, k, k_r, 0, KEYS, SCORES)])
    barrier()
    _fetch_keys(keys, shared_keys, k, k_r, k_full, row, head * 256, 2, steps > 2, KEYS)
    if whole < 1:
        scores = _seen(scores, may, 0, KEYS, SCORES)
    weights, top, fade = _weights(scores, top, scale)
    summed = gl.sum(weights, 1)
    shares = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
    mbarrier.wait(v_full.index(0), 0)
    for step in range(1, steps):
        mbarrier.wait(k_full.index(step % 2), (step // 2) % 2)
        coming = _scores(q_c, q_r, k, k_r, step, KEYS, SCORES)
        weighed = warpgroup_mma(shares, v.index((step - 1) % 2), mixed, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[coming])
        barrier()  # all warps are through with these keys
        _fetch_keys(keys, shared_keys, k, k_r, k_full, row, head * 256, step + 2, step + 2 < steps, KEYS)
        if step >= whole:
            scores = _seen(scores, may, step, KEYS, SCORES)
        weights, top, fade = _weights(scores, top, scale)
        summed = summed * fade + gl.sum(weights, 1)
        coming_shares = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
        # Waiting for the next values here keeps the compiler from waiting for the sums before scores are weighed.
        mbarrier.wait(v_full.index(step % 2), (step // 2) % 2)
        mixed, shares = warpgroup_mma_wait(0, deps=[weighed, shares])
        shares = coming_shares
        barrier()  # and with the values of the step before
        _fetch_values(keys, v, v_full, row, head * 256, step + 1, step + 1 < steps, KEYS)
        mixed = mixed * gl.convert_layout(fade, gl.SliceLayout(1, SUMS))[:, None]

    last = v.index((steps - 1) % 2)
    if steps * KEYS > total:  # the next sequence's values, of which a share of 0 may make a NaN
        token = (steps - 1) * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, OWN))
        for j in gl.static_range(2):
            part = last.slice(j * 64, 64, 1)
            part.store(gl.where((token < total)[:, None], part.load(OWN), 0.0))
        fence_async_shared()
        barrier()
    mixed = warpgroup_mma(shares, last, mixed)
    mixed = mixed * gl.convert_layout(1 / summed, gl.SliceLayout(1, SUMS))[:, None]
    query = first + gl.arange(0, 128, gl.SliceLayout(1, SUMS))
    column = gl.arange(0, 128, gl.SliceLayout(0, SUMS))
    at = ((sequence.to(gl.int64) * new + query)[:, None] * heads + head) * 128 + column[None, :]
    gl.store(out + at, mixed.to(DTYPE), mask=(query < new)[:, None])


def mla_prefill(
    q: torch.Tensor, turns: torch.Tensor, kv: torch.Tensor, shared_keys: torch.Tensor, scale: float,
    halves: bool = False, keys: int = 128,
) -> torch.Tensor:  # fmt: skip
    """The heads' weighted values [batch, new, heads · 128], as `model.attention.expanded` has them, of the last tokens
    of `all`.

    q [batch, new, heads · 192], before rotation, by `turns`, float32 [new, 32, 2], cosine and sine; kv [batch, all,
    heads · 256], keys and values of each head; shared_keys [batch, all, 64], rotated. bfloat16 or float16.
    """
    batch, new, _ = q.shape
    total, heads = kv.shape[1], kv.shape[2] // 256
    kind = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    described = [
        TensorDescriptor.from_tensor(x, [keys, width], gl.NVMMASharedLayout.get_default_for([keys, width], kind))
        for x, width in ((kv.view(batch * total, -1), 128), (shared_keys.reshape(batch * total, -1), 64))
    ]
    out = q.new_empty(batch, new, heads * 128)
    prefill_kernel[(triton.cdiv(new, QUERIES) * heads, batch)](
        *described, q, turns, out, heads, new, total, q.stride(0), q.stride(1), scale * LOG2_E,
        HALVES=halves, KEYS=keys, num_warps=8,
    )  # fmt: skip
    return out
