"""The search on several ranks: the recipe and the artifact of one, also where a run was killed before."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
from ranked import Ended, commands

import dsv2quant as dq
from dsv2quant.allocation import measuring, space
from dsv2quant.calib import hidden
from dsv2quant.calib.distributed import Ranks
from dsv2quant.cli import ranks
from dsv2quant.errors import UsageError
from dsv2quant.formats.gguf import blocks

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("Q4_0", "Q4_1", "Q8_0")  # of which Q4_1 is predicted
SCHEMES = {"int4-g32": "gptq", "fp8-channel": "rtn", "bf16": "rtn"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "small", tiny.WORDY | {"q_lora_rank": 64})


def small(windows: Path, dead: int = 0) -> None:
    """Few candidates, four batches of windows and several passes; what was measured stays. A folder `windows` has how
    many this process had, and what it measured on them, until it is killed at the pass `dead`."""
    remove, measured, passes, models = shutil.rmtree, measuring.divergences, 0, 0

    def counted(reference: Any, others: Any) -> Any:
        nonlocal passes, models
        passes, models = passes + 1, models + len(others)
        if passes == dead:
            os.kill(os.getpid(), signal.SIGKILL)
        (windows / os.environ.get("RANK", "0")).write_text(f"{passes} {models} {len(reference.hidden)}")
        return measured(reference, others)

    space.LEFT_OUT = tuple(blocks.TYPES.keys() - {*KINDS})
    space.SCHEMES = SCHEMES
    space.WINDOWS, space.TOKENS_TOGETHER, hidden.ROWS, ranks.GRACE = 8, 64, 128, 0.2
    measuring.MEMORY = 1 << 20
    measuring.divergences = counted
    shutil.rmtree = lambda path, **options: str(path).endswith(".search") or remove(path, **options)


def run(size: int, windows: Path, *words: object, killed: dict[int, int] | None = None) -> list[Ended]:
    """The same on each of some ranks; some are `killed` at a pass."""
    windows.mkdir(exist_ok=True)
    hooks: dict[int, Callable[[], None]] = {
        rank: partial(small, windows, (killed or {}).get(rank, 0)) for rank in range(size)
    }
    return commands(*[(*words, "--max-seq-length", 32)] * size, before=hooks)


class Measured(NamedTuple):
    passes: int
    models: int
    windows: int


def measured_by(windows: Path) -> list[Measured]:
    """By each rank."""
    return [Measured(*map(int, path.read_text().split())) for path in sorted(windows.iterdir())]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def state(recipe: Path) -> bytes:
    return (recipe.parent / f"{recipe.name}.search" / "state").read_bytes()


@pytest.fixture(scope="module")
def found(
    model: Path, fox: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Measured, dict[str, Any]]:  # fmt: skip
    """A search of one process: its recipe, what it measured, and what it says."""
    folder = tmp_path_factory.mktemp("found")
    recipe = folder / "mix.yaml"
    words = ("search", model, "--gguf", "--bits", 7.5, "--calibration", fox, "--json", "-o", recipe)
    (ended,) = run(1, folder / "windows", *words)
    assert ended.code == 0, ended.err
    (measured,) = measured_by(folder / "windows")
    assert measured.windows == 8
    return recipe, measured, json.loads(ended.out)


@pytest.mark.parametrize("size", [2, 3])
def test_a_search_of_several_ranks_has_the_bytes_of_one(size, found, model, fox, tmp_path):
    recipe = tmp_path / "mix.yaml"
    words = ("search", model, "--gguf", "--bits", 7.5, "--calibration", fox, "--json", "-o", recipe)
    first, *others = run(size, tmp_path / "windows", *words)
    assert first.code == 0, first.err
    assert others == [Ended(0, "", "")] * (size - 1)
    assert json.loads(first.out) | {"recipe": "", "seconds": 0} == found[2] | {"recipe": "", "seconds": 0}
    assert recipe.read_bytes() == found[0].read_bytes()
    assert state(recipe) == state(found[0])
    by_rank = measured_by(tmp_path / "windows")
    assert [rank.windows for rank in by_rank] == [[4, 4], [4, 2, 2]][size - 2]
    assert {rank.models for rank in by_rank} == {found[1].models}
    assert {rank.passes < found[1].passes for rank in by_rank} == {True}  # of fewer windows more swaps go in one


@pytest.mark.parametrize("dead", [0, 1])
def test_what_was_measured_before_a_kill_is_not_measured_again(dead, found, model, fox, tmp_path):
    recipe = tmp_path / "mix.yaml"
    words = ("search", model, "--gguf", "--bits", 7.5, "--calibration", fox, "-q", "-o", recipe)
    ended = run(2, tmp_path / "killed", *words, killed={dead: 3})
    assert ended[dead].code == -signal.SIGKILL
    assert ended[1 - dead].code == 3
    assert ended[1 - dead].err.count("\n") == 1
    assert "another rank has ended" in ended[1 - dead].err
    kept = state(recipe)
    assert state(found[0]).startswith(kept)
    assert kept.count(b"\n") > 3
    lacking = state(found[0]).count(b"\n") - kept.count(b"\n")
    assert run(3, tmp_path / "again", *words) == [Ended(0, "", "")] * 3
    assert [rank.models for rank in measured_by(tmp_path / "again")] == [lacking] * 3
    assert state(recipe) == state(found[0])
    assert recipe.read_bytes() == found[0].read_bytes()


def test_a_conversion_within_a_budget_has_the_bytes_of_one(model, fox, tmp_path):
    """Of GPTQ's candidates, too: they are calibrated on all ranks, as the mix is."""
    words = ("convert", model, "--bits", 14.4, "--calibration", fox, "--num-calibration-samples", 24, "-q", "-o")
    for size in (1, 2):
        (tmp_path / f"{size}").mkdir()
        ended = run(size, tmp_path / f"windows{size}", *words, tmp_path / f"{size}" / "mix")
        assert ended == [Ended(0, "", "")] * size
        assert "scheme: int4-g32, method: gptq" in (tmp_path / f"{size}" / "mix.yaml").read_text()
    assert files(tmp_path / "2" / "mix") == files(tmp_path / "1" / "mix")
    assert (tmp_path / "2" / "mix.yaml").read_bytes() == (tmp_path / "1" / "mix.yaml").read_bytes()
    shutil.rmtree(tmp_path / "2" / "mix")
    again = run(2, tmp_path / "again", *words, tmp_path / "2" / "mix")
    assert again == [Ended(0, "", "")] * 2
    assert list((tmp_path / "again").iterdir()) == []  # the recipe is there: nothing is measured
    assert files(tmp_path / "2" / "mix") == files(tmp_path / "1" / "mix")


def test_a_file_within_a_budget_is_written_by_one_rank(found, model, fox, tmp_path):
    out = tmp_path / "mix.gguf"
    ended = run(2, tmp_path / "windows", "convert", model, "--bits", 7.5, "--calibration", fox, "-q", "-o", out)
    assert ended == [Ended(0, "", "")] * 2
    assert 0 < 8 * out.stat().st_size / dq.plan(model, gguf="Q8_0").parameters <= 7.5
    assert (tmp_path / "mix.gguf.yaml").read_text().replace("mix.gguf", "mix") == found[0].read_text()


def test_more_ranks_than_batches_are_refused_before_anything_is_made(model, fox, tmp_path):
    with pytest.raises(UsageError, match=r"2 ranks for 1 batches of windows \(start 1 at most, or take more tokens\)"):
        dq.search(model, tmp_path / "mix.yaml", bits=8, calibration=fox, length=32, ranks=Ranks(0, 2))
    assert list(tmp_path.iterdir()) == []
