"""Absorbed MLA attention over a float8 cache for few heads, on Hopper: mla_decode.py's, whose interface it has.

What a float8 cache costs is the widening of its bytes and their way through shared memory. Here a byte is widened once,
in the registers of the thread that loaded it, and these are at once an operand of the matrix unit: keys are its M side,
heads its N side, so that 16 heads cost 16 columns. A thread loads 16 bytes of a row, which are not those that the unit
wants of it; but a sum over columns may take them in any order, so the queries' columns are put in that order instead.
For the second product the widened latents go to shared memory, from which the unit reads them transposed.

Two programs share a multiprocessor: one loads and widens while the other multiplies.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

RANK, ROPE = 512, 64
WIDTH: gl.constexpr = gl.constexpr(RANK + ROPE)
HEADS: gl.constexpr = gl.constexpr(16)  # of a program
TOKENS: gl.constexpr = gl.constexpr(64)  # of a step: a warpgroup's rows
BEHIND: gl.constexpr = gl.constexpr(2)  # products that are let run
GROUPS: gl.constexpr = gl.constexpr(RANK // 64)
TINY: gl.constexpr = gl.constexpr(1e-30)
# [64 tokens, 64 columns in words of 4]: a thread has 16 bytes of rows r and r + 8, four threads a row.
LOADED: gl.constexpr = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 16],
    )
)
SUMS: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))
OPERAND: gl.constexpr = gl.constexpr(gl.DotOperandLayout(0, SUMS.value, 2))
barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # Triton 3.7 has it by its new name
STORED: gl.constexpr = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


@gluon.jit
def _words(base, start, end, group: gl.constexpr):
    """64 columns of the 64 tokens from `start`, as [64, 16] words: zeros from `end`."""
    token = start + gl.arange(0, 64, gl.SliceLayout(1, LOADED))
    word = group * 16 + gl.arange(0, 16, gl.SliceLayout(0, LOADED))
    return gl.load(base + token[:, None] * (WIDTH // 4) + word[None, :], mask=(token < end)[:, None], other=0)


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
def _as_operand(x):
    """Columns c = 16 t + 4 s + 2 h + e of a thread's row as columns 16 s + 8 h + 2 t + e: as they lie, for the unit."""
    x = gl.permute(gl.reshape(x, [64, 4, 4, 2, 2]), [0, 2, 3, 1, 4])
    return gl.convert_layout(gl.reshape(x, [64, 64]), OPERAND)


@gluon.jit
def _queries(q_head, known, size, first: gl.constexpr, OWN: gl.constexpr):
    """[16 heads, 64 columns from `first`] in the order of `_as_operand`."""
    k = gl.arange(0, 64, gl.SliceLayout(0, OWN))
    column = first + (k & 1) + ((k >> 3) & 1) * 2 + (k >> 4) * 4 + ((k >> 1) & 3) * 16
    x = gl.load(q_head[:, None] + column[None, :], mask=known[:, None], other=0.0).to(gl.float32)
    return (x / size[:, None]).to(gl.float16)


