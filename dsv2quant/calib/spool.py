"""Activations of all calibration tokens, in a file: the operating system keeps in memory what fits."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from dsv2quant.calib.pieces import Pieces
from dsv2quant.writer import hash_file

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
