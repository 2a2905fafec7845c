"""fp8_experts' kernels for a prompt's tokens, grouped scales: as fp8_prefill.py, over tiles of 128 pairs of one expert.

Rows of tokens come sorted as `Routes.pairs` has them: gate and up's input is gathered before, and what it gives,
quantized, is left so for down. A warp group that has no pairs of a tile computes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dsv2quant.kernels.activations import encoded, magnitudes, outputs, scale_of
from dsv2quant.kernels.fp8_experts import Fp8Experts
from dsv2quant.kernels.launch import MULTIPROCESSORS
from dsv2quant.kernels.routing import Routes

DEPTH: gl.constexpr = gl.constexpr(128)
GROUP: gl.constexpr = gl.constexpr(64)  # pairs of a warp group
GROUPS: gl.constexpr = gl.constexpr(2)
ROWS: gl.constexpr = gl.constexpr(128)  # in a part
PAIRS = 128  # in a tile


class Share(NamedTuple):
    """A program's share of rows: `parts` times 128, of gate and up always 2."""

    parts: int
    stages: int


@gluon.jit
def _first_row(expert, band, part, N, GATED: gl.constexpr, PARTS: gl.constexpr):
    """Of a part among all rows of all experts, and among its matrix' own."""
    if GATED:
        own = band * ROWS
        return (expert * 2 + part) * N + own, own
    own = (band * PARTS + part) * ROWS
    return expert * N + own, own


@gluon.jit
def _produce(produced, GATED: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr):
    experts, begins, count, bands, x, x_scale, w, a, a_scale, b, full, empty, N, K, xs_k = produced
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
                mbarrier.expect(ready, (GROUPS * GROUP + PARTS * ROWS) * DEPTH + GROUPS * GROUP * 4)
                for group in gl.static_range(GROUPS):
                    at, buffer = begin + group * GROUP, GROUPS * stage + group
                    tma.async_copy_global_to_shared(x, [at, column], ready, a.index(buffer))
                    scale_at = column // DEPTH * xs_k + at
                    tma.async_copy_global_to_shared(x_scale, [scale_at], ready, a_scale.index(buffer))
                for part in gl.static_range(PARTS):
                    row, _ = _first_row(expert, band, part, N, GATED, PARTS)
                    tma.async_copy_global_to_shared(w, [row, column], ready, b.index(PARTS * stage + part))
                step += 1


@gluon.jit
def _consume(shared, OWN: gl.constexpr, GATED: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr):
    experts, begins, ends, count, bands, w_scale, out, out_scale, weights, pairs, buffers, N, K, os_k = shared
    a, a_scale, b, full, empty = buffers
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
                        if GATED:
                            row_block = (expert * 2 + part) * row_blocks + band
                        else:
                            row_block = expert * row_blocks + gl.minimum(band * PARTS + part, row_blocks - 1)
                        scale = a_scale.index(GROUPS * stage + OWN).load(gl.SliceLayout(1, layout))
                        scale *= gl.load(w_scale + row_block * blocks + block)
                        product = warpgroup_mma_wait(0, deps=[product])
                        if part == PARTS - 1:
                            mbarrier.arrive(empty.index(stage), count=1)
                        # As written here, not behind the next product, whose registers are these
                        total = gl.inline_asm_elementwise(
                            "mov.b32 $0, $1;", "=f,f", [totals[part] + product * gl.expand_dims(scale, 1)],
                            gl.float32, is_pure=False, pack=1,
                        )  # fmt: skip
                        added = added + (total,)
                    totals = added
                    step += 1
                if GATED:
                    _store_gated(out, out_scale, totals[0], totals[1], begin, end, band, N, os_k)
                else:
                    place = begin + gl.arange(0, GROUP, gl.SliceLayout(1, layout))
                    present = place < end
                    pair = gl.load(pairs + place, present, 0)
                    weight = gl.load(weights + pair, present, 0.0)
                    for part in gl.static_range(PARTS):
                        _, first = _first_row(expert, band, part, N, GATED, PARTS)
                        n = first + gl.arange(0, ROWS, gl.SliceLayout(0, layout))
                        at = out + gl.expand_dims(pair.to(gl.int64) * N, 1) + gl.expand_dims(n, 0)
                        inside = gl.expand_dims(present, 1) & gl.expand_dims(n < N, 0)
                        gl.store(at, totals[part] * gl.expand_dims(weight, 1), inside)