@gluon.jit(do_not_specialize=["splits"])
def fp8_kernel(q, cache, lengths, cache_scale, out, lse, heads, capacity, splits, scale):
    """As mla_decode._split_kernel, of 16 heads and, a time, of 64 tokens."""
    gdc_wait()
    gdc_launch_dependents()
    RANK: gl.constexpr = GROUPS * 64
    BY_HEAD: gl.constexpr = gl.SliceLayout(0, SUMS)
    OWN: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    split, row = gl.program_id(1), gl.program_id(2).to(gl.int64)
    length = gl.load(lengths + row)
    share = gl.cdiv(gl.cdiv(length, splits), TOKENS) * TOKENS
    begin = split * share
    end = gl.minimum(begin + share, length)
    E5: gl.constexpr = cache.dtype.element_ty == gl.float8e5
    base = cache.to(gl.pointer_type(gl.int32), bitcast=True) + row * capacity * (WIDTH // 4)
    arriving = ()
    for j in gl.static_range(GROUPS + 1):
        arriving = arriving + (_words(base, begin, end, j),)

    # The queries as float16, into whose range powers of two bring them.
    head = gl.program_id(0) * HEADS + gl.arange(0, HEADS, gl.SliceLayout(1, OWN))
    q_head, known = q + row * heads * WIDTH + head * WIDTH, head < heads
    largest = gl.full([HEADS], TINY, gl.float32, gl.SliceLayout(1, OWN))
    for j in gl.static_range(GROUPS + 1):
        column = j * 64 + gl.arange(0, 64, gl.SliceLayout(0, OWN))
        x = gl.load(q_head[:, None] + column[None, :], mask=known[:, None], other=0.0).to(gl.float32)
        largest = gl.maximum(largest, gl.max(gl.abs(x), 1))
    size = (largest.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
    queries = ()
    for j in gl.static_range(GROUPS + 1):
        queries = queries + (gl.allocate_shared_memory(gl.float16, [HEADS, 64], STORED),)
        queries[j].store(_queries(q_head, known, size, j * 64, OWN))
    fence_async_shared()
    factor = gl.load(cache_scale)
    gain = gl.convert_layout(size, BY_HEAD) * (scale * factor)

    latents = ()  # of each group an allocation, between whose stores no barrier is put
    mixed = ()
    for _j in gl.static_range(GROUPS):
        latents = latents + (gl.allocate_shared_memory(gl.float16, [TOKENS, 64], STORED),)
        mixed = mixed + (gl.zeros([64, HEADS], gl.float32, SUMS),)
    shares = gl.allocate_shared_memory(gl.float16, [TOKENS, HEADS], gl.NVMMASharedLayout(32, 16, 2))
    top = gl.full([HEADS], float("-inf"), gl.float32, BY_HEAD)
    total = gl.zeros([TOKENS, HEADS], gl.float32, SUMS)
    for start in range(begin, end, TOKENS):
        barrier()  # all warps have multiplied what lay in `latents`
        ahead = ()
        operands = ()
        scores = warpgroup_mma_init(gl.zeros([TOKENS, HEADS], gl.float32, SUMS))
        for j in gl.static_range(GROUPS + 1):
            c = _widened(arriving[j], E5)
            ahead = ahead + (_words(base, start + TOKENS, end, j),)
            operands = operands + (_as_operand(c),)
            if j < GROUPS:
                latents[j].store(c)
            scores = warpgroup_mma(operands[j], queries[j].permute([1, 0]), scores, is_async=True)
            if j >= BEHIND:
                scores, _held = warpgroup_mma_wait(BEHIND, deps=[scores, operands[j - BEHIND]])
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
        arriving = ahead

    summed = gl.sum(total, 0)
    last = gl.where(summed > 0, factor / summed, 0.0)
    head = gl.program_id(0) * HEADS + gl.arange(0, HEADS, BY_HEAD)
    place = (row * splits + split) * heads + head
    for j in gl.static_range(GROUPS):
        latent = j * 64 + gl.arange(0, 64, gl.SliceLayout(1, SUMS))
        at = out + place[None, :] * RANK + latent[:, None]
        gl.store(at, (mixed[j] * last[None, :]).to(out.dtype.element_ty), mask=(head < heads)[None, :])
    gl.store(lse + place, top + gl.log2(summed), mask=head < heads)


def mla_decode_fp8(
    q: torch.Tensor, cache: torch.Tensor, lengths: torch.Tensor, scale: float, cache_scale: torch.Tensor, splits: int,
    parts: torch.Tensor, lse: torch.Tensor,
) -> None:  # fmt: skip
    """The parts of `splits` shares of each sequence and their log2-sums, as mla_decode's `join` takes them."""
    (batch, heads, _), capacity = q.shape, cache.shape[1]
    fp8_kernel[(triton.cdiv(heads, 16), splits, batch)](
        q, cache, lengths, cache_scale, parts, lse, heads, capacity, splits, scale, num_warps=4, launch_pdl=True
    )
