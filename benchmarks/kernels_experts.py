"""Routed experts' kernels on a CUDA device: µs against the floor, for DeepSeek-V2-Lite's and V2's layers.

    python benchmarks/kernels_experts.py --results benchmarks/results/kernels_experts.csv --sweep

Times are CUDA-graph replays, the median of 7. Calls rotate over copies of a stack, each with a random choice of experts
of its own, so that at least 300 MB are read before a stack's turn comes again: L2 holds 50 to 60 MB. Timed is what
follows the quantization of a layer's input: the sort of pairs, gate_up, quantization of its result, down. `floor` is
the active experts' bytes at the rate at which a plain reduction read in this run, or FLOP at 1,580 TFLOP/s if those
take longer; speed is (floor + 5 µs) / ours. `--sweep` also times other shares of work, in order of their times.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from convert import append
from device import bandwidth, measured_on, microseconds

from dsv2quant.kernels import fp8_experts, routing
from dsv2quant.kernels.act_quant import quantize_activation
from dsv2quant.kernels.fp8_experts import Fp8Experts, Share
from dsv2quant.kernels.routing import Routes, choose_block, sort_pairs


class Layer(NamedTuple):
    k: int
    experts: int
    intermediate: int
    hidden: int
    groups: tuple[int, int]  # of experts: in all, and eligible


class Format(NamedTuple):
    """How a kind of weights is made and run; a share of work that is None is the kernels' choice."""

    stack: Callable[[Layer], Any]  # a tuple of tensors, each with the experts first
    inputs: Callable[[torch.Tensor], tuple]  # what gate_up takes of x, bfloat16 [tokens, hidden]
    gate_up: Callable[..., tuple]  # (inputs, routes, k, stack, share) → what down takes first
    down: Callable[..., torch.Tensor]  # (h, weights, routes, stack, share)
    shares: Callable[[int], tuple[list, list]]  # of gate_up and of down to sweep, by block


LAYERS = {
    "V2-Lite": Layer(6, 64, 1408, 2048, (1, 1)),
    "V2": Layer(6, 160, 1536, 5120, (8, 3)),
}
DECODE, PREFILL = (1, 4, 8, 16, 64), (1024, 4096)
ROTATED = 300e6  # bytes between two turns of a stack
PEAK = 1580e12


def fp8_stack(layer: Layer) -> Fp8Experts:
    _, experts, intermediate, hidden, _ = layer

    def random(*shape: int) -> torch.Tensor:
        codes = torch.empty(experts, *shape, dtype=torch.float8_e4m3fn, device="cuda")
        for expert in codes:
            expert.copy_((torch.randn(shape, device="cuda") * 60).clamp(-448, 448))
        return codes

    def scales(*shape: int) -> torch.Tensor:
        return torch.rand(experts, *shape, device="cuda") * 2e-4 + 1e-4

    wide, narrow = math.ceil(hidden / 128), math.ceil(intermediate / 128)
    gate_up = random(2, intermediate, hidden), scales(2, narrow, wide)
    return Fp8Experts(*gate_up, random(hidden, intermediate), scales(wide, narrow))


def fp8_gate_up(inputs: tuple, routes: Routes, k: int, stack: Fp8Experts, share: Share | None) -> tuple:
    """With the quantization of its result."""
    if (share or fp8_experts.choose_gate_up(routes.block)).rows == 256:
        return fp8_experts.gate_up_quantized(*inputs, routes, k, stack, share=share)
    return quantize_activation(fp8_experts.gate_up(*inputs, routes, k, stack, share=share), "group128")


