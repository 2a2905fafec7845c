"""fp8_experts' kernels for a prompt's tokens, grouped scales: as fp8_prefill.py, over tiles of 128 pairs of one expert.

Codes of tokens come sorted as `Routes.pairs` has them: gate and up's input is gathered before, and what it gives,
quantized, is left so for down. Their scales warp groups load themselves while a product is made: TMA would need an
expert's first pair at a multiple of 16 bytes. A warp group that has no pairs of a tile computes nothing.
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

from dsv2quant.kernels.activations import LARGEST, SMALLEST_SCALE, magnitudes, outputs
from dsv2quant.kernels.fp8_layout import Fp8Experts
from dsv2quant.kernels.gather import gather_tokens
from dsv2quant.kernels.gating import computed_here, gated, rounded
from dsv2quant.kernels.jit import cdiv, gluon_jit
from dsv2quant.kernels.launch import MULTIPROCESSORS, specialized
from dsv2quant.kernels.routing import Routes
from dsv2quant.kernels.tiles import described, stage_barriers

DEPTH: gl.constexpr = gl.constexpr(128)
GROUP: gl.constexpr = gl.constexpr(64)  # pairs of a warp group
GROUPS: gl.constexpr = gl.constexpr(2)
ROWS: gl.constexpr = gl.constexpr(128)  # in a part
PAIRS = 128  # in a tile


class Share(NamedTuple):
    """A program's share of rows: `parts` times 128, of gate and up always 2."""

    parts: int
    stages: int


UP, DOWN = Share(2, 4), Share(1, 5)  # a second part of down's sums would not fit into registers


@gluon.jit
def _first_row(expert, band, part, N, DTYPE: gl.constexpr, PARTS: gl.constexpr):
    """Of a part among all rows of all experts, and among its matrix' own."""
    if DTYPE is not None:
        own = band * ROWS
        return (expert * 2 + part) * N + own, own
    own = (band * PARTS + part) * ROWS
    return expert * N + own, own


@gluon.jit
def _produce(produced, DTYPE: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr):
    experts, begins, count, bands, x, w, a, b, full, empty, N, K = produced
    step = 0
    for item in range(gl.program_id(0), count, gl.num_programs(0)):
        tile, band = item // bands, item % bands
        expert = gl.load(experts + tile)
        if expert >= 0:
            begin = gl.load(begins + tile)
            for column in range(0, K, DEPTH):
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
                ready = full.index(stage)
                mbarrier.expect(ready, (GROUPS * GROUP + PARTS * ROWS) * DEPTH)
                for group in gl.static_range(GROUPS):
                    buffer = a.index(GROUPS * stage + group)
                    tma.async_copy_global_to_shared(x, [begin + group * GROUP, column], ready, buffer)
                for part in gl.static_range(PARTS):
                    row, _ = _first_row(expert, band, part, N, DTYPE, PARTS)
                    tma.async_copy_global_to_shared(w, [row, column], ready, b.index(PARTS * stage + part))
                step += 1


