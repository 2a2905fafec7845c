"""The state of an unfinished conversion to GGUF: a file beside the output that says what is being made, how many
tensors of each file are durable, and the hash of the file up to there. It is locked while a run has it open.

The manifest of a finished GGUF file, `<name>.gguf.json` beside it: its hash, and what it was made from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv2quant import __version__
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.checkpoint.identity import Source
from dsv2quant.errors import InputError, listing
from dsv2quant.planning.gguf_plan import File, GgufPlan
from dsv2quant.progress import Progress
from dsv2quant.storage.durable import (
    PARTIAL,
    FileEntry,
    damaged_files,
    disk_errors,
    dump_json,
    is_regular,
    refuse_inputs,
    sync_folder,
    write_whole,
)
from dsv2quant.storage.manifest import gguf_manifest, sealed
from dsv2quant.storage.safetensors import read_json
from dsv2quant.storage.work import StateLog, state_path

logger = logging.getLogger(__name__)
_FIX = "give another name, or --force to start over"
_READ_AT_ONCE = 1 << 20


class State:
    """`done` counts the durable tensors of each file, and `hashes` are of all bytes before the next one. `complete` has
    the files' manifest entries where these very files are there already."""

    def __init__(
        self, out: Path, files: list[File], plan: GgufPlan, source: Source, force: bool, progress: Progress
    ) -> None:
        """Create it, or go on with it. Raises InputError where a file is there already, another run writes it, or the
        disk is too small."""
        self.files, self.path, self._out = files, state_path(out), out
        self.done = [0] * len(files)
        self.hashes = [hashlib.sha256() for _ in files]
        self.complete: dict[str, FileEntry] | None = None
        self._log: StateLog | None = None
        self._is_claimed = False
        imatrix = plan.options.imatrix
        made: dict[str, Any] = {
            "schema": "dsv2quant.gguf-state/2",
            "version": __version__,
            "headers": [hashlib.sha256(file.header).hexdigest() for file in files],
            "imatrix": [imatrix.digest, plan.options.shrink] if imatrix is not None else None,
        }
        digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
        self.manifest = Manifest(out, files, digest, source)
        self._wanted = made | {"source": source.identity | {"stats": source.stats}}
        inputs = [*plan.checkpoint.inputs, *([Path(imatrix.source)] if imatrix is not None else [])]
        with disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            self._check_names(inputs)
            if not force and not os.path.lexists(self.path):
                self.complete = self.manifest.complete(progress)
            if self.complete is not None:
                return
            try:
                self._log = StateLog(self.path, out)
                self._claim(force, progress)
                self._check_space()
            except BaseException:
                self.close()
                raise

    def _check_names(self, inputs: list[Path]) -> None:
        """No --force is to overwrite a folder, or what the conversion reads."""
        paths = [path for file in self.files for path in (file.path, file.partial)]
        refuse_inputs([*paths, self.path, self.manifest.path], inputs)
        for path in (file.path for file in self.files if file.path.exists()):
            if not path.is_file():
                what = "is a folder" if path.is_dir() else "is no regular file"
                raise InputError(what, where=path, fix="give the name of a file")
        self.manifest.check_name()

    def _claim(self, force: bool, progress: Progress) -> None:
        assert self._log is not None
        lines = self._log.lines
        if lines and lines[0] == self._wanted and not force:
            self._is_claimed = True
            self._keep(lines[1:], progress)
            return
        if not force:
            self._refuse_others()
        self._is_claimed = True
        self._remove_leftovers()
        self._log.start(self._wanted)

    def _refuse_others(self) -> None:
        held = [file.path for file in self.files if file.path.exists()]
        if held:
            raise InputError("is there already", where=held[0], fix=_FIX)
        if self._has_durable():
            raise InputError("an unfinished conversion with another plan or source", where=self.path, fix=_FIX)

    def _keep(self, recorded: list[dict[str, Any]], progress: Progress) -> None:
        """Set `done` and `hashes` by what still has the hash that was recorded when it was written."""
        marks: list[dict[int, object]] = [{} for _ in self.files]  # {tensors: hash of all before the next}
        for line in recorded:
            number, done = line.get("file"), line.get("done")
            if type(number) is type(done) is int and number in range(len(self.files)):
                marks[number] = {n: sha for n, sha in marks[number].items() if n < done} | {done: line.get("sha256")}
        total = sum(file.end(max(found)) for file, found in zip(self.files, marks, strict=True) if any(found))
        with progress(total, "B", "check") as advance:
            for number, found in enumerate(marks):
                self._keep_file(number, found, advance)

    def _keep_file(self, number: int, marks: dict[int, object], progress: Callable[[int], object]) -> None:
        file = self.files[number]
        is_named = file.path.exists()
        if is_named and not any(marks):
            raise InputError("is there already", where=file.path, fix=_FIX)
        path = file.path if is_named else file.partial
        if any(marks) and is_regular(path) and path.stat().st_size == file.nbytes:
            self._read(number, path, marks, progress)
        if self.done[number] < max(marks, default=0):
            logger.warning("%s: is not what was written to it; it is made again", path)
            # Before anything is written: what was lost must not count any more when it has its size again.
            self.record(number, self.done[number], self.hashes[number].hexdigest())
            if is_named:
                file.path.rename(file.partial)

    def _read(self, number: int, path: Path, marks: dict[int, object], progress: Callable[[int], object]) -> None:
        """Hash a file up to the last tensor whose record agrees with it."""
        file, running, buffer = self.files[number], hashlib.sha256(), memoryview(bytearray(_READ_AT_ONCE))
        with path.open("rb", buffering=0) as opened:
            for done in sorted(marks):
                while opened.tell() < file.end(done):
                    count = opened.readinto(buffer[: file.end(done) - opened.tell()])
                    if not count:
                        return
                    running.update(buffer[:count])
                    progress(count)
                if done and running.hexdigest() != marks[done]:
                    return
                if done:
                    self.done[number], self.hashes[number] = done, running.copy()

    def _remove_leftovers(self) -> None:
        """Remove what other runs left: from now on, what has one of these names is of this one."""
        partial = re.compile(rf"{re.escape(self._out.stem)}(-\d{{5}}-of-\d{{5}})?\.gguf{re.escape(PARTIAL)}")
        for entry in os.listdir(self._out.parent):
            if partial.fullmatch(entry):
                os.unlink(self._out.with_name(entry))
        for path in (*(file.path for file in self.files), self.manifest.path):
            path.unlink(missing_ok=True)
        sync_folder(self._out.parent)

    def _check_space(self) -> None:
        needed = sum(file.nbytes for file in self.files if not file.is_written)
        partial = sum(f.partial.stat().st_blocks * 512 for f in self.files if f.partial.exists())
        free = shutil.disk_usage(self.path.parent).free + partial
        if needed > free:
            what = f"needs {needed:,} bytes, the disk has {free:,} free"
            raise InputError(what, where=self.path.parent, fix="free space, or give a file on another disk")

    def record(self, number: int, done: int, sha256: str) -> None:
        """Tensors before the `done`-th of file `number` are durable, and all bytes before that one have this hash."""
        assert self._log is not None
        self.done[number] = done
        with disk_errors(self.path):
            self._log.append({"file": number, "done": done, "sha256": sha256})

    def finish(self) -> None:
        """All files are whole."""
        with disk_errors(self.path):
            os.unlink(self.path)
            sync_folder(self.path.parent)

    def _has_durable(self) -> bool:
        return self._log is not None and any(line.get("done") for line in self._log.lines[1:])

    def close(self) -> None:
        """Release the lock. What is unfinished stays resumable; where nothing of it is durable, nothing is left."""
        if self._log is None:
            return
        with disk_errors(self.path):
            if not self._has_durable():
                for path in (self.path, *(file.partial for file in self.files if self._is_claimed)):
                    path.unlink(missing_ok=True)
            self._log.close()
            self._log = None


