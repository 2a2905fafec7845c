"""MLA decoding on a CUDA device, in the models' shapes, against its reference in float64. Skipped without one."""

from __future__ import annotations

import pytest
import torch
from mla_cases import inputs, off, poisoned

from dsv2quant.kernels.decoding import is_hopper
from dsv2quant.kernels.mla_decode import blocks_of, mla_decode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Weights are rounded to BF16, by 1.6e-3 in the mean square: what random latents' sum is off by.
TOLERANCE = 3e-3
LENGTHS = [1, 4096, 63, 64, 65, 0, 127, 2049, 4095, 1000]
STORED = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("heads", "rank", "rope"), [(16, 512, 64), (128, 512, 64), (4, 128, 16), (40, 384, 32)])
def test_ragged_lengths(heads: int, rank: int, rope: int, stored: str) -> None:
    given = inputs(10, heads, LENGTHS, 4100, rank, rope, torch.bfloat16, STORED[stored], "cuda")
    chosen = blocks_of(10, heads, 4096, 132)
    for splits in {1, 5, chosen.splits, 128}:
        got = mla_decode(*given, blocks=chosen._replace(splits=splits))
        assert off(got, given) <= TOLERANCE, splits


@pytest.mark.skipif(torch.cuda.is_available() and not is_hopper(torch.device("cuda")), reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    ("heads", "stored"), [(16, "e4m3"), (10, "e5m2"), (32, "e4m3"), (128, "e4m3"), (128, "bf16"), (40, "bf16")]
)
def test_ragged_lengths_specialized(heads: int, stored: str) -> None:
    given = inputs(10, heads, LENGTHS, 4100, 512, 64, torch.bfloat16, STORED[stored], "cuda")
    # Of many sequences and few multiprocessors, so that it is worth it.
    chosen = blocks_of(10, heads, 4096, 1, STORED[stored].itemsize)
    assert chosen.specialized
    for splits in (1, 5, 37, 128):
        got = mla_decode(*given, blocks=chosen._replace(splits=splits))
        assert off(got, given) <= TOLERANCE, splits
    assert off(mla_decode(*given, dtype=torch.bfloat16), given) <= TOLERANCE + 2**-9


@pytest.mark.skipif(torch.cuda.is_available() and not is_hopper(torch.device("cuda")), reason="needs a Hopper GPU")
def test_specialized_results_are_a_sequence_s_own() -> None:
    """Bit for bit, whatever its neighbours are, where the splits are the same."""
    for heads, stored in ((16, "e4m3"), (128, "bf16")):
        given = inputs(4, heads, [700, 1, 400, 4000], 4000, 512, 64, torch.bfloat16, STORED[stored], "cuda")
        q, cache, lengths, *rest = given
        chosen = blocks_of(4, heads, 4000, 1, STORED[stored].itemsize)._replace(splits=3)
        got = mla_decode(q, cache, lengths, *rest, blocks=chosen)
        alone = mla_decode(q[2:3], cache[2:3], lengths[2:3], *rest, blocks=chosen)
        assert torch.equal(got[2:3], alone)


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_batches(batch: int) -> None:
    lengths = [4096 - 61 * row for row in range(batch)]
    given = inputs(batch, 16, lengths, 4096, 512, 64, torch.bfloat16, torch.bfloat16, "cuda")
    assert off(mla_decode(*given), given) <= TOLERANCE
    # In BF16 the result is rounded once more.
    assert off(mla_decode(*given, dtype=torch.bfloat16), given) <= TOLERANCE + 2**-9


def test_offsets_beyond_31_bits() -> None:
    """The last of sequences that lie 4.8 GB apart from the first."""
    given = inputs(2, 16, [5, 300], 1 << 22, 512, 64, torch.bfloat16, torch.bfloat16, "cuda")
    q, cache, lengths, *rest = given
    short = (q, cache[:, :300].contiguous(), lengths, *rest)
    assert torch.equal(mla_decode(*given, longest=300), mla_decode(*short))


def test_a_graph_serves_lengths_that_grow() -> None:
    q, cache, lengths, *rest = inputs(3, 16, [700, 1, 400], 700, 512, 64, torch.bfloat16, torch.bfloat16, "cuda")
    mla_decode(q, cache, lengths, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mla_decode(q, cache, lengths, *rest)
    for shorter in ([650, 1, 3], [700, 1, 400]):
        lengths.copy_(torch.tensor(shorter))
        graph.replay()
        assert off(out, (q, cache, lengths, *rest)) <= TOLERANCE
