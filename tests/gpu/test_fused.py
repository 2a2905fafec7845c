"""What stands between the products of a decode step on a CUDA device, in the models' shapes, against its references.
Skipped without a Hopper GPU."""

from __future__ import annotations

import pytest
import torch
from fused_cases import GRANULARITIES, absorb_faults, latent_faults, norm_faults, poisoned, silu_faults

from dsv2quant.kernels.activations import add_norm

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU"
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (1, 3, 64, 130)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("granularity", [None, *GRANULARITIES])
@pytest.mark.parametrize("columns", [1536, 2048, 5120, 300])
def test_add_norm(columns: int, granularity: str | None) -> None:
    sums = [(0, False), (6, True)] + ([] if granularity else [(0, True), (8, False)])
    for dtype in DTYPES if columns == 300 else DTYPES[:1]:
        for tokens in TOKENS:
            for pairs, added in sums:
                assert norm_faults(tokens, columns, pairs, added, granularity, dtype, "cuda") == [], (tokens, pairs)


@pytest.mark.parametrize("granularity", [None, *GRANULARITIES])
@pytest.mark.parametrize(("columns", "up"), [(2816, None), (10944, None), (3072, 3200), (12288, None), (40, 48)])
def test_silu_mul(columns: int, up: int | None, granularity: str | None) -> None:
    for dtype in DTYPES if columns == 40 else DTYPES[:1]:
        for tokens in TOKENS:
            assert silu_faults(tokens, columns, up, granularity, dtype, "cuda") == [], tokens


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("heads", [16, 128, 20])
def test_latents(heads: int, stored: torch.dtype) -> None:
    for positions in ([0], [6, 0, 7, -1, 100, 3], [row % 8 for row in range(64)]):
        for dtype in DTYPES[:2] if stored.itemsize == 1 else (stored,):
            assert latent_faults(positions, heads, 128, 64, 512, False, stored, dtype, "cuda") == [], (positions, dtype)
    assert latent_faults([2, 5], heads, 24, 12, 72, True, stored, torch.bfloat16, "cuda") == []


@pytest.mark.parametrize(
    ("tokens", "sizes", "dtype"),
    [(tokens, sizes, torch.bfloat16) for tokens in (1, 8, 64)
     for sizes in ((16, 128, 128, 512), (128, 128, 128, 512), (2, 96, 256, 192))]
    + [(tokens, (3, 24, 40, 72), torch.float16) for tokens in (1, 130)],
)  # fmt: skip
def test_absorb(tokens: int, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert absorb_faults(tokens, *sizes, dtype, "cuda") == []


def test_a_graph_repeats_it() -> None:
    x, weight = torch.randn(2, 3, 2048, device="cuda").bfloat16(), torch.ones(2048, device="cuda").bfloat16()
    pairs = torch.randn(3, 6, 2048, device="cuda")
    add_norm(x[0], weight, 1e-6, addend=x[1], pairs=pairs, quantize="group128")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = add_norm(x[0], weight, 1e-6, addend=x[1], pairs=pairs, quantize="group128")
    x.copy_(torch.randn(2, 3, 2048))
    graph.replay()
    again = add_norm(x[0], weight, 1e-6, addend=x[1], pairs=pairs, quantize="group128")
    assert torch.equal(found.residual, again.residual)
    assert torch.equal(found.codes.view(torch.uint8), again.codes.view(torch.uint8))
