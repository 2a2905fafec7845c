"""GGUF weights with BF16 activations: cuBLAS' product in BF16 and the floor beside ours; of experts, the floor.

The floor has a weight's bytes as a file holds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from dsv2quant.arch.config import ModelConfig
from dsv2quant.bench.device import (
    FLOOR,
    Limits,
    Measured,
    Row,
    Section,
    copies,
    frobenius,
    microseconds,
    products,
    random_tokens,
)
from dsv2quant.bench.model import MODELS, configuration, matrices
from dsv2quant.kernels.gguf_experts import experts_product
from dsv2quant.kernels.gguf_gemm import Config, choose, dequantize, linear
from dsv2quant.kernels.gguf_layout import SPECS, GgufWeight, from_blocks
from dsv2quant.kernels.reference_experts import experts_product as experts_twin
from dsv2quant.kernels.routing import choose_block, sort_pairs

TYPES = ("Q8_0", "Q4_K", "Q6_K")
TOKENS = (1, 16, 64, 1024)
ROUTES = 16  # different choices of experts, which calls rotate through
EXACT, ROUNDED = 2e-3, 3e-3  # limits of the error, where weights are integers and where they are rounded to BF16
Share = Config | None


def weights_of(model: str, name: str) -> dict[str, tuple[int, int]]:
    """Those whose columns are whole blocks of a type."""
    found = matrices(configuration(model))
    return {what: shape for what, shape in found.items() if shape[1] % SPECS[name].values == 0}


def random_weights(name: str, shape: tuple[int, ...], count: int | None = None) -> list[GgufWeight]:
    """So many matrices or stacks, or as many as calls rotate through; the first is packed, the others have random
    words."""
    spec = SPECS[name]
    blocks = torch.randint(
        0, 256, (*shape[:-1], shape[-1] // spec.values, spec.bytes), dtype=torch.uint8, device="cuda"
    )
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
        for _ in range((count or copies(nbytes_of(name, shape))) - 1)
    ]
    return [weight, *others]


def nbytes_of(name: str, shape: tuple[int, ...]) -> int:
    """Of a matrix or stack in a file."""
    return math.prod(shape) // SPECS[name].values * SPECS[name].bytes


def calls(weights: list[GgufWeight], x: torch.Tensor, share: Share) -> list[Callable[[], torch.Tensor]]:
    return products(linear, dequantize, weights, x, share)


def measure(limits: Limits) -> Iterator[Measured]:
    for model in MODELS:
        for name in TYPES:
            for what, shape in weights_of(model, name).items():
                yield from measure_product(limits, model, name, what, shape)
            yield from measure_experts(limits, model, name, configuration(model))


def measure_product(limits: Limits, model: str, name: str, what: str, shape: tuple[int, int]) -> Iterator[Measured]:
    rows, columns = shape
    weights = random_weights(name, shape)
    exact = dequantize(weights[0], torch.float32).double()
    wide = [torch.randn(shape, device="cuda").bfloat16() for _ in range(copies(2 * rows * columns))]
    for tokens in TOKENS:
        share = choose(tokens, rows, columns, SPECS[name].group)
        x = random_tokens(tokens, columns)
        ours = calls(weights, x, share)
        error = frobenius(ours[0](), x.double() @ exact.T)
        nbytes = nbytes_of(name, shape) + 2 * tokens * (rows + columns)
        peers = {"cublas bf16": microseconds([partial(torch.mm, x, w.T) for w in wide])}
        yield Measured(
            "gguf", model, f"{name} {what}", f"{rows}×{columns}", tokens, error, EXACT if share else ROUNDED,
            microseconds(ours), limits.floor(nbytes, 2 * tokens * rows * columns), peers, label(share),
        )  # fmt: skip


def measure_experts(limits: Limits, model: str, name: str, config: ModelConfig) -> Iterator[Measured]:
    """The gate or up product of a layer's pairs, of experts that are as likely as each other: others in each call, so
    that few tokens do not find theirs in the cache."""
    experts, k = config.n_routed_experts, config.num_experts_per_tok
    rows, columns = shape = (config.moe_intermediate_size, config.hidden_size)
    stacks = random_weights(name, (experts, *shape), 2)
    for tokens in TOKENS:
        x = random_tokens(tokens, columns)
        choices = [torch.rand(tokens, experts, device="cuda").topk(k).indices for _ in range(ROUTES)]
        active = sum(len(chosen.unique()) for chosen in choices) / ROUTES
        read = active * nbytes_of(name, shape) + 2 * tokens * (columns + k * rows)
        routes = [sort_pairs(chosen, experts, choose_block(tokens, k, experts)) for chosen in choices]
        ours = [partial(experts_product, x, some, k, stacks[i % 2]) for i, some in enumerate(routes)]
        error = frobenius(ours[0](), experts_twin(x.double(), routes[0], k, stacks[0]))
        floor = limits.floor(read, 2 * tokens * k * rows * columns)
        yield Measured(
            "gguf", model, f"{name} experts", f"{rows}×{columns}", tokens, error, EXACT, microseconds(ours), floor, {},
            f"tiles of {routes[0].block}",
        )  # fmt: skip


def label(share: Share) -> str:
    return " ".join(map(str, share)) if share else "dequantize"


def _product(m: Measured, name: str, least: int, most: int) -> bool:
    return m.operation == "gguf" and bool(m.peers) and m.what.startswith(name) and least <= m.tokens <= most


def _experts(m: Measured, least: int, most: int) -> bool:
    return m.operation == "gguf" and not m.peers and least <= m.tokens <= most


SECTION = Section(
    measure,
    ("cublas bf16",),
    (
        Row("Q8_0 GEMM, M <= 16", "cublas bf16", lambda m: _product(m, "Q8_0", 1, 16)),
        Row("Q4_K GEMM, M <= 16", "cublas bf16", lambda m: _product(m, "Q4_K", 1, 16)),
        Row("Q6_K GEMM, M <= 16", "cublas bf16", lambda m: _product(m, "Q6_K", 1, 16)),
        Row("GGUF GEMM, M = 64", "cublas bf16", lambda m: _product(m, "", 64, 64)),
        Row("GGUF GEMM, M >= 1024", "cublas bf16", lambda m: _product(m, "", 1024, 4096)),
        Row("GGUF experts, M <= 64", FLOOR, lambda m: _experts(m, 1, 64)),
        Row("GGUF experts, M >= 1024", FLOOR, lambda m: _experts(m, 1024, 4096)),
    ),
)
