"""Products in float32 on a processor: what `reference.product` asks, oneDNN, beside what F.linear asks (MKL, OpenBLAS).

    python benchmarks/product.py --results benchmarks/results/product.csv

In processor seconds of one thread, so that other work on the machine counts little; the median of REPEATS, in turn.
Shapes are a batch's tokens in dsv2-mini and DeepSeek-V2-Lite, a routed expert's, and one token.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from dsv2quant import __version__
from dsv2quant.bench.device import append
from dsv2quant.kernels.reference import product

# tokens, columns, rows
SHAPES = (
    (4096, 256, 768), (4096, 256, 4096), (512, 256, 128), (64, 256, 128), (4096, 2048, 2048), (512, 2048, 1408),
    (64, 2048, 1408), (1, 2048, 2048),
)  # fmt: skip
REPEATS = 9


def seconds(call: Callable[[], object], times: int) -> float:
    begin = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - begin) / times


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for tokens, columns, out in SHAPES:
        x, weight = torch.randn(tokens, columns), torch.randn(out, columns)
        work = 2 * tokens * columns * out
        calls = [lambda x=x, w=weight: product(x, w, None), lambda x=x, w=weight: F.linear(x, w)]
        for call in calls:
            call()
        times = max(1, int(5e9 / work))
        ours, theirs = (
            median(found)
            for found in zip(*([seconds(call, times) for call in calls] for _ in range(REPEATS)), strict=True)
        )
        row = {
            "tokens": tokens, "columns": columns, "rows": out, "oneDNN GFLOP/s": f"{work / ours / 1e9:.0f}",
            "F.linear GFLOP/s": f"{work / theirs / 1e9:.0f}", "times as fast": f"{theirs / ours:.2f}",
            "processor": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
            "versions": f"dsv2quant {__version__}, torch {torch.__version__}",
        }  # fmt: skip
        print(row, flush=True)
        rows.append(row)
    append(options.results, rows)


if __name__ == "__main__":
    main()
