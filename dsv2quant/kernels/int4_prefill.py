"""The kernels of int4_experts.py for a prompt's tokens: one warp brings tiles by TMA, two warp groups compute.

As there, weights are the MMA's M side, dequantized in the registers it reads, and a tile of pairs is its N side; here
each warp group has blocks of 64 rows of its own, so that one dequantizes while the units compute the other's product.
Rows of tokens come sorted as `Routes.pairs` has them: gate and up's input is gathered before, and what it gives is
left so for down. Programs go from tile to tile, of which the next is on its way while the last is stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dsv2quant.kernels.gather import gather_tokens
from dsv2quant.kernels.gating import computed_here, gated
from dsv2quant.kernels.int4_layout import ROWS, Int4Experts, Stack
from dsv2quant.kernels.jit import cdiv, gluon_jit
from dsv2quant.kernels.launch import MULTIPROCESSORS, specialized
from dsv2quant.kernels.routing import Routes
from dsv2quant.kernels.tiles import described, stage_barriers

DEPTH: gl.constexpr = gl.constexpr(128)  # columns of a step, which are one group's
BLOCK: gl.constexpr = gl.constexpr(ROWS)  # rows of a product
GROUPS: gl.constexpr = gl.constexpr(2)
LINES: gl.constexpr = gl.constexpr(32)  # of as many words, which BLOCK rows of a step are
HALF: gl.constexpr = gl.constexpr(32)  # pairs of rows r and r + 8 in a block


FEWEST = 32  # pairs of an expert, on average; with fewer int4_experts' own kernels take as long, or less


class Share(NamedTuple):
    """A program's share of rows: `parts` times 128."""

    parts: int
    stages: int
    narrow: int = 0  # tiles of no more pairs are products of so many; 0: none


# A word → four registers of two values: codes less 8, as in int4_held.py.
_CODES: gl.constexpr = gl.constexpr(
    """{
    .reg .b32 a<4>, b<3>, z;
    mov.b32 z, 0x43084308;
    shr.u32 b0, $8, 4;
    shr.u32 b1, $8, 8;
    shr.u32 b2, $8, 12;
    lop3.b32 a0, $8, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 a1, b0, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 a2, b1, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 a3, b2, 0x000f000f, 0x43004300, 0xea;
    sub.bf16x2 a0, a0, z;
    sub.bf16x2 a1, a1, z;
    sub.bf16x2 a2, a2, z;
    sub.bf16x2 a3, a3, z;
    mov.b32 {$0, $1}, a0;
    mov.b32 {$2, $3}, a1;
    mov.b32 {$4, $5}, a2;
    mov.b32 {$6, $7}, a3;
    }"""
)


@gluon.jit
def _integers(words, LAYOUT: gl.constexpr):
    """Words [32, 32] of a block's step → its integers, BF16 [64, 128], as the operand in registers."""
    a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
        _CODES, "=h,=h,=h,=h,=h,=h,=h,=h,r", [words], (gl.int16,) * 8, is_pure=True, pack=1
    )
    joined = gl.join(gl.join(gl.join(a, b), gl.join(e, f)), gl.join(gl.join(c, d), gl.join(g, h)))
    values = joined.to(gl.bfloat16, bitcast=True).reshape(2, 4, 8, 4, 4, 2, 2, 2)  # span, warp, r, q, step, p, c, h
    values = values.permute(1, 7, 2, 0, 4, 6, 3, 5).reshape(BLOCK, DEPTH)
    return gl.convert_layout(values, gl.DotOperandLayout(0, LAYOUT, 2), assert_trivial=True)


@gluon.jit
def _scales(words, LAYOUT: gl.constexpr):
    """Pairs [32] of rows r and r + 8 → float32 [64]."""
    low, high = (words << 16).to(gl.float32, bitcast=True), (words & -0x10000).to(gl.float32, bitcast=True)
    scales = gl.join(low, high).reshape(4, 8, 2).permute(0, 2, 1).reshape(BLOCK)
    return gl.convert_layout(scales, gl.SliceLayout(1, LAYOUT), assert_trivial=True)


