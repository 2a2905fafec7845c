"""lm-evaluation-harness as a release uses it: which tasks it knows, and a model doing one over this tool's runtime.

It is imported where it is used: whoever asks for no tasks needs none of it. Written for lm_eval 0.4.13.
"""

from __future__ import annotations

import difflib
import io
import logging
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import metadata
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

import dsv2quant.api as dq
from dsv2quant.errors import InputError, UsageError
from dsv2quant.planning.plain_yaml import short
from dsv2quant.progress import Progress
from dsv2quant.publishing.wanted import Task, Tasks

Row = dict[str, Any]  # of a TaskScore (report/measured.py), without what is the reference's
INSTALL = "pip install 'dsv2quant[lm-eval]'"


def installed() -> str:
    """The version of lm_eval that is installed. Raises UsageError where none is, or with a `datasets` before 4, which
    ran Python that comes with data."""
    try:
        found, datasets = metadata.version("lm_eval"), metadata.version("datasets")
    except metadata.PackageNotFoundError as error:
        raise UsageError(f"tasks need lm_eval, and {error.name} is not installed", fix=INSTALL) from None
    if int(datasets.partition(".")[0]) < 4:
        raise UsageError(f"tasks need datasets 4 or newer, and {datasets} is installed", fix=INSTALL)
    return found


def check(wanted: Tasks) -> None:
    """Raise UsageError where lm_eval is not installed, and InputError for a task that it doesn't know, that two of the
    names have, or that runs code which a model or the hub wrote."""
    installed()
    if wanted.include is not None and not Path(wanted.include).is_dir():
        raise InputError("is no folder", where=wanted.include, fix="`include` is one of lm_eval's YAML files")
    index, held = _manager(wanted).task_index, dict[str, str]()
    for task in wanted.each:
        if task.name not in index:
            near = difflib.get_close_matches(task.name, index, 3)
            fix = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise InputError(f"lm_eval knows no {short(task.name)}", where="tasks", fix=fix)
        for name, config in _leaves(index, task.name, _config(index[task.name])):
            if held.setdefault(name, task.name) != task.name:
                raise InputError(f"{held[name]} and {task.name} both have {name}", where="tasks", fix="leave one out")
            metrics = config.get("metric_list") or ()
            fetched = any(metric.get("hf_evaluate") for metric in metrics if isinstance(metric, Mapping))
            if fetched or config.get("unsafe_code"):
                what = "is scored by code of the hub" if fetched else "runs code that the model writes"
                raise InputError(f"{name} {what}", where="tasks", fix="leave it out, or run it by lm_eval itself")


def done(
    wanted: Tasks, tasks: Sequence[Task], model: dq.Model, device: str, dtype: str, progress: Progress
) -> Iterator[tuple[Task, list[Row]]]:  # fmt: skip
    """Have a model do `tasks`, as the command lm_eval does: each with its scores when it is done. The data of all is
    loaded first, and InputError raised where it can't be had. Of what lm_eval shows only `progress` is seen."""
    from lm_eval import evaluate

    manager, terminal = _manager(wanted), sys.stderr
    with progress(0, "", "data of tasks"), _unheard():
        loaded = [_loaded(manager, task) for task in tasks]

    @contextmanager
    def shown(total: int, unit: str, label: str) -> Iterator[Callable[[int], object]]:
        with redirect_stderr(terminal), progress(total, unit, label) as advance:
            yield advance

    from dsv2quant.lm_eval import Dsv2quantLM

    lm = Dsv2quantLM(model, dtype, device=device, progress=shown)
    for task, data in zip(tasks, loaded, strict=True):
        _prepare(data["tasks"].values(), task.fewshot)
        with _unheard():
            found = evaluate(
                lm, data, task.limit, apply_chat_template=wanted.chat, fewshot_as_multiturn=wanted.chat
            )  # fmt: skip
        yield task, rows_of(found, task.name)


def _loaded(manager: Any, task: Task) -> Mapping[str, Any]:
    from datasets.exceptions import DatasetsError

    try:
        return manager.load([task.name])
    except (OSError, ValueError, DatasetsError) as error:
        fix = "its data must be on the hub, in the cache, or in files that it names"
        raise InputError(f"can't be loaded: {error}", where=f"task {task.name}", fix=fix) from None


def _prepare(tasks: Iterable[Any], fewshot: int | None) -> None:
    """Seeds and counts of examples as lm_eval's `simple_evaluate` sets them, whose look at the machine takes seconds:
    a task that says 0 examples keeps to that, and one that says nothing has none unless it is asked."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.utils import set_torch_seed

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    set_torch_seed(DEFAULT_OTHER_SEED)
    for task in tasks:
        own = task.get_config("num_fewshot")
        if own is None or (own != 0 and fewshot is not None):
            task.set_config(key="num_fewshot", value=fewshot or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def rows_of(found: Mapping[str, Any], name: str) -> list[Row]:
    """What lm_eval found of a task, group or tag (lm_eval 0.4.13, result_schema.py): of a group its own scores, or
    where it has none those of what is in it; every metric but such as have no number."""
    names = [*_scored_in(found, name)] or [*found["n-samples"]]
    return [row for each in names for row in _rows(found, each)]


def _scored_in(found: Mapping[str, Any], name: str) -> Iterator[str]:
    if any("," in key for key in found["results"].get(name, ())):
        yield name
        return
    for child in found["group_subtasks"].get(name, ()):
        yield from _scored_in(found, child)


def _rows(found: Mapping[str, Any], name: str) -> Iterator[Row]:
    result, config = found["results"][name], found["configs"].get(name, {})
    total = sum(found["n-samples"][task]["original"] for task in _tasks_of(found, name))
    for key, value in result.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or (number := _number(value)) is None:
            continue
        yield {
            "task": name, "version": str(found["versions"].get(name, "")), "metric": metric, "filter": kind,
            "higher_is_better": bool(found["higher_is_better"].get(name, {}).get(metric)),
            "shots": found["n-shot"].get(name), "samples": int(result["sample_len"]), "total": total,
            "dataset": config.get("dataset_path"), "config": config.get("dataset_name"),
            "split": config.get("test_split") or config.get("validation_split"),
            "value": number, "stderr": _number(result.get(f"{metric}_stderr,{kind}")),
        }  # fmt: skip


def _tasks_of(found: Mapping[str, Any], name: str) -> set[str]:
    """The tasks that a group holds, or the task itself."""
    children = found["group_subtasks"].get(name)
    return {name} if children is None else {task for child in children for task in _tasks_of(found, child)}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _manager(wanted: Tasks) -> Any:
    """lm_eval's TaskManager."""
    with _unheard():
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=wanted.include)


def _config(entry: Any) -> Mapping[str, Any]:
    """What an Entry of lm_eval's index says; a tag has its tasks alone."""
    return {"task": sorted(entry.tags)} if entry.cfg is None else entry.cfg


def _leaves(index: Mapping[str, Any], name: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, configuration) of all tasks that a task, group or tag stands for."""
    members = config.get("task")
    if not isinstance(members, list):
        yield name, config
        return
    for member in members:
        given = {"task": member} if isinstance(member, str) else member
        called = str(given.get("group") or given.get("task"))
        yield from _leaves(index, called, _config(index[called]) if called in index else given)


@contextmanager
def _unheard() -> Iterator[None]:
    """Nothing that lm_eval prints, draws or logs short of an error is seen."""
    log, nowhere = logging.getLogger("lm_eval"), io.StringIO()
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        log.setLevel(before)
