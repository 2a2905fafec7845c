"""The INT4 weights of a layer's routed experts, stacked: room that is filled expert by expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton

from dsv2quant.formats.int4 import OFFSET
from dsv2quant.kernels.int4_layout import ROWS, Int4Weight, depth

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
        blocks, groups = matrices * triton.cdiv(rows, ROWS), columns // (group or columns)
        if group and columns % group:
            raise ValueError(f"{columns} columns are not whole groups of {group}")
        words = torch.empty(
            (experts, blocks, triton.cdiv(columns, block) * block // span, 4, 8, 4, span // 16),
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
    scales, zeros = (
        None if values is None else values[expert].transpose(-1, -2).flatten(1) for values in (part.scales, part.zeros)
    )
    return _weight(part, part.words[expert], scales, zeros)


def _weight(part: Stack, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> Int4Weight:
    """Scales and zeros may be of more rows, of padding."""
    zeros = None if zeros is None else zeros[:, : part.rows].int()
    return Int4Weight(words, scales[:, : part.rows].float(), zeros, None, words.new_zeros(0), part.rows, part.columns)


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
