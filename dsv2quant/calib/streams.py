"""The finished files of a work folder, each recorded with the hash it had when it was finished: only what still has its
hash is used by a later run. The record is a state log in the folder itself.

Taking calibration tokens through a model layer by layer, in streams of hidden states; one layer is in memory.
A work folder holds what was made of each finished layer (`layer-N.safetensors`), and snapshots of the streams
(`hidden-N-SIDE`, in front of layer N). A killed run goes on behind the last finished layer: from a snapshot there, or
from an earlier one through the layers between, by what was made of them.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from dsv2quant.calib.calibration import layer_file
from dsv2quant.calib.distributed import ALONE, Ranks
from dsv2quant.calib.hidden import ROWS, Stream
from dsv2quant.model.load import Loader
from dsv2quant.storage.durable import FileEntry, StateLog, damaged_files, file_entry, is_regular, write_whole

logger = logging.getLogger(__name__)
LOG_FILE = "pieces.json"
SNAPSHOT_AFTER = 300.0  # seconds of work, where finished layers can be gone through again
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


Made = tuple[dict[str, np.ndarray], Any]  # tensors, and what goes beside them as JSON
Process = Callable[[int], Made]  # takes the hidden states in front of a layer behind it
Again = Callable[[int], object]  # the same of a finished layer, by what was made of it


def through_layers(
    folder: Path | None,
    loader: Loader,
    ids: np.ndarray,
    streams: Mapping[str, Stream],
    process: Process,
    kept: Callable[[int], object],
    again: Again | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Call `process` for every layer that `folder` doesn't hold yet, and keep what it returns there.

    `ids` are this rank's token windows [windows, ctx]. All streams, by name, begin with their embeddings and end as the
    last layer leaves them; they are left alone where nothing is left to do and layers can be gone through `again`.
    `kept` is called with how many layers were finished before. Where layers can be gone through again, a single rank
    takes a snapshot every `SNAPSHOT_AFTER` seconds until the last layer, several none; otherwise there is one behind
    each layer. The first rank alone has a folder.
    """
    count = loader.config.num_hidden_layers
    with Pieces(folder) if folder is not None else nullcontext() as pieces:
        found = (0, 0) if pieces is None else _finished(pieces, count, list(streams), replayed=again is not None)
        made, start = ranks.agreed(found)
        start = start if ranks.size == 1 else 0  # a snapshot is of all tokens
        kept(made)
        if made == count and again is not None:
            return
        if made:
            logger.info("calibration continues at layer %d of %d", made, count)
        elif pieces is not None:
            pieces.clear()
        if start:
            assert folder is not None
            for side, stream in streams.items():
                stream.read(_snapshot(folder, start, side))
        else:
            _embed(loader, torch.from_numpy(ids.reshape(-1)), streams.values())
        for layer in range(start, made):
            assert again is not None
            again(layer)
        last = time.monotonic()
        with ThreadPoolExecutor(1) as saving:
            saved: Future[None] | None = None
            for layer in range(made, count):
                tensors, about = process(layer)
                if saved is not None:
                    saved.result()
                if pieces is None:
                    continue
                due = ranks.size == 1 and layer + 1 < count and time.monotonic() - last >= SNAPSHOT_AFTER
                if again is None or due:
                    _write_snapshot(pieces, layer + 1, streams)
                    last = time.monotonic()
                saved = saving.submit(_save, pieces, layer, tensors, about)
                if again is None:
                    saved.result()
            if saved is not None:
                saved.result()


def _write_snapshot(pieces: Pieces, layer: int, streams: Mapping[str, Stream]) -> None:
    for side, stream in streams.items():
        path = _snapshot(pieces.folder, layer, side)
        pieces.record(path, stream.write(path))


def _save(pieces: Pieces, layer: int, tensors: dict[str, np.ndarray], about: Any) -> None:
    """Keep what was made of a layer; of snapshots the last alone is needed then."""
    save_layer(layer_file(pieces.folder, layer), tensors, pieces, about)
    snapshots = sorted(pieces.folder.glob("hidden-*"))
    for path in snapshots:
        if path.name.split("-")[1] != snapshots[-1].name.split("-")[1]:
            path.unlink()


def _snapshot(folder: Path, layer: int, side: str) -> Path:
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


def _finished(pieces: Pieces, count: int, sides: Sequence[str], *, replayed: bool) -> tuple[int, int]:
    """How many layers a run before left, and the layer in front of which it left the streams, 0 for none. Where layers
    can't be gone through again, a layer without the streams behind it is of no use."""
    layers = [layer_file(pieces.folder, layer) for layer in range(count)]
    made = next((layer for layer, path in enumerate(layers) if not pieces.holds(path)), count)
    damaged = pieces.damaged(layers[:made])
    if damaged:
        made = layers.index(damaged[0])
    start = made
    while start:
        snapshots = [_snapshot(pieces.folder, start, side) for side in sides]
        if all(pieces.holds(path) for path in snapshots):
            lost = pieces.damaged(snapshots)
            damaged += lost
            if not lost:
                break
        start -= 1
    for path in damaged:
        logger.warning("%s: is not what was written to it; what it held is made again", path)
    return (made, start) if replayed or start == made else (0, 0)


def _embed(loader: Loader, tokens: torch.Tensor, streams: Iterable[Stream]) -> None:
    ends = loader.ends()
    for stream in streams:
        for first in range(0, len(tokens), ROWS):
            stream[slice(first, first + ROWS)] = ends.embed(tokens[first : first + ROWS].to(stream.device))


def save_layer(path: Path, tensors: dict[str, np.ndarray], pieces: Pieces, about: Any = None) -> None:
    """Write what was made of a layer: durable under its own name and recorded, or not there."""
    content = save(tensors, {"about": json.dumps(about)})  # save_file() raises no OSError on a full disk
    pieces.record(path, file_entry(content))
    write_whole(path, [content])
