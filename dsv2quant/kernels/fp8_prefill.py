"""fp8_gemm's product for many tokens, grouped scales: one warp brings tiles by TMA, warp groups compute.

Gluon, since plain Triton has all warps wait for each other at every step. Each warp group has 64 tokens and all of a
tile's rows; its products of 128 columns are added to its sums, by their scales, while the units compute another's.
Programs go from tile to tile, of which the next is on its way while the last is stored.
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

from dsv2quant.kernels.jit import cdiv, gluon_jit
from dsv2quant.kernels.launch import MULTIPROCESSORS, specialized
from dsv2quant.kernels.tiles import described, stage_barriers

BAND: gl.constexpr = gl.constexpr(8)  # token tiles that share tiles of w in L2
DEPTH: gl.constexpr = gl.constexpr(128)
GROUP: gl.constexpr = gl.constexpr(64)  # tokens of a warp group
ROWS: gl.constexpr = gl.constexpr(128)
MANY = 1024  # tokens; with fewer fp8_gemm's own kernel takes as long, or less


class Share(NamedTuple):
    """A program's share: `groups` times 64 tokens × 128 rows of w."""

    groups: int  # 2 or 3
    stages: int


@gluon.jit
def _place(tile, M, N, GROUPS: gl.constexpr):
    """A tile's first token and row."""
    TOKENS: gl.constexpr = GROUPS * GROUP
    tiles_m, tiles_n = gl.cdiv(M, TOKENS), gl.cdiv(N, ROWS)
    band = tile // (BAND * tiles_n) * BAND
    inner = tile % (BAND * tiles_n)
    height = gl.minimum(tiles_m - band, BAND)
    return (band + inner % height) * TOKENS, inner // height * ROWS


@gluon.jit
def _produce(produced, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """Fills stage after stage of a [GROUPS · STAGES, 64, 128] and b [STAGES, 128, 128]."""
    x, x_scale, w, a, a_scale, b, full, empty, sizes, xs_k = produced
    M, N, K, tiles = sizes
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        token, row = _place(tile, M, N, GROUPS)
        for column in range(0, K, DEPTH):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, (GROUPS * GROUP + ROWS) * DEPTH + GROUPS * GROUP * 4)
            for group in gl.static_range(GROUPS):
                at, buffer = token + group * GROUP, GROUPS * stage + group
                tma.async_copy_global_to_shared(x, [at, column], ready, a.index(buffer))
                tma.async_copy_global_to_shared(x_scale, [column // DEPTH * xs_k + at], ready, a_scale.index(buffer))
            tma.async_copy_global_to_shared(w, [row, column], ready, b.index(stage))
            step += 1


@gluon.jit
def _consume(shared, OWN: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """The tiles' tokens of one warp group."""
    w_scale, y, a, a_scale, b, all_out, full, empty, sizes, ws_n, ws_k = shared
    M, N, K, tiles = sizes
    out = all_out.index(OWN)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32])
    blocks = gl.cdiv(K, DEPTH)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first, row = _place(tile, M, N, GROUPS)
        first += OWN * GROUP
        total = gl.zeros([GROUP, ROWS], gl.float32, layout)
        for block in range(blocks):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            product = warpgroup_mma(
                a.index(GROUPS * stage + OWN), b.index(stage).permute((1, 0)),
                gl.zeros([GROUP, ROWS], gl.float32, layout), use_acc=False, is_async=True,
            )  # fmt: skip
            scale = a_scale.index(GROUPS * stage + OWN).load(gl.SliceLayout(1, layout))
            scale *= gl.load(w_scale + row // DEPTH * ws_n + block * ws_k)
            product = warpgroup_mma_wait(0, deps=[product])
            mbarrier.arrive(empty.index(stage), count=1)
            total += product * gl.expand_dims(scale, 1)
            step += 1
        tma.store_wait(0)  # of the tile before: `out` is free again
        out.store(total.to(out.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(y, [first, row], out)
    tma.store_wait(0)


@gluon_jit(do_not_specialize=["M", "tiles", "xs_k", "ws_n"])
def _kernel(
    x, x_scale, w, w_scale, y, M, N, K, tiles, xs_k, ws_n, ws_k, GROUPS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """x, x_scale, w and y are descriptors of [64, 128], [64], [128, 128] and [64, 128]: what lies outside reads as 0,
    and isn't written."""
    a = gl.allocate_shared_memory(x.dtype, [GROUPS * STAGES, GROUP, DEPTH], x.layout)
    a_scale = gl.allocate_shared_memory(gl.float32, [GROUPS * STAGES, GROUP], x_scale.layout)
    b = gl.allocate_shared_memory(w.dtype, [STAGES, ROWS, DEPTH], w.layout)
    out = gl.allocate_shared_memory(y.dtype, [GROUPS, GROUP, ROWS], y.layout)
    full, empty = stage_barriers(STAGES, GROUPS)
    fence_async_shared()
    sizes = (M, N, K, tiles)
    shared = (w_scale, y, a, a_scale, b, out, full, empty, sizes, ws_n, ws_k)
    produced = (x, x_scale, w, a, a_scale, b, full, empty, sizes, xs_k)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (shared, 0, GROUPS, STAGES)),
                (_consume, (shared, 1, GROUPS, STAGES)),
                (_produce, (produced, GROUPS, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (shared, 0, GROUPS, STAGES)),
                (_consume, (shared, 1, GROUPS, STAGES)),
                (_consume, (shared, 2, GROUPS, STAGES)),
                (_produce, (produced, GROUPS, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


def rule(M: int, N: int) -> Share:
    """Of least time: a tile of 192 tokens takes 1.2 times as long as one of 128, measured on an H200."""

    def waves(groups: int) -> int:
        return cdiv(cdiv(M, GROUP.value * groups) * cdiv(N, ROWS.value), MULTIPROCESSORS)

    return Share(2, 5) if waves(2) < 1.2 * waves(3) else Share(3, 4)


def takes(out: torch.Tensor, x_scales: torch.Tensor) -> bool:
    """Whether `matmul_into` takes grouped scales of such strides, and writes to such rows, on this device."""
    by_groups = x_scales.stride(0) == 1 and x_scales.stride(1) % 4 == 0 and x_scales.data_ptr() % 16 == 0
    return by_groups and out.dtype.itemsize == 2 and out.shape[1] % 8 == 0 and out.is_contiguous() and specialized()


def matmul_into(
    out: torch.Tensor, x: torch.Tensor, x_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, share: Share
) -> None:
    """fp8_gemm.matmul_into by grouped scales, where `takes` says so."""
    (M, K), N = x.shape, w.shape[0]
    tiles = cdiv(M, GROUP.value * share.groups) * cdiv(N, ROWS.value)
    scales = x_scales.as_strided((x_scales.stride(1) * (x_scales.shape[1] - 1) + M,), (1,))
    _kernel[(min(tiles, MULTIPROCESSORS),)](
        described(x, GROUP.value, 128), described(scales, GROUP.value), described(w, ROWS.value, 128), w_scales,
        described(out, GROUP.value, 128), M, N, K, tiles, x_scales.stride(1), *w_scales.stride(),
        GROUPS=share.groups, STAGES=share.stages, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
