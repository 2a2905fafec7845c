"""Plain attention's decoding on a CUDA device, in the models' shapes, against its references. Skipped without one."""

from __future__ import annotations

import pytest
import torch
from gqa_cases import append_faults, inputs, off, poisoned

from dsv2quant.kernels.decoding import MAX_SPLITS
from dsv2quant.kernels.gqa_decode import blocks_of, gqa_decode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Weights are rounded to BF16, by 1.6e-3 in the mean square, and so is the result.
TOLERANCE = 4e-3
LENGTHS = [1, 4096, 63, 64, 65, 0, 127, 2049, 4095, 1000]
STORED = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
# DeepSeek-LLM 7B and 67B, moe-16b, Coder 33B, OCR; widths that are no power of two, the widest, and the narrowest
SHAPES = [(32, 32, 128), (64, 8, 128), (16, 16, 128), (56, 8, 128), (10, 10, 128), (6, 3, 96), (16, 1, 256), (4, 4, 10)]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_ragged_lengths(sizes: tuple[int, int, int], stored: str) -> None:
    given = inputs(*sizes, LENGTHS, 4100, torch.bfloat16, STORED[stored], "cuda")
    chosen = blocks_of(len(LENGTHS), *sizes[1:], 4096, 132)
    for splits in {1, 5, chosen.splits, MAX_SPLITS}:
        got = gqa_decode(*given, blocks=chosen._replace(splits=splits))
        assert off(got, given) <= TOLERANCE, splits


def test_offsets_beyond_31_bits() -> None:
    """Of tokens, which lie up to 5 GB apart, and of sequences."""
    longest = (1 << 20) + (1 << 18)
    given = inputs(32, 8, 128, [3, longest], longest, torch.bfloat16, torch.float8_e5m2, "cuda")
    assert off(gqa_decode(*given)[:1], (given[0][:1], given[1][:1, :3], given[2][:1], *given[3:])) <= TOLERANCE
    last = longest - 5
    given[1][1, :last] = 0
    q, cache, lengths, *rest = given
    got = gqa_decode(q, cache, lengths, *rest)[1:]
    keys, values = (cache[1:, last:].unflatten(2, (2, 8, 128)).double() * rest[1].double()[:, None, None]).unbind(2)
    scores = torch.einsum("bghw,btgw->bght", q[1:].double().unflatten(1, (8, 4)), keys).mul(rest[0])
    weights = scores.exp() / (scores.exp().sum(-1, keepdim=True) + last)
    expected = torch.einsum("bght,btgw->bghw", weights, values).flatten(1, 2)
    assert float((got.double() - expected).norm() / expected.norm()) <= 2 * TOLERANCE


def test_a_graph_serves_lengths_that_grow() -> None:
    q, cache, lengths, *rest = inputs(64, 8, 128, [700, 1, 400], 700, torch.bfloat16, torch.bfloat16, "cuda")
    gqa_decode(q, cache, lengths, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gqa_decode(q, cache, lengths, *rest)
    for shorter in ([650, 1, 3], [700, 1, 400]):
        lengths.copy_(torch.tensor(shorter))
        graph.replay()
        assert off(out, (q, cache, lengths, *rest)) <= TOLERANCE


@pytest.mark.parametrize("stored", [*STORED.values(), torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_keys_and_values_are_stored(sizes: tuple[int, int, int], stored: torch.dtype) -> None:
    for positions in ([0], [6, 0, 7, -1, 100, 3], [row % 8 for row in range(64)]):
        for dtype in (torch.bfloat16, torch.float16) if stored.itemsize == 1 else (stored,):
            assert append_faults(positions, *sizes, stored, dtype, "cuda") == [], (positions, dtype)
