"""GPTQ's kernels on a CUDA device: the bits of their torch references there. Skipped without one."""

from __future__ import annotations

import pytest
import torch
from gptq_cases import BLOCKS, SEARCHES, block_faults, search_faults
from test_gptq import problem
from test_gptq_kernels import loop

from dsv2quant.calib import gptq
from dsv2quant.kernels import reference_gptq

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LITE = (8, 1408, 2048, 128)  # batch, rows, columns, group of a few of V2-Lite's experts


@pytest.mark.parametrize("case", [*BLOCKS, (*LITE, 1920, 64, 4), (1, 5120, 16384, 128, 0, 64, 4)])
def test_a_blocks_codes_and_errors_are_the_references(case: tuple[int, ...]) -> None:
    assert block_faults(*case, "cuda") == []


@pytest.mark.parametrize("case", [*SEARCHES, (4, 140, 2048, 128, 4), (1, 5, 16384, 16384, 4), (1, 90, 1536, 32, 2)])
def test_a_search_finds_the_best(case: tuple[int, ...]) -> None:
    assert search_faults(*case, "cuda") == []


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_whole_matrices_have_the_codes_of_the_references_loop(bits: int) -> None:
    _, rows, columns, group = LITE
    w, h = (x.float() for x in problem(2, rows, columns))
    factored = gptq.factor(h.cuda())
    scales = gptq.best_scales(w.cuda(), h.cuda().diagonal(dim1=1, dim2=2), group, bits)
    got = gptq.quantize(w.cuda(), scales, factored, bits)
    assert torch.equal(got, loop(w.cuda(), scales, factored, bits))


def test_a_search_is_the_references_but_for_ties() -> None:
    batch, rows, columns, group = LITE
    w = torch.randn(batch, rows, columns, device="cuda")
    importance = torch.rand(batch, columns, device="cuda")
    got, want = (f(w, importance, group, 4) for f in (gptq.best_scales, reference_gptq.search_scales))
    assert float((got == want).float().mean()) > 0.999
