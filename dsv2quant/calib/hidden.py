"""Hidden states of all calibration tokens: on the device, in memory, or in a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from dsv2quant.model.layers import add_rows
from dsv2quant.storage.durable import FileEntry, write_whole

ROWS = 8192  # tokens that go through a layer at once


class Stream:
    """A float32 array [tokens, width], handed out on `device`."""

    def __init__(self, tokens: int, width: int, device: str, at: Path | str) -> None:
        """`at` is "device", "memory", or the file to make, of which the operating system keeps in memory what fits.
        Raises OSError where the disk is full."""
        self.device = device
        self._file = at if isinstance(at, Path) else None
        if isinstance(at, Path):
            at.unlink(missing_ok=True)
            array = np.memmap(at, np.float32, "w+", shape=(tokens, width))
            with at.open("rb+") as file:
                # On a full disk, writing to a hole that is mapped would kill the process (SIGBUS).
                os.posix_fallocate(file.fileno(), 0, array.nbytes)
            self._rows = torch.from_numpy(array)
        else:
            pinned = at == "memory" and device != "cpu"  # a GPU's copies run at the bus's rate
            with torch.inference_mode(False):  # what is trained later may be handed out as it lies
                self._rows = torch.empty(tokens, width, device=device if at == "device" else "cpu", pin_memory=pinned)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def width(self) -> int:
        return int(self._rows.shape[1])

    @property
    def nbytes(self) -> int:
        return 4 * self._rows.numel()

    def __getitem__(self, rows: slice | torch.Tensor | np.ndarray) -> torch.Tensor:
        """Some tokens, [·, width], on the device; not to be changed."""
        if isinstance(rows, slice):
            return self._rows[rows].to(self.device, non_blocking=True)
        index = torch.as_tensor(rows, device=self._rows.device)
        return self._rows.index_select(0, index).to(self.device, non_blocking=True)

    def __setitem__(self, rows: slice, values: torch.Tensor) -> None:
        self._rows[rows] = values.to(self._rows.device)

    def add(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Add values [n, width] to distinct tokens."""
        add_rows(self._rows, rows.to(self._rows.device), values.to(self._rows.device))

    def take(self, other: Stream) -> None:
        """Take the values of another."""
        self._rows.copy_(other._rows)

    def zero(self) -> None:
        """Set all to 0."""
        self._rows.zero_()

    def remove(self) -> None:
        """Give back what it takes."""
        self._rows = self._rows.new_empty(0, self.width)
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def write(self, path: Path) -> FileEntry:
        """Write all to a file, durable under its name; its manifest entry. Raises OSError."""
        digest = hashlib.sha256()

        def blocks() -> Iterator[bytes]:
            for first in range(0, len(self), ROWS):
                block = self._rows[first : first + ROWS].cpu().numpy().tobytes()
                digest.update(block)
                yield block

        write_whole(path, blocks())
        return {"size": self.nbytes, "sha256": digest.hexdigest()}

    def read(self, path: Path) -> None:
        """Take all from such a file."""
        saved = np.memmap(path, np.float32, "r", shape=tuple(self._rows.shape))
        for first in range(0, len(self), ROWS):
            self._rows[first : first + ROWS] = torch.from_numpy(np.array(saved[first : first + ROWS]))


def make_streams(
    tokens: int, width: int, names: Sequence[str], device: str, folder: Path | None, beside: int = 0
) -> list[Stream]:
    """One for each name: on a GPU that has room for them and for `beside`, what else is computed there; in memory, where
    they take no more than half of the machine's; else in files in `folder`, if one is given."""
    nbytes = 4 * tokens * width * len(names)
    if device != "cpu" and nbytes + beside <= free_on(device):
        return [Stream(tokens, width, device, "device") for _ in names]
    if folder is None or 2 * nbytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        return [Stream(tokens, width, device, "memory") for _ in names]
    return [Stream(tokens, width, device, folder / f"{name}.states") for name in names]


def free_on(device: str) -> int:
    """Bytes that torch can still have of a GPU's memory, within the share that it may use."""
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return min(free + held, share) - torch.cuda.memory_allocated(device)


def batches(tokens: int, ctx: int) -> list[slice]:
    """Slices of whole windows, about `ROWS` tokens each."""
    size = max(1, ROWS // ctx) * ctx
    return [slice(first, min(first + size, tokens)) for first in range(0, tokens, size)]


def rows_of(windows: np.ndarray, ctx: int) -> np.ndarray:
    """The tokens of some windows, of which each has ctx."""
    return (windows[:, None] * ctx + np.arange(ctx)).ravel()
