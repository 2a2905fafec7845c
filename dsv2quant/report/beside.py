"""What `compare` prints: artifacts beside each other, as text and as JSON."""

from __future__ import annotations

import math
from typing import Any

from dsv2quant.arch.spec import ROLES
from dsv2quant.report.artifacts import Artifact, Report, artifacts_json
from dsv2quant.report.scores import Scored, scored_on, scores_table
from dsv2quant.report.tables import table, values_of


def comparison_text(report: Report) -> str:
    """Sizes and distances, and where errors were measured the ratio of signal to noise by role."""
    rows = [Scored(a.name, a.nbytes, a.bits_per_weight, a.measured.scores) for a in report.artifacts]
    scored = [row.scores for row in rows if row.scores is not None]
    lines = [scores_table(rows), *([scored_on(scored)] if scored else [])]
    roles = [role for role in ROLES if any(_sqnr(artifact, role) is not None for artifact in report.artifacts)]
    if roles:
        header = ["SQNR, dB", *(artifact.name for artifact in report.artifacts)]
        shown = [[role, *(_db(_sqnr(artifact, role)) for artifact in report.artifacts)] for role in roles]
        lines += ["", table(header, shown)]
    return "\n".join(lines)


def comparison_json(report: Report) -> dict[str, Any]:
    """The object of `dsv2quant compare --json`."""
    return {"schema": "dsv2quant.compare/1", **values_of(report, "model", "revision"), **artifacts_json(report)}


def _sqnr(artifact: Artifact, role: str) -> float | None:
    """Of all layers' weights together, in dB; infinite where none differs, None where none was compared."""
    cells = [cell for cell in artifact.measured.cells if cell.role == role]
    signal = noise = 0.0
    for cell in cells:
        if cell.sqnr_db is not None and cell.signal is not None:
            signal, noise = signal + cell.signal, noise + cell.signal * 10 ** (-cell.sqnr_db / 10)
    if noise:
        return 10 * math.log10(signal / noise)
    return math.inf if cells and all(cell.exact for cell in cells) else None


def _db(value: float | None) -> str:
    return "" if value is None else "exact" if value == math.inf else f"{value:.2f}"
