"""GPTQ's loops: Triton's kernels by its interpreter and as code for Hopper, and the CPU's, against their references.
tests/gpu has the kernels on a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gptq_cases import BLOCKS, SEARCHES, block, random, search_faults
from test_gptq import SHAPES, problem
from triton_tools import Compiled, compile_for_hopper, interpreted, sass

from dsv2quant.calib import gptq
from dsv2quant.kernels import gptq as kernels
from dsv2quant.kernels import reference_gptq


@pytest.fixture(scope="module")
def faults() -> dict[str, dict[str, list[str]]]:
    return interpreted("gptq_interpreted.py")


@pytest.mark.parametrize(("operation", "cases"), [("quantize_block", BLOCKS), ("search_scales", SEARCHES)])
def test_interpreted_kernels_compute_what_their_references_do(operation: str, cases: list, faults: dict) -> None:
    assert faults[operation] == {str(case): [] for case in cases}


@pytest.fixture(scope="module")
def quantize_block(tmp_path_factory: pytest.TempPathFactory) -> tuple[Compiled, list[str]]:
    types = {"w": "*fp32", "scales": "*fp32", "group": "*i64", "u": "*fp32", "codes": "*i8", "errors": "*fp32"}
    constants = {"LOW": -8, "HIGH": 7, "ROWS": kernels.ROWS, "WIDTH": 64}
    cubin, aligned = tmp_path_factory.mktemp("cubin") / "block", ("begin", "width", "columns", "groups")
    made = compile_for_hopper(kernels._quantize_kernel, types, constants, cubin, aligned, **kernels.EXACT)
    return made, sass(cubin)


def test_the_compiled_loop_spills_nothing_and_is_not_unrolled(quantize_block: tuple[Compiled, list[str]]) -> None:
    made, code = quantize_block
    assert (made.resources["STACK"], made.resources["LOCAL"]) == (0, 0)
    assert made.resources["REG"] <= 128  # so that 16 warps fit a multiprocessor
    assert len(code) < 1500


def test_the_compiled_loop_rounds_every_operation(quantize_block: tuple[Compiled, list[str]]) -> None:
    made, _ = quantize_block
    assert made.ptx.count("div.rn.f32") >= 2
    assert "div.full" not in made.ptx
    assert "fma" not in made.ptx


@pytest.mark.parametrize("tile", [32, 64])
def test_the_compiled_search_spills_nothing(tile: int, tmp_path: Path) -> None:
    types = dict.fromkeys(("w", "importance", "factors", "best"), "*fp32")
    constants = {"LOW": -8, "HIGH": 7, "CANDIDATES": 64, "TILE": tile}
    made = compile_for_hopper(kernels._search_kernel, types, constants, tmp_path / "search", ("columns", "group"))
    assert (made.resources["STACK"], made.resources["LOCAL"]) == (0, 0)
    assert made.resources["REG"] <= 128


def loop(weight: torch.Tensor, scales: torch.Tensor, factored: gptq.Factor, bits: int) -> torch.Tensor:
    """`gptq.quantize` by the reference of its loop, and where it calls no other."""
    batch, _, columns = weight.shape
    w = torch.stack([weight[i][:, factored.order[i]] for i in range(batch)])
    group, codes = factored.order // (columns // scales.shape[2]), torch.empty_like(w, dtype=torch.int8)
    for begin in range(0, columns, gptq.BLOCK):
        end = min(begin + gptq.BLOCK, columns)
        u = factored.u[:, begin:end]
        errors = reference_gptq.quantize_block(w, scales.to(w.dtype), group, u[:, :, begin:end], codes, begin, bits)
        w[:, :, end:] -= errors @ u[:, :, end:]
    return torch.stack([codes[i][:, factored.order[i].argsort()] for i in range(batch)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 130, 200, 40)])  # the last of rows in several tiles
def test_the_cpus_codes_are_the_references(
    shape: tuple[int, int, int, int], bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, rows, columns, group = shape
    w, h = (x.to(dtype) for x in problem(batch, rows, columns))
    factored = gptq.factor(h)
    scales = gptq.best_scales(w, h.diagonal(dim1=1, dim2=2), group, bits)
    want = loop(w, scales, factored, bits)
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        assert torch.equal(gptq.quantize(w, scales, factored, bits), want)


@pytest.mark.parametrize("case", BLOCKS)
def test_the_cpus_block_is_the_references(case: tuple[int, ...]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    batch, rows, columns, group, begin, width, bits = case
    given = block(batch, rows, columns, columns // group, width, bits)
    codes = [torch.full((batch, rows, columns), 99, dtype=torch.int8) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        errors = gptq._quantize_block(*given, codes[0], begin, bits, threads.map)
    assert torch.equal(errors, reference_gptq.quantize_block(*given, codes[1], begin, bits))
    assert torch.equal(*codes)


@pytest.mark.parametrize("case", [*SEARCHES, (2, 150, 64, 32, 4)])
def test_the_cpus_search_finds_the_best(case: tuple[int, ...]) -> None:
    assert search_faults(*case, "cpu", gptq.best_scales) == []


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("w", torch.zeros(2, 4, 8, dtype=torch.float64), r"w is torch.float64, \(2, 4, 8\); need torch.float32"),
        ("scales", torch.zeros(2, 3, 2), r"scales is torch.float32, \(2, 3, 2\); need torch.float32, \(2, 4, 2\)"),
        ("group", torch.zeros(2, 8, dtype=torch.int32), "group is torch.int32"),
        ("u", torch.zeros(2, 4, 4).mT[:, :, :3], r"u is torch.float32, \(2, 4, 3\); need torch.float32, \(2, 3, 3\)"),
        ("codes", torch.zeros(2, 8, 4, dtype=torch.int8).mT, r"codes is .*contiguous"),
        ("begin", 5, "4 columns from 5: there are 8"),
    ],
)  # fmt: skip
def test_blocks_that_do_not_fit_are_refused(name: str, wrong: object, message: str) -> None:
    w, scales, group, u = block(2, 4, 8, 2, 4, 4)
    given = {"w": w, "scales": scales, "group": group, "u": u, "codes": torch.zeros(2, 4, 8, dtype=torch.int8)}
    with pytest.raises(ValueError, match=message):
        kernels.quantize_block(**given | {"begin": 0, "bits": 4, name: wrong})


def test_searches_that_do_not_fit_are_refused() -> None:
    w = random(2, 4, 8, seed=0)
    with pytest.raises(ValueError, match=r"importance is torch.float32, \(8,\); need torch.float32, \(2, 8\)"):
        kernels.search_scales(w, torch.ones(8), 4, 4)
    with pytest.raises(ValueError, match="8 columns are not whole groups of 3"):
        kernels.search_scales(w, torch.ones(2, 8), 3, 4)
