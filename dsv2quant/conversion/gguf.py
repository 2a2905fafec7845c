"""Run a GGUF plan: one pass in the order of the file, in bounded memory.

All sizes are known, so workers read, encode and write their pieces where they belong. A file is written under
`<name>.partial` and renamed when it is whole; a run that was killed goes on behind the tensors that its state file
says are durable. What was written is hashed in the order of the file, close behind the workers.

Rows of a GGUF tensor, read from the checkpoint's weights as float32.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dsv2quant.arch.spec import K_B, V_B
from dsv2quant.checkpoint.checkpoint import HfCheckpoint, Weight
from dsv2quant.checkpoint.identity import Source
from dsv2quant.conversion.gguf_state import State
from dsv2quant.errors import InputError, PlanViolation
from dsv2quant.formats.codec import NonFiniteError, check_finite
from dsv2quant.formats.cpu import widen
from dsv2quant.formats.gguf import blocks
from dsv2quant.formats.gguf.imatrix import metadata as imatrix_metadata
from dsv2quant.planning.gguf_metadata import model_metadata
from dsv2quant.planning.gguf_plan import Entry, File, GgufPlan, lay_out
from dsv2quant.progress import Progress, no_progress
from dsv2quant.storage.durable import FileEntry, create, disk_errors, open_own, sync_folder
from dsv2quant.storage.files import Scratch
from dsv2quant.storage.work import resumable, tell_kept

RECORD_EVERY = 64 << 20  # bytes written between two records of what is durable
_MAX_RUNNING = 32  # pieces that run or wait
_HASHED_AT_ONCE = 1 << 20
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Result:
    """What a conversion did: manifest entries by file, how many tensors an earlier run had written, and whether these
    very files were there already."""

    files: dict[str, FileEntry]
    resumed: int
    already_complete: bool
    seconds: float


def convert_gguf(
    plan: GgufPlan,
    out: Path,
    *,
    command: str = "",
    split_max_size: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = no_progress,
) -> Result:
    """Write the plan's file, or with `split_max_size` bytes its shards; the bytes are the same from every device.

    Raises InputError where a weight is NaN, infinite or beyond what its type holds, the source changes meanwhile, or
    `out` can't be written; and PlanViolation, with no file finished, where an encoder does not return what was planned.
    """
    started = time.perf_counter()
    options = plan.options
    with progress(0, "", "prepare"):
        metadata = model_metadata(plan.checkpoint, options.number, drop_expert_groups=options.drop_expert_groups)
        if options.imatrix is not None:
            metadata |= imatrix_metadata(options.imatrix.source, options.imatrix)
        files = lay_out(plan, out, metadata, split_max_size)
        source = Source.of(plan.checkpoint, {})  # all else that is read is in the header
    state = State(out, files, plan, source, force, progress)
    if state.complete is not None:
        return Result(state.complete, 0, True, time.perf_counter() - started)
    with tell_kept(out, partial(resumable, out)), closing(state):
        resumed = sum(state.done)
        with progress(plan.bytes_in, "B", "convert") as advance, ThreadPoolExecutor(os.cpu_count()) as workers:
            for number, file in enumerate(files):
                if file.is_written:
                    advance(sum(piece.bytes_in for entry, _ in file.entries for piece in pieces(plan, entry)))
                else:
                    with _Writer(plan, source, state, number, workers, device, advance) as writer:
                        writer.write()
        hashes = zip(files, state.hashes, strict=True)
        entries: dict[str, FileEntry] = {f.path.name: {"size": f.nbytes, "sha256": h.hexdigest()} for f, h in hashes}
        state.manifest.write(plan.checkpoint, command, entries)
        state.finish()
    return Result(entries, resumed, False, time.perf_counter() - started)


class _Writer:
    """Writes what is missing of one file. A context: on leaving it no worker writes any more."""

    def __init__(
        self,
        plan: GgufPlan,
        source: Source,
        state: State,
        number: int,
        workers: ThreadPoolExecutor,
        device: str,
        advance: Callable[[int], object],
    ) -> None:
        self._plan, self._source, self._state = plan, source, state
        self._number, self._workers = number, workers
        self._device, self._advance = device, advance
        self._file: File = state.files[number]
        self._done = state.done[number]
        self._unrecorded = 0
        # Pieces with their first byte, the first behind them, and whether they are their tensor's last.
        self._running: deque[tuple[Piece, int, int, bool, Future[int]]] = deque()
        self._recorder, self._hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._recording: Future[None] | None = None
        self._position = self._hashed = self._file.end(self._done) if self._done else 0
        self._hash, self._buffer = state.hashes[number], memoryview(bytearray(_HASHED_AT_ONCE))
        with disk_errors(self._file.path):
            self._descriptor = open_own(self._file.partial) if self._done else create(self._file.partial)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        for *_, job in self._running:
            job.cancel()
        for *_, job in self._running:
            if not job.cancelled():
                job.exception()  # waits
        self._hasher.shutdown()
        self._recorder.shutdown()
        os.close(self._descriptor)

    def write(self) -> None:
        """Encode and write the missing tensors, and give the file its name."""
        file = self._file
        with disk_errors(file.path):
            if not self._done:
                os.pwrite(self._descriptor, file.header, 0)
                os.ftruncate(self._descriptor, file.nbytes)
                self._position = file.end(0)
        for entry, _ in file.entries[: self._done]:
            self._advance(sum(piece.bytes_in for piece in pieces(self._plan, entry)))
        for entry, begin in file.entries[self._done :]:
            importance = self._plan.importance(entry.tensor)
            row_bytes = blocks.nbytes(entry.type, entry.tensor.shape[-1:])
            cut = list(pieces(self._plan, entry))
            for piece in cut:
                if len(self._running) >= _MAX_RUNNING:
                    self._settle()
                at = begin + piece.begin * row_bytes
                job = self._workers.submit(self._encode, piece, importance, at)
                self._running.append((piece, at, at + piece.count * row_bytes, piece is cut[-1], job))
        while self._running:
            self._settle()
        if self._recording is not None:
            self._recording.result()  # a disk reports an error once: the last fsync may not repeat it
        if self._position != file.nbytes or self._done != len(file.entries):
            raise PlanViolation(f"{file.path}: {self._position:,} of {file.nbytes:,} bytes came")
        self._source.check_unchanged(self._plan.checkpoint)
        sha256 = self._hasher.submit(self._hash_up_to, file.nbytes).result()
        with disk_errors(file.path):
            os.fsync(self._descriptor)
            self._state.record(self._number, len(file.entries), sha256)
            file.partial.rename(file.path)
            sync_folder(file.path.parent)

    def _settle(self) -> None:
        """Wait for the oldest piece. Now and then, make what is finished durable, behind the work."""
        piece, begin, end, is_last, job = self._running[0]
        written = job.result()
        self._running.popleft()
        planned = self._file.entries[self._done]
        if piece.entry is not planned[0] or begin != self._position or written != end - begin:
            what = f"bytes {begin:,} to {begin + written:,} came, {self._position:,} to {end:,} were planned"
            raise PlanViolation(f"{self._file.path}: {piece.entry.name}: {what}")
        self._position = end
        self._advance(piece.bytes_in)
        self._hasher.submit(self._hash_up_to, end)
        if not is_last:
            return
        if end != planned[1] + piece.entry.nbytes:
            what = f"{end - planned[1]:,} of {piece.entry.nbytes:,} bytes came"
            raise PlanViolation(f"{self._file.path}: {piece.entry.name}: {what}")
        self._done += 1
        self._position = self._file.end(self._done)
        self._unrecorded += piece.entry.nbytes
        if self._unrecorded >= RECORD_EVERY:
            if self._recording is not None:
                self._recording.result()
            self._unrecorded = 0
            sha256 = self._hasher.submit(self._hash_up_to, self._position)
            self._recording = self._recorder.submit(self._record, self._done, sha256)

    def _record(self, done: int, sha256: Future[str]) -> None:
        with disk_errors(self._file.path):
            os.fdatasync(self._descriptor)
        self._state.record(self._number, done, sha256.result())

    def _hash_up_to(self, end: int) -> str:
        """The hash of the file's first `end` bytes. They were written just now: the system still has them in memory."""
        while self._hashed < end:
            piece = self._buffer[: end - self._hashed]
            with disk_errors(self._file.path):
                count = os.preadv(self._descriptor, [piece], self._hashed)
            if not count:
                raise InputError("was cut while it was written", where=self._file.partial, fix="run the command again")
            self._hash.update(piece[:count])
            self._hashed += count
        return self._hash.hexdigest()

    def _encode(self, piece: Piece, importance: np.ndarray | None, begin: int) -> int:
        """A worker's part: read a piece, encode it, write it from byte `begin` on; returns how many bytes."""
        entry, at = piece.entry, begin
        row_bytes = blocks.nbytes(entry.type, entry.tensor.shape[-1:])
        for rows in read_rows(self._plan.checkpoint, piece, CACHED if self._device == "cpu" else PIECE):
            data = _encode_rows(piece, rows, importance, self._device)
            if data.dtype != np.uint8 or data.shape != (len(rows), row_bytes):
                what = f"{data.dtype} {list(data.shape)} came, uint8 {[len(rows), row_bytes]} was planned"
                raise PlanViolation(f"{self._file.path}: {entry.name} as {entry.type}: {what}")
            if not blocks.holds(entry.type, rows, data):
                what = f"{piece.weight.spec.name} has values too large for {entry.type}"
                raise InputError(what, where=self._plan.checkpoint.model, fix="give it a wider type by --tensor-type")
            view, done = data.reshape(-1).data, 0
            with disk_errors(self._file.path):
                while done < len(view):
                    done += os.pwrite(self._descriptor, view[done:], at + done)
            at += data.nbytes
        return at - begin


