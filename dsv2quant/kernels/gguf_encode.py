"""GGUF block types encoded on a CUDA device, to the bytes of the CPU's encoders (formats/gguf/blocks.py).

Three steps, each a kernel over the whole matrix: a search per sub-block and the scales of a block rounded
(gguf/scales.py), then the levels of all elements, each by itself, one element a lane. Between them lie float32 scales
per sub-block and a byte per element: beside x and the result, up to 4 bytes per element are used. Bytes are then put in
their places by torch, in whole numbers. Where sums leave float32's range (magnitudes above 1e9) a scale may be a NaN of
another sign than x86's.
"""

from __future__ import annotations

from functools import reduce

import torch
import triton
import triton.language as tl

from dsv2quant.formats.gguf.blocks import TYPES, nbytes
from dsv2quant.kernels.gguf import scales
from dsv2quant.kernels.gguf.lanes import (
    EXACT,
    energies,
    half,
    inverse,
    level,
    programs,
    these_lanes,
    truncate,
    uneven_level,
)
from dsv2quant.kernels.gguf.scales import Weights

# What has kernels: all that models are commonly served in. The rest is encoded on the CPU alone.
ENCODED = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "IQ4_XS",
)  # fmt: skip
ELEMENTS = 1024  # of one program


@triton.jit
def _affine_kernel(
    x, factor, origin, d, m, codes, mins, levels, count,
    NMAX: tl.constexpr, SIZE: tl.constexpr, SUBS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    at, inside = these_lanes(count, LANES)
    sub = at // SIZE
    v = tl.load(x + at, mask=inside, other=0.0)
    searched = tl.load(factor + sub, mask=inside, other=0.0) * (v - tl.load(origin + sub, mask=inside, other=0.0))
    if d is not None:
        code = tl.load(codes + sub, mask=inside, other=0).to(tl.float32)
        low = tl.load(mins + sub, mask=inside, other=0).to(tl.float32)
        step = half(tl.load(d + sub // SUBS, mask=inside, other=0.0)) * code
        low = half(tl.load(m + sub // SUBS, mask=inside, other=0.0)) * low
        searched = tl.where(step != 0, tl.div_rn(v + low, step), searched)
    tl.store(levels + at, level(searched, 0, NMAX).to(tl.int32).to(tl.uint8), mask=inside)


def levels_affine(
    x: torch.Tensor,
    factor: torch.Tensor,
    origin: torch.Tensor,
    nmax: int,
    stored: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """x float32 [sub-blocks, elements], factor and origin [sub-blocks] of its search → levels 0 … nmax, uint8 like x.

    `stored` scales: float32 d and m [blocks], yet to be rounded to float16, and their multiples uint8 [blocks, subs]; a
    sub-block whose stored scale is 0, and every one without `stored`, has the levels of its search.
    """
    d, m, codes, mins = stored or (None, None, None, None)
    levels = torch.empty_like(x, dtype=torch.uint8)
    _affine_kernel[programs(x.numel(), ELEMENTS)](
        x, factor, origin, d, m, codes, mins, levels, x.numel(), nmax,
        SIZE=x.shape[1], SUBS=1 if codes is None else codes.shape[1], LANES=ELEMENTS, **EXACT,
    )  # fmt: skip
    return levels


@triton.jit
def _symmetric_kernel(
    x, factor, d, codes, levels, count,
    NMAX: tl.constexpr, SIZE: tl.constexpr, SUBS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    at, inside = these_lanes(count, LANES)
    sub = at // SIZE
    v = tl.load(x + at, mask=inside, other=0.0)
    if factor is not None:
        times = tl.load(factor + sub, mask=inside, other=0.0)
        found = tl.where(times != 0, level(times * v, -NMAX, NMAX - 1).to(tl.int32) + NMAX, 0)
    else:
        found = tl.load(levels + at, mask=inside, other=0).to(tl.int32)
    if d is not None:
        step = half(tl.load(d + sub // SUBS, mask=inside, other=0.0))
        step = step * tl.load(codes + sub, mask=inside, other=0).to(tl.float32)
        found = tl.where(step != 0, level(tl.div_rn(v, step), -NMAX, NMAX - 1).to(tl.int32) + NMAX, found)
    tl.store(levels + at, found.to(tl.uint8), mask=inside)


def levels_symmetric(
    x: torch.Tensor,
    searched: torch.Tensor,
    nmax: int,
    stored: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """x float32 [sub-blocks, elements] → levels 0 … 2 nmax − 1, uint8 like x.

    `searched`: the factor of each sub-block's search, float32 [sub-blocks], or its levels uint8 like x (which then
    become the result). `stored`: d float32 [blocks], yet to be rounded to float16, and its multiples int8 [blocks,
    subs]; levels are of the search where the stored scale is 0, and everywhere without `stored`.
    """
    d, codes = stored or (None, None)
    kept = searched.dtype == torch.uint8
    levels = searched if kept else torch.empty_like(x, dtype=torch.uint8)
    _symmetric_kernel[programs(x.numel(), ELEMENTS)](
        x, None if kept else searched, d, codes, levels, x.numel(), nmax,
        SIZE=x.shape[1], SUBS=1 if codes is None else codes.shape[1], LANES=ELEMENTS, **EXACT,
    )  # fmt: skip
    return levels


@triton.jit
def _truncate_kernel(x, scale, low, levels, count, NMAX: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr):
    at, inside = these_lanes(count, LANES)
    v = tl.load(x + at, mask=inside, other=0.0)
    times = inverse(tl.load(scale + at // SIZE, mask=inside, other=0.0))
    if low is not None:
        v = (v - tl.load(low + at // SIZE, mask=inside, other=0.0)) * times + 0.5
        code = tl.minimum(truncate(v), NMAX)
    else:
        code = tl.minimum(truncate(v * times + (NMAX + 0.5)), 2 * NMAX - 1)
    tl.store(levels + at, code.to(tl.uint8), mask=inside)


def levels_truncated(x: torch.Tensor, scale: torch.Tensor, low: torch.Tensor | None, nmax: int) -> torch.Tensor:
    """x float32 [blocks, 32] → levels uint8 like x: 0 … nmax above `low`, or without one 0 … 2 nmax − 1 (legacy.py)."""
    levels = torch.empty_like(x, dtype=torch.uint8)
    _truncate_kernel[programs(x.numel(), ELEMENTS)](
        x, scale, low, levels, x.numel(), nmax, SIZE=x.shape[1], LANES=ELEMENTS, **EXACT
    )
    return levels


@triton.jit
def _uneven_kernel(x, scale, levels, count, SIZE: tl.constexpr, LANES: tl.constexpr):
    at, inside = these_lanes(count, LANES)
    times = inverse(tl.load(scale + at // SIZE, mask=inside, other=0.0))
    found = uneven_level(times * tl.load(x + at, mask=inside, other=0.0))
    tl.store(levels + at, found.to(tl.uint8), mask=inside)


def levels_uneven(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x float32 [sub-blocks, 32], scale float32 [sub-blocks] → the numbers of IQ4's levels, uint8 like x."""
    levels = torch.empty_like(x, dtype=torch.uint8)
    _uneven_kernel[programs(x.numel(), ELEMENTS)](x, scale, levels, x.numel(), SIZE=x.shape[1], LANES=ELEMENTS, **EXACT)
    return levels


@triton.jit
def _q8_0_kernel(x, scale, codes, count, BLOCKS: tl.constexpr):
    block, inside = these_lanes(count, BLOCKS)
    at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    v = tl.load(x + at, mask=inside[:, None], other=0.0)
    d = tl.div_rn(tl.max(tl.abs(v), 1), 127.0)
    tl.store(scale + block, d, mask=inside)
    v = v * inverse(d)[:, None]
    code = truncate(v)
    rest = tl.where(tl.abs(v) < 1073741824.0, v - code.to(tl.float32), 0.0)  # exact; half away from zero
    code += tl.where(rest >= 0.5, 1, 0) - tl.where(rest <= -0.5, 1, 0)
    tl.store(codes + at, code.to(tl.uint8), mask=inside[:, None])


def round_q8_0(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x float32 [blocks, 32] → scale float32 [blocks] and codes, int8 held as uint8, like x."""
    scale, codes = x.new_empty(len(x)), torch.empty_like(x, dtype=torch.uint8)
    blocks = ELEMENTS // 32
    _q8_0_kernel[programs(len(x), blocks)](x, scale, codes, len(x), BLOCKS=blocks, **EXACT)
    return scale, codes


def encode(name: str, x: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """float32 or bfloat16 [rows, cols] → uint8 [rows, bytes of a row], as blocks.encode; a type of ENCODED.

    `importance` float32 [cols], on the same device, the current one. x must be finite.
    Raises ValueError where cols is not a multiple of the type's block or importance has another length.
    """
    rows, cols = x.shape
    row_bytes = nbytes(name, (cols,))
    if importance is not None and importance.shape != (cols,):
        raise ValueError(f"importance has shape {tuple(importance.shape)}; {cols} columns need ({cols},)")
    x = x.float().contiguous()
    weights = None if importance is None else importance.float().contiguous()
    match name:
        case "F32":
            out = x
        case "F16":
            out = x.half()
        case "BF16":
            out = x.bfloat16()
        case "Q8_0":
            out = _encode_q8_0(x)
        case "Q4_0" | "Q4_1" | "Q5_0" | "Q5_1":
            out = _encode_q45(x, weights, int(name[1]), name.endswith("_1"))
        case "Q2_K":
            out = _encode_q2_k(x, weights)
        case "Q3_K":
            out = _encode_q3_k(x, weights)
        case "Q4_K" | "Q5_K":
            out = _encode_q45_k(x, weights, int(name[1]))
        case "Q6_K":
            out = _encode_q6_k(x, weights)
        case "IQ4_NL" | "IQ4_XS":
            out = _encode_iq4(x, weights, TYPES[name].values)
    return out.view(torch.uint8).view(rows, row_bytes)


def _encode_q8_0(x: torch.Tensor) -> torch.Tensor:
    scale, codes = round_q8_0(x.view(-1, 32))
    return torch.cat([_halves(scale), codes], 1)


def _encode_q45(x: torch.Tensor, importance: torch.Tensor | None, bits: int, affine: bool) -> torch.Tensor:
    cols = x.shape[1]
    blocks = x.view(-1, 32)
    nmax = (1 << bits) - 1 if affine else 1 << (bits - 1)
    if importance is None:
        scale, low = scales.fit_range(blocks, nmax, affine)
        halves = [scale, low] if affine else [scale]
        levels = levels_truncated(blocks, scale, low if affine else None, nmax)
    else:
        weights = Weights("spread", importance, cols // 32, energies(x, cols), cols // 32, 1.0, float(cols))
        if affine:
            scale, depth, factor, origin, _ = scales.fit_affine(blocks, weights, nmax, -0.9, 0.05, 36)
            halves = [scale, depth.neg()]
            levels = levels_affine(blocks, factor, origin, nmax)
        else:
            scale, factor, _ = scales.fit_symmetric(blocks, weights, nmax)
            halves = [scale]
            levels = levels_symmetric(blocks, factor, nmax)
    parts = [_halves(x) for x in halves]
    if bits == 5:
        parts.append(_merge((levels >> 4 & 1).view(-1, 4, 8).transpose(1, 2), 1))
    return torch.cat([*parts, _merge((levels & 15).view(-1, 2, 16), 4)], 1)


def _encode_q45_k(x: torch.Tensor, importance: torch.Tensor | None, bits: int) -> torch.Tensor:
    subs, nmax = x.view(-1, 32), (1 << bits) - 1
    if importance is None:
        start, steps = (-1.0, 20) if bits == 4 else (-0.5, 15)
        scale, depth, factor, origin, _ = scales.fit_affine(subs, Weights("size"), nmax, start, 0.1, steps)
        total = None
    else:
        weights = Weights("spread", importance, x.shape[1] // 32, energies(x, 256), 8, 2.0, 256.0)
        scale, depth, factor, origin, total = scales.fit_affine(subs, weights, nmax, -0.9, 0.05, 36)
    d, codes = scales.round_positive(scale, total, 8, 63, 63)
    m, mins = scales.round_positive(depth, total, 8, 63, 63)
    if bits == 5:
        codes, mins = codes.clamp(max=63), mins.clamp(max=63)
    firsts = [x[:, :4] | x[:, 4:] >> 4 << 6 for x in (codes, mins)]
    packed = torch.cat([*firsts, codes[:, 4:] & 15 | mins[:, 4:] << 4], 1)
    # Read back (get_scale_min_k4), since a code above 63 runs into the bits of others.
    codes = torch.cat([packed[:, :4] & 63, packed[:, 8:] & 15 | packed[:, :4] >> 6 << 4], 1)
    mins = torch.cat([packed[:, 4:8] & 63, packed[:, 8:] >> 4 | packed[:, 4:8] >> 6 << 4], 1)
    levels = levels_affine(subs, factor, origin, nmax, (d, m, codes, mins))
    parts = [_halves(d), _halves(m), packed]
    if bits == 5:
        parts.append(_merge((levels >> 4).view(-1, 8, 32), 1))
    return torch.cat([*parts, _merge((levels & 15).view(-1, 4, 2, 32), 4)], 1)


def _encode_q6_k(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    subs = x.view(-1, 16)
    weights = Weights("square") if importance is None else Weights("raw", importance, x.shape[1] // 16)
    scale, factor, _ = scales.fit_symmetric(subs, weights, 32)
    d, codes = scales.round_q6_k(scale, factor, 16)
    levels = levels_symmetric(subs, factor, 32, (d, codes)).view(-1, 2, 4, 32)
    low = _merge((levels & 15).view(-1, 2, 2, 64), 4)
    return torch.cat([low, _merge(levels >> 4, 2), codes.view(torch.uint8), _halves(d)], 1)


def _encode_q2_k(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    subs = x.view(-1, 16)
    if importance is None:
        scale, depth, factor, origin, _ = scales.fit_affine(subs, Weights("magnitude"), 3, -0.5, 0.1, 15, absolute=True)
        total = None
    else:
        weights = Weights("spread", importance, x.shape[1] // 16, energies(x, 256), 16, 1.0, 256.0)
        scale, depth, factor, origin, total = scales.fit_affine(subs, weights, 3, -0.9, 0.05, 36)
    d, codes = scales.round_positive(scale, total, 16, 15, 255)
    m, mins = scales.round_positive(depth, total, 16, 15, 255)
    packed = codes | mins << 4
    levels = levels_affine(subs, factor, origin, 3, (d, m, packed & 15, packed >> 4))
    return torch.cat([packed, _merge(levels.view(-1, 2, 4, 32), 2), _halves(d), _halves(m)], 1)


def _encode_q3_k(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    subs = x.view(-1, 16)
    if importance is None:
        scale, searched = scales.fit_by_descent(subs, 4)
        total = None
    else:
        weights = Weights("spread", importance, x.shape[1] // 16, energies(x, 256), 16, 2.0, 256.0)
        scale, searched, total = scales.fit_symmetric(subs, weights, 4)
    d, codes = scales.round_signed(scale, total, 16)
    levels = levels_symmetric(subs, searched, 4, (d, codes.to(torch.int8) - 32))
    high = _merge((levels >> 2).view(-1, 8, 32), 1)
    low = _merge((levels & 3).view(-1, 2, 4, 32), 2)
    packed = torch.cat([_merge((codes & 15).view(-1, 2, 8), 4), _merge((codes >> 4).view(-1, 4, 4), 2)], 1)
    return torch.cat([high, low, packed, _halves(d)], 1)


def _encode_iq4(x: torch.Tensor, importance: torch.Tensor | None, size: int) -> torch.Tensor:
    """IQ4_NL (size 32) and IQ4_XS (256)."""
    subs, parts = x.view(-1, 32), size // 32
    weights = Weights("square")
    if importance is not None:
        weights = Weights("spread", importance, x.shape[1] // 32, energies(x, size), parts, 2 / size)
    scale = scales.fit_uneven(subs, weights)
    if parts == 1:
        return torch.cat([_halves(scale), _merge(levels_uneven(subs, scale).view(-1, 2, 16), 4)], 1)
    d, codes = scales.round_uneven(scale, parts)
    low = _merge((codes & 15).view(-1, 4, 2).transpose(1, 2), 4)
    high = _merge((codes >> 4).view(-1, 2, 4).transpose(1, 2), 2)
    levels = _merge(levels_uneven(subs, scale).view(-1, 8, 2, 16), 4)
    return torch.cat([_halves(d), high, low, levels], 1)


def _halves(x: torch.Tensor) -> torch.Tensor:
    """float32 [n] → the bytes of float16, uint8 [n, 2]."""
    return x.half().view(torch.uint8).view(-1, 2)


def _merge(x: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [blocks, …, parts, n] of `bits` bits each → [blocks, … · n]: part i at bit i · bits."""
    return reduce(torch.bitwise_or, (part << bits * i for i, part in enumerate(x.unbind(-2)))).flatten(1)
