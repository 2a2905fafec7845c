"""What was measured of artifacts, beside each other, as tables: one row each, the reference first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dsv2quant.report.measured import EngineRun, Estimate, Scores, TaskScores
from dsv2quant.report.tables import gigabytes, table


@dataclass(frozen=True)
class Scored:
    """A row: an artifact, the bytes of its weights' files, bits per weight, and its scores, if it has any, of texts
    and of tasks."""

    name: str
    nbytes: int
    bits_per_weight: float
    scores: Scores | None
    tasks: TaskScores | None = None


def scores_table(rows: Sequence[Scored], *, markdown: bool = False) -> str:
    """Sizes, and where any was scored distances from the reference with their standard errors."""
    found = [row.scores for row in rows if row.scores is not None]
    header = ["artifact", "size", "bits/weight"]
    if not found:
        return table(header, [_size(row) for row in rows], markdown=markdown)
    header += ["perplexity", "ln ratio", "KLD, nats", "KLD 99%", "same top-1"]
    first = found[0]
    lines = [[f"reference {first.reference}", "", "", pm(first.reference_perplexity, 4), "", "", "", ""]]
    lines += [[*_size(row), *cells_of(row.scores)] for row in rows]
    return table(header, lines, markdown=markdown)


def _size(row: Scored) -> list[str]:
    return [row.name, gigabytes(row.nbytes), f"{row.bits_per_weight:.2f}"]


def cells_of(s: Scores | None) -> list[str]:
    """Of a row: perplexity, ln ratio, KLD, its 99% quantile, top-1."""
    if s is None:
        return [""] * 5
    ratio = f"{s.ln_ratio.value:+.5f} ± {s.ln_ratio.stderr:.5f}"
    return [pm(s.perplexity, 4), ratio, pm(s.kld, 5), f"{s.kld_p99:.4f}", percent(s.top1)]


def growth(s: Scores) -> str:
    """How much perplexity grew: '+0.550%'."""
    return f"{100 * math.expm1(s.ln_ratio.value):+.3f}%"


def scored_on(found: Sequence[Scores]) -> str:
    """What the numbers of artifacts, all scored alike, rest on, in a line."""
    s, weight_only = found[0], {each.weight_only for each in found}
    served = {frozenset({True}): "unquantized", frozenset({False}): "as served"}
    activations = served.get(frozenset(weight_only), "as served, where an artifact quantizes them")
    return (
        f"{s.tokens:,} tokens in {s.windows} windows of {s.ctx} of {s.text} (sha256 {s.text_sha256}), {s.protocol} "
        f"protocol, {s.dtype}, activations {activations}; errors are bootstrapped over windows"
    )


def engines_table(runs: Iterable[EngineRun], *, markdown: bool = False) -> str:
    """What engines made of an artifact."""
    rows = [
        [r.engine, r.version, r.device, r.tp, f"{r.kld.value:.2e} ± {r.kld.stderr:.0e}", f"{r.limit:.2e}",
         percent(r.top1), "; ".join(r.faults) or "as the runtime computes it"]
        for r in runs
    ]  # fmt: skip
    header = ["engine", "version", "device", "GPUs", "KLD from the runtime", "limit", "same top-1", "verdict"]
    return table(header, rows, markdown=markdown)


def pm(estimate: Estimate, digits: int) -> str:
    """'15.0848 ± 0.5573'."""
    return f"{estimate.value:.{digits}f} ± {estimate.stderr:.{digits}f}"


def percent(share: Estimate) -> str:
    """'94.08% ± 0.15'."""
    return f"{100 * share.value:.2f}% ± {100 * share.stderr:.2f}"
