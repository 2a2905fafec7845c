"""What a decode step does to its new positions, in one launch: the latent's norm and the key's rotation, stored in the
cache, and the rotation of the queries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv2quant.kernels.act_quant import nearest
from dsv2quant.kernels.chain import PDL, wait
from dsv2quant.kernels.checks import INTERPRETED, check_rows

FLOATS_8 = (torch.float8_e4m3fn, torch.float8_e5m2)
HEADS = 16  # of one program


@triton.jit
def _rotated(x, turns):
    """Pairs x [..., 2] turned by cosine and sine [..., 2], in float32; back in x's dtype."""
    a, b = tl.split(x.to(tl.float32))
    cosine, sine = tl.split(turns)
    return tl.join(a * cosine - b * sine, a * sine + b * cosine).to(x.dtype)


@triton.jit
def _stored(x, scale, STORED: tl.constexpr, LARGEST: tl.constexpr, ROUND: tl.constexpr):
    """x as the cache holds it: model/cache.LatentCache._encoded."""
    if LARGEST is not None:
        x = tl.div_rn(x.to(tl.float32), tl.zeros(x.shape, tl.float32) + scale)
        x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        if ROUND:  # before the cast, as in act_quant
            x = nearest(x, STORED.is_fp8e5())
    return x.to(STORED)


@triton.jit
def _latents_kernel(
    q, kv, weight, table, positions, cache, cache_scale, q_out, q_stride, kv_stride, heads, capacity, turns, eps,
    NOPE: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, LATENTS: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, LARGEST: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Program (token, part): part 0 fills the cache, the others turn the queries of HEADS heads each. `turns`: rows of
    the table."""
    wait()
    WIDTH: tl.constexpr = RANK + ROPE
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token)
    pair = tl.arange(0, HALF)[:, None] * 2 + tl.arange(0, 2)[None, :]
    known = tl.minimum(tl.maximum(position, 0), turns - 1).to(tl.int64)
    turn = tl.load(table + known * ROPE + pair, mask=pair < ROPE, other=0.0)
    if tl.program_id(1) == 0:
        latent = tl.arange(0, LATENTS)
        source = kv + token * kv_stride
        c = tl.load(source + latent, mask=latent < RANK, other=0.0)
        k = tl.load(source + RANK + pair, mask=pair < ROPE, other=0.0)
        gain = tl.load(weight + latent, mask=latent < RANK, other=0.0)
        divisor = 1.0 if LARGEST is None else tl.load(cache_scale)
        tl.debug_barrier()  # and a branch, so that all loads are under way before the first is used: as in add_norm
        if position >= 0 and position < capacity:
            wide = c.to(tl.float32)
            unit = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / RANK + eps)).to(c.dtype).to(tl.float32)
            normed = (unit * gain.to(tl.float32)).to(c.dtype)
            row = cache + (token * capacity + position) * WIDTH
            STORED: tl.constexpr = cache.dtype.element_ty
            tl.store(row + latent, _stored(normed, divisor, STORED, LARGEST, ROUND), mask=latent < RANK)
            key = _stored(_rotated(k, turn), divisor, STORED, LARGEST, ROUND)
            tl.store(row + RANK + pair, key, mask=pair < ROPE)
    else:
        head = ((tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS))[:, None, None]
        inside = (head < heads) & (pair < ROPE)[None, :, :]
        x = tl.load(q + token * q_stride + head * (NOPE + ROPE) + NOPE + pair[None, :, :], mask=inside, other=0.0)
        turned = _rotated(x, tl.broadcast_to(turn[None, :, :], x.shape))
        tl.store(q_out + (token * heads + head) * WIDTH + RANK + pair[None, :, :], turned, mask=inside)


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
) -> None:
    """For one new token per sequence: its latent kv[:, :rank], normed, and its rotated key kv[:, rank:] go to
    cache[t, positions[t]], as model/cache.LatentCache stores them; its queries' rotated parts to q_out[..., rank:].

    q [T, heads · (nope + rope)] and kv [T, rank + rope] of one dtype (bfloat16, float16 or float32), in rows of any
    stride; norm_weight [rank] of the same, and q_out [T, heads, rank + rope], contiguous, whose first `rank` columns
    stay. table float32 [·, rope / 2, 2]: cosine and sine of each position, `torch.view_as_real(Rope.table(…))`;
    positions int32 [T]. cache [T, capacity, rank + rope], contiguous, of a 16- or 32-bit float, or float8 with its
    `cache_scale`, float32 [1]. What has a position beyond the capacity is not stored; beyond the table it turns as the
    table's last.
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
    if fp8 != (cache_scale is not None):
        raise ValueError("a float8 cache, and no other, takes a cache_scale")
    if cache_scale is not None and (cache_scale.numel() != 1 or cache_scale.dtype != torch.float32):
        raise ValueError(f"cache_scale is {cache_scale.dtype} {tuple(cache_scale.shape)}; it must be float32 (1,)")
    if not (q_out.is_contiguous() and cache.is_contiguous() and table.is_contiguous()):
        raise ValueError("q_out, cache and table must be contiguous")
    if tokens:
        _latents_kernel[(tokens, 1 + triton.cdiv(heads, HEADS))](
            q, kv, norm_weight, table, positions, cache, cache_scale, q_out, q.stride(0), kv.stride(0),
            heads, cache.shape[1], table.shape[0], eps,
            NOPE=q.shape[1] // heads - rope, RANK=rank, ROPE=rope, LATENTS=triton.next_power_of_2(rank),
            HALF=triton.next_power_of_2(rope // 2), HEADS=HEADS,
            LARGEST=torch.finfo(cache.dtype).max if fp8 else None, ROUND=INTERPRETED,
            num_warps=4, enable_fp_fusion=False, launch_pdl=PDL,
        )  # fmt: skip
