"""Artifacts of one model beside each other: what a report is made of, and report.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dsv2quant.report.fallbacks import Fallback
from dsv2quant.report.measured import Measured, measured_json
from dsv2quant.report.tables import values_of
from dsv2quant.report.tasks import recovery


@dataclass(frozen=True)
class Artifact:
    """An artifact: bytes of its weights' files, what was measured, what fell back, what experts saw in calibration
    (`coverage_json` of report/calibration.py), and gates that it doesn't keep to, a line each."""

    name: str
    nbytes: int
    bits_per_weight: float
    measured: Measured = field(default_factory=Measured)
    fallbacks: tuple[Fallback, ...] = ()
    coverage: tuple[Mapping[str, Any], ...] = ()
    failed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """Artifacts of `model`, at the hub's commit if it has one."""

    model: str
    revision: str | None
    artifacts: tuple[Artifact, ...]


def report_json(report: Report) -> dict[str, Any]:
    """The content of report.json."""
    return {"schema": "dsv2quant.report/1", **values_of(report, "model", "revision"), **artifacts_json(report)}


def artifacts_json(report: Report) -> dict[str, Any]:
    """Its artifacts, as `compare --json` has them too."""
    return {
        "artifacts": [
            {
                **values_of(a, "name", "bits_per_weight"), "bytes": a.nbytes, **measured_json(a.measured),
                "recovery": recovery(a.measured.tasks),
                "fallbacks": [asdict(fallback) for fallback in a.fallbacks],
                "coverage": [dict(row) for row in a.coverage], "failed": list(a.failed),
            }
            for a in report.artifacts
        ]
    }  # fmt: skip
