"""What tuning trains of one weight, and the steps it takes.

A weight is numbers · step + offset of its groups of columns, times a factor e^m of each group that has a scale of its
own, |m| ≤ BOUND. All m take steps of Adam's (arXiv:1412.6980). Where the numbers are codes, each is trained as a real
number next to its code, from where the unquantized weight is within the code's cell. It counts as the code nearest to
it, whose gradient it follows (straight-through, arXiv:1308.3432): it crosses to the next code when many steps agree.
Its steps are Adam's without the mean, and with the square kept by rows and columns alone (Adafactor, arXiv:1804.04235),
so that a trained code takes 4 bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from dsv2quant.checkpoint.weights import BLOCKS
from dsv2quant.formats.codec import Integers, to_bf16
from dsv2quant.formats.gguf import codes as block_codes
from dsv2quant.formats.gguf.blocks import count_blocks, decode
from dsv2quant.formats.integers import levels

BOUND = 0.1  # of |m|: a router may not drift, and no scale moves by more than 10%
RATE = 1e-3  # the largest step, of m and of codes in distances between two
BETAS, EPSILON = (0.9, 0.99), 1e-8
WITHIN = 0.49  # of a code's cell, in which its number begins
_LEAST = 1e-20  # of a root mean square that is divided by: where it is less, so is what is divided

Parts = dict[str, np.ndarray]  # what is stored of a weight, by suffix


class Grid(NamedTuple):
    """The codes there are: all integers from `low` to `high`, or the `table`'s, float32 and rising."""

    low: float
    high: float
    table: torch.Tensor | None = None

    @property
    def spacing(self) -> float:
        """Between two codes, of a table's in the mean."""
        return 1.0 if self.table is None else (self.high - self.low) / (len(self.table) - 1)

    def nearest(self, numbers: torch.Tensor) -> torch.Tensor:
        """The codes nearest to these numbers, float32."""
        if self.table is None:
            return numbers.round().clamp_(self.low, self.high)
        return self.table[torch.bucketize(numbers, (self.table[1:] + self.table[:-1]) / 2)]


