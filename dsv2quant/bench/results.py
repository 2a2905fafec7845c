"""What a benchmark of a kernel finds, and what rows of results make of it."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsv2quant.errors import UsageError

FLOOR = "floor"


class Measured(NamedTuple):
    """One call: its relative Frobenius error, and its µs beside those of peers and the floor."""

    operation: str
    model: str
    what: str
    shape: str
    tokens: int
    error: float
    limit: float  # of the error
    us: float
    floor_us: float
    peers: Mapping[str, float]  # µs
    share: str = ""

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.model, self.what, f"M={self.tokens}")))

    @property
    def wrong(self) -> bool:
        return not self.error <= self.limit

    def speed(self, against: str) -> float | None:
        """Times as fast as a peer, or the part of the floor's speed that is reached; None where it was not measured."""
        other = self.floor_us if against == FLOOR else self.peers.get(against)
        return None if other is None else other / self.us

    def line(self) -> str:
        peers = "".join(f", {name} {us:.1f} ({us / self.us:.2f})" for name, us in self.peers.items())
        return (
            f"{self.operation}: {self.label} {self.shape}: {self.us:.1f} µs{peers}, "
            f"floor {self.floor_us:.1f} ({self.floor_us / self.us:.2f}), "
            f"error {self.error:.1e}{' WRONG' * self.wrong}  {self.share}"
        )

    def columns(self, peers: Sequence[str]) -> dict[str, Any]:
        """For a CSV file with a column for each of `peers`."""
        found = {
            "operation": self.operation, "model": self.model, "what": self.what, "shape": self.shape, "M": self.tokens,
            "error": f"{self.error:.2e}", "us": f"{self.us:.2f}", "floor us": f"{self.floor_us:.2f}",
        }  # fmt: skip
        found |= {f"{peer} us": f"{self.peers[peer]:.2f}" if peer in self.peers else "" for peer in peers}
        return found | {"share": self.share}


class Row(NamedTuple):
    """A line of the summary: the calls it is over, and the peer, or FLOOR, that they are set against."""

    title: str
    against: str
    covers: Callable[[Measured], bool]

    def summary(self, measured: Iterable[Measured]) -> dict[str, Any] | None:
        """The geometric mean of speeds and the worst one; None where nothing was measured."""
        speeds = {m.label: speed for m in measured if self.covers(m) and (speed := m.speed(self.against)) is not None}
        if not speeds:
            return None
        worst = min(speeds, key=speeds.__getitem__)
        return {
            "row": self.title, "against": self.against, "calls": len(speeds),
            "mean": statistics.geometric_mean(speeds.values()), "worst": speeds[worst], "worst call": worst,
        }  # fmt: skip


def append(results: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a CSV file, with a header if it is new. Raises UsageError where the file has other columns."""
    if results is None or not rows:
        return
    new = not results.exists()
    if not new:
        with results.open(newline="") as file:
            header = next(csv.reader(file), [])
        if header != list(rows[0]):
            raise UsageError(f"{results} has other columns", fix="name another file")
    with results.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)
