"""A release, start to end: every artifact converted, checked, measured against a reference that is scored once, and run
in engines; then cards, checksums and a report. What is done is kept: a run that was killed goes on from there.

    OUT/MODEL-FP8-BLOCK/, …, MODEL-GGUF/MODEL-Q4_K_M.gguf, …    the artifacts
    OUT/report.html, report.json, SHA256SUMS, release.yaml      publish.py
    OUT/.release.state, .reference.safetensors                  what a later run goes on from
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dsv2quant.api as dq
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.progress import Progress, no_progress
from dsv2quant.publishing.made import Made, Released
from dsv2quant.publishing.wanted import Gates, Release, Wanted
from dsv2quant.report.measured import Measured, measured_from, measured_json
from dsv2quant.storage.durable import StateLog, disk_errors

STATE, REFERENCE = ".release.state", ".reference.safetensors"


@dataclass(frozen=True)
class _Run:
    """What every step of a release has in common."""

    checkpoint: Checkpoint
    out: Path
    release: Release
    base_model: str | None
    device: str
    progress: Progress

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

    def make(self, wanted: Wanted, reference: Path, log: StateLog) -> Made:
        """Make an artifact, or find it made; measure it, or take what was measured of these very files."""
        path, options = self.path(wanted), self.conversion(wanted)
        with disk_errors(path.parent):
            path.parent.mkdir(exist_ok=True)
        made = dq.convert(self.checkpoint, path, device=self.device, progress=self.progress, **options)
        key = self.key(made.files)
        known = [line for line in log.lines if line["name"] == wanted.name and line["key"] == key]
        if known:
            measured = measured_from(known[-1]["measured"])
        else:
            measured = self.measure(wanted, made.plan, reference)
            log.append({"name": wanted.name, "key": key, "measured": measured_json(measured)})
        return Made(wanted, path, made, measured, tuple(_failed(measured, wanted.gates)))

    def key(self, files: Mapping[str, Any]) -> str:
        """Of what was measured: an artifact's files, on what text, and in which engines."""
        asked = [sorted((name, entry["sha256"]) for name, entry in files.items() if name != "README.md")]
        rest = [dict(self.release.evaluation), [dict(engine) for engine in self.release.engines]]
        return hashlib.sha256(json.dumps([asked, rest]).encode()).hexdigest()

    def measure(self, wanted: Wanted, plan: Any, reference: Path) -> Measured:
        from dsv2quant.engines.results import engine_run
        from dsv2quant.evaluation.cells import cells
        from dsv2quant.evaluation.results import scores_of

        path = self.path(wanted)
        where: dict[str, Any] = {"device": self.device, "progress": self.progress}
        checked = dq.verify(path, self.checkpoint, **where)
        evaluated = dq.evaluate(path, reference=reference, **where, **self.release.evaluation)
        runs = tuple(
            engine_run(dq.verify_engine(path, source=self.checkpoint, **where, **dict(engine)))
            for engine in self.release.engines
            if _takes(engine["engine"], wanted, plan)
        )
        errors = checked.errors.weights if checked.errors else ()
        return Measured(scores_of(evaluated), runs, cells(dq.open(path), errors))


def release(
    model: dq.Model, out: dq.StrPath, wanted: Release, *, base_model: str | None = None, device: str = "cpu",
    progress: Progress = no_progress, **hub: Any,
) -> Released:  # fmt: skip
    """Make a release of a model in folder `out`: its artifacts, and what publish.py writes. All that is asked is
    planned before anything is written. A gate that fails leaves the others done: `Released.check` raises for it.

    Raises as `plan`, `convert`, `verify`, `evaluate` and `verify_engine` do, and InputError where another run works in
    `out`."""
    run = _Run(dq.open(model, **hub), Path(out), wanted, base_model, device, progress)
    for each in wanted.artifacts:
        dq.check_conversion(run.path(each), device, **run.conversion(each))
        dq.plan(run.checkpoint, **each.options)
    from dsv2quant.publishing.publish import publish

    with disk_errors(run.out):
        run.out.mkdir(parents=True, exist_ok=True)
    with closing(StateLog(run.out / STATE, run.out)) as log:
        reference = run.reference()
        made = tuple(run.make(each, reference, log) for each in wanted.artifacts)
        released = Released(run.out, run.checkpoint, base_model, made)
        publish(released, wanted.text)
    return released


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
