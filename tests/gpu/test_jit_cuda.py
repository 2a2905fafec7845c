"""Kernels' own launch on a device: the same results as Triton's, also from a graph and on another stream."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.jit import KernelInterface

from dsv2quant.kernels import activations, fp8_gemm, jit

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def computed(x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor) -> list[torch.Tensor]:
    """By kernels with and without descriptors."""
    norm = activations.add_norm(x, x[0].contiguous(), 1e-6, addend=x, quantize="group128")
    assert norm.codes is not None
    assert norm.scales is not None
    return [norm.normed, norm.residual, fp8_gemm.matmul(norm.codes, norm.scales, w, scales, torch.bfloat16)]


@pytest.mark.parametrize("tokens", [1, 3, 512])
def test_results_are_those_of_tritons_launch(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator("cuda").manual_seed(tokens)
    made = [torch.randn(tokens, 512, generator=g, device="cuda").bfloat16() for _ in range(3)]
    w = torch.randn(256, 512, generator=g, device="cuda").to(torch.float8_e4m3fn)
    scales = torch.rand(2, 4, generator=g, device="cuda")
    with monkeypatch.context() as patch:
        patch.setattr(jit._Kernel, "__getitem__", KernelInterface.__getitem__)
        want = [computed(x, w, scales) for x in made]
    got = [computed(x, w, scales) for x in made]  # the first by Triton's launch, which is kept
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        got.append(computed(made[0], w, scales))
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got.append(computed(made[1], w, scales))
    graph.replay()
    for ours, tritons in zip(got, [*want, want[0], want[1]], strict=True):
        for a, b in zip(ours, tritons, strict=True):
            assert torch.equal(a, b)
