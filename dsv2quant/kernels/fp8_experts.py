"""Routed experts of e4m3 weights and activations on Hopper: gate_up and down, each one launch over tiles of pairs.

A tile has pairs of one expert (routing.Routes); a program takes some of that expert's rows for it. As in fp8_gemm every
128 columns are one product of their own, scaled outside. Few pairs in a tile: time is that of reading weights, whose
rows are then the M side of the units, which is never below 64; many: pairs are, whose scales are then two of a thread.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv2quant.formats.e4m3 import BLOCK
from dsv2quant.kernels import fp8_experts_prefill
from dsv2quant.kernels.activations import encoded, magnitudes, outputs, quantize_activation, scale_of
from dsv2quant.kernels.fp8_layout import Fp8Experts
from dsv2quant.kernels.jit import cdiv, jit
from dsv2quant.kernels.launch import INTERPRETED, PDL, wait
from dsv2quant.kernels.routing import Routes, choose_block, sort_pairs

DEPTH: tl.constexpr = tl.constexpr(BLOCK)  # columns in one product
FEW = 32  # pairs of a tile that is narrower than weights' rows


class Share(NamedTuple):
    """A program's share: a tile × `rows` of weights, of gate_up half gate's and half up's."""

    rows: int
    stages: int
    warps: int


