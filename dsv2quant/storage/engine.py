"""The engine: jobs in the order of a plan, into files that are planned to the byte.

Workers read, encode and write what they made where it belongs. Every file lies under `<name>.partial` until all its
bytes came. Behind the workers it is hashed in its own order, while the system still has it in memory, and flushed now
and then with a record of what is durable, from which a later run goes on; in the end it is renamed. At most
`max_in_flight()` bytes of jobs are held, or one job if it is larger, so that memory grows with the processor and not
with the model.

A file is hashed by one thread, and the system lets one thread at a time write to it: what one file can take is soon
less than what many cores make. So a sink gives the jobs of several files side by side.
"""

from __future__ import annotations

import hashlib
import logging
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from dsv2quant.errors import InputError, PlanViolation
from dsv2quant.storage.durable import HASHED_AT_ONCE, PARTIAL, FileEntry, create, disk_errors, open_own, sync_folder
from dsv2quant.storage.files import Scratch
from dsv2quant.storage.processors import processors

logger = logging.getLogger(__name__)
IN_FLIGHT, PER_WORKER = 192 << 20, 16 << 20  # bytes of jobs that are held: at least, and of each worker
RECORD_EVERY = 64 << 20  # bytes of a file that come between two flushes
_hashed = Scratch()


@dataclass(frozen=True)
class File:
    """A file to write: its bytes before the tensors, and behind which bytes a later run can go on. The last of these
    marks is the file's size."""

    path: Path
    header: bytes
    marks: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.marks[-1]

    @property
    def partial(self) -> Path:
        """What it is called while it is written."""
        return self.path.with_name(self.path.name + PARTIAL)


@dataclass
class Written:
    """A file, of which all bytes before its `done`-th mark are durable; `sha256` is of these."""

    file: File
    done: int = 0
    sha256: hashlib._Hash = field(default_factory=hashlib.sha256)

    @property
    def is_whole(self) -> bool:
        return self.done == len(self.file.marks)

    @property
    def end(self) -> int:
        """The first byte that must still come."""
        return self.file.marks[self.done - 1] if self.done else len(self.file.header)

    @property
    def entry(self) -> FileEntry:
        """The manifest entry of the whole file."""
        return {"size": self.file.nbytes, "sha256": self.sha256.hexdigest()}


@dataclass(frozen=True)
class Job:
    """Work for one worker. `encode` yields arrays (uint8, flat) with the places of their first bytes in file number
    `file`; they fill the `spans`, (first byte, end), and nothing else. It holds `memory` bytes meanwhile, and its input
    is `bytes_in` long and comes from the source's files `reads`."""

    file: int
    name: str
    spans: tuple[tuple[int, int], ...]
    bytes_in: int
    memory: int
    encode: Callable[[], Iterable[tuple[int, np.ndarray]]]
    reads: frozenset[str] = frozenset()


Record = Callable[[int, int, str], object]  # number of the file, marks that are durable, sha256 of all before the last


def workers() -> int:
    """How many jobs run at once: one a core."""
    return max(2, min(64, processors()))


def max_in_flight() -> int:
    """How many bytes of jobs are held: each worker's own, and as much that waits for one."""
    return max(IN_FLIGHT, PER_WORKER * workers())


