"""The FP8 kernels by Triton's interpreter against their torch references: a program of its own, since Triton reads
TRITON_INTERPRET when it is imported.

    TRITON_INTERPRET=1 python tests/fp8_interpreted.py

Prints one JSON object: what each case found. Results of products are written over NaN.
"""

from __future__ import annotations

import itertools
import json

import torch
from fp8_cases import EXTREMES, activations, exact, operands

from dsv2quant.kernels import reference
from dsv2quant.kernels.activations import quantize_activation
from dsv2quant.kernels.fp8_gemm import Decode, Prefill, linear_into, matmul_into
from dsv2quant.kernels.fp8_vector import Vector

GRANULARITIES = ("token", "group128", "static")
# (M, N, K): of ragged rows, columns and tokens; one with a single, short product; one of more columns than Vector holds
SHAPES = ((5, 144, 400), (130, 192, 256), (1, 64, 128), (33, 80, 48), (3, 130, 1552), (2, 24, 1024))
SHARES = (
    Decode(64, 16, 1, 2),
    Decode(128, 32, 3, 2),
    Prefill(64, 128, 2),
    Prefill(128, 64, 2),
)
VECTORS = (Vector(8, 1, 1), Vector(8, 1, 2), Vector(16, 2, 1))  # for few tokens
SCHEMES = ("block", "channel", "tensor")


def quantized() -> dict[str, list[str]]:
    """Of each granularity, the cases whose bytes differ from the reference's."""
    static = torch.tensor([0.01])
    found = {}
    for granularity in GRANULARITIES:
        scale = static if granularity == "static" else None
        found[granularity] = []
        for name, x in EXTREMES.items():
            for dtype in (torch.float32, torch.float16):
                case = x.to(dtype)
                codes, scales = quantize_activation(case, granularity, scale)
                want_codes, want_scales = reference.quantize_activation(case, granularity, scale)
                same = torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))
                if not same or not torch.equal(scales, want_scales):
                    found[granularity].append(f"{name} {dtype}")
    return found


def refusal() -> str:
    """What bfloat16 is told here."""
    try:
        quantize_activation(torch.zeros(1, 128, dtype=torch.bfloat16), "token")
    except TypeError as error:
        return str(error)
    return "none"


def products() -> dict[str, float]:
    """The largest |error| / bound of each case; infinity where a result is NaN."""
    worst = {}
    for shape in SHAPES:
        for scheme in SCHEMES:
            given = operands(*shape, scheme, "cpu")
            want, bound = exact(*given)
            few = [v for v in VECTORS if shape[0] < 10 and (v.held - 1) * 512 * v.warps < shape[2]]
            for share in (*SHARES, *few):
                out = torch.full((shape[0], shape[1]), float("nan"))
                error = (matmul_into(out, *given, share).double() - want).abs() / bound
                worst[f"{shape} {scheme} {share}"] = float(error.nan_to_num(float("inf")).max())
    return worst


def own_codes() -> list[str]:
    """Cases whose product differs by a bit from that of codes made before it."""
    different = []
    for shape, scheme in itertools.product(((2, 24, 1024), (3, 18, 400)), ("block", "channel")):
        _, _, w, w_scales = operands(*shape, scheme, "cpu")
        granularity = "group128" if scheme == "block" else "token"
        for x in (activations(shape[0], shape[2]), activations(shape[0], shape[2]).half()):
            codes = quantize_activation(x, granularity)
            for share in VECTORS:
                if share.columns - 512 * share.warps < shape[2] and (scheme == "block" or shape[2] <= share.columns):
                    given, made = (torch.full(shape[:2], float("nan")) for _ in range(2))
                    matmul_into(given, *codes, w, w_scales, share)
                    if not torch.equal(linear_into(made, x, w, w_scales, granularity, share), given):
                        different.append(f"{shape} {x.dtype} {granularity} {share}")
    return different


if __name__ == "__main__":
    found = {"quantized": quantized(), "refusal": refusal(), "products": products(), "own codes": own_codes()}
    print(json.dumps(found))
