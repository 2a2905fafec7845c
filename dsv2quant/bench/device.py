"""What the benchmarks of a GPU share: times by CUDA graph, the memory's speed, and what they were measured on."""

from __future__ import annotations

import math
import statistics
import subprocess
from collections.abc import Callable, Sequence

import torch
import triton

from dsv2quant import __version__
from dsv2quant.errors import UsageError

ROTATED = 200e6  # bytes: calls in turn read at least as many, since the L2 of a Hopper GPU holds 50 to 60 MB


def check_device() -> None:
    """Raise UsageError where there is no Hopper GPU."""
    if not torch.cuda.is_available():
        raise UsageError("there is no CUDA device to measure", fix="run it on a machine with an H100 or H200")
    if torch.cuda.get_device_capability() < (9, 0):
        raise UsageError(f"{torch.cuda.get_device_name()} has no FP8 units that the kernels could use",
                         fix="run it on a machine with an H100 or H200")  # fmt: skip


def copies(nbytes: float) -> int:
    """Of an operand that no call may find in the cache."""
    return max(2, math.ceil(ROTATED / nbytes))


def microseconds(calls: Sequence[Callable[[], object]], replays: int = 7) -> float:
    """Of one of the calls, which are captured one after the other in a graph: the median of its replays, after one."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[1:])


def bandwidth() -> float:
    """Bytes per second of a sum over 4 GB."""
    x = torch.randn(1 << 30, device="cuda")
    return x.nbytes / (microseconds([lambda: x.sum()] * 3) * 1e-6)


def products() -> float:
    """Operations per second of BF16 products."""
    square = torch.randn(8192, 8192, device="cuda").bfloat16()
    return 2 * 8192**3 / (microseconds([lambda: square @ square] * 4) * 1e-6)


def measured_on() -> dict[str, str]:
    """The columns of a result that say where it comes from."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "GPU": torch.cuda.get_device_name(),
        "driver": subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0],
        "versions": f"dsv2quant {__version__}, torch {torch.__version__}, triton {triton.__version__}",
    }
