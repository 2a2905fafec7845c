"""A release, start to end: every artifact converted, checked, measured against a reference that is scored once, and run
in engines; then cards, checksums and a report. What is done is kept: a run that was killed goes on from there.

    OUT/MODEL-FP8-BLOCK/, …, MODEL-GGUF/MODEL-Q4_K_M.gguf, …    the artifacts
    OUT/report.html, report.json, SHA256SUMS, release.yaml      publish.py
    OUT/.release.state, .reference.safetensors, .tasks/         what a later run goes on from
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import dsv2quant.api as dq
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.planning import options as asked
from dsv2quant.progress import Progress, no_progress
from dsv2quant.publishing.gates import failed
from dsv2quant.publishing.harness import Row
from dsv2quant.publishing.made import Made, Released
from dsv2quant.publishing.tasks import TaskRun, weights_of
from dsv2quant.publishing.wanted import Release, Wanted
from dsv2quant.report.measured import Measured, measured_from, measured_json
from dsv2quant.storage.durable import StateLog, disk_errors
from dsv2quant.storage.processors import processors

# What every artifact needs.
_IMPORTED = ("dsv2quant.conversion.convert", "dsv2quant.evaluation.measure", "dsv2quant.evaluation.verify")
STATE, REFERENCE = ".release.state", ".reference.safetensors"
Known = Mapping[str, dict[str, Any]]  # what was measured before, by key


class _Found(NamedTuple):
    """An artifact: its `Conversion`, the key of what was measured, that, as JSON, and its scores in tasks."""

    conversion: Any
    key: str
    measured: dict[str, Any]
    tasks: list[Row]


@dataclass(frozen=True)
class _Run:
    """What every step of a release has in common; `options` are those of `convert`, by artifact, and `tasks` None where
    none are asked for. Another process takes it with `no_progress`."""

    checkpoint: Checkpoint
    out: Path
    release: Release
    options: Mapping[str, Mapping[str, Any]]
    tasks: TaskRun | None
    device: str
    progress: Progress

    def path(self, wanted: Wanted) -> Path:
        """Where an artifact lies: GGUF files are one repository, with one card."""
        return self.out / f"{self.checkpoint.model}-GGUF" / wanted.name if wanted.into_gguf else self.out / wanted.name

    def reference(self) -> Path:
        """The file of the model's own distributions, made where it is not there."""
        path = self.out / REFERENCE
        dq.evaluate(
            self.checkpoint, save_reference=path, device=self.device, progress=self.progress, **self.release.evaluation
        )
        return path

    def found(self, wanted: Wanted, reference: Any, known: Known) -> _Found:
        """An artifact that is made, or found made; with what was measured of these very files before, or now."""
        path = self.path(wanted)
        with disk_errors(path.parent):
            path.parent.mkdir(exist_ok=True)
        options = self.options[wanted.name]
        conversion = dq.convert(self.checkpoint, path, device=self.device, progress=self.progress, **options)
        key = self.key(conversion.files)
        measured = known.get(key) or measured_json(self.measure(wanted, conversion.plan, reference))
        return _Found(conversion, key, measured, self.scored(path, _hashes(conversion.files)))

    def scored(self, model: dq.Model, weights: object) -> list[Row]:
        """A model's scores in tasks, which lie beside what was measured; `weights` tell it from others."""
        return [] if self.tasks is None else self.tasks.rows(model, weights, self.progress)

    def made(self, wanted: Wanted, found: _Found, of_model: list[Row]) -> Made:
        """The same for people, with the gates that it doesn't keep to. `of_model` are the model's scores in tasks."""
        measured = measured_from(found.measured)
        if self.tasks is not None:
            measured = replace(measured, tasks=self.tasks.compared(self.checkpoint.model, found.tasks, of_model))
        return Made(wanted, self.path(wanted), found.conversion, measured, tuple(failed(measured, wanted.gates)))

    def key(self, files: Mapping[str, Any]) -> str:
        """Of what was measured: an artifact's files, on what text, and in which engines."""
        ways = [dict(self.release.evaluation), [dict(engine) for engine in self.release.engines]]
        return hashlib.sha256(json.dumps([_hashes(files), ways]).encode()).hexdigest()

    def measure(self, wanted: Wanted, plan: Any, reference: Any) -> Measured:
        """What comes of an artifact. Raises GateError where its weights can't be what the model's were quantized to."""
        from dsv2quant.engines.results import engine_run
        from dsv2quant.evaluation.cells import cells
        from dsv2quant.evaluation.results import scores_of

        path = self.path(wanted)
        where: dict[str, Any] = {"device": self.device, "progress": self.progress}
        checked = dq.verify(path, self.checkpoint, **where)
        checked.check()
        evaluated = dq.evaluate(path, reference=reference, **where, **self.release.evaluation)
        source = None if wanted.into_gguf else self.checkpoint  # llama.cpp has its noise floor of a GGUF file alone
        runs = tuple(
            engine_run(dq.verify_engine(path, source=source, **where, **dict(engine)))
            for engine in self.release.engines
            if _takes(engine["engine"], wanted, plan)
        )
        errors = checked.errors.weights if checked.errors else ()
        return Measured(scores_of(evaluated), runs, cells(dq.open(path), errors))


