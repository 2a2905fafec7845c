"""An engine as a subprocess of its own Python, which runs a driver; drivers/exchange.py says what is exchanged."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from dsv2quant.checkpoint.checkpoint import Checkpoint, HfCheckpoint
from dsv2quant.engines.answers import Answer, Generated, Report, Request, Scores, asked_of
from dsv2quant.errors import InputError
from dsv2quant.progress import Progress
from dsv2quant.text.tokenizer import Windows

logger = logging.getLogger(__name__)
DRIVERS = Path(__file__).with_name("drivers")
PYTHON_ENGINES = tuple(sorted(path.name.removesuffix("_driver.py") for path in DRIVERS.glob("*_driver.py")))
POLL = 0.1  # seconds between looks at how far a program is


def ask(engine: str, python: str | None, model: Path, request: Request, progress: Progress) -> Answer:
    """Have an engine answer in the Python at `python`, or in this one's. Raises InputError where it fails, or answers
    what was not asked."""
    with exchange(engine, asked_of(model, request), request.windows.ids) as folder:
        ids, count = request.windows.ids, len(request.windows.ids)
        _check_space(folder, 4 * count * request.scored * request.vocabulary)
        run(engine, python, folder, len(ids) + len(request.prompts), progress)
        windows = request.windows
        if request.decode:
            decoded = _array(engine, folder / "decoded.npy", np.int64, (count, request.decode))
            windows = Windows(np.concatenate([ids, decoded], 1), ids.shape[1] - 1)
        logprobs = _array(engine, folder / "logprobs.npy", np.float32, (count, request.scored, request.vocabulary))
        return Answer(
            windows, Scores(logprobs), _report(engine, folder), _generated(engine, folder, len(request.prompts))
        )


def folder_of(checkpoint: Checkpoint) -> Path:
    """What an engine of Python's loads. Raises InputError for a GGUF file."""
    if not isinstance(checkpoint, HfCheckpoint):
        raise InputError("is a GGUF file", where=checkpoint.model, fix="those are llama.cpp's: --engine llama.cpp")
    return checkpoint.downloaded


def bench(
    engine: str, python: str | None, asked: dict[str, Any], prompts: np.ndarray, progress: Progress
) -> tuple[list[dict[str, Any]], Report]:
    """What an engine measures of itself, as request.json's `bench` asks, over prompts [batch, context], and its report.
    Raises as `ask`."""
    with exchange(engine, asked, prompts[:0]) as folder:
        np.save(folder / "bench.npy", np.ascontiguousarray(prompts, np.int64))
        run(engine, python, folder, 1, progress)
        return _json(engine, folder, "bench"), _report(engine, folder)


@contextmanager
def exchange(engine: str, asked: dict[str, Any], windows: np.ndarray) -> Iterator[Path]:
    """A folder with a driver's request. It is deleted afterwards; what is mapped of it stays readable."""
    with tempfile.TemporaryDirectory(prefix=f"dsv2quant-{engine}-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(asked))
        np.save(folder / "windows.npy", np.ascontiguousarray(windows, np.int64))
        yield folder


def run(engine: str, python: str | None, folder: Path, steps: int, progress: Progress) -> None:
    """Run a driver until it ends. Raises InputError where it fails."""
    command = [python or sys.executable, str(DRIVERS / f"{engine}_driver.py"), str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    log, done = folder / "log", folder / "progress"
    with ExitStack() as stack:
        try:
            process = stack.enter_context(started(command, log, environment))
        except OSError as error:
            fix = f"name the Python that {engine} is installed in"
            raise InputError(f"can't be run: {error.strerror}", where=f"--engine-python {python}", fix=fix) from None
        advance = stack.enter_context(progress(steps, "steps", engine))
        wait(process, lambda: done.stat().st_size if done.exists() else 0, advance)
    said = log.read_text(errors="replace")
    logger.debug("%s", said)
    if process.returncode:
        reason = folder / "reason"
        raise _failed(engine, python, reason.read_text() if reason.exists() else said, process.returncode)


@contextmanager
def started(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A program whose output goes to `log`. Neither it nor what it started outlives the block: an engine's workers
    would outlive a driver that dies."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait(process: subprocess.Popen[bytes], steps: Callable[[], int], advance: Callable[[int], object]) -> None:
    """Wait for a program's end; `steps` says how many are done."""
    done = 0
    while process.poll() is None:
        time.sleep(POLL)
        now = steps()
        if now > done:
            advance(now - done)
            done = now


def _failed(engine: str, python: str | None, said: str, code: int) -> InputError:
    *_, last = (f"exit code {code}", *(line.strip() for line in said.splitlines() if line.strip()))
    if f"No module named '{engine}'" in last:
        what = f"{python or sys.executable} has no {engine}"
        return InputError(what, fix="give --engine-python, the Python that it is installed in")
    if code < 0:
        last = f"was ended by {signal.Signals(-code).name}: {last}"
    return InputError(f"{engine} failed: {last[:300]}", fix="-vv shows all that it said")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        what = f"{needed:,} bytes of distributions don't fit, {free:,} are free"
        raise InputError(what, where=folder.parent, fix="score fewer --windows, or set TMPDIR to a larger disk")


def _array(engine: str, path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
    """An array that must be so, memory-mapped, without NaN."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _unasked(engine, f"{path.name} can't be read: {error}") from None
    if found.dtype != dtype or found.shape != shape:
        raise _unasked(engine, f"{path.name} is {found.dtype} {list(found.shape)}, not {dtype.__name__} {list(shape)}")
    if any(np.isnan(window).any() for window in found):
        raise InputError(f"{engine}'s log-probabilities are NaN", fix="it overflows: try another --dtype")
    return found


def _report(engine: str, folder: Path) -> Report:
    match found := _json(engine, folder, "report"):
        case {"versions": dict(versions), "kernels": dict(kernels), "attention": attention, "kv_cache": cache,
              "device": str(device)}:  # fmt: skip
            return Report(versions, kernels, attention, cache, device, found.get("settings", {}))
    raise _unasked(engine, "report.json lacks a key")


def _generated(engine: str, folder: Path, count: int) -> list[Generated]:
    found = _json(engine, folder, "generated") if count else []
    if len(found) != count:
        raise _unasked(engine, f"{len(found)} completions of {count} prompts")
    return [Generated(**each) for each in found]


def _json(engine: str, folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / f"{name}.json").read_text())
    except (OSError, ValueError) as error:
        raise _unasked(engine, f"{name}.json: {error}") from None


def _unasked(engine: str, what: str) -> InputError:
    return InputError(f"{engine}'s driver answered what was not asked: {what}", fix="-vv shows all that it said")
