"""The finished files of a work folder, each recorded with the hash it had when it was finished.

Only what still has its hash is used by a later run. The record is a state log in the folder itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from dsv2quant.state import StateLog
from dsv2quant.writer import Entry, damaged_files, is_regular

LOG_FILE = "pieces.json"
_FIRST = {"schema": "dsv2quant.pieces/1"}


class Pieces:
    """Those of one folder, which is locked until it is closed. A context."""

    def __init__(self, folder: Path) -> None:
        """Open the folder, or make it. Raises InputError where another run has it, and OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._log = StateLog(folder / LOG_FILE, folder)
        try:
            if not self._log.lines or self._log.lines[0] != _FIRST:
                self.clear()
        except BaseException:
            self._log.close()
            raise
        self._entries = {str(line.get("file")): _entry(line) for line in self._log.lines[1:]}

    def __enter__(self) -> Pieces:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()

    def holds(self, path: Path) -> bool:
        """Whether a file was finished and is there; `damaged` says whether it is what it was."""
        return path.name in self._entries and is_regular(path)

    def damaged(self, paths: Iterable[Path]) -> list[Path]:
        """Those that are not what was written to them: missing, never recorded, or of another hash. Reads them."""
        names = [path.name for path in paths]
        differing = set(damaged_files(self.folder, {name: self._entries.get(name, {}) for name in names}))
        return [self.folder / name for name in names if name in differing]

    def record(self, path: Path, entry: Entry) -> None:
        """A file with this manifest entry is durable, or about to be. Raises OSError."""
        self._log.append({"file": path.name} | entry)
        self._entries[path.name] = entry

    def clear(self) -> None:
        """Forget and remove all files. Raises OSError."""
        self._log.start(dict(_FIRST))
        self._entries = {}
        for path in self.folder.iterdir():
            if path.name != LOG_FILE:
                path.unlink()


def _entry(line: dict[str, object]) -> Entry:
    return {key: line.get(key) for key in ("size", "sha256")}
