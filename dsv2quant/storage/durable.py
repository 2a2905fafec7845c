"""Writing files so that nothing looks finished until it is.

A file lies under `<name>.partial` while it is written, and is fsynced before it is renamed. No link is followed: what a
name stands for is replaced, never written through.

The state of unfinished work is a locked file of JSON lines beside what is written. Its first line says what is being
made, each further one what has become durable. Lines are only ever added, so that a kill or a power failure costs the
last one at most.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from dsv2quant.errors import InputError
from dsv2quant.storage.processors import processors

logger = logging.getLogger(__name__)
STATE_FILE = ".dsv2quant-state.json"
MANIFEST_FILE = "dsv2quant.json"
WORK_FOLDER = ".dsv2quant-work"
PARTIAL = ".partial"
FileEntry = dict[str, Any]  # what a manifest says of a file: {size, sha256}
HASHED_AT_ONCE = 1 << 20
_MAX_STATE = 64 << 20
Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failing file system into one line: what can't be written, and that running again resumes. An error that
    names another file is passed on: it says itself where it lies."""
    try:
        yield
    except OSError as error:
        named = Path(os.fsdecode(error.filename)) if error.filename is not None else path
        if named not in path.parents and not os.fspath(named).startswith(os.fspath(path)):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "free space and run the same command again: finished shards are kept" if full else "check the folder"
        raise InputError(f"can't be written: {error.strerror or error}", where=path, fix=fix) from None


def create(path: Path) -> int:
    """A descriptor of a new, empty file to read and write in place of whatever had its name. Raises OSError."""
    path.unlink(missing_ok=True)  # not truncated: another name may stand for the same file
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def open_own(path: Path, flags: int = 0) -> int:
    """A descriptor, to read and write, of a regular file that has no other name. Raises InputError where it is a link,
    a pipe or a device: what stands there is none of ours."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        raise InputError("is a link or no regular file", where=path, fix="remove it") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise InputError("is a link or no regular file", where=path, fix="remove it")
    return descriptor


def open_locked(path: Path, where: Path) -> int:
    """A descriptor of a file, made if need be, that no other process holds. Raises InputError naming `where`, or `path`
    where it is a link or no regular file."""
    while True:
        descriptor = open_own(path, os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise InputError("another run is writing to it", where=where, fix="wait for it, or stop it") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # a run that ended in between has removed it


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file so that it is durable under its name, or not there. Raises OSError."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with os.fdopen(create(partial), "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        sync_folder(path.parent)
    except OSError:
        if not partial.is_dir():
            partial.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_regular(path: Path) -> bool:
    """Whether a regular file has this very name, and no link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def refuse_inputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise InputError where a path that is to be written or removed is one of the inputs, or a file in one of them
    that is a folder: by whatever name, link or mount."""
    read: dict[tuple[int, int], Path] = {}
    for given in inputs:
        for path in (given, *(given.iterdir() if given.is_dir() else ())):
            read.update((key, path) for key in _identity(path))
    for path in outputs:
        for key in _identity(path):
            if key in read:
                raise InputError(f"is an input of this command, {read[key]}", where=path, fix="give another output")


def _identity(path: Path) -> list[tuple[int, int]]:
    """[(device, inode)] of what a path leads to; empty where that is nothing."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [(found.st_dev, found.st_ino)]


def file_entry(content: bytes) -> FileEntry:
    """The manifest entry of a file with this content."""
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def hash_file(path: Path, progress: Callable[[int], object] = lambda nbytes: None) -> FileEntry:
    """The manifest entry of a file on disk. Raises OSError, also where it is no regular file."""
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(HASHED_AT_ONCE))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is no regular file", os.fspath(path))
        while count := os.readv(descriptor, [buffer]):
            digest.update(buffer[:count])
            size += count
            progress(count)
    finally:
        os.close(descriptor)
    return {"size": size, "sha256": digest.hexdigest()}


def hash_together(
    call: Callable[[Item, Callable[[int], object]], Result], items: Iterable[Item], progress: Callable[[int], object]
) -> list[Result]:
    """[call(item, progress)] of files that are read, some at a time; where one raises, nobody waits for the others."""
    ended = threading.Event()

    def advance(nbytes: int) -> None:
        progress(nbytes)
        if ended.is_set():  # Ctrl-C, amid a large file
            raise InterruptedError

    with ThreadPoolExecutor(min(4, processors())) as workers:
        try:
            return list(workers.map(lambda item: call(item, advance), items))
        finally:
            ended.set()


def damaged_files(
    folder: Path, entries: Mapping[str, FileEntry], progress: Callable[[int], object] = lambda nbytes: None
) -> list[str]:
    """Those of a folder's files that are not what was recorded of them, {name: manifest entry}: by a hash of all."""

    def differs(name: str, advance: Callable[[int], object]) -> bool:
        try:
            return hash_file(folder / name, advance) != entries[name]
        except OSError:
            return True

    damaged = hash_together(differs, entries, progress)
    return [name for name, bad in zip(entries, damaged, strict=True) if bad]


def dump_json(value: Mapping[str, Any]) -> bytes:
    """JSON as Hugging Face writes it: two spaces, keys in order, a final newline. What is no Unicode, a lone surrogate
    or a byte of a file name, is written as JSON's escape of it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


class StateLog:
    """`lines` are those that it holds; it is locked until it is closed. Any thread may append to it."""

    def __init__(self, path: Path, where: Path) -> None:
        """Open it, or make it. Raises InputError naming `where` if another run has it, and OSError."""
        self._descriptor, self._lock = open_locked(path, where), threading.Lock()
        try:
            self.lines, self._end = _parse(os.pread(self._descriptor, _MAX_STATE, 0))
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
        content, done = json.dumps(line).encode() + b"\n", 0
        with self._lock:
            os.ftruncate(self._descriptor, self._end)  # what a power failure left of a line
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
        recorded = len(_parse(file.read(_MAX_STATE))[0]) > 1
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
