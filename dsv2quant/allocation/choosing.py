"""Choosing a mix: what each part of a model costs in each candidate is measured, the best choice within the budget is
solved for, measured as a whole, and refined where it stands.

Costs of single swaps add up only where errors are small. The mix that comes of them is therefore measured as a whole,
and then again with each part one step up or down in it: these differences hold where the mix is, at 2 bits, too. What
they lead to is kept where its measured divergence is less, up to ROUNDS times.

What was measured is kept in `state`: a run that was killed goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dsv2quant.allocation.items import Part
from dsv2quant.allocation.measuring import ERRORS, SWAPS, WHOLE, Measuring
from dsv2quant.allocation.solve import Offer, Offers, Solution, solve, solve_for_cost
from dsv2quant.errors import UsageError
from dsv2quant.evaluation.divergence import batches_of, bootstrap
from dsv2quant.progress import Progress
from dsv2quant.storage.durable import StateLog, disk_errors

CURVE = 12  # budgets for which the curve says what to expect
STEPS = 2  # candidates next in size, on either side, that a part is tried in where the mix is
ROUNDS = 5  # how often at most


@dataclass(frozen=True)
class Expected:
    """Bytes of the whole artifact, and what single swaps predict of its divergence, in nats."""

    nbytes: int
    predicted: float


@dataclass(frozen=True)
class Point(Expected):
    """And what was measured of the mix as a whole, with its standard error over windows."""

    measured: float
    stderr: float


@dataclass(frozen=True)
class Budget:
    """What the artifact may take, `nbytes` at most, or cost, `kld` nats. `fixed` bytes of it are no part's."""

    nbytes: int | None
    kld: float | None
    fixed: int

    def solve(self, offers: Offers, already: float = 0.0) -> Solution | None:
        """The best choice within it, where the model has cost `already` without what the offers add."""
        if self.nbytes is not None:
            found = solve(offers, self.nbytes - self.fixed)
        else:
            assert self.kld is not None
            found = solve_for_cost(offers, self.kld - already)
        return None if found is None else replace(found, cost=found.cost + already)

    def point(self, solution: Solution, measured: np.ndarray) -> Point:
        """A solution, and its divergence by window, [windows]."""
        nbytes = solution.nbytes + self.fixed
        return Point(nbytes, solution.cost, float(measured.mean()), bootstrap(measured))

    def rank(self, point: Point) -> tuple[bool, float]:
        """Less is better: less divergence, or where that is limited fewer bytes within the limit."""
        if self.kld is None:
            return False, point.measured
        above = point.measured > self.kld
        return above, point.measured if above else point.nbytes


@dataclass(frozen=True)
class Mix:
    """What a search found: a candidate for each part, the point that it is, and those on the way; `bound` is what no
    choice of as many bytes goes below, if costs add up."""

    chosen: Mapping[str, str]
    point: Point
    bound: float
    first: Point
    curve: tuple[Expected, ...]


@dataclass
class _Run:
    """One search; `known` is what `log` has, by key."""

    measuring: Measuring
    log: StateLog
    progress: Progress
    known: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.known = {line["key"]: line["value"] for line in self.log.lines[1:]}

    @property
    def parts(self) -> Mapping[str, Part]:
        return self.measuring.parts

    def offers(self) -> Offers:
        """What each part costs in each candidate, with all else as it is."""
        wanted = [(key, each) for key, part in self.parts.items() for each in part.options if each in part.measured]
        found = {at: float(np.mean(kld)) for at, kld in self.swaps(None, wanted, "swaps").items()}
        ranks, predicted = self.measuring.ranks, [key for key, part in self.parts.items() if part.predicted]
        with self.progress(len(ranks.share(len(predicted))), "parts", "errors") as advance:
            ranks.announce(ERRORS, predicted)
            errors = self.measuring.errors(predicted, advance)
        return {key: _offers(part, found, errors.get(key, {})) for key, part in self.parts.items()}

    def swaps(
        self, mix: Mapping[str, str] | None, wanted: Iterable[tuple[str, str]], label: str
    ) -> dict[tuple[str, str], list[float]]:
        """Divergence by window of each (part, candidate) that is swapped into a mix, or into the model itself."""
        place = "" if mix is None else _name(mix)[:16]
        keys = {(part, candidate): f"{place}/{part}/{candidate}" for part, candidate in wanted}
        lacking = sorted((at for at, key in keys.items() if key not in self.known), key=self._layer)
        with self.progress(len(lacking), "swaps", label) as advance:
            for some in batches_of(len(lacking), self.measuring.together):
                self.measuring.ranks.announce(SWAPS, mix, lacking[some])
                found = self.measuring.swaps(mix, lacking[some], advance)
                for at, kld in zip(lacking[some], found, strict=True):
                    self._keep(keys[at], kld.tolist())
        return {at: self.known[key] for at, key in keys.items()}

    def _layer(self, at: tuple[str, str]) -> int:
        layer = self.parts[at[0]].layer
        return -1 if layer is None else layer

    def whole(self, mix: Mapping[str, str]) -> np.ndarray:
        """Divergence of a mix by window, [windows]."""
        key = _name(mix)
        if key not in self.known:
            with self.progress(0, "", "measure the mix"):
                self.measuring.ranks.announce(WHOLE, mix)
                self._keep(key, self.measuring.whole(mix).tolist())
        return np.array(self.known[key])

    def _keep(self, key: str, value: list[float]) -> None:
        self.log.append({"key": key, "value": value})
        self.known[key] = value


