"""The INT4 weights of a layer's routed experts, stacked: room that is filled expert by expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton

from dsv2quant.formats.int4 import OFFSET
from dsv2quant.kernels.int4_layout import ROWS, Int4Weight, depth


class Stack(NamedTuple):
    """Matrices of every expert: gate and up, or down alone. Words are Int4Weight's; scales and zeros of rows r and
    r + 8 of 16 are side by side, as a thread needs them, and padded to blocks of rows with 0."""

    words: torch.Tensor  # int32 [experts, matrices, ⌈rows / 64⌉, padded columns / span, 4, 8, 4, span / 16]
    scales: torch.Tensor  # BF16 or float16 [experts, matrices, groups, ⌈rows / 64⌉, 4, 8, 2]
    zeros: torch.Tensor | None  # int16, as scales; None: all 8
    rows: int
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
        blocks, groups = triton.cdiv(rows, ROWS), columns // (group or columns)
        if group and columns % group:
            raise ValueError(f"{columns} columns are not whole groups of {group}")
        words = torch.empty(
            (experts, matrices, blocks, triton.cdiv(columns, block) * block // span, 4, 8, 4, span // 16),
            dtype=torch.int32,
            device=device,
        )
        scales = torch.empty((experts, matrices, groups, blocks, 4, 8, 2), dtype=dtype, device=device)
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
    for name, part, matrix, weight in (
        ("gate", stack.gate_up, 0, gate), ("up", stack.gate_up, 1, up), ("down", stack.down, 0, down),
    ):  # fmt: skip
        if weight.order is not None:
            raise ValueError(f"{name} has columns ordered by activation: not supported for experts")
        groups = part.scales.shape[2]
        if (weight.rows, weight.columns, len(weight.scales)) != (part.rows, part.columns, groups):
            raise ValueError(
                f"{name} is {weight.rows} by {weight.columns} in {len(weight.scales)} groups, "
                f"not {part.rows} by {part.columns} in {groups}"
            )
        if weight.zeros is not None and part.zeros is None:
            raise ValueError(f"{name} has zeros; the stack has no room for them")
        scales = weight.scales.to(part.scales.dtype)
        if not torch.equal(scales.float(), weight.scales):
            raise ValueError(f"{name} has scales that {scales.dtype} does not hold")
        part.words[expert, matrix].copy_(weight.words)
        part.scales[expert, matrix].copy_(_side_by_side(scales))
        if part.zeros is not None:
            zeros = torch.full_like(weight.scales, OFFSET) if weight.zeros is None else weight.zeros
            part.zeros[expert, matrix].copy_(_side_by_side(zeros))


def weight_of(stack: Stack, expert: int, matrix: int) -> Int4Weight:
    """What `fill` was given."""

    def rows_of(values: torch.Tensor) -> torch.Tensor:
        return values[expert, matrix].transpose(-1, -2).flatten(1)[:, : stack.rows]

    words = stack.words[expert, matrix]
    zeros = None if stack.zeros is None else rows_of(stack.zeros).int()
    scales = rows_of(stack.scales).float()
    return Int4Weight(words, scales, zeros, None, words.new_zeros(0), stack.rows, stack.columns)


def _side_by_side(values: torch.Tensor) -> torch.Tensor:
    """[groups, rows] → [groups, ⌈rows / 64⌉, 4, 8, 2], as int4_layout has the rows of a thread."""
    return F.pad(values, (0, -values.shape[1] % ROWS)).unflatten(1, (-1, 4, 2, 8)).transpose(-1, -2)
