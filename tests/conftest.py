"""Fixtures that several test files share."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run the command in this process: `cli("plan", folder)` → exit code, stdout, stderr."""
    from dsv2quant.cli.main import main

    def run(*args: object) -> Ran:
        monkeypatch.setattr("sys.argv", ["dsv2quant", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        logging.getLogger("dsv2quant").setLevel(logging.NOTSET)  # -q is of this command alone
        return Ran(int(exit_.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny V2-Lite-like checkpoint."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("lite") / "lite", tiny.LITE)


@pytest.fixture(scope="session")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with V2-Lite's true awkward widths, in two shards."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("awkward") / "awkward", tiny.AWKWARD, shards=2)


@pytest.fixture(scope="session")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny V2-Lite-like checkpoint, with columns that groups of 32 fit."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("grouped") / "grouped", tiny.GROUPED)


@pytest.fixture(scope="session")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that dsv2-mini's tokenizer fits, trained for 32 tokens."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("wordy") / "wordy", tiny.WORDY)


@pytest.fixture(scope="session")
def fox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to calibrate `wordy` on: `fox.txt`."""
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("".join(f"The quick brown fox jumps over {i} lazy dogs, once more.\n" for i in range(100)))
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, which waits for its turn on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def in_float32() -> Iterator[None]:
    """Calibration as on a CPU that doesn't multiply BF16 in hardware."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("model.load", "calib.gptq"):
            patch.setattr(f"dsv2quant.{module}.multiplies_bf16", lambda: False)
        yield


@pytest.fixture
def one_library(monkeypatch) -> None:
    """Products and attention by what torch's own modules ask, as a consumer on this CPU computes them: two libraries
    differ in last places, and where activations are quantized a code that falls the other way for it moves what
    follows by far more."""
    from dsv2quant.model import attention

    monkeypatch.setattr("dsv2quant.kernels.reference.product", torch.nn.functional.linear)
    monkeypatch.setattr(attention, "_by_blocks", attention._at_once)