def _encode_rows(piece: Piece, rows: np.ndarray, importance: np.ndarray | None, device: str) -> np.ndarray:
    """float32 [rows, cols] → uint8 [rows, bytes of a row], each matrix with its own importance [matrices, cols]."""
    kind = piece.entry.type
    encode = blocks.encode if device == "cpu" else partial(_encode_on, device)
    if importance is None:
        return encode(kind, rows)
    per_matrix = piece.entry.tensor.shape[-2]
    if len(rows) <= per_matrix:
        return encode(kind, rows, importance[piece.matrix])
    split = np.split(rows, len(rows) // per_matrix)
    return np.concatenate([encode(kind, r, i) for r, i in zip(split, importance, strict=True)])


def _encode_on(device: str, kind: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """As `blocks.encode`, on a CUDA device. Triton compiles a kernel at its first use: one thread at a time."""
    import torch

    from dsv2quant.kernels.gguf_encode import encode

    with _one_at_a_time, torch.cuda.device(device):
        weights = None if importance is None else torch.from_numpy(importance).to(device)
        found: np.ndarray = encode(kind, torch.from_numpy(rows).to(device), weights).cpu().numpy()
    return found


PIECE = 1 << 22  # weights that one worker encodes at a time, unless they can't be cut
CACHED = 1 << 18  # weights that are widened and encoded while they are in a core's cache
_stored, _widened = Scratch(), Scratch()


@dataclass(frozen=True)
class Piece:
    """Rows `first` … `first + count` − 1 of matrix `matrix` of a tensor, from `weight`; of kv_b_proj's halves, the rows
    of all matrices."""

    entry: Entry
    weight: Weight
    matrix: int
    first: int
    count: int

    @property
    def begin(self) -> int:
        """Its first row, counted over all matrices."""
        shape = self.entry.tensor.shape
        return self.matrix * (shape[-2] if len(shape) > 1 else 1) + self.first

    @property
    def bytes_in(self) -> int:
        """Its share of the weight's stored bytes."""
        size = self.count * self.entry.tensor.shape[-1]
        return self.weight.nbytes * size // self.weight.spec.size


def pieces(plan: GgufPlan, entry: Entry) -> Iterator[Piece]:
    """A tensor cut into pieces, in the order of the file. kv_b_proj's halves, and weights that are decoded as a whole,
    are not cut."""
    tensor = entry.tensor
    weights = [plan.weights[spec.name] for spec in tensor.specs]
    if tensor.kind in (K_B, V_B) or len(tensor.shape) == 1:
        yield Piece(entry, weights[0], 0, 0, math.prod(tensor.shape[:-1]))
        return
    rows, cols = tensor.shape[-2:]
    for matrix, weight in enumerate(weights):
        step = max(1, PIECE // cols) if weight.scheme == "bf16" else rows
        for first in range(0, rows, step):
            yield Piece(entry, weight, matrix, first, min(step, rows - first))


def read_rows(checkpoint: HfCheckpoint, piece: Piece, weights: int = CACHED) -> Iterator[np.ndarray]:
    """A piece's rows in order, about `weights` elements at a time: float32 [rows, cols], valid until the next are asked
    for.

    Raises InputError naming the weight and index where it is NaN or infinite.
    """
    tensor, weight = piece.entry.tensor, piece.weight
    if tensor.kind in (K_B, V_B):
        whole = np.concatenate([rows.copy() for rows in _floats(checkpoint, weight, 0, weight.spec.shape[0], CACHED)])
        yield _half(tensor.kind, tensor.shape, whole)
    else:
        yield from _floats(checkpoint, weight, piece.first, piece.count, weights)


def _half(kind: str, shape: tuple[int, ...], kv_b: np.ndarray) -> np.ndarray:
    """kv_b [heads · (nope + v), latent] → k_b [heads · latent, nope] or v_b [heads · v, latent]."""
    per_head = kv_b.reshape(shape[0], -1, kv_b.shape[1])
    if kind == K_B:
        return np.ascontiguousarray(per_head[:, : shape[2]].swapaxes(1, 2)).reshape(-1, shape[2])
    return np.ascontiguousarray(per_head[:, -shape[1] :]).reshape(-1, shape[2])


def _floats(checkpoint: HfCheckpoint, weight: Weight, first: int, count: int, weights: int) -> Iterator[np.ndarray]:
    """`count` rows of a weight from row `first`; a vector is one row."""
    cols = weight.spec.shape[-1]
    if weight.scheme != "bf16":
        values = checkpoint.encodable(weight)
        _check(checkpoint, weight, values.reshape(-1), 0)
        yield values
        return
    part = weight.stored
    width = part.nbytes // weight.spec.size
    buffer = _stored.take(count * cols * width)
    stored = checkpoint.read(part, first * cols * width, count * cols * width, buffer).reshape(count, -1)
    step = max(1, weights // cols)
    for row in range(0, count, step):
        some = stored[row : row + step].reshape(-1)
        bits = some.view({"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[part.dtype])
        if part.dtype == "BF16":
            values = _widened.take(bits.size * 4).view(np.float32)
            _check(checkpoint, weight, bits, (first + row) * cols)
            widen(bits, values)
        else:
            values = bits.astype(np.float32, copy=False)
            _check(checkpoint, weight, values, (first + row) * cols)
        yield values.reshape(-1, cols)


def _check(checkpoint: HfCheckpoint, weight: Weight, values: np.ndarray, begin: int) -> None:
    """Raise InputError where flat `values`, which begin at element `begin` of the weight, are not finite."""
    try:
        check_finite(values)
    except NonFiniteError as error:
        index = np.unravel_index(begin + error.index[0], weight.spec.shape)
        raise checkpoint.not_finite(weight, [int(i) for i in index]) from None
