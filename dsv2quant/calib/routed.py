"""Routed experts under calibration: each is gone through once, on all its tokens, by the rank that owns it.

Tokens go to the owners of their experts, and what the quantized experts make of them comes back. An expert's sums are
those of all its tokens in order, and which experts are calibrated together doesn't depend on how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dsv2quant.calib.calibration import MOMENT_BYTES, ROWS, TURNS, expert_bytes
from dsv2quant.calib.choosing import choose
from dsv2quant.calib.gptq import Split, Sums
from dsv2quant.calib.layer import IDEAL, REAL, SIDES, Job, every_linear
from dsv2quant.calib.threads import MOST, in_turn
from dsv2quant.model.layers import FFN, Stages, finish

SAMPLE = 4  # tokens for each column of a prior


@dataclass(frozen=True)
class Routed:
    """The experts of both models, and which of them this rank's tokens go to in the real one: weights float32 and
    experts, [tokens, k]."""

    real: list[FFN]
    ideal: list[FFN]
    weights: torch.Tensor
    chosen: torch.Tensor


class Seen(NamedTuple):
    """What some experts are applied to: inputs [tokens, hidden] in the real and the ideal model, the tokens' routing
    weights and whether they are held out, [tokens]."""

    x: torch.Tensor
    y: torch.Tensor
    weights: torch.Tensor
    held: torch.Tensor


Inputs = Callable[[int, torch.Tensor], torch.Tensor]  # side, tokens → what the FFN is applied to there


def quantize_experts(
    job: Job, routed: Routed, inputs: Inputs, pool: Split | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Quantize what is wanted of the experts: gate and up on their tokens' inputs, drawn toward the `pool` of all; down
    with squared weights, drawn toward what the expert makes of a sample of all. Yields, expert by expert, tokens [n] of
    this rank and what the quantized expert adds to them, [n, hidden]; of the last layer, nothing."""
    ranks, k = job.ranks, routed.chosen.shape[1]
    wanted = bool(job.wanted(linear for expert in routed.real for linear in every_linear(expert)))
    sample = _sample(job, inputs) if wanted else None
    counts = routed.chosen.flatten().bincount(minlength=len(routed.real)).tolist()
    pairs = routed.chosen.flatten().argsort(stable=True).split(counts)  # of a token and its choice, by expert
    everyones = ranks.gather(counts)
    totals = ranks.agreed([sum(some) for some in zip(*everyones, strict=True)] if everyones else [])
    groups = _groups(job, totals)
    turns = [
        [*groups[first : first + ranks.size], *[range(0)] * ranks.size][: ranks.size]
        for first in range(0, len(groups), ranks.size)
    ]  # of each, a group for each rank

    def sent(by_owner: list[range]) -> list[torch.Tensor]:
        return [_joined([pairs[expert] for expert in group], pairs[0]) for group in by_owner]

    def asked() -> Iterator[tuple[range, list[Seen], list[list[int]]]]:
        for by_owner in turns:
            seen = [_seen(job, routed, inputs, p, ideal=wanted) for p in sent(by_owner)]
            arrived = [Seen(*parts) for parts in zip(*map(ranks.exchange, zip(*seen, strict=True)), strict=True)]
            lengths = [torch.tensor([counts[expert] for expert in group]) for group in by_owner]
            yield by_owner[ranks.rank], arrived, [some.tolist() for some in ranks.exchange(lengths)]

    threads = ranks.agreed(job.threads)  # all ranks send as far ahead
    owned = in_turn(threads, lambda turn: _owned(job, routed, *turn, pool, sample), asked())
    for by_owner, made in zip(turns, owned, strict=True):
        if job.is_last:
            continue
        for p, group, returned in zip(sent(by_owner), by_owner, ranks.exchange(made), strict=True):
            some = [counts[expert] for expert in group]
            yield from zip((p // k).split(some), returned.split(some), strict=True)


def _seen(job: Job, routed: Routed, inputs: Inputs, pairs: torch.Tensor, *, ideal: bool) -> Seen:
    """Of pairs of a token and its choice; what is not wanted of the ideal model is the real one's."""
    tokens = pairs // routed.chosen.shape[1]
    x = inputs(REAL, tokens)
    return Seen(x, inputs(IDEAL, tokens) if ideal else x, routed.weights.flatten()[pairs], job.held(tokens))


def _groups(job: Job, totals: Sequence[int]) -> list[range]:
    """Experts that are calibrated together, whose moments and tokens fit into `MOMENT_BYTES`, or one; those with the
    most tokens first, so that what is done at the same time takes about as long. `totals` are the tokens of each."""
    c = job.config
    together = MOMENT_BYTES // MOST if job.threads else MOMENT_BYTES  # each thread has a group
    most = max(1, min(together // expert_bytes(c), len(totals) // TURNS))
    room = together // (len(SIDES) * 4 * (c.hidden_size + 2 * c.moe_intermediate_size))  # tokens
    groups, first = [], 0
    for last in range(1, len(totals) + 1):
        if last == len(totals) or last - first == most or sum(totals[first : last + 1]) > room:
            groups.append(range(first, last))
            first = last
    return sorted(groups, key=lambda group: -sum(totals[group.start : group.stop]))


def _sample(job: Job, inputs: Inputs) -> Seen:
    """Some tokens of all ranks, alike for all experts."""
    ranks, tokens = job.ranks, job.windows * job.ctx
    stride = max(1, tokens // (SAMPLE * job.config.moe_intermediate_size))
    every = torch.arange(stride // 2, tokens, stride, device=job.device) - job.tokens.start
    own = every[(every >= 0) & (every < len(job.tokens))]
    x, y = (_joined(ranks.exchange([inputs(side, own)] * ranks.size)) for side in SIDES)
    return Seen(x, y, torch.ones(len(x), device=job.device), job.held(every))


def _owned(
    job: Job, routed: Routed, experts: range, arrived: Sequence[Seen], lengths: Sequence[Sequence[int]],
    pool: Split | None, sample: Seen | None,
) -> list[torch.Tensor]:  # fmt: skip
    """Quantize these experts by what arrived from each rank, of which each expert has so many tokens. Returns what they
    add to these, by rank."""
    if not experts:
        return [some.x for some in arrived]
    by_rank = [[part.split(some) for part in seen] for seen, some in zip(arrived, lengths, strict=True)]
    seen = [Seen(*(_joined([of[part][i] for of in by_rank]) for part in range(4))) for i in range(len(experts))]
    pairs = [(routed.real[expert], routed.ideal[expert]) for expert in experts]
    outputs = _settle(job, pairs, seen, pool, sample)
    for real, _ in pairs:  # what they were used for is done
        for linear in every_linear(real):
            linear.weight = linear.weight.new_empty(0)
    of_rank = zip(*(o.split([some[i] for some in lengths]) for i, o in enumerate(outputs)), strict=True)
    return [_joined(some) for some in of_rank]


def _settle(
    job: Job, pairs: Sequence[tuple[FFN, FFN]], seen: Sequence[Seen], pool: Split | None, sample: Seen | None
) -> list[torch.Tensor]:
    """Quantize what is wanted of experts, real and ideal. Returns their weighted outputs, in the last layer none."""
    c = job.config
    gate_up = [job.wanted((real.gate_proj, real.up_proj)) for real, _ in pairs]
    down = [job.wanted((real.down_proj,)) for real, _ in pairs]
    pieces = [[Seen(*parts) for parts in zip(*(part.split(ROWS) for part in some), strict=True)] for some in seen]
    stages = [
        [(real.stages(some.x), ideal.stages(some.y)) for some in of_one]
        for (real, ideal), of_one in zip(pairs, pieces, strict=True)
    ]
    if gate_up[0]:
        assert pool is not None
        found = Sums.zeros(len(pairs), c.hidden_size, job.device)
        for i, of_one in enumerate(pieces):
            for some in of_one:
                found.add(i, some.held, some.x, some.y)
        choose(job, gate_up, found.split().shrunk(pool))
    if down[0]:
        assert sample is not None
        found, prior = (Sums.zeros(len(pairs), c.moe_intermediate_size, job.device) for _ in range(2))
        for i, of_one in enumerate(pieces):
            for some, begun in zip(of_one, stages[i], strict=True):
                x, y = (_before_down(ffn) for ffn in begun)
                found.add(i, some.held, x, y, some.weights.square())
            x, y = (_before_down(ffn.stages(z)) for ffn, z in zip(pairs[i], (sample.x, sample.y), strict=True))
            prior.add(i, sample.held, x, y)
        choose(job, down, found.split().shrunk(prior.split()))
    if job.is_last:
        return []
    outputs = [torch.empty_like(some.x) for some in seen]
    for output, of_one, begun_ones in zip(outputs, pieces, stages, strict=True):
        for rows, some, (real, _) in zip(output.split(ROWS), of_one, begun_ones, strict=True):
            torch.mul(finish(real), some.weights[:, None], out=rows)
    return outputs


def _before_down(stages: Stages[torch.Tensor]) -> torch.Tensor:
    """What an expert's down is applied to."""
    next(stages)
    return next(stages).x


def _joined(parts: Sequence[torch.Tensor], like: torch.Tensor | None = None) -> torch.Tensor:
    """One tensor after the other; none of something like `like` where there is none."""
    if not parts:
        assert like is not None
        return like[:0]
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
