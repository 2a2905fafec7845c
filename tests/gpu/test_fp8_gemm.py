"""The FP8 kernels on a CUDA device, in DeepSeek-V2's shapes. Skipped without a Hopper GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fp8_cases import EXTREMES, activations, exact, operands

from dsv2quant.kernels import reference
from dsv2quant.kernels.activations import add_norm, quantize_activation
from dsv2quant.kernels.fp8_gemm import choose, linear, linear_into, matmul, matmul_into
from dsv2quant.kernels.fp8_vector import Vector

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU"
)

# (N, K): q_b, kv_b, o, q_a + kv_a, kv_a, an expert's and V2-Lite's dense layer
SHAPES = [
    (24576, 1536),
    (32768, 512),
    (5120, 16384),
    (2112, 5120),
    (576, 5120),
    (5120, 1536),
    (10944, 2048),
    (2048, 10944),
]
SCHEMES = ["block", "channel", "tensor"]


@pytest.mark.parametrize("granularity", ["token", "group128", "static"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_activations_have_the_twins_bytes(granularity: str, dtype: torch.dtype) -> None:
    """On the device and on the CPU."""
    static = torch.tensor([0.01]) if granularity == "static" else None
    cases = EXTREMES | {"wide": activations(65, 16384), "ragged": activations(300, 10944)}
    for name, x in cases.items():
        case = x.to(dtype)
        codes, scales = quantize_activation(case.cuda(), granularity, None if static is None else static.cuda())
        want_codes, want_scales = reference.quantize_activation(case, granularity, static)
        assert torch.equal(scales.cpu(), want_scales), name
        assert torch.equal(codes.cpu().view(torch.uint8), want_codes.view(torch.uint8)), name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("M", [1, 2, 5, 16, 64, 65, 300])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_products_are_those_of_float64(N: int, K: int, M: int, scheme: str) -> None:
    """Relative Frobenius error. Rounding to bfloat16 alone gives 2^-9 / √3 = 1.1e-3. FP8 units keep 13 bits below the
    largest of 33 terms, one of which is what they added before: an error of 2^-13 · 2^4 σ / √3 for each of 132 terms,
    where products of size σ rarely exceed 2^4 σ, against a sum of √128 σ: 1.2e-3 for each 128 columns and the whole.
    """
    given = operands(M, N, K, scheme, "cuda")
    want, _ = exact(*given)
    share = choose(M, N, K)
    for dtype, limit in ((torch.bfloat16, 2e-3), (torch.float32, 1.2e-3)):
        out = torch.full((M, N), float("nan"), dtype=dtype, device="cuda")
        assert (matmul_into(out, *given, share).double() - want).norm() / want.norm() <= limit


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 9])
@pytest.mark.parametrize(("N", "K"), [(2048, 2816), (2112, 5120), (130, 1552), (512, 16384)])
def test_plain_units_add_in_float32(N: int, K: int, M: int, scheme: str) -> None:
    """Element by element: within the bound of fp8_cases.exact."""
    given = operands(M, N, K, scheme, "cuda")
    want, bound = exact(*given)
    for share in (Vector(4, 1, 2), Vector(8, 2, 2), Vector(16, 4, 1)):
        out = torch.full((M, N), float("nan"), device="cuda")
        error = (matmul_into(out, *given, share).double() - want).abs()
        assert bool((error <= bound).all()), share


@pytest.mark.parametrize("scheme", ["block", "channel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M", [1, 2, 4])
@pytest.mark.parametrize(("N", "K"), [(2048, 2048), (130, 400), (5120, 3072)])
def test_codes_made_in_the_product_are_those_of_a_launch_of_its_own(N: int, K: int, M: int, dtype, scheme) -> None:
    """Element by element: within float32's bound of the product of those codes, which another code would leave."""
    _, _, w, w_scales = operands(M, N, K, scheme, "cuda")
    x = activations(M, K, device="cuda").to(dtype)
    granularity = "group128" if scheme == "block" else "token"
    codes = quantize_activation(x, granularity)
    want, bound = exact(*codes, w, w_scales)
    for share in (Vector(2, 4, 1), Vector(4, 1, 1), Vector(8, 2, 3)):
        if share.columns - 512 * share.warps < K and (scheme == "block" or share.columns >= K):
            out = torch.full((M, N), float("nan"), device="cuda")
            error = (linear_into(out, x, w, w_scales, granularity, share).double() - want).abs()
            assert bool((error <= bound).all()), share
    found = linear(x, w, w_scales, torch.float32, granularity).double()
    assert float((found - want).norm() / want.norm()) <= 1.2e-3


def test_a_product_waits_for_its_input_in_a_graph() -> None:
    """Kernels start while the one before them runs: a chain of dependent products gives the same in a graph, played
    again and again, as one by one with a wait between them."""
    layers = [operands(1, 2048, 2048, "block", "cuda")[2:] for _ in range(8)]
    x, gain = activations(1, 2048, device="cuda").bfloat16(), torch.ones(2048, dtype=torch.bfloat16, device="cuda")

    def run(between: Callable[[], None]) -> torch.Tensor:
        y = x
        for w, w_scales in layers:
            normed = add_norm(y, gain, 1e-6).normed
            between()
            y = linear(normed, w, w_scales, torch.bfloat16, "group128")
            between()
        return y

    want = run(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(lambda: None)
    for _ in range(20):
        got.zero_()
        graph.replay()
        assert torch.equal(got, want)


def test_a_product_is_the_same_every_time() -> None:
    for M in (1, 4):
        given = operands(M, 2112, 5120, "block", "cuda")
        first = matmul(*given)
        assert all(torch.equal(matmul(*given), first) for _ in range(20))