def _offers(part: Part, found: Mapping[tuple[str, str], float], errors: Mapping[str, float]) -> dict[str, Offer]:
    """Costs of a part that were not measured are in proportion to the squared error of its weights, as those of the
    candidate with the nearest error."""
    costs = {candidate: found[part.key, candidate] for candidate in part.measured}
    known = {candidate: error for candidate, error in errors.items() if candidate in costs and error}
    for candidate in part.predicted:
        error = errors[candidate]
        near = min(known, key=lambda other: abs(math.log(known[other] / error))) if error else None
        costs[candidate] = 0.0 if near is None else costs[near] * error / known[near]
    return {candidate: Offer(option.nbytes, costs[candidate]) for candidate, option in part.options.items()}


def _name(mix: Mapping[str, str]) -> str:
    """What a mix goes by in the log."""
    return hashlib.sha256(json.dumps(sorted(mix.items())).encode()).hexdigest()


def choose(
    measuring: Measuring, budget: Budget, state: Path, about: Mapping[str, Any], progress: Progress
) -> Mix:  # fmt: skip
    """Find a mix; of several ranks by the first alone, for which the others measure. `state` keeps what was measured
    `about` what is being done, for every budget; what it has of anything else is forgotten. Raises UsageError where
    nothing keeps to the budget."""
    with disk_errors(state), closing(StateLog(state, state)) as log:
        if log.lines[:1] != [dict(about)]:
            log.start(dict(about))
        run = _Run(measuring, log, progress)
        offers = run.offers()
        solution = _solved(offers, budget)
        bound, curve = solution.bound, tuple(_curve(offers, budget.fixed))
        first = point = budget.point(solution, run.whole(solution.chosen))
        for _ in range(ROUNDS):
            steps = _steps(run, offers, solution.chosen, point.measured)
            found = budget.solve(steps, point.measured)
            if found is None or found.chosen == solution.chosen:
                break
            better = budget.point(found, run.whole(found.chosen))
            if budget.rank(better) >= budget.rank(point):
                break
            solution, point = found, better
    return Mix(solution.chosen, point, bound, first, curve)


def _solved(offers: Offers, budget: Budget) -> Solution:
    """Raises UsageError where nothing keeps to the budget."""
    found = budget.solve(offers)
    if found is not None:
        return found
    if budget.nbytes is not None:
        least = sum(min(o.nbytes for o in options.values()) for options in offers.values()) + budget.fixed
        what = f"{budget.nbytes:,} bytes are too few: the smallest candidates take {least:,}"
        raise UsageError(what, fix="give a larger budget")
    best = sum(min(o.cost for o in options.values()) for options in offers.values())
    raise UsageError(f"--max-kld {budget.kld:g}: the best candidates come to {best:.2g}", fix="give a larger one")


def _steps(run: _Run, offers: Offers, chosen: Mapping[str, str], measured: float) -> dict[str, dict[str, Offer]]:
    """What steps up and down of each part change where the mix is: to candidates that no smaller one is better than."""
    wanted = []
    for key, options in offers.items():
        best, order = math.inf, list[str]()
        for candidate in sorted(options, key=options.__getitem__):
            if options[candidate].cost < best or candidate == chosen[key]:
                best = min(best, options[candidate].cost)
                order.append(candidate)
        here = order.index(chosen[key])
        near = order[max(0, here - STEPS) : here + STEPS + 1]
        wanted += [(key, candidate) for candidate in near if candidate != chosen[key]]
    found = run.swaps(chosen, wanted, "steps")
    steps = {key: {candidate: Offer(offers[key][candidate].nbytes, 0.0)} for key, candidate in chosen.items()}
    for (key, candidate), kld in found.items():
        steps[key][candidate] = Offer(offers[key][candidate].nbytes, float(np.mean(kld)) - measured)
    return steps


def _curve(offers: Offers, fixed: int) -> Iterator[Expected]:
    """What single swaps predict of the best mix of each size, from the smallest to the largest."""
    sizes = [[offer.nbytes for offer in options.values()] for options in offers.values()]
    least, most = (sum(map(pick, sizes)) for pick in (min, max))
    for budget in np.geomspace(least, most, CURVE).astype(int).tolist():
        found = solve(offers, budget + 1)
        assert found is not None
        yield Expected(found.nbytes + fixed, found.cost)
