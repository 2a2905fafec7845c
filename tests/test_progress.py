"""Progress: every verb's phases have names of their own and add up to what they announced; bars tell the time."""

from __future__ import annotations

import io
import logging
import threading
from contextlib import contextmanager

import pytest
from tqdm import tqdm

from dsv2quant.cli import terminal as display
from dsv2quant.cli.terminal import AboveBars


@pytest.fixture
def phases(monkeypatch):
    """[label, total, what it advanced by] of every phase of the commands that run."""
    found: list[list] = []

    @contextmanager
    def recorded(total, unit, label, quiet):
        phase = [label, total, []]
        found.append(phase)
        yield phase[2].append

    monkeypatch.setattr(display, "progress_bar", recorded)
    return found


FEW = "--num-calibration-samples 4 --max-seq-length 32"
COMMANDS = {
    "convert {model} --fp8=channel -o {out}": ["convert"],
    "convert {model} --int4=pure --group-size 32 --calibration {text} -o {out} " + FEW: ["gptq", "convert"],
    "calibrate {model} --calibration {text} -o {out}.safetensors " + FEW: ["calibrate"],
    "eval-ppl {model} --reference {model} --text {text} --ctx 32 --limit 2": [
        "load wordy",
        "wordy",
        "reference wordy",
        "compare",
        "noise floor",
        "compare noise",
    ],
    "generate {model} --prompt The --max-new-tokens 2": ["load wordy"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_phases_add_up_to_what_they_announced(command, wordy, fox, tmp_path, cli, phases):
    ran = cli(*command.format(model=wordy, text=fox, out=tmp_path / "out").split())
    assert ran.code == 0, ran.err
    assert set(COMMANDS[command]) <= {label for label, _, _ in phases}
    for label, total, advances in phases:
        if total:
            assert sum(advances) == total, label
        if label == "gptq":  # solving is counted, matrix by matrix
            assert len(advances) > 6


class Screen(io.StringIO):
    """stderr that says when something was written to it."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal, self.written = terminal, threading.Event()

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.written.set()
        return super().write(text)


def test_off_a_terminal_a_line_now_and_then_tells_where_it_is(monkeypatch):
    screen = Screen(terminal=False)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(display, "LINE_EVERY", 0.01)
    with display.progress_bar(4000, "B", "convert", quiet=False) as advance:
        advance(1000)
        assert screen.written.wait(60)
    shown = screen.getvalue()
    assert shown.startswith("convert: 25%, 1.00k of 4.00k, ")
    assert "\r" not in shown
    assert "left" in shown
    assert shown.endswith("\n")


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("total", [0, 4000])
def test_time_goes_on_while_nothing_advances(monkeypatch, terminal, total):
    screen = Screen(terminal)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(display, "LINE_EVERY", 0.01)
    monkeypatch.setattr(display, "REDRAW", 0.01)
    with display.progress_bar(total, "B", "solve", quiet=False):
        assert screen.written.wait(60)
        screen.written.clear()
        assert screen.written.wait(60)
    assert "solve" in screen.getvalue()


def test_short_work_says_nothing_off_a_terminal(monkeypatch):
    screen = Screen(terminal=False)
    monkeypatch.setattr("sys.stderr", screen)
    with display.progress_bar(10, "B", "convert", quiet=False) as advance:
        advance(10)
    assert screen.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_log_line_does_not_break_the_bar(terminal, monkeypatch):
    """On a terminal the bar's line is cleared before it, and the bar drawn again below."""
    screen = Screen(terminal)
    monkeypatch.setattr("sys.stderr", screen)
    handler = AboveBars(screen)
    with display.progress_bar(4000, "B", "convert", quiet=False):
        bar = next(iter(tqdm._instances), None)
        assert (bar is not None) == terminal
        if bar is not None:
            bar.delay = 0
            bar.refresh()
        handler.emit(logging.makeLogRecord({"msg": "compiling"}))
        shown = screen.getvalue()
    assert "compiling\n" in shown
    before, after = shown.split("compiling\n")
    assert before == "" or before.endswith(" \r")
    assert after.startswith("\rconvert:") if terminal else after == ""
