"""Making a kept reference: locked while it is made, resumed after a kill, whole or not there.

All windows go through a layer before the next one, so that what is worth keeping of unfinished work are hidden states
behind a layer and the experts chosen so far: a snapshot beside the file, `<file>.hidden`, in place of the one before.
What is made of a snapshot has the same bytes as what is made in one go.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dsv2quant.errors import InputError, listing
from dsv2quant.evaluation.divergence import Routes
from dsv2quant.evaluation.reference import KeptReference, contents
from dsv2quant.storage.durable import StateLog, is_regular, write_whole
from dsv2quant.storage.safetensors import read_header

EVERY = 60.0  # seconds between two snapshots: what a kill may cost, beside the layer at hand


def snapshot_path(path: Path) -> Path:
    """Where the snapshot of an unfinished reference lies."""
    return path.with_name(f"{path.name}.hidden")


class Snapshots:
    """Those of one reference, each in the place of the one before."""

    def __init__(self, path: Path) -> None:
        self._path, self._taken = path, time.monotonic()

    def begun(self, device: str) -> tuple[torch.Tensor, Routes] | None:
        """Hidden states behind the last layer that a snapshot was taken of, and the experts chosen up to there."""
        if not is_regular(self._path):
            return None
        read_header(self._path)
        with safe_open(self._path, "pt") as file:
            hidden: torch.Tensor = file.get_tensor("hidden").to(device, copy=True)  # the next layer changes them
            names, layers = set(file.keys()), int(file.metadata()["layers"])
            routes = [f"routes.{layer}" for layer in range(layers)]
            return hidden, [file.get_tensor(name).to(device) if name in names else None for name in routes]

    def take(self, hidden: torch.Tensor, routes: Routes) -> None:
        """Take one, durably, if it is time. Raises OSError."""
        if time.monotonic() - self._taken < EVERY:
            return
        tensors = {"hidden": hidden} | {f"routes.{i}": r for i, r in enumerate(routes) if r is not None}
        write_whole(self._path, contents(self._path.name, tensors, {"layers": str(len(routes))}))
        self._taken = time.monotonic()


@contextmanager
def claimed(path: Path, wanted: Mapping[str, Any]) -> Iterator[Snapshots]:
    """The work on a reference under conditions that are `wanted`, locked. What it leaves beside the file goes at the
    end; a snapshot stays where that comes early. Raises InputError where another run makes it, or unfinished work is
    there under other conditions."""
    snapshot, state = snapshot_path(path), path.with_name(f"{path.name}.state")
    log = StateLog(state, path)
    try:
        if snapshot.exists() and log.lines[:1] != [dict(wanted)]:
            what = "is of an unfinished reference of another model, text or version, or none of ours"
            raise InputError(what, where=snapshot, fix="remove it, or give another file")
        if log.lines[:1] != [dict(wanted)]:
            log.start(dict(wanted))
        yield Snapshots(snapshot)
        snapshot.unlink(missing_ok=True)
    finally:
        if not snapshot.exists():
            state.unlink(missing_ok=True)
        log.close()


def made_already(path: Path, wanted: Mapping[str, Any]) -> KeptReference | None:
    """The reference that is there, None where there is none. Raises InputError where something else has its place."""
    if not os.path.lexists(path):
        return None
    fix = "give another file, or remove it yourself"
    try:
        kept = KeptReference.opened(path)
    except InputError as error:
        what = str(error).removeprefix(f"{path}: ").partition(" (")[0]
        raise InputError(f"is there, and {what}", where=path, fix=fix) from None
    differing = [key for key, value in wanted.items() if kept.about.get(key) != value]
    if differing:
        raise InputError(f"is there, with another {listing(differing)} than asked for", where=path, fix=fix)
    return kept
