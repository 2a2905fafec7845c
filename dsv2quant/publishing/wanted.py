"""What a release is to hold: a YAML file, or artifacts named on the command line.

    artifacts:
      - fp8-block
      - {artifact: int4-mixed, target: [vllm, sglang], max-kld: 0.06}
      - {artifact: Q4_K_M, name: model-Q4_K_M}
    calibration: {text: chats.jsonl, samples: 512, length: 2048}
    evaluation: {dataset: wikitext2, ctx: 2048, limit: 64}
    tasks: {names: [gsm8k, {task: arc_challenge, fewshot: 25}], limit: 200}
    gates: {max-kld: 0.1, max-ppl-increase: 3, min-recovery: 98}
    engines:
      - {engine: vllm, python: ~/vllm/bin/python}

An artifact is a scheme of `convert` (fp8-block, int4-mixed), a file type or preset of --gguf, or a `recipe`; beside it
stand options of `convert` as the command line spells them, a `name`, and gates of its own. Paths are beside the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsv2quant.errors import InputError
from dsv2quant.formats.gguf.file_types import NAMES
from dsv2quant.planning import options as asked
from dsv2quant.planning import plain_yaml
from dsv2quant.planning.options import ENGINES, GGUF, SCHEMES
from dsv2quant.planning.plain_yaml import known_keys, short

ADVICE = "see docs/release.md"
# By their names in the file.
_OPTIONS = {
    asked.dashed(name).removeprefix("--"): name
    for name in (*asked.FOLDER, *GGUF)
    if name not in ("scheme", "gguf", "recipe")
}
_NUMBERS = {"tp", "ep", "samples", "length", "seed", "ctx", "limit", "windows", "fewshot"}
_FLAGS = {"kv_scales", "language_only", "imatrix_shrink", "drop_expert_groups", "stream", "apply-chat-template"}
_LISTS = {"targets", "tensor_types"}
_PATHS = {"text", "recipe", "imatrix", "python", "include"}
_GATES = {
    "max-kld": "max_kld", "max-ppl-increase": "max_ppl_increase", "min-top1": "min_top1",
    "min-recovery": "min_recovery",
}  # fmt: skip
_CALIBRATION = ("text", "samples", "length", "seed")
_EVALUATION = ("text", "dataset", "ctx", "limit", "protocol", "dtype", "stream")
_ENGINE = ("engine", "python", "windows", "ctx", "tp")
_COUNTS = {"fewshot": 0, "limit": 1}  # of tasks, with the least that each may be


@dataclass(frozen=True)
class Gates:
    """What an artifact must keep to: mean KLD in nats, percent that perplexity grows by, share of tokens with the same
    likeliest one, percent of the model's mean over tasks; None asks nothing."""

    max_kld: float | None = None
    max_ppl_increase: float | None = None
    min_top1: float | None = None
    min_recovery: float | None = None


@dataclass(frozen=True)
class Wanted:
    """One artifact: options of `convert` by their names in Python, and the gates for it. `name` is the folder's or the
    file's in the release."""

    name: str
    options: Mapping[str, Any]
    gates: Gates

    @property
    def into_gguf(self) -> bool:
        """Whether it is a GGUF file."""
        return "gguf" in self.options


@dataclass(frozen=True)
class Task:
    """A task of lm_eval by its `name`, or a group or tag of some: `fewshot` examples shown before a question, and the
    first `limit` questions; None is what the task says, and all of them."""

    name: str
    fewshot: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Tasks:
    """Tasks for the model and for each artifact: lm_eval's own, and those of the folder `include`. `chat` puts
    questions in the model's chat template."""

    each: tuple[Task, ...]
    include: str | None = None
    chat: bool = False


@dataclass(frozen=True)
class Release:
    """What is wanted; `text` is the file it came from, which the cards show. `calibration`, `evaluation` and each of
    `engines` hold options of `convert`, `evaluate` and `verify_engine` by their names in Python. `tasks` are None where
    none are to be done."""

    artifacts: tuple[Wanted, ...]
    calibration: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    engines: tuple[Mapping[str, Any], ...] = ()
    tasks: Tasks | None = None
    text: str = ""


