"""Evaluation on several ranks: the numbers of one, to the last bit."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny
from ranked import on_ranks

import dsv2quant as dq
from dsv2quant.calib.distributed import ALONE, Ranks
from dsv2quant.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = tiny.MINI.parent.parent / "LICENSE"
SCORED: dict[str, Any] = {"text": TEXT, "ctx": 32, "limit": 11}
# Batches of which the last is shorter; of one window, whose noise floor runs all together; other positions.
ASKED: list[dict[str, Any]] = [{"batch": 2}, {"batch": 1}, {"batch": 3, "protocol": "llama.cpp", "dtype": "bfloat16"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, an artifact of it, and its kept reference."""
    folder = tmp_path_factory.mktemp("models")
    wide = tiny.write_checkpoint(folder / "wide", tiny.LITE | {"vocab_size": 4096})
    dq.convert(wide, folder / "out", scheme="fp8-channel", targets=("vllm",))
    dq.evaluate(wide, save_reference=folder / "kept", batch=2, **SCORED)
    return wide, folder / "out", folder / "kept"


def evaluations(ranks: Ranks, models: tuple[Path, Path, Path]) -> list[dict[str, Any]]:
    wide, out, kept = models
    found = [dq.evaluate(out, reference=wide, ranks=ranks, **SCORED, **asked) for asked in ASKED]
    found.append(dq.evaluate(out, reference=kept, batch=2, ranks=ranks, **SCORED))
    found.append(dq.evaluate(out, batch=2, ranks=ranks, **SCORED))
    return [asdict(each) | {"seconds": 0} for each in found]


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_finds_what_one_does(size: int, models: tuple[Path, Path, Path]) -> None:
    alone = evaluations(ALONE, models)
    assert alone[0]["comparison"]["kld"]["mean"] > 0
    assert not math.isnan(alone[1]["comparison"]["noise_floor"]["kld_other_batch"])
    for found in on_ranks(size, evaluations, models):
        assert found == alone


def test_more_ranks_than_batches_are_refused(models: tuple[Path, Path, Path]) -> None:
    with pytest.raises(UsageError, match=r"4 ranks for 3 batches of windows \(start 3 at most"):
        dq.evaluate(models[1], batch=4, ranks=Ranks(3, 4), **SCORED)


def test_a_reference_is_kept_by_one_rank(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one process makes the file"):
        dq.evaluate(models[0], save_reference=tmp_path / "kept", ranks=Ranks(0, 2), **SCORED)
