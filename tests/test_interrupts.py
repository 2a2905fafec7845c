"""Ctrl-C, SIGTERM and SIGHUP: one line that says what happened, and one more where something is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import gguf_tiny
import pytest
import tiny

from dsv2quant.calib import collect
from dsv2quant.conversion import convert
from dsv2quant.conversion.sink import Sink
from dsv2quant.model.runtime import Model
from dsv2quant.storage import engine

pytestmark = pytest.mark.usefixtures("one_thread")
KEPT = "what is finished is kept; the same command continues there"
WAYS = [(None, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "terminated")]
ways = pytest.mark.parametrize(("number", "code", "word"), WAYS, ids=["ctrl-c", "term", "hup"])


@pytest.fixture(autouse=True)
def default_signals():
    """Whatever started the tests: one in the background ignores Ctrl-C, nohup SIGHUP."""
    defaults = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextmanager
def stopped(owner: object, name: str, number: signal.Signals | None, when=lambda *args: True):
    """In place of a call that fits, a signal comes, or Ctrl-C."""
    original = getattr(owner, name)

    def call(*args, **kwargs):
        if not when(*args):
            return original(*args, **kwargs)
        os.kill(os.getpid(), number or signal.SIGINT)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(owner, name, call)
        yield


def said(ran, caplog) -> list[str]:
    assert "continues" not in ran.err.replace(KEPT, "")
    return [*(message for message in caplog.messages if KEPT in message), ran.err.split()[-1]]


@ways
@pytest.mark.parametrize("verb", ["eval-ppl", "generate"])
def test_what_keeps_nothing_says_nothing_of_it(verb, number, code, word, wordy, fox, cli, caplog):
    options = {"eval-ppl": ("--text", fox, "--ctx", "16"), "generate": ("--prompt", "The")}[verb]
    with stopped(Model, "layers", number):
        ran = cli(verb, wordy, *options)
    assert ran.code == code
    assert said(ran, caplog) == [word]


def test_signals_are_as_before_in_the_end(wordy, cli):
    cli("inspect", wordy)
    assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


@ways
def test_convert_says_so_when_a_shard_is_kept(number, code, word, lite, tmp_path, cli, caplog):
    for owner, name, is_kept in ((engine._Writing, "drain", False), (convert, "_write_small_files", True)):
        out = tmp_path / name
        command = ("convert", lite, "--fp8=channel", "-o", out)
        with stopped(owner, name, number):
            ran = cli(*command)
        assert ran.code == code
        assert said(ran, caplog) == [f"{out}: {KEPT}"] * is_kept + [word]
        assert not (out / "config.json").exists()
        caplog.clear()
        assert cli(*command).code == 0


@ways
def test_gguf_says_so_when_a_tensor_is_kept(number, code, word, tmp_path, cli, caplog, monkeypatch):
    model = tiny.write_checkpoint(tmp_path / "odd", gguf_tiny.ODD, gguf_tiny.weights(gguf_tiny.ODD))
    out = tmp_path / "m.gguf"
    monkeypatch.setattr(engine, "RECORD_EVERY", 1)
    for owner, name, is_kept in ((engine._Writing, "__enter__", False), (Sink, "finish", True)):
        with stopped(owner, name, number):
            ran = cli("convert", model, "--gguf", "Q8_0", "-o", out)
        assert ran.code == code
        assert said(ran, caplog) == [f"{out}: {KEPT}"] * is_kept + [word]


@ways
@pytest.mark.parametrize("layer", [0, 1])
def test_calibrate_says_so_when_a_layer_is_kept(layer, number, code, word, wordy, fox, tmp_path, cli, caplog):
    out = tmp_path / "stats"
    command = ("calibrate", wordy, "--calibration", fox, "--num-calibration-samples", "2", "-o", out)
    with stopped(collect, "_measured", number, lambda layer_, at, *args: at == f"model.layers.{layer}"):
        ran = cli(*command)
    assert ran.code == code
    assert said(ran, caplog) == [f"{out}: {KEPT}"] * layer + [word]
    assert not out.exists()


def test_convert_says_it_once_while_it_measures(wordy, fox, tmp_path, cli, caplog):
    out = tmp_path / "out"
    command = (
        "convert",
        wordy,
        "--fp8=static",
        "--calibration",
        fox,
        "--num-calibration-samples",
        "2",
        "-o",
        out,
    )
    with stopped(collect, "_measured", None, lambda layer_, at, *args: at == "model.layers.1"):
        ran = cli(*command)
    assert said(ran, caplog) == [f"{out}: {KEPT}", "interrupted"]


def test_a_process_ends_with_the_signals_code_and_nohup_is_heeded(lite):
    program = (
        "import os, signal, sys; from dsv2quant.cli import main, inspect\n"
        "number = getattr(signal, sys.argv.pop())\n"
        "def stop(*args, **kwargs): os.kill(os.getpid(), number)\n"
        "from dsv2quant.checkpoint import open as opening; opening.open_checkpoint = stop\n"
        "main.main()"
    )
    for name, before, code in (("SIGTERM", None, 143), ("SIGHUP", None, 129), ("SIGHUP", "nohup", 1)):
        command = [*([before] if before else []), sys.executable, "-c", program, "inspect", str(lite), name]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
        assert ran.returncode == code
        assert ("terminated" in ran.stderr) == (before is None)


def test_a_signal_that_another_thread_gets_ends_what_the_main_one_waits_for(lite):
    program = (
        "import signal, sys, threading; from dsv2quant.cli import main\n"
        "number = getattr(signal, sys.argv.pop())\n"
        "never = threading.Condition()\n"
        "def get():\n"
        "  while not never._waiters: pass\n"
        "  signal.pthread_kill(threading.get_ident(), number)\n"
        "  threading.Event().wait()\n"
        "def stop(*args, **kwargs):\n"
        "  threading.Thread(target=get, daemon=True).start()\n"
        "  with never: never.wait()\n"
        "from dsv2quant.checkpoint import open as opening; opening.open_checkpoint = stop\n"
        "main.main()"
    )
    for name, code, word in (("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")):
        command = [sys.executable, "-c", program, "inspect", str(lite), name]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=60)
        assert (ran.returncode, ran.stderr.split()) == (code, [word])
