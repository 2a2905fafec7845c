"""Run the command and kill it (SIGKILL) at its n-th change to the file system: `python killer.py N convert …`.

With N = 0 nothing is killed and the number of changes is printed. Kill points are thereby exact and repeatable, and
cover every moment between two of the changes made through `os`, which a wall clock would only sample.

`python killer.py serve` does that for every line of stdin, a JSON list [N, "convert", …], without starting anew: with
N = 0 in its own process, otherwise in a fork of it, and then prints the exit status (−9 where it was killed).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading

os.sched_getaffinity = lambda process: range(8)  # on any machine: several shards are written side by side
kill_at = changes = 0
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


for name in (
    "write",
    "pwrite",
    "fsync",
    "fdatasync",
    "rename",
    "unlink",
    "rmdir",
    "ftruncate",
    "mkdir",
    "posix_fallocate",
):
    setattr(os, name, counted(getattr(os, name)))

from dsv2quant.cli.main import main  # noqa: E402


def run(n, *args):
    global changes, kill_at
    changes, kill_at = 0, n
    if "convert" in args:
        from dsv2quant.conversion import shards
        from dsv2quant.storage import engine

        engine.RECORD_EVERY = shards.KEPT_EVERY = 1  # a small model's tensors, too, are recorded one by one
    if "--save-reference" in args:
        from dsv2quant.evaluation import keeping

        keeping.EVERY = 0.0  # a small model's layers, too, each leave a snapshot
    sys.argv = ["dsv2quant", *args]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for what `serve` says
            main()
    finally:
        if n == 0:
            print(changes)


def serve(n, *args):
    child = os.fork() if n else 0
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        run(n, *args)
    except SystemExit as exit_:
        return exit_.code
    finally:
        if n:
            os._exit(0)  # it was to be killed, and reached its end


if sys.argv[1] == "serve":
    for line in sys.stdin:
        print(serve(*json.loads(line)), flush=True)
else:
    run(int(sys.argv[1]), *sys.argv[2:])