SCHEMA = "dsv2quant.gguf-manifest/1"


class Manifest:
    """`path` is where the manifest of the file or split files `out` lies; `digest` stands for all that determines their
    bytes, the weights aside."""

    def __init__(self, out: Path, files: Sequence[File], digest: str, source: Source) -> None:
        self.path = gguf_manifest(out)
        self._out, self._files, self._digest, self._source = out, files, digest, source

    def check_name(self) -> None:
        """Raise InputError where something else has the manifest's name."""
        if os.path.lexists(self.path) and self._read() is None:
            raise InputError("is there, and no manifest of dsv2quant's", where=self.path, fix="move it away")

    def complete(self, progress: Progress) -> dict[str, FileEntry] | None:
        """The files' entries where they are there, every byte of them, as this plan and source make them. Raises
        InputError where a manifest of this plan has another source or other bytes."""
        manifest = self._read()
        if manifest is None or manifest.get("plan") != self._digest or not any(f.path.exists() for f in self._files):
            return None
        source = manifest.get("source")
        differing = self._source.differences(source.get("identity") if isinstance(source, dict) else None)
        if differing is not None:
            fix = "give another name, or --force to replace it"
            raise InputError(f"was made from another source: {differing}", where=self._out, fix=fix)
        entries: dict[str, FileEntry] = {
            file.path.name: manifest["files"].get(file.path.name, {}) for file in self._files
        }
        with progress(sum(file.nbytes for file in self._files), "B", "check") as advance:
            damaged = damaged_files(self._out.parent, entries, advance)
        if damaged:
            what = f"not as its manifest has it: {listing(damaged)}"
            raise InputError(what, where=self._out, fix="--force to convert again, or get the file again")
        return entries

    def write(self, checkpoint: Checkpoint, command: str, entries: dict[str, FileEntry]) -> None:
        """Say what the finished files are."""
        content = {
            "schema": SCHEMA,
            "plan": self._digest,
            "command": command,
            "source": {
                "model": checkpoint.model,
                "revision": checkpoint.revision,
                "identity": self._source.identity,
            },
            "versions": {"dsv2quant": __version__},
            "files": entries,
        }
        with disk_errors(self.path):
            write_whole(self.path, [dump_json(sealed(content))])

    def _read(self) -> dict[str, Any] | None:
        """What a manifest of ours says; None where there is none, or something else."""
        if not is_regular(self.path):
            return None
        try:
            manifest = read_json(self.path)
        except InputError:
            return None
        ours = manifest.get("schema") == SCHEMA and isinstance(manifest.get("files"), dict)
        return manifest if ours else None
