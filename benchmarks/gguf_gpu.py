"""Weights per second of the GGUF encoders on a CUDA device, in DeepSeek-V2-Lite's shapes.

    python benchmarks/gguf_gpu.py --results benchmarks/results/gguf_gpu.csv

`tensor` is the 64 experts' matrices of one layer in a single call, `matrix` one of them; `Q4_K_M` encodes every tensor
of the model as llama-quantize types it, one call each. Random BF16 weights already on the device, median of 5 runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch
import triton

from dsv2quant import __version__
from dsv2quant.arch.decoder import architecture
from dsv2quant.bench.device import append
from dsv2quant.bench.model import configuration
from dsv2quant.kernels.gguf_encode import encode
from dsv2quant.planning.gguf_types import choose

TYPES = ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_XS")
TENSOR, MATRIX = (64 * 1408, 2048), (1408, 2048)


def seconds(name: str, shape: tuple[int, int], weighted: bool) -> float:
    """Of one encoding, after one that compiles."""
    x = (torch.randn(shape, device="cuda") * 0.02).bfloat16().float()
    importance = torch.rand(shape[1], device="cuda") if weighted else None
    times = []
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        encode(name, x, importance)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[1:])


def row(what: str, name: str, weighted: bool, weights: int, taken: float) -> dict[str, Any]:
    result = {
        "what": what,
        "type": name,
        "importance": "yes" if weighted else "no",
        "weights": weights,
        "ms": f"{taken * 1e3:.3f}",
        "Gweights/s": f"{weights / taken / 1e9:.2f}",
        "GPU": torch.cuda.get_device_name(),
        "versions": f"dsv2quant {__version__}, torch {torch.__version__}, triton {triton.__version__}",
    }
    print(*result.values(), file=sys.stderr)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    rows = [
        row(what, name, weighted, prod(shape), seconds(name, shape, weighted))
        for name in TYPES
        for weighted in (False, True)
        for what, shape in (("tensor", TENSOR), ("matrix", MATRIX))
    ]
    config = configuration("v2-lite")
    tensors = architecture(config).gguf_tensors()
    kinds = [kind for kind, _ in choose(tensors, "Q4_K_M", config)]
    counts = Counter((kind, (prod(t.shape[:-1]), t.shape[-1])) for kind, t in zip(kinds, tensors, strict=True))
    weights = sum(prod(shape) * count for (_, shape), count in counts.items())
    for weighted in (False, True):
        taken = sum(seconds(name, shape, weighted) * count for (name, shape), count in counts.items())
        rows.append(row("model", "Q4_K_M", weighted, weights, taken))
    append(options.results, rows)


if __name__ == "__main__":
    main()
