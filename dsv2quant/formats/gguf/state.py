"""The state of an unfinished conversion to GGUF: a file beside the output that says what is being made and how many
tensors of each file are durable. It is locked while a run has it open."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from dsv2quant import __version__
from dsv2quant.errors import InputError
from dsv2quant.formats.gguf.plan import File, GgufPlan
from dsv2quant.writer import PARTIAL, disk_errors, open_locked, sync_folder

_FIX = "give another name, or --force to start over"


class State:
    """`done` counts the durable tensors of each file."""

    def __init__(self, out: Path, files: list[File], plan: GgufPlan, force: bool) -> None:
        """Create it, or go on with it. Raises InputError where a file is there already, another run writes it, or the
        disk is too small."""
        self.files, self.path, self._out = files, out.with_name(f"{out.name}.state"), out
        self.done = [0] * len(files)
        imatrix = plan.options.imatrix
        self._wanted: dict[str, Any] = {
            "version": __version__,
            "headers": [hashlib.sha256(file.header).hexdigest() for file in files],
            "source": plan.checkpoint.fingerprint(),
            "imatrix": [imatrix.digest, plan.options.shrink] if imatrix is not None else None,
        }
        with disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = open_locked(self.path, out)
            try:
                self._check_names(imatrix.source if imatrix is not None else None)
                self._claim(force)
                self._check_space()
            except BaseException:
                self.close()
                raise

    def _check_names(self, imatrix: str | None) -> None:
        """No --force is to overwrite a folder, or what the conversion reads."""
        for path in (file.path for file in self.files if file.path.exists()):
            if path.is_dir():
                raise InputError("is a folder", where=path, fix="give the name of a file")
            if imatrix is not None and os.path.exists(imatrix) and path.samefile(imatrix):
                raise InputError("is the importance matrix", where=path, fix="give another name")

    def _claim(self, force: bool) -> None:
        found = self._read()
        if found is not None and found["wanted"] == self._wanted and not force:
            self.done = [self._durable(file, done) for file, done in zip(self.files, found["done"], strict=True)]
        else:
            if not force:
                self._refuse_others(found)
            self._remove_leftovers()
        # Before anything is written: what was lost must not count any more when it has its size again.
        self._write()
        os.fsync(self._descriptor)

    def _refuse_others(self, found: dict[str, Any] | None) -> None:
        held = [file.path for file in self.files if file.path.exists()]
        if held:
            raise InputError("is there already", where=held[0], fix=_FIX)
        if found is not None and any(found["done"]):
            raise InputError("an unfinished conversion with another plan or source", where=self.path, fix=_FIX)

    def _durable(self, file: File, done: int) -> int:
        """How many of a file's tensors this run can keep: what was recorded, where the file is still there."""
        if file.is_written:
            return len(file.lines)
        file.path.unlink(missing_ok=True)  # it has been cut since
        return done if file.partial.exists() and file.partial.stat().st_size == file.nbytes else 0

    def _remove_leftovers(self) -> None:
        """Remove what other runs left: from now on, what has one of these names is of this one."""
        partial = re.compile(rf"{re.escape(self._out.stem)}(-\d{{5}}-of-\d{{5}})?\.gguf{re.escape(PARTIAL)}")
        for entry in os.listdir(self._out.parent):
            if partial.fullmatch(entry):
                os.unlink(self._out.with_name(entry))
        for file in self.files:
            file.path.unlink(missing_ok=True)
        sync_folder(self._out.parent)

    def _check_space(self) -> None:
        needed = sum(file.nbytes for file in self.files if not file.is_written)
        partial = sum(f.partial.stat().st_blocks * 512 for f in self.files if f.partial.exists())
        free = shutil.disk_usage(self.path.parent).free + partial
        if needed > free:
            what = f"needs {needed:,} bytes, the disk has {free:,} free"
            raise InputError(what, where=self.path.parent, fix="free space, or give a file on another disk")

    def record(self, number: int, done: int) -> None:
        """Tensors before the `done`-th of file `number` are durable."""
        self.done[number] = done
        with disk_errors(self.path):
            self._write()

    def _read(self) -> dict[str, Any] | None:
        """What was recorded; None of a new file, or one that is damaged: then its digest is not that of the rest."""
        digest, _, content = os.pread(self._descriptor, 1 << 24, 0).rstrip().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != digest:
            return None
        found: dict[str, Any] = json.loads(content)
        return found

    def _write(self) -> None:
        content = json.dumps({"wanted": self._wanted, "done": self.done}).encode()
        whole = hashlib.sha256(content).hexdigest().encode() + b"\n" + content
        os.pwrite(self._descriptor, whole.ljust(os.fstat(self._descriptor).st_size), 0)

    def finish(self) -> None:
        """All files are whole."""
        with disk_errors(self.path):
            os.unlink(self.path)
            sync_folder(self.path.parent)

    def close(self) -> None:
        """Release the lock. What is unfinished stays resumable; where nothing of it is durable, nothing is left."""
        found = self._read()
        with disk_errors(self.path):
            if found is None or not any(found["done"]):
                for path in (self.path, *(file.partial for file in self.files)):
                    path.unlink(missing_ok=True)
            os.close(self._descriptor)
