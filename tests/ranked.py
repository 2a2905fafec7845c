"""Calls and commands on several ranks at once: processes with gloo, forked from one that has imported torch."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch.distributed", "dsv2quant.evaluation.measure", "dsv2quant.calib.collect", "dsv2quant.allocation.search"]
)


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


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def commands(*each: Sequence[object], before: Mapping[int, Callable[[], None]] | None = None) -> list[Ended]:
    """Run the command on as many ranks as there are command lines; `before` are functions of a module that a rank calls
    first."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun has it in a process of its own
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank, words in enumerate(each):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(each), "MASTER_PORT": store.port}
            call = (before or {}).get(rank)
            process = CONTEXT.Process(target=_command, args=(list(map(str, words)), place, Path(folder), call))
            process.start()
            processes.append(process)
        for process in processes:
            process.join()
        texts = [
            [(Path(folder) / f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(len(each))
        ]
    return [Ended(process.exitcode or 0, *text) for process, text in zip(processes, texts, strict=True)]


def _command(words: list[str], place: Mapping[str, int], folder: Path, before: Callable[[], None] | None) -> None:
    import torch

    from dsv2quant.cli.main import main

    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{place['RANK']}.{name}", os.O_WRONLY | os.O_CREAT), fd)
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    sys.argv = ["dsv2quant", *words]
    if before is not None:
        before()
    main()
