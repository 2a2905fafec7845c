"""The safetensors sink: a shard is written front to back, hashed on the way, and has its name when it is whole."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dsv2quant.errors import PlanViolation
from dsv2quant.storage.durable import PARTIAL, FileEntry, create, disk_errors, sync_folder
from dsv2quant.storage.safetensors import HELD_AS, Output, Shard

_MAX_UNHASHED = 64 << 20
_FLUSH_EVERY = 64 << 20


class ShardWriter:
    """Writes one shard. Data may come in any order; what is ahead of its turn is held in memory.

    Hashing runs on `hasher`, early flushes on `finisher`, both single threads, so that they overlap the encoding.
    """

    def __init__(self, folder: Path, shard: Shard, hasher: ThreadPoolExecutor, finisher: ThreadPoolExecutor) -> None:
        self._path, self._partial = folder / shard.file, folder / (shard.file + PARTIAL)
        self._hasher, self._finisher = hasher, finisher
        self._sha256 = hashlib.sha256()
        self._hashing: deque[tuple[int, Future[None]]] = deque()
        self._flushing: list[Future[None]] = []
        self._held: dict[int, np.ndarray] = {}
        self._planned: dict[str, tuple[Output, int]] = {}  # and its first byte
        self._position = self._flushed = 0
        self._size = shard.nbytes
        position = len(shard.header)
        for output in shard.outputs:
            self._planned[output.name] = output, position
            position += output.nbytes
        with disk_errors(self._path):
            self._file = create(self._partial)
        self._append(np.frombuffer(shard.header, np.uint8))

    def put(self, name: str, data: np.ndarray, begin: int | None = None) -> None:
        """Write a whole tensor, in the shape and as what holds its dtype's bits; or with `begin`, bytes (uint8) of it
        from that one on. The array must not change afterwards. Raises PlanViolation."""
        if name not in self._planned:
            raise PlanViolation(f"{name}: {data.dtype} {list(data.shape)} came, nothing was planned in {self._path}")
        output, start = self._planned[name]
        if begin is None:
            fits = data.dtype == HELD_AS[output.dtype] and data.shape == output.shape
        else:
            fits = data.dtype == np.uint8 and begin >= 0 and begin + data.nbytes <= output.nbytes
        if not fits:
            planned = f"{output.dtype} {list(output.shape)} was planned"
            raise PlanViolation(f"{name}: {data.dtype} {list(data.shape)} at {begin or 0} came, {planned}")
        if data.size == 0:
            return
        self._held[start + (begin or 0)] = data.reshape(-1).view(np.uint8)
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

    def finish(self, record: Callable[[FileEntry], object] = lambda entry: None) -> FileEntry:
        """Make the shard durable under its final name; returns its manifest entry. It has been given to `record` before
        the file has its name. Raises PlanViolation where a planned byte never came, or one came twice."""
        try:
            if not self.is_full or self._held:
                what = f"{self._position:,} of {self._size:,} bytes came in order, {len(self._held)} pieces out of it"
                raise PlanViolation(f"{self._path}: {what}")
            for _, hashed in self._hashing:
                hashed.result()
            entry = {"size": self._size, "sha256": self._sha256.hexdigest()}
            with disk_errors(self._path):
                for flushed in self._flushing:
                    flushed.result()  # an error is reported once, so the last fsync may not repeat it
                os.fsync(self._file)
                record(entry)
                self._partial.rename(self._path)
                sync_folder(self._path.parent)
        except BaseException:
            self.abandon()
            raise
        os.close(self._file)
        return entry

    def abandon(self) -> None:
        """Give the disk space of an unfinished shard back."""
        os.close(self._file)
        self._partial.unlink(missing_ok=True)
