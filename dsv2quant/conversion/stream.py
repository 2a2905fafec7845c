"""Jobs whose input comes from the hub shard by shard: in which order, and when a shard can go."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from dsv2quant.calib.calibration import needs_calibration, needs_statistics
from dsv2quant.errors import UsageError
from dsv2quant.planning.gguf_plan import GgufPlan
from dsv2quant.planning.plan import Plan
from dsv2quant.storage.engine import Job, Written
from dsv2quant.storage.stream import Stream

Samples = Mapping[str, Sequence[tuple[int, int]]]


def check_streamed(plan: Plan | GgufPlan, given: Mapping[str, Any]) -> None:
    """Raise UsageError where a plan needs all weights before the first can be written."""
    why = None
    if "tune" in given:
        why = "tuning runs text through the whole model"
    elif isinstance(plan, GgufPlan):
        return
    elif needs_calibration(plan):
        why = "gptq runs text through the whole model"
    elif needs_statistics(plan) and "statistics" not in given:
        why = "what it calibrates runs text through the whole model: give --statistics"
    elif any(entry.method == "awq" for entry in plan.entries):
        why = "awq looks for its scales in all layers before the first is written"
    if why is not None:
        raise UsageError(f"--stream-hub: {why}", fix="leave it out, or take another method")


def streamed(
    jobs: Iterable[Job], files: Sequence[Written], stream: Stream, samples: Samples
) -> Generator[Job | None, None, None]:
    """Jobs put in the order of the shards that they read, in which each shard comes where the plan needs it first. The
    next shard is loaded while the jobs of one run, and the one behind it not before these are done (None: see
    `engine.write`): few lie on disk. Behind the last job that reads it a shard is dropped, but for its `samples`.

    A job that reads several shards waits for the last, and the others stay until then. What is durable already needs
    no shard. In the end every shard was there once, by this run or one that was cut.
    """
    lacking: list[Job] = []
    for job in jobs:
        if all(end <= files[job.file].end for _, end in job.spans):
            yield job  # is only counted
        else:
            lacking.append(job)
    order = {file: i for i, file in enumerate(dict.fromkeys(file for job in lacking for file in sorted(job.reads)))}
    waiting: dict[str, list[Job]] = defaultdict(list)
    for job in lacking:
        waiting[max(job.reads, key=order.__getitem__)].append(job)
    held = _Held(stream, samples, Counter(file for job in lacking for file in job.reads))
    unread = [file for file in stream.files if file not in order and not stream.is_sampled(file)]
    with closing(stream.load([*order, *unread])) as shards:
        for file in shards:
            for job in waiting.pop(file, ()):
                yield replace(job, encode=lambda job=job: held.run(job))  # type: ignore[misc]
            if file in unread:
                stream.drop(file, samples[file])
            yield None


class _Held:
    """Shards on disk, with the number of jobs that are still to read each."""

    def __init__(self, stream: Stream, samples: Samples, left: Counter[str]) -> None:
        self._stream, self._samples, self._left, self._lock = stream, samples, left, threading.Lock()

    def run(self, job: Job) -> Iterator[tuple[int, np.ndarray]]:
        """What a job makes; behind its last array the shards go that nothing else reads."""
        yield from job.encode()
        with self._lock:
            self._left.subtract(job.reads)
            for file in job.reads:
                if not self._left[file]:
                    self._stream.drop(file, self._samples[file])
