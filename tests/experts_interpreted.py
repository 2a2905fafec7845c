"""The FP8 experts' kernels by Triton's interpreter against their references: a program of its own, since Triton reads
TRITON_INTERPRET when it is imported.

    TRITON_INTERPRET=1 python tests/experts_interpreted.py

Prints one JSON object: what each case found. Results are written over NaN.
"""

from __future__ import annotations

import json

import torch
from experts_cases import Layer, given, off

from dsv2quant.kernels import fp8_experts, reference
from dsv2quant.kernels.fp8_experts import Share
from dsv2quant.kernels.routing import sort_pairs

# Ragged in both widths, one token, many pairs of an expert; a tile of 64 has them as the M side
CASES = (
    (Layer(5, 4, 16, 128, 256), 16),
    (Layer(3, 2, 4, 144, 208), 16),
    (Layer(1, 6, 8, 192, 128), 16),
    (Layer(40, 2, 3, 80, 400), 64),
    (Layer(40, 2, 3, 208, 48), 32),
)
SHARES = (Share(256, 2, 8), Share(64, 2, 4))

empty = torch.empty


def poisoned(*shape: int, **options) -> torch.Tensor:
    out = empty(*shape, **options)
    return out.fill_(float("nan")) if out.dtype.is_floating_point else out.fill_(1 << 30)


def differences(layer: Layer, block: int, scheme: str) -> dict[str, float]:
    """Errors of each kernel given the reference's operands, and bytes that differ of h quantized."""
    x, weights, chosen, stack, granularity, scales = given(layer, scheme, "cpu", torch.float32)
    of_x, of_h = scales or (None, None)
    codes, x_scales = reference.quantize_activation(x, granularity, of_x)
    routes = sort_pairs(chosen, layer.experts, block)
    operands = (codes.contiguous(), x_scales, routes, layer.k, stack)
    want = reference.gate_up(*operands, torch.float32)
    h, h_scales = reference.quantize_activation(want, granularity, of_h)
    rows = reference.down(h, h_scales, weights, routes, stack)
    found = {}
    for share in SHARES:
        found[f"gate_up {share.rows}"] = off(fp8_experts.gate_up(*operands, torch.float32, share), want)
        got = fp8_experts.down(h.contiguous(), h_scales, weights, routes, stack, share._replace(rows=share.rows // 2))
        found[f"down {share.rows}"] = off(got, rows)
    if scheme == "block":
        for dtype in (torch.float32, torch.float16):
            share = SHARES[0]
            plain = reference.quantize_activation(fp8_experts.gate_up(*operands, dtype, share), granularity)
            fused = fp8_experts.gate_up_quantized(*operands, dtype, share)
            found[f"quantized {dtype}"] = float((plain[0].view(torch.uint8) != fused[0].view(torch.uint8)).sum())
            found[f"quantized scales {dtype}"] = float((plain[1] != fused[1]).sum())
    return found


def whole(layer: Layer, scheme: str) -> float:
    """`experts` in float16 against the references, one after the other."""
    x, weights, chosen, stack, granularity, scales = given(layer, scheme, "cpu", torch.float16)
    of_x, of_h = scales or (None, None)
    routes = reference.sort_pairs(chosen, layer.experts, 16)
    h = reference.gate_up(*reference.quantize_activation(x, granularity, of_x), routes, layer.k, stack, torch.float16)
    want = reference.down(*reference.quantize_activation(h, granularity, of_h), weights, routes, stack)
    return off(fp8_experts.experts(x, weights, chosen, stack, granularity, scales), want)


if __name__ == "__main__":
    torch.empty = poisoned
    schemes = ("block", "channel", "tensor")
    kernels = {f"{layer} {scheme}": differences(layer, block, scheme) for layer, block in CASES for scheme in schemes}
    print(json.dumps({"kernels": kernels, "whole": {scheme: whole(CASES[1][0], scheme) for scheme in schemes}}))
