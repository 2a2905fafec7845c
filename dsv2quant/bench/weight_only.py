"""INT4 weights in groups of 128, and GGUF's, with BF16 activations: cuBLAS' product in BF16 and the floor beside ours;
of GGUF experts, the floor. A floor has a GGUF weight's bytes as a file holds them."""

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
    random_bf16,
    rotated,
)
from dsv2quant.bench.model import MODELS, configuration, matrices
from dsv2quant.kernels import gguf_gemm, int4_gemm, int4_layout, launch
from dsv2quant.kernels.gguf_experts import experts_product
from dsv2quant.kernels.gguf_layout import SPECS, GgufWeight, from_blocks
from dsv2quant.kernels.int4_held import Held
from dsv2quant.kernels.int4_layout import Int4Weight, pack
from dsv2quant.kernels.launch import MULTIPROCESSORS
from dsv2quant.kernels.reference import dequantize_int4
from dsv2quant.kernels.reference import experts_product as experts_twin
from dsv2quant.kernels.routing import choose_block, sort_pairs

INT4_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
GROUP = 128
LARGE = 20e6  # bytes in BF16: smaller weights are bound by latency
EXACT, ROUNDED = 2e-3, 3e-3  # limits of the error, where weights are integers and where they are rounded to BF16
Int4Share = int4_gemm.Share | None
GGUF_TYPES = ("Q8_0", "Q4_K", "Q6_K")
GGUF_TOKENS = (1, 16, 64, 1024)
GGUF_ROUTES = 16  # different choices of experts, which calls rotate through


def int4_shapes(model: str) -> dict[str, tuple[int, int]]:
    """Those whose columns are whole groups."""
    found = matrices(configuration(model))
    return {what: shape for what, shape in found.items() if shape[1] % GROUP == 0}


