"""Calibration by threads: the bytes of one, however many there are, and items in their order."""

from __future__ import annotations

import platform
import resource
import threading
from collections.abc import Iterator

import pytest
import tiny
import torch
from calibrated import calibration, planned, run
from test_convert import contents

from dsv2quant.calib import hidden
from dsv2quant.calib.threads import in_turn, kept_heap


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_leaves_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(hidden, "ROWS", 128)  # several lanes
    model = tiny.write_checkpoint(tmp_path / "model", tiny.GROUPED)
    made = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        run(planned(model), tmp_path / str(count), calibration())
        made.append(contents(tmp_path / str(count)))
    assert made[0] == made[1] == made[2]


@pytest.mark.usefixtures("threads")
def test_items_come_in_turn_from_threads_that_compute_alone():
    torch.set_num_threads(2)
    second = threading.Event()

    def do(item: int) -> tuple[int, int, bool]:
        if item == 0:
            assert second.wait(60)  # which another thread sets meanwhile
        elif item == 1:
            second.set()
        return item, torch.get_num_threads(), torch.is_inference_mode_enabled()

    assert list(in_turn(2, do, range(5))) == [(item, 1, True) for item in range(5)]
    assert torch.get_num_threads() == 2


def test_what_fails_in_a_thread_fails_at_its_item():
    def do(item: int) -> int:
        if item == 2:
            raise ValueError("no more")
        return item

    made = in_turn(2, do, range(9))
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(ValueError, match="no more"):
        next(made)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_is_freed_meanwhile_is_taken_again_without_the_kernel():
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            held = [torch.ones(4 << 20) for _ in range(12)]  # 16 MiB each
            del held
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with kept_heap():
        faults()
        kept = faults()
    assert 10 * kept < faults()
