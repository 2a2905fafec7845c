"""Absorbed MLA attention over a float8 cache, 16 heads a program, on Hopper: mla_decode.py's, whose interface it has.

What a float8 cache costs is the widening of its bytes and their way through shared memory. Here a byte is widened once,
in the registers of the thread that takes it, and these are at once an operand of the matrix unit: keys are its M side,
heads its N side, so that 16 heads cost 16 columns. A thread takes 16 bytes of a row, which are not those that the unit
wants of it; but a sum over columns may take them in any order, so the queries' columns are put in that order instead.
For the second product the widened latents go to shared memory, from which the unit reads them transposed.

Two warpgroups take turns with a share's steps, one widening while the other multiplies, and join their sums at the end.
A third fetches bytes, by the tensor memory accelerator, as soon as those before them are widened.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv2quant.kernels.jit import cdiv, gluon_jit
from dsv2quant.kernels.tiles import barrier

RANK, ROPE = 512, 64
WIDTH: gl.constexpr = gl.constexpr(RANK + ROPE)
HEADS: gl.constexpr = gl.constexpr(16)  # of a program
TOKENS: gl.constexpr = gl.constexpr(64)  # of a step: a warpgroup's rows
BEHIND: gl.constexpr = gl.constexpr(2)  # products that are let run
GROUPS: gl.constexpr = gl.constexpr(RANK // 64)
PARTS: gl.constexpr = gl.constexpr(RANK // 64 + 1)  # with the rotated columns
FETCHES: gl.constexpr = gl.constexpr(3)  # of a step, each of as many parts: what is widened makes room at once
TINY: gl.constexpr = gl.constexpr(1e-30)
# [64 tokens, 64 columns in words of 4]: a thread has 16 bytes of rows r and r + 8, four threads a row.
TAKEN: gl.constexpr = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 16],
    )
)
FETCHED: gl.constexpr = gl.constexpr(gl.NVMMASharedLayout(64, 32, 2))
SUMS: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))
BY_HEAD: gl.constexpr = gl.constexpr(gl.SliceLayout(0, SUMS.value))
OPERAND: gl.constexpr = gl.constexpr(gl.DotOperandLayout(0, SUMS.value, 2))
STORED: gl.constexpr = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
LINE: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PLAIN: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
OWN: gl.constexpr = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def _load(words, ring, full, empty, first, steps):
    EACH: gl.constexpr = PARTS // FETCHES
    for step in range(steps):
        for i in gl.static_range(FETCHES):
            place = step % 2 * FETCHES + i
            mbarrier.wait(empty.index(place), (step // 2 + 1) % 2)
            mbarrier.expect(full.index(place), TOKENS * EACH * 64)
            for j in gl.static_range(EACH):
                at = [first + step * TOKENS, (i * EACH + j) * 16]
                tma.async_copy_global_to_shared(words, at, full.index(place), ring.index(place * EACH + j))


@gluon.jit
def _widened(words, E5: gl.constexpr):
    """[64, 16] words → [64, 64] float16."""
    KIND: gl.constexpr = "e5m2x2" if E5 else "e4m3x2"
    a, b, c, d = gl.inline_asm_elementwise(
        "{ .reg .b16 l, h; .reg .b32 x, y; mov.b32 {l, h}, $4;"
        + " cvt.rn.f16x2."
        + KIND
        + " x, l; cvt.rn.f16x2."
        + KIND
        + " y, h; mov.b32 {$0, $1}, x; mov.b32 {$2, $3}, y; }",
        "=h,=h,=h,=h,r",
        [words],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=True,
        pack=1,
    )
    pairs = gl.join(gl.join(a, b), gl.join(c, d))  # [64, 16, 2 of a pair, 2 pairs]
    return gl.reshape(gl.permute(pairs, [0, 1, 3, 2]), [64, 64])


@gluon.jit
def _in_order(x):
    """Columns c = 16 t + 4 s + 2 h + e of [·, 64] as columns 16 s + 8 h + 2 t + e: as they lie in a thread, for the
    unit."""
    x = gl.permute(gl.reshape(x, [x.shape[0], 4, 4, 2, 2]), [0, 2, 3, 1, 4])
    return gl.reshape(x, [x.shape[0], 64])


@gluon.jit
def _put_queries(q, queries, heads, row):
    """The queries as float16, into whose range powers of two bring them, which are returned."""
    head = gl.program_id(0) * HEADS + gl.arange(0, HEADS, gl.SliceLayout(1, OWN))
    at = q + (row * heads + head)[:, None] * WIDTH + gl.arange(0, 64, gl.SliceLayout(0, OWN))[None, :]
    parts = ()
    largest = gl.full([HEADS], TINY, gl.float32, gl.SliceLayout(1, OWN))
    for j in gl.static_range(PARTS):
        parts = parts + (gl.load(at + j * 64, mask=(head < heads)[:, None], other=0.0).to(gl.float32),)
        largest = gl.maximum(largest, gl.max(gl.abs(parts[j]), 1))
    size = (largest.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
    by = 1 / size  # a power of two, too
    for j in gl.static_range(PARTS):
        queries.index(j).store(_in_order((parts[j] * by[:, None]).to(gl.float16)))
    return size


@gluon.jit
def _cleared(ring, start, end, place):
    """Zeros where a step's tokens are behind the end: anything may be there, of which a share of 0 may make a NaN."""
    EACH: gl.constexpr = PARTS // FETCHES
    if start + TOKENS > end:
        token = start + gl.arange(0, TOKENS, gl.SliceLayout(1, TAKEN))
        for j in gl.static_range(EACH):
            part = ring.index(place * EACH + j)
            part.store(gl.where((token < end)[:, None], part.load(TAKEN), 0))
        barrier()


