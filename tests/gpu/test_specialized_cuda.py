"""Kernels of many tokens, whose warps are of two kinds, in DeepSeek-V2's shapes, against float64. Skipped without a
Hopper GPU."""

from __future__ import annotations

import pytest
import torch
from experts_cases import Layer, given, off
from fp8_cases import exact, operands
from int4_cases import error
from int4_experts_cases import random_experts

from dsv2quant.kernels import fp8_experts, fp8_gemm, fp8_prefill, int4_experts, int4_prefill, reference
from dsv2quant.kernels import fp8_experts_prefill as fp8_many
from dsv2quant.kernels.activations import quantize_activation
from dsv2quant.kernels.gather import gather_tokens
from dsv2quant.kernels.routing import Routes, sort_pairs

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)

ROUNDED, EXACT = 2e-3, 1e-5  # as in test_int4_experts_cuda.py
SHARES = [(64, 38), (128, 96), (128, 154), (128, 384)]  # tiles and experts' mean pairs of every rule


def skewed(tokens: int, experts: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and experts, of which some have many tokens, and the second none."""
    logits = torch.randn(tokens, experts, device="cuda") + torch.linspace(0, 3, experts, device="cuda")
    logits[:, 1] = -100
    return torch.rand(tokens, k, device="cuda"), logits.topk(k).indices


def poison(numbers: int) -> None:
    """Memory that is given to the next output of so many."""
    torch.full((numbers,), torch.nan, device="cuda")


def by_pair(h: torch.Tensor, routes: Routes) -> torch.Tensor:
    return torch.empty_like(h).index_copy_(0, routes.pairs.long(), h)


@pytest.mark.parametrize("columns", [2048, 5120, 1552])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_tokens_are_gathered(dtype: torch.dtype, columns: int) -> None:
    x = torch.randint(0, 200, (70, columns), device="cuda").to(dtype)
    pairs = torch.randperm(70 * 6, device="cuda").int()
    assert torch.equal(gather_tokens(x, pairs, 6), x[pairs.long() // 6])


@pytest.mark.parametrize("tokens", [1, 333])
@pytest.mark.parametrize(("block", "mean"), SHARES)
@pytest.mark.parametrize(("hidden", "width"), [(2048, 1408), (5120, 1536), (256, 128), (384, 128)])
def test_int4_experts(hidden: int, width: int, block: int, mean: int, tokens: int) -> None:
    experts, k = 8, 3
    stack = random_experts(experts, hidden, width, 128, device="cuda")
    weights, chosen = skewed(tokens, experts, k)
    routes, up, down = sort_pairs(chosen, experts, block), *int4_prefill.rule(block, mean)
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    poison(tokens * k * stack.gate_up.rows // 2)
    h = int4_prefill.gate_up(x, routes, k, stack, up)
    assert error(by_pair(h, routes), reference.gate_up_int4(x, routes, k, stack)) < ROUNDED
    poison(tokens * k * hidden)
    out = int4_prefill.down(h, weights, routes, stack, down)
    assert error(out, reference.down_int4(by_pair(h, routes), weights, routes, stack)) < EXACT


def test_int4_experts_of_many_tokens_are_those_of_few() -> None:
    """As the layer calls it, and whatever the neighbours are."""
    stack = random_experts(8, 2048, 1408, 128, device="cuda")
    weights, chosen = skewed(400, 8, 3)
    x = torch.randn(400, 2048, device="cuda").bfloat16()
    routes = sort_pairs(chosen, 8, 128)
    assert int4_prefill.choose(x, routes, stack)
    out = int4_experts.experts(x, weights, routes, stack)
    separate = int4_experts.down(int4_experts.gate_up(x, routes, 3, stack), weights, routes, stack)
    assert error(out, separate) < ROUNDED
    flipped = sort_pairs(chosen.flip(0), 8, 128)
    assert torch.equal(int4_experts.experts(x.flip(0), weights.flip(0), flipped, stack), out.flip(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 128, 333])
@pytest.mark.parametrize(("width", "hidden"), [(1408, 2048), (1536, 5120), (128, 256), (208, 400)])
def test_fp8_experts(width: int, hidden: int, tokens: int, dtype: torch.dtype) -> None:
    experts, k = 8, 3
    x, _, _, stack, _, _ = given(Layer(tokens, k, experts, width, hidden), "block", "cuda", dtype)
    weights, chosen = skewed(tokens, experts, k)
    routes = sort_pairs(chosen, experts, 128)
    codes, scales = quantize_activation(x, "group128")
    wanted = reference.gate_up(codes, scales, routes, k, stack, dtype)
    poison(tokens * k * width // 4)
    h, h_scales = fp8_many.gate_up_quantized(codes, scales, routes, k, stack, dtype, fp8_many.UP)
    h, h_scales = by_pair(h.view(torch.uint8), routes).view(h.dtype), by_pair(h_scales.contiguous(), routes)
    assert off(h.float() * h_scales.repeat_interleave(128, 1)[:, :width], wanted) < 0.04  # e4m3: 2^-4 / √3
    old, old_scales = quantize_activation(fp8_experts.gate_up(codes, scales, routes, k, stack, dtype), "group128")
    assert (h.view(torch.uint8) != old.view(torch.uint8)).float().mean() < 2e-3
    assert off(h_scales, old_scales) < 1e-3
    poison(tokens * k * hidden)
    out = fp8_experts.experts_of_codes(codes, scales, weights, routes, stack, "group128", dtype)
    assert off(out, reference.down(h, h_scales, weights, routes, stack)) < 1.2e-3  # as in test_fp8_gemm.py


def test_fp8_experts_whatever_the_neighbours() -> None:
    x, _, _, stack, _, _ = given(Layer(400, 3, 8, 1408, 2048), "block", "cuda", torch.bfloat16)
    weights, chosen = skewed(400, 8, 3)

    def run(*rows: torch.Tensor) -> torch.Tensor:
        x, weights, chosen = rows
        codes = quantize_activation(x, "group128")
        return fp8_experts.experts_of_codes(*codes, weights, sort_pairs(chosen, 8, 128), stack, "group128")

    out = run(x, weights, chosen)
    assert torch.equal(run(x.flip(0), weights.flip(0), chosen.flip(0).contiguous()), out.flip(0))


@pytest.mark.parametrize("share", [fp8_prefill.Share(2, 5), fp8_prefill.Share(3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M", [1, 333, 1030])
@pytest.mark.parametrize(("N", "K"), [(24576, 1536), (2112, 5120), (576, 5120), (3648, 2048), (10944, 512), (136, 144)])
def test_fp8_products(N: int, K: int, M: int, dtype: torch.dtype, share: fp8_prefill.Share) -> None:
    x, _, w, of_w = operands(M, N, K, "block", "cuda")
    x, of_x = quantize_activation(x.to(torch.bfloat16), "group128")
    want, _ = exact(x, of_x, w, of_w)
    out = torch.full((M, N), torch.nan, dtype=dtype, device="cuda")
    assert off(fp8_gemm.matmul_into(out, x, of_x, w, of_w, share), want) < ROUNDED
