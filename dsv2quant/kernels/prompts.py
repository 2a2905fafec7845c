"""What a prompt's latent attention does around its products, where each token has a row of its own: latents' norm,
rotations, the cache and the codes of kv_b's input in one launch, and in another the keys of all heads.

Time is that of the memory: everything is read once and written once. Values are not copied: attention takes them where
kv_b's product left them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from dsv2quant.formats.e4m3 import BLOCK
from dsv2quant.kernels.activations import SPAN, outputs, quantize_row
from dsv2quant.kernels.decoding import FLOATS_8, as_stored, check_scale
from dsv2quant.kernels.jit import cdiv, jit, power_of_2
from dsv2quant.kernels.latents import _rotated
from dsv2quant.kernels.launch import INTERPRETED, PDL, check_rows, wait

HEADS = 32  # of one program


class Prompt(NamedTuple):
    """What `append_prompt` makes of T tokens beside the rotation of their queries."""

    latents: torch.Tensor  # [T, rank], normed
    keys: torch.Tensor  # [T, rope], rotated: of all heads
    codes: torch.Tensor | None  # of latents, and their scales, as quantize_activation returns them
    scales: torch.Tensor | None


@jit(do_not_specialize=["new", "first", "scale_stride"])
def _prompt_kernel(
    q, kv, weight, table, cache, cache_scale, latents, keys, codes, scales, q_stride, kv_stride, scale_stride, heads,
    new, first, capacity, eps,
    NOPE: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr,
    HALVES: tl.constexpr, HEADS: tl.constexpr, GRANULARITY: tl.constexpr, LARGEST: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Program (token, part): part 0 makes latent and key, the others turn the queries of HEADS heads each."""
    wait()
    WIDTH: tl.constexpr = RANK + ROPE
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(0) % new
    pair = tl.arange(0, HALF)[:, None] * 2 + tl.arange(0, 2)[None, :]
    at = tl.arange(0, HALF)[:, None] + tl.arange(0, 2)[None, :] * (ROPE // 2) if HALVES else pair
    turn = tl.load(table + place * ROPE + pair, mask=pair < ROPE, other=0.0)
    if tl.program_id(1) == 0:
        group = tl.arange(0, GROUPS)
        column = group[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
        inside = column < RANK
        source = kv + token * kv_stride
        c = tl.load(source + column, mask=inside, other=0.0)
        k = tl.load(source + RANK + at, mask=pair < ROPE, other=0.0)
        gain = tl.load(weight + column, mask=inside, other=0.0)
        wide = c.to(tl.float32)
        unit = (wide * tl.rsqrt(tl.sum(tl.sum(wide * wide, 1), 0) / RANK + eps)).to(c.dtype).to(tl.float32)
        normed = (unit * gain.to(tl.float32)).to(c.dtype)
        key = _rotated(k, turn)
        tl.store(latents + token * RANK + column, normed, mask=inside)
        tl.store(keys + token * ROPE + at, key, mask=pair < ROPE)
        if codes is not None:
            scale_at = scales if GRANULARITY == "static" else scales + token
            quantize_row(
                normed.to(tl.float32), codes + token * RANK + column, scale_at, group, inside, scale_stride,
                (RANK + SPAN - 1) // SPAN, GRANULARITY, ROUND,
            )  # fmt: skip
        if cache is not None:
            divisor = 1.0 if LARGEST is None else tl.load(cache_scale)
            STORED: tl.constexpr = cache.dtype.element_ty
            row = cache + ((tl.program_id(0) // new).to(tl.int64) * capacity + first + place) * WIDTH
            tl.store(row + column, as_stored(normed, divisor, STORED, LARGEST, ROUND), mask=inside)
            tl.store(row + RANK + at, as_stored(key, divisor, STORED, LARGEST, ROUND), mask=pair < ROPE)
    elif q is not None:
        head = ((tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS))[:, None, None]
        turned = (head < heads) & (pair < ROPE)[None, :, :]
        target = q + token * q_stride + head * (NOPE + ROPE) + NOPE + at[None, :, :]
        x = tl.load(target, mask=turned, other=0.0)
        tl.store(target, _rotated(x, tl.broadcast_to(turn[None, :, :], x.shape)), mask=turned)


def append_prompt(
    kv: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    table: torch.Tensor,
    q: torch.Tensor | None = None,
    heads: int = 0,
    *,
    cache: torch.Tensor | None = None,
    cache_scale: torch.Tensor | None = None,
    first: int = 0,
    halves: bool = False,
    quantize: str | None = None,
    scale: torch.Tensor | None = None,
) -> Prompt:
    """Of the tokens of some sequences, one sequence's after the other: the latents kv[:, :rank], normed, and the
    rotated keys kv[:, rank:], which also go to cache[sequence, first …], as model/cache.KVCache stores them. Where
    there are queries q, the last `rope` columns of each of so many heads are turned where they are.

    kv [T, rank + rope] and q [T, heads · (nope + rope)] of one dtype (bfloat16, float16 or float32), in rows of any
    stride; norm_weight [rank] of the same. table float32 [new, rope / 2, 2], contiguous: cosine and sine of the
    positions of a sequence's `new` tokens; RoPE turns neighbours together, or with `halves` elements i and i + rope /
    2. cache [T / new, capacity, rank + rope], contiguous, of a 16- or 32-bit float, or float8 with its `cache_scale`,
    float32 [1]. `quantize`: None, or the granularity of quantize_activation, 'static' by `scale`, float32 [1].
    Raises ValueError where shapes, dtypes or layouts are others, or the cache ends before the tokens do.
    """
    check_rows("kv", kv, (None, None))
    check_rows("norm_weight", norm_weight, (None,), kv.dtype)
    (tokens, width), rank = kv.shape, norm_weight.shape[0]
    rope = width - rank
    if rope <= 0 or rope % 2:
        raise ValueError(f"of kv's {width} columns {rank} are latents; the others must be pairs")
    width_of_q = rope
    if q is not None:
        check_rows("q", q, (tokens, None), kv.dtype)
        width_of_q, beyond = divmod(q.shape[1], max(heads, 1))
        if beyond or width_of_q < rope:
            raise ValueError(f"q has {q.shape[1]} columns, which are not {heads} heads of {rope} or more")
    check_rows("table", table, (None, rope // 2, 2), torch.float32)
    new = table.shape[0]
    if not table.is_contiguous() or tokens % max(new, 1):
        raise ValueError(f"the table must be contiguous, of positions that divide {tokens} tokens")
    if cache is not None:
        check_rows("cache", cache, (tokens // max(new, 1), None, width), cache.dtype)
        check_scale(cache.dtype, cache_scale, 1)
        if not cache.is_contiguous() or first < 0 or first + new > cache.shape[1]:
            raise ValueError(f"the cache must be contiguous, and hold tokens {first} to {first + new}")
    latents, keys = kv.new_empty(tokens, rank), kv.new_empty(tokens, rope)
    codes, scales = (None, None) if quantize is None else outputs(tokens, rank, quantize, scale, kv.device)
    if tokens:
        groups = power_of_2(cdiv(rank, BLOCK))
        largest = torch.finfo(cache.dtype).max if cache is not None and cache.dtype in FLOATS_8 else None
        heads_at_once = min(HEADS, power_of_2(max(heads, 1)))
        _prompt_kernel[(tokens, 1 if q is None else 1 + cdiv(heads, HEADS))](
            q, kv, norm_weight, table, cache, cache_scale if largest else None, latents, keys, codes, scales,
            0 if q is None else q.stride(0), kv.stride(0), 0 if scales is None or scales.ndim < 2 else scales.stride(1),
            heads, new, first, 0 if cache is None else cache.shape[1], eps,
            NOPE=width_of_q - rope, RANK=rank, ROPE=rope, GROUPS=groups,
            HALF=power_of_2(rope // 2), HALVES=halves, HEADS=heads_at_once,
            GRANULARITY=quantize, LARGEST=largest, ROUND=INTERPRETED,
            num_warps=4, enable_fp_fusion=False, launch_pdl=PDL,
        )  # fmt: skip
    return Prompt(latents, keys, codes, scales)


@jit
def _keys_kernel(
    values, keys, out, values_stride, heads,
    NOPE: tl.constexpr, HEAD: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr, WIDE: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """Program (token, HEADS heads). HEAD: columns of a head in `values`; WIDE and NARROW: NOPE and ROPE, padded."""
    wait()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column, turned = tl.arange(0, WIDE)[None, :], tl.arange(0, NARROW)[None, :]
    inside = (head < heads) & (column < NOPE)
    own = tl.load(values + token * values_stride + head * HEAD + column, mask=inside, other=0.0)
    shared = tl.load(keys + token * ROPE + turned, mask=turned < ROPE, other=0.0)
    row = out + (token * heads + head) * (NOPE + ROPE)
    tl.store(row + column, own, mask=inside)
    shared = tl.broadcast_to(shared, [HEADS, NARROW])
    tl.store(row + NOPE + turned, shared, mask=(head < heads) & (turned < ROPE))


def prompt_keys(values: torch.Tensor, keys: torch.Tensor, heads: int, nope: int) -> torch.Tensor:
    """The keys of all heads, [T, heads, nope + rope]: the first `nope` columns of each head of kv_b's output `values`
    [T, heads · ·], in rows of any stride, and the rotated key [T, rope] that all share, contiguous.

    Both are of one dtype, bfloat16, float16 or float32. Raises ValueError where shapes, dtypes or layouts are others.
    """
    check_rows("values", values, (None, None))
    check_rows("keys", keys, (len(values), None), values.dtype)
    if values.shape[1] % heads or values.shape[1] // heads < nope or not keys.is_contiguous():
        columns = f"values have {values.shape[1]} columns"
        raise ValueError(f"{columns}: need {heads} heads of {nope} or more, and contiguous keys")
    tokens, rope = keys.shape
    out = values.new_empty(tokens, heads, nope + rope)
    if tokens:
        at_once = min(HEADS, power_of_2(heads))
        _keys_kernel[(tokens, cdiv(heads, at_once))](
            values, keys, out, values.stride(0), heads,
            NOPE=nope, HEAD=values.shape[1] // heads, ROPE=rope, HEADS=at_once,
            WIDE=power_of_2(nope), NARROW=power_of_2(rope), num_warps=4, launch_pdl=PDL,
        )  # fmt: skip
    return out
