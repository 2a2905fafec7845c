"""Writing an artifact so that nothing looks finished until it is.

A shard is written front to back under `<name>.partial`, hashed on the way, fsynced and renamed. config.json comes last:
without it no consumer loads the folder. A state file names the plan while the work is unfinished; a later run with the
same plan and source continues from the finished shards.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dsv2quant.errors import InputError
from dsv2quant.headers import INDEX_FILE
from dsv2quant.plan import Plan
from dsv2quant.shards import Shard

STATE_FILE = ".dsv2quant-state.json"
MANIFEST_FILE = "dsv2quant.json"
WORK_FOLDER = ".dsv2quant-work"
PARTIAL = ".partial"
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.partial)?")
_MAX_UNHASHED = 64 << 20
_HASHED_AT_ONCE = 1 << 20
_FLUSH_EVERY = 64 << 20
_ASIDE = 1 << 20  # what the manifest may need, and the file system


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failing file system into one line: what can't be written, and that running again resumes."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "free space and run the same command again: finished shards are kept" if full else "check the folder"
        raise InputError(f"can't be written: {error.strerror or error}", where=path, fix=fix) from None


class ArtifactFolder:
    """The output folder of one conversion, locked while it is open."""

    def __init__(
        self,
        path: Path,
        plan: Plan,
        *,
        calibration: Mapping[str, Any] | None = None,
        aside: int = 0,
        force: bool = False,
    ) -> None:
        """Create or resume; `aside` is what the files beside the shards need, in bytes. Raises InputError where the
        folder holds something else, another run is writing to it, or the disk is too small.

        An artifact is the same if its plan is and what it was calibrated on.

        `complete` is then the manifest's file list if it already holds this very artifact, and `finished` has the
        shards to keep.
        """
        self.path, self.plan, self._calibration = path, plan, calibration
        self._state: int | None = None
        source = plan.checkpoint.folder
        if source is not None and path.resolve() == source.resolve():
            raise InputError("is the checkpoint's own folder", where=path, fix="give another output folder")
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            self._claim(force)
            if self.complete is None:
                self._check_space(aside)

    def _claim(self, force: bool) -> None:
        wanted: dict[str, Any] = {"plan": self.plan.digest, "source": self.plan.checkpoint.fingerprint()}
        if self._calibration is not None:
            wanted["calibration"] = self._calibration
        state_path = self.path / STATE_FILE
        held = sorted(entry.name for entry in self.path.iterdir() if entry.name != STATE_FILE)
        self.complete = None if state_path.exists() or force else self._complete()
        if self.complete is not None:
            self.finished = {shard.file for shard in self.plan.shards}
            return
        self._state = open_locked(state_path, self.path)
        unfinished = os.pread(self._state, 1 << 20, 0)
        if unfinished == json.dumps(wanted).encode() and not force:
            self.finished = {shard.file for shard in self.plan.shards if self._is_whole(shard)}
            return
        if held and not force:
            if not unfinished:
                os.unlink(state_path)
            self.close()
            what = "holds an unfinished conversion with another plan or source" if unfinished else "is not empty"
            raise InputError(what, where=self.path, fix="give another output folder, or --force to start over")
        for name in held:
            if _SHARD.fullmatch(name) or name in ("config.json", INDEX_FILE, MANIFEST_FILE):
                os.unlink(self.path / name)
        shutil.rmtree(self.work, ignore_errors=True)
        self.finished = set()
        os.ftruncate(self._state, 0)
        os.pwrite(self._state, json.dumps(wanted).encode(), 0)
        os.fsync(self._state)
        sync_folder(self.path)

    def _complete(self) -> dict[str, dict[str, Any]] | None:
        """The manifest's file list if the folder is a finished artifact of this plan, all files at their sizes."""
        try:
            manifest = json.loads((self.path / MANIFEST_FILE).read_text(encoding="utf-8"))
            files: dict[str, dict[str, Any]] = manifest["files"]
            whole = all((self.path / name).stat().st_size == entry["size"] for name, entry in files.items())
            same = manifest["plan"] == self.plan.digest and manifest.get("calibration") == self._calibration
            return files if whole and same else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _is_whole(self, shard: Shard) -> bool:
        path = self.path / shard.file
        if not path.exists() or path.stat().st_size != shard.nbytes:
            return False
        with path.open("rb") as file:
            return file.read(len(shard.header)) == shard.header

    def _check_space(self, aside: int) -> None:
        needed = sum(shard.nbytes for shard in self.plan.shards if shard.file not in self.finished) + aside + _ASIDE
        partial = [entry for entry in self.path.iterdir() if entry.name.endswith(PARTIAL)]
        free = shutil.disk_usage(self.path).free + sum(entry.stat().st_size for entry in partial)
        if needed > free:
            if not self.finished and not partial:
                os.unlink(self.path / STATE_FILE)
            self.close()
            what = f"needs {needed:,} bytes, the disk has {free:,} free"
            raise InputError(what, where=self.path, fix="free space, or give a folder on another disk")

    def write_file(self, name: str, content: bytes) -> dict[str, Any]:
        """Write a small file at once or not at all; returns its manifest entry."""
        with disk_errors(self.path / name):
            write_whole(self.path / name, [content])
        return file_entry(content)

    @property
    def work(self) -> Path:
        """Where an unfinished calibration keeps what a resumed run needs."""
        return self.path / WORK_FOLDER

    def finish(self) -> None:
        """Remove the work folder and the state file: the artifact is whole."""
        with disk_errors(self.path):
            shutil.rmtree(self.work, ignore_errors=True)
            os.unlink(self.path / STATE_FILE)
            sync_folder(self.path)
        self.close()

    def close(self) -> None:
        """Release the lock; an unfinished folder stays resumable."""
        if self._state is not None:
            os.close(self._state)
            self._state = None


