"""Attention of one new token per sequence beside the floor: absorbed over the cache of latents, and plain over that of
keys and values. And that of prompts, expanded.

Every call reads another cache, 0.5 GB or more in all, so that none lies in the L2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from dsv2quant.bench.device import FLOOR, Limits, Measured, Row, Section, frobenius, microseconds, random_bf16
from dsv2quant.kernels import gqa_decode, mla_decode, mla_prefill, reference_attention

RANK, WIDTH = 512, 576
LATENT = [(16, 64, 4096), (16, 1, 4096), (16, 8, 4096), (16, 1, 32768), (16, 8, 32768), (128, 64, 4096),
          (128, 1, 4096), (128, 8, 4096), (128, 8, 32768), (16, 1, 131072), (128, 1, 131072)]  # fmt: skip
PROMPTS = [(16, 1, 2048), (16, 8, 4096), (16, 1, 16384), (128, 1, 2048), (128, 4, 4096)]
LAST = 256  # of a prompt's queries are checked, of 16 heads
# DeepSeek-LLM 7B and 67B, deepseek-moe-16b, DeepSeek-OCR: heads, and heads of keys and values
PLAIN_HEADS, HEAD = [(32, 32), (64, 8), (16, 16), (10, 10)], 128
BATCHES = [(1, 512), (1, 4096), (8, 4096), (64, 2048)]
STORED = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
FACTOR = 0.02  # of what a float8 cache holds
LIMIT = 3e-3  # the weights of the softmax are rounded to BF16
PLAIN_LIMIT = 4e-3  # and so is the result
CHECKED = 4  # sequences


class Case(NamedTuple):
    """Sequences of one length. A token has `columns` numbers in the cache, a head `width` in its query."""

    heads: int
    batch: int
    length: int
    stored: str
    columns: int
    width: int


def calls_of(case: Case, *more: object, scales: int) -> list[tuple]:
    """The arguments of enough calls: q, cache, lengths, `more`, the factors of a float8 cache."""
    dtype = STORED[case.stored]
    lengths = torch.full((case.batch,), case.length, dtype=torch.int32, device="cuda")
    factors = torch.full((scales,), FACTOR, device="cuda") if dtype.itemsize == 1 else None
    calls = []
    for _ in range(max(2, -(-(1 << 29) // (case.batch * case.length * case.columns * dtype.itemsize)))):
        q = torch.randn(case.batch, case.heads, case.width, device="cuda").bfloat16()
        cache = torch.randn(case.batch, case.length, case.columns, device="cuda", dtype=torch.bfloat16)
        cache = cache if factors is None else (cache / FACTOR).to(dtype)
        calls.append((q, cache, lengths, *more, factors))
    return calls


def _timed(
    kernel: Callable[..., torch.Tensor], reference: Callable[..., torch.Tensor], calls: list[tuple]
) -> tuple[float, float]:
    """Error and µs."""
    q, cache, lengths, *rest = calls[0]
    expected = reference(q[:CHECKED].double(), cache[:CHECKED], lengths[:CHECKED], *rest)
    error = frobenius(kernel(*calls[0])[:CHECKED], expected)
    return error, microseconds([partial(kernel, *given) for given in calls])


def measure_latent(limits: Limits) -> Iterator[Measured]:
    for (heads, batch, length), stored in itertools.product(LATENT, STORED):
        calls = calls_of(Case(heads, batch, length, stored, WIDTH, WIDTH), RANK, WIDTH**-0.5, scales=1)
        moved = batch * (length * WIDTH * STORED[stored].itemsize + heads * (WIDTH * 2 + RANK * 4))
        floor = limits.floor(moved, 2 * batch * heads * length * (WIDTH + RANK))
        error, taken = _timed(mla_decode.mla_decode, reference_attention.mla_decode, calls)
        q, cache, *_ = calls[0]
        blocks = " ".join(map(str, mla_decode.blocks_for(q, cache, RANK, length)))
        what = f"{heads} heads, cache of {length}, {stored}"
        yield Measured("mla", "", what, f"{length}×{WIDTH}", batch, error, LIMIT, taken, floor, {}, blocks)


def measure_prompts(limits: Limits) -> Iterator[Measured]:
    for heads, batch, length in PROMPTS:
        q, kv = (random_bf16(batch, length, heads * width) for width in (192, 256))
        keys, angles = random_bf16(batch, length, 64), torch.randn(length, 32, device="cuda")
        table = torch.stack([angles.cos(), angles.sin()], -1)
        kernel = partial(mla_prefill.mla_prefill, q, table, kv, keys, 192**-0.5)
        expected = reference_attention.mla_prefill(
            q[:1, -LAST:, : 16 * 192].double(), table[-LAST:].double(), kv[:1, :, : 16 * 256].double(),
            keys[:1].double(), 192**-0.5,
        )  # fmt: skip
        error = frobenius(kernel()[:1, -LAST:, : 16 * 128], expected)
        operations = batch * heads * length * (length + 1) * (192 + 128)  # of a query half of the keys, in the mean
        floor = limits.floor(batch * length * heads * (192 + 256 + 128) * 2, operations)
        taken = microseconds([kernel] * 2)
        what = f"{heads} heads, prompt of {length}"
        yield Measured("mla", "", what, f"{length}×192", batch, error, PLAIN_LIMIT, taken, floor, {})


def measure_mla(limits: Limits) -> Iterator[Measured]:
    yield from measure_latent(limits)
    yield from measure_prompts(limits)


def measure_plain(limits: Limits) -> Iterator[Measured]:
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for (heads, groups), (batch, length), stored in itertools.product(PLAIN_HEADS, BATCHES, STORED):
        columns = 2 * groups * HEAD
        calls = calls_of(Case(heads, batch, length, stored, columns, HEAD), HEAD**-0.5, scales=2)
        moved = batch * (length * columns * STORED[stored].itemsize + heads * HEAD * 4)
        floor = limits.floor(moved, 4 * batch * heads * length * HEAD)
        error, taken = _timed(gqa_decode.gqa_decode, reference_attention.gqa_decode, calls)
        blocks = " ".join(map(str, gqa_decode.blocks_of(batch, groups, HEAD, length, processors)))
        what = f"{heads} heads of {groups}, cache of {length}, {stored}"
        yield Measured("gqa", "", what, f"{length}×{columns}", batch, error, PLAIN_LIMIT, taken, floor, {}, blocks)


MLA = Section(measure_mla, (), (
    Row("absorbed MLA decode, 16 heads, batch 64 × 4096, BF16 cache", FLOOR,
        lambda m: m.what == "16 heads, cache of 4096, bf16" and m.tokens == 64),
    Row("absorbed MLA decode, 16 heads, batch 64 × 4096, FP8 cache", FLOOR,
        lambda m: m.what == "16 heads, cache of 4096, e4m3" and m.tokens == 64),
    Row("absorbed MLA decode, 128 heads, batch 64 × 4096, BF16 cache", FLOOR,
        lambda m: m.what == "128 heads, cache of 4096, bf16" and m.tokens == 64),
    Row("absorbed MLA decode, 128 heads, batch 64 × 4096, FP8 cache", FLOOR,
        lambda m: m.what == "128 heads, cache of 4096, e4m3" and m.tokens == 64),
    Row("expanded MLA, prompts", FLOOR, lambda m: m.operation == "mla" and "prompt" in m.what),
))  # fmt: skip
GQA = Section(measure_plain, (), (
    Row("plain decode, BF16 cache", FLOOR, lambda m: m.operation == "gqa" and m.what.endswith("bf16")),
    Row("plain decode, FP8 cache", FLOOR, lambda m: m.operation == "gqa" and m.what.endswith("e4m3")),
))  # fmt: skip
