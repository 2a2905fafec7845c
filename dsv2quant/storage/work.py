"""The state of unfinished work: a locked file of JSON lines beside what is written.

Its first line says what is being made, each further one what has become durable. Lines are only ever added, so that a
kill or a power failure costs the last one at most.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv2quant.storage.durable import STATE_FILE, WORK_FOLDER, is_regular, open_locked

logger = logging.getLogger(__name__)
_MAX_BYTES = 64 << 20


class StateLog:
    """`lines` are those that it holds; it is locked until it is closed."""

    def __init__(self, path: Path, where: Path) -> None:
        """Open it, or make it. Raises InputError naming `where` if another run has it, and OSError."""
        self._descriptor = open_locked(path, where)
        try:
            self.lines, self._end = _parse(os.pread(self._descriptor, _MAX_BYTES, 0))
        except BaseException:
            self.close()
            raise

    def start(self, first: dict[str, Any]) -> None:
        """Forget all lines and write the first. Raises OSError."""
        os.ftruncate(self._descriptor, 0)
        self.lines, self._end = [], 0
        self.append(first)

    def append(self, line: dict[str, Any]) -> None:
        """Write a line behind the others, durably. Raises OSError."""
        content = json.dumps(line).encode() + b"\n"
        os.ftruncate(self._descriptor, self._end)  # what a power failure left of a line
        done = 0
        while done < len(content):
            done += os.pwrite(self._descriptor, content[done:], self._end + done)
        os.fsync(self._descriptor)
        self._end += len(content)
        self.lines.append(line)

    def close(self) -> None:
        """Release the lock."""
        os.close(self._descriptor)


def _parse(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The whole lines that a log begins with, and how many bytes these are."""
    lines, end = [], 0
    for line in content.splitlines(keepends=True):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(value, dict) or not line.endswith(b"\n"):
            break
        lines.append(value)
        end += len(line)
    return lines, end


def state_path(out: Path) -> Path:
    """Where the state of a conversion into `out`, a folder or a GGUF file, lies."""
    return out.with_name(f"{out.name}.state") if out.name.endswith(".gguf") else out / STATE_FILE


def resumable(out: Path) -> bool:
    """Whether a conversion into `out`, a folder or a GGUF file, was interrupted and left what the same command keeps: a
    finished shard, a piece of a GGUF file, or a layer that was calibrated."""
    path = state_path(out)
    if not is_regular(path):
        return False
    with path.open("rb") as file:
        recorded = len(_parse(file.read(_MAX_BYTES))[0]) > 1
    return recorded or any((out / WORK_FOLDER).rglob("*.safetensors"))


@contextmanager
def tell_kept(out: Path, is_kept: Callable[[], bool]) -> Iterator[None]:
    """Say so where an interrupt ends the work on `out` and something of it is kept. An error says itself what to do."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and is_kept():
            logger.warning("%s: what is finished is kept; the same command continues there", out)
        raise
