"""INT4 weights, groups of 128, with BF16 activations: cuBLAS' product in BF16 and the floor beside ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from dsv2quant.bench.device import (
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
from dsv2quant.kernels import int4_gemm, int4_layout, tables
from dsv2quant.kernels.int4_gemm import KINDS, Config, choose, dequantize, linear
from dsv2quant.kernels.int4_held import Held
from dsv2quant.kernels.int4_layout import Int4Weight, pack
from dsv2quant.kernels.launch import MULTIPROCESSORS
from dsv2quant.kernels.reference import dequantize_int4

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
GROUP = 128
LARGE = 20e6  # bytes in BF16: smaller weights are bound by latency
EXACT, ROUNDED = 2e-3, 3e-3  # limits of the error, where weights are integers and where they are rounded to BF16
Share = int4_gemm.Share | None


def weights_of(model: str) -> dict[str, tuple[int, int]]:
    """Those whose columns are whole groups."""
    found = matrices(configuration(model))
    return {what: shape for what, shape in found.items() if shape[1] % GROUP == 0}


def random_weights(rows: int, columns: int, count: int | None = None) -> list[Int4Weight]:
    """So many, or as many as calls rotate through; the first is packed, the others have random words."""
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device="cuda")
    scales = torch.rand(columns // GROUP, rows, device="cuda").add(0.1).mul(0.02).bfloat16()
    weight = pack(codes, scales)
    low, high = -(2**31), 2**31 - 1
    others = [
        weight._replace(
            words=torch.randint(low, high, weight.words.shape, dtype=torch.int32, device="cuda"),
            scales=weight.scales.clone(),
            arrivals=weight.arrivals.clone(),
        )
        for _ in range((count or copies(rows * columns / 2)) - 1)
    ]
    return [weight, *others]


def calls(weights: list[Int4Weight], x: torch.Tensor, share: Share) -> list[Callable[[], torch.Tensor]]:
    return products(linear, dequantize, weights, x, share)


def measure(limits: Limits) -> Iterator[Measured]:
    for model in MODELS:
        for what, (rows, columns) in weights_of(model).items():
            weights = random_weights(rows, columns)
            exact = dequantize_int4(weights[0], torch.float32).double()
            wide = [torch.randn(rows, columns, device="cuda").bfloat16() for _ in range(copies(2 * rows * columns))]
            for tokens in TOKENS:
                share = choose(tokens, rows, columns)
                x = random_tokens(tokens, columns)
                ours = calls(weights, x, share)
                error = frobenius(ours[0](), x.double() @ exact.T)
                nbytes = rows * columns * (0.5 + 4 / GROUP) + 2 * tokens * (rows + columns)
                peers = {"cublas bf16": microseconds([partial(torch.mm, x, w.T) for w in wide])}
                yield Measured(
                    "int4", model, what, f"{rows}×{columns}", tokens, error, EXACT if share else ROUNDED,
                    microseconds(ours), limits.floor(nbytes, 2 * tokens * rows * columns), peers, label(share),
                )  # fmt: skip


def label(share: Share) -> str:
    return " ".join(map(str, table_row(share)))


def table_row(share: Share) -> list[str | int]:
    """As tables have it."""
    return ["dequantize"] if share is None else tables.row(KINDS, share)


def candidates(tokens: int, rows: int, columns: int) -> list[Share]:
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
                found.append((programs, Config(high, wide, split, warps, stages)))
    enough = min(120, max(programs for programs, _ in found))
    kept: list[Share] = [config for programs, config in found if programs >= enough]
    return kept + (helds(rows, columns) if tokens <= 16 else []) + [None] * (tokens > 64)


def helds(rows: int, columns: int) -> list[Held]:
    """Those whose programs have as much to do each, 512 columns or more."""
    steps, blocks = math.ceil(columns / GROUP), math.ceil(rows / int4_layout.ROWS)
    splits = [s for s in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16) if 240 <= blocks * s <= 1300 and steps >= 4 * s]
    return [Held(split, held) for split in splits for held in (4, 5, 6, 8) if steps % (split * held) == 0]


def _product(m: Measured, least: int, most: int) -> bool:
    return m.operation == "int4" and least <= m.tokens <= most


def _large(m: Measured) -> bool:
    rows, columns = map(int, m.shape.split("×"))
    return 2 * rows * columns > LARGE


SECTION = Section(measure, ("cublas bf16",), (
    Row("W4A16 GEMM, M <= 16, V2 shapes over 20 MB (bf16)", "cublas bf16",
        lambda m: _product(m, 1, 16) and m.model == "v2" and _large(m)),
    Row("W4A16 GEMM, M <= 16, other shapes", "cublas bf16",
        lambda m: _product(m, 1, 16) and not (m.model == "v2" and _large(m))),
    Row("W4A16 GEMM, M = 64", "cublas bf16", lambda m: _product(m, 64, 64)),
    Row("W4A16 GEMM, M = 256", "cublas bf16", lambda m: _product(m, 256, 256)),
    Row("W4A16 GEMM, M >= 1024", "cublas bf16", lambda m: _product(m, 1024, 4096)),
))  # fmt: skip