@triton.jit
def _product(
    x, x_scale, live, xs_k, w, w_scale, half_scales, K,
    GROUPED: tl.constexpr, WHOLE: tl.constexpr, HALVES: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, FEW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """float32 [TOKENS, ROWS] of rows' beginnings x [TOKENS] and w [ROWS], scaled by groups if GROUPED.

    FEW: weights are the M side. Scales of the second half of weights lie `half_scales` behind those of the first.
    """
    column = tl.arange(0, DEPTH)
    upper = tl.arange(0, ROWS) >= ROWS // 2
    weights, values = w[:, None] + column[None, :], x[:, None] + column[None, :]
    blocks = tl.cdiv(K, DEPTH)
    total = tl.zeros([ROWS, TOKENS] if FEW else [TOKENS, ROWS], tl.float32)
    if GROUPED:
        w_scale += upper.to(tl.int32) * half_scales if HALVES else tl.zeros([ROWS], tl.int32)
    for block in tl.range(blocks, num_stages=STAGES):  # said here, it also has scales loaded ahead
        if WHOLE:
            a = tl.load(weights + block * DEPTH, eviction_policy="evict_first" if FEW else "")
            b = tl.load(values + block * DEPTH, mask=live[:, None], other=0.0)
        else:
            inside = (column < K - block * DEPTH)[None, :]
            a = tl.load(weights + block * DEPTH, mask=inside, other=0.0)
            b = tl.load(values + block * DEPTH, mask=live[:, None] & inside, other=0.0)
        if GROUPED:
            of_tokens, of_rows = tl.load(x_scale + block * xs_k), tl.load(w_scale + block)
            if FEW:
                total += tl.dot(a, b.T) * (of_tokens[None, :] * of_rows[:, None])
            else:
                total += tl.dot(b, a.T) * (of_tokens[:, None] * of_rows[None, :])
        else:
            total += tl.dot(a, b.T) if FEW else tl.dot(b, a.T)
    return tl.trans(total) if FEW else total


@triton.jit
def _places(pairs, begins, ends, tile, TOKENS: tl.constexpr):
    """Pairs [TOKENS] of a tile, and which of them there are."""
    place = tl.load(begins + tile) + tl.arange(0, TOKENS)
    live = place < tl.load(ends + tile)
    return tl.load(pairs + place, mask=live, other=0), live


@jit(do_not_specialize=["k", "bands", "blocks", "xs_m", "xs_k", "hs_k"])
def _gate_up_kernel(
    x, x_scale, w, w_scale, h, h_scale, pairs, experts, begins, ends, k, INNER, HIDDEN, bands, blocks, xs_m, xs_k, hs_k,
    GROUPED: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, FEW: tl.constexpr,
    STAGES: tl.constexpr, QUANTIZED: tl.constexpr, DTYPE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """silu(gate) · up in DTYPE, and QUANTIZED by the ROWS // 2 columns that a program has."""
    wait()
    expert = tl.load(experts + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    HALF: tl.constexpr = ROWS // 2
    pair, live = _places(pairs, begins, ends, tl.program_id(1), TOKENS)
    token = pair // k
    first = tl.program_id(0) * HALF
    half = tl.arange(0, ROWS) // HALF
    row = tl.minimum(first + tl.arange(0, ROWS) % HALF, INNER - 1)
    total = _product(
        x + token.to(tl.int64) * HIDDEN, x_scale + token * xs_m, live, xs_k,
        w + expert * (2 * INNER * HIDDEN) + (half * INNER + row) * HIDDEN,
        w_scale + (expert * 2 * bands + first // DEPTH) * blocks, bands * blocks, HIDDEN,
        GROUPED, WHOLE, True, ROWS, TOKENS, FEW, STAGES,
    )  # fmt: skip
    if not GROUPED:
        of_rows = tl.load(w_scale + (expert * 2 + half) * bands + tl.minimum(row, bands - 1))
        total *= tl.load(x_scale + token * xs_m)[:, None] * of_rows[None, :]
    gate, up = tl.split(tl.permute(tl.reshape(total, [TOKENS, 2, HALF]), (0, 2, 1)))
    values = (gate / (1 + tl.exp(-gate)) * up).to(DTYPE)
    column = first + tl.arange(0, HALF)
    inside = live[:, None] & (column < INNER)[None, :]
    out = h + pair[:, None].to(tl.int64) * INNER + column[None, :]
    if QUANTIZED:
        values = tl.where(inside, values.to(tl.float32), 0.0)
        scale = scale_of(tl.max(magnitudes(values), 1))
        tl.store(h_scale + tl.program_id(0) * hs_k + pair, scale, mask=live)
        tl.store(out, encoded(values, tl.broadcast_to(scale[:, None], values.shape), ROUND), mask=inside)
    else:
        tl.store(out, values, mask=inside)


@jit(do_not_specialize=["bands", "blocks", "xs_m", "xs_k"])
def _down_kernel(
    x, x_scale, w, w_scale, routed, out, pairs, experts, begins, ends, INNER, HIDDEN, bands, blocks, xs_m, xs_k,
    GROUPED: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, FEW: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Products of pairs by their routed weights."""
    wait()
    expert = tl.load(experts + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    pair, live = _places(pairs, begins, ends, tl.program_id(1), TOKENS)
    first = tl.program_id(0) * ROWS
    column = first + tl.arange(0, ROWS)
    row = tl.minimum(column, HIDDEN - 1)
    total = _product(
        x + pair.to(tl.int64) * INNER, x_scale + pair * xs_m, live, xs_k,
        w + expert * (HIDDEN * INNER) + row * INNER, w_scale + (expert * bands + first // DEPTH) * blocks, 0, INNER,
        GROUPED, WHOLE, False, ROWS, TOKENS, FEW, STAGES,
    )  # fmt: skip
    weight = tl.load(routed + pair, mask=live, other=0.0)
    if GROUPED:
        total *= weight[:, None]
    else:
        of_rows = tl.load(w_scale + expert * bands + tl.minimum(row, bands - 1))
        total *= (tl.load(x_scale + pair * xs_m) * weight)[:, None] * of_rows[None, :]
    target = out + pair[:, None].to(tl.int64) * HIDDEN + column[None, :]
    tl.store(target, total, mask=live[:, None] & (column < HIDDEN)[None, :])


def choose_gate_up(block: int) -> Share:
    """Of 128 intermediate columns, which are quantized as one group, where pairs are few. Fitted on an H200, as the
    rule of `down`."""
    return Share(256, 4, 8) if block <= FEW else Share(128, 3, block // 16)


def choose_down(block: int) -> Share:
    return Share(128, 4, 4) if block <= FEW else Share(128, 3, block // 16)


def gate_up(
    x: torch.Tensor, x_scales: torch.Tensor, routes: Routes, k: int, stack: Fp8Experts,
    dtype: torch.dtype = torch.bfloat16, share: Share | None = None,
) -> torch.Tensor:  # fmt: skip
    """silu(gate(x)) · up(x) of pairs' tokens and experts, in float32, rounded once to `dtype` [tokens · k, I].

    x is e4m3 [tokens, H], contiguous, with scales as quantize_activation gives them: [tokens, ⌈H/128⌉] in any strides
    for weights of blocks, [tokens, 1] or [1] for others. H and I are multiples of 16.
    Raises ValueError where shapes, dtypes or layouts are others, and TypeError for bfloat16 in Triton's interpreter.
    """
    h = torch.empty(len(routes.pairs), stack.gate_up.shape[2], dtype=dtype, device=x.device)
    _gate_up(x, x_scales, routes, k, stack, h, None, dtype, share or choose_gate_up(routes.block))
    return h


def gate_up_quantized(
    x: torch.Tensor, x_scales: torch.Tensor, routes: Routes, k: int, stack: Fp8Experts,
    dtype: torch.dtype = torch.bfloat16, share: Share | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`gate_up`, quantized by groups of 128 columns as by quantize_activation: e4m3 [tokens · k, I] and scales."""
    h, scales = outputs(len(routes.pairs), stack.gate_up.shape[2], "group128", None, x.device)
    _gate_up(x, x_scales, routes, k, stack, h, scales, dtype, share or choose_gate_up(routes.block))
    return h, scales


def gate_up_codes(
    x: torch.Tensor, x_scales: torch.Tensor, routes: Routes, k: int, stack: Fp8Experts, granularity: str,
    dtype: torch.dtype = torch.bfloat16, scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`gate_up`, quantized as by quantize_activation ('static' by `scale`): in one launch where programs have whole
    groups."""
    if granularity == "group128" and choose_gate_up(routes.block).rows == 2 * BLOCK:
        return gate_up_quantized(x, x_scales, routes, k, stack, dtype)
    return quantize_activation(gate_up(x, x_scales, routes, k, stack, dtype), granularity, scale)


def _gate_up(
    x: torch.Tensor, x_scales: torch.Tensor, routes: Routes, k: int, stack: Fp8Experts,
    h: torch.Tensor, h_scales: torch.Tensor | None, dtype: torch.dtype, share: Share,
) -> None:  # fmt: skip
    inner, hidden = stack.gate_up.shape[2:]
    grouped = _check(x, x_scales, stack.gate_up, stack.gate_up_scales, len(routes.pairs) // k)
    if INTERPRETED and dtype == torch.bfloat16:
        raise TypeError("Triton's interpreter has no bfloat16")
    if h_scales is not None and share.rows != 2 * BLOCK:
        raise ValueError(f"{share.rows} rows in a program: need {2 * BLOCK}, of a whole group")
    if len(h):
        _gate_up_kernel[(cdiv(inner, share.rows // 2), len(routes.experts))](
            x, x_scales, stack.gate_up, stack.gate_up_scales, h, h_scales, *routes[:4], k, inner, hidden,
            *stack.gate_up_scales.shape[2:], *_strides(x_scales), 0 if h_scales is None else h_scales.stride(1),
            GROUPED=grouped, WHOLE=hidden % BLOCK == 0, ROWS=share.rows, TOKENS=routes.block, FEW=routes.block <= FEW,
            QUANTIZED=h_scales is not None, DTYPE=getattr(tl, str(dtype).removeprefix("torch.")),
            ROUND=INTERPRETED,
            STAGES=share.stages, num_warps=share.warps, enable_fp_fusion=True, launch_pdl=PDL,
        )  # fmt: skip


def experts_of_codes(
    x: torch.Tensor, x_scales: torch.Tensor, weights: torch.Tensor, routes: Routes, stack: Fp8Experts, granularity: str,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:  # fmt: skip
    """`down` of `gate_up_codes`, 'token' or 'group128': between them in the order of `routes.pairs` where a kernel for
    many tokens takes both."""
    k = weights.shape[1]
    shares = fp8_experts_prefill.choose(routes, stack) if granularity == "group128" else None
    if shares is None:
        return down(*gate_up_codes(x, x_scales, routes, k, stack, granularity, dtype), weights, routes, stack)
    _check(x, x_scales, stack.gate_up, stack.gate_up_scales, len(routes.pairs) // k)
    _check_weights(weights, len(routes.pairs))
    h, h_scales = fp8_experts_prefill.gate_up_quantized(x, x_scales, routes, k, stack, dtype, shares[0])
    return fp8_experts_prefill.down(h, h_scales, weights, routes, stack, shares[1])


def down(
    h: torch.Tensor, h_scales: torch.Tensor, weights: torch.Tensor, routes: Routes, stack: Fp8Experts,
    share: Share | None = None,
) -> torch.Tensor:  # fmt: skip
    """Routed weight × down(h) of pairs, float32 [tokens, k, H]; `weights` are float32 [tokens, k].

    h is e4m3 [tokens · k, I] with scales as those of gate_up's x. Raises ValueError where shapes, dtypes or layouts are
    others.
    """
    hidden, inner = stack.down.shape[1:]
    grouped = _check(h, h_scales, stack.down, stack.down_scales, len(routes.pairs))
    _check_weights(weights, len(h))
    share = share or choose_down(routes.block)
    out = torch.empty(*weights.shape, hidden, dtype=torch.float32, device=h.device)
    if len(h):
        _down_kernel[(cdiv(hidden, share.rows), len(routes.experts))](
            h, h_scales, stack.down, stack.down_scales, weights, out, *routes[:4], inner, hidden,
            *stack.down_scales.shape[1:], *_strides(h_scales),
            GROUPED=grouped, WHOLE=inner % BLOCK == 0, ROWS=share.rows, TOKENS=routes.block, FEW=routes.block <= FEW,
            STAGES=share.stages, num_warps=share.warps, enable_fp_fusion=True, launch_pdl=PDL,
        )  # fmt: skip
    return out


def experts(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, stack: Fp8Experts, granularity: str,
    input_scales: tuple[torch.Tensor, torch.Tensor] | None = None, routes: Routes | None = None,
) -> torch.Tensor:  # fmt: skip
    """Routed weight × expert(x) of pairs, float32 [tokens, k, H], of x, bfloat16 [tokens, H], in x's dtype.

    `weights` and `chosen` are [tokens, k]; `granularity` that of activations, 'static' by `input_scales`, of gate_up's
    and down's, float32 [1]. `routes` may be given where `chosen` is sorted already.
    """
    of_x, of_h = input_scales or (None, None)
    tokens, k = chosen.shape
    if routes is None:
        routes = sort_pairs(chosen, len(stack.down), choose_block(tokens, k, len(stack.down)))
    codes, scales = quantize_activation(x, granularity, of_x)
    h, h_scales = gate_up_codes(codes, scales, routes, k, stack, granularity, x.dtype, of_h)
    return down(h, h_scales, weights, routes, stack)


def _check_weights(weights: torch.Tensor, pairs: int) -> None:
    if weights.dtype != torch.float32 or weights.numel() != pairs or not weights.is_contiguous():
        raise ValueError(f"weights are {weights.dtype}, {tuple(weights.shape)}: need contiguous float32 [tokens, k]")


def _strides(scales: torch.Tensor) -> tuple[int, int]:
    return (scales.stride(0), scales.stride(1)) if scales.ndim == 2 else (0, 0)


def _check(x: torch.Tensor, x_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, count: int) -> bool:
    """Whether scales are of groups and blocks. Raises ValueError."""
    (N, K), leading = w.shape[-2:], w.shape[:-2]
    if x.shape != (count, K):
        raise ValueError(f"activations are {tuple(x.shape)}; need {(count, K)}")
    for name, codes in (("activations", x), ("weights", w)):
        if codes.dtype != torch.float8_e4m3fn or not codes.is_contiguous() or K % 16 or N % 16:
            raise ValueError(f"{name} are {codes.dtype}, {tuple(codes.shape)}, strides {codes.stride()}: "
                             "need contiguous float8_e4m3fn of widths that are multiples of 16")  # fmt: skip
    if x_scales.dtype != torch.float32 or w_scales.dtype != torch.float32 or not w_scales.is_contiguous():
        raise ValueError(f"scales are {x_scales.dtype} and {w_scales.dtype}; need float32, of weights contiguous")
    blocks = cdiv(K, BLOCK)
    given = tuple(x_scales.shape), tuple(w_scales.shape)
    if given == ((count, blocks), (*leading, cdiv(N, BLOCK), blocks)):
        return True
    if given[0] not in ((count, 1), (1,), ()) or given[1] not in ((*leading, N, 1), (*leading, 1, 1)):
        raise ValueError(
            f"scales of shapes {given[0]} and {given[1]} fit no scheme of {tuple(x.shape)} and {tuple(w.shape)}"
        )
    return False
