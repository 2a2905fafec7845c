"""The layout GGUF weights have while they run: blocks are repacked into it once, on the device, when a model is loaded.

    weight[n, k] = step × multiple × (code − zero) + offset

in float32, exactly as ggml's dequantize_row has it. Codes are of 4, 6 or 8 bits, in the places where `wgmma` wants them
(see int4_layout.py): a block of 64 rows by 128 columns is 2, 3 or 4 planes, of which each of 128 threads has four
words, one of each 32 columns. Of these, thread (warp, r, q) has, in step s of 16 columns,

    row = 16 · warp + 8 · h + r      column = 16 · s + 8 · c + 2 · q + p

as nibbles 4p + 2c + h of plane s; what 6 bits have more, as pairs of bits 8p + 4s + 2c + h of plane 2; bytes 2p + h of
plane 2s + c where codes have 8. Rows are padded to 64 and columns to 128.

Bytes per weight here and in the file, of types that do not fit as they are: Q6_K 0.828 for 0.820, Q4_K 0.578 for 0.563,
Q5_K and Q5_0 0.828 and 0.813 for 0.688, Q5_1 0.875 for 0.75, Q3_K 0.578 for 0.430, Q2_K 0.641 for 0.328, IQ4_NL 1.063
for 0.563, IQ4_XS 1.047 for 0.531. Q8_0, Q4_0 and Q4_1 are of the same size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from dsv2quant.formats.gguf import layouts
from dsv2quant.formats.gguf.layouts import Plane, Spec

# The types that have the layout; the others with codes are dequantized.
SPECS = {name: spec for name, spec in layouts.SPECS.items() if name not in ("TQ1_0", "TQ2_0", "MXFP4")}
ROWS, DEPTH = 64, 128  # padding of rows and of columns
BIAS = 128  # of stored multiples
_AXES = "bwhrkuscqp"  # of codes: block of rows, warp, h, r, block of columns, u: 32 of them, s, c, q, p


class GgufWeight(NamedTuple):
    """A matrix [rows, columns] of a block type, or a stack of them: then all tensors have another dimension before."""

    type: str
    words: torch.Tensor  # int32 [⌈rows / 64⌉, padded columns / 128, planes, 128, 4]
    # int32 [n, rows], two float16 each, the first in the low bits. Types with an offset: that of the step and that of
    # the offset, of a block; Q6_K and the like: that of the step and 0; others: those of two blocks.
    steps: torch.Tensor
    multiples: torch.Tensor | None  # int32 [padded columns / group / 4, rows]: of steps, 128 more, a byte each
    lows: torch.Tensor | None  # the same of offsets
    arrivals: torch.Tensor  # int32 [4 · ⌈rows / 64⌉], zero between calls: see gguf_gemm.py
    rows: int
    columns: int


def supported(name: str) -> bool:
    """Whether weights of this block type have the layout; others are for the caller to dequantize."""
    return name in SPECS


def held_bits(spec: Spec) -> int:
    """Of a code as it runs."""
    return 8 if spec.table else next(bits for bits in (4, 6, 8) if spec.numbers <= 1 << bits)


def from_blocks(name: str, data: torch.Tensor, columns: int) -> GgufWeight:
    """`data` uint8 [rows, bytes of a row] or [matrices, rows, bytes of a row], as a file has it.

    Takes up to 6 bytes per weight of memory for a while. Raises ValueError where the type is not `supported` or the
    bytes are not those of so many columns.
    """
    if name not in SPECS:
        raise ValueError(f"{name} is none of {', '.join(SPECS)}")
    spec, (rows, row_bytes), stack = SPECS[name], data.shape[-2:], data.shape[:-2]
    if data.dtype != torch.uint8 or columns % spec.values or row_bytes != columns // spec.values * spec.bytes:
        raise ValueError(f"{data.dtype} rows of {row_bytes} are not {columns} columns of {name}")
    blocks = data.reshape(-1, spec.bytes)
    codes = _numbers(blocks, spec.codes)
    if spec.table:
        codes = torch.tensor(spec.table, dtype=torch.int8, device=data.device).view(torch.uint8)[codes.int()]
    words = _to_words(codes.view(*stack, rows, columns), held_bits(spec))
    halves = torch.stack([blocks[:, at : at + 2].contiguous().view(torch.int16)[:, 0] for at in spec.halves], -1)
    if not spec.affine and spec.multiples:
        halves = F.pad(halves, (0, 1))
    per_block = halves.shape[-1]
    halves = halves.view(*stack, rows, -1)
    halves = F.pad(halves, (0, -halves.shape[-1] % max(DEPTH // spec.values * per_block, 2)))
    steps = _by_row(halves.view(torch.int32))
    multiples = lows = None
    if spec.multiples:
        numbers = _numbers(blocks, spec.multiples) + (spec.low + BIAS)
        parts = numbers.view(-1, len(spec.halves), spec.values // spec.group).unbind(1)
        multiples, *more = (_by_row(part.reshape(*stack, rows, -1).view(torch.int32)) for part in parts)
        lows = more[0] if more else None
    arrivals = torch.zeros(*stack, 4 * words.shape[-5], dtype=torch.int32, device=data.device)
    return GgufWeight(name, words, steps, multiples, lows, arrivals, rows, columns)


def blocks_of(weight: GgufWeight) -> torch.Tensor:
    """The inverse of `from_blocks`: uint8 [rows, bytes of a row], with the matrices of a stack before."""
    spec, stack = SPECS[weight.type], weight.words.shape[:-5]
    codes, halves, multiples = unpack(weight)
    if spec.table:
        values = torch.tensor(spec.table, dtype=torch.int16, device=codes.device)
        codes = torch.searchsorted(values, codes.view(torch.int8).short()).to(torch.uint8)
    blocks = codes.new_zeros(codes.numel() // spec.values, spec.bytes)
    _put(codes.reshape(len(blocks), -1), spec.codes, blocks)
    for at, half in zip(spec.halves, halves, strict=True):
        blocks[:, at : at + 2] = half.reshape(-1, 1).view(torch.uint8)
    if multiples:
        numbers = torch.cat([part.reshape(len(blocks), -1) for part in multiples], 1)
        _put((numbers - spec.low & 255).to(torch.uint8), spec.multiples, blocks)
    return blocks.view(*stack, weight.rows, -1)


def unpack(weight: GgufWeight) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Codes uint8 [rows, columns] (of 8 bits: the bytes of int8); the float16 of steps and, if any, of offsets
    [rows, blocks]; where there are any, the multiples of both, int16 [rows, groups]."""
    spec, columns = SPECS[weight.type], weight.columns
    codes = _from_words(weight.words, held_bits(spec))[..., : weight.rows, :columns]
    halves = _by_row(weight.steps).view(torch.float16)
    if spec.affine or spec.multiples:
        halves = halves.unflatten(-1, (-1, 2))[..., : len(spec.halves)]
    else:
        halves = halves.unsqueeze(-1)
    multiples = [
        _by_row(part).view(torch.uint8).short()[..., : columns // spec.group] - BIAS
        for part in (weight.multiples, weight.lows)
        if part is not None
    ]
    return codes, [half[..., : columns // spec.values].contiguous() for half in halves.unbind(-1)], multiples


def _numbers(blocks: torch.Tensor, planes: tuple[Plane, ...]) -> torch.Tensor:
    """uint8 [blocks, bytes] → [blocks, numbers]."""
    total, shift = torch.zeros((), dtype=torch.uint8, device=blocks.device), 0
    for plane in planes:
        rows = blocks[:, plane.begin : plane.end].reshape(len(blocks), -1, 1, plane.width)
        digits = (rows >> _shifts(plane, blocks) & ((1 << plane.bits) - 1)).flatten(1, 2)
        if plane.order:
            digits = digits[:, plane.order]
        total = total | digits.flatten(1) << shift
        shift += plane.bits
    return total


def _put(numbers: torch.Tensor, planes: tuple[Plane, ...], blocks: torch.Tensor) -> None:
    """The inverse of `_numbers`, into `blocks`, whose bits are 0 there."""
    shift = 0
    for plane in planes:
        digits = (numbers >> shift & ((1 << plane.bits) - 1)).view(len(blocks), -1, plane.width)
        per = 8 // plane.bits
        if plane.order:
            some = digits
            digits = some.new_zeros(len(blocks), (plane.end - plane.begin) // plane.width * per, plane.width)
            digits[:, plane.order] = some
        rows = (digits.unflatten(1, (-1, per)) << _shifts(plane, blocks)).sum(2, dtype=torch.uint8)
        blocks[:, plane.begin : plane.end] |= rows.flatten(1)
        shift += plane.bits


def _shifts(plane: Plane, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(0, 8, plane.bits, dtype=torch.uint8, device=like.device).unsqueeze(1)


def _to_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., rows, columns] → `words`."""
    rows, columns = codes.shape[-2:]
    padded = F.pad(codes, (0, -columns % DEPTH, 0, -rows % ROWS))
    axes = padded.unflatten(-1, (-1, 4, 2, 2, 4, 2)).unflatten(-7, (-1, 4, 2, 8))
    if bits == 8:
        return _pack(_permuted(axes, _AXES, "bkscwrquph").flatten(-2), 8).flatten(-4, -2).flatten(-4, -3)
    words = _pack(_permuted(axes & 15, _AXES, "bkswrqupch").flatten(-3), 4).flatten(-4, -2)
    if bits == 4:
        return words
    more = _pack(_permuted(axes >> 4, _AXES, "bkwrqupsch").flatten(-4), 2).flatten(-4, -2)
    return torch.cat([words, more.unsqueeze(-3)], -3)


def _from_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_to_words`, with the padding."""
    lanes = words.unflatten(-2, (4, 8, 4))
    if bits == 8:
        axes = _permuted(_unpack(lanes.unflatten(-5, (2, 2)), 8).unflatten(-1, (2, 2)), "bkscwrquph", _AXES)
    else:
        axes = _permuted(_unpack(lanes[..., :2, :, :, :, :], 4).unflatten(-1, (2, 2, 2)), "bkswrqupch", _AXES)
        if bits == 6:
            more = _unpack(lanes[..., 2, :, :, :, :], 2).unflatten(-1, (2, 2, 2, 2))
            axes = axes | _permuted(more, "bkwrqupsch", _AXES) << 4
    return axes.flatten(-6).flatten(-5, -2)


def _permuted(x: torch.Tensor, given: str, wanted: str) -> torch.Tensor:
    """The last axes of x in another order."""
    first = x.ndim - len(given)
    return x.permute(*range(first), *(first + given.index(axis) for axis in wanted))


def _pack(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., 32 / bits], the first in the lowest bits → int32 [...]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=fields.device)
    some = (fields.unflatten(-1, (4, -1)) << shifts).sum(-1, dtype=torch.uint8)
    return some.contiguous().view(torch.int32).squeeze(-1)


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_pack`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
    some = words.contiguous().unsqueeze(-1).view(torch.uint8).unsqueeze(-1)
    return (some >> shifts & ((1 << bits) - 1)).flatten(-2)


def _by_row(x: torch.Tensor) -> torch.Tensor:
    """[..., rows, n] → [..., n, rows], and back."""
    return x.transpose(-1, -2).contiguous()
