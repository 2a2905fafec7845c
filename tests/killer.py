"""Run the command and kill it (SIGKILL) at its n-th change to the file system: `python killer.py N convert …`.

With N = 0 nothing is killed and the number of changes is printed. Kill points are thereby exact and repeatable, and
cover every moment between two changes, which a wall clock would only sample.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

kill_at = int(sys.argv[1])
changes = 0
lock = threading.Lock()


def counted(function):
    def call(*args, **kwargs):
        global changes
        with lock:
            changes += 1
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


for name in ("write", "pwrite", "fsync", "rename", "unlink", "ftruncate", "mkdir"):
    setattr(os, name, counted(getattr(os, name)))

from dsv2quant.cli.main import main  # noqa: E402

sys.argv = ["dsv2quant", *sys.argv[2:]]
try:
    main()
finally:
    if kill_at == 0:
        print(changes)
