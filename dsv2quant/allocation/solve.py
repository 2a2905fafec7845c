"""Choosing one candidate for each item, so that the predicted cost is least within a budget of bytes: the
multiple-choice knapsack problem, solved by its Lagrangian with a bound.

Costs add up where errors are small and independent: KL divergence is then quadratic in them. Of each item only the
candidates on the lower convex hull of (bytes, cost) can be chosen by any price of a byte; the steps along all hulls,
steepest first, are the optimum for every budget that a step ends at (Sinha and Zoltners 1979, The Multiple-Choice
Knapsack Problem). Between two such budgets what is left is spent on exchanges that still fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Offer(NamedTuple):
    """What a candidate takes, and costs."""

    nbytes: int
    cost: float


Offers = Mapping[str, Mapping[str, Offer]]  # item → candidate → what it takes


@dataclass(frozen=True)
class Solution:
    """A candidate for each item; `bound` is a cost that no choice of so many bytes goes below."""

    chosen: Mapping[str, str]
    nbytes: int
    cost: float
    bound: float


class _Step(NamedTuple):
    slope: float  # cost saved for a byte
    item: str
    candidate: str
    nbytes: int
    saved: float


def solve(offers: Offers, budget: int) -> Solution | None:
    """The best of at most `budget` bytes, None where the smallest of all is larger."""
    chosen, steps = _smallest(offers), _steps(offers)
    room = budget - _total(offers, chosen)[0]
    if room < 0:
        return None
    bound = saved = 0.0
    is_exact = True
    for step in steps:
        if step.nbytes <= room and is_exact:
            room -= step.nbytes
            chosen[step.item] = step.candidate
            saved += step.saved
        elif is_exact:  # the part of the step that would fit, were items cut: no choice saves more
            bound, is_exact = saved + step.slope * room, False
    start = _total(offers, _smallest(offers))[1]
    _exchange(offers, chosen, room)
    nbytes, cost = _total(offers, chosen)
    return Solution(chosen, nbytes, cost, start - (saved if is_exact else bound))


def solve_for_cost(offers: Offers, most: float) -> Solution | None:
    """The smallest whose cost is at most `most`, None where the best of all costs more."""
    low, high = (_total(offers, each)[0] for each in (_smallest(offers), _dearest(offers)))
    best = solve(offers, high)
    if best is None or best.cost > most:
        return None
    while low < high:
        middle = (low + high) // 2
        found = solve(offers, middle)
        if found is not None and found.cost <= most:
            best, high = found, min(middle, found.nbytes)
        else:
            low = middle + 1
    return best


def _smallest(offers: Offers) -> dict[str, str]:
    return {item: min(options, key=options.__getitem__) for item, options in offers.items()}


def _dearest(offers: Offers) -> dict[str, str]:
    return {item: min(o, key=lambda c: (o[c].cost, o[c].nbytes)) for item, o in offers.items()}


def _total(offers: Offers, chosen: Mapping[str, str]) -> tuple[int, float]:
    found = [offers[item][candidate] for item, candidate in chosen.items()]
    return sum(offer.nbytes for offer in found), sum(offer.cost for offer in found)


def _steps(offers: Offers) -> list[_Step]:
    """Along the lower convex hull of each item, from its smallest candidate on; steepest first."""
    steps: list[_Step] = []
    for item, options in offers.items():
        at = min(options, key=options.__getitem__)
        while True:
            here = options[at]
            larger = [c for c, o in options.items() if o.nbytes > here.nbytes and o.cost < here.cost]
            if not larger:
                break
            slope = {c: (here.cost - options[c].cost) / (options[c].nbytes - here.nbytes) for c in larger}
            best = max(larger, key=lambda c: (slope[c], options[c].nbytes))
            there = options[best]
            steps.append(_Step(slope[best], item, best, there.nbytes - here.nbytes, here.cost - there.cost))
            at = best
    return sorted(steps, key=lambda step: -step.slope)


def _exchange(offers: Offers, chosen: dict[str, str], room: int) -> None:
    """Improve a choice by single moves, and by pairs of one that takes bytes and one that gives some back, as long as
    one saves."""
    items = [(item, candidate) for item, options in offers.items() for candidate in options]
    number = np.unique([item for item, _ in items], return_inverse=True)[1]
    while True:
        here = [offers[item][chosen[item]] for item, _ in items]
        nbytes = np.array([offers[i][c].nbytes - h.nbytes for (i, c), h in zip(items, here, strict=True)])
        costs = np.array([offers[i][c].cost - h.cost for (i, c), h in zip(items, here, strict=True)])
        # The second of a pair may be no move at all: every item's own candidate is one of the moves.
        fits = (nbytes[:, None] + nbytes <= room) & ((number[:, None] != number) | ((nbytes == 0) & (costs == 0)))
        saved = np.where(fits, costs[:, None] + costs, 0.0)
        first, second = np.unravel_index(saved.argmin(), saved.shape)
        if saved[first, second] >= -1e-15:
            return
        for move in (second, first):
            item, candidate = items[move]
            if candidate != chosen[item]:
                room -= int(nbytes[move])
                chosen[item] = candidate