@gluon.jit
def _consume(shared, OWN: gl.constexpr, DTYPE: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr):
    experts, begins, ends, count, bands, x_scale, w_scale, weights, pairs, outs, buffers, N, K, k, xs_m, xs_k = shared
    a, b, full, empty = buffers
    out, out_scale, os_k = outs
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32])
    blocks = gl.cdiv(K, DEPTH)
    row_blocks = gl.cdiv(N, DEPTH)
    step = 0
    for item in range(gl.program_id(0), count, gl.num_programs(0)):
        tile, band = item // bands, item % bands
        expert = gl.load(experts + tile)
        if expert >= 0:
            begin, end = gl.load(begins + tile) + OWN * GROUP, gl.load(ends + tile)
            if begin >= end:
                for _ in range(blocks):
                    stage = step % STAGES
                    mbarrier.wait(full.index(stage), step // STAGES & 1)
                    mbarrier.arrive(empty.index(stage), count=1)
                    step += 1
            else:
                place = begin + gl.arange(0, GROUP, gl.SliceLayout(1, layout))
                present = place < end
                pair = gl.load(pairs + place, present, 0)
                scales = x_scale + (pair // k if DTYPE is not None else place) * xs_m
                totals = (gl.zeros([GROUP, ROWS], gl.float32, layout),) * PARTS
                for block in range(blocks):
                    stage = step % STAGES
                    mbarrier.wait(full.index(stage), step // STAGES & 1)
                    added = ()
                    for part in gl.static_range(PARTS):
                        product = warpgroup_mma(
                            a.index(GROUPS * stage + OWN), b.index(PARTS * stage + part).permute((1, 0)),
                            gl.zeros([GROUP, ROWS], gl.float32, layout), use_acc=False, is_async=True,
                        )  # fmt: skip
                        if DTYPE is not None:
                            row_block = (expert * 2 + part) * row_blocks + band
                        else:
                            row_block = expert * row_blocks + gl.minimum(band * PARTS + part, row_blocks - 1)
                        if part == 0:
                            of_pairs = gl.load(scales + block * xs_k, present, 0.0)
                        scale = of_pairs * gl.load(w_scale + row_block * blocks + block)
                        product = warpgroup_mma_wait(0, deps=[product])
                        if part == PARTS - 1:
                            mbarrier.arrive(empty.index(stage), count=1)
                        added = added + (computed_here(totals[part] + product * gl.expand_dims(scale, 1)),)
                    totals = added
                    step += 1
                if DTYPE is not None:
                    _store_gated(out, out_scale, totals[0], totals[1], begin, end, band, N, os_k, DTYPE)
                else:
                    weight = gl.load(weights + pair, present, 0.0)
                    for part in gl.static_range(PARTS):
                        _, first = _first_row(expert, band, part, N, DTYPE, PARTS)
                        n = first + gl.arange(0, ROWS, gl.SliceLayout(0, layout))
                        at = out + gl.expand_dims(pair.to(gl.int64) * N, 1) + gl.expand_dims(n, 0)
                        inside = gl.expand_dims(present, 1) & gl.expand_dims(n < N, 0)
                        gl.store(at, totals[part] * gl.expand_dims(weight, 1), inside)


@gluon.jit
def _quotient(a, b, inverse):
    """a / b to nearest, by b's nearest inverse: as division gives it where nothing is above or below float32's normal
    numbers, without the branch for where it is."""
    near = a * inverse
    return gl.fma(gl.fma(-near, b, a), inverse, near)


@gluon.jit
def _inverse(b):
    near = 1.0 / b
    return gl.fma(near, gl.fma(-near, b, 1.0), near)


@gluon.jit
def _store_gated(out, out_scale, gate, up, begin, end, band, N, os_k, DTYPE: gl.constexpr):
    """silu(gate) · up rounded to DTYPE, and quantized by these 128 columns as activations.quantize_activation does."""
    layout: gl.constexpr = gate.type.layout
    into: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    values = rounded(gated(gate, up), DTYPE)
    n = band * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    values = gl.where(gl.expand_dims(n < N, 0), values, 0.0)
    amax = gl.max(magnitudes(values), 1).to(gl.float32, bitcast=True)
    largest = gl.full([GROUP], LARGEST, gl.float32, gl.SliceLayout(1, layout))
    scale = gl.maximum(_quotient(gl.where(amax > 0, amax, LARGEST), largest, _inverse(largest)), SMALLEST_SCALE)
    place = begin + gl.arange(0, GROUP, gl.SliceLayout(1, layout))
    gl.store(out_scale + band * os_k + place, scale, place < end)
    ratio = _quotient(values, gl.expand_dims(scale, 1), gl.expand_dims(_inverse(scale), 1))
    codes = ratio.to(gl.float8e4nv)  # of the largest magnitude beyond e4m3's, and of NaN NaN
    place = begin + gl.arange(0, GROUP, gl.SliceLayout(1, into))
    n = band * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, into))
    at = out + gl.expand_dims(place.to(gl.int64) * N, 1) + gl.expand_dims(n, 0)
    gl.store(at, gl.convert_layout(codes, into), gl.expand_dims(place < end, 1) & gl.expand_dims(n < N, 0))


@gluon_jit(do_not_specialize=["count", "bands", "k", "xs_m", "xs_k", "os_k"])
def _kernel(
    x, x_scale, w, w_scale, out, out_scale, weights, pairs, experts, begins, ends, count, bands, N, K, k, xs_m, xs_k,
    os_k, DTYPE: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """x and w are descriptors of [64, 128] and [128, 128]. With a DTYPE rows are gate's and up's, and x's scales those
    of tokens, not of places."""
    a = gl.allocate_shared_memory(x.dtype, [GROUPS * STAGES, GROUP, DEPTH], x.layout)
    b = gl.allocate_shared_memory(w.dtype, [PARTS * STAGES, ROWS, DEPTH], w.layout)
    full, empty = stage_barriers(STAGES, GROUPS)
    fence_async_shared()
    buffers, outs = (a, b, full, empty), (out, out_scale, os_k)
    shared = (experts, begins, ends, count, bands, x_scale, w_scale, weights, pairs, outs, buffers, N, K, k, xs_m, xs_k)
    produced = (experts, begins, count, bands, x, w, a, b, full, empty, N, K)
    gl.warp_specialize(
        [
            (_consume, (shared, 0, DTYPE, PARTS, STAGES)),
            (_consume, (shared, 1, DTYPE, PARTS, STAGES)),
            (_produce, (produced, DTYPE, PARTS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


def choose(routes: Routes, stack: Fp8Experts) -> tuple[Share, Share] | None:
    """The shares of `gate_up_quantized` and `down`; None where other kernels are for these tiles or weights."""
    return (UP, DOWN) if routes.block == PAIRS and len(routes.pairs) and fits(stack) else None


def fits(stack: Fp8Experts) -> bool:
    """Whether scales are of blocks, on Hopper."""
    inner, hidden = stack.gate_up.shape[2:]
    blocks = cdiv(inner, DEPTH.value), cdiv(hidden, DEPTH.value)
    return stack.gate_up_scales.shape[2:] == blocks and specialized()


def gate_up_quantized(
    x: torch.Tensor, x_scales: torch.Tensor, routes: Routes, k: int, stack: Fp8Experts, dtype: torch.dtype, share: Share
) -> tuple[torch.Tensor, torch.Tensor]:
    """As fp8_experts.gate_up_quantized, whose checks x has passed, but by place in `routes.pairs`."""
    h, scales = outputs(len(routes.pairs), stack.gate_up.shape[2], "group128", None, x.device)
    x = gather_tokens(x, routes.pairs, k)
    w = stack.gate_up.flatten(0, 2)
    _launch(x, x_scales, w, stack.gate_up_scales, h, scales, None, routes, k, share, dtype)
    return h, scales


def down(
    h: torch.Tensor, h_scales: torch.Tensor, weights: torch.Tensor, routes: Routes, stack: Fp8Experts, share: Share
) -> torch.Tensor:
    """As fp8_experts.down, of what `gate_up_quantized` gives: float32 [tokens, k, hidden] in the order of pairs."""
    out = torch.empty(*weights.shape, stack.down.shape[1], device=h.device)
    _launch(h, h_scales, stack.down.flatten(0, 1), stack.down_scales, out, None, weights, routes, 1, share, None)
    return out


def _launch(
    x: torch.Tensor, x_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, out: torch.Tensor,
    out_scales: torch.Tensor | None, weights: torch.Tensor | None, routes: Routes, k: int, share: Share,
    dtype: torch.dtype | None,
) -> None:  # fmt: skip
    gated, N = weights is None, out.shape[-1]
    bands = cdiv(N, ROWS.value if gated else ROWS.value * share.parts)
    count = bands * len(routes.experts)
    _kernel[(min(count, MULTIPROCESSORS),)](
        described(x, GROUP.value, 128), x_scales, described(w, ROWS.value, 128), w_scales, out, out_scales, weights,
        *routes[:4], count, bands, N, x.shape[1], k, *x_scales.stride(),
        0 if out_scales is None else out_scales.stride(1),
        DTYPE=dtype and getattr(gl, str(dtype).removeprefix("torch.")), PARTS=share.parts, STAGES=share.stages,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
