"""The layout INT4 weights have while they run: the on-disk layouts are repacked into it once, when a model is loaded.

A block of 64 rows by `span` columns is contiguous, and thread t of a warp group finds its share in one load: the
operand of `wgmma` that is held in registers (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16"), 16 columns
at a time. Thread t = (warp, r, q) has of each 16 columns one word of eight codes,

    row = 16 · warp + 8 · h + r      column = 8 · c + 2 · q + p      nibble 4 · p + 2 · c + h

so that a word, shifted by 0, 4, 8 and 12 bits, holds the pairs p = 0, 1 of four registers 16 bits apart. `span` is 64,
a load of 16 bytes, or 32 where groups are of 32 columns. Rows are padded to 64 and columns to whole blocks, with 8.

The INT4 weights of a layer's routed experts, stacked: room that is filled expert by expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dsv2quant.formats.int4 import (
    GROUP_INDEX,
    OFFSET,
    PER_WORD,
    group_of_columns,
    unpack_bits,
    unpack_words,
    unpack_zero_points,
)
from dsv2quant.formats.integers import levels
from dsv2quant.formats.transposed import ORDER
from dsv2quant.kernels.jit import cdiv

ROWS = 64  # of a block: the rows of one wgmma
GROUPS = (32, 64, 128)
_AWQ_INVERSE = [ORDER.index(i) for i in range(PER_WORD)]
# block, warp, h, r, span, step, c, q, p → block, span, warp, r, q, step, p, c, h
_TO_BLOCKS = (0, 4, 1, 3, 7, 5, 8, 6, 2)
_FROM_BLOCKS = tuple(_TO_BLOCKS.index(i) for i in range(9))


class Int4Weight(NamedTuple):
    """weight[n, k] = (code − zero[g, n]) × scale[g, n], g = k // group, of columns in `order`."""

    words: torch.Tensor  # int32 [⌈rows / 64⌉, padded columns / span, 4, 8, 4, span / 16]
    scales: torch.Tensor  # float32 [groups, rows]: exact for BF16 and float16
    zeros: torch.Tensor | None  # int32 [groups, rows], 0 … 16; None: all 8
    order: torch.Tensor | None  # int64 [columns]: the input's column that each column meets; None: its own
    arrivals: torch.Tensor  # int32 [4 · ⌈rows / 64⌉], zero between calls: see int4_gemm.py
    rows: int
    columns: int

    @property
    def group(self) -> int:
        """Columns to a scale."""
        return self.columns // len(self.scales)


def depth(group: int) -> int:
    """Columns that the kernels take at a time: columns are padded to a multiple."""
    return group if group in GROUPS else 128


def pack(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None, order: torch.Tensor | None = None
) -> Int4Weight:
    """Codes uint8 [rows, columns], 0 … 15, scales of BF16, float16 or float32 and zeros [groups, rows].

    Raises ValueError where the groups are not of 32, 64, 128 or all columns.
    """
    (rows, columns), groups = codes.shape, len(scales)
    group = columns // groups
    if group * groups != columns or (group not in GROUPS and groups > 1):
        raise ValueError(f"{columns} columns in {groups} groups: groups are of 32, 64, 128 or all columns")
    block = depth(group)
    span = min(block, 64)
    padded = F.pad(codes, (0, -columns % block, 0, -rows % ROWS), value=OFFSET)
    blocks = padded.reshape(-1, 4, 2, 8, padded.shape[1] // span, span // 16, 2, 4, 2).permute(_TO_BLOCKS)
    nibbles = blocks.reshape(*blocks.shape[:6], PER_WORD)
    words = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).contiguous().view(torch.int32).squeeze(-1)
    if zeros is not None:
        zeros = None if bool((zeros == OFFSET).all()) else zeros.to(torch.int32).contiguous()
    arrivals = torch.zeros(4 * len(words), dtype=torch.int32, device=codes.device)
    return Int4Weight(words, scales.float().contiguous(), zeros, order, arrivals, rows, columns)


def unpack(weight: Int4Weight) -> torch.Tensor:
    """The codes, uint8 [rows, columns]: the inverse of `pack`."""
    words = weight.words
    nibbles = unpack_words(words.reshape(-1, 1)).to(torch.uint8).view(*words.shape, 2, 2, 2)
    codes = nibbles.permute(_FROM_BLOCKS).reshape(len(words) * ROWS, -1)
    return codes[: weight.rows, : weight.columns].contiguous()


