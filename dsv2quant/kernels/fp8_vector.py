"""FP8 product of very few tokens on Hopper's plain units: fp8_gemm's y [M, N] = x [M, K] · w [N, K]ᵀ.

The time is that of reading w, and of what stands around it: a launch, one wait for memory, one sum. So a program takes
few rows over the whole of K, and asks for all it can hold before it computes. Codes become float32 (through float16, by
one instruction for two), products and sums are float32's. x may come as it was before it was quantized: each program
makes its codes then, while it waits for w's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv2quant.formats.e4m3 import BLOCK
from dsv2quant.kernels.activations import encoded, magnitudes, scale_of
from dsv2quant.kernels.jit import cdiv, jit
from dsv2quant.kernels.launch import INTERPRETED, PDL, wait

DEPTH: tl.constexpr = tl.constexpr(BLOCK)
PIECE: tl.constexpr = tl.constexpr(16)  # codes of one load of a thread: of one row and one group
HALF: tl.constexpr = tl.constexpr(8)  # floats of one load
MOST_TOKENS = 4  # of one program
MOST_FLOATS = 4096  # of x, of which every program makes codes


class Vector(NamedTuple):
    """A program's share: `rows` of w, which divide 128, by `warps` that each read 512 columns of a row at once;
    `held` times that are in registers before any is used."""

    rows: int
    warps: int
    held: int

    @property
    def columns(self) -> int:
        """Of a row, that are held."""
        return self.held * self.warps * 32 * PIECE.value


def rule(rows: int, columns: int) -> Vector:
    """The share for one weight."""
    warps = min((4, 2, 1), key=lambda count: -(-columns // (512 * count)) * count)
    steps = cdiv(columns, 512 * warps)
    return Vector(4, warps, cdiv(steps, cdiv(steps, 4)))


@triton.jit
def _halves(row, piece, K: tl.constexpr):
    """Of a token's row, which ends at column K, the 16 columns from each `piece` [·] on: two of [·, 8]."""
    half = row + piece[:, None] + tl.arange(0, HALF)[None, :]
    inside = piece[:, None] < K
    return tl.load(half, mask=inside, other=0.0), tl.load(half + HALF, mask=inside, other=0.0)


@triton.jit
def _joined(low, high):
    """A thread's 16 columns of one token, which come in halves [· / 16, 8], as float32 [· / 16, 16]."""
    return tl.join(low, high).permute(0, 2, 1).reshape(low.shape[0], PIECE).to(tl.float32)