@dataclass(eq=False)
class Trained(ABC):
    """One weight: `numbers` float32 [rows, columns], `step` and `offset` float32 [rows, groups], m [rows, factors].
    `put` gives the model the weight's values."""

    name: str
    put: Callable[[torch.Tensor], object]
    numbers: torch.Tensor
    factors: int
    step: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    grid: Grid | None = None
    bound = BOUND
    state: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        rows, columns = self.numbers.shape
        zeros = torch.zeros(3, rows, self.factors, device=self.numbers.device)
        self.state = {"m": zeros[0], "mean": zeros[1], "square": zeros[2], "steps": torch.zeros(1)}
        if self.grid is not None:
            squares = torch.zeros(rows + columns, device=self.numbers.device)
            self.state |= {"numbers": self.numbers, "rows": squares[:rows], "columns": squares[rows:]}

    @abstractmethod
    def settle(self) -> Parts:
        """Round to what is stored, to which m of 0 then belongs, and return that."""

    def begin_at(self, weight: torch.Tensor) -> None:
        """Move the codes' numbers toward the unquantized weight [rows, columns], within their cells."""
        if self.grid is None:
            return
        assert self.step is not None
        groups = weight.unflatten(1, (self.step.shape[1], -1))
        if self.offset is not None:
            groups = groups - self.offset.unsqueeze(-1)
        wanted = (groups / self.step.unsqueeze(-1)).flatten(1)
        reach = WITHIN * self.grid.spacing
        moved = torch.minimum(torch.maximum(wanted, self.numbers - reach), self.numbers + reach)
        kept = moved.isfinite() & (self.grid.nearest(moved) == self.numbers)  # a step of 0, or a table's narrow cell
        self.numbers.copy_(torch.where(kept, moved, self.numbers))

    def codes(self) -> torch.Tensor:
        """The numbers as codes, where they are any."""
        return self.numbers if self.grid is None else self.grid.nearest(self.numbers)

    def values(self) -> torch.Tensor:
        """float32 [rows, columns]."""
        found = self.codes()
        if self.step is not None:
            groups = found.unflatten(1, (self.step.shape[1], -1)) * self.step.unsqueeze(-1)
            found = (groups if self.offset is None else groups + self.offset.unsqueeze(-1)).flatten(1)
        return self._by_factor(found)

    def _by_factor(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, columns] times the factors."""
        return (x.unflatten(1, (self.factors, -1)) * self.state["m"].exp().unsqueeze(-1)).flatten(1)

    def learn(self, values: torch.Tensor, gradient: torch.Tensor, share: float) -> None:
        """Take `share` of the largest step against the gradient by `values`, both [rows, columns]."""
        self.state["steps"] += 1
        count = int(self.state["steps"])
        unbiased = [1 - beta**count for beta in BETAS]
        of_m = (gradient * values).unflatten(1, (self.factors, -1)).sum(-1)
        if self.grid is not None:
            assert self.step is not None
            groups = self._by_factor(gradient).unflatten(1, (self.step.shape[1], -1))
            self._learn_codes((groups * self.step.unsqueeze(-1)).flatten(1), share, unbiased[1])
        mean, square = self.state["mean"], self.state["square"]
        mean.lerp_(of_m, 1 - BETAS[0])
        square.lerp_(of_m.square(), 1 - BETAS[1])
        moved = RATE * share / unbiased[0] * mean / ((square / unbiased[1]).sqrt() + EPSILON)
        self.state["m"].sub_(moved).clamp_(-self.bound, self.bound)

    def _learn_codes(self, gradient: torch.Tensor, share: float, unbiased: float) -> None:
        assert self.grid is not None
        rows, columns = self.state["rows"], self.state["columns"]
        squares = gradient.square()
        rows.lerp_(squares.mean(1), 1 - BETAS[1])
        columns.lerp_(squares.mean(0), 1 - BETAS[1])
        of_rows = rows / rows.mean().clamp(min=torch.finfo(torch.float32).tiny) / unbiased
        root = (of_rows.unsqueeze(1) * columns).sqrt_().clamp_(min=_LEAST)
        spacing = self.grid.spacing
        self.numbers.sub_(gradient.div_(root).mul_(RATE * share * spacing))
        self.numbers.clamp_(self.grid.low - WITHIN * spacing, self.grid.high + WITHIN * spacing)


class Plain(Trained):
    """A weight of norms or a router, each with a factor of its own, stored in BF16 or float32. A vector is one row."""

    def __init__(
        self, name: str, put: Callable[[torch.Tensor], object], weight: torch.Tensor, *, is_bf16: bool
    ) -> None:
        shape, self._is_bf16 = weight.shape, is_bf16
        rows = weight.float().reshape(-1, shape[-1])
        super().__init__(name, lambda values: put(values.view(shape)), rows, rows.shape[1])
        self._shape = shape

    def settle(self) -> Parts:
        stored = self.values().view(self._shape).cpu().numpy()
        if self._is_bf16:
            bits = to_bf16(stored)
            stored, parts = torch.from_numpy(bits).view(torch.bfloat16).float().numpy(), {"weight": bits}
        else:
            parts = {"weight": stored}
        self.numbers.copy_(torch.from_numpy(stored).view_as(self.numbers))
        self.state["m"].zero_()
        return parts


class Grouped(Trained):
    """Integers times the scales of groups of columns, as `integers` stores them."""

    def __init__(
        self, name: str, put: Callable[[torch.Tensor], object], parts: Mapping[str, np.ndarray], integers: Integers,
        device: torch.device,
    ) -> None:  # fmt: skip
        codes, scales = (torch.from_numpy(x).to(device) for x in integers.unpack(parts))
        low, high = levels(integers.bits)
        super().__init__(name, put, codes.float(), scales.shape[1], scales, grid=Grid(low, high))
        self._integers = integers

    def settle(self) -> Parts:
        assert self.step is not None
        scales = (self.step * self.state["m"].exp()).cpu().numpy()
        if not self._integers.holds(np.abs(scales)):  # at the end of float16's range
            scales = self.step.cpu().numpy()
        scales = np.copysign(self._integers.storable(np.abs(scales)), scales)
        codes = self.codes()
        self.step.copy_(torch.from_numpy(scales))
        self.numbers.copy_(codes)
        self.state["m"].zero_()
        return self._integers.pack(codes.to(torch.int8).cpu().numpy(), scales)


class Blocks(Trained):
    """Blocks of a GGUF type, uint8 [rows, bytes]: a factor for each that has a float16 scale, and codes where the type
    has any."""

    def __init__(
        self, name: str, put: Callable[[torch.Tensor], object], kind: str, blocks: np.ndarray, device: torch.device
    ) -> None:
        self._kind, self._blocks = kind, blocks
        found, factors = block_codes.levels(kind, blocks), count_blocks(kind, blocks)
        if not block_codes.has_scale(kind):
            self.bound = 0.0
        if found is None:
            super().__init__(name, put, torch.from_numpy(decode(kind, blocks)).to(device), factors)
            return
        table = None if found.table is None else torch.from_numpy(np.unique(found.table)).float().to(device)
        step, offset = (None if x is None else torch.from_numpy(x).to(device) for x in (found.step, found.offset))
        grid = Grid(found.low, found.high, table)
        super().__init__(name, put, torch.from_numpy(found.codes).to(device).float(), factors, step, offset, grid)

    def settle(self) -> Parts:
        if self.grid is not None:
            codes = self.codes().to(torch.int8).cpu().numpy()
            self._blocks = block_codes.with_codes(self._kind, self._blocks, codes)
        scaled = block_codes.with_factors(self._kind, self._blocks, self.state["m"].exp().cpu().numpy())
        if scaled is not None:
            self._blocks = scaled
        again = Blocks(self.name, self.put, self._kind, self._blocks, self.numbers.device)
        self.numbers, self.step, self.offset, self.state = again.numbers, again.step, again.offset, again.state
        return {BLOCKS: self._blocks}
