"""The front matter of a model card: what the hub reads, by huggingface_hub's own classes (2.4, repocard_data.py)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dsv2quant.checkpoint.checkpoint import HfCheckpoint
from dsv2quant.report.origin import ID, Origin
from dsv2quant.report.scores import Scored

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

LM_EVAL = "https://github.com/EleutherAI/lm-evaluation-harness"


def dataset_ids(sources: Iterable[str]) -> list[str]:
    """The ids of data sets among the names of texts, without what follows them: a split, a column, a revision."""
    ids = (re.split("[:#@]", source)[0] for source in sources)
    return [found for found in dict.fromkeys(ids) if ID.fullmatch(found)]


def front_matter(
    checkpoint: HfCheckpoint, base: Origin, name: str, library: str, tags: Sequence[str],
    datasets: Sequence[str], rows: Sequence[Scored],
) -> str:  # fmt: skip
    """Of an artifact called `name`; `rows` are what was measured."""
    from huggingface_hub import ModelCardData

    related = {} if base.id is None else {"base_model_relation": "quantized"}
    several = len(rows) > 1
    results = [result for row in rows for result in (*_results(row, several), *_task_results(row, several))]
    measured: dict[str, Any] = {"eval_results": results, "model_name": name} if results else {}
    data = ModelCardData(
        base_model=base.id, datasets=list(datasets) or None, library_name=library,
        pipeline_tag=base.pipeline_tag or ("image-text-to-text" if checkpoint.whole else "text-generation"),
        tags=[str(checkpoint.raw_config.get("model_type", "deepseek_v2")), *tags],
        metrics=[*dict.fromkeys(metric for row in rows for metric in _metrics(row))] or None,
        **base.carried, **related, quantized_by="dsv2quant", **measured,
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---"


def _metrics(row: Scored) -> list[str]:
    tasks = [] if row.tasks is None else [score.metric for score in row.tasks.scores]
    return ["perplexity"] * (row.scores is not None) + tasks


def _results(row: Scored, several: bool) -> Iterator[EvalResult]:
    """What the hub shows beside a card, a number each; the card itself has their errors."""
    from huggingface_hub import EvalResult

    s = row.scores
    if s is None:
        return
    kind = (dataset_ids([s.text]) or [_spelled(s.text)])[0]
    args = {"windows": s.windows, "ctx": s.ctx, "protocol": s.protocol, "sha256": s.text_sha256}
    of = f" of {row.name}" * several
    for metric, title, value in (
        ("perplexity", f"Perplexity{of}", s.perplexity.value),
        ("kl_divergence", f"KL divergence{of} from {s.reference}, nats", s.kld.value),
        ("same_top_1", f"Same likeliest token{of} as {s.reference}", s.top1.value),
    ):
        if math.isfinite(value):
            yield EvalResult(
                task_type="text-generation", dataset_type=kind, dataset_name=s.text, dataset_args=args,
                metric_type=metric, metric_name=title, metric_value=float(f"{value:.6g}"),
            )  # fmt: skip


def _task_results(row: Scored, several: bool) -> Iterator[EvalResult]:
    """The same of tasks: of the hub's data set where a task names one, else under the task's own name."""
    from huggingface_hub import EvalResult

    if row.tasks is None:
        return
    for s in row.tasks.scores:
        words = [s.task, s.metric, *([] if s.filter == "none" else [s.filter])]
        what: dict[str, Any] = {"dataset_type": _spelled(s.task)}
        if s.dataset is not None and ID.fullmatch(s.dataset):
            what = {"dataset_type": s.dataset, "dataset_config": s.config, "dataset_split": s.split}
        yield EvalResult(
            task_type="text-generation", dataset_name=s.task, **what,
            dataset_args=None if s.shots is None else {"num_few_shot": s.shots},
            metric_type=s.metric, metric_name=f"{', '.join(words)}{f' of {row.name}' * several}",
            metric_args={"version": s.version, "samples": s.samples}, metric_value=float(f"{s.value:.6g}"),
            source_name=f"lm_eval {row.tasks.lm_eval}", source_url=LM_EVAL,
        )  # fmt: skip


def _spelled(name: str) -> str:
    """A name as the hub spells those of data sets: letters, digits, '-', '_' and '.'."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)
