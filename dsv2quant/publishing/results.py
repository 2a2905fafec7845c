"""What a release came to, as text and as JSON."""

from __future__ import annotations

from typing import Any

from dsv2quant.publishing.made import Released
from dsv2quant.publishing.publish import report
from dsv2quant.report.artifacts import report_json
from dsv2quant.report.scores import Scored, engines_table, scores_table
from dsv2quant.report.tasks import beside_table


def released_text(released: Released) -> str:
    """A table of the artifacts, what engines made of them, and where all of it lies."""
    artifacts = report(released).artifacts
    rows = [Scored(a.name, a.nbytes, a.bits_per_weight, a.measured.scores) for a in artifacts]
    parts = [scores_table(rows)]
    if tasks := beside_table([(a.name, a.measured.tasks) for a in artifacts]):
        parts.append(f"in tasks:\n{tasks}")
    parts += [f"{a.name} in engines:\n{engines_table(a.measured.engines)}" for a in artifacts if a.measured.engines]
    parts += [f"{a.name}: {what}" for a in artifacts for what in a.failed]
    return "\n".join([*parts, f"{released.out}: {len(artifacts)} artifacts, report.html"])


def released_json(released: Released) -> dict[str, Any]:
    """The object of `dsv2quant release --json`: report.json, and the folder."""
    return report_json(report(released)) | {"schema": "dsv2quant.release/1", "out": str(released.out)}
