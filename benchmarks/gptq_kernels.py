"""GPTQ's loop over columns and its search for scales on a CUDA device: the kernels beside the torch loops.

    python benchmarks/gptq_kernels.py --results benchmarks/results/gptq_kernels.csv

Random matrices in the shapes of DeepSeek-V2-Lite's 64 experts, of 16 of V2's and of V2's o_proj, in groups of 128.
`columns` is `gptq.quantize` whole, the product after each 64 columns included; `block` are the 64 columns before such a
product; `scales` is the search. Median of 3 runs, after one that compiles. `same` is the share of codes, or of scales,
that the torch loop chose as well; where it is below 1 for codes, a kernel is wrong.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dsv2quant.bench.device import append, measured_on
from dsv2quant.calib import gptq
from dsv2quant.kernels import gptq as kernels
from dsv2quant.kernels import reference_gptq

SHAPES = {  # batch, rows, columns
    "V2-Lite gate, up": (64, 1408, 2048),
    "V2-Lite down": (64, 2048, 1408),
    "V2 gate, up": (16, 1536, 5120),
    "V2 o_proj": (1, 5120, 16384),
}
GROUP = 128


def measured(call: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """ms, and the result."""
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[1:]), result


def factored(batch: int, columns: int) -> tuple[torch.Tensor, gptq.Factor]:
    """The diagonals [batch, K] and the factors of H of twice as many correlated tokens as columns."""
    mix = torch.randn(columns, columns, device="cuda") * columns**-0.5
    h = torch.empty(batch, columns, columns, device="cuda")
    for one in h:
        x = torch.randn(2 * columns, columns, device="cuda")
        x = (x @ mix + 0.1 * x) * torch.randn(columns, device="cuda").exp()
        torch.mm(x.T, x, out=one)
    return h.diagonal(dim1=1, dim2=2).clone(), gptq.factor(h)


def compared(batch: int, rows: int, columns: int) -> Iterator[tuple[str, float, float, float]]:
    """What is measured, ms of the torch loop and of the kernel, and the share of equal results."""
    weight = torch.randn(batch, rows, columns, device="cuda") * 0.02
    diagonal, factors = factored(batch, columns)
    scales = gptq.best_scales(weight, diagonal, GROUP)
    group = factors.order // GROUP
    u = factors.u[:, : gptq.BLOCK, : gptq.BLOCK].contiguous()
    codes = torch.empty_like(weight, dtype=torch.int8)
    loops = {
        "scales": partial(gptq.best_scales, weight, diagonal, GROUP),
        "block": partial(_block, weight, scales, group, u, codes),
        "columns": partial(gptq.quantize, weight, scales, factors),
    }
    for what, call in loops.items():
        ours, result = measured(call)
        with (
            patch.object(kernels, "quantize_block", reference_gptq.quantize_block),
            patch.object(kernels, "search_scales", reference_gptq.search_scales),
        ):
            theirs, expected = measured(call)
        yield what, theirs, ours, float((result == expected).float().mean())


def _block(
    weight: torch.Tensor, scales: torch.Tensor, group: torch.Tensor, u: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    kernels.quantize_block(weight, scales, group, u, codes, 0, 4)
    return codes[:, :, : u.shape[1]].clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name, shape in SHAPES.items():
        for what, theirs, ours, same in compared(*shape):
            row = {"matrices": name, "shape": "x".join(map(str, shape)), "what": what}
            row |= {"torch ms": f"{theirs:.2f}", "kernel ms": f"{ours:.2f}", "times": f"{theirs / ours:.1f}"}
            rows.append(row | {"same": f"{same:.6f}"} | measured_on())
            print(*rows[-1].values(), file=sys.stderr)
    append(options.results, rows)


if __name__ == "__main__":
    main()
