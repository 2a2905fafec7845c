"""The state of an unfinished conversion to GGUF: a file beside the output that says what is being made and how many
tensors of each file are durable. It is locked while a run has it open."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from dsv2quant.errors import InputError
from dsv2quant.formats.gguf.plan import File, GgufPlan
from dsv2quant.writer import disk_errors, open_locked, sync_folder


class State:
    """`done` counts the durable tensors of each file."""

    def __init__(self, out: Path, files: list[File], plan: GgufPlan, force: bool) -> None:
        """Create it, or go on with it. Raises InputError where a file is there already, another run writes it, or the
        disk is too small."""
        self.files, self.path = files, out.with_name(f"{out.name}.state.json")
        self.done = [0] * len(files)
        imatrix = plan.options.imatrix
        self._wanted: dict[str, Any] = {
            "files": [file.digest for file in files],
            "source": plan.checkpoint.fingerprint(),
            "imatrix": [imatrix.digest, plan.options.shrink] if imatrix is not None else None,
        }
        with disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = open_locked(self.path)
            try:
                self._claim(force)
                self._check_space()
            except InputError:
                self.close()
                raise

    def _claim(self, force: bool) -> None:
        try:
            found = json.loads(os.pread(self._descriptor, 1 << 24, 0))
        except ValueError:
            found = None  # a new file, or one that a power failure has torn
        if isinstance(found, dict) and found.get("wanted") == self._wanted and not force:
            self.done = [self._durable(file, done) for file, done in zip(self.files, found["done"], strict=True)]
            return
        held = [file.path for file in self.files if file.path.exists()]
        if (held or found is not None) and not force:
            if found is None:
                os.unlink(self.path)
            what = "is there already" if held else "an unfinished conversion with another plan or source"
            fix = "give another name, or --force to start over"
            raise InputError(what, where=held[0] if held else self.path, fix=fix)
        self._record()

    def _durable(self, file: File, done: int) -> int:
        """How many of a file's tensors this run can keep: what was recorded, where the file is still there."""
        if file.path.exists():
            return len(file.lines) if file.path.stat().st_size == file.nbytes else 0
        return done if file.partial.exists() and file.partial.stat().st_size == file.nbytes else 0

    def _check_space(self) -> None:
        needed = sum(file.nbytes for file, done in zip(self.files, self.done, strict=True) if done < len(file.lines))
        partial = sum(f.partial.stat().st_blocks * 512 for f in self.files if f.partial.exists())
        free = shutil.disk_usage(self.path.parent).free + partial
        if needed > free:
            if not any(self.done):
                os.unlink(self.path)
            what = f"needs {needed:,} bytes, the disk has {free:,} free"
            raise InputError(what, where=self.path.parent, fix="free space, or give a file on another disk")

    def record(self, number: int, done: int) -> None:
        """Tensors before the `done`-th of file `number` are durable."""
        self.done[number] = done
        with disk_errors(self.path):
            self._record()

    def _record(self) -> None:
        content = json.dumps({"wanted": self._wanted, "done": self.done}).encode()
        os.pwrite(self._descriptor, content.ljust(os.fstat(self._descriptor).st_size), 0)

    def finish(self) -> None:
        """All files are whole."""
        with disk_errors(self.path):
            os.unlink(self.path)
            sync_folder(self.path.parent)

    def close(self) -> None:
        """Release the lock; an unfinished conversion stays resumable."""
        os.close(self._descriptor)