def release(
    model: dq.Model, out: dq.StrPath, wanted: Release, *, base_model: str | None = None, jobs: int = 1,
    device: str = "cpu", progress: Progress = no_progress, **hub: Any,
) -> Released:  # fmt: skip
    """Make a release of a model in folder `out`: its artifacts, and what publish.py writes. All that is asked is
    planned before anything is written. A gate that fails leaves the others done: `Released.check` raises for it.
    `jobs` artifacts are made at a time, each in a process of its own, which share the processors.

    Raises as `plan`, `convert`, `verify`, `evaluate` and `verify_engine` do, for tasks as `TaskRun` does, and
    InputError where another run works in `out`."""
    asked.check_values(wanted.evaluation)
    for engine in wanted.engines:
        asked.check_engine(engine["engine"], engine.get("engine_python"), None, engine.get("tp", 1), "auto", "bfloat16")
    with _workers(min(jobs, len(wanted.artifacts))) as workers:
        run = _planned(dq.open(model, **hub), Path(out), wanted, base_model, device, progress)
        with disk_errors(run.out):
            run.out.mkdir(parents=True, exist_ok=True)
        with closing(StateLog(run.out / STATE, run.out)) as log:
            return _made(run, base_model, log, workers)


def _planned(
    checkpoint: Checkpoint, out: Path, wanted: Release, base_model: str | None, device: str, progress: Progress
) -> _Run:
    """All that is asked, checked: nothing is written."""
    options = {each.name: _options(checkpoint, each, wanted.calibration, base_model) for each in wanted.artifacts}
    dtype, tasks = wanted.evaluation.get("dtype", "auto"), wanted.tasks
    in_tasks = None if tasks is None else TaskRun.of(tasks, out, device, dtype)
    run = _Run(checkpoint, out, wanted, options, in_tasks, device, progress)
    for each in wanted.artifacts:
        dq.check_conversion(run.path(each), device, **options[each.name])
    return run


def _made(run: _Run, base_model: str | None, log: StateLog, workers: ProcessPoolExecutor | None) -> Released:
    """What comes of it; what is measured is logged."""
    from dsv2quant.publishing.publish import publish

    checkpoint, artifacts = run.checkpoint, run.release.artifacts
    known: dict[str, dict[str, Any]] = {line["key"]: line["measured"] for line in log.lines}
    # First: data that can't be had is told before hours of work.
    of_model = [] if run.tasks is None else run.scored(checkpoint, weights_of(checkpoint))
    made = {}
    for each, found in _each(run, known, workers):
        if found.key not in known:
            log.append({"name": each.name, "key": found.key, "measured": found.measured})
        made[each.name] = run.made(each, found, of_model)
    released = Released(run.out, checkpoint, base_model, tuple(made[each.name] for each in artifacts))
    publish(released, run.release.text)
    return released


def _options(
    checkpoint: Checkpoint, wanted: Wanted, calibration: Mapping[str, Any], base_model: str | None
) -> dict[str, Any]:
    """Options of `convert`, by which the artifact was planned, and what it uses of the calibration."""
    from dsv2quant.calib.calibration import used_by

    options = dict(wanted.options)
    if base_model is not None and not wanted.into_gguf:
        options["base_model"] = base_model
    return options | used_by(dq.plan(checkpoint, **options), options, calibration)


def _hashes(files: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What tells an artifact from others, whatever its card says."""
    return sorted((name, entry["sha256"]) for name, entry in files.items() if name != "README.md")


@contextmanager
def _workers(jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes for so many artifacts at a time, which start while all is planned and the reference made; None for
    one."""
    if jobs == 1:
        yield None
        return
    # One process imports for all, and forks them before any thread of torch's is there, which would not outlive that.
    context = get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    threads = max(1, processors() // jobs)
    with ProcessPoolExecutor(jobs, context, _ready, (threads,)) as workers:
        starting = Thread(target=_start, args=(workers, jobs))  # it waits for what is imported
        starting.start()
        try:
            yield workers
        finally:
            starting.join()


def _start(workers: ProcessPoolExecutor, jobs: int) -> None:
    """Start all processes."""
    with suppress(RuntimeError):  # the release ended before
        for _ in range(jobs):
            workers.submit(int)


def _each(run: _Run, known: Known, workers: ProcessPoolExecutor | None) -> Iterator[tuple[Wanted, _Found]]:
    """Artifacts, as they are done, held against the reference, which is made first."""
    artifacts, reference = run.release.artifacts, run.reference()
    if workers is None:
        held = _opened(reference)
        yield from ((each, run.found(each, held, known)) for each in artifacts)
        return
    quiet = replace(run, progress=no_progress)
    with run.progress(len(artifacts), "artifacts", "release") as advance:
        begun = {workers.submit(_apart, quiet, each, reference, known): each for each in artifacts}
        try:
            for done in as_completed(begun):
                yield begun[done], done.result()
                advance(1)
        finally:
            workers.shutdown(cancel_futures=True)


def _ready(threads: int) -> None:
    """Have a process end with the one that began it, which a kill may take away, and have its part of the
    processors."""
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    import torch

    torch.set_num_threads(threads)


def _end_with(parent: Any) -> None:
    wait([parent.sentinel])
    os._exit(1)


def _opened(reference: Path) -> Any:
    """The HeldReference there: its module imports much."""
    from dsv2quant.evaluation.reference import HeldReference

    return HeldReference.opened(reference)


_held = cache(_opened)  # of a process that is made for one release


def _apart(run: _Run, wanted: Wanted, reference: Path, known: Known) -> _Found:
    """`_Run.found`, in such a process."""
    return run.found(wanted, _held(reference), known)


def _takes(engine: str, wanted: Wanted, plan: Any) -> bool:
    """Whether an engine runs an artifact."""
    return engine == "llama.cpp" if wanted.into_gguf else engine in plan.targets
