"""INT4 weights with BF16 activations on one GPU, in DeepSeek-V2's shapes: ours, cuBLAS on BF16, and the floor.

    python benchmarks/kernels_int4.py --results benchmarks/results/kernels_int4.csv

Each result is checked against float64 before it is timed. Times are of CUDA graphs that run over copies of the weight,
at least 200 MB of them, so that none is in the cache: the median of 7 replays, per call. The floor is the call's bytes
at the bandwidth a read of 4 GB reaches here, or its multiplications at 790 TFLOP/s. Up to 256 tokens, a few
configurations are tried per shape; `chosen` is the library's own, `best` the fastest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from convert import append
from device import bandwidth, measured_on, microseconds

from dsv2quant.kernels.int4_gemm import Config, choose, dequantize, linear
from dsv2quant.kernels.int4_layout import Int4Weight, pack
from dsv2quant.kernels.reference import dequantize_int4

SHAPES = {
    "q_b": (24576, 1536), "kv_b": (32768, 512), "o": (5120, 16384), "gate_up": (24576, 5120), "down": (5120, 12288),
    "qkv_a": (2112, 5120), "kv_a": (576, 5120), "exp_gu": (3072, 5120), "exp_dn": (5120, 1536),
    "lite_gate": (10944, 2048), "lite_q": (3072, 2048), "lite_o": (2048, 2048),
}  # fmt: skip
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
LARGE = 20e6  # bytes in BF16: smaller weights are bound by latency
TFLOPS = 790e12
ROTATED = 200e6


def configurations(tokens: int, rows: int, columns: int) -> list[Config]:
    """Those worth trying: between one and eight programs to a multiprocessor, where the shape allows."""
    if tokens <= 16:
        tiles = [(64, 16, 4, 4), (64, 16, 4, 6), (128, 16, 4, 4), (128, 16, 8, 4), (128, 16, 4, 6), (256, 16, 8, 4)]
    elif tokens <= 64:
        tiles = [(64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 8, 3), (128, 64, 8, 4), (256, 64, 8, 3)]
    else:
        tiles = [(128, 64, 8, 3), (128, 128, 8, 3), (256, 64, 8, 3)]
    found = []
    for high, wide, warps, stages in tiles:
        for split in (1, 2, 4, 8, 16):
            programs = ceil(rows / high) * ceil(tokens / wide) * split
            if split == 1 or (programs <= 132 * 8 and split <= columns // 256 and tokens <= 64):
                found.append(Config(high, wide, split, warps, stages))
    most = max(ceil(rows / c.rows) * c.split for c in found)
    return [c for c in found if ceil(rows / c.rows) * c.split >= min(120, most)]


def copies(nbytes: float) -> int:
    return max(2, ceil(ROTATED / nbytes))


def random_weights(rows: int, columns: int) -> list[Int4Weight]:
    """Enough of them; the first is packed, the others have random words."""
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device="cuda")
    scales = torch.rand(columns // 128, rows, device="cuda").add(0.1).mul(0.02).bfloat16()
    weight = pack(codes, scales)
    low, high = -(2**31), 2**31 - 1
    others = [
        weight._replace(
            words=torch.randint(low, high, weight.words.shape, dtype=torch.int32, device="cuda"),
            scales=weight.scales.clone(),
            arrivals=weight.arrivals.clone(),
        )
        for _ in range(copies(rows * columns / 2) - 1)
    ]
    return [weight, *others]


def relative_error(x: torch.Tensor, weight: Int4Weight, expected: torch.Tensor, config: Config | None) -> float:
    out = torch.full((len(x), weight.rows), torch.nan, dtype=torch.bfloat16, device="cuda")
    if config is None:
        out = multiply(x, weight, None)
    else:
        linear(x, weight, out, config)
    return float((out.double() - expected).norm() / expected.norm())


def measure(name: str, rates: float) -> list[dict[str, Any]]:
    """Every number of tokens of one shape."""
    height, columns = SHAPES[name]
    weights = random_weights(height, columns)
    exact = dequantize_int4(weights[0], torch.float32).double()
    matrices = [torch.randn(height, columns, device="cuda").bfloat16() for _ in range(copies(2 * height * columns))]
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, device="cuda").bfloat16()
        cublas = microseconds([partial(torch.mm, x, m.T) for m in matrices])
        expected = x.double() @ exact.T
        chosen = choose(tokens, height, columns)
        times: dict[Config | None, float] = {}
        for config in {chosen, None, *(configurations(tokens, height, columns) if tokens <= 256 else ())}:
            off = relative_error(x, weights[0], expected, config)
            if not off < (2e-3 if config is not None else 3e-3):
                print(f"WRONG {name} {tokens} {config}: {off:.2e}", file=sys.stderr)
                continue
            times[config] = microseconds([partial(multiply, x, w, config) for w in weights])
        rows.append(row(name, tokens, cublas, times, chosen, rates))
        if tokens in (1, 16, 64, 256):
            ranked = sorted(times, key=times.__getitem__)[:8]
            print("   ", "; ".join(f"{label(c)} {times[c]:.1f}" for c in ranked), file=sys.stderr)
    return rows


def row(
    name: str, tokens: int, cublas: float, times: dict[Config | None, float], chosen: Config | None, rates: float
) -> dict[str, Any]:
    height, columns = SHAPES[name]
    nbytes = height * columns * (0.5 + 4 / 128) + 2 * tokens * (height + columns)
    floor = max(nbytes / rates, 2 * tokens * height * columns / TFLOPS) * 1e6
    best = min(times, key=times.__getitem__)
    ours = times.get(chosen, float("nan"))
    result = {
        "shape": name, "N": height, "K": columns, "M": tokens, "cublas_us": f"{cublas:.1f}",
        "chosen_us": f"{ours:.1f}", "best_us": f"{times[best]:.1f}", "floor_us": f"{floor:.1f}",
        "chosen_speedup": f"{cublas / ours:.2f}", "best_speedup": f"{cublas / times[best]:.2f}",
        "chosen": label(chosen), "best": label(best),
    }  # fmt: skip
    print(*result.values(), file=sys.stderr, flush=True)
    return result


def multiply(x: torch.Tensor, weight: Int4Weight, config: Config | None) -> torch.Tensor:
    """By a configuration; without one, by the path of many tokens."""
    return linear(x, weight, config=config) if config else torch.mm(x, dequantize(weight).T)


def label(config: Config | None) -> str:
    return "/".join(map(str, config)) if config else "dequantize"


def summary(rows: list[dict[str, Any]]) -> None:
    """Geometric means of the speedups over cuBLAS."""
    kinds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        size = "large" if 2 * row["N"] * row["K"] > LARGE else "small"
        regime = "M <= 16" if row["M"] <= 16 else "M >= 1024" if row["M"] >= 1024 else f"M = {row['M']}"
        kinds[f"{size} {regime}"].append((float(row["chosen_speedup"]), float(row["best_speedup"])))
    for kind, pairs in sorted(kinds.items()):
        chosen, best = (statistics.geometric_mean(side) for side in zip(*pairs, strict=True))
        print(f"{kind}: chosen {chosen:.2f}, best {best:.2f} of cuBLAS' speed in BF16", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    options = parser.parse_args()
    rates, where = bandwidth(), measured_on()
    print(f"{where['GPU']}: {rates / 1e12:.2f} TB/s", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for name in options.shapes:
        measured = measure(name, rates)
        append(options.results, [row | where for row in measured])
        rows += measured
    summary(rows)


if __name__ == "__main__":
    main()
