"""Artifacts beside each other, whoever made them: sizes, errors against their source, distances from a reference."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Unpack

import dsv2quant.api as dq
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.errors import UsageError
from dsv2quant.planning.options import HubOptions, StrPath
from dsv2quant.progress import Progress, no_progress
from dsv2quant.report.artifacts import Artifact, Report
from dsv2quant.report.measured import Measured
from dsv2quant.storage.manifest import own_manifest

if TYPE_CHECKING:
    from dsv2quant.evaluation.results import Evaluation, TensorError


def compare(
    models: Sequence[dq.Model], *, reference: dq.Model | None = None, source: dq.Model | None = None,
    text: StrPath | None = None, dataset: str | None = None, ctx: int | None = None, limit: int | None = None,
    stream: bool = False, device: str = "cpu", dtype: str = "auto", progress: Progress = no_progress,
    **hub: Unpack[HubOptions],
) -> Report:  # fmt: skip
    """What can be told of checkpoints, artifacts and GGUF files of one model. From headers alone sizes and bits; with
    `source`, the checkpoint that they were made from, the errors of their weights; with a `reference`, `text` or
    `dataset` distances from the reference, which is scored once, and the first of them where none is given.

    The rest is as in `evaluate`. Raises UsageError for a single model without a reference, InputError where one is
    another model than the source, and else as `open` and `evaluate` do.
    """
    scores = not (reference is None and text is None and dataset is None)
    if useless := [
        name for name, value in {"--ctx": ctx, "--limit": limit}.items() if value is not None and not scores
    ]:
        raise UsageError(f"{useless[0]} goes with --text, --dataset or --reference")
    opened = [dq.open(model, headers_only=not scores and source is None, **hub) for model in models]
    if scores and reference is None and len(opened) < 2:
        raise UsageError("one model alone has nothing to be compared with", fix="give --reference, or two models")
    own = hub | {"revision": None}  # a revision is of the models
    original = None if source is None else dq.open(source, **own)
    settings: dict[str, Any] = {
        "text": text, "dataset": dataset, "ctx": ctx, "limit": limit, "stream": stream, "device": device,
        "dtype": dtype, "progress": progress, **own,
    }  # fmt: skip
    first = opened[0] if reference is None else None
    scored: dict[int, Evaluation] = {}
    if scores:
        with _kept(first or reference, settings) as kept:
            wanted = (i for i, each in enumerate(opened) if each is not first)
            scored = {i: dq.evaluate(opened[i], reference=kept, **settings) for i in wanted}
    artifacts = []
    for i, (name, each) in enumerate(zip(_names(models, opened), opened, strict=True)):
        errors = [] if original is None else _errors(each, original, device, progress)
        artifacts.append(artifact(name, each, errors, scored.get(i)))
    about = next((e.comparison.reference for e in scored.values() if e.comparison is not None), opened[0])
    return Report(about.model, about.revision, tuple(artifacts))


@contextmanager
def _kept(reference: dq.Model | None, settings: Mapping[str, Any]) -> Iterator[StrPath]:
    """The reference in a file, itself or that of its model, which is gone behind."""
    from dsv2quant.evaluation.reference import kept_at

    assert reference is not None
    if kept_at(reference) is not None:
        yield os.fspath(reference)  # type: ignore[arg-type]
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "reference.safetensors"
        dq.evaluate(reference, save_reference=path, **settings)
        yield path


def _errors(opened: Checkpoint, source: Checkpoint, device: str, progress: Progress) -> list[TensorError]:
    from dsv2quant.evaluation.verify import bytes_compared, check_layout, compare_tensors

    check_layout(opened, source)
    with progress(bytes_compared(opened, source), "B", f"errors {opened.model}") as advance:
        return compare_tensors(opened, source, advance, device)


def artifact(
    name: str, opened: Checkpoint, errors: Sequence[TensorError], scored: Evaluation | None
) -> Artifact:  # fmt: skip
    """What was found of one: `errors` of all its weights or none, and how it scored."""
    from dsv2quant.evaluation.cells import cells
    from dsv2quant.evaluation.results import scores_of

    stored, parameters = sum(w.nbytes for w in opened.weights), sum(w.spec.size for w in opened.weights)
    files = sum(path.stat().st_size for path, _ in opened.data.values())
    return Artifact(
        name, files or stored, 8 * stored / parameters,
        Measured(None if scored is None else scores_of(scored), cells=cells(opened, errors)),
        coverage=coverage_of(own_manifest(opened.manifest) if opened.data else None),
    )  # fmt: skip


def coverage_of(manifest: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], ...]:
    """What experts saw in calibration, as the manifest of an artifact of ours has it; nothing without one."""
    match manifest:
        case {"calibrated": {"experts": [*experts]}}:
            return tuple(experts)
    return ()


def _names(models: Sequence[dq.Model], opened: Sequence[Checkpoint]) -> list[str]:
    """What each is called: by its path or id where two would have one name."""
    count = Counter(each.model for each in opened)
    return [
        each.model if count[each.model] == 1 or isinstance(model, Checkpoint) else os.fspath(model)
        for model, each in zip(models, opened, strict=True)
    ]
