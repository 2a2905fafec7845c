"""FP8 matrix products on a CUDA device: correctness, then µs against cuBLASLt, cuBLAS and the floor.

    python benchmarks/kernels_fp8.py --results benchmarks/results/kernels_fp8.csv --sweep

Times are CUDA-graph replays over random weights in rotation, at least 180 MB of them, since L2 holds 50 to 60 MB: the
median of 7 replays. Activations are quantized beforehand. `floor` is the larger of bytes / the rate at which a plain
reduction read in this run, and FLOP / 1,979 TFLOP/s. cuBLASLt's block-scaled product needs M in multiples of 4: for one
token its row is that of M = 4. `--sweep` also times other shares of work, and prints the best of each row.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from convert import append
from device import bandwidth, measured_on, microseconds

from dsv2quant.formats.fp8 import expand_blocks
from dsv2quant.kernels.act_quant import quantize_activation
from dsv2quant.kernels.fp8_gemm import Decode, Prefill, choose, matmul_into
from dsv2quant.kernels.reference import quantize_activation as quantize_by_torch

SHAPES = {
    "q_b": (24576, 1536),
    "kv_b": (32768, 512),
    "o": (5120, 16384),
    "qkv_a": (2112, 5120),
    "expert gate+up": (3072, 5120),
    "expert down": (5120, 1536),
    "lite q": (3072, 2048),
    "lite o": (2048, 2048),
}
RAGGED = {"kv_a": (576, 5120), "lite dense down": (2048, 10944), "lite dense up": (10944, 2048), "short": (80, 48)}
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
ROTATED = 180e6  # bytes of weights
PEAK = 1979e12


def decode_shares(M: int, N: int, K: int) -> list[Decode | Prefill]:
    tokens = min(max(16, triton.next_power_of_2(M)), 64)
    splits = [s for s in (1, 2, 4, 8) if s == 1 or (math.ceil(K / 128) >= 4 * s and N // 128 * s < 1000)]
    return [Decode(rows, tokens, s, stages) for rows in (64, 128) for stages in (4, 8) for s in splits]


PREFILL_SHARES: list[Decode | Prefill] = [
    Prefill(128, 128, 4),
    Prefill(64, 128, 3),
    Prefill(64, 128, 4),
]


def shares(M: int, N: int, K: int, sweep: bool) -> list[Decode | Prefill]:
    """What `choose` says, first, and others."""
    others: list[Decode | Prefill] = []
    if sweep:
        others = decode_shares(M, N, K) if M <= 256 else []
        others += PREFILL_SHARES if M > 64 else []
    return list(dict.fromkeys([choose(M, N, K), *others]))


def random_weight(N: int, K: int) -> torch.Tensor:
    return (torch.randn(N, K, device="cuda") * 60).clamp(-448, 448).to(torch.float8_e4m3fn)


def scales_for(scheme: str, N: int, K: int) -> torch.Tensor:
    shape = {"block": (math.ceil(N / 128), math.ceil(K / 128)), "channel": (N, 1), "tensor": (1,)}[scheme]
    return torch.rand(shape, device="cuda") * 2e-4 + 1e-5


def operands(M: int, N: int, K: int, scheme: str) -> tuple[torch.Tensor, ...]:
    x = torch.randn(M, K, device="cuda") * torch.exp2(torch.randint(-5, 4, (M, 1), device="cuda").float())
    granularity = {"block": "group128", "channel": "token", "tensor": "static"}[scheme]
    codes, x_scales = quantize_activation(x.bfloat16(), granularity, torch.tensor([0.02], device="cuda"))
    return codes, x_scales, random_weight(N, K), scales_for(scheme, N, K)


def frobenius(out: torch.Tensor, x, x_scales, w, w_scales) -> float:
    """Relative error against float64 on the dequantized operands."""
    per_column = x_scales if x_scales.shape[-1] == 1 else x_scales.repeat_interleave(128, 1)[:, : x.shape[1]]
    blocks = w_scales.ndim == 2 and w_scales.shape[0] != w.shape[0]
    right = w.double() * (expand_blocks(w_scales, *w.shape) if blocks else w_scales).double()
    want = (x.double() * per_column.double()) @ right.T
    return float((out.double() - want).norm() / want.norm())


def check_activations() -> list[str]:
    """What is not the twin's."""
    wrong = []
    scale = torch.tensor([0.013], device="cuda")
    for granularity in ("token", "group128", "static"):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for M, K in ((1, 128), (333, 1408), (70, 10944), (5, 300), (64, 16384)):
                x = (torch.randn(M, K, device="cuda") * 3).to(dtype)
                x[0, : K // 2] = 0
                got, want = (f(x, granularity, scale) for f in (quantize_activation, quantize_by_torch))
                off = (got[0].view(torch.uint8) != want[0].view(torch.uint8)).sum() + (got[1] != want[1]).sum()
                if off:
                    wrong.append(f"quantized {granularity} {dtype} {M}×{K}: {off} codes or scales are not the twin's")
    return wrong


def check_products(sweep: bool) -> list[str]:
    """Products that are off by more than 2e-3, over NaN."""
    wrong, worst = [], {torch.bfloat16: 0.0, torch.float32: 0.0}
    for name, (N, K) in (SHAPES | RAGGED).items():
        for M in (1, 5, 64, 200):
            for scheme in ("block", "channel", "tensor"):
                given = operands(M, N, K, scheme)
                others = sweep and scheme == "block" and name in ("qkv_a", "short", "lite dense down")
                for share in shares(M, N, K, others):
                    for dtype in worst if share == choose(M, N, K) else (torch.bfloat16,):
                        out = torch.full((M, N), math.nan, dtype=dtype, device="cuda")
                        error = frobenius(matmul_into(out, *given, share), *given)
                        worst[dtype] = max(worst[dtype], error)
                        if not error <= 2e-3:
                            wrong.append(f"{name} M={M} {scheme} {share} {dtype}: relative error {error}")
    print("worst relative Frobenius error of products:", {str(d): f"{e:.2e}" for d, e in worst.items()})
    return wrong


def cublaslt_block(
    x: torch.Tensor, x_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Its scales of x lie token after token; those of w in columns padded to 4."""
    bands, depth = w_scales.shape
    right = torch.zeros(bands, math.ceil(depth / 4) * 4, device="cuda")
    right[:, :depth] = w_scales
    of_x, of_w = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    return partial(F.scaled_mm, x, w.T, x_scales.T.contiguous().T, of_x, right.T, of_w)


def measure(M: int, N: int, K: int, rate: float, sweep: bool) -> tuple[dict[str, float], list[str]]:
    """µs by what was timed, and the fastest shares."""
    weights = [random_weight(N, K) for _ in range(math.ceil(ROTATED / (N * K)))]
    w_scales, per_row = scales_for("block", N, K), scales_for("channel", N, K).T
    x_bf16 = torch.randn(M, K, device="cuda").bfloat16()
    x, x_scales = quantize_activation(x_bf16, "group128")
    out = torch.empty(M, N, dtype=torch.bfloat16, device="cuda")
    timed = {
        share: microseconds([partial(matmul_into, out, x, x_scales, w, w_scales, share) for w in weights])
        for share in shares(M, N, K, sweep)
    }
    ranked = sorted(timed, key=timed.__getitem__)
    floor = max((N * K + M * K + 2 * M * N) / rate, 2 * M * N * K / PEAK) * 1e6
    found = {"ours": timed[choose(M, N, K)], "best": timed[ranked[0]], "floor": floor}
    if M % 4 == 0:
        calls = [cublaslt_block(x, x_scales, w, w_scales) for w in weights]
        if M == 64 and (error := frobenius(calls[0](), x, x_scales, weights[0], w_scales)) > 2e-3:
            print(f"cuBLASLt's block-scaled product is off by {error:.1e}")
        found["cublaslt block"] = microseconds(calls)
    tokens, token_scales = quantize_activation(x_bf16, "token")
    rowwise = partial(torch._scaled_mm, scale_a=token_scales, scale_b=per_row, out_dtype=torch.bfloat16)
    found["cublaslt rowwise"] = microseconds([partial(rowwise, tokens, w.T) for w in weights])
    wide = [torch.randn(N, K, device="cuda").bfloat16() for _ in range(math.ceil(ROTATED / (2 * N * K)))]
    found["cublas bf16"] = microseconds([partial(F.linear, x_bf16, w) for w in wide])
    return found, [f"{timed[share]:.1f} {type(share).__name__}{tuple(share)}" for share in ranked[:4]]


def measure_quantization(M: int, K: int, rate: float) -> dict[str, float]:
    x = torch.randn(min(math.ceil(ROTATED / (M * K * 2)), 200), M, K, device="cuda").bfloat16()
    taken = microseconds([lambda part=part: quantize_activation(part, "group128") for part in x])
    return {"ours": taken, "floor": M * K * 3 / rate * 1e6}


def mean_ratios(table: dict[tuple[str, int], dict[str, float]], peer: str, tokens: list[int], what: str) -> str:
    """Geometric mean of peer / ours over the shapes and `tokens`; the peer of fewer than 4 tokens is that of 4."""
    ratios = []
    for shape in SHAPES:
        for M in tokens:
            theirs = table[shape, M].get(peer) or table[shape, max(M, 4)].get(peer)
            if theirs:
                ratios.append(theirs / table[shape, M][what])
    return f"{statistics.geometric_mean(ratios):.2f} (worst {min(ratios):.2f})" if ratios else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    wrong = check_activations() + check_products(options.sweep)
    print(*wrong, sep="\n")
    rate, where = bandwidth(), measured_on()
    print(f"{where}; a reduction reads {rate / 1e12:.2f} TB/s")
    table, rows = {}, []

    def report(name: str, M: int, N: int, K: int, found: dict[str, float], more: list[str]) -> None:
        print(f"{name} {N}×{K} M={M}:", *(f"{what} {taken:.1f}" for what, taken in found.items()), *more, sep="; ")
        columns = {what: f"{found[what]:.2f}" if what in found else "" for what in COLUMNS}
        rows.append({"what": name, "M": M, "N": N, "K": K} | columns | {"best share": "".join(more[:1])} | where)

    for M, K in ((1, 5120), (64, 5120), (4096, 5120), (4096, 16384)):
        report("quantize group128", M, 0, K, measure_quantization(M, K, rate), [])
    for name, (N, K) in SHAPES.items():
        for M in TOKENS:
            table[name, M], ranked = measure(M, N, K, rate, options.sweep)
            report(name, M, N, K, table[name, M], ranked)
    for what in ("ours", "best"):
        for peer in ("cublaslt block", "cublaslt rowwise", "cublas bf16"):
            for label, tokens in (("M ≤ 64", [1, 4, 16, 64]), ("M = 256", [256]), ("M ≥ 1024", [1024, 4096])):
                print(f"{what}: speed against {peer}, {label}: {mean_ratios(table, peer, tokens, what)}")
    append(options.results, rows)
    if wrong:
        sys.exit("\n".join(wrong))


COLUMNS = ("ours", "best", "floor", "cublaslt block", "cublaslt rowwise", "cublas bf16")

if __name__ == "__main__":
    main()