@gluon.jit
def _produce(produced, TOKENS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr):
    x, words, scales, b, a, a_scale, full, empty, experts, begins, count, bands, blocks, steps = produced
    OWN: gl.constexpr = GROUPS * PARTS
    step = 0
    for item in range(gl.program_id(0), count, gl.num_programs(0)):
        tile, band = item // bands, item % bands
        expert = gl.load(experts + tile)
        if expert >= 0:
            begin = gl.load(begins + tile)
            for i in range(steps):
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
                ready = full.index(stage)
                mbarrier.expect(ready, TOKENS * DEPTH * 2 + OWN * (LINES * LINES + HALF) * 4)
                tma.async_copy_global_to_shared(x, [begin, i * DEPTH], ready, b.index(stage))
                for own in gl.static_range(OWN):
                    block = gl.minimum(band * OWN + own, blocks - 1)  # beyond the last: any, since it isn't stored
                    line = ((expert * blocks + block) * steps + i) * LINES
                    tma.async_copy_global_to_shared(words, [line, 0], ready, a.index(stage * OWN + own))
                    row = (expert * steps + i) * blocks + block
                    tma.async_copy_global_to_shared(scales, [row * HALF], ready, a_scale.index(stage * OWN + own))
                step += 1


@gluon.jit
def _consume(
    shared, OWN: gl.constexpr, GATED: gl.constexpr, TOKENS: gl.constexpr, NARROW: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    experts, begins, ends, count, bands = shared[:5]
    step = 0
    for item in range(gl.program_id(0), count, gl.num_programs(0)):
        tile, band = item // bands, item % bands
        if gl.load(experts + tile) >= 0:
            begin, end = gl.load(begins + tile), gl.load(ends + tile)
            if NARROW:
                if end - begin <= NARROW:
                    step = _tile(shared, begin, end, band, step, OWN, GATED, NARROW, PARTS, STAGES)
                else:
                    step = _tile(shared, begin, end, band, step, OWN, GATED, TOKENS, PARTS, STAGES)
            else:
                step = _tile(shared, begin, end, band, step, OWN, GATED, TOKENS, PARTS, STAGES)


@gluon.jit
def _tile(
    shared, begin, end, band, step, OWN: gl.constexpr, GATED: gl.constexpr, TOKENS: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One warp group's rows, PARTS blocks of them, by TOKENS pairs. Returns the step behind the tile."""
    _, _, _, _, _, out, weights, pairs, b, a, a_scale, full, empty, steps, N = shared
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    lines: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    halves: gl.constexpr = gl.DistributedLinearLayout([], [[0], [0], [1], [2], [4]], [[8], [16]], [], [32])
    totals = (gl.zeros([BLOCK, TOKENS], gl.float32, layout),) * PARTS
    for _ in range(steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        added = ()
        for part in gl.static_range(PARTS):
            buffer = (stage * PARTS + part) * GROUPS + OWN
            weight = _integers(a.index(buffer).load(lines), layout)
            product = warpgroup_mma(
                weight, b.index(stage).slice(0, TOKENS).permute((1, 0)),
                gl.zeros([BLOCK, TOKENS], gl.float32, layout), use_acc=False, is_async=True,
            )  # fmt: skip
            scale = _scales(a_scale.index(buffer).load(halves), layout)
            product = warpgroup_mma_wait(0, deps=[product])
            if part == PARTS - 1:
                mbarrier.arrive(empty.index(stage), count=1)
            added = added + (computed_here(totals[part] + product * gl.expand_dims(scale, 1)),)
        totals = added
        step += 1
    for part in gl.static_range(PARTS):
        block = (band * PARTS + part) * GROUPS + OWN
        if GATED:
            _store_gated(out, totals[part], begin, end, block, N, TOKENS)
        else:
            _store(out, totals[part], weights, pairs, begin, end, block, N, TOKENS)
    return step


@gluon.jit
def _store_gated(out, total, begin, end, block, N, TOKENS: gl.constexpr):
    """silu(gate) · up of a block's 32 rows of each, as sorted."""
    into: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    gate, up = gl.split(total.reshape(4, 2, 8, TOKENS).permute(0, 2, 3, 1))
    h = gated(gate, up).to(out.dtype.element_ty).reshape(HALF, TOKENS).permute(1, 0)
    place = begin + gl.arange(0, TOKENS, gl.SliceLayout(1, into))
    n = block * HALF + gl.arange(0, HALF, gl.SliceLayout(0, into))
    at = out + gl.expand_dims(place.to(gl.int64) * N, 1) + gl.expand_dims(n, 0)
    gl.store(at, gl.convert_layout(h, into), gl.expand_dims(place < end, 1) & gl.expand_dims(n < N, 0))


@gluon.jit
def _store(out, total, weights, pairs, begin, end, block, N, TOKENS: gl.constexpr):
    """A block's 64 rows, weighted, in the rows of the pairs."""
    into: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    place = begin + gl.arange(0, TOKENS, gl.SliceLayout(1, into))
    present = place < end
    pair = gl.load(pairs + place, present, 0)
    weight = gl.load(weights + pair, present, 0.0)
    n = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, into))
    at = out + gl.expand_dims(pair.to(gl.int64) * N, 1) + gl.expand_dims(n, 0)
    values = gl.convert_layout(total.permute(1, 0), into) * gl.expand_dims(weight, 1)
    gl.store(at, values, gl.expand_dims(present, 1) & gl.expand_dims(n < N, 0))


@gluon_jit(do_not_specialize=["count", "bands", "blocks", "steps"])
def _kernel(
    x, words, scales, out, weights, pairs, experts, begins, ends, count, bands, blocks, steps, N,
    GATED: gl.constexpr, TOKENS: gl.constexpr, NARROW: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """x, words and scales are descriptors of [TOKENS, 128], [32, 32] and [32]."""
    b = gl.allocate_shared_memory(x.dtype, [STAGES, TOKENS, DEPTH], x.layout)
    a = gl.allocate_shared_memory(gl.int32, [STAGES * PARTS * GROUPS, LINES, LINES], words.layout)
    a_scale = gl.allocate_shared_memory(gl.int32, [STAGES * PARTS * GROUPS, HALF], scales.layout)
    full, empty = stage_barriers(STAGES, GROUPS)
    fence_async_shared()
    shared = (experts, begins, ends, count, bands, out, weights, pairs, b, a, a_scale, full, empty, steps, N)
    produced = (x, words, scales, b, a, a_scale, full, empty, experts, begins, count, bands, blocks, steps)
    gl.warp_specialize(
        [
            (_consume, (shared, 0, GATED, TOKENS, NARROW, PARTS, STAGES)),
            (_consume, (shared, 1, GATED, TOKENS, NARROW, PARTS, STAGES)),
            (_produce, (produced, TOKENS, PARTS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


def choose(x: torch.Tensor, routes: Routes, stack: Int4Experts) -> tuple[Share, Share] | None:
    """The shares of `gate_up` and `down`; None where other kernels are for such tiles or weights."""
    pairs, mean = len(routes.pairs), len(routes.pairs) / len(stack.down.words)
    if not pairs or routes.block < 64 or mean < FEWEST or x.dtype != torch.bfloat16 or not fits(stack):
        return None
    return rule(routes.block, mean)


def rule(block: int, mean: float) -> tuple[Share, Share]:
    """For so many pairs of an expert on average: fitted on an H200, to 1,024 … 32,768 tokens of DeepSeek-V2 and
    V2-Lite."""
    if block == 64:
        return Share(2, 5, 32), Share(2, 5, 32)
    if 16 <= mean % 128 < 64 and mean > 128:  # an expert's last tile has few
        return Share(2, 4, 64), Share(2, 3, 64)
    return (Share(1, 5), Share(1, 4)) if mean <= 256 else (Share(2, 4), Share(2, 3))


def fits(stack: Int4Experts) -> bool:
    """Whether groups are of 128, scales BF16 and there are no zeros, on Hopper."""

    def plain(part: Stack) -> bool:
        whole = part.columns == 128 * part.scales.shape[1] and part.rows % 8 == 0
        return whole and part.zeros is None and part.scales.dtype == torch.bfloat16

    return plain(stack.gate_up) and plain(stack.down) and specialized()


def gate_up(x: torch.Tensor, routes: Routes, k: int, stack: Int4Experts, share: Share) -> torch.Tensor:
    """As int4_experts.gate_up, but by place in `routes.pairs`."""
    out = x.new_empty(len(routes.pairs), stack.gate_up.rows)
    _launch(gather_tokens(x, routes.pairs, k), stack.gate_up, out, None, routes, share, gated=True)
    return out


def down(h: torch.Tensor, weights: torch.Tensor, routes: Routes, stack: Int4Experts, share: Share) -> torch.Tensor:
    """As int4_experts.down, but of h by place in `routes.pairs`: float32 [tokens, k, hidden]."""
    out = torch.empty((*weights.shape, stack.down.rows), device=h.device)
    _launch(h, stack.down, out, weights, routes, share, gated=False)
    return out


def _launch(
    x: torch.Tensor, stack: Stack, out: torch.Tensor, weights: torch.Tensor | None, routes: Routes, share: Share,
    gated: bool,
) -> None:  # fmt: skip
    _, blocks, spans, *_ = stack.words.shape
    bands = cdiv(blocks, 2 * share.parts)
    count = bands * len(routes.experts)
    words, scales = stack.words.view(-1, 32), stack.scales.view(-1).view(torch.int32)
    _kernel[(min(count, MULTIPROCESSORS),)](
        described(x, routes.block, 128), described(words, 32, 32), described(scales, 32),
        out, weights, *routes[:4], count, bands, blocks, spans // 2, stack.rows,
        GATED=gated, TOKENS=routes.block, NARROW=share.narrow, PARTS=share.parts, STAGES=share.stages,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
