"""Routed experts of a layer, FP8 by blocks and INT4 by groups of 128: the time of what follows the router's choice.

That is the sort of pairs, gate and up, h's quantization if there is one, and down; not the quantization of the layer's
input, which comes with its norm, nor the sum over a token's experts, which goes with the next norm. Experts are chosen
at random, by every call anew. The floor is that of the experts that were chosen; three launches that wait for each
other take some 5 µs beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from dsv2quant.arch.config import ModelConfig
from dsv2quant.bench.device import FLOOR, Limits, Measured, Row, Section, frobenius, microseconds, random_bf16
from dsv2quant.bench.fp8 import random_codes
from dsv2quant.bench.model import MODELS, configuration
from dsv2quant.formats.e4m3 import BLOCK
from dsv2quant.kernels import fp8_experts, int4_experts, int4_layout, reference
from dsv2quant.kernels.activations import quantize_activation
from dsv2quant.kernels.fp8_layout import Fp8Experts
from dsv2quant.kernels.int4_layout import Int4Experts
from dsv2quant.kernels.routing import Routes, choose_block, sort_pairs

TOKENS = (1, 4, 8, 16, 64, 1024, 4096)
DECODED = 64  # tokens, at most: more are a prompt's
AIM = "floor + 5 µs"
LIMIT = 2e-3  # BF16's own rounding is 1.7e-3
GROUP = 128
CALLS = 8  # of one graph, over two stacks in turn


class Format(NamedTuple):
    """How experts of a format are made and run; `given` is x as its kernels take it."""

    stack: Callable[[ModelConfig], Fp8Experts | Int4Experts]
    given: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    run: Callable[..., torch.Tensor]  # of given, weights, routes, stack
    error: Callable[..., float]  # of given, weights, chosen, routes, stack
    width: int  # bits of products' operands


def fp8_weights(c: ModelConfig) -> Fp8Experts:
    E, H, I = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size  # noqa: E741

    def scales(*shape: int) -> torch.Tensor:
        blocks = [math.ceil(n / BLOCK) for n in shape[-2:]]
        return torch.rand(*shape[:-2], *blocks, device="cuda") * 2e-4 + 1e-5

    gate_up = torch.stack([random_codes(2 * I, H).view(torch.uint8) for _ in range(E)]).view(E, 2, I, H)
    down = torch.stack([random_codes(H, I).view(torch.uint8) for _ in range(E)])
    kind = torch.float8_e4m3fn
    return Fp8Experts(gate_up.view(kind), scales(E, 2, I, H), down.view(kind), scales(E, H, I))


def fp8_run(
    codes: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor, routes: Routes, stack: Fp8Experts
) -> torch.Tensor:
    return fp8_experts.experts_of_codes(codes, scales, weights, routes, stack, "group128")


def fp8_error(
    codes: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, routes: Routes,
    stack: Fp8Experts,
) -> float:  # fmt: skip
    """The largest of gate and up's before quantization, of down's after it and of both together, as they are run, by
    these; infinite where quantized in one launch are other bytes than in two."""
    k = chosen.shape[1]
    whole = reference.sort_pairs(chosen, len(stack.down), chosen.numel())
    wide = fp8_experts.gate_up(codes, scales, routes, k, stack)
    h, h_scales = fp8_experts.gate_up_codes(codes, scales, routes, k, stack, "group128")
    if not torch.equal(quantize_activation(wide, "group128")[0].view(torch.uint8), h.view(torch.uint8)):
        return math.inf
    out = fp8_experts.down(h, h_scales, weights, routes, stack)
    return max(
        frobenius(wide, reference.gate_up(codes, scales, whole, k, stack).double()),
        frobenius(out, reference.down(h, h_scales, weights, whole, stack).double()),
        frobenius(fp8_run(codes, scales, weights, routes, stack), out.double()),
    )


def int4_weights(c: ModelConfig) -> Int4Experts:
    stack = int4_layout.empty(c.n_routed_experts, c.hidden_size, c.moe_intermediate_size, GROUP)
    for part in (stack.gate_up, stack.down):
        part.words.random_(-(2**31), 2**31 - 1)
        part.scales.uniform_(0.002, 0.02)
    return stack


def int4_run(x: torch.Tensor, weights: torch.Tensor, routes: Routes, stack: Int4Experts) -> torch.Tensor:
    return int4_experts.experts(x, weights, routes, stack)


def int4_error(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, routes: Routes, stack: Int4Experts
) -> float:
    k = chosen.shape[1]
    whole = reference.sort_pairs(chosen, len(stack.down.words), chosen.numel())
    h = int4_experts.gate_up(x, routes, k, stack)
    out = int4_experts.down(h, weights, routes, stack).unflatten(1, (k, -1)).sum(2)
    return max(
        frobenius(h, reference.gate_up_int4(x, whole, k, stack).double()),
        frobenius(out, reference.down_int4(h, weights, whole, stack).double()),
        frobenius(int4_run(x, weights, routes, stack).unflatten(1, (k, -1)).sum(2), out.double()),
    )


FORMATS = {
    "fp8": Format(fp8_weights, partial(quantize_activation, granularity="group128"), fp8_run, fp8_error, 8),
    "int4": Format(int4_weights, lambda x: (x,), int4_run, int4_error, 16),
}


def measure(limits: Limits) -> Iterator[Measured]:
    for name, form in FORMATS.items():
        for model in MODELS:
            config = configuration(model)
            stacks = [form.stack(config) for _ in range(2)]
            for tokens in TOKENS:
                yield measure_layer(limits, name, model, config, stacks, tokens)
            del stacks


def measure_layer(
    limits: Limits, name: str, model: str, config: ModelConfig, stacks: list[Fp8Experts | Int4Experts], tokens: int
) -> Measured:
    form, (E, k) = FORMATS[name], (config.n_routed_experts, config.num_experts_per_tok)
    H, I = config.hidden_size, config.moe_intermediate_size  # noqa: E741
    block = choose_block(tokens, k, E, wide=True)
    x = random_bf16(tokens, H)
    weights = torch.rand(tokens, k, device="cuda")
    choices = [torch.rand(tokens, E, device="cuda").topk(k).indices for _ in range(CALLS)]
    given = form.given(x)

    def layer(stack: Fp8Experts | Int4Experts, chosen: torch.Tensor) -> torch.Tensor:
        return form.run(*given, weights, sort_pairs(chosen, E, block), stack)

    error = form.error(*given, weights, choices[0], sort_pairs(choices[0], E, block), stacks[0])
    taken = microseconds([partial(layer, stacks[i % 2], chosen) for i, chosen in enumerate(choices)])
    active = sum(len(chosen.unique()) for chosen in choices) / CALLS
    flop = 2 * tokens * k * 3 * H * I
    floor = limits.floor(active * bytes_of(stacks[0]) / E, flop * form.width / 16)
    peers = {AIM: floor + 5} if tokens <= DECODED else {}
    speed = f"{active:.0f} experts" if tokens <= DECODED else f"{flop / taken / 1e6:.0f} TFLOP/s"
    shape = f"{E}×3×{H}×{I}"
    return Measured("experts", model, f"{name} experts", shape, tokens, error, LIMIT, taken, floor, peers, speed)


def bytes_of(stack: Fp8Experts | Int4Experts) -> int:
    """Weights and scales."""
    if isinstance(stack, Fp8Experts):
        return sum(part.nbytes for part in stack)
    return sum(part.words.nbytes + part.scales.nbytes for part in (stack.gate_up, stack.down))


SECTION = Section(
    measure,
    (AIM,),
    (
        Row("routed experts, FP8 blocks, M <= 64", AIM, lambda m: m.what == "fp8 experts" and m.tokens <= DECODED),
        Row("routed experts, FP8 blocks, M >= 1024", FLOOR, lambda m: m.what == "fp8 experts" and m.tokens > DECODED),
        Row("routed experts, INT4, M <= 64", AIM, lambda m: m.what == "int4 experts" and m.tokens <= DECODED),
        Row("routed experts, INT4, M >= 1024", FLOOR, lambda m: m.what == "int4 experts" and m.tokens > DECODED),
    ),
)
