"""One layer under calibration: what is planned for its matrices, both models' parts, a walk through their stages."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.spec import Router
from dsv2quant.calib.calibration import Outcome
from dsv2quant.calib.distributed import Ranks
from dsv2quant.calib.hidden import lanes
from dsv2quant.model.layers import Linear, Stage, Stages, finish
from dsv2quant.model.load import DecoderLayer
from dsv2quant.planning.recipe import CALIBRATED

HELD = 16  # one window in so many is held out, or one token
SIDES = (REAL, IDEAL) = (0, 1)

Choice = tuple[str, str, str]  # role, scheme and method of a matrix


@dataclass
class Job:
    """One layer: what is planned for its modules, the real and the ideal model's layer, and what came out so far.
    `windows` of `ctx` tokens each are all ranks'."""

    choices: Mapping[str, Choice]
    layers: tuple[DecoderLayer, DecoderLayer]
    rope: torch.Tensor
    windows: int
    ctx: int
    ranks: Ranks
    room: int  # bytes that suspended stages may take
    packing: Executor  # packs what was chosen while more is
    threads: int  # that take batches of tokens: see `in_turn`
    is_last: bool = False  # nobody asks for what comes out of it
    progress: Callable[[int], object] = lambda weights: None  # called with the weights whose codes are chosen
    parts: dict[str, Future[dict[str, np.ndarray]]] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.rope.device

    @property
    def config(self) -> ModelConfig:
        return self.layers[REAL].attention.config

    @property
    def token_bytes(self) -> int:
        """What a token takes while the stages of a part are suspended: its states and what lies behind them."""
        c = self.config
        attention = c.num_attention_heads * c.v_head_dim + (c.q_lora_rank or 0) + sum(c.cached_widths)
        return 4 * (2 * c.hidden_size + max(attention, c.intermediate_size))

    @cached_property
    def lanes(self) -> list[list[slice]]:
        """All ranks' tokens, in parts of batches."""
        return lanes(self.windows * self.ctx, self.ctx)

    @cached_property
    def tokens(self) -> range:
        """Those of this rank."""
        own = self.ranks.span([slice(lane[0].start, lane[-1].stop) for lane in self.lanes])
        return range(own.start, own.stop)

    @property
    def own(self) -> dict[int, list[slice]]:
        """This rank's lanes, in turn: each one's batches, by their tokens' numbers among the rank's."""
        every, first = self.lanes, self.tokens.start
        return {
            lane: [slice(rows.start - first, rows.stop - first) for rows in every[lane]]
            for lane in self.ranks.share(len(every))
        }

    @property
    def batches(self) -> list[slice]:
        """This rank's tokens, by their numbers among the rank's."""
        return [rows for lane in self.own.values() for rows in lane]

    def held(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which of these tokens, by their number among this rank's, are held out."""
        tokens = tokens + self.tokens.start
        if self.windows >= HELD:
            return (tokens // self.ctx) % HELD == HELD // 2
        return tokens % self.ctx >= self.ctx - self.ctx // HELD

    def held_in(self, rows: slice) -> torch.Tensor:
        """The same of a batch of the rank's."""
        return self.held(torch.arange(rows.start, rows.stop, device=self.device))

    def wanted(self, linears: Iterable[Linear]) -> list[Linear]:
        """Those of the layer's linears that need calibration."""
        return [linear for linear in linears if self.choices[linear.module][2] in CALIBRATED]


class Walk:
    """A part of a layer applied to batches of the rank's tokens in both models, stage by stage. A batch goes on from
    the stage that it is at, as long as there is room for what that takes; else it begins anew, up to the same stage."""

    def __init__(self, begin: Callable[[int, slice], Stages[torch.Tensor]], token_bytes: int, room: int) -> None:
        """`begin` gives the stages of a side and some tokens, each of which takes `token_bytes` meanwhile."""
        self.begin, self._tokens = begin, room // (len(SIDES) * token_bytes)
        self._at: dict[tuple[int, int], tuple[int, Stages[torch.Tensor]]] = {}

    def input(self, side: int, rows: slice, index: int) -> torch.Tensor:
        """What the linears of stage `index` are applied to, [tokens, columns]."""
        at, stages = self._taken(side, rows)
        found = next(itertools.islice(stages, index - at - 1, None))
        self._at[side, rows.start] = index, stages
        return found.x.flatten(0, -2)

    def output(self, side: int, rows: slice) -> torch.Tensor:
        """What the part returns, [tokens, columns]."""
        _, stages = self._taken(side, rows)
        return finish(stages).flatten(0, -2)

    def leave(self, rows: slice) -> None:
        """Go on to other tokens, for now."""
        if rows.stop > self._tokens:
            for side in SIDES:
                self._at.pop((side, rows.start), None)

    def stages(self, rows: slice) -> list[Stage]:
        """All there are, of some tokens of the real model."""
        found: list[Stage] = []
        finish(self.begin(REAL, rows), found.append)
        return found

    def _taken(self, side: int, rows: slice) -> tuple[int, Stages[torch.Tensor]]:
        return self._at.pop((side, rows.start), None) or (-1, self.begin(side, rows))


def copied(part: Any) -> Any:
    """A copy of a layer's structure that shares its tensors."""
    if is_dataclass(part) and not isinstance(part, (ModelConfig, Router)):
        made = copy.copy(part)
        for item in fields(part):
            setattr(made, item.name, copied(getattr(part, item.name)))
        return made
    return [copied(item) for item in part] if isinstance(part, list) else part


def every_linear(part: Any) -> Iterator[Linear]:
    """The linears of a layer, its router among them."""
    if isinstance(part, Linear):
        yield part
    elif isinstance(part, list) or is_dataclass(part):
        for item in part if isinstance(part, list) else [getattr(part, item.name) for item in fields(part)]:
            yield from every_linear(item)
