"""Hidden states of all calibration tokens: on the device, in memory, or in a file."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch

from dsv2quant.calib.calibration import LANES, ROWS
from dsv2quant.errors import UsageError
from dsv2quant.model.layers import add_rows
from dsv2quant.storage.durable import FileEntry, write_whole


class Stream:
    """A float32 array [tokens, width], handed out on `device`."""

    def __init__(self, tokens: int, width: int, device: str, at: Path | str) -> None:
        """`at` is "device", "memory", or the folder of a file without a name, of which the operating system keeps in
        memory what fits. Raises OSError where the disk is full, and UsageError where memory can't be locked."""
        self.device = device
        if isinstance(at, Path):
            at.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=at) as file:
                # On a full disk, writing to a hole that is mapped would kill the process (SIGBUS).
                os.posix_fallocate(file.fileno(), 0, 4 * tokens * width)
                self._rows = torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(tokens, width)))
        else:
            with torch.inference_mode(False):  # what is trained later may be handed out as it lies
                self._rows = torch.empty(tokens, width, device=device if at == "device" else "cpu")
        # A GPU's copies run at the bus's rate, and its kernels reach the rows.
        is_beside = at == "memory" and device != "cpu"
        self._unpin = _pinned(self._rows) if is_beside else None

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
        if self._unpin is not None:
            from dsv2quant.kernels.gather import gather_rows

            return gather_rows(self._rows, torch.as_tensor(rows, device=self.device))
        index = torch.as_tensor(rows, device=self._rows.device)
        return self._rows.index_select(0, index).to(self.device)

    def __setitem__(self, rows: slice, values: torch.Tensor) -> None:
        self._rows[rows].copy_(values, non_blocking=True)

    def add(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Add values [n, width] to distinct tokens."""
        self._settle()
        add_rows(self._rows, rows.to(self._rows.device), values.to(self._rows.device))

    def _settle(self) -> None:
        """Before a processor looks at what a GPU writes."""
        if self._unpin is not None:
            torch.cuda.synchronize(self.device)

    def take(self, other: Stream) -> None:
        """Take the values of another."""
        other._settle()
        self._rows.copy_(other._rows)

    def zero(self) -> None:
        """Set all to 0."""
        self._rows.zero_()

    def remove(self) -> None:
        """Give back what it takes."""
        self._settle()
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        self._rows = self._rows.new_empty(0, self.width)

    def write(self, path: Path) -> FileEntry:
        """Write all to a file, durable under its name; its manifest entry. Raises OSError."""
        self._settle()
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


def _pinned(rows: torch.Tensor) -> weakref.finalize[..., torch.Tensor]:
    """Page-lock an array where it lies; torch's own pinned memory would take the next power of two. What is returned
    undoes it, when it is called or the array is no more. Raises UsageError where the system refuses."""
    runtime = torch.cuda.cudart()
    rows.zero_()  # pages are there before they are locked, brought by all threads
    if status := int(runtime.cudaHostRegister(rows.data_ptr(), rows.nbytes, 0)):
        what = f"{rows.nbytes / 1e9:.1f} GB of hidden states can't be locked in the host's memory (CUDA error {status})"
        raise UsageError(what, fix="calibrate on fewer tokens: --num-calibration-samples, --max-seq-length")
    undo = weakref.finalize(rows, runtime.cudaHostUnregister, rows.data_ptr())
    undo.atexit = False
    return undo


def make_streams(
    count: int, tokens: int, width: int, device: str, folder: Path | None, beside: int = 0
) -> list[Stream]:
    """So many: as many as there is room for on a GPU, beside `beside`, what else is computed there; the others in
    memory, where that holds them; else in files in `folder`, if one is given."""
    streams: list[Stream] = []
    each = 4 * tokens * width
    while device != "cpu" and len(streams) < count and each + beside <= room_on(device):
        streams.append(Stream(tokens, width, device, "device"))
    others = count - len(streams)
    needed = others * each + (beside if device == "cpu" else 0)
    at = "memory" if folder is None or needed <= room_on("cpu") else folder
    return streams + [Stream(tokens, width, device, at) for _ in range(others)]


def room_on(device: str) -> int:
    """Bytes that may be taken: what torch can still have of a GPU, within its share, or three quarters of the machine's
    memory."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
    free, total = torch.cuda.mem_get_info(device)
    index = torch.device(device).index
    fraction = torch.cuda.get_per_process_memory_fraction(torch.cuda.current_device() if index is None else index)
    share = int(total * fraction)
    return min(free + torch.cuda.memory_reserved(device), share) - torch.cuda.memory_allocated(device)


def batches(tokens: int, ctx: int) -> list[slice]:
    """Slices of whole windows, about `ROWS` tokens each."""
    size = max(1, ROWS // ctx) * ctx
    return [slice(first, min(first + size, tokens)) for first in range(0, tokens, size)]


def lanes(tokens: int, ctx: int) -> list[list[slice]]:
    """The batches, in `LANES` parts or fewer."""
    every = batches(tokens, ctx)
    each = -(-len(every) // LANES)
    return [every[first : first + each] for first in range(0, len(every), each)]


def rows_of(windows: np.ndarray, ctx: int) -> np.ndarray:
    """The tokens of some windows, of which each has ctx."""
    return (windows[:, None] * ctx + np.arange(ctx)).ravel()