def int4_weights(rows: int, columns: int, count: int | None = None) -> list[Int4Weight]:
    """So many, or as many as calls rotate through; the first is packed, the others have random words."""
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device="cuda")
    scales = torch.rand(columns // GROUP, rows, device="cuda").add(0.1).mul(0.02).bfloat16()
    return rotated(pack(codes, scales), count or copies(rows * columns / 2))


def int4_calls(weights: list[Int4Weight], x: torch.Tensor, share: Int4Share) -> list[Callable[[], torch.Tensor]]:
    return products(int4_gemm.linear, int4_gemm.dequantize, weights, x, share)


def measure_int4(limits: Limits) -> Iterator[Measured]:
    for model in MODELS:
        for what, (rows, columns) in int4_shapes(model).items():
            weights = int4_weights(rows, columns)
            exact = dequantize_int4(weights[0], torch.float32).double()
            wide = [torch.randn(rows, columns, device="cuda").bfloat16() for _ in range(copies(2 * rows * columns))]
            for tokens in INT4_TOKENS:
                share = int4_gemm.choose(tokens, rows, columns)
                x = random_bf16(tokens, columns)
                ours = int4_calls(weights, x, share)
                error = frobenius(ours[0](), x.double() @ exact.T)
                nbytes = rows * columns * (0.5 + 4 / GROUP) + 2 * tokens * (rows + columns)
                label = " ".join(map(str, int4_row(share)))
                peers = {"cublas bf16": microseconds([partial(torch.mm, x, w.T) for w in wide])}
                yield Measured(
                    "int4", model, what, f"{rows}×{columns}", tokens, error, EXACT if share else ROUNDED,
                    microseconds(ours), limits.floor(nbytes, 2 * tokens * rows * columns), peers, label,
                )  # fmt: skip


def int4_row(share: Int4Share) -> list[str | int]:
    """As tables have it."""
    return ["dequantize"] if share is None else launch.table_row(int4_gemm.KINDS, share)


def int4_candidates(tokens: int, rows: int, columns: int) -> list[Int4Share]:
    """Configurations worth trying: between one and eight programs to a multiprocessor, where the shape allows."""
    if tokens > 256:
        return [None]
    if tokens <= 16:
        tiles = [(64, 16, 4, 4), (64, 16, 4, 6), (128, 16, 4, 4), (128, 16, 8, 4), (128, 16, 4, 6), (256, 16, 8, 4)]
    elif tokens <= 32:
        tiles = [(64, 32, 4, 3), (64, 32, 4, 4), (128, 32, 4, 4), (128, 32, 8, 4), (256, 32, 8, 3)]
    elif tokens <= 64:
        tiles = [(64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 8, 3), (128, 64, 8, 4), (256, 64, 8, 3)]
    else:
        tiles = [(64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3), (256, 64, 8, 3)]
    found = []
    for high, wide, warps, stages in tiles:
        for split in (1, 2, 4, 8, 16):
            programs = math.ceil(rows / high) * math.ceil(tokens / wide) * split
            if split == 1 or (programs <= MULTIPROCESSORS * 8 and split <= columns // 256 and tokens <= 64):
                found.append((programs, int4_gemm.Config(high, wide, split, warps, stages)))
    enough = min(120, max(programs for programs, _ in found))
    kept: list[Int4Share] = [config for programs, config in found if programs >= enough]
    return kept + (int4_helds(rows, columns) if tokens <= 16 else []) + [None] * (tokens > 64)


def int4_helds(rows: int, columns: int) -> list[Held]:
    """Those whose programs have as much to do each, 512 columns or more."""
    steps, blocks = math.ceil(columns / GROUP), math.ceil(rows / int4_layout.ROWS)
    splits = [s for s in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16) if 240 <= blocks * s <= 1300 and steps >= 4 * s]
    return [Held(split, held) for split in splits for held in (4, 5, 6, 8) if steps % (split * held) == 0]


def _int4_product(m: Measured, least: int, most: int) -> bool:
    return m.operation == "int4" and least <= m.tokens <= most


def _large(m: Measured) -> bool:
    rows, columns = map(int, m.shape.split("×"))
    return 2 * rows * columns > LARGE


INT4 = Section(measure_int4, ("cublas bf16",), (
    Row("W4A16 GEMM, M <= 16, V2 shapes over 20 MB (bf16)", "cublas bf16",
        lambda m: _int4_product(m, 1, 16) and m.model == "v2" and _large(m)),
    Row("W4A16 GEMM, M <= 16, other shapes", "cublas bf16",
        lambda m: _int4_product(m, 1, 16) and not (m.model == "v2" and _large(m))),
    Row("W4A16 GEMM, M = 64", "cublas bf16", lambda m: _int4_product(m, 64, 64)),
    Row("W4A16 GEMM, M = 256", "cublas bf16", lambda m: _int4_product(m, 256, 256)),
    Row("W4A16 GEMM, M >= 1024", "cublas bf16", lambda m: _int4_product(m, 1024, 4096)),
))  # fmt: skip


def gguf_shapes(model: str, name: str) -> dict[str, tuple[int, int]]:
    """Those whose columns are whole blocks of a type."""
    found = matrices(configuration(model))
    return {what: shape for what, shape in found.items() if shape[1] % SPECS[name].values == 0}


def gguf_weights(name: str, shape: tuple[int, ...], count: int | None = None) -> list[GgufWeight]:
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
    return rotated(weight, count or copies(gguf_nbytes(name, shape)))


def gguf_nbytes(name: str, shape: tuple[int, ...]) -> int:
    """Of a matrix or stack in a file."""
    return math.prod(shape) // SPECS[name].values * SPECS[name].bytes


def measure_gguf(limits: Limits) -> Iterator[Measured]:
    for model in MODELS:
        for name in GGUF_TYPES:
            for what, shape in gguf_shapes(model, name).items():
                yield from measure_gguf_product(limits, model, name, what, shape)
            yield from measure_gguf_experts(limits, model, name, configuration(model))


def measure_gguf_product(
    limits: Limits, model: str, name: str, what: str, shape: tuple[int, int]
) -> Iterator[Measured]:
    rows, columns = shape
    weights = gguf_weights(name, shape)
    exact = gguf_gemm.dequantize(weights[0], torch.float32).double()
    wide = [torch.randn(shape, device="cuda").bfloat16() for _ in range(copies(2 * rows * columns))]
    for tokens in GGUF_TOKENS:
        share = gguf_gemm.choose(tokens, rows, columns, SPECS[name].group)
        x = random_bf16(tokens, columns)
        ours = products(gguf_gemm.linear, gguf_gemm.dequantize, weights, x, share)
        error = frobenius(ours[0](), x.double() @ exact.T)
        nbytes = gguf_nbytes(name, shape) + 2 * tokens * (rows + columns)
        peers = {"cublas bf16": microseconds([partial(torch.mm, x, w.T) for w in wide])}
        label = " ".join(map(str, share)) if share else "dequantize"
        yield Measured(
            "gguf", model, f"{name} {what}", f"{rows}×{columns}", tokens, error, EXACT if share else ROUNDED,
            microseconds(ours), limits.floor(nbytes, 2 * tokens * rows * columns), peers, label,
        )  # fmt: skip


def measure_gguf_experts(limits: Limits, model: str, name: str, config: ModelConfig) -> Iterator[Measured]:
    """The gate or up product of a layer's pairs, of experts that are as likely as each other: others in each call, so
    that few tokens do not find theirs in the cache."""
    experts, k = config.n_routed_experts, config.num_experts_per_tok
    rows, columns = shape = (config.moe_intermediate_size, config.hidden_size)
    stacks = gguf_weights(name, (experts, *shape), 2)
    for tokens in GGUF_TOKENS:
        x = random_bf16(tokens, columns)
        choices = [torch.rand(tokens, experts, device="cuda").topk(k).indices for _ in range(GGUF_ROUTES)]
        active = sum(len(chosen.unique()) for chosen in choices) / GGUF_ROUTES
        read = active * gguf_nbytes(name, shape) + 2 * tokens * (columns + k * rows)
        routes = [sort_pairs(chosen, experts, choose_block(tokens, k, experts)) for chosen in choices]
        ours = [partial(experts_product, x, some, k, stacks[i % 2]) for i, some in enumerate(routes)]
        error = frobenius(ours[0](), experts_twin(x.double(), routes[0], k, stacks[0]))
        floor = limits.floor(read, 2 * tokens * k * rows * columns)
        yield Measured(
            "gguf", model, f"{name} experts", f"{rows}×{columns}", tokens, error, EXACT, microseconds(ours), floor, {},
            f"tiles of {routes[0].block}",
        )  # fmt: skip


def _gguf_product(m: Measured, name: str, least: int, most: int) -> bool:
    return m.operation == "gguf" and bool(m.peers) and m.what.startswith(name) and least <= m.tokens <= most


def _gguf_experts(m: Measured, least: int, most: int) -> bool:
    return m.operation == "gguf" and not m.peers and least <= m.tokens <= most


GGUF = Section(
    measure_gguf,
    ("cublas bf16",),
    (
        Row("Q8_0 GEMM, M <= 16", "cublas bf16", lambda m: _gguf_product(m, "Q8_0", 1, 16)),
        Row("Q4_K GEMM, M <= 16", "cublas bf16", lambda m: _gguf_product(m, "Q4_K", 1, 16)),
        Row("Q6_K GEMM, M <= 16", "cublas bf16", lambda m: _gguf_product(m, "Q6_K", 1, 16)),
        Row("GGUF GEMM, M = 64", "cublas bf16", lambda m: _gguf_product(m, "", 64, 64)),
        Row("GGUF GEMM, M >= 1024", "cublas bf16", lambda m: _gguf_product(m, "", 1024, 4096)),
        Row("GGUF experts, M <= 64", FLOOR, lambda m: _gguf_experts(m, 1, 64)),
        Row("GGUF experts, M >= 1024", FLOOR, lambda m: _gguf_experts(m, 1024, 4096)),
    ),
)
