"""A release, start to end: every artifact converted, checked, measured against a reference that is scored once, and run
in engines; then cards, checksums and a report. What is done is kept: a run that was killed goes on from there.

    OUT/MODEL-FP8-BLOCK/, …, MODEL-GGUF/MODEL-Q4_K_M.gguf, …    the artifacts
    OUT/report.html, report.json, SHA256SUMS, release.yaml      publish.py
    OUT/.release.state, .reference.safetensors                  what a later run goes on from
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import dsv2quant.api as dq
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.errors import UsageError
from dsv2quant.planning import options as asked
from dsv2quant.progress import Progress, no_progress
from dsv2quant.publishing.made import Made, Released
from dsv2quant.publishing.wanted import Gates, Release, Wanted
from dsv2quant.report.measured import Measured, measured_from, measured_json
from dsv2quant.storage.durable import StateLog, disk_errors

STATE, REFERENCE = ".release.state", ".reference.safetensors"
Known = Mapping[str, dict[str, Any]]  # what was measured before, by key


@dataclass(frozen=True)
class _Given:
    """What a release is made of, as another process takes it."""

    model: dq.Model
    hub: Mapping[str, Any]
    out: Path
    release: Release
    base_model: str | None
    device: str


@dataclass(frozen=True)
class _Run:
    """What every step of a release has in common."""

    checkpoint: Checkpoint
    out: Path
    release: Release
    base_model: str | None
    device: str
    progress: Progress

    @classmethod
    def of(cls, given: _Given, progress: Progress) -> _Run:
        """Raises as `open` does."""
        checkpoint = dq.open(given.model, **given.hub)
        return cls(checkpoint, given.out, given.release, given.base_model, given.device, progress)

    def path(self, wanted: Wanted) -> Path:
        """Where an artifact lies: GGUF files are one repository, with one card."""
        return self.out / f"{self.checkpoint.model}-GGUF" / wanted.name if wanted.into_gguf else self.out / wanted.name

    def conversion(self, wanted: Wanted) -> dict[str, Any]:
        """Options of `convert`: the calibration goes to those that calibrate."""
        from dsv2quant.calib.calibration import needs_calibration

        options = dict(wanted.options)
        if self.base_model is not None and not wanted.into_gguf:
            options["base_model"] = self.base_model
        if wanted.into_gguf or not needs_calibration(dq.plan(self.checkpoint, **options)):  # type: ignore[arg-type]
            return options
        return options | dict(self.release.calibration)

    def reference(self) -> Path:
        """The file of the model's own distributions, made where it is not there."""
        path = self.out / REFERENCE
        dq.evaluate(
            self.checkpoint, save_reference=path, device=self.device, progress=self.progress, **self.release.evaluation
        )
        return path

    def convert(self, wanted: Wanted) -> Any:
        """Make an artifact, or find it made: a `Conversion`."""
        path = self.path(wanted)
        with disk_errors(path.parent):
            path.parent.mkdir(exist_ok=True)
        return dq.convert(self.checkpoint, path, device=self.device, progress=self.progress, **self.conversion(wanted))

    def found(self, wanted: Wanted, reference: Path, known: Known) -> tuple[str, dict[str, Any]]:
        """An artifact's key, and what was measured of it: before, of these very files, or now."""
        conversion = self.convert(wanted)
        key = self.key(conversion.files)
        return key, known.get(key) or measured_json(self.measure(wanted, conversion.plan, reference))

    def made(self, wanted: Wanted, found: Mapping[str, Any]) -> Made:
        """An artifact that is there, with what was measured."""
        measured = measured_from(found)
        failed = tuple(_failed(measured, wanted.gates))
        return Made(wanted, self.path(wanted), self.convert(wanted), measured, failed)

    def key(self, files: Mapping[str, Any]) -> str:
        """Of what was measured: an artifact's files, on what text, and in which engines."""
        hashes = sorted((name, entry["sha256"]) for name, entry in files.items() if name != "README.md")
        ways = [dict(self.release.evaluation), [dict(engine) for engine in self.release.engines]]
        return hashlib.sha256(json.dumps([hashes, ways]).encode()).hexdigest()

    def measure(self, wanted: Wanted, plan: Any, reference: Path) -> Measured:
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

    Raises as `plan`, `convert`, `verify`, `evaluate` and `verify_engine` do, and InputError where another run works in
    `out`."""
    if jobs > 1 and isinstance(model, Checkpoint):
        raise UsageError("--jobs takes a model by its folder or id: each process opens it")
    asked.check_values(wanted.evaluation)
    for engine in wanted.engines:
        asked.check_engine(engine["engine"], engine.get("engine_python"), None, engine.get("tp", 1), "auto", "bfloat16")
    given = _Given(model, hub, Path(out), wanted, base_model, device)
    run = _Run.of(given, progress)
    for each in wanted.artifacts:
        dq.check_conversion(run.path(each), device, **run.conversion(each))
        dq.plan(run.checkpoint, **each.options)
    from dsv2quant.publishing.publish import publish

    with disk_errors(run.out):
        run.out.mkdir(parents=True, exist_ok=True)
    with closing(StateLog(run.out / STATE, run.out)) as log:
        known: dict[str, dict[str, Any]] = {line["key"]: line["measured"] for line in log.lines}
        reference, found = run.reference(), {}
        for each, (key, measured) in _each(given, run, reference, known, jobs):
            if key not in known:
                log.append({"name": each.name, "key": key, "measured": measured})
            found[each.name] = measured
        made = tuple(run.made(each, found[each.name]) for each in wanted.artifacts)
        released = Released(run.out, run.checkpoint, base_model, made)
        publish(released, wanted.text)
    return released


def _each(
    given: _Given, run: _Run, reference: Path, known: Known, jobs: int
) -> Iterator[tuple[Wanted, tuple[str, dict[str, Any]]]]:
    """Artifacts with what was measured of each, as they are done."""
    artifacts = given.release.artifacts
    if jobs == 1:
        yield from ((each, run.found(each, reference, known)) for each in artifacts)
        return
    # A fresh interpreter for each process: torch's threads don't outlive a fork.
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with (
        ProcessPoolExecutor(jobs, get_context("spawn"), _share, (threads,)) as workers,
        run.progress(len(artifacts), "artifacts", "release") as advance,
    ):
        begun = {workers.submit(_apart, given, each, reference, known): each for each in artifacts}
        try:
            for done in as_completed(begun):
                yield begun[done], done.result()
                advance(1)
        finally:
            workers.shutdown(cancel_futures=True)


def _share(threads: int) -> None:
    """A process's part of the processors."""
    import torch

    torch.set_num_threads(threads)


