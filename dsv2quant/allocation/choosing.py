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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv2quant.allocation.items import Part
from dsv2quant.allocation.solve import Offer, Offers, Solution, solve, solve_for_cost
from dsv2quant.allocation.swaps import Mixture, Swap, Text, divergences, held, measure, passed
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.errors import UsageError
from dsv2quant.evaluation.divergence import Pass, bootstrap
from dsv2quant.model.load import Loader, LoadOptions
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
    """One search: `loaders` are candidates' by name, `known` what `log` has, by key."""

    parts: Mapping[str, Part]
    loaders: Mapping[str, Loader]
    base: Loader
    text: Text
    log: StateLog
    progress: Progress
    known: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.known = {line["key"]: line["value"] for line in self.log.lines[1:]}

    def reference(self) -> Pass:
        with self.progress(0, "", "reference"):
            return passed(self.base, self.text)

    def offers(self, reference: Pass) -> Offers:
        """What each part costs in each candidate, with all else as it is."""
        wanted = [(part.key, candidate) for part in self.parts.values() for candidate in part.measured]
        found = {at: float(np.mean(kld)) for at, kld in self.swaps(None, wanted, reference, "swaps").items()}
        with self.progress(len(self.parts), "parts", "errors") as advance:
            return {key: self._predicted(part, found, advance) for key, part in self.parts.items()}

    def _predicted(
        self, part: Part, found: Mapping[tuple[str, str], float], done: Callable[[int], object]
    ) -> dict[str, Offer]:
        """Costs of a part that were not measured are in proportion to the squared error of its weights, as those of the
        candidate with the nearest error."""
        done(1)
        costs = {candidate: found[part.key, candidate] for candidate in part.measured}
        if costs.keys() != part.options.keys():
            errors = self._errors(part)
            known = {candidate: error for candidate, error in errors.items() if candidate in costs and error}
            for candidate in part.options.keys() - costs.keys():
                error = errors[candidate]
                near = min(known, key=lambda other: abs(math.log(known[other] / error))) if error else None
                costs[candidate] = 0.0 if near is None else costs[near] * error / known[near]
        return {candidate: Offer(option.nbytes, costs[candidate]) for candidate, option in part.options.items()}

    def _errors(self, part: Part) -> dict[str, float]:
        """Squared errors of a part's weights, by candidate."""
        errors = dict.fromkeys(part.options, 0.0)
        swapped = {candidate: held(self.base, [(part, self.loaders[candidate])]) for candidate in errors}
        for name in part.weights:
            weight = self.base.tensor(name, torch.float32)
            for candidate in errors:
                difference = swapped[candidate][name].tensor(name, torch.float32) - weight
                errors[candidate] += float(difference.square_().sum(dtype=torch.float64))
        return errors

    def swaps(
        self, mix: Mapping[str, str] | None, wanted: Iterable[tuple[str, str]], reference: Pass, label: str
    ) -> dict[tuple[str, str], list[float]]:
        """Divergence by window of each (part, candidate) that is swapped into a mix, or into the model itself."""
        place = "" if mix is None else _name(mix)[:16]
        keys = {(part, candidate): f"{place}/{part}/{candidate}" for part, candidate in wanted}
        lacking = [at for at, key in keys.items() if key not in self.known]
        base = self.base if mix is None else self.mixture(mix)
        swaps = [Swap(self.parts[key], candidate) for key, candidate in lacking]
        with self.progress(len(swaps), "swaps", label) as advance:
            for swap, kld in measure(base, self.loaders, swaps, reference, self.text, advance):
                self._keep(keys[swap.part.key, swap.candidate], kld.tolist())
        return {at: self.known[key] for at, key in keys.items()}

    def whole(self, mix: Mapping[str, str], reference: Pass) -> np.ndarray:
        """Divergence of a mix by window, [windows]."""
        key = _name(mix)
        if key not in self.known:
            with self.progress(0, "", "measure the mix"):
                self._keep(key, divergences(reference, [passed(self.mixture(mix), self.text)])[0].tolist())
        return np.array(self.known[key])

    def mixture(self, mix: Mapping[str, str]) -> Mixture:
        return Mixture(self.base, held(self.base, ((self.parts[key], self.loaders[c]) for key, c in mix.items())))

    def _keep(self, key: str, value: list[float]) -> None:
        self.log.append({"key": key, "value": value})
        self.known[key] = value


def _name(mix: Mapping[str, str]) -> str:
    """What a mix goes by in the log."""
    return hashlib.sha256(json.dumps(sorted(mix.items())).encode()).hexdigest()


def choose(
    parts: Sequence[Part],
    candidates: Mapping[str, Checkpoint],
    model: Checkpoint,
    text: Text,
    budget: Budget,
    state: Path,
    about: Mapping[str, Any],
    options: LoadOptions,
    progress: Progress,
) -> Mix:
    """Find a mix. `state` keeps what was measured `about` what is being done, for every budget; what it has of anything
    else is forgotten. Raises UsageError where nothing keeps to the budget."""
    loaders = {name: Loader(checkpoint, options) for name, checkpoint in candidates.items()}
    with disk_errors(state), closing(StateLog(state, state)) as log:
        if log.lines[:1] != [dict(about)]:
            log.start(dict(about))
        run = _Run({part.key: part for part in parts}, loaders, Loader(model, options), text, log, progress)
        reference = run.reference()
        offers = run.offers(reference)
        solution = _solved(offers, budget)
        bound, curve = solution.bound, tuple(_curve(offers, budget.fixed))
        first = point = budget.point(solution, run.whole(solution.chosen, reference))
        for _ in range(ROUNDS):
            steps = _steps(run, offers, solution.chosen, reference, point.measured)
            found = budget.solve(steps, point.measured)
            if found is None or found.chosen == solution.chosen:
                break
            better = budget.point(found, run.whole(found.chosen, reference))
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


def _steps(
    run: _Run, offers: Offers, chosen: Mapping[str, str], reference: Pass, measured: float
) -> dict[str, dict[str, Offer]]:
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
    found = run.swaps(chosen, wanted, reference, "steps")
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
