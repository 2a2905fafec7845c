"""Where `dsv2quant convert --fp8` spends its time: each stage's calls, threads, wall and CPU seconds.

    python benchmarks/convert_stages.py SOURCE OUT --fp8 block --results benchmarks/results/convert_stages.csv

One run in this process, with a clock around the functions of each stage. `wall s` and `CPU s` are sums over threads:
where the first is much larger, threads waited: for the disk, a file's lock, the interpreter's lock or a core. `bound s`
is the CPU seconds of the thread that spent most: with `hash`, which has one thread a file, the least that it takes on
any number of cores. Stages within others (`read` within `job`) count in both. benchmarks/convert.py ends with such a
run.
"""

from __future__ import annotations

import argparse
import functools
import platform
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert import processor

from dsv2quant import __version__, api
from dsv2quant.bench.device import append
from dsv2quant.checkpoint import identity
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.conversion.shards import Folder
from dsv2quant.formats import fp8
from dsv2quant.storage import engine
from dsv2quant.storage.processors import processors

# stage: where its function lies, what it is called, and its bytes of (result, arguments)
STAGES: dict[str, tuple[Any, str, Any]] = {
    "samples of the source": (identity, "sampled", lambda found, args: 0),
    "job": (engine._Begun, "run", lambda found, args: args[1].bytes_in),
    "read": (Checkpoint, "read", lambda found, args: found.nbytes),
    "encode": (fp8, "encode_on_cpu", lambda found, args: sum(weight.nbytes for weight in args[0])),
    "check a copy": (Folder, "_check_part", lambda found, args: args[3].nbytes),
    "write": (engine._Begun, "_write", lambda found, args: len(args[1])),
    "hash": (engine._Begun, "_hash_up_to", lambda found, args: 0),
    "flush": (engine._Begun, "_flush", lambda found, args: 0),
    "finish a file": (engine._Begun, "_finish", lambda found, args: 0),
    "main waits for jobs": (engine._Writing, "_settle", lambda found, args: 0),
}


@dataclass
class Spent:
    """What a stage took."""

    calls: int = 0
    nbytes: int = 0
    wall: float = 0
    cpu: dict[int, float] = field(default_factory=lambda: defaultdict(float))  # {thread: seconds}


def clocked(spent: Spent, lock: threading.Lock, function: Any, size: Any) -> Any:
    """The function with a clock around it."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        found = function(*args, **kwargs)
        wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
        with lock:
            spent.calls += 1
            spent.nbytes += size(found, args)
            spent.wall += wall
            spent.cpu[threading.get_ident()] += cpu
        return found

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fp8", default="block", choices=["block", "channel", "tensor"])
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()

    lock, spent = threading.Lock(), {stage: Spent() for stage in STAGES}
    for stage, (owner, name, size) in STAGES.items():
        setattr(owner, name, clocked(spent[stage], lock, getattr(owner, name), size))
    wall, cpu = time.perf_counter(), time.process_time()
    made = api.convert(options.source, options.out, scheme=f"fp8-{options.fp8}")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    about = {
        "scheme": f"fp8-{options.fp8}",
        "GB in": round(made.plan.bytes_in / 1e9, 2),
        "GB out": round(made.bytes_out / 1e9, 2),
        "cores": processors(),
        "processor": processor(),
        "versions": f"dsv2quant {__version__}, Python {platform.python_version()}",
    }
    columns = ["stage", "calls", "threads", "GB", "wall s", "CPU s", "CPU s a GB", "bound s"]
    whole = dict.fromkeys(columns, "") | {"stage": "all", "wall s": round(wall, 2), "CPU s": round(cpu, 2)}
    rows = [about | whole]
    for stage, took in spent.items():
        seconds, gigabytes = sum(took.cpu.values()), took.nbytes / 1e9
        rows.append(about | {
            "stage": stage,
            "calls": took.calls,
            "threads": len(took.cpu),
            "GB": round(gigabytes, 2) or "",
            "wall s": round(took.wall, 2),
            "CPU s": round(seconds, 2),
            "CPU s a GB": round(seconds / gigabytes, 3) if gigabytes else "",
            "bound s": round(max(took.cpu.values(), default=0), 2),
        })  # fmt: skip
    for line in [dict(zip(columns, columns, strict=True)), *rows]:
        print(f"{line['stage']:22}" + "".join(f"{line[column]!s:>12}" for column in columns[1:]))
    append(options.results, rows)


if __name__ == "__main__":
    main()
