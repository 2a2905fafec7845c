"""What a decode step of plain attention does to its new positions, in one launch: the keys' rotation, keys and values
stored in the cache, and the rotation of the queries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv2quant.kernels.decoding import FLOATS_8, as_stored, check_scale
from dsv2quant.kernels.jit import cdiv, jit, power_of_2
from dsv2quant.kernels.launch import INTERPRETED, PDL, check_rows, wait

HEADS = 8  # of one program


@jit
def _append_kernel(
    q, k, v, table, positions, cache, cache_scale, q_out, q_stride, k_stride, v_stride, heads, groups, capacity, turns,
    HALF: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr, LARGEST: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Program (token, part): of the parts the first turn the queries, the others store keys and values, of HEADS heads
    each. `turns`: rows of the table; PAIRS: HALF, padded."""
    wait()
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token)
    pair = tl.arange(0, PAIRS)
    known = tl.minimum(tl.maximum(position, 0), turns - 1).to(tl.int64)
    turn = table + (known * HALF + pair) * 2
    cosine = tl.load(turn, mask=pair < HALF, other=0.0)[None, :]
    sine = tl.load(turn + 1, mask=pair < HALF, other=0.0)[None, :]
    part, parts_of_q = tl.program_id(1), tl.cdiv(heads, HEADS)
    if part < parts_of_q:
        head = (part * HEADS + tl.arange(0, HEADS))[:, None]
        place, inside = head * (2 * HALF) + pair[None, :], (head < heads) & (pair < HALF)[None, :]
        low = tl.load(q + token * q_stride + place, mask=inside, other=0.0)
        high = tl.load(q + token * q_stride + place + HALF, mask=inside, other=0.0)
        first, second = _turned(low, high, cosine, sine)
        to = q_out + token * heads * (2 * HALF) + place
        tl.store(to, first, mask=inside)
        tl.store(to + HALF, second, mask=inside)
    elif position >= 0 and position < capacity:
        head = ((part - parts_of_q) * HEADS + tl.arange(0, HEADS))[:, None]
        place, inside = head * (2 * HALF) + pair[None, :], (head < groups) & (pair < HALF)[None, :]
        low = tl.load(k + token * k_stride + place, mask=inside, other=0.0)
        high = tl.load(k + token * k_stride + place + HALF, mask=inside, other=0.0)
        low_v = tl.load(v + token * v_stride + place, mask=inside, other=0.0)
        high_v = tl.load(v + token * v_stride + place + HALF, mask=inside, other=0.0)
        first, second = _turned(low, high, cosine, sine)
        of_keys = 1.0 if LARGEST is None else tl.load(cache_scale)
        of_values = 1.0 if LARGEST is None else tl.load(cache_scale + 1)
        STORED: tl.constexpr = cache.dtype.element_ty
        to = cache + (token * capacity + position) * groups * (4 * HALF) + place
        tl.store(to, as_stored(first, of_keys, STORED, LARGEST, ROUND), mask=inside)
        tl.store(to + HALF, as_stored(second, of_keys, STORED, LARGEST, ROUND), mask=inside)
        to += groups * (2 * HALF)
        tl.store(to, as_stored(low_v, of_values, STORED, LARGEST, ROUND), mask=inside)
        tl.store(to + HALF, as_stored(high_v, of_values, STORED, LARGEST, ROUND), mask=inside)


@triton.jit
def _turned(low, high, cosine, sine):
    """The halves of a head, whose pairs are (i, i + half), turned in float32; back in their dtype."""
    a, b = low.to(tl.float32), high.to(tl.float32)
    return (a * cosine - b * sine).to(low.dtype), (a * sine + b * cosine).to(low.dtype)


def append_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    cache: torch.Tensor,
    cache_scale: torch.Tensor | None,
    width: int,
) -> torch.Tensor:
    """For one new token per sequence: its rotated keys and its values go to cache[t, positions[t]], as
    model/cache.KVCache stores them; returns its rotated queries, [T, heads, width], contiguous.

    q [T, heads · width], k and v [T, groups · width], of one dtype (bfloat16, float16 or float32), in rows of any
    stride. Of a head's `width` elements i and i + width / 2 are a pair. table float32 [·, width / 2, 2]: cosine and
    sine of each position; positions int32 [T]. cache [T, capacity, 2 · groups · width], contiguous, of a 16- or 32-bit
    float, or float8 with `cache_scale`, float32 [2], of keys and of values. What has a position beyond the capacity is
    not stored; beyond the table it turns as the table's last.
    Raises ValueError where shapes, dtypes or layouts are others.
    """
    check_rows("q", q, (None, None))
    tokens = len(q)
    check_rows("k", k, (tokens, None), q.dtype)
    check_rows("v", v, (tokens, k.shape[1]), q.dtype)
    if width < 2 or width % 2 or q.shape[1] % width or k.shape[1] % width:
        columns = f"q has {q.shape[1]} columns and k {k.shape[1]}"
        raise ValueError(f"{columns}, which are not heads of {width}, an even width")
    check_rows("table", table, (None, width // 2, 2), torch.float32)
    check_rows("positions", positions, (tokens,), torch.int32)
    check_rows("cache", cache, (tokens, None, 2 * k.shape[1]), cache.dtype)
    check_scale(cache.dtype, cache_scale, 2)
    if not (cache.is_contiguous() and table.is_contiguous()):
        raise ValueError("cache and table must be contiguous")
    heads, groups = q.shape[1] // width, k.shape[1] // width
    out = q.new_empty(tokens, heads, width)
    if tokens:
        _append_kernel[(tokens, cdiv(heads, HEADS) + cdiv(groups, HEADS))](
            q, k, v, table, positions, cache, cache_scale, out, q.stride(0), k.stride(0), v.stride(0),
            heads, groups, cache.shape[1], table.shape[0],
            HALF=width // 2, PAIRS=power_of_2(width // 2), HEADS=HEADS,
            LARGEST=torch.finfo(cache.dtype).max if cache.dtype in FLOATS_8 else None, ROUND=INTERPRETED,
            num_warps=4, enable_fp_fusion=False, launch_pdl=PDL,
        )  # fmt: skip
    return out
