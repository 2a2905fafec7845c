"""Calibration on a CPU: several batches of tokens at a time, each by a thread, which computes alone where there are no
more processors than threads. Most operations on a batch are too small to be shared out, and some sums that are shared
out by three or more have other bits."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

MOST = 8  # each holds what it works on
KEPT = 1 << 30  # bytes
# Of mallopt(3), in glibc's malloc.h: a parameter, what it shall be, and what it is afterwards.
HEAP = ((-1, KEPT, 64 << 20), (-4, 0, 65536), (-8, 1, 0))  # M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX
Item = TypeVar("Item")
Made = TypeVar("Made")


def in_turn(threads: int, do: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """What `do` makes of each item, in their order, by so many threads; by the caller's own where that is 0. `do` must
    give the same whatever is done to other items meanwhile. Items are taken as they are needed, by the caller's thread.
    To be exhausted."""
    if not threads:
        yield from map(do, items)
        return

    def alone(item: Item) -> Made:
        with torch.inference_mode():  # each thread has its own
            return do(item)

    each = torch.get_num_threads()
    running: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(max(1, each // threads),)) as pool:
        torch.set_num_threads(1)  # what the caller does meanwhile takes a processor from the pool
        try:
            for item in items:
                running.append(pool.submit(alone, item))
                if len(running) > threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for left in running:
                left.cancel()
            torch.set_num_threads(each)  # what threads to come begin with, too


@contextmanager
def kept_heap() -> Iterator[None]:
    """Meanwhile glibc keeps `KEPT` bytes of what is freed, in one heap for all threads: it would give each batch's
    tensors back to the kernel, which clears every page of the next one's. Other C libraries do as they do."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        yield
        return
    for parameter, value, _ in HEAP:
        library.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, _, value in HEAP:
            library.mallopt(parameter, value)
        library.malloc_trim(ctypes.c_size_t(0))
