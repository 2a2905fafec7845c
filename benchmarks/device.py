"""What the benchmarks of GPU kernels share: times by CUDA graph, the memory's speed, and what they were measured on."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Sequence

import torch
import triton

from dsv2quant import __version__


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Of one of the calls, which are captured one after the other in a graph: the median of 7 replays, after one."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(8):
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


def measured_on() -> dict[str, str]:
    """The columns of a result that say where it comes from."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "GPU": torch.cuda.get_device_name(),
        "driver": subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0],
        "versions": f"dsv2quant {__version__}, torch {torch.__version__}, triton {triton.__version__}",
    }
