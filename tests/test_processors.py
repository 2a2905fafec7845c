"""Threads are as many as the processors that a process may run on, not as the machine has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dsv2quant.storage import engine
from dsv2quant.storage.processors import processors


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no such shares")
def test_a_share_of_the_machines_processors_counts() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from dsv2quant.storage.processors import processors; print(processors())"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout == "1\n"


def test_a_conversion_has_a_worker_each_and_a_file_for_every_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 3, 5, 7}, raising=False)
    assert processors() == 4
    assert (engine.workers(), engine.lanes()) == (4, 2)


def test_where_the_system_has_no_shares_the_machines_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert processors() == 6
