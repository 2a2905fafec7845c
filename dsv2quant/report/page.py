"""report.html: one file that needs no other, in light and dark, for a telephone as for a wide screen."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dsv2quant.errors import printable
from dsv2quant.report.artifacts import Artifact, Report
from dsv2quant.report.figures import bits_by_depth, coverage, kld_by_position, size_against_kld
from dsv2quant.report.heatmap import colour_range, sqnr_heatmap
from dsv2quant.report.measured import Scores
from dsv2quant.report.scores import cells_of, percent, pm, scored_on
from dsv2quant.report.svg import STYLE
from dsv2quant.report.tables import gigabytes
from dsv2quant.report.tasks import beside_rows, done_by, task_header, task_rows
from dsv2quant.version import __version__

_STYLE = """
:root{color-scheme:light dark;--ink:#222;--paper:#fff;--soft:#f4f5f7;--rule:#d8dbe0;--bad:#b3261e;--good:#12703f}
@media (prefers-color-scheme:dark){:root{--ink:#ddd;--paper:#16181c;--soft:#20242a;--rule:#3a3f47;--bad:#ff8a80;
--good:#6fd6a0}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1360px;padding:16px;font:15px/1.5 system-ui,sans-serif;
color:var(--ink);background:var(--paper)}
h1{font-size:1.5em;line-height:1.25;margin:.3em 0;overflow-wrap:anywhere}h2{font-size:1.2em;margin:1.6em 0 .5em}
p{overflow-wrap:anywhere}
.grid{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))}
.grid>div{border:1px solid var(--rule);border-radius:6px;overflow:hidden}.grid svg{display:block;width:100%;
max-width:660px;margin:0 auto}
.wide{overflow-x:auto;border:1px solid var(--rule);border-radius:6px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:5px 8px;text-align:left;border-bottom:1px solid var(--rule);white-space:nowrap}
.told td,.wraps th{white-space:normal}.told td:last-child{min-width:150px}
tr:last-child td{border-bottom:0}th{background:var(--soft);font-weight:600}
.best td:first-child,th:first-child{position:sticky;left:0}.best td:first-child{background:var(--paper)}
.num{text-align:right}.bad{color:var(--bad)}.good{color:var(--good)}
details{margin:8px 0}summary{cursor:pointer;font-weight:600;padding:4px 0}
"""


def page(report: Report) -> str:
    """The whole document."""
    title = f"{report.model}: {len(report.artifacts)} artifact{'s' * (len(report.artifacts) > 1)}"
    scored = [a.measured.scores for a in report.artifacts if a.measured.scores is not None]
    beside = (size_against_kld(report.artifacts), kld_by_position(report.artifacts), bits_by_depth(report.artifacts))
    colours = colour_range(report.artifacts)
    maps = [drawn for artifact in report.artifacts if (drawn := sqnr_heatmap(artifact, *colours))]
    # Artifacts that were calibrated alike need one picture.
    calibrated = {str(artifact.coverage): artifact for artifact in report.artifacts}
    seen = [drawn for artifact in calibrated.values() if (drawn := coverage(artifact))]
    body = [
        f"<h1>{_e(title)}</h1>",
        f"<p>{_e(_revision(report))}by dsv2quant {__version__}</p>",
        "<h2>Artifacts</h2>",
        _summary(report.artifacts, scored),
        f"<p>{_e(scored_on(scored))}.</p>" if scored else "",
        _grid([*(drawn for drawn in beside if drawn), *seen]),
        f"<h2>Errors of weights</h2>{_grid(maps)}" if maps else "",
        _tasks(report.artifacts),
        _engines(report.artifacts),
        _fallen(report.artifacts),
        _cells(report.artifacts),
    ]
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>{_e(title)}</title><style>{_STYLE}{STYLE}</style></head>'
    )
    return f"{head}\n<body>\n" + "\n".join(part for part in body if part) + "\n</body></html>\n"


def _revision(report: Report) -> str:
    return f"revision {report.revision}, " if report.revision else ""


def _e(words: object) -> str:
    return escape(printable(str(words)))


def _grid(pictures: Sequence[str]) -> str:
    return '<div class="grid">' + "".join(f"<div>{picture}</div>" for picture in pictures) + "</div>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int, kind: str = "") -> str:
    """Cells are HTML; the last `numbers` columns are aligned to the right."""
    first = len(header) - numbers

    def cells(tag: str, row: Sequence[str]) -> str:
        marks = (' class="num"' if i >= first else "" for i in range(len(row)))
        return "".join(f"<{tag}{mark}>{cell}</{tag}>" for cell, mark in zip(row, marks, strict=True))

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><tr>{cells("th", header)}</tr>{lines}</table></div>'


def _summary(artifacts: Sequence[Artifact], scored: Sequence[Scores]) -> str:
    header = ["artifact", "size", "bits/weight"]
    rows = [[_e(a.name), gigabytes(a.nbytes), f"{a.bits_per_weight:.2f}"] for a in artifacts]
    if scored:
        header += ["perplexity", "ln ratio", "KLD, nats", "KLD 99%", "same top-1"]
        first = scored[0]
        reference = [_e(f"reference {first.reference}"), "", "", pm(first.reference_perplexity, 4), *[""] * 4]
        rows = [reference, *(row + cells_of(a.measured.scores) for row, a in zip(rows, artifacts, strict=True))]
    verdicts = [_verdict(artifact) for artifact in artifacts]
    if any(verdicts):
        header.append("verdict")
        rows = [[*row, verdict] for row, verdict in zip(rows, ["", *verdicts][-len(rows) :], strict=True)]
    return _table(header, rows, numbers=len(header) - 1, kind="best")


def _verdict(artifact: Artifact) -> str:
    faults = [*artifact.failed, *(fault for run in artifact.measured.engines for fault in run.faults)]
    if faults:
        return f'<span class="bad" title="{_e("; ".join(faults))}">failed</span>'
    runs = artifact.measured.engines
    engines = " and ".join(f"{run.engine} {run.version}".strip() for run in runs)
    return f'<span class="good">{_e(engines)} agree{"s" * (len(runs) == 1)}</span>' if runs else ""


def _tasks(artifacts: Sequence[Artifact]) -> str:
    """Artifacts beside each other by one score of each task; every metric of each, folded."""
    done = [(a.name, a.measured.tasks) for a in artifacts if a.measured.tasks is not None]
    if not done:
        return ""
    header, rows = beside_rows(done)
    parts = ["<h2>Tasks</h2>", _told(header, rows, kind="best wraps"), f"<p>{_e(done_by(done[0][1]))}.</p>"]
    for name, tasks in done:
        shown = _told(task_header(tasks, name), task_rows(tasks))
        parts.append(f"<details><summary>{_e(name)}</summary>{shown}</details>")
    return "".join(parts)


def _told(header: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "") -> str:
    """A table of scores, whose cells are plain text."""
    numbers = len(header) - (1 if kind else 2)
    return _table([*map(_e, header)], [[*map(_e, row)] for row in rows], numbers=numbers, kind=kind)


def _engines(artifacts: Sequence[Artifact]) -> str:
    rows = [
        [_e(a.name), _e(run.engine), _e(run.version), _e(run.device), str(run.tp),
         f"{run.kld.value:.2e} ± {run.kld.stderr:.0e}", f"{run.limit:.2e}", percent(run.top1)]
        for a in artifacts for run in a.measured.engines
    ]  # fmt: skip
    header = ["artifact", "engine", "version", "device", "GPUs", "KLD from the runtime", "limit", "same top-1"]
    told = [[_e(a.name), _e(what)] for a in artifacts
            for what in (*a.failed, *(fault for run in a.measured.engines for fault in run.faults))]  # fmt: skip
    parts = ["<h2>In engines</h2>", _table(header, rows, numbers=4)] if rows else []
    return "".join(
        [
            *parts,
            *(["<h2>What failed</h2>", _table(["artifact", "what"], told, numbers=0, kind="told")] if told else []),
        ]
    )


def _fallen(artifacts: Sequence[Artifact]) -> str:
    rows = [[_e(a.name), _e(f.what), _e(f.scheme), _e(f.reason)] for a in artifacts for f in a.fallbacks]
    header = ["artifact", "tensors", "in", "why"]
    return "<h2>What fell back, and why</h2>" + _table(header, rows, numbers=0, kind="told") if rows else ""


def _cells(artifacts: Sequence[Artifact]) -> str:
    """Everything by layer and role, folded."""
    parts = []
    for artifact in artifacts:
        rows = [
            ["" if c.layer is None else str(c.layer), _e(c.role), _e(", ".join(c.schemes)), str(c.tensors),
             f"{c.weights:,}", f"{c.bits:.2f}", *(_db(x, c.exact) for x in (c.sqnr_db, c.decile_db, c.lowest_db))]
            for c in artifact.measured.cells
        ]  # fmt: skip
        header = ["layer", "role", "in", "tensors", "weights", "bits", "SQNR dB", "worst tenth", "lowest"]
        if rows:
            shown = _table(header, rows, numbers=6)
            parts.append(f"<details><summary>{_e(artifact.name)}</summary>{shown}</details>")
    return "<h2>By layer and role</h2>" + "".join(parts) if parts else ""


def _db(value: float | None, exact: bool) -> str:
    return "exact" if exact else "" if value is None else f"{value:.2f}"
