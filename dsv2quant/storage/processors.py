"""How many processors there are for this process."""

from __future__ import annotations

import os


def processors() -> int:
    """Those that it may run on: fewer than the machine has in a job's or a container's share, or under taskset."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