@gluon.jit
def _summed(ring, queries, latents, shares, full, empty, gains, begin, end, steps, cache, WHICH: gl.constexpr):
    """A warpgroup's half of the steps: maxima, sums of weights, and latents [64, 16 heads] of each group."""
    E5: gl.constexpr = cache.dtype.element_ty == gl.float8e5
    EACH: gl.constexpr = PARTS // FETCHES
    gain = gains.load(BY_HEAD)
    mixed = ()
    for _j in gl.static_range(GROUPS):
        mixed = mixed + (gl.zeros([64, HEADS], gl.float32, SUMS),)
    top = gl.full([HEADS], float("-inf"), gl.float32, BY_HEAD)
    total = gl.zeros([TOKENS, HEADS], gl.float32, SUMS)
    for turn in range((steps + 1 - WHICH) // 2):
        start = begin + (2 * turn + WHICH) * TOKENS
        operands = ()
        scores = warpgroup_mma_init(gl.zeros([TOKENS, HEADS], gl.float32, SUMS))
        for j in gl.static_range(PARTS):
            place = WHICH * FETCHES + j // EACH
            if j % EACH == 0:
                mbarrier.wait(full.index(place), turn % 2)
                _cleared(ring, start, end, place)
            c = _widened(ring.index(WHICH * PARTS + j).load(TAKEN), E5)
            operands = operands + (gl.convert_layout(_in_order(c), OPERAND),)
            if j < GROUPS:
                latents[j].store(c)
            scores = warpgroup_mma(operands[j], queries.index(j).permute([1, 0]), scores, is_async=True)
            if j >= BEHIND:
                scores, _held = warpgroup_mma_wait(BEHIND, deps=[scores, operands[j - BEHIND]])
            if j % EACH == EACH - 1:
                barrier()
                mbarrier.arrive(empty.index(place), count=1)
        scores, _held, _held = warpgroup_mma_wait(0, deps=[scores, operands[GROUPS - 1], operands[GROUPS]])
        token = start + gl.arange(0, TOKENS, gl.SliceLayout(1, SUMS))
        scores = gl.where((token < end)[:, None], scores * gain[None, :], float("-inf"))
        best = gl.maximum(top, gl.max(scores, 0))
        weights = gl.exp2(scores - best[None, :])
        fade = gl.exp2(top - best)
        shares.store(weights.to(gl.float16))
        total = total * fade[None, :] + weights
        top = best
        faded = ()
        for j in gl.static_range(GROUPS):
            faded = faded + (mixed[j] * fade[None, :],)
        fence_async_shared()
        barrier()
        mixed = ()
        for j in gl.static_range(GROUPS):
            mixed = mixed + (warpgroup_mma(latents[j].permute([1, 0]), shares, faded[j], is_async=True),)
        mixed = warpgroup_mma_wait(0, deps=mixed)
        barrier()  # all warps have multiplied what lies in `latents`
    return top, gl.sum(total, 0), mixed


@gluon.jit
def _first(
    ring, queries, latents, others, shares, shares_of_other, full, empty, gains, tops, sums, done, begin, end, steps,
    cache_scale, out, lse, heads, place, cache,
):  # fmt: skip
    """The warpgroup of even steps, which joins its sums to the other's."""
    top, summed, mixed = _summed(ring, queries, latents, shares, full, empty, gains, begin, end, steps, cache, 0)
    mbarrier.wait(done, 0)
    other = tops.load(BY_HEAD)
    best = gl.maximum(top, other)
    by = gl.where(summed > 0, gl.exp2(top - best), 0.0)  # a share without tokens has no maximum
    by_other = gl.where(summed > 0, gl.exp2(other - best), 0.0)
    summed = summed * by + sums.load(BY_HEAD) * by_other
    last = gl.where(summed > 0, gl.load(cache_scale) / summed, 0.0)
    head = gl.program_id(0) * HEADS + gl.arange(0, HEADS, BY_HEAD)
    for j in gl.static_range(GROUPS):
        latent = j * 64 + gl.arange(0, 64, gl.SliceLayout(1, SUMS))
        more = others[j]._reinterpret(gl.float32, [64, HEADS], PLAIN).load(SUMS)
        joined = (mixed[j] * by[None, :] + more * by_other[None, :]) * last[None, :]
        at = out + (place + head)[None, :] * (GROUPS * 64) + latent[:, None]
        gl.store(at, joined.to(out.dtype.element_ty), mask=(head < heads)[None, :])
    gl.store(lse + place + head, best + gl.log2(summed), mask=head < heads)


@gluon.jit
def _second(
    ring, queries, others, latents, shares_of_other, shares, full, empty, gains, tops, sums, done, begin, end, steps,
    cache_scale, out, lse, heads, place, cache,
):  # fmt: skip
    """The warpgroup of odd steps, whose sums go where its latents lay."""
    top, summed, mixed = _summed(ring, queries, latents, shares, full, empty, gains, begin, end, steps, cache, 1)
    tops.store(top)
    sums.store(summed)
    for j in gl.static_range(GROUPS):
        latents[j]._reinterpret(gl.float32, [64, HEADS], PLAIN).store(mixed[j])
    barrier()
    mbarrier.arrive(done, count=1)


@gluon_jit(do_not_specialize=["splits"])
def fp8_kernel(words, cache, q, lengths, cache_scale, out, lse, heads, capacity, splits, scale):
    """As mla_decode._split_kernel, of 16 heads and, a time, of twice 64 tokens. `words` describes the cache as int32
    [batch · capacity, 144]; `cache` says which float8 it is."""
    gdc_wait()
    gdc_launch_dependents()
    split, row = gl.program_id(1), gl.program_id(2).to(gl.int64)
    length = gl.load(lengths + row)
    share = gl.cdiv(gl.cdiv(length, splits), TOKENS) * TOKENS
    begin = split * share
    end = gl.minimum(begin + share, length)
    steps = gl.maximum(gl.cdiv(end - begin, TOKENS), 0)
    ring = gl.allocate_shared_memory(gl.int32, [2 * PARTS, TOKENS, 16], words.layout)
    queries = gl.allocate_shared_memory(gl.float16, [PARTS, HEADS, 64], STORED)
    even, odd = (), ()  # of each group an allocation, between whose stores no barrier is put
    for _j in gl.static_range(GROUPS):
        even = even + (gl.allocate_shared_memory(gl.float16, [TOKENS, 64], STORED),)
        odd = odd + (gl.allocate_shared_memory(gl.float16, [TOKENS, 64], STORED),)
    SHARES: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
    even_shares = gl.allocate_shared_memory(gl.float16, [TOKENS, HEADS], SHARES)
    odd_shares = gl.allocate_shared_memory(gl.float16, [TOKENS, HEADS], SHARES)
    gains = gl.allocate_shared_memory(gl.float32, [HEADS], LINE)
    tops = gl.allocate_shared_memory(gl.float32, [HEADS], LINE)
    sums = gl.allocate_shared_memory(gl.float32, [HEADS], LINE)
    full = gl.allocate_shared_memory(gl.int64, [2 * FETCHES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2 * FETCHES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * FETCHES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(done, count=1)
    size = _put_queries(q, queries, heads, row)
    gains.store(size * (scale * gl.load(cache_scale)))
    fence_async_shared()
    barrier()
    both = (
        ring, queries, even, odd, even_shares, odd_shares, full, empty, gains, tops, sums, done, begin, end, steps,
        cache_scale, out, lse, heads, (row * splits + split) * heads, cache,
    )  # fmt: skip
    first = (row * capacity + begin).to(gl.int32)
    gl.warp_specialize(
        [(_first, both), (_second, both), (_load, (words, ring, full, empty, first, steps))], [4, 1], [240, 24]
    )


def mla_decode_fp8(
    q: torch.Tensor, cache: torch.Tensor, lengths: torch.Tensor, scale: float, cache_scale: torch.Tensor, splits: int,
    parts: torch.Tensor, lse: torch.Tensor,
) -> None:  # fmt: skip
    """The parts of `splits` shares of each sequence and their log2-sums, as mla_decode's `join` takes them."""
    (batch, heads, _), capacity = q.shape, cache.shape[1]
    words = TensorDescriptor.from_tensor(cache.view(-1, RANK + ROPE).view(torch.int32), [64, 16], FETCHED.value)
    fp8_kernel[(cdiv(heads, 16), splits, batch)](
        words, cache, q, lengths, cache_scale, parts, lse, heads, capacity, splits, scale, num_warps=4, launch_pdl=True
    )
