"""Routed experts on a CUDA device, in DeepSeek-V2's shapes. Skipped without a Hopper GPU."""

from __future__ import annotations

import pytest
import torch
from experts_cases import Layer, given, off
from routing_cases import (
    KIMI,
    ROUTED,
    ROUTERS,
    SORTED,
    V2,
    V3,
    choices,
    expected,
    logits,
    logits_off,
    router_operands,
    same,
)

from dsv2quant.arch.spec import Router
from dsv2quant.kernels import fp8_experts, reference, routing
from dsv2quant.kernels.activations import quantize_activation
from dsv2quant.kernels.routing import FEW, router_logits

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU"
)

LITE, WIDE, MINI = (6, 64, 1408, 2048), (6, 40, 1536, 5120), (4, 16, 128, 256)
SCHEMES = ["block", "channel", "tensor"]
# Rounding to BF16 alone gives 2^-9 / √3 = 1.1e-3; FP8 units keep 13 bits: 1.2e-3 (test_fp8_gemm.py).
LIMIT_BF16, LIMIT = 2e-3, 1.2e-3

empty = torch.empty


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*shape: int, **options) -> torch.Tensor:
        out = empty(*shape, **options)
        if out.dtype == torch.float8_e4m3fn:
            out.view(torch.uint8).fill_(0x7F)
            return out
        return out.fill_(float("nan")) if out.dtype.is_floating_point else out.fill_(1 << 30)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize(
    "case", [*SORTED, (64, 6, 64, 16), (1024, 6, 160, 64), (4096, 6, 160, 128), (8192, 6, 64, 128)]
)
def test_pairs_are_sorted_as_by_the_twin(case: tuple[int, int, int, int]) -> None:
    tokens, k, experts, block = case
    for dtype in (torch.int32, torch.int64):
        chosen = choices(tokens, k, experts, "cuda").to(dtype)
        want = reference.sort_pairs(chosen, experts, block)
        assert same(routing.sort_pairs(chosen, experts, block), want)


@pytest.mark.parametrize(
    "case", [*ROUTERS, *((tokens, *sizes) for tokens in (1, 2, 5, 16, 64, 300) for sizes in ((64, 2048), (160, 5120)))]
)
def test_logits_are_those_of_float64(case: tuple[int, int, int]) -> None:
    """Those of the vendor's product in another order."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        given = router_operands(*case, dtype, "cuda")
        assert logits_off(router_logits(*given), *given) <= (1 if case[0] <= FEW else 20)


@pytest.mark.parametrize("case", [*ROUTED, (64, 160, V2), (64, 256, V3), (4096, 384, KIMI), (8192, 64, Router(6))])
def test_routes_are_those_of_the_model(case: tuple) -> None:
    tokens, experts, router = case
    x, bias = logits(tokens, experts, router, "cuda")
    weights, chosen, routes = routing.route_and_sort(x, router, bias)
    want_weights, want = expected(x, router, bias)
    # Scores that differ in the last bit may change places; their weights tell.
    torch.testing.assert_close(weights, want_weights, rtol=2e-6, atol=0)
    assert (chosen != want).float().mean() < 1e-3
    assert same(routes, reference.sort_pairs(chosen, experts, routes.block))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", [1, 5, 64, 200, 1000])
@pytest.mark.parametrize("widths", [MINI, LITE, WIDE, (3, 5, 208, 400)])
def test_products_are_those_of_float64(widths: tuple[int, int, int, int], tokens: int, scheme: str) -> None:
    layer = Layer(tokens, *widths)
    x, weights, chosen, stack, granularity, scales = given(layer, scheme, "cuda", torch.bfloat16)
    of_x, of_h = scales or (None, None)
    block = routing.choose_block(tokens, layer.k, layer.experts)
    routes = routing.sort_pairs(chosen, layer.experts, block)
    operands = (*quantize_activation(x, granularity, of_x), routes, layer.k, stack)
    h = fp8_experts.gate_up(*operands)
    assert off(h, reference.gate_up(*operands)) <= LIMIT_BF16
    codes, h_scales = quantize_activation(h, granularity, of_h)
    rows = fp8_experts.down(codes, h_scales, weights, routes, stack)
    assert off(rows, reference.down(codes, h_scales, weights, routes, stack)) <= LIMIT
    if scheme == "block":
        fused = fp8_experts.gate_up_quantized(*operands, share=fp8_experts.Share(256, 3, 8))
        assert torch.equal(fused[0].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(fused[1], h_scales)
    assert torch.equal(fp8_experts.experts(x, weights, chosen, stack, granularity, scales), rows)


def test_a_result_is_the_same_every_time_and_in_a_graph() -> None:
    x, weights, chosen, stack, granularity, _ = given(Layer(4, *LITE), "block", "cuda", torch.bfloat16)
    first = fp8_experts.experts(x, weights, chosen, stack, granularity)
    assert all(torch.equal(fp8_experts.experts(x, weights, chosen, stack, granularity), first) for _ in range(5))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fp8_experts.experts(x, weights, chosen, stack, granularity)
    chosen.copy_(chosen.flip(0))
    x.copy_(x.flip(0))
    weights.copy_(weights.flip(0))
    graph.replay()
    assert torch.equal(captured, first.flip(0))
