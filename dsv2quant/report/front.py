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
    results = [result for row in rows for result in _results(row, several=len(rows) > 1)]
    measured: dict[str, Any] = {"eval_results": results, "model_name": name} if results else {}
    data = ModelCardData(
        base_model=base.id, datasets=list(datasets) or None, library_name=library,
        pipeline_tag=base.pipeline_tag or ("image-text-to-text" if checkpoint.whole else "text-generation"),
        tags=[str(checkpoint.raw_config.get("model_type", "deepseek_v2")), *tags],
        metrics=["perplexity"] if results else None,
        **base.carried, **related, quantized_by="dsv2quant", **measured,
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---"


def _results(row: Scored, *, several: bool) -> Iterator[EvalResult]:
    """What the hub shows beside a card, a number each; the card itself has their errors."""
    from huggingface_hub import EvalResult

    s = row.scores
    if s is None:
        return
    # How the hub spells what a text is called: a data set's id, or letters, digits, '-', '_' and '.'.
    kind = (dataset_ids([s.text]) or [re.sub(r"[^\w.-]+", "-", s.text, flags=re.ASCII)])[0]
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
