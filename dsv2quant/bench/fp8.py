"""FP8 matrix products: cuBLASLt's block-scaled and rowwise ones, cuBLAS' in BF16, and the floor beside ours.

Activations are quantized beforehand. cuBLASLt's block-scaled product takes tokens in multiples of 4: for fewer its time
is that of 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton

from dsv2quant.bench.device import Limits, Measured, Row, Section, copies, frobenius, microseconds
from dsv2quant.bench.model import MODELS, configuration, matrices
from dsv2quant.formats.e4m3 import BLOCK, expand_blocks
from dsv2quant.kernels import fp8_prefill, launch, reference
from dsv2quant.kernels.activations import quantize_activation
from dsv2quant.kernels.fp8_gemm import KINDS, Decode, Prefill, Share, choose_grouped, matmul_into
from dsv2quant.kernels.fp8_vector import Vector

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
LIMIT = 2e-3  # BF16's own rounding is 1.7e-3


class Weights(NamedTuple):
    """As many of one shape as calls rotate through; they share their scales."""

    codes: list[torch.Tensor]
    scales: torch.Tensor

    @property
    def exact(self) -> torch.Tensor:
        """The first, float64."""
        return self.codes[0].double() * expand_blocks(self.scales, *self.codes[0].shape).double()


def random_weights(rows: int, columns: int, count: int | None = None) -> Weights:
    """So many, or as many as calls rotate through."""
    scales = torch.rand(math.ceil(rows / BLOCK), math.ceil(columns / BLOCK), device="cuda") * 2e-4 + 1e-5
    return Weights([random_codes(rows, columns) for _ in range(count or copies(rows * columns))], scales)


def random_codes(rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns, device="cuda") * 60).clamp(-448, 448).to(torch.float8_e4m3fn)


def random_tokens(count: int, columns: int) -> torch.Tensor:
    """BF16, of many sizes."""
    size = torch.exp2(torch.randint(-5, 4, (count, 1), device="cuda").float())
    return (torch.randn(count, columns, device="cuda") * size).bfloat16()


def quantized_tokens(count: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_activation(random_tokens(count, columns), "group128")


def calls(
    weights: Weights, quantized: tuple[torch.Tensor, torch.Tensor], share: Share
) -> list[Callable[[], torch.Tensor]]:
    """One product for each weight; all write to the same output, which begins as NaN."""
    x, scales = quantized
    out = torch.full((len(x), len(weights.codes[0])), math.nan, dtype=torch.bfloat16, device="cuda")
    return [partial(matmul_into, out, x, scales, codes, weights.scales, share) for codes in weights.codes]


def measure(limits: Limits) -> Iterator[Measured]:
    yield from measure_quantization(limits)
    for model in MODELS:
        for what, (rows, columns) in matrices(configuration(model)).items():
            weights = random_weights(rows, columns)
            exact = weights.exact
            wide = [torch.randn(rows, columns, device="cuda").bfloat16() for _ in range(copies(2 * rows * columns))]
            for tokens in TOKENS:
                yield measure_product(limits, model, what, weights, exact, wide, tokens)


def measure_product(
    limits: Limits, model: str, what: str, weights: Weights, exact: torch.Tensor, wide: list[torch.Tensor], tokens: int
) -> Measured:
    rows, columns = exact.shape
    x, x_scales = quantized_tokens(tokens, columns)
    out = torch.empty(tokens, rows, dtype=torch.bfloat16, device="cuda")
    share = choose_grouped(out, x, x_scales, weights.codes[0], weights.scales)
    ours = calls(weights, (x, x_scales), share)
    expected = (x.double() * x_scales.double().repeat_interleave(BLOCK, 1)[:, :columns]) @ exact.T
    error = frobenius(ours[0](), expected)
    nbytes = rows * columns + tokens * columns + 2 * tokens * rows
    floor = limits.floor(nbytes, tokens * rows * columns)  # FP8's rate is twice that of `limits`
    peers = {}
    many = random_tokens(max(tokens, 4), columns)
    if columns % BLOCK == 0:
        given = quantize_activation(many, "group128")
        peers["cublaslt block"] = microseconds([cublaslt_block(*given, w, weights.scales) for w in weights.codes])
    codes, scales = quantize_activation(many[:tokens], "token")
    per_row = torch.rand(1, rows, device="cuda")
    rowwise = partial(torch._scaled_mm, scale_a=scales, scale_b=per_row, out_dtype=torch.bfloat16)
    peers["cublaslt rowwise"] = microseconds([partial(rowwise, codes, w.T) for w in weights.codes])
    peers["cublas bf16"] = microseconds([partial(F.linear, many[:tokens], w) for w in wide])
    label = " ".join(map(str, ["specialized", *share] if isinstance(share, fp8_prefill.Share) else table_row(share)))
    return Measured(
        "fp8", model, what, f"{rows}×{columns}", tokens, error, LIMIT, microseconds(ours), floor, peers, label
    )


def cublaslt_block(
    x: torch.Tensor, x_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Its scales of x lie token after token; those of w in columns padded to 4."""
    bands, depth = w_scales.shape
    right = torch.zeros(bands, math.ceil(depth / 4) * 4, device="cuda")
    right[:, :depth] = w_scales
    of_x, of_w = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    return partial(F.scaled_mm, x, w.T, x_scales.T.contiguous().T, of_x, right.T, of_w)


