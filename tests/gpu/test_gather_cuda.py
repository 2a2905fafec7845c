"""Hidden states in the host's memory, of which a CUDA device takes batches and gathers rows. Skipped without one."""

from __future__ import annotations

import pytest
import torch
from gather_cases import CASES, faults

from dsv2quant.calib.hidden import Stream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("case", [*CASES, (50_000, 5120, 9_000)])
def test_rows_are_gathered(case: tuple[int, int, int], pinned: bool) -> None:
    assert faults(*case, "cuda", pinned=pinned) == []


def test_a_stream_in_the_hosts_memory_is_locked_as_large_as_it_is_and_gives_rows_out() -> None:
    stream = Stream(1000, 300, "cuda", "memory")
    values = torch.randn(1000, 300, device="cuda")
    stream[slice(0, 1000)] = values
    index = torch.randint(1000, (77,), device="cuda")
    assert torch.equal(stream[index], values[index])
    assert torch.equal(stream[slice(3, 9)], values[3:9])
    assert stream._rows.is_pinned()
    stream.add(torch.tensor([5, 7], device="cuda"), values[:2])
    assert torch.equal(stream[slice(5, 6)], values[5:6] + values[:1])
    rows = stream._rows
    stream.remove()
    assert not rows.is_pinned()
