"""Processes that torchrun started: which one this is, and which of them speaks.

Rank 0 prints. Where ranks end early, one of them says why: rank 0, unless it does not end by itself.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import click

from dsv2quant.calib.distributed import ALONE, Ranks, joined
from dsv2quant.cli.endings import EARLY, ending
from dsv2quant.cli.signals import Stopped

if TYPE_CHECKING:
    from torch.distributed import Store

SPOKEN = "dsv2quant/spoken"  # in the ranks' store: the exit code of the one that said why
GRACE = 5.0  # seconds in which rank 0 may find by itself what another rank found


class Place(NamedTuple):
    """Of a process among all that were started, `rank` of `size`, and its number on this machine."""

    rank: int
    local_rank: int
    size: int


def place() -> Place | None:
    """This process's; None where it is the only one."""
    found = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    if "MASTER_ADDR" not in os.environ or not all(value.isdecimal() for value in found):
        return None
    at = Place(*map(int, found))
    return at if at.size > 1 else None


@contextmanager
def hushed() -> Iterator[None]:
    """Nothing is printed in here by any rank but the first."""
    at = place()
    if at is None or at.rank == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@contextmanager
def together(device: str) -> Iterator[Ranks]:
    """All ranks, each with its device; alone, this process with the one that was asked for. What ends a rank early
    passes on where it is this one's to tell, and becomes an exit of the same code where it is not."""
    at = place()
    if at is None:
        yield replace(ALONE, device=device)
        return
    import torch.distributed as dist

    store, _, _ = next(iter(dist.rendezvous("env://")))
    try:
        with joined(device, *at, store) as ranks:
            yield ranks
    except EARLY as error:  # the others see that this rank is gone when it has ended
        _settle(error, at.rank, store)
        raise


def _settle(error: BaseException, rank: int, store: Store) -> None:
    """Return where this rank's error is to be told by `main`, or raise Exit of the code that all end with."""
    code, line = ending(error)
    asked_to = isinstance(error, KeyboardInterrupt | Stopped)
    until = time.monotonic() + (0 if rank == 0 or asked_to else GRACE)
    try:
        while not store.check([SPOKEN]) and time.monotonic() < until:
            time.sleep(0.05)
        if not store.check([SPOKEN]) and (rank == 0 or not asked_to):
            me = f"{rank} {code}"
            if store.compare_set(SPOKEN, "", me).decode() == me:
                if rank == 0:
                    return
                print(f"rank {rank}: {line}", file=sys.__stderr__)
        if store.check([SPOKEN]):
            code = int(store.get(SPOKEN).decode().split()[1])
    except RuntimeError:  # the store went with the process that had it
        if rank == 0:
            return
    raise click.exceptions.Exit(code)