def _apart(given: _Given, wanted: Wanted, reference: Path, known: Known) -> tuple[str, dict[str, Any]]:
    """`_Run.found`, in another process."""
    return _Run.of(given, no_progress).found(wanted, reference, known)


def _takes(engine: str, wanted: Wanted, plan: Any) -> bool:
    """Whether an engine runs an artifact."""
    return engine == "llama.cpp" if wanted.into_gguf else engine in plan.targets


def _failed(measured: Measured, gates: Gates) -> Iterator[str]:
    """What is wrong with an artifact, a line each."""
    scores = measured.scores
    if scores is not None:
        growth = 100 * (scores.perplexity.value / scores.reference_perplexity.value - 1)
        # A number that is none keeps to nothing.
        if gates.max_kld is not None and not scores.kld.value <= gates.max_kld:
            yield f"mean KLD is {scores.kld.value:.5f} nats, more than {gates.max_kld:g}"
        if gates.max_ppl_increase is not None and not growth <= gates.max_ppl_increase:
            yield f"perplexity grew by {growth:.3f}%, more than {gates.max_ppl_increase:g}%"
        if gates.min_top1 is not None and not scores.top1.value >= gates.min_top1:
            yield f"the likeliest token is the same for {scores.top1.value:.2%}, less than {gates.min_top1:.2%}"
    for engine in measured.engines:
        yield from (f"in {engine.engine}: {fault}" for fault in engine.faults)