@triton.jit
def _group_scales(values):
    """[· / 16]: of each 16 columns, those that quantize_activation gives to the 128 that they are part of."""
    PIECES: tl.constexpr = values.shape[0]
    OF_GROUP: tl.constexpr = DEPTH // PIECE
    largest = tl.max(tl.max(magnitudes(values), 1).reshape(PIECES // OF_GROUP, OF_GROUP), 1)
    return tl.broadcast_to(scale_of(largest)[:, None], [PIECES // OF_GROUP, OF_GROUP]).reshape(PIECES)


@triton.jit
def _token_scales(values, t: tl.constexpr, TOKENS: tl.constexpr, HELD: tl.constexpr):
    """Of token t, all of whose columns are held."""
    largest = tl.max(magnitudes(_joined(values[2 * t], values[2 * t + 1])), 1)
    for i in tl.static_range(1, HELD):
        floats = _joined(values[2 * (i * TOKENS + t)], values[2 * (i * TOKENS + t) + 1])
        largest = tl.maximum(largest, tl.max(magnitudes(floats), 1))
    return scale_of(tl.max(largest, 0))


@triton.jit
def _quantized(values, GROUPED: tl.constexpr, TOKENS: tl.constexpr, HELD: tl.constexpr, ROUND: tl.constexpr):
    """Codes, [1, WIDE], and scales of what is held of each token."""
    PIECES: tl.constexpr = values[0].shape[0]
    codes, scales = (), ()
    for i in tl.static_range(HELD * TOKENS):
        floats = _joined(values[2 * i], values[2 * i + 1])
        if GROUPED:
            scale = _group_scales(floats)
            wide = tl.broadcast_to(scale[:, None], [PIECES, PIECE])
        else:
            scale = _token_scales(values, i % TOKENS, TOKENS, HELD)
            wide = tl.zeros([PIECES, PIECE], tl.float32) + scale
        codes = codes + (encoded(floats, wide, ROUND).reshape(1, PIECES * PIECE),)
        scales = scales + (scale,)
    return codes, scales


@triton.jit
def _added(totals, weights, of_rows, codes, scales, i: tl.constexpr, TOKENS: tl.constexpr):
    """Each token's totals [ROWS, WIDE / 16] with the products of the i-th codes held, of it and of `weights`, float32
    [ROWS, WIDE]; of_rows are the scales of groups, or None."""
    ROWS: tl.constexpr = weights.shape[0]
    PIECES: tl.constexpr = weights.shape[1] // PIECE
    found = ()
    for t in tl.static_range(TOKENS):
        products = weights * codes[i * TOKENS + t].to(tl.float32)
        sums = tl.sum(products.reshape(ROWS, PIECES, PIECE), 2)
        if of_rows is not None:
            sums *= (of_rows * scales[i * TOKENS + t])[None, :]
        else:
            sums *= scales[i * TOKENS + t]
        found = found + (totals[t] + sums,)
    return found


@jit(do_not_specialize=["M", "xs_k", "ws_n"])
def _vector_kernel(
    x, x_scale, w, w_scale, y, M, N, x_m, xs_m, xs_k, ws_n, ws_k,
    K: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr,
    HELD: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Sums of a thread's own 16 columns stay apart, [ROWS, WIDE / 16], until the end. Without x_scale, x is no codes
    yet; unless they are GROUPED, all columns are held."""
    PIECES: tl.constexpr = WIDE // PIECE
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    near_row = tl.minimum(row, N - 1).to(tl.int64)
    weights = w + near_row[:, None] * K
    weight_scales = w_scale + (tl.program_id(0) * ROWS // DEPTH) * ws_n
    first_token = tl.program_id(1) * TOKENS
    totals = (tl.zeros([ROWS, PIECES], tl.float32),) * TOKENS
    if not GROUPED:
        of_channels = tl.load(w_scale + near_row * ws_n)
    for first in range(0, K, WIDE * HELD):
        codes, values, of_rows, of_tokens = (), (), (), ()
        for i in tl.static_range(HELD):
            column = (first + i * WIDE + tl.arange(0, WIDE))[None, :]
            if K % (WIDE * HELD) == 0:
                codes = codes + (tl.load(weights + column, eviction_policy="evict_first"),)
            else:
                inside = column < K
                codes = codes + (tl.load(weights + column, mask=inside, other=0.0, eviction_policy="evict_first"),)
            piece = first + i * WIDE + tl.arange(0, PIECES) * PIECE
            if GROUPED:
                of_rows = of_rows + (tl.load(weight_scales + tl.minimum(piece, K - 1) // DEPTH * ws_k),)
        wait()
        for i in tl.static_range(HELD):
            column = (first + i * WIDE + tl.arange(0, WIDE))[None, :]
            inside = column < K
            piece = first + i * WIDE + tl.arange(0, PIECES) * PIECE
            group = tl.minimum(piece, K - 1) // DEPTH
            for t in tl.static_range(TOKENS):
                token = tl.minimum(first_token + t, M - 1)
                if x_scale is None:
                    values = values + _halves(x + token * x_m, piece, K)
                elif K % (WIDE * HELD) == 0:
                    values = values + (tl.load(x + token * x_m + column),)
                else:
                    values = values + (tl.load(x + token * x_m + column, mask=inside, other=0.0),)
                if x_scale is not None:
                    of_tokens = of_tokens + (tl.load(x_scale + token * xs_m + (group * xs_k if GROUPED else 0)),)
        # One wait for all of them: the compiler moves no load over a barrier, and no use of one before a branch, which
        # is always taken.
        tl.debug_barrier()
        if M > 0:
            given, scales = values, of_tokens
            if x_scale is None:
                given, scales = _quantized(values, GROUPED, TOKENS, HELD, ROUND)
            for i in tl.static_range(HELD):
                of_row = of_rows[i] if GROUPED else None
                totals = _added(totals, codes[i].to(tl.float32), of_row, given, scales, i, TOKENS)
    for t in tl.static_range(TOKENS):
        total = tl.sum(totals[t], 1)
        if not GROUPED:
            total *= of_channels
        out = y + (first_token + t).to(tl.int64) * N + row
        tl.store(out, total.to(y.dtype.element_ty), mask=row < tl.where(first_token + t < M, N, 0))


def launch(
    out: torch.Tensor, x: torch.Tensor, x_scales: torch.Tensor | None, w: torch.Tensor, w_scales: torch.Tensor,
    strides: tuple[int, int, int, int], grouped: bool, share: Vector,
) -> None:  # fmt: skip
    """What fp8_gemm has checked, x without scales being floats; the strides are those of x's scales and of w's. Raises
    ValueError for a share that holds columns beyond the last."""
    (M, K), N = x.shape, w.shape[0]
    wide = share.columns // share.held
    if share.columns - wide >= K:
        # Triton 3.6 makes wrong numbers of FP8 loads that it finds to be masked altogether.
        raise ValueError(f"{share.held} times {wide} columns are held, of {K}")
    tokens = min(M, MOST_TOKENS)
    _vector_kernel[(cdiv(N, share.rows), cdiv(M, tokens))](
        x, x_scales, w, w_scales, out, M, N, x.stride(0), *strides,
        K=K, GROUPED=grouped, ROWS=share.rows, TOKENS=tokens, WIDE=wide, HELD=share.held, ROUND=INTERPRETED,
        num_warps=share.warps, enable_fp_fusion=True, launch_pdl=PDL,
    )  # fmt: skip