@gluon.jit
def _store_gated(out, out_scale, gate, up, begin, end, band, N, os_k):
    """silu(gate) · up rounded to BF16, and quantized by these 128 columns as activations.quantize_activation does."""
    layout: gl.constexpr = gate.type.layout
    into: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    values = (gate / (1 + gl.exp(-gate)) * up).to(gl.bfloat16).to(gl.float32)
    n = band * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    values = gl.where(gl.expand_dims(n < N, 0), values, 0.0)
    scale = scale_of(gl.max(magnitudes(values), 1))
    place = begin + gl.arange(0, GROUP, gl.SliceLayout(1, layout))
    gl.store(out_scale + band * os_k + place, scale, place < end)
    codes = encoded(values, gl.expand_dims(scale, 1) + gl.zeros_like(values), False)
    place = begin + gl.arange(0, GROUP, gl.SliceLayout(1, into))
    n = band * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, into))
    at = out + gl.expand_dims(place.to(gl.int64) * N, 1) + gl.expand_dims(n, 0)
    gl.store(at, gl.convert_layout(codes, into), gl.expand_dims(place < end, 1) & gl.expand_dims(n < N, 0))


@gluon.jit(do_not_specialize=["count", "bands", "xs_k", "os_k"])
def _kernel(
    x, x_scale, w, w_scale, out, out_scale, weights, pairs, experts, begins, ends, count, bands, N, K, xs_k, os_k,
    GATED: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """x, x_scale and w are descriptors of [64, 128], [64] and [128, 128]."""
    a = gl.allocate_shared_memory(x.dtype, [GROUPS * STAGES, GROUP, DEPTH], x.layout)
    a_scale = gl.allocate_shared_memory(gl.float32, [GROUPS * STAGES, GROUP], x_scale.layout)
    b = gl.allocate_shared_memory(w.dtype, [PARTS * STAGES, ROWS, DEPTH], w.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()
    buffers = (a, a_scale, b, full, empty)
    shared = (experts, begins, ends, count, bands, w_scale, out, out_scale, weights, pairs, buffers, N, K, os_k)
    produced = (experts, begins, count, bands, x, x_scale, w, a, a_scale, b, full, empty, N, K, xs_k)
    gl.warp_specialize(
        [
            (_consume, (shared, 0, GATED, PARTS, STAGES)),
            (_consume, (shared, 1, GATED, PARTS, STAGES)),
            (_produce, (produced, GATED, PARTS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


def gate_up_quantized(
    x: torch.Tensor, x_scales: torch.Tensor, routes: Routes, stack: Fp8Experts, share: Share
) -> tuple[torch.Tensor, torch.Tensor]:
    """As fp8_experts.gate_up_quantized, of x [pairs, hidden] in the order of `routes.pairs`, in which the result is
    too. Scales are [pairs, ·] of strides (1, a multiple of 4)."""
    h, scales = outputs(len(x), stack.gate_up.shape[2], "group128", None, x.device)
    _launch(x, x_scales, stack.gate_up.flatten(0, 2), stack.gate_up_scales, h, scales, None, routes, share)
    return h, scales


def down(
    h: torch.Tensor, h_scales: torch.Tensor, weights: torch.Tensor, routes: Routes, stack: Fp8Experts, share: Share
) -> torch.Tensor:
    """As fp8_experts.down, of what `gate_up_quantized` gives: float32 [tokens, k, hidden] in the order of pairs."""
    out = torch.empty(*weights.shape, stack.down.shape[1], device=h.device)
    _launch(h, h_scales, stack.down.flatten(0, 1), stack.down_scales, out, None, weights, routes, share)
    return out


def _launch(
    x: torch.Tensor, x_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, out: torch.Tensor,
    out_scales: torch.Tensor | None, weights: torch.Tensor | None, routes: Routes, share: Share,
) -> None:  # fmt: skip
    gated, N = weights is None, out.shape[-1]
    bands = triton.cdiv(N, ROWS.value if gated else ROWS.value * share.parts)
    count = bands * len(routes.experts)
    scales = x_scales.as_strided((x_scales.stride(1) * x_scales.shape[1],), (1,))
    _kernel[(min(count, MULTIPROCESSORS),)](
        _described(x, GROUP.value, 128), _described(scales, GROUP.value), _described(w, ROWS.value, 128), w_scales,
        out, out_scales, weights, *routes[:4], count, bands, N, x.shape[1], x_scales.stride(1),
        0 if out_scales is None else out_scales.stride(1),
        GATED=gated, PARTS=share.parts, STAGES=share.stages, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def _described(matrix: torch.Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, list(block), layout(matrix.dtype, *block))


def layout(dtype: torch.dtype, *block: int) -> gl.NVMMASharedLayout:
    """Of tiles in shared memory."""
    kind = {torch.float8_e4m3fn: gl.float8e4nv, torch.float32: gl.float32}[dtype]
    return gl.NVMMASharedLayout.get_default_for(list(block), kind)
