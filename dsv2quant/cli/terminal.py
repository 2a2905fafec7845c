"""What is shown: one JSON object on stdout; on stderr log lines, and progress, a bar on a terminal, now and then a line
anywhere else. Both tell the time even while nothing advances, so that work which stands still is told from a process
that does.

stdout and stderr take any text: what their encoding lacks is spelled in ASCII, and never an error.
"""

from __future__ import annotations

import codecs
import io
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import click

from dsv2quant.errors import printable
from dsv2quant.progress import Progress

T = TypeVar("T")
REDRAW = 1.0  # seconds between two states of a bar
LINE_EVERY = 10.0  # seconds between two lines, where stderr is no terminal
_COUNTED = "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt}, {rate_fmt}, {elapsed} gone, {remaining} left"
_UNCOUNTED = "{desc}: {elapsed}"


def set_verbosity(verbose: int, quiet: bool) -> None:
    """What is logged: warnings, or more or less."""
    if verbose and quiet:
        raise click.UsageError("--verbose and --quiet exclude each other")
    levels = [logging.WARNING, logging.INFO, logging.DEBUG]
    logging.getLogger("dsv2quant").setLevel(logging.ERROR if quiet else levels[min(verbose, 2)])


def show(found: T, to_json: Callable[[T], Mapping[str, Any]], to_text: Callable[[T], str], as_json: bool) -> None:
    """Print what a verb found."""
    if as_json:
        print_json(to_json(found))
    else:
        print(to_text(found))


def print_json(value: Mapping[str, Any]) -> None:
    """One object on one line. JSON has no NaN or infinity: a number that is none prints as null."""
    line = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a terminal of few letters, or a path that is not UTF-8: JSON can spell both
        line = json.dumps(_finite(value), allow_nan=False)
    print(line)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Lines(logging.Formatter):
    """Log lines that can be printed, whatever they name."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class AboveBars(logging.StreamHandler):
    """Writes log lines to stderr, above the progress bar that may be open: it is drawn again afterwards."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")  # without it no bar is open
        with tqdm.tqdm.external_write_mode(sys.stderr) if tqdm else nullcontext():
            super().emit(record)


def progress(quiet: bool) -> Progress:
    """Bars on stderr for the library's long work."""
    return lambda total, unit, label: progress_bar(total, unit, label, quiet)


@contextmanager
def logging_shown() -> Iterator[None]:
    """Log lines go to stderr in here."""
    handler = AboveBars(sys.stderr)
    handler.setFormatter(Lines("%(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


@contextmanager
def progress_bar(total: int, unit: str, label: str, quiet: bool) -> Iterator[Callable[[int], object]]:
    """Progress with rate and time left; yields the function that advances it. Of work that can't be counted, `total` 0,
    it shows the time gone."""
    if quiet or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield lambda amount: None
    elif sys.stderr.isatty():
        with _bar(total, unit, label) as advance:
            yield advance
    else:
        with _lines(total, unit, label) as advance:
            yield advance


@contextmanager
def _bar(total: int, unit: str, label: str) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    uncounted: dict[str, Any] = {} if total else {"bar_format": _UNCOUNTED, "leave": False}
    with tqdm(
        total=total or None, unit=unit, unit_scale=True, desc=label, delay=0.3, file=sys.stderr, **uncounted
    ) as bar, _every(REDRAW, bar.refresh):  # fmt: skip
        yield bar.update


@contextmanager
def _lines(total: int, unit: str, label: str) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    began, done = time.monotonic(), 0
    lock = threading.Lock()

    def advance(amount: int) -> None:
        nonlocal done
        with lock:
            done += amount

    def say() -> None:
        shown = tqdm.format_meter(
            done, total, time.monotonic() - began, unit=unit, unit_scale=True, prefix=label,
            bar_format=_COUNTED if total else _UNCOUNTED,
        )  # fmt: skip
        print(shown + "\n", end="", file=sys.stderr, flush=True)  # in one piece

    with _every(LINE_EVERY, say):
        yield advance


@contextmanager
def _every(seconds: float, call: Callable[[], object]) -> Iterator[None]:
    """Call something again and again, from a thread of its own."""
    over = threading.Event()

    def loop() -> None:
        while not over.wait(seconds):
            call()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


_SPELLED = {"→": "->", "×": "x", "±": "+-", "−": "-", "…": "...", "·": "*", "“": '"', "”": '"', "’": "'"}
_ERRORS = "dsv2quant.spell"


def take_any_text() -> None:
    """Of stdout and stderr, where they are streams of bytes."""
    codecs.register_error(_ERRORS, _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_SPELLED.get(c, "?") for c in error.object[error.start : error.end]), error.end