def join(weights: Sequence[Int4Weight]) -> Int4Weight | None:
    """One weight of the rows of all, each's padded to a multiple of 64; None where columns are grouped or ordered
    differently."""
    first = weights[0]
    if any(w.order is not None or (w.columns, w.group) != (first.columns, first.group) for w in weights):
        return None
    ends = [len(w.words) * ROWS - w.rows for w in weights[:-1]] + [0]  # rows of padding behind each
    scales = torch.cat([F.pad(w.scales, (0, end)) for w, end in zip(weights, ends, strict=True)], 1)
    zeros = None
    if any(w.zeros is not None for w in weights):
        all_zeros = [
            torch.full_like(w.scales, OFFSET, dtype=torch.int32) if w.zeros is None else w.zeros for w in weights
        ]
        zeros = torch.cat([F.pad(z, (0, end), value=OFFSET) for z, end in zip(all_zeros, ends, strict=True)], 1)
    words = torch.cat([w.words for w in weights])
    return Int4Weight(
        words, scales, zeros, None, torch.cat([w.arrivals for w in weights]), scales.shape[1], first.columns
    )


def from_compressed_tensors(parts: Mapping[str, torch.Tensor], bits: int = 4) -> Int4Weight:
    """`weight_packed` int32 [rows, columns · bits / 32] and `weight_scale` [rows, groups]; of others' files also
    `weight_zero_point` and `weight_g_idx` (formats/int4.py). Codes of fewer bits are held as codes of 4, which have
    their values too. Raises as `_scattered`."""
    off = OFFSET + levels(bits)[0]
    codes, scales = unpack_bits(parts["weight_packed"], bits).add_(off).to(torch.uint8), parts["weight_scale"].T
    zeros, group = unpack_zero_points(parts, bits), group_of_columns(parts)
    if zeros is not None:
        zeros = zeros.T + off
    return pack(codes, scales, zeros) if group is None else _scattered(codes, scales, zeros, group, GROUP_INDEX)


def from_gptq(parts: Mapping[str, torch.Tensor]) -> Int4Weight:
    """`qweight` int32 [columns / 8, rows], `qzeros` (less one), `scales` and `g_idx` of version 1 (formats/gptq.py).
    Raises as `_scattered`."""
    codes = unpack_words(parts["qweight"].T).to(torch.uint8)
    return _scattered(codes, parts["scales"], unpack_words(parts["qzeros"]) + 1, parts["g_idx"].long(), "g_idx")


def _scattered(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group: torch.Tensor, name: str
) -> Int4Weight:
    """`pack` of columns whose groups are `group` [columns]: scattered ones are gathered, and the columns then have an
    order. Raises ValueError where groups don't have as many columns each."""
    columns, count = len(group), len(scales)
    order = torch.argsort(group, stable=True)
    whole = torch.arange(columns, device=group.device) // (columns // count)
    if not torch.equal(group[order], whole):
        raise ValueError(f"{name} does not name each of {count} groups for {columns // count} of {columns} columns")
    if torch.equal(group, whole):
        return pack(codes, scales, zeros)
    return pack(codes[:, order], scales, zeros, order)


def from_awq(parts: Mapping[str, torch.Tensor]) -> Int4Weight:
    """`qweight` int32 [columns, rows / 8], `qzeros` [groups, rows / 8], `scales` of version gemm (formats/awq.py)."""
    codes, zeros = (
        unpack_words(parts[name]).to(torch.uint8).unflatten(1, (-1, PER_WORD))[:, :, _AWQ_INVERSE].flatten(1)
        for name in ("qweight", "qzeros")
    )
    return pack(codes.T, parts["scales"], zeros)


HALVES = 0x0F0F0F0F  # of words: the nibbles of rows h = 0


class Stack(NamedTuple):
    """A matrix of every expert: down, or gate and up, of whose rows each 16 are eight of gate (h = 0 of
    int4_layout.py), then the same eight of up. Words are Int4Weight's; scales and zeros of rows r and r + 8 of 16 are
    side by side, as a thread needs them, and padded to blocks of rows with 0."""

    words: torch.Tensor  # int32 [experts, blocks of 64 rows, padded columns / span, 4, 8, 4, span / 16]
    scales: torch.Tensor  # BF16 or float16 [experts, groups, blocks, 4, 8, 2]
    zeros: torch.Tensor | None  # int16, as scales; None: all 8
    rows: int  # of down, of gate or of up
    columns: int


class Int4Experts(NamedTuple):
    """The routed experts of a layer."""

    gate_up: Stack  # matrices [width, hidden]
    down: Stack  # [hidden, width]


def empty(
    experts: int,
    hidden: int,
    width: int,
    group: int | None,
    dtype: torch.dtype = torch.bfloat16,
    zeros: bool = False,
    device: torch.device | str = "cuda",
) -> Int4Experts:
    """Room for experts that `fill` puts there, with groups of 32, 64, 128 or (None) all columns, scales in `dtype`."""

    def stack(matrices: int, rows: int, columns: int) -> Stack:
        block = depth(group or columns)
        span = min(block, 64)
        blocks, groups = matrices * cdiv(rows, ROWS), columns // (group or columns)
        if group and columns % group:
            raise ValueError(f"{columns} columns are not whole groups of {group}")
        words = torch.empty(
            (experts, blocks, cdiv(columns, block) * block // span, 4, 8, 4, span // 16),
            dtype=torch.int32,
            device=device,
        )
        scales = torch.empty((experts, groups, blocks, 4, 8, 2), dtype=dtype, device=device)
        return Stack(words, scales, torch.empty_like(scales, dtype=torch.int16) if zeros else None, rows, columns)

    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"scales are of {torch.bfloat16} or {torch.float16}, not {dtype}")
    return Int4Experts(stack(2, width, hidden), stack(1, hidden, width))


