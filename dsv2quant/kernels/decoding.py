"""What the decoding kernels share: sequences split over programs (flash decoding) and the joining of their parts, and
caches in float8."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from dsv2quant.kernels.activations import nearest
from dsv2quant.kernels.jit import cdiv, jit, power_of_2
from dsv2quant.kernels.launch import PDL, wait

FLOATS = (torch.bfloat16, torch.float16)
FLOATS_8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LOG2_E = 1.4426950408889634
MAX_SPLITS = 128
TINY: tl.constexpr = tl.constexpr(1e-30)
COLUMNS = 64  # of one program of the joining kernel


@triton.jit
def share_of(length, splits, TOKENS: tl.constexpr):
    """Tokens of each split, whole blocks; the last splits may get none."""
    return tl.cdiv(tl.cdiv(length, splits), TOKENS) * TOKENS


@triton.jit
def widened(x):
    """float8 → float16. Taken apart and joined again, which costs nothing but keeps the compiler from gathering single
    bytes out of shared memory, in the order of the matrix unit, to convert them there, once for each use."""
    even, odd = tl.split(tl.reshape(x.to(tl.float16), [x.shape[0], x.shape[1] // 2, 2]))
    return tl.interleave(even, odd)


@triton.jit
def power_of_two(largest):
    """The power of two at or below each of `largest`: divided by it, values keep their digits in float16's range."""
    return (tl.maximum(largest, TINY).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def as_stored(x, scale, STORED: tl.constexpr, LARGEST: tl.constexpr, ROUND: tl.constexpr):
    """x as the cache holds it: model/cache.KVCache._encoded."""
    if LARGEST is not None:
        x = tl.div_rn(x.to(tl.float32), tl.zeros(x.shape, tl.float32) + scale)
        x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        if ROUND:  # before the cast, as in activations.encoded
            x = nearest(x, STORED.is_fp8e5())
    return x.to(STORED)


@jit(do_not_specialize=["splits"])
def _join_kernel(
    parts, lse, lengths, out, heads, splits,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    wait()
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    split, column = tl.arange(0, SPLITS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    length = tl.load(lengths + row)
    filled = split * share_of(length, splits, TOKENS) < length  # of the others nothing is defined
    filled &= split < splits
    place = (row * splits + split) * heads + head
    sums = tl.load(lse + place, mask=filled, other=float("-inf"))
    weights = tl.where(filled, tl.exp2(sums - tl.max(sums, 0)), 0.0)
    part = tl.load(
        parts + place[:, None] * WIDTH + column[None, :], mask=filled[:, None] & (column < WIDTH)[None, :], other=0.0
    )
    joined = tl.sum(part * weights[:, None], 0) / tl.maximum(tl.sum(weights, 0), 1.0)
    tl.store(out + (row * heads + head) * WIDTH + column, joined.to(out.dtype.element_ty), mask=column < WIDTH)


def join(parts: torch.Tensor, lse: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor, tokens: int) -> None:
    """out [batch, heads, width]: the mean of parts [batch, splits, heads, width], float32, weighted by 2 to the power
    of lse [batch, splits, heads]. Splits are of whole blocks of so many tokens; the empty ones are left out."""
    batch, splits, heads, width = parts.shape
    _join_kernel[(cdiv(width, COLUMNS), heads, batch)](
        parts, lse, lengths, out, heads, splits,
        WIDTH=width, TOKENS=tokens, SPLITS=power_of_2(splits), COLUMNS=COLUMNS,
        num_warps=4, enable_fp_fusion=True, launch_pdl=PDL,
    )  # fmt: skip


def padded(width: int) -> int:
    """Columns of a tile. Of bytes widened to float16 a thread takes 8 columns at once, four threads 32: Triton 3.6
    multiplies tiles of fewer wrongly and says nothing."""
    return max(32, power_of_2(width))


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Of what `wgmma` and warpgroups need: compute capability 9.0, and no later one."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def check_scale(dtype: torch.dtype, cache_scale: torch.Tensor | None, count: int) -> None:
    """Raises ValueError where a cache of `dtype` has not the scales it takes: `count` if it is float8, or none."""
    if (dtype in FLOATS_8) != (cache_scale is not None):
        raise ValueError("a float8 cache, and no other, takes a cache_scale")
    if cache_scale is not None and (cache_scale.numel() != count or cache_scale.dtype != torch.float32):
        shape = tuple(cache_scale.shape)
        raise ValueError(f"cache_scale is {cache_scale.dtype} {shape}; it must be float32 ({count},)")


def check_call(
    q: torch.Tensor, cache: torch.Tensor, lengths: torch.Tensor, cache_scale: torch.Tensor | None, scales: int
) -> None:
    """Raises ValueError where a decoding kernel's arguments do not fit in dtype, layout or place; where `lengths` does
    not in shape; or where the cache has not the scales that it takes, so many if it is float8."""
    check_scale(cache.dtype, cache_scale, scales)
    if lengths.shape != q.shape[:1] or lengths.dtype != torch.int32:
        raise ValueError(f"lengths is {lengths.dtype} {tuple(lengths.shape)}; it must be int32 ({q.shape[0]},)")
    if q.dtype not in FLOATS or cache.dtype not in (q.dtype, *FLOATS_8):
        raise ValueError(f"q is {q.dtype} and the cache {cache.dtype}; both must be 16-bit floats, or the cache float8")
    tensors = [t for t in (q, cache, lengths, cache_scale) if t is not None]
    if any(not t.is_contiguous() or t.device != q.device for t in tensors):
        raise ValueError("q, cache, lengths and cache_scale must be contiguous and on one device")
    if q.dtype == torch.bfloat16 and q.device.type != "cuda":
        raise ValueError("Triton's interpreter computes bfloat16 wrongly: use float16, or a CUDA device")
