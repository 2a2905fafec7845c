"""GGUF weights with BF16 activations on one GPU, in DeepSeek-V2's shapes: ours, cuBLAS on BF16, and the floor.

    python benchmarks/kernels_gguf.py --results benchmarks/results/kernels_gguf.csv

Each result is checked against float64 before it is timed. Times are of CUDA graphs that run over copies of the weight,
at least 200 MB of them, so that none is in the cache: the median of 7 replays, per call. The floor is the bytes of the
call, the weight's as a file holds them, and its multiplications, at the rates that this GPU reaches. `chosen` is the
library's own configuration, `best` the fastest of a few; --compile only compiles them.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from convert import append

from dsv2quant.bench.device import Limits, copies, limits, measured_on, microseconds
from dsv2quant.kernels.gguf_experts import experts_product
from dsv2quant.kernels.gguf_gemm import Config, choose, dequantize, linear
from dsv2quant.kernels.gguf_layout import SPECS, GgufWeight, from_blocks
from dsv2quant.kernels.routing import choose_block, sort_pairs

SHAPES = {"q_b": (24576, 1536), "down": (5120, 12288), "lite_o": (2048, 2048)}
TOKENS = (1, 16, 64, 1024)
EXPERTS = {"lite_gate": (64, 1408, 2048, 6), "lite_down": (64, 2048, 1408, 6)}  # experts, N, K, experts of a token


def random_weights(name: str, shape: tuple[int, ...], count: int) -> list[GgufWeight]:
    """Random codes under small scales."""
    spec = SPECS[name]
    blocks = torch.randint(0, 256, (*shape[:-1], shape[-1] // spec.values, spec.bytes), device="cuda").to(torch.uint8)
    for at in spec.halves:
        scale = torch.rand(blocks.shape[:-1], device="cuda").add(0.5).mul(1e-3).half()
        blocks[..., at : at + 2] = scale.unsqueeze(-1).view(torch.uint8)
    weight = from_blocks(name, blocks.flatten(-2), shape[-1])
    low, high = -(2**31), 2**31 - 1
    others = [
        weight._replace(
            words=torch.randint(low, high, weight.words.shape, dtype=torch.int32, device="cuda"),
            steps=weight.steps.clone(),
            multiples=None if weight.multiples is None else weight.multiples.clone(),
            lows=None if weight.lows is None else weight.lows.clone(),
            arrivals=weight.arrivals.clone(),
        )
        for _ in range(count - 1)
    ]
    return [weight, *others]


def configurations(tokens: int, rows: int, columns: int, group: int) -> list[Config]:
    if tokens > 128:
        return []
    if tokens <= 8 and group == 32:
        tiles = [(64, 8, 4, 3), (64, 8, 4, 5), (128, 8, 4, 3), (128, 8, 4, 5), (128, 8, 8, 4), (64, 16, 4, 4)]
    elif tokens <= 16:
        tiles = [(64, 16, 4, 3), (64, 16, 4, 5), (128, 16, 4, 3), (128, 16, 8, 4)]
    else:
        tiles = [(64, 64, 4, 3), (128, 64, 8, 3), (64, 32, 4, 3)]
    return [
        Config(high, wide, split, warps, stages)
        for high, wide, warps, stages in tiles
        for split in (1, 2, 4, 8)
        if 100 <= ceil(rows / high) * split <= 132 * 8 and split * 256 <= columns
    ]


def measure(name: str, shape: str, rates: Limits | None) -> list[dict[str, Any]]:
    """Every number of tokens of one type and shape."""
    (height, columns), spec = SHAPES[shape], SPECS[name]
    nbytes = height * columns // spec.values * spec.bytes
    weights = random_weights(name, (height, columns), copies(nbytes) if rates else 1)
    exact = dequantize(weights[0], torch.float32).double()
    matrices = [torch.randn(height, columns, device="cuda").bfloat16() for _ in range(copies(2 * height * columns))]
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, device="cuda").bfloat16()
        chosen = choose(tokens, height, columns, spec.group)
        expected = x.double() @ exact.T
        times: dict[Config | None, float] = {}
        for config in {chosen, *configurations(tokens, height, columns, spec.group)}:
            got = linear(x, weights[0], config=config)
            off = float((got - expected).norm() / expected.norm())
            if not off < (2e-3 if config else 3e-3):
                print(f"WRONG {name} {shape} {tokens} {config}: {off:.2e}")
            elif rates:
                times[config] = microseconds([partial(linear, x, w, config=config) for w in weights])
        if not rates:
            continue
        cublas = microseconds([partial(torch.mm, x, m.T) for m in matrices])
        floor = rates.floor(nbytes + 2 * tokens * (height + columns), 2 * tokens * height * columns)
        best = min(times, key=times.__getitem__)
        rows.append(
            {
                "type": name, "shape": shape, "N": height, "K": columns, "M": tokens, "cublas_us": f"{cublas:.1f}",
                "chosen_us": f"{times[chosen]:.1f}", "best_us": f"{times[best]:.1f}", "floor_us": f"{floor:.1f}",
                "of_floor": f"{floor / times[chosen]:.2f}", "chosen": label(chosen), "best": label(best),
            }
        )  # fmt: skip
        print(*rows[-1].values(), flush=True)
    return rows


def measure_experts(name: str, shape: str, rates: Limits | None) -> None:
    """Decoding and prefilling through a stack of experts, uniformly chosen."""
    (experts, height, columns, k), spec = EXPERTS[shape], SPECS[name]
    nbytes = height * columns // spec.values * spec.bytes
    stacks = random_weights(name, (experts, height, columns), 2)
    for tokens in (1, 8, 64, 1024):
        x = torch.randn(tokens, columns, device="cuda").bfloat16()
        choices = [torch.rand(tokens, experts, device="cuda").topk(k).indices for _ in range(16)]
        active = sum(len(chosen.unique()) for chosen in choices) / len(choices)
        floor = None
        if rates:
            read = active * nbytes + 2 * tokens * (columns + k * height)
            floor = rates.floor(read, 2 * tokens * k * height * columns)
        for block in {choose_block(tokens, k, experts), 8 if tokens <= 8 else 64}:
            routes = [sort_pairs(chosen, experts, block) for chosen in choices]
            calls = [partial(experts_product, x, some, k, stacks[i % 2]) for i, some in enumerate(routes)]
            calls[0]()
            if floor:
                time = microseconds(calls)
                print(f"{name} {shape} {tokens} tokens/{block}: {time:.1f} floor {floor:.1f} {floor / time:.2f}")


def label(config: Config | None) -> str:
    return "/".join(map(str, config)) if config else "dequantize"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--types", nargs="*", default=["Q8_0", "Q4_K", "Q6_K"])
    parser.add_argument("--shapes", nargs="*", default=[*SHAPES, *EXPERTS])
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    rates, where = (None, {}) if options.compile else (limits(), measured_on())
    if rates:
        print(where["GPU"], rates, file=sys.stderr)
    for name in options.types:
        for shape in options.shapes:
            if shape in SHAPES:
                append(options.results, [row | where for row in measure(name, shape, rates)])
            elif EXPERTS[shape][2] % SPECS[name].values == 0:
                measure_experts(name, shape, rates)


if __name__ == "__main__":
    main()
