"""Gathering rows: Triton's kernel by its interpreter and as code for Hopper. tests/gpu has it on a device, from the
host's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gather_cases import CASES
from triton_tools import compile_for_hopper, interpreted

from dsv2quant.kernels import gather


def test_the_interpreted_kernel_gathers_the_rows() -> None:
    assert interpreted("gather_interpreted.py") == {"gather_rows": {str(case): [] for case in CASES}}


def test_the_compiled_kernel_reads_16_bytes_at_once(tmp_path: Path) -> None:
    types = {"source": "*fp32", "index": "*i64", "out": "*fp32"}
    made = compile_for_hopper(gather._gather_kernel, types, {"PIECE": gather.PIECE}, tmp_path / "gather", ("columns",))
    assert "ld.global.v4" in made.ptx
    assert "st.global.v4" in made.ptx
    assert (made.resources["STACK"], made.resources["LOCAL"]) == (0, 0)


@pytest.mark.parametrize(
    ("source", "index", "what"),
    [
        (torch.zeros(4), torch.zeros(1, dtype=torch.int64), "source is"),
        (torch.zeros(4, 4).T[:, :2], torch.zeros(1, dtype=torch.int64), "source is"),
        (torch.zeros(4, 4), torch.zeros(1, dtype=torch.int32), "index is"),
        (torch.zeros(4, 4), torch.zeros(1, 1, dtype=torch.int64), "index is"),
    ],
)
def test_what_does_not_fit_is_refused(source: torch.Tensor, index: torch.Tensor, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        gather.gather_rows(source, index)
