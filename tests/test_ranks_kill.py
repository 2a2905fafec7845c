"""A calibrated conversion on two ranks, either of which is killed: the same command ends with the same bytes."""

from __future__ import annotations

import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
from ranked import Ended, commands

from dsv2quant.calib import hidden
from dsv2quant.calib.distributed import Ranks
from dsv2quant.cli import ranks

pytestmark = pytest.mark.usefixtures("one_thread")
TOGETHER = ("broadcast", "exchange", "send", "receive", "gather", "everywhere", "agreed")
CHANGES = ("write", "pwrite", "fsync", "rename", "replace", "unlink", "rmdir")
RECIPE = """
name: mixed
rules:
- {roles: [embed, lm_head, router, norm, bias, kv_b_proj], scheme: bf16}
- {roles: ['routed.*'], scheme: int4-g32, method: gptq}
- {roles: ['*'], scheme: fp8-static}
"""


def killed_at(moment: int, counts: Path) -> None:
    """This process is killed at so many calls to other ranks and changes of files; 0 never. A folder `counts` has how
    many there were."""
    hidden.ROWS, ranks.GRACE = 128, 0.2
    file = os.open(counts / os.environ["RANK"], os.O_WRONLY | os.O_CREAT)
    pwrite, passed = os.pwrite, 0

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal passed
            passed += 1
            if passed == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            if not moment:
                pwrite(file, b"%d" % passed, 0)
            return function(*args, **kwargs)

        return call

    for owner, names in ((Ranks, TOGETHER), (os, CHANGES)):
        for name in names:
            setattr(owner, name, counted(getattr(owner, name)))


def test_either_of_two_ranks_is_killed_at_10_moments_and_the_bytes_are_the_same(tmp_path):
    model = tiny.write_checkpoint(tmp_path / "model", tiny.WORDY)
    text, recipe = tmp_path / "text.txt", tmp_path / "mixed.yaml"
    text.write_text("".join(f"The {n} quick brown foxes jump over {n * n} lazy dogs.\n" for n in range(120)))
    recipe.write_text(RECIPE)

    def convert(name: str, *moments: int) -> list[Ended]:
        words = ("convert", model, "--recipe", recipe, "--target", "vllm", "--calibration", text, "-q")
        words += ("--num-calibration-samples", 4, "--max-seq-length", 64, "-o", tmp_path / name)
        return commands(
            *[words] * len(moments), before={r: partial(killed_at, n, tmp_path) for r, n in enumerate(moments)}
        )

    assert [ended.code for ended in convert("whole", 0, 0)] == [0, 0]
    counts = [int((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    chosen = random.Random(0)
    lines = 0
    for number in range(10):
        killed, moments = number % 2, [0, 0]
        moments[killed] = chosen.randint(1, counts[killed])
        ended = convert(f"out-{number}", *moments)
        assert ended[killed].code == -signal.SIGKILL
        lines += ended[1 - killed].err.count("error: another rank has ended")
        assert [done.code for done in convert(f"out-{number}", 0, 0)] == [0, 0]
        assert {path.name: path.read_bytes() for path in (tmp_path / f"out-{number}").iterdir()} == expected
    assert lines >= 5  # else most moments would be behind what ranks do together