def fp8_shares(block: int) -> tuple[list[Share], list[Share]]:
    if block <= 32:
        wide = [Share(256, stages, warps) for stages in (3, 6) for warps in (4, 8)]
        return (
            [*wide, *(Share(128, stages, 4) for stages in (4, 8)), Share(128, 4, 8), Share(64, 6, 4), Share(64, 12, 4)],
            [*(Share(64, stages, 4) for stages in (4, 6, 10)), Share(128, 4, 4), Share(128, 6, 4), Share(128, 4, 8)],
        )
    many = [Share(128, stages, block // 16) for stages in (3, 4)]
    return [*many, Share(256, 3, 8)], many


FORMATS = {
    "fp8": Format(
        fp8_stack,
        partial(quantize_activation, granularity="group128"),
        fp8_gate_up,
        lambda h, weights, routes, stack, share: fp8_experts.down(*h, weights, routes, stack, share),
        fp8_shares,
    ),
}


class Call(NamedTuple):
    stack: Any
    chosen: torch.Tensor
    weights: torch.Tensor
    inputs: tuple
    routes: Routes


def calls(tokens: int, layer: Layer, form: Format, stacks: list) -> list[Call]:
    """Two turns of each stack."""
    made = []
    for stack in stacks * 2:
        chosen = torch.rand(tokens, layer.experts, device="cuda").topk(layer.k).indices
        x = torch.randn(tokens, layer.hidden, device="cuda").bfloat16()
        block = choose_block(tokens, layer.k, layer.experts)
        weights = torch.rand(tokens, layer.k, device="cuda")
        made.append(Call(stack, chosen, weights, form.inputs(x), sort_pairs(chosen, layer.experts, block)))
    return made


def measure(
    tokens: int, layer: Layer, form: Format, stacks: list, rate: float, sweep: bool
) -> tuple[dict[str, float], list[str]]:
    """µs by what was timed, and the fastest shares."""
    given = calls(tokens, layer, form, stacks)
    block = given[0].routes.block

    def sort(call: Call) -> Routes:
        return sort_pairs(call.chosen, layer.experts, block)

    def whole(call: Call) -> torch.Tensor:
        routes = sort(call)
        h = form.gate_up(call.inputs, routes, layer.k, call.stack, None)
        return form.down(h, call.weights, routes, call.stack, None)

    def gate_up(call: Call, share: Any = None) -> tuple:
        return form.gate_up(call.inputs, call.routes, layer.k, call.stack, share)

    h = gate_up(given[0])

    def down(call: Call, share: Any = None) -> torch.Tensor:
        return form.down(h, call.weights, call.routes, call.stack, share)

    def timed(part: Callable[..., object], *arguments: Any) -> float:
        return microseconds([partial(part, call, *arguments) for call in given])

    active = statistics.mean(len(call.chosen.unique()) for call in given)
    expert = sum(part.nbytes for part in given[0].stack) / layer.experts
    flop = 2 * tokens * layer.k * 3 * layer.hidden * layer.intermediate
    found = {"ours": timed(whole), "sort": timed(sort), "gate_up": timed(gate_up), "down": timed(down)}
    logits = torch.randn(tokens, layer.experts, device="cuda")
    found["route and sort"] = microseconds(
        [lambda: routing.route_and_sort(logits, *layer.groups, layer.k, False, 1.0)] * 20
    )
    pairs = down(given[0])
    found["combine"] = microseconds([lambda: routing.combine(pairs)] * 20)
    found |= {"active": active, "floor": max(active * expert / rate, flop / PEAK) * 1e6}
    best = []
    if sweep:
        for name, part, shares in zip(("gate_up", "down"), (gate_up, down), form.shares(block), strict=True):
            taken = {share: timed(part, share) for share in shares}
            best += [f"{name} {taken[share]:.1f} {tuple(share)}" for share in sorted(taken, key=taken.__getitem__)]
    return found, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    rate, where = bandwidth(), measured_on()
    print(f"{where}; a reduction reads {rate / 1e12:.2f} TB/s")
    rows = []
    for form_name, form in FORMATS.items():
        speeds = []
        for name, layer in LAYERS.items():
            stack = form.stack(layer)
            least = sum(part.nbytes for part in stack) / layer.experts * layer.k  # what one token reads
            copies = math.ceil(ROTATED / least) + 1
            stacks = [stack, *(type(stack)(*(part.clone() for part in stack)) for _ in range(copies - 1))]
            for tokens in DECODE + PREFILL:
                turns = stacks if tokens in DECODE else stacks[:2]
                found, best = measure(tokens, layer, form, turns, rate, options.sweep)
                speed = (found["floor"] + 5) / found["ours"]
                print(f"{form_name} {name} {tokens}:", *(f"{what} {taken:.1f}" for what, taken in found.items()))
                print(f"    speed {speed:.2f}", *best, sep="; ")
                columns = {what: f"{taken:.2f}" for what, taken in found.items()}
                rows.append({"format": form_name, "layer": name, "tokens": tokens} | columns | where)
                if tokens in DECODE:
                    speeds.append(speed)
            del stack, stacks
        print(
            f"{form_name}: speed of {DECODE} tokens: {statistics.geometric_mean(speeds):.2f} (worst {min(speeds):.2f})"
        )
    append(options.results, rows)


if __name__ == "__main__":
    main()
