"""GGUF block types encoded on a CUDA device, to the bytes of the CPU's encoders (formats/gguf/blocks.py).

Three steps, each a kernel over the whole matrix: a search per sub-block (fits.py), the scales of a block rounded
(scales.py), the levels of all elements (rounding.py). Between them lie float32 scales per sub-block and a byte per
element: beside x and the result, up to 4 bytes per element are used. Bytes are then put in their places by torch, in
whole numbers. Where sums leave float32's range (magnitudes above 1e9) a scale may be a NaN of another sign than x86's.
"""

from __future__ import annotations

from functools import reduce

import torch

from dsv2quant.formats.gguf.blocks import TYPES, nbytes
from dsv2quant.kernels.gguf import fits, rounding, scales
from dsv2quant.kernels.gguf.fits import Weights
from dsv2quant.kernels.gguf.lanes import energies


def encode(name: str, x: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """float32 or bfloat16 [rows, cols] → uint8 [rows, bytes of a row], as blocks.encode.

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
    scale, codes = rounding.round_q8_0(x.view(-1, 32))
    return torch.cat([_halves(scale), codes], 1)


def _encode_q45(x: torch.Tensor, importance: torch.Tensor | None, bits: int, affine: bool) -> torch.Tensor:
    cols = x.shape[1]
    blocks = x.view(-1, 32)
    nmax = (1 << bits) - 1 if affine else 1 << (bits - 1)
    if importance is None:
        scale, low = fits.fit_range(blocks, nmax, affine)
        halves = [scale, low] if affine else [scale]
        levels = rounding.levels_truncated(blocks, scale, low if affine else None, nmax)
    else:
        weights = Weights("spread", importance, cols // 32, energies(x, cols), cols // 32, 1.0, float(cols))
        if affine:
            scale, depth, factor, origin, _ = fits.fit_affine(blocks, weights, nmax, -0.9, 0.05, 36)
            halves = [scale, depth.neg()]
            levels = rounding.levels_affine(blocks, factor, origin, nmax)
        else:
            scale, factor, _ = fits.fit_symmetric(blocks, weights, nmax)
            halves = [scale]
            levels = rounding.levels_symmetric(blocks, factor, nmax)
    parts = [_halves(x) for x in halves]
    if bits == 5:
        parts.append(_merge((levels >> 4 & 1).view(-1, 4, 8).transpose(1, 2), 1))
    return torch.cat([*parts, _merge((levels & 15).view(-1, 2, 16), 4)], 1)


def _encode_q45_k(x: torch.Tensor, importance: torch.Tensor | None, bits: int) -> torch.Tensor:
    subs, nmax = x.view(-1, 32), (1 << bits) - 1
    if importance is None:
        start, steps = (-1.0, 20) if bits == 4 else (-0.5, 15)
        scale, depth, factor, origin, _ = fits.fit_affine(subs, Weights("size"), nmax, start, 0.1, steps)
        total = None
    else:
        weights = Weights("spread", importance, x.shape[1] // 32, energies(x, 256), 8, 2.0, 256.0)
        scale, depth, factor, origin, total = fits.fit_affine(subs, weights, nmax, -0.9, 0.05, 36)
    d, codes = scales.round_positive(scale, total, 8, 63, 63)
    m, mins = scales.round_positive(depth, total, 8, 63, 63)
    if bits == 5:
        codes, mins = codes.clamp(max=63), mins.clamp(max=63)
    firsts = [x[:, :4] | x[:, 4:] >> 4 << 6 for x in (codes, mins)]
    packed = torch.cat([*firsts, codes[:, 4:] & 15 | mins[:, 4:] << 4], 1)
    # Read back (get_scale_min_k4), since a code above 63 runs into the bits of others.
    codes = torch.cat([packed[:, :4] & 63, packed[:, 8:] & 15 | packed[:, :4] >> 6 << 4], 1)
    mins = torch.cat([packed[:, 4:8] & 63, packed[:, 8:] >> 4 | packed[:, 4:8] >> 6 << 4], 1)
    levels = rounding.levels_affine(subs, factor, origin, nmax, (d, m, codes, mins))
    parts = [_halves(d), _halves(m), packed]
    if bits == 5:
        parts.append(_merge((levels >> 4).view(-1, 8, 32), 1))
    return torch.cat([*parts, _merge((levels & 15).view(-1, 4, 2, 32), 4)], 1)


def _encode_q6_k(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    subs = x.view(-1, 16)
    weights = Weights("square") if importance is None else Weights("raw", importance, x.shape[1] // 16)
    scale, factor, _ = fits.fit_symmetric(subs, weights, 32)
    d, codes = scales.round_q6_k(scale, factor, 16)
    levels = rounding.levels_symmetric(subs, factor, 32, (d, codes)).view(-1, 2, 4, 32)
    low = _merge((levels & 15).view(-1, 2, 2, 64), 4)
    return torch.cat([low, _merge(levels >> 4, 2), codes.view(torch.uint8), _halves(d)], 1)


def _encode_q2_k(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    subs = x.view(-1, 16)
    if importance is None:
        scale, depth, factor, origin, _ = fits.fit_affine(subs, Weights("magnitude"), 3, -0.5, 0.1, 15, absolute=True)
        total = None
    else:
        weights = Weights("spread", importance, x.shape[1] // 16, energies(x, 256), 16, 1.0, 256.0)
        scale, depth, factor, origin, total = fits.fit_affine(subs, weights, 3, -0.9, 0.05, 36)
    d, codes = scales.round_positive(scale, total, 16, 15, 255)
    m, mins = scales.round_positive(depth, total, 16, 15, 255)
    packed = codes | mins << 4
    levels = rounding.levels_affine(subs, factor, origin, 3, (d, m, packed & 15, packed >> 4))
    return torch.cat([packed, _merge(levels.view(-1, 2, 4, 32), 2), _halves(d), _halves(m)], 1)


def _encode_q3_k(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    subs = x.view(-1, 16)
    if importance is None:
        scale, searched = fits.fit_by_descent(subs, 4)
        total = None
    else:
        weights = Weights("spread", importance, x.shape[1] // 16, energies(x, 256), 16, 2.0, 256.0)
        scale, searched, total = fits.fit_symmetric(subs, weights, 4)
    d, codes = scales.round_signed(scale, total, 16)
    levels = rounding.levels_symmetric(subs, searched, 4, (d, codes.to(torch.int8) - 32))
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
    scale = fits.fit_uneven(subs, weights)
    if parts == 1:
        return torch.cat([_halves(scale), _merge(rounding.levels_uneven(subs, scale).view(-1, 2, 16), 4)], 1)
    d, codes = scales.round_uneven(scale, parts)
    low = _merge((codes & 15).view(-1, 4, 2).transpose(1, 2), 4)
    high = _merge((codes >> 4).view(-1, 2, 4).transpose(1, 2), 2)
    levels = _merge(rounding.levels_uneven(subs, scale).view(-1, 8, 2, 16), 4)
    return torch.cat([_halves(d), high, low, levels], 1)


def _halves(x: torch.Tensor) -> torch.Tensor:
    """float32 [n] → the bytes of float16, uint8 [n, 2]."""
    return x.half().view(torch.uint8).view(-1, 2)


def _merge(x: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [blocks, …, parts, n] of `bits` bits each → [blocks, … · n]: part i at bit i · bits."""
    return reduce(torch.bitwise_or, (part << bits * i for i, part in enumerate(x.unbind(-2)))).flatten(1)
