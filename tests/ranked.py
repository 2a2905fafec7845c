"""Calls on several ranks at once: processes with gloo, forked from one that has imported torch."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "dsv2quant.model.load"])


def on_ranks(size: int, call: Callable[..., Any], *args: Any) -> list[Any]:
    """What `call(ranks, *args)` returns on each of `size` ranks; what one raises is raised here. The call is a function
    of a module."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(size, CONTEXT) as pool:
        running = [pool.submit(_joined, rank, size, Path(folder) / "store", call, args) for rank in range(size)]
        return [future.result() for future in running]


def _joined(rank: int, size: int, store: Path, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    import torch
    from torch.distributed import FileStore

    from dsv2quant.calib.distributed import joined

    torch.set_num_threads(1)
    with joined("cpu", rank, rank, size, FileStore(str(store), size)) as ranks:
        return call(ranks, *args)
