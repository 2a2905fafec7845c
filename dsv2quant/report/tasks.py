"""Scores in tasks, as tables: of one artifact every metric beside the reference's, of several one metric a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dsv2quant.report.measured import TaskScore, TaskScores
from dsv2quant.report.tables import table

NORMALIZED = "acc_norm"  # what leaderboards show of a task that has it


class Means(NamedTuple):
    """Over tasks, of the artifact and of the reference."""

    value: float
    reference: float

    @property
    def recovery(self) -> float:
        """Percent of the reference's: what is equal is 100 exactly."""
        return 100 * (self.value / self.reference)


def heads(tasks: TaskScores) -> list[TaskScore]:
    """One score of each task: its first, or the one normalized by the length of answers, where it has one."""
    found: dict[str, TaskScore] = {}
    for score in tasks.scores:
        if score.task not in found or (score.metric == NORMALIZED != found[score.task].metric):
            found[score.task] = score
    return list(found.values())


def means(tasks: TaskScores) -> Means | None:
    """Over one score of each task, of those that are shares: better when higher, and never above 1. None where no task
    has one, or the reference's are all 0."""
    shares = [s for s in heads(tasks) if s.higher_is_better and max(s.value, s.reference) <= 1]
    if not shares or not sum(s.reference for s in shares) > 0:
        return None
    return Means(*(sum(values) / len(shares) for values in zip(*((s.value, s.reference) for s in shares), strict=True)))


def recovery(tasks: TaskScores | None) -> float | None:
    """Percent of the reference's mean over tasks; None without one."""
    found = None if tasks is None else means(tasks)
    return None if found is None else found.recovery


def task_rows(tasks: TaskScores) -> list[list[str]]:
    """Of one artifact: task, metric, the reference's score, its own, recovery in percent; the means last."""
    rows = [
        [_task(s), _metric(s), _pm(s.reference, s.reference_stderr), _pm(s.value, s.stderr), _percent(s.recovery)]
        for s in tasks.scores
    ]
    if (mean := means(tasks)) is not None:
        rows.append(["mean", "", f"{mean.reference:.4f}", f"{mean.value:.4f}", _percent(mean.recovery)])
    return rows


def task_header(tasks: TaskScores, name: str) -> list[str]:
    """Over `task_rows` of the artifact called `name`."""
    return ["task", "metric", tasks.reference, name, "recovery, %"]


def task_table(tasks: TaskScores, name: str, *, markdown: bool = False) -> str:
    """Every metric of one artifact, called `name`, beside the reference's."""
    return table(task_header(tasks, name), task_rows(tasks), markdown=markdown)


def beside_rows(rows: Sequence[tuple[str, TaskScores | None]]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of artifacts by name, all scored in the same tasks: their mean over tasks, its recovery in
    percent, and one score of each task; the reference first. Nothing of those without scores."""
    scored = [(name, tasks) for name, tasks in rows if tasks is not None]
    if not scored:
        return [], []
    first = scored[0][1]
    header = ["artifact", "recovery, %", "mean", *(f"{_task(s)}, {_metric(s)}" for s in heads(first))]
    mean = means(first)
    referred = ["", "" if mean is None else f"{mean.reference:.4f}"]
    lines = [[f"reference {first.reference}", *referred, *(_pm(s.reference, s.reference_stderr) for s in heads(first))]]
    for name, tasks in scored:
        mean = means(tasks)
        told = ["", ""] if mean is None else [_percent(mean.recovery), f"{mean.value:.4f}"]
        lines.append([name, *told, *(_pm(s.value, s.stderr) for s in heads(tasks))])
    return header, lines


def beside_table(rows: Sequence[tuple[str, TaskScores | None]], *, markdown: bool = False) -> str:
    """The same as text; '' where none was scored."""
    header, lines = beside_rows(rows)
    return table(header, lines, markdown=markdown) if lines else ""


def done_by(tasks: TaskScores) -> str:
    """What scores in tasks rest on, in a line."""
    counts = ", ".join(f"{s.task} (version {s.version}) {s.samples:,} of {s.total:,}" for s in heads(tasks))
    chat = ", in the chat template" * tasks.chat
    return (
        f"lm_eval {tasks.lm_eval} over dsv2quant's runtime in {tasks.dtype}, activations as served{chat}; samples: "
        f"{counts}; ± is lm_eval's standard error of each score alone; the mean is over shares, of each task its "
        f"{NORMALIZED} or else its first metric"
    )


def _task(score: TaskScore) -> str:
    return score.task if score.shots is None else f"{score.task} ({score.shots}-shot)"


def _metric(score: TaskScore) -> str:
    return score.metric if score.filter == "none" else f"{score.metric} {score.filter}"


def _pm(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