def lanes() -> int:
    """How many files are written side by side: two fifths of a conversion's work is hashing, for which each has one
    thread. No more: what is unfinished when a run is killed is made again."""
    return -(-processors() // 3)


def side_by_side(files: Iterable[Iterator[Job]], count: int) -> Iterator[Job]:
    """The jobs of each file in their order, those of `count` files in turns; the next file begins where one ends."""
    waiting = iter(files)
    begun = deque(islice(waiting, count))
    while begun:
        jobs = begun.popleft()
        job = next(jobs, None)
        if job is None:
            begun.extend(islice(waiting, 1))
        else:
            begun.append(jobs)
            yield job


def write(
    jobs: Iterable[Job | None],
    files: Sequence[Written],
    *,
    advance: Callable[[int], object] = lambda nbytes: None,
    record: Record = lambda number, done, sha256: None,
    check: Callable[[], object] = lambda: None,
) -> None:
    """Run jobs, except for those whose bytes are durable, until all files are whole and have their names. None among
    them stands for a pause: whoever gives the jobs is asked for the next when all before are done.

    `advance` is called with input bytes; `record` when a mark is durable, and `check` before a file gets its name, both
    by a thread of the file's. Raises PlanViolation where other bytes come than were planned, one comes twice, or one
    never does; InputError where the disk fails. What is not whole then lies under its partial name, if a mark of it is
    recorded.
    """
    with _Writing(files, advance, record, check) as writing:
        for job in jobs:
            if job is None:
                writing.settle()
            else:
                writing.start(job)
        writing.drain()
    if missing := [written.file.path.name for written in files if not written.is_whole]:
        raise PlanViolation(f"{files[0].file.path.parent}: {', '.join(missing)} never came")


class _Writing:
    """Jobs in flight and the files that they are for. A context: on leaving it, nothing is written any more."""

    def __init__(
        self, files: Sequence[Written], advance: Callable[[int], object], record: Record, check: Callable[[], object]
    ) -> None:
        self._files, self._advance, self._record, self._check = files, advance, record, check
        self._workers = ThreadPoolExecutor(workers())
        self._running: deque[tuple[Job, Future[None]]] = deque()
        self._held, self._max_held = 0, max_in_flight()
        self._kept = [written.end for written in files]  # what is before it is durable already
        self._begun: dict[int, _Begun] = {}

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, *exception: object) -> None:
        self._workers.shutdown(cancel_futures=True)
        for begun in self._begun.values():
            begun.close()

    def start(self, job: Job) -> None:
        """Have a job run when it fits beside the others."""
        if all(end <= self._kept[job.file] for _, end in job.spans):
            self._advance(job.bytes_in)
            return
        while self._running and self._held + job.memory > self._max_held:
            self._settle()
        begun = self._begun.get(job.file) or self._begin(job.file)
        begun.expect(job)
        self._held += job.memory
        self._running.append((job, self._workers.submit(begun.run, job)))

    def _begin(self, number: int) -> _Begun:
        for begun in self._begun.values():
            begun.raise_error()  # a disk that fails ends the run now
        begun = self._begun[number] = _Begun(self._files[number], partial(self._record, number), self._check)
        return begun

    def settle(self) -> None:
        """Wait for the jobs that were started."""
        while self._running:
            self._settle()

    def drain(self) -> None:
        """Wait for all jobs, and until every file that they are for is durable."""
        self.settle()
        for number, written in enumerate(self._files):
            if number not in self._begun and not written.done and written.file.nbytes == len(written.file.header):
                self._begin(number).came(())  # no job is for it
        for begun in self._begun.values():
            begun.wait()

    def _settle(self) -> None:
        job, future = self._running.popleft()
        self._held -= job.memory
        future.result()
        self._advance(job.bytes_in)
        self._begun[job.file].came(job.spans)


