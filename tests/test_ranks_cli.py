"""The command on several ranks: who prints, and how all end when one does."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
from ranked import Ended, commands

from dsv2quant.cli import ranks
from dsv2quant.cli.ranks import Place, place

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = tiny.MINI.parent.parent / "LICENSE"
WORDS = ("--text", TEXT, "--ctx", 32, "--limit", 6, "--batch", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "model", tiny.LITE | {"vocab_size": 4096})


def killed() -> None:
    """This process is killed when it would run a model."""
    _signalled(signal.SIGKILL)


def terminated() -> None:
    """This process is asked to end when it would run a model."""
    _signalled(signal.SIGTERM)


def _signalled(number: int) -> None:
    from dsv2quant.evaluation import measure

    def run_model(*args: Any) -> None:
        os.kill(os.getpid(), number)

    measure.run_model = run_model


def impatient() -> None:
    """This process waits shortly for what rank 0 finds."""
    ranks.GRACE = 0.2


def test_rank_0_alone_prints_what_one_process_does(model, cli):
    words = ("eval-ppl", model, "--reference", model, *WORDS)
    first, second = commands(*[(*words, "--json", "--max-kld", 1)] * 2)
    alone = json.loads(cli(*words, "--json", "--max-kld", 1).out)
    assert json.loads(first.out) | {"seconds": 0} == alone | {"seconds": 0}
    assert second == Ended(0, "", "")
    first, second = commands(*[(*words, "--max-kld", -1, "-q")] * 2)  # all ranks know of the gate
    assert first.err.startswith("error: mean KLD")
    assert first.err.count("\n") == 1
    assert first.code == 4
    assert second == Ended(4, "", "")


def test_what_all_find_wrong_rank_0_says(tmp_path):
    first, *others = commands(*[("eval-ppl", tmp_path / "none", "-q")] * 3)
    assert (first.code, first.out, first.err.count("\n")) == (3, "", 1)
    assert first.err.startswith(f"error: {tmp_path / 'none'}: no such folder")
    assert others == [Ended(3, "", "")] * 2


def test_what_one_rank_finds_wrong_it_says_itself(model, tmp_path):
    words = [("eval-ppl", folder, *WORDS, "-q") for folder in (model, tmp_path / "none", model)]
    first, second, third = commands(*words, before={1: impatient})
    assert (second.code, second.err.count("\n")) == (3, 1)
    assert second.err.startswith(f"rank 1: error: {tmp_path / 'none'}: no such folder")
    assert first == third == Ended(3, "", "")


def test_a_rank_that_is_killed_ends_all_with_one_line(model):
    first, second, third = commands(*[("eval-ppl", model, *WORDS, "-q")] * 3, before={1: killed})
    assert second == Ended(-signal.SIGKILL, "", "")
    assert (first.code, first.err.count("\n")) == (3, 1)
    assert first.err.startswith("error: another rank has ended or can't be reached")
    assert third == Ended(3, "", "")


def test_where_rank_0_is_asked_to_end_the_others_end_silently(model):
    first, second = commands(*[("eval-ppl", model, *WORDS, "-q")] * 2, before={0: terminated})
    assert first == Ended(128 + signal.SIGTERM, "", "terminated\n")
    assert second == Ended(128 + signal.SIGTERM, "", "")


def test_verbs_of_one_process_are_refused(tmp_path):
    first, second = commands(*[("verify", tmp_path)] * 2)
    line = "error: verify runs in one process (torchrun is for calibrate, convert, eval-ppl, search)\n"
    assert first == Ended(2, "", line)
    assert second == Ended(2, "", "")
    first, second = commands(*[("eval-ppl",)] * 2)  # refused while options are read
    assert "Missing argument 'MODEL'" in first.err
    assert second == Ended(2, "", "")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "host"}, Place(1, 0, 3)),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "host"}, None),
        ({"RANK": "1", "LOCAL_RANK": "", "WORLD_SIZE": "3", "MASTER_ADDR": "host"}, None),
        ({"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}, None),
        ({}, None),
    ],
)
def test_what_torchrun_left_in_the_environment(environment, expected, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert place() == expected
