"""Causal attention of a prompt's expanded latent attention, on Hopper: keys of 128 columns of each head and 64 that all
heads share, values of 128.

Keys and values are read where kv_b_proj put them and the shared columns where the cache has them, queries as q_proj
made them, turned on the way: nothing is joined, padded or copied before. The tensor memory accelerator fetches keys and
values two steps ahead; a step's scores are weighed while the values of the step before are summed.
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

from dsv2quant.kernels.decoding import FLOATS, LOG2_E, is_hopper
from dsv2quant.kernels.jit import cdiv, gluon_jit
from dsv2quant.kernels.tiles import barrier, described

NOPE, ROPE, VALUES = 128, 64, 128  # columns of a head's keys, of those that all share, of a head's values
QUERIES = 128  # of a program
KEYS = 128  # of a step
TOGETHER: gl.constexpr = gl.constexpr(16)  # heads whose keys the L2 holds at once


@gluon.jit
def _load(keys, shared_keys, k, k_r, v, k_full, v_full, k_free, v_free, row, column, steps):
    KEYS: gl.constexpr = k.shape[1]
    for step in range(steps):
        at, place, free = row + step * KEYS, step % 2, (step // 2 + 1) % 2
        mbarrier.wait(k_free.index(place), free)
        mbarrier.expect(k_full.index(place), KEYS * (128 + 64) * 2)
        tma.async_copy_global_to_shared(keys, [at, column], k_full.index(place), k.index(place))
        tma.async_copy_global_to_shared(shared_keys, [at, 0], k_full.index(place), k_r.index(place))
        mbarrier.wait(v_free.index(place), free)
        mbarrier.expect(v_full.index(place), KEYS * 128 * 2)
        tma.async_copy_global_to_shared(keys, [at, column + 128], v_full.index(place), v.index(place))


@gluon.jit
def _scores(q_c, q_r, k, k_r, step, KEYS: gl.constexpr, SCORES: gl.constexpr):
    scores = warpgroup_mma_init(gl.zeros([64, KEYS], gl.float32, SCORES))
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


@gluon.jit
def _attend(
    q_c, q_r, k, k_r, v, k_full, v_full, k_free, v_free, out, steps, whole, before, first, new, total, heads, head,
    sequence, scale, WHICH: gl.constexpr,
):  # fmt: skip
    """A warpgroup's 64 queries."""
    KEYS: gl.constexpr = k.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    OWN: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    BY_QUERY: gl.constexpr = gl.SliceLayout(1, SCORES)
    DTYPE: gl.constexpr = v.dtype
    q_c, q_r = q_c.index(WHICH), q_r.index(WHICH)
    may = before + first + WHICH * 64 + gl.arange(0, 64, BY_QUERY) + 1  # keys that a query sees
    top = gl.full([64], float("-inf"), gl.float32, BY_QUERY)
    mixed = gl.zeros([64, 128], gl.float32, SUMS)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma_wait(0, deps=[_scores(q_c, q_r, k, k_r, 0, KEYS, SCORES)])
    barrier()
    mbarrier.arrive(k_free.index(0), count=1)
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
        barrier()
        mbarrier.arrive(k_free.index(step % 2), count=1)
        if step >= whole:
            scores = _seen(scores, may, step, KEYS, SCORES)
        weights, top, fade = _weights(scores, top, scale)
        summed = summed * fade + gl.sum(weights, 1)
        coming_shares = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
        # Waiting for the next values here keeps the compiler from waiting for the sums before scores are weighed.
        mbarrier.wait(v_full.index(step % 2), (step // 2) % 2)
        mixed, shares = warpgroup_mma_wait(0, deps=[weighed, shares])
        shares = coming_shares
        barrier()
        mbarrier.arrive(v_free.index((step - 1) % 2), count=1)
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
    query = first + WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, SUMS))
    column = gl.arange(0, 128, gl.SliceLayout(0, SUMS))
    at = ((sequence.to(gl.int64) * new + query)[:, None] * heads + head) * 128 + column[None, :]
    gl.store(out + at, mixed.to(DTYPE), mask=(query < new)[:, None])


@gluon.jit
def _attend_first(
    q_c, q_r, k, k_r, v, k_full, v_full, k_free, v_free, out, steps, whole, before, first, new, total, heads, head,
    sequence, scale,
):  # fmt: skip
    _attend(
        q_c, q_r, k, k_r, v, k_full, v_full, k_free, v_free, out, steps, whole, before, first, new, total, heads, head,
        sequence, scale, 0,
    )  # fmt: skip


@gluon.jit
def _attend_second(
    q_c, q_r, k, k_r, v, k_full, v_full, k_free, v_free, out, steps, whole, before, first, new, total, heads, head,
    sequence, scale,
):  # fmt: skip
    _attend(
        q_c, q_r, k, k_r, v, k_full, v_full, k_free, v_free, out, steps, whole, before, first, new, total, heads, head,
        sequence, scale, 1,
    )  # fmt: skip


