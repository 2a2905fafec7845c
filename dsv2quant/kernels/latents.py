"""kv_b's halves as absorbed decoding uses them: one small product per head, before and behind mla_decode.

At few tokens the time is that of reading the weights: a head's columns are cut so that all multiprocessors read at
once. Tokens are the N side of the matrix units, whose M side is the weight's columns, or one token is multiplied by the
vector units as the weights arrive.

What a decode step does to its new positions, in one launch: the latent's norm and the key's rotation, stored in the
cache, and the rotation of the queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv2quant.kernels.decoding import FLOATS_8, as_stored, check_scale
from dsv2quant.kernels.jit import cdiv, jit, power_of_2
from dsv2quant.kernels.launch import INTERPRETED, MULTIPROCESSORS, PDL, check_rows, wait


class Share(NamedTuple):
    """Of one program: `columns` of a head's result for `tokens` tokens, summed in steps of `depth`."""

    columns: int
    tokens: int
    depth: int
    warps: int
    stages: int


@jit(do_not_specialize=["T"])
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
    whole = power_of_2(depth)
    if tokens == 1 and depth > columns:  # a column's weights lie side by side, and there are enough for its threads
        return Share(16, 1, min(whole, 256), 8, 1)
    wide = 128
    while wide > 16 and heads * cdiv(columns, wide) < MULTIPROCESSORS * 3 // 4:
        wide //= 2
    at_once = min(64, max(16, power_of_2(tokens)))
    return Share(wide, at_once, max(16, min(whole, 128)), 8 if tokens == 1 and wide == 128 else 4, 3)


def _per_head(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, share: Share) -> None:
    heads, depth, columns = w.shape
    tokens = len(x)
    if tokens:
        _per_head_kernel[(cdiv(columns, share.columns), heads, cdiv(tokens, share.tokens))](
            x, w, out, tokens, x.stride(0), x.stride(1), *w.stride(), out.stride(0), out.stride(1),
            K=depth, C=columns, COLUMNS=share.columns, TOKENS=share.tokens, DEPTH=share.depth,
            num_warps=share.warps, num_stages=share.stages, enable_fp_fusion=True, launch_pdl=PDL,
        )  # fmt: skip


HEADS = 16  # of one program


@triton.jit
def _rotated(x, turns):
    """Pairs x [..., 2] turned by cosine and sine [..., 2], in float32; back in x's dtype."""
    a, b = tl.split(x.to(tl.float32))
    cosine, sine = tl.split(turns)
    return tl.join(a * cosine - b * sine, a * sine + b * cosine).to(x.dtype)


