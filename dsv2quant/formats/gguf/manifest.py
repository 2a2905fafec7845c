"""The manifest of a finished GGUF file, `<name>.gguf.json` beside it: its hash, and what it was made from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv2quant import __version__
from dsv2quant.checkpoint import Checkpoint
from dsv2quant.errors import InputError, listing
from dsv2quant.formats.gguf.plan import File
from dsv2quant.headers import read_json
from dsv2quant.manifest import gguf_manifest, sealed
from dsv2quant.progress import Progress
from dsv2quant.source import Source
from dsv2quant.writer import Entry, damaged_files, disk_errors, dump_json, is_regular, write_whole

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

    def complete(self, progress: Progress) -> dict[str, Entry] | None:
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
        entries: dict[str, Entry] = {file.path.name: manifest["files"].get(file.path.name, {}) for file in self._files}
        with progress(sum(file.nbytes for file in self._files), "B", "check") as advance:
            damaged = damaged_files(self._out.parent, entries, advance)
        if damaged:
            what = f"not as its manifest has it: {listing(damaged)}"
            raise InputError(what, where=self._out, fix="--force to convert again, or get the file again")
        return entries

    def write(self, checkpoint: Checkpoint, command: str, entries: dict[str, Entry]) -> None:
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
