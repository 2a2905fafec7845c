"""Tasks in a release: the model does them once, and every artifact.

What was scored is kept, a file of each model and task under OUT/.tasks: named by the sha256 of whose weights, which
task and how, so that another run of the same goes on from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import dsv2quant.api as dq
from dsv2quant.checkpoint.checkpoint import Checkpoint, HfCheckpoint
from dsv2quant.checkpoint.identity import Source
from dsv2quant.progress import Progress
from dsv2quant.publishing import harness
from dsv2quant.publishing.harness import Row
from dsv2quant.publishing.wanted import Tasks
from dsv2quant.report.measured import TaskScore, TaskScores
from dsv2quant.storage.durable import disk_errors, dump_json, hash_file, is_regular, write_whole
from dsv2quant.storage.safetensors import read_json

FOLDER = ".tasks"
_OF = ("task", "metric", "filter")  # what tells one row from another


def weights_of(checkpoint: Checkpoint) -> object:
    """What tells a model from others, of one that is no artifact of the release."""
    return Source.of(checkpoint, checkpoint.carried_files() if isinstance(checkpoint, HfCheckpoint) else {}).identity


@dataclass(frozen=True)
class TaskRun:
    """How the tasks of a release are done: in `dtype` ("float32", "bfloat16") on `device`; `out` is the release's
    folder."""

    wanted: Tasks
    out: Path
    device: str
    dtype: str

    @classmethod
    def of(cls, wanted: Tasks, out: Path, device: str, dtype: str) -> TaskRun:
        """`dtype` as `evaluate` takes it. Raises as `harness.check` does."""
        harness.check(wanted)
        from dsv2quant.model.load import load_options

        return cls(wanted, out, device, str(load_options(device, dtype, "auto", "auto").dtype).removeprefix("torch."))

    def rows(self, model: dq.Model, weights: object, progress: Progress) -> list[Row]:
        """A model's scores, in the order of the tasks, found or made; `weights` tell it from others. Raises InputError
        where the data of a task can't be had."""
        kept = [field.name for field in fields(TaskScore)]
        how = [weights, self.wanted.chat, self._included(), self.dtype, harness.installed(), kept]
        keys = [hashlib.sha256(json.dumps([asdict(task), *how]).encode()).hexdigest() for task in self.wanted.each]
        paths = {task: self.out / FOLDER / f"{key}.json" for task, key in zip(self.wanted.each, keys, strict=True)}
        if missing := [task for task, path in paths.items() if not is_regular(path)]:
            for task, rows in harness.done(self.wanted, missing, model, self.device, self.dtype, progress):
                with disk_errors(self.out):
                    paths[task].parent.mkdir(exist_ok=True)
                    write_whole(paths[task], [dump_json({"task": task.name, "rows": rows})])
        return [row for path in paths.values() for row in read_json(path)["rows"]]

    def _included(self) -> list[tuple[str, str]]:
        """Names and hashes of the files of the folder `include`: another of them is another task."""
        if self.wanted.include is None:
            return []
        folder, out = Path(self.wanted.include).resolve(), self.out.resolve()
        files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        ours = [path for path in files if not path.is_relative_to(out)]
        return [(str(path.relative_to(folder)), hash_file(path)["sha256"]) for path in ours]

    def compared(self, reference: str, ours: Iterable[Row], theirs: Iterable[Row]) -> TaskScores:
        """An artifact's scores beside those of the `reference`, as far as both have them."""
        referred = {tuple(row[name] for name in _OF): row for row in theirs}
        both = [(row, referred.get(tuple(row[name] for name in _OF))) for row in ours]
        scores = [
            TaskScore(**row, reference=other["value"], reference_stderr=other["stderr"])
            for row, other in both
            if other is not None
        ]
        return TaskScores(
            reference, harness.installed(), self.dtype, self.wanted.chat, tuple(_commands(self.wanted, self.dtype)),
            tuple(scores),
        )  # fmt: skip


def _commands(wanted: Tasks, dtype: str) -> Iterator[str]:
    """What gives the same scores, of tasks that are asked alike together."""
    alike: dict[tuple[int | None, int | None], list[str]] = {}
    for task in wanted.each:
        alike.setdefault((task.fewshot, task.limit), []).append(task.name)
    for (fewshot, limit), names in alike.items():
        words = ["python -m dsv2quant.lm_eval --model dsv2quant", f"--model_args pretrained=ARTIFACT,dtype={dtype}"]
        words += [f"--tasks {','.join(names)}", "--batch_size auto"]
        words += [f"--num_fewshot {fewshot}"] * (fewshot is not None) + [f"--limit {limit}"] * (limit is not None)
        words += ["--apply_chat_template"] * wanted.chat + ["--include_path TASKS"] * (wanted.include is not None)
        yield " ".join(words)
