"""Statistics and calibrated artifacts of several ranks: the bytes of one, also where a run was killed before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from ranked import Ended, commands

from dsv2quant.calib import hidden
from dsv2quant.cli import ranks

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = tiny.WORDY | {"num_hidden_layers": 3}
WORDS = ("--num-calibration-samples", 7, "--max-seq-length", 64, "-q", "--calibration")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "model", MODEL)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough for seven windows."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"The {n} quick brown foxes jump over {n * n} lazy dogs.\n" for n in range(200)))
    return path


def short_batches() -> None:
    """Two windows go through a layer at once: of seven the last has a batch of its own."""
    hidden.ROWS = 128


def impatient() -> None:
    """And this rank waits shortly for what rank 0, which was killed, may say."""
    short_batches()
    ranks.GRACE = 0.2


def killed_at(layer: int) -> None:
    from dsv2quant.calib import collect

    measured = collect._measured

    def killing(layer_: Any, at: str, *args: Any) -> Any:
        if at == f"model.layers.{layer}":
            os.kill(os.getpid(), signal.SIGKILL)
        return measured(layer_, at, *args)

    short_batches()
    collect._measured = killing


def killed_at_1() -> None:
    killed_at(1)


def killed_at_2() -> None:
    killed_at(2)


def run(size: int, *words: object, **before: Any) -> list[Ended]:
    """The same on each of some ranks."""
    hooks = dict.fromkeys(range(size), short_batches)
    return commands(*[words] * size, before=hooks | {int(rank[1:]): hook for rank, hook in before.items()})


def files(folder: Path) -> dict[str, bytes]:
    """A folder's files, but for what differs from run to run."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_statistics_of_several_ranks_have_the_bytes_of_one(model, text, tmp_path):
    words = ("calibrate", model, *WORDS, text, "-o")
    for size in (1, 2, 3):
        ended = run(size, *words, tmp_path / f"{size}", "--imatrix", tmp_path / f"{size}.gguf")
        assert ended == [Ended(0, "", "")] * size
    expected, imatrix = (tmp_path / "1").read_bytes(), (tmp_path / "1.gguf").read_bytes()
    for size in (2, 3):
        assert (tmp_path / f"{size}").read_bytes() == expected
        assert (tmp_path / f"{size}.gguf").read_bytes() == imatrix
    assert run(2, *words, tmp_path / "1") == [Ended(0, "", "")] * 2  # there already: the others have nothing to do


@pytest.mark.parametrize(("dead", "before"), [(0, (killed_at_1, impatient)), (1, (short_batches, killed_at_2))])
def test_statistics_that_a_kill_left_are_continued_by_other_ranks(dead, before, model, text, tmp_path):
    words = ("calibrate", model, *WORDS, text, "-o")
    run(1, *words, tmp_path / "whole")
    ended = run(2, *words, tmp_path / "stats", _0=before[0], _1=before[1])
    assert ended[dead].code == -signal.SIGKILL
    assert ended[1 - dead].code == 3
    assert "another rank has ended" in ended[1 - dead].err
    kept = len(list((tmp_path / "stats.work" / "layers").glob("layer-*.safetensors")))
    assert kept in (dead, 1 + dead)  # a layer is written while the next is gone through
    assert run(3, *words, tmp_path / "stats") == [Ended(0, "", "")] * 3
    assert (tmp_path / "stats").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "stats.work").exists()


def test_what_several_ranks_began_one_finishes(model, text, tmp_path):
    words = ("calibrate", model, *WORDS, text, "-o")
    run(1, *words, tmp_path / "whole")
    run(2, *words, tmp_path / "stats", _0=killed_at_2, _1=impatient)
    assert (tmp_path / "stats.work").exists()
    assert run(1, *words, tmp_path / "stats") == [Ended(0, "", "")]
    assert (tmp_path / "stats").read_bytes() == (tmp_path / "whole").read_bytes()


def test_artifacts_of_several_ranks_have_the_bytes_of_one(model, text, tmp_path):
    mixed = tmp_path / "mixed.yaml"
    mixed.write_text(
        "name: mixed\nrules:\n- {roles: [embed, lm_head, router, norm, bias, kv_b_proj], scheme: bf16}\n"
        "- {roles: ['routed.*'], scheme: int4-g32, method: gptq}\n- {roles: ['*'], scheme: fp8-static}\n"
    )
    words = ("convert", model, "--recipe", mixed, "--kv-scales", "--target", "vllm", *WORDS, text, "-o")
    for size in (1, 2):
        ended = run(size, *words, tmp_path / f"{size}")
        assert [rank.code for rank in ended] == [0] * size, ended[0].err
    assert files(tmp_path / "2") == files(tmp_path / "1")
    assert [ended.code for ended in run(2, *words, tmp_path / "2")] == [0, 0]  # all is there


def test_what_is_not_shared_out_is_refused(tmp_path):
    nothing = "2 ranks share out what is calibrated, and nothing of this recipe calibrates here"
    for words, name, line in (
        (("--fp8",), "out", nothing),
        (("--gguf", "Q8_0"), "out.gguf", nothing),
        (("--int4", "--dry-run"), "out", "--dry-run is for one process"),
    ):
        first, second = run(2, "convert", tiny.MINI, *words, "-q", "-o", tmp_path / name)
        assert first == Ended(2, "", f"error: {line} (run it without torchrun)\n")
        assert second == Ended(2, "", "")
    assert list(tmp_path.iterdir()) == []


def test_torchrun(model, text, tmp_path):
    """The real one, of which the tests above have the environment."""
    words = ["eval-ppl", model, "--text", text, "--ctx", 32, "--limit", 4, "--batch", 2, "--json", "-q"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dsv2quant"]
    done = subprocess.run([*torchrun, *map(str, words)], capture_output=True, text=True, check=True)
    (alone,) = commands(words)
    assert json.loads(done.stdout) | {"seconds": 0} == json.loads(alone.out) | {"seconds": 0}