class ShardWriter:
    """Writes one shard. Data may come in any order; what is ahead of its turn is held in memory.

    Hashing runs on `hasher`, fsync and rename on `finisher`, both single threads, so that they overlap the encoding.
    """

    def __init__(self, folder: Path, shard: Shard, hasher: ThreadPoolExecutor, finisher: ThreadPoolExecutor) -> None:
        self._path, self._partial = folder / shard.file, folder / (shard.file + PARTIAL)
        self._hasher, self._finisher = hasher, finisher
        self._sha256 = hashlib.sha256()
        self._hashing: deque[tuple[int, Future[None]]] = deque()
        self._flushing: list[Future[None]] = []
        self._held: dict[int, np.ndarray] = {}
        self._starts: dict[str, int] = {}
        self._position = self._flushed = 0
        self._size = shard.nbytes
        position = len(shard.header)
        for output in shard.outputs:
            self._starts[output.name] = position
            position += output.nbytes
        with disk_errors(self._path):
            self._file = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._append(np.frombuffer(shard.header, np.uint8))

    def put(self, name: str, begin: int, data: np.ndarray) -> None:
        """Write `data` at byte `begin` of a tensor. The array must not change afterwards."""
        self._held[self._starts[name] + begin] = data.reshape(-1).view(np.uint8)
        while self._position in self._held:
            self._append(self._held.pop(self._position))

    def _append(self, data: np.ndarray) -> None:
        with disk_errors(self._path):
            view, done = data.data, 0
            while done < len(view):
                done += os.write(self._file, view[done:])
        self._position += data.nbytes
        if self._position - self._flushed > _FLUSH_EVERY:
            # Start the disk early: otherwise all of it waits for the last fsync.
            self._flushed = self._position
            self._flushing.append(self._finisher.submit(os.fdatasync, self._file))
        self._hashing.append((data.nbytes, self._hasher.submit(self._sha256.update, data.data)))
        while sum(nbytes for nbytes, _ in self._hashing) > _MAX_UNHASHED:
            self._hashing.popleft()[1].result()

    @property
    def is_full(self) -> bool:
        return self._position == self._size

    def finish(self) -> Future[dict[str, Any]]:
        """Make the shard durable under its final name, in the background; gives its manifest entry."""
        return self._finisher.submit(self._finish)

    def _finish(self) -> dict[str, Any]:
        try:
            for _, hashed in self._hashing:
                hashed.result()
            with disk_errors(self._path):
                for flushed in self._flushing:
                    flushed.result()  # an error is reported once, so the last fsync may not repeat it
                os.fsync(self._file)
                self._partial.rename(self._path)
                sync_folder(self._path.parent)
        except BaseException:
            self.abandon()
            raise
        os.close(self._file)
        return {"size": self._size, "sha256": self._sha256.hexdigest()}

    def abandon(self) -> None:
        """Give the disk space of an unfinished shard back."""
        os.close(self._file)
        self._partial.unlink(missing_ok=True)


def open_locked(path: Path, where: Path) -> int:
    """A descriptor of a file, made if need be, that no other process holds. Raises InputError naming `where`."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError("another run is writing to it", where=where, fix="wait for it, or stop it") from None
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
        os.close(descriptor)  # a run that ended in between has removed it


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file so that it is durable under its name, or not there. Raises OSError."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        sync_folder(path.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_entry(content: bytes) -> dict[str, Any]:
    """The manifest entry, {size, sha256}, of a file with this content."""
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def hash_file(path: Path, progress: Callable[[int], object] = lambda nbytes: None) -> dict[str, Any]:
    """The manifest entry of a file on disk. Raises OSError, also where it is no regular file."""
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(_HASHED_AT_ONCE))
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


def dump_json(value: Mapping[str, Any]) -> bytes:
    """JSON as Hugging Face writes it: two spaces, keys in order, a final newline. What is no Unicode, a lone surrogate
    or a byte of a file name, is written as JSON's escape of it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