def with_zeros(stack: Int4Experts) -> Int4Experts:
    """The same stack with room for zeros, all 8 so far."""
    gate_up, down = (
        part._replace(zeros=torch.full_like(part.scales, OFFSET, dtype=torch.int16))
        for part in (stack.gate_up, stack.down)
    )
    return stack._replace(gate_up=gate_up, down=down)


def fill(stack: Int4Experts, expert: int, gate: Int4Weight, up: Int4Weight, down: Int4Weight) -> None:
    """Copies an expert's matrices to their place.

    Raises ValueError where one has columns in another order, another shape or group, zeros though the stack has none,
    or scales that the stack's dtype can't hold.
    """
    for name, part, weight in (("gate", stack.gate_up, gate), ("up", stack.gate_up, up), ("down", stack.down, down)):
        if weight.order is not None:
            raise ValueError(f"{name} has columns ordered by activation: not supported for experts")
        groups = part.scales.shape[1]
        if (weight.rows, weight.columns, len(weight.scales)) != (part.rows, part.columns, groups):
            raise ValueError(
                f"{name} is {weight.rows} by {weight.columns} in {len(weight.scales)} groups, "
                f"not {part.rows} by {part.columns} in {groups}"
            )
        if weight.zeros is not None and part.zeros is None:
            raise ValueError(f"{name} has zeros; the stack has no room for them")
        if not torch.equal(weight.scales.to(part.scales.dtype).float(), weight.scales):
            raise ValueError(f"{name} has scales that {part.scales.dtype} does not hold")
    words = torch.stack(_halves_swapped(gate.words, up.words), 3)  # block, span, warp, strip of 16 rows, …
    stack.gate_up.words[expert].copy_(words.unflatten(2, (2, 2)).transpose(1, 2).flatten(3, 4).flatten(0, 1))
    stack.down.words[expert].copy_(down.words)
    for part, side_by_side, weights in ((stack.gate_up, _matched, (gate, up)), (stack.down, _strips, (down,))):
        part.scales[expert].copy_(side_by_side(*(w.scales for w in weights)))
        if part.zeros is not None:
            zeros = (torch.full_like(w.scales, OFFSET) if w.zeros is None else w.zeros for w in weights)
            part.zeros[expert].copy_(side_by_side(*zeros))


def gate_up_of(stack: Int4Experts, expert: int) -> tuple[Int4Weight, Int4Weight]:
    """What `fill` was given."""
    part = stack.gate_up
    strips = part.words[expert].unflatten(0, (-1, 2)).unflatten(3, (2, 2)).transpose(1, 2).flatten(2, 3)
    words = _halves_swapped(*strips.unbind(3))
    scales = part.scales[expert].flatten(1, 3).unbind(-1)
    zeros = (None, None) if part.zeros is None else part.zeros[expert].flatten(1, 3).unbind(-1)
    gate, up = (_weight(part, *of) for of in zip(words, scales, zeros, strict=True))
    return gate, up


def down_of(stack: Int4Experts, expert: int) -> Int4Weight:
    """What `fill` was given."""
    part = stack.down
    scales = _rows(part.scales[expert])
    return _weight(part, part.words[expert], scales, None if part.zeros is None else _rows(part.zeros[expert]))


def _weight(part: Stack, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> Int4Weight:
    """Scales and zeros may be of more rows, of padding."""
    zeros = None if zeros is None else zeros[:, : part.rows].int()
    return Int4Weight(words, scales[:, : part.rows].float(), zeros, None, words.new_zeros(0), part.rows, part.columns)


def _rows(strips: torch.Tensor) -> torch.Tensor:
    """[groups, strips, 4, 8, 2] → [groups, strips · 64]: `_strips` taken back."""
    return strips.transpose(-1, -2).flatten(1)


def _halves_swapped(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Words of `a`'s and `b`'s rows h = 0, and of their rows h = 1: of gate and up, the strips of 16 that a stack has
    of them; of these, gate and up again."""
    return a & HALVES | (b & HALVES) << 4, a >> 4 & HALVES | b & ~HALVES


def _matched(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[groups, rows] → [groups, 2 · ⌈rows / 64⌉, 4, 8, 2]."""
    return F.pad(torch.stack((gate, up), -1), (0, 0, 0, -gate.shape[1] % ROWS)).unflatten(1, (-1, 4, 8))


def _strips(values: torch.Tensor) -> torch.Tensor:
    """[groups, rows] → [groups, ⌈rows / 64⌉, 4, 8, 2], as int4_layout has the rows of a thread."""
    return F.pad(values, (0, -values.shape[1] % ROWS)).unflatten(1, (-1, 4, 2, 8)).transpose(-1, -2)