class _Begun:
    """A file that is written: by workers, each its own bytes, and hashed and made durable behind them."""

    def __init__(self, written: Written, record: Callable[[int, str], object], check: Callable[[], object]) -> None:
        self._written, self._file, self._record, self._check = written, written.file, record, check
        self._hasher, self._finisher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._position = self._flushed = written.end  # all bytes before it came
        self._hashed = written.end if written.done else 0
        self._expected: set[int] = set()  # first bytes of what is to come, or came
        self._ahead: dict[int, int] = {}  # {first byte: end} of what came behind a gap
        self._mark = written.done  # the last one that was passed, and the hash up to there
        self._marked: Future[str] | None = None
        self._flushing: Future[None] | None = None
        self._finishing: Future[None] | None = None
        with disk_errors(self._file.path):
            descriptor = open_own(self._file.partial) if written.done else create(self._file.partial)
            self._opened = os.fdopen(descriptor, "rb+", buffering=0)
            try:
                if not written.done:
                    self._write(memoryview(self._file.header), 0)
                    os.ftruncate(descriptor, self._file.nbytes)
            except BaseException:
                self.close()
                raise

    def expect(self, job: Job) -> None:
        """Raise PlanViolation where a byte comes twice."""
        for begin, _ in job.spans:
            if begin in self._expected:
                raise PlanViolation(f"{self._file.path}: {job.name}: byte {begin:,} came twice")
            self._expected.add(begin)

    def run(self, job: Job) -> None:
        """A worker's part."""
        lacking = dict(job.spans)
        for at, data in job.encode():
            end = at + data.nbytes
            planned = lacking.pop(at, at)
            if end > planned:
                what = f"bytes {at:,} to {end:,} came, those up to {planned:,} were planned"
                raise PlanViolation(f"{self._file.path}: {job.name}: {what}")
            with disk_errors(self._file.path):
                self._write(data.data, at)
            if end < planned:
                lacking[end] = planned
        if lacking:
            raise PlanViolation(f"{self._file.path}: {job.name}: bytes from {min(lacking):,} on never came")

    def _write(self, data: memoryview, at: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._opened.fileno(), data[done:], at + done)

    def came(self, spans: tuple[tuple[int, int], ...]) -> None:
        """A job with these spans is done. Now and then, make what came durable, behind the work."""
        self._ahead |= spans
        while self._position in self._ahead:
            self._position = self._ahead.pop(self._position)
        passed = bisect_right(self._file.marks, self._position)
        if passed > self._mark:
            self._mark = passed
            self._marked = self._hasher.submit(self._hash_up_to, self._file.marks[passed - 1])
        hashed = self._hasher.submit(self._hash_up_to, self._position)
        if self._mark == len(self._file.marks):
            logger.debug("%s is written", self._file.path.name)
            self._finishing = self._finisher.submit(self._finish, hashed)
            for pool in (self._hasher, self._finisher):
                pool.shutdown(wait=False)  # nothing more comes
        elif self._position - self._flushed >= RECORD_EVERY:
            if self._flushing is not None:
                self._flushing.result()  # a disk reports an error once: the last fsync may not repeat it
            self._flushed = self._position
            self._flushing = self._finisher.submit(self._flush, self._mark, self._marked, hashed)

    def _flush(self, mark: int, marked: Future[str] | None, hashed: Future[str]) -> None:
        with disk_errors(self._file.path):
            os.fdatasync(self._opened.fileno())
        hashed.result()  # hashing must not fall far behind
        if marked is not None and mark > self._written.done:
            self._keep(mark, marked.result())

    def _finish(self, hashed: Future[str]) -> None:
        if self._flushing is not None:
            self._flushing.result()
        sha256 = hashed.result()
        self._check()
        with disk_errors(self._file.path):
            os.fsync(self._opened.fileno())
            self._keep(len(self._file.marks), sha256)
            self._file.partial.rename(self._file.path)
            sync_folder(self._file.path.parent)
            self._opened.close()

    def _keep(self, mark: int, sha256: str) -> None:
        self._record(mark, sha256)
        self._written.done = mark

    def _hash_up_to(self, end: int) -> str:
        """The hash of the file's first `end` bytes. They were written just now: the system still has them in memory."""
        while self._hashed < end:
            piece = _hashed.take(min(HASHED_AT_ONCE, end - self._hashed)).data
            with disk_errors(self._file.path):
                count = os.preadv(self._opened.fileno(), [piece], self._hashed)
            if not count:
                raise InputError("was cut while it was written", where=self._file.partial, fix="run the command again")
            self._written.sha256.update(piece[:count])
            self._hashed += count
        return self._written.sha256.hexdigest()

    def wait(self) -> None:
        """Until the file is durable. Raises PlanViolation where bytes of it lack."""
        if self._finishing is None:
            what, ahead = f"{self._position:,} of {self._file.nbytes:,} bytes", len(self._ahead)
            raise PlanViolation(f"{self._file.path}: {what} came in order, {ahead} pieces out of it")
        self._finishing.result()

    def raise_error(self) -> None:
        """Raise what went wrong in making the file durable, so far as is known."""
        if self._finishing is not None and self._finishing.done():
            self._finishing.result()

    def close(self) -> None:
        """Let what was begun end, and give the disk space back of a file of which nothing is durable."""
        self._finisher.shutdown()  # before the hasher: what is recorded waits for its hash
        self._hasher.shutdown(cancel_futures=True)
        self._opened.close()
        if not self._written.done:
            self._file.partial.unlink(missing_ok=True)
