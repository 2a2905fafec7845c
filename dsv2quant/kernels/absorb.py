"""kv_b's halves as absorbed decoding uses them: one small product per head, before and behind mla_decode.

At few tokens the time is that of reading the weights: a head's columns are cut so that all multiprocessors read at
once. Tokens are the N side of the matrix units, whose M side is the weight's columns, or one token is multiplied by the
vector units as the weights arrive.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv2quant.kernels.chain import PDL, wait
from dsv2quant.kernels.checks import MULTIPROCESSORS, check_rows


class Share(NamedTuple):
    """Of one program: `columns` of a head's result for `tokens` tokens, summed in steps of `depth`."""

    columns: int
    tokens: int
    depth: int
    warps: int
    stages: int


@triton.jit(do_not_specialize=["T"])
def _per_head_kernel(
    x, w, out, T, x_t, x_h, w_h, w_k, w_c, out_t, out_h,
    K: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out [T, heads, C] = Σ_k x [T, heads, K] · w [heads, K, C], in strides as named."""
    head = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(2).to(tl.int64) * TOKENS
    token = first + tl.arange(0, TOKENS)
    k = tl.arange(0, DEPTH)
    kept = (column < C)[:, None] & (token < T)[None, :]
    weights = w + head.to(tl.int64) * w_h + column[:, None] * w_c + k[None, :] * w_k
    if TOKENS == 1:
        values = x + first * x_t + head * x_h + k
        products = tl.zeros([COLUMNS, DEPTH], tl.float32)
        read = ()
        for start in tl.static_range(0, K, DEPTH):
            inside = (column < C)[:, None] & (k < K - start)[None, :]
            read = read + (tl.load(weights + start * w_k, mask=inside, other=0.0),)
        wait()
        for start in tl.static_range(0, K, DEPTH):
            a = read[start // DEPTH]
            b = tl.load(values + start, mask=k < K - start, other=0.0).to(a.dtype)
            products += a.to(tl.float32) * b.to(tl.float32)[None, :]
        total = tl.sum(products, 1)[:, None]
    else:
        values = x + token[None, :] * x_t + head * x_h + k[:, None]
        total = tl.zeros([COLUMNS, TOKENS], tl.float32)
        wait()
        for start in tl.range(0, K, DEPTH):
            a = tl.load(weights + start * w_k, mask=(column < C)[:, None] & (k < K - start)[None, :], other=0.0)
            b = tl.load(values + start, mask=(token < T)[None, :] & (k < K - start)[:, None], other=0.0).to(a.dtype)
            total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(out + token[None, :] * out_t + head * out_h + column[:, None], total.to(w.dtype.element_ty), mask=kept)


def absorb_k(q_nope: torch.Tensor, w_k: torch.Tensor, q_out: torch.Tensor, share: Share | None = None) -> torch.Tensor:
    """q_out[..., :rank] = q_nope [T, heads, nope] · w_k [heads, nope, rank]: summed in float32, rounded once. Returns
    q_out [T, heads, rank + rope], whose other columns stay.

    All of one dtype (bfloat16, float16 or float32) and in any strides between rows: q_nope may be a part of q, w_k of
    kv_b_proj's weight. Raises ValueError where shapes, dtypes or layouts are others.
    """
    check_rows("w_k", w_k, (None, None, None))
    heads, nope, rank = w_k.shape
    check_rows("q_nope", q_nope, (None, heads, nope), w_k.dtype)
    check_rows("q_out", q_out, (q_nope.shape[0], heads, None), w_k.dtype)
    if q_out.shape[2] < rank:
        raise ValueError(f"q_out has {q_out.shape[2]} columns, fewer than the latents' {rank}")
    _per_head(q_nope, w_k, q_out, share or choose(len(q_nope), heads, nope, rank))
    return q_out


def absorb_v(mixed: torch.Tensor, w_v: torch.Tensor, share: Share | None = None) -> torch.Tensor:
    """mixed [T, heads, rank] · w_v [heads, v, rank]ᵀ → [T, heads · v], summed in float32, rounded once to w_v's dtype.

    w_v is bfloat16, float16 or float32; mixed is the same, or float32 to be rounded to it first; both in any strides
    between rows. Raises ValueError where shapes, dtypes or layouts are others.
    """
    check_rows("w_v", w_v, (None, None, None))
    heads, v, rank = w_v.shape
    check_rows("mixed", mixed, (None, heads, rank), torch.float32 if mixed.dtype == torch.float32 else w_v.dtype)
    out = torch.empty(len(mixed), heads * v, dtype=w_v.dtype, device=mixed.device)
    _per_head(mixed, w_v.mT, out.unflatten(1, (heads, v)), share or choose(len(mixed), heads, rank, v))
    return out


def choose(tokens: int, heads: int, depth: int, columns: int) -> Share:
    """The shares for `columns` sums of `depth` terms a head: those that were fastest, or near it, for DeepSeek-V2's
    heads on an H200."""
    whole = triton.next_power_of_2(depth)
    if tokens == 1 and depth > columns:  # a column's weights lie side by side, and there are enough for its threads
        return Share(16, 1, min(whole, 256), 8, 1)
    wide = 128
    while wide > 16 and heads * triton.cdiv(columns, wide) < MULTIPROCESSORS * 3 // 4:
        wide //= 2
    at_once = min(64, max(16, triton.next_power_of_2(tokens)))
    return Share(wide, at_once, max(16, min(whole, 128)), 8 if tokens == 1 and wide == 128 else 4, 3)


def _per_head(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, share: Share) -> None:
    heads, depth, columns = w.shape
    tokens = len(x)
    if tokens:
        _per_head_kernel[(triton.cdiv(columns, share.columns), heads, triton.cdiv(tokens, share.tokens))](
            x, w, out, tokens, x.stride(0), x.stride(1), *w.stride(), out.stride(0), out.stride(1),
            K=depth, C=columns, COLUMNS=share.columns, TOKENS=share.tokens, DEPTH=share.depth,
            num_warps=share.warps, num_stages=share.stages, enable_fp_fusion=True, launch_pdl=PDL,
        )  # fmt: skip
