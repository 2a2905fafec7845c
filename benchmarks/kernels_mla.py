"""MLA decode attention on a CUDA device: errors, then times against the floor that bandwidth and matrix unit set.

    python benchmarks/kernels_mla.py --results benchmarks/results/kernels_mla.csv [--sweep]

Every call of a CUDA graph reads another cache, 0.5 GB or more in all, so that none lies in the L2. Bandwidth is that of
a sum over 4 GB, the rate that of torch's matrix product, both measured in the same run. `--sweep` tries other blocks.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from functools import partial
from pathlib import Path

import torch
import triton
from convert import append
from device import bandwidth, measured_on, microseconds

from dsv2quant.kernels import reference
from dsv2quant.kernels.mla_decode import MAX_SPLITS, Blocks, blocks_of, mla_decode

RANK, WIDTH = 512, 576
SHAPES = [(16, 64, 4096), (16, 1, 4096), (16, 8, 4096), (16, 1, 32768), (16, 8, 32768), (128, 64, 4096),
          (128, 1, 4096), (128, 8, 4096), (128, 8, 32768)]  # fmt: skip
STORED = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
SWEPT = {  # heads, tokens, warps, stages
    (16, "bf16"): [(16, 32, 4, 3), (16, 32, 4, 4), (16, 64, 4, 2), (16, 64, 4, 3), (16, 64, 8, 3)],
    (16, "e4m3"): [(16, 32, 4, 3), (16, 32, 4, 4), (16, 32, 8, 3), (16, 64, 4, 3), (16, 64, 8, 3)],
    (128, "bf16"): [(64, 64, 8, 2), (64, 32, 8, 3), (16, 64, 4, 3)],
    (128, "e4m3"): [(64, 64, 8, 2), (64, 32, 8, 3), (16, 64, 8, 3)],
}


def arguments(heads: int, batch: int, tokens: int, stored: str) -> list[tuple]:
    """The arguments of enough calls."""
    size = batch * tokens * WIDTH * STORED[stored].itemsize
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
    factor = torch.tensor([0.02], device="cuda") if stored == "e4m3" else None
    calls = []
    for _ in range(max(2, -(-(1 << 29) // size))):
        q = torch.randn(batch, heads, WIDTH, device="cuda").bfloat16()
        cache = torch.randn(batch, tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
        cache = cache if factor is None else (cache / factor).to(STORED[stored])
        calls.append((q, cache, lengths, RANK, WIDTH**-0.5, factor))
    return calls


def tried(heads: int, batch: int, tokens: int, stored: str, sweep: bool, processors: int) -> list[Blocks]:
    """The choice, then what else the sweep tries: splits that fill the device once, twice, …"""
    chosen = blocks_of(batch, heads, tokens, processors)
    found = [chosen]
    for cut in SWEPT[heads, stored] if sweep else []:
        programs = batch * triton.cdiv(heads, cut[0])
        most = min(MAX_SPLITS, tokens // cut[1])
        fills = {min(most, max(1, times * processors // programs)) for times in (1, 2, 3, 4)}
        found += [Blocks(*cut[:2], splits, *cut[2:]) for splits in sorted(fills)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_properties(0)
    reads, rate, where = bandwidth(), products(), measured_on()
    print(f"{where['GPU']}: {reads / 1e12:.2f} TB/s, {rate / 1e12:.0f} TFLOP/s", file=sys.stderr)
    rows = []
    for (heads, batch, tokens), stored in itertools.product(SHAPES, STORED):
        calls = arguments(heads, batch, tokens, stored)
        moved = batch * (tokens * WIDTH * STORED[stored].itemsize + heads * (WIDTH * 2 + RANK * 4))
        floor = max(moved / reads, 2 * batch * heads * tokens * (WIDTH + RANK) / rate)
        q, cache, lengths, *rest = calls[0]
        expected = reference.mla_decode(q[:4].double(), cache[:4], lengths[:4], *rest)
        results = []
        for blocks in tried(heads, batch, tokens, stored, options.sweep, device.multi_processor_count):
            try:
                got = mla_decode(*calls[0], blocks=blocks)[:4]
                off = float((got.double() - expected).norm() / expected.norm())
                taken = 1e-6 * microseconds([partial(mla_decode, *given, blocks=blocks) for given in calls])
            except triton.runtime.errors.OutOfResources as refused:
                print(f"{blocks}: {refused}", file=sys.stderr)
                continue
            results.append((taken, off, blocks))
        chosen, best = results[0], sorted(results)
        for label, (taken, off, blocks) in [("chosen", chosen), *zip(itertools.count(1), best[:5])]:
            what = f"{heads:3} heads {batch:2} × {tokens:5} {stored} {label!s:6}"
            times = f"{taken * 1e6:8.1f} µs, floor {floor * 1e6:7.1f}, {floor / taken:.2f}"
            print(f"{what} {times}, error {off:.1e}, {tuple(blocks)}", file=sys.stderr, flush=True)
        taken, off, blocks = chosen
        rows.append({
            "heads": heads, "batch": batch, "tokens": tokens, "cache": stored, "error": f"{off:.1e}",
            "us": f"{taken * 1e6:.1f}", "floor us": f"{floor * 1e6:.1f}", "ratio": f"{floor / taken:.2f}",
            "TB/s": f"{moved / taken / 1e12:.2f}", "blocks": " ".join(map(str, blocks)),
            "measured": f"{reads / 1e12:.2f} TB/s, {rate / 1e12:.0f} TFLOP/s", **where,
        })  # fmt: skip
    append(options.results, rows)


def products() -> float:
    """Operations per second of BF16 products."""
    square = torch.randn(8192, 8192, device="cuda").bfloat16()
    return 2 * 8192**3 / (microseconds([lambda: square @ square] * 4) * 1e-6)


if __name__ == "__main__":
    main()
