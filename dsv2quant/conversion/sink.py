"""Where a conversion writes: claimed, resumed, finished.

While the work is unfinished a state file, locked by the run that writes, names the plan, the source and the files to
come, and says how much of each is durable, with its hash; a later run with the same plan and source keeps what still
has that hash. Only what a state file or a manifest names is ever removed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dsv2quant.checkpoint.checkpoint import Checkpoint, Weight
from dsv2quant.checkpoint.identity import Source
from dsv2quant.errors import InputError, listing
from dsv2quant.formats.codec import NonFiniteError, as_float32, check_finite
from dsv2quant.formats.e4m3 import E4M3_VALUES
from dsv2quant.progress import Progress
from dsv2quant.storage.durable import (
    HASHED_AT_ONCE,
    PARTIAL,
    FileEntry,
    StateLog,
    damaged_files,
    disk_errors,
    hash_together,
    is_regular,
    refuse_inputs,
    state_path,
    sync_folder,
    write_whole,
)
from dsv2quant.storage.engine import File, Job, Written
from dsv2quant.storage.manifest import CARD_FILE, own_manifest
from dsv2quant.storage.safetensors import StoredTensor
from dsv2quant.storage.stream import Stream

if TYPE_CHECKING:
    from dsv2quant.calib.calibration import Outcome

logger = logging.getLogger(__name__)
_STATE = "dsv2quant.state/"  # schema of state files, in whichever version


class Sink(ABC):
    """An artifact to write, locked while it is open: a folder (`shards.py`) or GGUF files (`gguf.py`).

    `written` says how much of each file is durable; `small` has the content of what lies beside them, by name, and
    `manifest` is the path of their manifest. `complete` is its file list if the artifact is there already, every byte.
    """

    schema: ClassVar[str]  # of the manifest
    kind: ClassVar[str]  # what `out` is
    other: ClassVar[str]  # what to give where something else is there
    of_another: ClassVar[str]  # said of an artifact of another source
    units: ClassVar[str]  # what it says that a later run found finished

    def __init__(
        self,
        out: Path,
        manifest: Path,
        files: Sequence[File],
        digest: str,
        source: Source,
        *,
        force: bool,
        inputs: Iterable[Path],
        progress: Progress,
        small: Mapping[str, bytes] | None = None,
        calibration: Mapping[str, Any] | None = None,
        aside: int = 0,
        stream: Stream | None = None,
    ) -> None:
        """Create or resume. An artifact is the same if its plan is (`digest`), its source, and what it was calibrated
        on. `aside` is what it takes of the disk beside `files`, in bytes; `inputs` are files and folders that are read,
        and `stream` brings the source's shards.

        Raises InputError where something else is there or an input would be overwritten, another run is writing, or
        the disk is too small.
        """
        self.out, self.digest, self.source, self.small = out, digest, source, dict(small or {})
        self.complete: dict[str, FileEntry] | None = None
        self.written = [Written(file) for file in files]
        self.outcomes: list[Outcome] = []
        self.expert_tokens: dict[int, list[int]] = {}
        self.tuned: dict[str, Any] | None = None
        self.manifest, self._folder, self._state = manifest, manifest.parent, state_path(out)
        self._calibration, self.stream = calibration, stream
        self._names = {*self.small, manifest.name, *(file.path.name for file in files)}
        self._log: StateLog | None = None
        self._is_refused = False
        with disk_errors(out):
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                self._claim(force, list(inputs), aside, progress)
            except BaseException:
                self.close()
                raise

    @abstractmethod
    def jobs(self, progress: Progress) -> Iterator[Job]:
        """Have ready what the jobs need, and give them."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What the manifest says beside plan, command and source."""

    @property
    def counted(self) -> tuple[int, int]:
        """How many `units` are durable, and how many there are: files, where a sink counts nothing smaller."""
        return sum(written.is_whole for written in self.written), len(self.written)

    def _claim(self, force: bool, inputs: list[Path], aside: int, progress: Progress) -> None:
        self._check_names(inputs)
        manifest = self._own_manifest()
        if manifest is not None and not force and not os.path.lexists(self._state) and self._is_planned(manifest):
            self._check_complete(manifest, progress)
            return
        wanted = {
            "schema": f"{_STATE}4",
            "plan": self.digest,
            "source": self.source.identity | {"stats": self.source.stats},
            "calibration": self._calibration,
            "names": sorted(self._names),
        }
        self._log = StateLog(self._state, self.out)
        lines = self._log.lines
        try:
            if lines and lines[0] == wanted and not force:
                self._keep(lines[1:], progress)
            else:
                if not force:
                    self._refuse(lines)
                self._clear(_names(lines), manifest, inputs)
                if self.stream is not None:
                    self.stream.clear(everything=True)
                self._log.start(wanted)
                sync_folder(self._folder)
            if self.stream is not None:
                self.stream.clear(everything=False)
            self._check_space(aside + (self.stream.room if self.stream is not None else 0))
        except InputError:
            self._is_refused = not lines
            raise

    def _check_names(self, inputs: list[Path]) -> None:
        """Raise InputError, whatever is forced, where a path that will be written is an input or can't be a file."""
        names = [*self._names, *(name + PARTIAL for name in self._names)]
        refuse_inputs([self._state, *(self._folder / name for name in names)], inputs)

    def _own_manifest(self) -> dict[str, Any] | None:
        """The manifest of what lies there; None where none of ours does."""
        return own_manifest(self.manifest)

    def _is_planned(self, manifest: Mapping[str, Any]) -> bool:
        return bool(manifest.get("plan") == self.digest and manifest.get("calibration") == self._calibration)

    def _check_complete(self, manifest: Mapping[str, Any], progress: Progress) -> None:
        """Set `complete` where all files are what the manifest says, and of this source. Raises InputError."""
        files = manifest["files"]
        differing = self.source.differences(manifest.get("source"))
        if differing is not None:
            what, fix = f"{self.of_another} another source: {differing}", f"give {self.other}, or --force to replace it"
            raise InputError(what, where=self.out, fix=fix)
        names = sorted(self._names.union(files) - {self.manifest.name, CARD_FILE})
        with progress(sum(written.file.nbytes for written in self.written), "B", "check") as advance:
            damaged = damaged_files(self._folder, {name: files.get(name, {}) for name in names}, advance)
        if damaged:
            what = f"not as its manifest has it: {listing(damaged)}"
            raise InputError(what, where=self.out, fix="--force to convert again, or get its files again")
        self.complete = files

    @abstractmethod
    def _refuse(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Raise InputError where something is there that this conversion did not write; `lines` are of its state."""

    @abstractmethod
    def _clear(self, names: list[str], manifest: Mapping[str, Any] | None, inputs: list[Path]) -> None:
        """Remove what other runs left: `names` are those of their state, `manifest` is theirs. Raises InputError where
        something that we did not write is in the way."""

    def _keep(self, recorded: list[dict[str, Any]], progress: Progress) -> None:
        """Set `written` to what still has the hash that was recorded when it was written."""
        files = [written.file for written in self.written]
        marks: list[dict[int, object]] = [{} for _ in files]  # {marks that are durable: hash up to the last of them}
        for line in recorded:
            number, done = line.get("file"), line.get("done")
            if (
                type(number) is type(done) is int
                and number in range(len(files))
                and done in range(len(files[number].marks) + 1)
            ):
                marks[number] = {n: sha for n, sha in marks[number].items() if n < done} | {done: line.get("sha256")}
        total = sum(file.marks[max(found) - 1] for file, found in zip(files, marks, strict=True) if any(found))
        with progress(total, "B", "check") as advance:
            self.written = hash_together(_kept, zip(files, marks, strict=True), advance)
        for number, (written, found) in enumerate(zip(self.written, marks, strict=True)):
            path, is_named = written.file.path, os.path.lexists(written.file.path)
            if written.done < max(found, default=0):
                logger.warning("%s: is not what was written to it; it is made again", path)
                # Before anything is written: what was lost must not count any more when it has its size again.
                self.record(number, written.done, written.sha256.hexdigest())
                if is_named:
                    path.rename(written.file.partial)
            elif written.is_whole and not is_named:
                written.file.partial.rename(path)
        if not all(written.is_whole for written in self.written):  # nothing looks finished while a file is missing
            for name in self._names & {"config.json", self.manifest.name}:
                (self._folder / name).unlink(missing_ok=True)
        sync_folder(self._folder)

    def _check_space(self, aside: int) -> None:
        lacking = [written.file for written in self.written if not written.is_whole]
        needed = sum(file.nbytes for file in lacking) + aside
        partial = sum(file.partial.lstat().st_blocks * 512 for file in lacking if os.path.lexists(file.partial))
        free = shutil.disk_usage(self._folder).free + partial
        if needed > free:
            what = f"needs {needed:,} bytes, the disk has {free:,} free"
            raise InputError(what, where=self._folder, fix=f"free space, or give a {self.kind} on another disk")

    def record(self, number: int, done: int, sha256: str) -> None:
        """The first `done` marks of file `number` are durable, and all bytes before the last have this hash."""
        assert self._log is not None
        with disk_errors(self._state):
            self._log.append({"file": number, "done": done, "sha256": sha256})

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file at once or not at all."""
        path = self._folder / name
        with disk_errors(path):
            path.parent.mkdir(exist_ok=True)
            write_whole(path, [content])

    def finish(self) -> None:
        """Remove the state and what was kept of a stream: the artifact is whole."""
        if self.stream is not None:
            self.stream.clear(everything=True)
        assert self._log is not None
        with disk_errors(self._state):
            os.unlink(self._state)
            sync_folder(self._state.parent)
        self._log.close()
        self._log = None

    def close(self) -> None:
        """Release the lock. What is unfinished stays resumable."""
        if self._log is not None:
            if self._is_void(self._log.lines):
                self._state.unlink(missing_ok=True)
            self._log.close()
            self._log = None

    def _is_void(self, lines: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the state is of no use to a later run."""
        return self._is_refused


def check_decoded(checkpoint: Checkpoint, weight: Weight, values: np.ndarray) -> None:
    """Raise InputError where a weight's float32 values are not finite."""
    try:
        check_finite(values)
    except NonFiniteError as error:
        raise checkpoint.not_finite(weight, error.index) from None


def check_stored(checkpoint: Checkpoint, weight: Weight, part: StoredTensor, stored: np.ndarray, begin: int) -> None:
    """Raise InputError where `stored`, flat, as `HELD_AS` has its dtype, which begins at element `begin` of a weight's
    part, holds what is not finite."""
    if part.dtype in ("I8", "I32", "I64"):
        return
    if part.dtype == "F8_E4M3":
        stored = E4M3_VALUES[stored]
    try:
        check_finite(stored if part.dtype == "BF16" else as_float32(stored))
    except NonFiniteError as error:
        index = np.unravel_index(begin + error.index[0], part.shape)
        raise checkpoint.not_finite(weight, [int(i) for i in index], part.name) from None


def _names(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names that a state file says will be written."""
    named = lines[0].get("names") if lines and str(lines[0].get("schema")).startswith(_STATE) else None
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def _kept(pair: tuple[File, Mapping[int, object]], progress: Callable[[int], object]) -> Written:
    """A file as far as it has the hashes that were recorded, {marks: hash of all before the last of them}."""
    file, marks = pair
    kept, running, buffer = Written(file), hashlib.sha256(), memoryview(bytearray(HASHED_AT_ONCE))
    path = file.path if os.path.lexists(file.path) else file.partial
    if not marks or not is_regular(path) or path.stat().st_size != file.nbytes:
        return kept
    with path.open("rb", buffering=0) as opened:
        for done in sorted(marks.keys() - {0}):
            while opened.tell() < file.marks[done - 1]:
                count = opened.readinto(buffer[: file.marks[done - 1] - opened.tell()])
                if not count:
                    return kept
                running.update(buffer[:count])
                progress(count)
            if running.hexdigest() != marks[done]:
                return kept
            kept = Written(file, done, running.copy())
    return kept