@jit
def _latents_kernel(
    q, kv, weight, table, positions, cache, cache_scale, q_out, q_stride, kv_stride, heads, capacity, turns, eps,
    NOPE: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, LATENTS: tl.constexpr, HALF: tl.constexpr,
    HALVES: tl.constexpr, HEADS: tl.constexpr, LARGEST: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Program (token, part): part 0 fills the cache, the others turn the queries of HEADS heads each. `turns`: rows of
    the table."""
    wait()
    WIDTH: tl.constexpr = RANK + ROPE
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token)
    pair = tl.arange(0, HALF)[:, None] * 2 + tl.arange(0, 2)[None, :]
    at = tl.arange(0, HALF)[:, None] + tl.arange(0, 2)[None, :] * (ROPE // 2) if HALVES else pair
    known = tl.minimum(tl.maximum(position, 0), turns - 1).to(tl.int64)
    turn = tl.load(table + known * ROPE + pair, mask=pair < ROPE, other=0.0)
    if tl.program_id(1) == 0:
        latent = tl.arange(0, LATENTS)
        source = kv + token * kv_stride
        c = tl.load(source + latent, mask=latent < RANK, other=0.0)
        k = tl.load(source + RANK + at, mask=pair < ROPE, other=0.0)
        gain = tl.load(weight + latent, mask=latent < RANK, other=0.0)
        divisor = 1.0 if LARGEST is None else tl.load(cache_scale)
        tl.debug_barrier()  # and a branch, so that all loads are under way before the first is used: as in add_norm
        if position >= 0 and position < capacity:
            wide = c.to(tl.float32)
            unit = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / RANK + eps)).to(c.dtype).to(tl.float32)
            normed = (unit * gain.to(tl.float32)).to(c.dtype)
            row = cache + (token * capacity + position) * WIDTH
            STORED: tl.constexpr = cache.dtype.element_ty
            tl.store(row + latent, as_stored(normed, divisor, STORED, LARGEST, ROUND), mask=latent < RANK)
            key = as_stored(_rotated(k, turn), divisor, STORED, LARGEST, ROUND)
            tl.store(row + RANK + at, key, mask=pair < ROPE)
    else:
        head = ((tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS))[:, None, None]
        inside = (head < heads) & (pair < ROPE)[None, :, :]
        x = tl.load(q + token * q_stride + head * (NOPE + ROPE) + NOPE + at[None, :, :], mask=inside, other=0.0)
        turned = _rotated(x, tl.broadcast_to(turn[None, :, :], x.shape))
        tl.store(q_out + (token * heads + head) * WIDTH + RANK + at[None, :, :], turned, mask=inside)


def append_latents(
    q: torch.Tensor,
    kv: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    table: torch.Tensor,
    positions: torch.Tensor,
    cache: torch.Tensor,
    cache_scale: torch.Tensor | None,
    q_out: torch.Tensor,
    halves: bool = False,
) -> None:
    """For one new token per sequence: its latent kv[:, :rank], normed, and its rotated key kv[:, rank:] go to
    cache[t, positions[t]], as model/cache.KVCache stores them; its queries' rotated parts to q_out[..., rank:].

    q [T, heads · (nope + rope)] and kv [T, rank + rope] of one dtype (bfloat16, float16 or float32), in rows of any
    stride; norm_weight [rank] of the same, and q_out [T, heads, rank + rope], contiguous, whose first `rank` columns
    stay. RoPE turns neighbours together, or with `halves` elements i and i + rope / 2; table float32 [·, rope / 2, 2]:
    cosine and sine of each position, `torch.view_as_real(Rope.table(…))`; positions int32 [T]. cache [T, capacity,
    rank + rope], contiguous, of a 16- or 32-bit float, or float8 with its `cache_scale`, float32 [1]. What has a
    position beyond the capacity is not stored; beyond the table it turns as the table's last.
    Raises ValueError where shapes, dtypes or layouts are others.
    """
    check_rows("kv", kv, (None, None))
    (tokens, width), rank = kv.shape, norm_weight.shape[0]
    rope = width - rank
    if rope <= 0 or rope % 2:
        raise ValueError(f"of kv's {width} columns {rank} are latents; the others must be pairs")
    check_rows("q_out", q_out, (tokens, None, width), kv.dtype)
    heads = q_out.shape[1]
    check_rows("q", q, (tokens, None), kv.dtype)
    if q.shape[1] % heads or q.shape[1] // heads < rope:
        raise ValueError(f"q has {q.shape[1]} columns, which are not {heads} heads of {rope} or more")
    check_rows("norm_weight", norm_weight, (rank,), kv.dtype)
    check_rows("table", table, (None, rope // 2, 2), torch.float32)
    check_rows("positions", positions, (tokens,), torch.int32)
    check_rows("cache", cache, (tokens, None, width), cache.dtype)
    fp8 = cache.dtype in FLOATS_8
    check_scale(cache.dtype, cache_scale, 1)
    if not (q_out.is_contiguous() and cache.is_contiguous() and table.is_contiguous()):
        raise ValueError("q_out, cache and table must be contiguous")
    if tokens:
        _latents_kernel[(tokens, 1 + cdiv(heads, HEADS))](
            q, kv, norm_weight, table, positions, cache, cache_scale, q_out, q.stride(0), kv.stride(0),
            heads, cache.shape[1], table.shape[0], eps,
            NOPE=q.shape[1] // heads - rope, RANK=rank, ROPE=rope, LATENTS=power_of_2(rank),
            HALF=power_of_2(rope // 2), HALVES=halves, HEADS=HEADS,
            LARGEST=torch.finfo(cache.dtype).max if fp8 else None, ROUND=INTERPRETED,
            num_warps=4, enable_fp_fusion=False, launch_pdl=PDL,
        )  # fmt: skip