def load(path: Path, model: str) -> Release:
    """A release from a file; `model` begins the names of artifacts that have none. Raises InputError for each wrong
    key or value, with its place."""
    text = plain_yaml.read(path)
    raw = plain_yaml.parse(text, path, ADVICE)
    known_keys(raw, ("artifacts", "calibration", "evaluation", "tasks", "gates", "engines"), path)
    for name in ("artifacts", "engines"):
        if not isinstance(raw.get(name, [""]), list) or not raw.get(name, [""]):
            raise InputError(f"`{name}` must be a list", where=path, fix=ADVICE)
    read = _Reader(path)
    usual = Gates(**read.gates(raw.get("gates") or {}, "gates"))
    artifacts = tuple(
        read.artifact(item, usual, model, f"artifact {i}") for i, item in enumerate(raw.get("artifacts") or (), 1)
    )
    release = Release(
        artifacts,
        calibration=read.section(raw.get("calibration") or {}, _CALIBRATION, "calibration"),
        evaluation=read.section(raw.get("evaluation") or {}, _EVALUATION, "evaluation"),
        engines=tuple(read.engine(item, f"engine {i}") for i, item in enumerate(raw.get("engines") or (), 1)),
        tasks=None if raw.get("tasks") is None else read.tasks(raw["tasks"]),
        text=text,
    )
    return _checked(release, path)


def named(artifacts: str, model: str, calibration: str | None) -> Release:
    """A release of artifacts by their names, 'fp8-block,Q4_K_M', calibrated on a text. Raises as `load`."""
    where = f"--artifacts {artifacts}"
    read = _Reader(Path(where))
    wanted = tuple(read.artifact(name.strip(), Gates(), model, "artifact") for name in artifacts.split(","))
    return _checked(Release(wanted, calibration={"calibration": calibration} if calibration else {}), where)


