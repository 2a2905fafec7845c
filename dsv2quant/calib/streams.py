"""The finished files of a work folder, each recorded with the hash it had when it was finished.

Only what still has its hash is used by a later run. The record is a state log in the folder itself.

Activations of all calibration tokens, in a file: the operating system keeps in memory what fits.

Taking calibration tokens through a model layer by layer, resumable after each.

A work folder holds, per finished layer, what was made of it (`layer-N.safetensors`), and one or two streams of hidden
states in front of the next. Only one layer's weights are in memory.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from dsv2quant.calib.calibration import layer_file
from dsv2quant.model.load import Loader
from dsv2quant.storage.durable import FileEntry, StateLog, damaged_files, file_entry, hash_file, is_regular, write_whole

logger = logging.getLogger(__name__)
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
        self._entries = {
            str(line.get("file")): {key: line.get(key) for key in ("size", "sha256")} for line in self._log.lines[1:]
        }

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, *exception: object) -> None:
        self._log.close()

    def holds(self, path: Path) -> bool:
        """Whether a file was finished and is there; `damaged` says whether it is what it was."""
        return path.name in self._entries and is_regular(path)

    def damaged(self, paths: Iterable[Path]) -> list[Path]:
        """Those that are not what was written to them: missing, never recorded, or of another hash. Reads them."""
        names = [path.name for path in paths]
        differing = set(damaged_files(self.folder, {name: self._entries.get(name, {}) for name in names}))
        return [self.folder / name for name in names if name in differing]

    def record(self, path: Path, entry: FileEntry) -> None:
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


ROWS = 8192  # tokens that go through a layer at once


class Spool:
    """A float32 array [tokens, width] on disk; `device` is where its parts are handed out.

    A new one lies under `<name>.partial` until `keep` makes it durable under its own name.
    """

    def __init__(self, path: Path, tokens: int, width: int, device: str) -> None:
        self.path, self.device = path, device
        self._partial = path.with_name(path.name + ".partial")
        self._array: np.memmap
        if path.exists():
            self._array = np.memmap(path, np.float32, "c", shape=(tokens, width))
        else:
            self._array = np.memmap(self._partial, np.float32, "w+", shape=(tokens, width))
            with self._partial.open("rb+") as file:
                # On a full disk, writing to a hole that is mapped would kill the process (SIGBUS).
                os.posix_fallocate(file.fileno(), 0, self._array.nbytes)

    def __len__(self) -> int:
        return len(self._array)

    @property
    def width(self) -> int:
        return int(self._array.shape[1])

    def __getitem__(self, rows: slice | np.ndarray) -> torch.Tensor:
        """Some tokens, [·, width]; not to be changed."""
        return torch.from_numpy(self._array[rows]).to(self.device)

    def __setitem__(self, rows: slice, values: torch.Tensor) -> None:
        torch.from_numpy(self._array[rows]).copy_(values)

    def keep(self, pieces: Pieces) -> None:
        """Write everything to disk, record it among the finished pieces, and give the file its name. Its hash takes
        one more read: of V2's 21 GB for a million tokens about 15 s, from memory."""
        self._array.flush()
        with self._partial.open("rb") as file:
            os.fsync(file.fileno())
        pieces.record(self.path, hash_file(self._partial))
        self._partial.rename(self.path)

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)
        self._partial.unlink(missing_ok=True)


Made = tuple[dict[str, np.ndarray], Any]  # tensors, and what goes beside them as JSON
# layer, hidden states before it, where those behind it go → what was made of it
Process = Callable[[int, Sequence[Spool], Sequence[Spool]], Made]


def through_layers(
    folder: Path,
    loader: Loader,
    ids: np.ndarray,
    sides: Sequence[str],
    process: Process,
    kept: Callable[[int], object],
) -> None:
    """Call `process` for every layer that `folder` doesn't hold yet, and keep what it returns there.

    `ids` are token windows [windows, ctx]; each of `sides` names a stream, all of which begin with their embeddings.
    `kept` is called with how many layers were finished before.
    """
    count = loader.config.num_hidden_layers

    def files(layer: int) -> list[Path]:
        return [_stream(folder, layer, side) for side in sides]

    def streams(layer: int) -> list[Spool]:
        return streams_at(folder, layer, sides, loader, ids.size)

    with Pieces(folder) as pieces:
        start = _finished(pieces, count, files)
        kept(start)
        if start:
            logger.info("calibration continues at layer %d of %d", start, count)
        else:
            pieces.clear()
            _embed(loader, torch.from_numpy(ids.reshape(-1)), streams(0), pieces)
        for layer in range(start, count):
            for path in files(layer + 1):
                path.unlink(missing_ok=True)
            before, behind = streams(layer), streams(layer + 1)
            tensors, about = process(layer, before, behind)
            for spool in behind:
                spool.keep(pieces)
            save_layer(layer_file(folder, layer), tensors, pieces, about)
            for spool in before:
                spool.remove()


def streams_at(folder: Path, layer: int, sides: Sequence[str], loader: Loader, tokens: int) -> list[Spool]:
    """The hidden states in front of a layer, or behind the last, [tokens, hidden]."""
    width, device = loader.config.hidden_size, loader.options.device
    return [Spool(_stream(folder, layer, side), tokens, width, device) for side in sides]


def _stream(folder: Path, layer: int, side: str) -> Path:
    return folder / f"hidden-{layer:05d}-{side}"


def by_layers(progress: Callable[[int], object], count: int) -> Callable[[int], None]:
    """Takes how many tokens went through layers so far, each as often as it did, and counts those that went through
    all `count`."""
    told = 0

    def tell(passed: int) -> None:
        nonlocal told
        progress(passed // count - told)
        told = passed // count

    return tell


def _finished(pieces: Pieces, count: int, streams: Callable[[int], list[Path]]) -> int:
    """Of how many layers a run before left what is needed: themselves and, if any is missing, the streams in front of
    the next. A layer can't be made again alone, so if one of these files isn't what was written, it is none."""
    layers = [layer_file(pieces.folder, layer) for layer in range(count)]
    start = next((layer for layer, path in enumerate(layers) if not pieces.holds(path)), count)
    damaged = pieces.damaged([*layers[:start], *(streams(start) if 0 < start < count else ())])
    for path in damaged:
        logger.warning("%s: is not what was written to it; calibration starts over", path)
    return 0 if damaged else start


def batches(tokens: int, ctx: int) -> list[slice]:
    """Slices of whole windows, about `ROWS` tokens each."""
    size = max(1, ROWS // ctx) * ctx
    return [slice(first, min(first + size, tokens)) for first in range(0, tokens, size)]


def rows_of(windows: np.ndarray, ctx: int) -> np.ndarray:
    """The tokens of some windows, of which each has ctx."""
    return (windows[:, None] * ctx + np.arange(ctx)).ravel()


def _embed(loader: Loader, tokens: torch.Tensor, streams: Sequence[Spool], pieces: Pieces) -> None:
    ends = loader.ends()
    for stream in streams:
        for first in range(0, len(tokens), ROWS):
            stream[slice(first, first + ROWS)] = ends.embed(tokens[first : first + ROWS].to(stream.device))
        stream.keep(pieces)


def save_layer(path: Path, tensors: dict[str, np.ndarray], pieces: Pieces, about: Any = None) -> None:
    """Write what was made of a layer: durable under its own name and recorded, or not there."""
    content = save(tensors, {"about": json.dumps(about)})  # save_file() raises no OSError on a full disk
    pieces.record(path, file_entry(content))
    write_whole(path, [content])