@gluon_jit(do_not_specialize=["heads", "new", "total"])
def prefill_kernel(
    keys, shared_keys, q, table, out, heads, new, total, q_batch, q_token, scale,
    HALVES: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Program (head and block of queries, sequence). `keys`, `shared_keys` describe kv [batch · all, heads · 256] and
    the shared columns [batch · all, 64]."""
    STORED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    OWN: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    DTYPE: gl.constexpr = q.dtype.element_ty
    blocks = gl.cdiv(new, 128)
    # Some heads at a time, whose keys the L2 holds; of these the blocks that see most come first.
    place = gl.program_id(0)
    group = place // (TOGETHER * blocks)
    together = gl.minimum(heads - group * TOGETHER, TOGETHER)
    within = place - group * TOGETHER * blocks
    head = group * TOGETHER + within % together
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
    k_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)

    q_c = gl.allocate_shared_memory(DTYPE, [2, 64, 128], STORED)
    q_r = gl.allocate_shared_memory(DTYPE, [2, 64, 64], STORED)
    STEP: gl.constexpr = 1 if HALVES else 2
    APART: gl.constexpr = 32 if HALVES else 1
    for i in gl.static_range(2):
        query = first + i * 64 + gl.arange(0, 64, gl.SliceLayout(1, OWN))
        at = q + sequence.to(gl.int64) * q_batch + query.to(gl.int64)[:, None] * q_token + head * 192
        for j in gl.static_range(2):
            column = j * 64 + gl.arange(0, 64, gl.SliceLayout(0, OWN))
            x = gl.load(at + column[None, :], mask=(query < new)[:, None], other=0.0)
            q_c.index(i).slice(j * 64, 64, 1).store(x)
        pair = gl.arange(0, 32, gl.SliceLayout(0, OWN))
        known = (query < new)[:, None] & (pair >= 0)[None, :]
        turn = table + (query[:, None] * 32 + pair[None, :]) * 2
        cosine = gl.load(turn, mask=known, other=0.0)
        sine = gl.load(turn + 1, mask=known, other=0.0)
        a = gl.load(at + 128 + pair[None, :] * STEP, mask=known, other=0.0).to(gl.float32)
        b = gl.load(at + 128 + APART + pair[None, :] * STEP, mask=known, other=0.0).to(gl.float32)
        both = gl.join(a * cosine - b * sine, a * sine + b * cosine)  # [64, 32, 2]
        if HALVES:
            both = gl.permute(both, [0, 2, 1])
        q_r.index(i).store(gl.convert_layout(gl.reshape(both, [64, 64]).to(DTYPE), OWN))
    fence_async_shared()
    barrier()
    attended = (
        q_c, q_r, k, k_r, v, k_full, v_full, k_free, v_free, out, steps, whole, before, first, new, total, heads, head,
        sequence, scale,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_attend_first, attended),
            (_attend_second, attended),
            (_load, (keys, shared_keys, k, k_r, v, k_full, v_full, k_free, v_free, row, head * 256, steps)),
        ],
        [4, 1],
        [240, 24],
    )


def is_served(nope: int, rope: int, values: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `mla_prefill` takes heads of so many columns of keys, rotated ones and values."""
    return (nope, rope, values) == (NOPE, ROPE, VALUES) and dtype in FLOATS and is_hopper(device)


def mla_prefill(
    q: torch.Tensor, table: torch.Tensor, kv: torch.Tensor, keys: torch.Tensor, scale: float, *, halves: bool = False
) -> torch.Tensor:
    """Causal attention of the last `new` tokens of each sequence to all of its tokens: the heads' weighted values
    [batch, new, heads · 128], as `model.attention.expanded` has them.

    q [batch, new, heads · 192], before rotation, its rows anywhere: 128 columns of a head, then 64 that RoPE turns by
    table, float32 [new, 32, 2], cosine and sine of the new positions; it turns neighbours together, or with `halves`
    elements i and i + 32. kv [batch, all, heads · 256], of each head 128 columns of keys and then its values; keys
    [batch, all, 64], rotated, of all heads. bfloat16 or float16, one dtype; all but q contiguous; at least one token.
    Raises ValueError where shapes, dtypes or layouts are others.
    """
    heads = _heads(q, table, kv, keys)
    (batch, new, _), total = q.shape, kv.shape[1]
    tiles = [
        described(x, KEYS, width)
        for x, width in ((kv.view(batch * total, -1), NOPE), (keys.view(batch * total, ROPE), ROPE))
    ]
    out = q.new_empty(batch, new, heads * VALUES)
    prefill_kernel[(cdiv(new, QUERIES) * heads, batch)](
        *tiles, q, table, out, heads, new, total, q.stride(0), q.stride(1), scale * LOG2_E,
        HALVES=halves, KEYS=KEYS, num_warps=4,
    )  # fmt: skip
    return out


def _heads(q: torch.Tensor, table: torch.Tensor, kv: torch.Tensor, keys: torch.Tensor) -> int:
    """How many heads there are; raises ValueError where an argument does not fit."""
    heads = q.shape[-1] // (NOPE + ROPE)
    batch, new, total = q.shape[0], q.shape[1], kv.shape[1]
    shapes = ((batch, new, heads * (NOPE + ROPE)), (batch, total, heads * (NOPE + VALUES)), (batch, total, ROPE))
    for name, x, shape in zip(("q", "kv", "keys"), (q, kv, keys), shapes, strict=True):
        if x.shape != shape or x.dtype != q.dtype or x.dtype not in FLOATS or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}; it must be of 16 bits, {shape}")
    if not 0 < new <= total or not heads:
        raise ValueError(f"{heads} heads of {new} new tokens among {total} cannot be attended to")
    if table.shape != (new, ROPE // 2, 2) or table.dtype != torch.float32 or table.device != q.device:
        raise ValueError(f"table is {table.dtype} {tuple(table.shape)}; it must be float32 {(new, ROPE // 2, 2)}")
    if not all(x.is_contiguous() for x in (table, kv, keys)) or q.stride(2) != 1:
        raise ValueError("table, kv and keys must be contiguous, and each row of q")
    if any(x.data_ptr() % 16 for x in (kv, keys)):
        raise ValueError("kv and keys must begin at multiples of 16 bytes")
    return heads