def measure_quantization(limits: Limits) -> Iterator[Measured]:
    """Of activations; the error is the part of codes that are not the reference's."""
    for tokens, columns in ((1, 5120), (64, 5120), (4096, 5120), (4096, 16384)):
        inputs = [random_tokens(tokens, columns) for _ in range(min(copies(tokens * columns * 2), 200))]
        codes, wanted = (of(inputs[0], "group128")[0] for of in (quantize_activation, reference.quantize_activation))
        off = (codes.view(torch.uint8) != wanted.view(torch.uint8)).float().mean()
        taken = microseconds([partial(quantize_activation, x, "group128") for x in inputs])
        floor = limits.floor(tokens * columns * 3, 0)
        yield Measured("fp8", "", "quantize group128", f"{columns}", tokens, float(off), 0.0, taken, floor, {})


def table_row(share: Share) -> list[str | int]:
    """As tables have it."""
    return launch.table_row(KINDS, share)


def candidates(tokens: int, rows: int, columns: int) -> list[Share]:
    """Shares worth trying: those that leave few multiprocessors idle, as far as the shape allows."""
    found: list[Share] = []
    if tokens <= 4:
        found += vectors(rows, columns)
    if tokens <= 256:
        wide = min(max(16, triton.next_power_of_2(tokens)), 64)
        blocks, columns_of_grid = math.ceil(columns / BLOCK), math.ceil(tokens / wide)
        splits = [s for s in (1, 2, 3, 4, 6, 8) if s == 1 or blocks >= 2 * s]
        programs = {(high, s): math.ceil(rows / high) * s * columns_of_grid for high in (64, 128) for s in splits}
        enough = min(110, max(programs.values()))
        kept = [key for key, count in programs.items() if count >= enough and (key[1] == 1 or count <= 132 * 6)]
        found += [Decode(high, wide, s, stages) for high, s in kept for stages in (4, 6)]
    if tokens > 64:
        found += [Prefill(64, 128, stages) for stages in (3, 4, 6)] + [Prefill(128, 128, stages) for stages in (3, 4)]
        found += [Prefill(64, 64, 4), Prefill(128, 64, 4)]
    return found


def vectors(rows: int, columns: int) -> list[Vector]:
    """Those that leave few threads without columns, and a thread registers for what it holds."""
    found = []
    for warps in (1, 2, 4, 8):
        steps = math.ceil(columns / (512 * warps))
        for high in (2, 4, 8, 16):
            parts = math.ceil(steps * high / 24)
            held = math.ceil(steps / parts)
            if parts * held * 512 * warps <= 1.25 * columns and rows >= 132 * high:
                found.append(Vector(high, warps, held))
    return found


def _product(m: Measured, least: int, most: int) -> bool:
    return m.operation == "fp8" and m.model != "" and least <= m.tokens <= most


SECTION = Section(
    measure,
    ("cublaslt block", "cublaslt rowwise", "cublas bf16"),
    (
        Row("FP8 block GEMM, M <= 64, V2 shapes", "cublaslt block", lambda m: _product(m, 1, 64) and m.model == "v2"),
        Row(
            "FP8 block GEMM, M <= 64, V2-Lite shapes",
            "cublaslt block",
            lambda m: _product(m, 1, 64) and m.model != "v2",
        ),
        Row("FP8 block GEMM, M = 256", "cublaslt block", lambda m: _product(m, 256, 256)),
        Row("FP8 block GEMM, M >= 1024", "cublaslt block", lambda m: _product(m, 1024, 4096)),
    ),
)
