"""Statistics, and what is made with them, killed and resumed; and on a full disk."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from calibrated import files, files_no_larger_than, killer
from test_convert import contents

from dsv2quant.calib.statistics import Statistics
from dsv2quant.errors import InputError
from dsv2quant.planning.smoothing import SMOOTHING_FILE

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOWS = ("--num-calibration-samples", "6", "--max-seq-length", "32", "-q", "--calibration")


def test_calibrate_killed_at_20_moments_and_resumed_gives_the_same_bytes(wordy, fox, tmp_path):
    def imatrix(out: Path) -> Path:
        return out.with_name(f"imatrix-{out.name}")

    def command(out: Path) -> list[str]:
        return ["calibrate", str(wordy), "-o", str(out), "--imatrix", str(imatrix(out)), *WINDOWS, str(fox)]

    with killer() as run_killed:
        run_killed(0, *command(tmp_path / "first"))  # counts changes of imports, too
        changes, status = run_killed(0, *command(tmp_path / "whole"))
        assert status == 0
        expected = (tmp_path / "whole").read_bytes()
        expected_imatrix = imatrix(tmp_path / "whole").read_bytes()
        unfinished = 0
        for n in sorted(random.Random(0).sample(range(1, changes + 1), min(20, changes))):
            out = tmp_path / f"stats-{n}"
            assert run_killed(n, *command(out)) == [-signal.SIGKILL]
            if out.exists():
                assert out.read_bytes() == expected
            else:
                unfinished += 1
                with pytest.raises(InputError, match="no such file"):
                    Statistics(out)
            if imatrix(out).exists():
                assert imatrix(out).read_bytes() == expected_imatrix
            assert run_killed(0, *command(out))[1] == 0
            assert out.read_bytes() == expected
            assert imatrix(out).read_bytes() == expected_imatrix
            assert not list(tmp_path.glob(f"*{out.name}.*"))
        assert unfinished > 10


def test_awq_killed_at_12_moments_and_resumed_gives_the_same_bytes(wordy, fox, tmp_path):
    def command(out: Path) -> list[str]:
        recipe = ("--int4=pure", "--method", "awq", "--group-size", "32", "--target", "transformers")
        return ["convert", str(wordy), *recipe, "-o", str(out), *WINDOWS, str(fox)]

    with killer() as run_killed:
        run_killed(0, *command(tmp_path / "first"))
        changes, status = run_killed(0, *command(tmp_path / "whole"))
        assert status == 0
        expected = contents(tmp_path / "whole")
        assert SMOOTHING_FILE in expected
        for n in sorted(random.Random(1).sample(range(1, changes + 1), 12)):
            out = tmp_path / f"out-{n}"
            assert run_killed(n, *command(out)) == [-signal.SIGKILL]
            left = files(out) if out.exists() else {}
            assert "config.json" not in left or expected.items() <= left.items()
            assert run_killed(0, *command(out))[1] == 0
            assert contents(out) == expected


def test_a_full_disk_ends_in_one_line_and_resumes(wordy, fox, tmp_path, cli):
    command = ("calibrate", wordy, "-o", tmp_path / "stats", *WINDOWS, fox)
    with files_no_larger_than(60_000):  # hidden states take 6 · 32 · 128 float32, 98 kB
        ran = cli(*command)
    assert ran.code == 3
    assert ran.err.startswith(f"error: {tmp_path / 'stats'}: can't be written: File too large (free space and run")
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "stats").exists()
    assert cli(*command).code == 0
    assert Statistics(tmp_path / "stats").tokens == 6 * 32
