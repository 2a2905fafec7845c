"""Absorbed attention of one new token per sequence over the latent cache, and the floor beside it.

Every call of a CUDA graph reads another cache, 0.5 GB or more in all, so that none lies in the L2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from dsv2quant.bench.device import FLOOR, Limits, Measured, Row, frobenius, microseconds
from dsv2quant.kernels import reference
from dsv2quant.kernels.mla_decode import blocks_of, mla_decode

PEERS = ()
RANK, WIDTH = 512, 576
SHAPES = [(16, 64, 4096), (16, 1, 4096), (16, 8, 4096), (16, 1, 32768), (16, 8, 32768), (128, 64, 4096),
          (128, 1, 4096), (128, 8, 4096), (128, 8, 32768)]  # fmt: skip
STORED = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
LIMIT = 3e-3  # the weights of the softmax are rounded to BF16
CHECKED = 4  # sequences


def arguments(heads: int, batch: int, length: int, stored: str) -> list[tuple]:
    """The arguments of enough calls."""
    size = batch * length * WIDTH * STORED[stored].itemsize
    lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    factor = torch.tensor([0.02], device="cuda") if stored == "e4m3" else None
    calls = []
    for _ in range(max(2, -(-(1 << 29) // size))):
        q = torch.randn(batch, heads, WIDTH, device="cuda").bfloat16()
        cache = torch.randn(batch, length, WIDTH, device="cuda", dtype=torch.bfloat16)
        cache = cache if factor is None else (cache / factor).to(STORED[stored])
        calls.append((q, cache, lengths, RANK, WIDTH**-0.5, factor))
    return calls


def measure(limits: Limits) -> Iterator[Measured]:
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for (heads, batch, length), stored in itertools.product(SHAPES, STORED):
        calls = arguments(heads, batch, length, stored)
        moved = batch * (length * WIDTH * STORED[stored].itemsize + heads * (WIDTH * 2 + RANK * 4))
        floor = limits.floor(moved, 2 * batch * heads * length * (WIDTH + RANK))
        q, cache, lengths, *rest = calls[0]
        expected = reference.mla_decode(q[:CHECKED].double(), cache[:CHECKED], lengths[:CHECKED], *rest)
        error = frobenius(mla_decode(*calls[0])[:CHECKED], expected)
        taken = microseconds([partial(mla_decode, *given) for given in calls])
        blocks = " ".join(map(str, blocks_of(batch, heads, length, processors)))
        what = f"{heads} heads, cache of {length}, {stored}"
        yield Measured("mla", "", what, f"{length}×{WIDTH}", batch, error, LIMIT, taken, floor, {}, blocks)


ROWS = (
    Row("absorbed MLA decode, 16 heads, batch 64 × 4096, BF16 cache", FLOOR,
        lambda m: m.what == "16 heads, cache of 4096, bf16" and m.tokens == 64),
    Row("absorbed MLA decode, 16 heads, batch 64 × 4096, FP8 cache", FLOOR,
        lambda m: m.what == "16 heads, cache of 4096, e4m3" and m.tokens == 64),
    Row("absorbed MLA decode, 128 heads, batch 64 × 4096, BF16 cache", FLOOR,
        lambda m: m.what == "128 heads, cache of 4096, bf16" and m.tokens == 64),
)  # fmt: skip