def _checked(release: Release, where: object) -> Release:
    if not release.artifacts:
        raise InputError("names no artifact", where=where, fix=ADVICE)
    names = [wanted.name for wanted in release.artifacts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two artifacts are named {twice[0]}", where=where, fix="give one of them a `name`")
    if release.tasks is None and any(wanted.gates.min_recovery is not None for wanted in release.artifacts):
        raise InputError("`min-recovery` is of tasks, and it has none", where=where, fix="name some: `tasks`")
    return release


@dataclass(frozen=True)
class _Reader:
    """Reads parts of the file at `path`."""

    path: Path

    def artifact(self, raw: Any, usual: Gates, model: str, part: str) -> Wanted:
        given = {"artifact": raw} if isinstance(raw, str) else raw
        known_keys(given, ("artifact", "recipe", "name", *_OPTIONS, *_GATES), self.at(part))
        kind = given.get("artifact")
        options: dict[str, Any] = {}
        if "recipe" in given and kind is None:
            options["recipe"] = self.value("recipe", given["recipe"], part)
            kind = Path(options["recipe"]).stem
        elif kind in SCHEMES:
            options["scheme"] = kind
        elif isinstance(kind, str) and kind.upper() in NAMES:
            options["gguf"] = kind.upper()
        else:
            known = ", ".join((*SCHEMES, *NAMES))
            raise InputError(f"unknown artifact {short(kind)}", where=self.at(part), fix=f"there are {known}")
        options |= {
            _OPTIONS[key]: self.value(_OPTIONS[key], value, part) for key, value in given.items() if key in _OPTIONS
        }
        name = given.get("name") or self.named(model, str(kind), options)
        if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
            raise InputError(f"`name` {short(name)} is no file name", where=self.at(part), fix=ADVICE)
        if "gguf" in options and not name.endswith(".gguf"):
            name += ".gguf"
        gates = replace(usual, **self.gates({k: v for k, v in given.items() if k in _GATES}, part))
        return Wanted(name, options, gates)

    @staticmethod
    def named(model: str, kind: str, options: Mapping[str, Any]) -> str:
        """As artifacts of a model are called: its name, and in capitals what they are."""
        more = [str(options[key]) for key in ("method", "group_size", "layout") if key in options]
        return "-".join([model, kind.upper(), *(word.upper() for word in more)])

    def engine(self, raw: Any, part: str) -> dict[str, Any]:
        found = self.section(raw, _ENGINE, part)
        if found.get("engine") not in ENGINES:
            raise InputError(
                f"unknown engine {short(found.get('engine'))}", where=self.at(part), fix=", ".join(ENGINES)
            )
        return found

    def tasks(self, raw: Any) -> Tasks:
        part = "tasks"
        known_keys(raw, ("names", "include", "apply-chat-template", *_COUNTS), self.at(part))
        names = raw.get("names")
        if not isinstance(names, list) or not names:
            raise InputError("`names` must be a list", where=self.at(part), fix=ADVICE)
        usual = self.counts(raw, part)
        each = tuple(self.task(item, usual, f"task {i}") for i, item in enumerate(names, 1))
        called = [task.name for task in each]
        if twice := [name for name in called if called.count(name) > 1]:
            raise InputError(f"{twice[0]} is there twice", where=self.at(part), fix="leave one out")
        more = {name: self.value(name, raw[name], part) for name in ("include", "apply-chat-template") if name in raw}
        return Tasks(each, more.get("include"), more.get("apply-chat-template", False))

    def task(self, raw: Any, usual: Mapping[str, int], part: str) -> Task:
        given = {"task": raw} if isinstance(raw, str) else raw
        known_keys(given, ("task", *_COUNTS), self.at(part))
        if not isinstance(given.get("task"), str):
            raise InputError(f"`task` is {short(given.get('task'))}", where=self.at(part), fix="give a name")
        return Task(given["task"], **{**usual, **self.counts(given, part)})

    def counts(self, raw: Mapping[str, Any], part: str) -> dict[str, int]:
        found = {key: self.value(key, raw[key], part) for key in _COUNTS if key in raw}
        for key, count in found.items():
            if count < _COUNTS[key]:
                raise InputError(f"`{key}` is {count}", where=self.at(part), fix=f"at least {_COUNTS[key]}")
        return found

    def section(self, raw: Any, keys: Sequence[str], part: str) -> dict[str, Any]:
        known_keys(raw, keys, self.at(part))
        return {_RENAMED.get((part.split()[0], key), key): self.value(key, value, part) for key, value in raw.items()}

    def gates(self, raw: Any, part: str) -> dict[str, float]:
        known_keys(raw, _GATES, self.at(part))
        return {_GATES[key]: self.number(key, value, part, float) for key, value in raw.items()}

    def value(self, name: str, value: Any, part: str) -> Any:
        """What an option is given, of the kind it takes."""
        if name in _LISTS:
            items = value if isinstance(value, list) else [value]
            return [str(item) for item in items]
        if not isinstance(value, str):
            raise InputError(f"`{name}` is {short(value)}", where=self.at(part), fix=ADVICE)
        if name in _FLAGS:
            if value not in ("true", "false"):
                raise InputError(f"`{name}` is {short(value)}", where=self.at(part), fix="true or false")
            return value == "true"
        if name in _NUMBERS or (name == "group_size" and value != "channel"):
            return self.number(name, value, part, int)
        if name in _PATHS and self.path.suffix:
            return str(self.path.parent / Path(value).expanduser())
        return value

    def number(self, name: str, value: Any, part: str, kind: Callable[[str], Any]) -> Any:
        try:
            return kind(value)
        except (TypeError, ValueError):
            fix = "give a number"
            raise InputError(f"`{name}` is {short(value)}", where=self.at(part), fix=fix) from None

    def at(self, part: str) -> str:
        return f"{self.path}, {part}"


# Where a part of the file names an option otherwise than Python does.
_RENAMED = {("calibration", "text"): "calibration", ("engine", "python"): "engine_python"}
