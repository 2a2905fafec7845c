"""What the benchmarks of a GPU share: times by CUDA graph, the GPU's speed, and what they were measured on."""

from __future__ import annotations

import math
import statistics
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton

from dsv2quant import __version__
from dsv2quant.errors import UsageError

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


def random_tokens(count: int, columns: int) -> torch.Tensor:
    return torch.randn(count, columns, device="cuda").bfloat16()


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
