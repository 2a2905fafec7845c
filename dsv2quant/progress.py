"""Telling how far long work is, without knowing how it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

# Opens a progress bar: (total, unit, label) → context giving the function that advances it.
Progress = Callable[[int, str, str], AbstractContextManager[Callable[[int], object]]]


@contextmanager
def no_progress(total: int, unit: str, label: str) -> Iterator[Callable[[int], object]]:
    """Shows nothing."""
    yield lambda amount: None
