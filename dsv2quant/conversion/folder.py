"""The output folder of a conversion: claimed, resumed, finished.

config.json comes last: without it no consumer loads the folder. While the work is unfinished a state file names the
plan, the source and the files to come, and has the hash of every finished shard; a later run with the same plan and
source keeps the shards that still have theirs. Only what a state file or a manifest names is ever removed.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from dsv2quant.checkpoint.identity import Source
from dsv2quant.errors import InputError, listing
from dsv2quant.planning.plan import Plan
from dsv2quant.planning.smoothing import SMOOTHING_FILE
from dsv2quant.progress import Progress, no_progress
from dsv2quant.storage.durable import (
    MANIFEST_FILE,
    PARTIAL,
    STATE_FILE,
    WORK_FOLDER,
    FileEntry,
    damaged_files,
    disk_errors,
    file_entry,
    is_regular,
    refuse_inputs,
    sync_folder,
    write_whole,
)
from dsv2quant.storage.files import is_artifact_path
from dsv2quant.storage.safetensors import INDEX_FILE, read_json
from dsv2quant.storage.work import StateLog

logger = logging.getLogger(__name__)
CARD_FILE = "README.md"  # its reader's to edit: it doesn't say whether an artifact is whole
_ASIDE = 1 << 20  # what the manifest may need, and the file system


class ArtifactFolder:
    """The output folder of one conversion, locked while it is open."""

    def __init__(
        self,
        path: Path,
        plan: Plan,
        source: Source,
        *,
        small: Collection[str] = (),
        calibration: Mapping[str, Any] | None = None,
        aside: int = 0,
        force: bool = False,
        inputs: Iterable[Path] = (),
        progress: Progress = no_progress,
    ) -> None:
        """Create or resume. `small` are the names of the files beside the shards, `aside` is what they need, in bytes;
        `inputs` are the files and folders that the conversion reads. Raises InputError where the folder holds something
        else or an input, another run is writing to it, or the disk is too small.

        An artifact is the same if its plan is, its source, and what it was calibrated on.

        `complete` is then the manifest's file list if it already holds this very artifact, every byte of it, and
        `finished` has the manifest entries of the shards to keep.
        """
        self.path, self.plan = path, plan
        self._source, self._calibration = source, calibration
        self._names = {*small, MANIFEST_FILE, *(shard.file for shard in plan.shards)}
        self._state: StateLog | None = None
        self.complete: dict[str, FileEntry] | None = None
        self.finished: dict[str, FileEntry] = {}
        if path.exists() and any(map(path.samefile, plan.checkpoint.inputs)):
            raise InputError("is the checkpoint's own folder", where=path, fix="give another output folder")
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            try:
                self._claim(force, list(inputs), progress)
                if self.complete is None:
                    self._check_space(aside)
            except BaseException:
                self.close()
                raise

    def _claim(self, force: bool, inputs: list[Path], progress: Progress) -> None:
        if self.work.is_symlink():
            raise InputError("is a link", where=self.work, fix="remove it")
        manifest, held = self._manifest(), {entry.name for entry in self.path.iterdir()} - {STATE_FILE}
        begun = os.path.lexists(self.path / STATE_FILE)
        if manifest is not None and not begun and not force and self._is_planned(manifest):
            self._check_complete(manifest, progress)
            return
        wanted = {
            "schema": "dsv2quant.state/2",
            "plan": self.plan.digest,
            "source": self._source.identity | {"stats": self._source.stats},
            "calibration": self._calibration,
            "names": sorted(self._names),
        }
        self._state = StateLog(self.path / STATE_FILE, self.path)
        lines = self._state.lines
        refuse_inputs(map(self.path.joinpath, {STATE_FILE, *self._names, *self._owned(manifest)}), inputs)
        if lines and lines[0] == wanted and not force:
            self._keep(lines[1:], progress)
            return
        try:
            if held and not force:
                self._refuse(lines[0] if lines else None)
            self._start_over(manifest, held, wanted)
        except InputError:
            if not lines:
                os.unlink(self.path / STATE_FILE)
            raise

    def _refuse(self, unfinished: Mapping[str, Any] | None) -> None:
        what = "is not empty"
        if unfinished is not None:
            what = "holds an unfinished conversion with another plan or source"
        raise InputError(what, where=self.path, fix="give another output folder, or --force to start over")

    def _manifest(self) -> dict[str, Any] | None:
        """A manifest of ours that lists its files; None where there is none."""
        if not is_regular(self.path / MANIFEST_FILE):
            return None
        try:
            manifest = read_json(self.path / MANIFEST_FILE)
        except InputError:
            return None
        files, schema = manifest.get("files"), str(manifest.get("schema"))
        ours = schema.startswith("dsv2quant.manifest/") and isinstance(files, dict) and all(map(self._is_inside, files))
        return manifest if ours else None

    def _is_inside(self, name: object) -> bool:
        if not isinstance(name, str) or not is_artifact_path(name):
            return False
        return (self.path / name).parent.resolve().is_relative_to(self.path.resolve())

    def _is_planned(self, manifest: Mapping[str, Any]) -> bool:
        return bool(manifest.get("plan") == self.plan.digest and manifest.get("calibration") == self._calibration)

    def _check_complete(self, manifest: Mapping[str, Any], progress: Progress) -> None:
        """Set `complete` where the folder is what its manifest says, and that of this source. Raises InputError."""
        source = manifest.get("source")
        differing = self._source.differences(source.get("identity") if isinstance(source, dict) else None)
        if differing is not None:
            what, fix = f"holds the artifact of another source: {differing}", "give another output folder, or --force"
            raise InputError(what, where=self.path, fix=f"{fix} to replace it")
        files = {name: entry for name, entry in manifest["files"].items() if name != CARD_FILE}
        lacking = sorted(self._names - {MANIFEST_FILE, CARD_FILE} - files.keys())
        with progress(self.plan.bytes_out, "B", "check") as advance:
            damaged = lacking or damaged_files(self.path, files, advance)
        if damaged:
            what = f"not as its manifest has it: {listing(damaged)}"
            raise InputError(what, where=self.path, fix="--force to convert again, or get the files again")
        self.complete = manifest["files"]

    def _keep(self, recorded: list[dict[str, Any]], progress: Progress) -> None:
        """Set `finished`: the shards that have the hash that was recorded when they were written."""
        entries = {str(line.get("file")): {key: line.get(key) for key in ("size", "sha256")} for line in recorded}
        there = {s.file: entries[s.file] for s in self.plan.shards if s.file in entries}
        there = {file: entry for file, entry in there.items() if is_regular(self.path / file)}
        with progress(sum(s.nbytes for s in self.plan.shards if s.file in there), "B", "check") as advance:
            damaged = damaged_files(self.path, there, advance)
        for file in damaged:
            logger.warning("%s: is not what was written to it; it is made again", self.path / file)
        self.finished = {file: entry for file, entry in there.items() if file not in damaged}
        if len(self.finished) < len(self.plan.shards):
            for name in ("config.json", MANIFEST_FILE):  # nothing looks finished while a shard is missing
                (self.path / name).unlink(missing_ok=True)

    def _owned(self, manifest: Mapping[str, Any] | None) -> list[str]:
        """Names that this folder's manifest or state says we wrote, the manifest last."""
        assert self._state is not None
        first = self._state.lines[0] if self._state.lines else {}
        named = first.get("names") if str(first.get("schema")).startswith("dsv2quant.state/") else None
        names = {SMOOTHING_FILE, *filter(self._is_inside, named)} if isinstance(named, list) else set()
        names |= set(manifest["files"]) if manifest is not None else set()
        names |= {name + PARTIAL for name in names}
        ours = names or manifest is not None
        return [*sorted(names - {MANIFEST_FILE}), *([MANIFEST_FILE] if ours else [])]

    def _start_over(self, manifest: Mapping[str, Any] | None, held: set[str], wanted: dict[str, Any]) -> None:
        """Remove what we wrote before. Raises InputError where something else is in the way: what has a name that will
        be written, or that a consumer would load with it."""
        assert self._state is not None
        owned = self._owned(manifest)
        planned = {SMOOTHING_FILE, *self._names, *(name + PARTIAL for name in self._names)}
        loaded = {name for name in held if name.endswith(".safetensors")} | {INDEX_FILE}
        foreign = sorted(held & (planned | loaded) - set(owned))
        if foreign:
            what = f"no conversion of dsv2quant's wrote {listing(foreign)}, and --force removes nothing else"
            raise InputError(what, where=self.path, fix="give another output folder, or remove them yourself")
        for name in owned:
            if not (self.path / name).is_dir():
                (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)
        self._state.start(wanted)
        sync_folder(self.path)

    def _check_space(self, aside: int) -> None:
        needed = sum(shard.nbytes for shard in self.plan.shards if shard.file not in self.finished) + aside + _ASIDE
        partial = [entry for entry in self.path.iterdir() if entry.name.endswith(PARTIAL)]
        free = shutil.disk_usage(self.path).free + sum(entry.lstat().st_size for entry in partial)
        if needed > free:
            if not self.finished and not partial:
                os.unlink(self.path / STATE_FILE)
            what = f"needs {needed:,} bytes, the disk has {free:,} free"
            raise InputError(what, where=self.path, fix="free space, or give a folder on another disk")

    def record(self, file: str, entry: FileEntry) -> None:
        """A shard with this manifest entry is durable, and about to have its name."""
        assert self._state is not None
        self._state.append({"file": file} | entry)

    def write_file(self, name: str, content: bytes) -> FileEntry:
        """Write a small file at once or not at all; returns its manifest entry."""
        with disk_errors(self.path / name):
            (self.path / name).parent.mkdir(exist_ok=True)
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
            self._state.close()
            self._state = None
