"""What the benchmarks of a GPU share: times by CUDA graph, the GPU's speed, and what they were measured on.

What a benchmark of a kernel finds, and what rows of results make of it.
"""

from __future__ import annotations

import csv
import math
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from dsv2quant.errors import UsageError
from dsv2quant.version import __version__

ROTATED = 200e6  # bytes that calls in turn read, at least: the L2 of a Hopper GPU holds 50 to 60 MB


class Limits(NamedTuple):
    """What this GPU reached in this run: bytes per second of a sum over 4 GB, operations per second of BF16 products.
    Its FP8 units are twice as fast."""

    read: float
    products: float

    def floor(self, nbytes: float, operations: float) -> float:
        """µs."""
        return max(nbytes / self.read, operations / self.products) * 1e6

    def __str__(self) -> str:
        return f"{self.read / 1e12:.2f} TB/s, {self.products / 1e12:.0f} TFLOP/s"


def check_device() -> None:
    """Raise UsageError where there is no Hopper GPU."""
    fix = "run it on a machine with an H100 or H200"
    if not torch.cuda.is_available():
        raise UsageError("there is no CUDA device to measure", fix=fix)
    if torch.cuda.get_device_capability() < (9, 0):
        raise UsageError(f"{torch.cuda.get_device_name()} has none of the units that the kernels are for", fix=fix)


def copies(nbytes: float) -> int:
    """Of an operand that no call may find in the cache."""
    return max(2, math.ceil(ROTATED / nbytes))


def random_bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def rotated(weight: Any, count: int) -> list[Any]:
    """`count` packed weights (`Int4Weight`, `GgufWeight`): the one given, the others with random words."""

    def another() -> Any:
        made = weight._make(part.clone() if isinstance(part, torch.Tensor) else part for part in weight)
        made.words.random_(-(2**31), 2**31 - 1)
        return made

    return [weight, *(another() for _ in range(count - 1))]


def products(
    linear: Callable[..., torch.Tensor],
    dequantize: Callable[..., torch.Tensor],
    weights: Sequence[Any],
    x: torch.Tensor,
    share: object,
) -> list[Callable[[], torch.Tensor]]:
    """x times each weight, by `linear` with a share; without one, as it takes many tokens. All write to the same
    output, which begins as NaN."""
    out = torch.full((len(x), weights[0].rows), math.nan, dtype=torch.bfloat16, device="cuda")

    def product(weight: Any) -> torch.Tensor:
        return linear(x, weight, out, share) if share else torch.mm(x, dequantize(weight, x.dtype).T, out=out)

    return [partial(product, weight) for weight in weights]


def recorded(calls: Sequence[Callable[[], object]]) -> Callable[[int], float]:
    """Records the calls one after the other in a CUDA graph. What it returns replays that so many times, after once for
    nothing, and gives the median, µs of one call."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay(times: int) -> float:
        taken = []
        for _ in range(times + 1):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) * 1e3 / len(calls))
        return statistics.median(taken[1:])

    return replay


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Of one of the calls: see `recorded`."""
    return recorded(calls)(7)


def limits() -> Limits:
    x = torch.randn(1 << 30, device="cuda")
    read = x.nbytes / (microseconds([lambda: x.sum()] * 3) * 1e-6)
    square = torch.randn(8192, 8192, device="cuda").bfloat16()
    return Limits(read, 2 * 8192**3 / (microseconds([lambda: square @ square] * 4) * 1e-6))


def frobenius(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error of a result whose every element was written."""
    return float((out.double() - expected).norm() / expected.norm())


def measured_on() -> dict[str, str]:
    """The columns of a result that say where it comes from."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "GPU": torch.cuda.get_device_name(),
        "driver": subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0],
        "versions": f"dsv2quant {__version__}, torch {torch.__version__}, triton {triton.__version__}",
    }


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


class Section(NamedTuple):
    """What `bench kernels --only` names: its calls, the peers that they are set against, its part of the summary."""

    measure: Callable[[Limits], Iterator[Measured]]
    peers: Sequence[str]
    rows: Sequence[Row]


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
