"""What was measured of an artifact, as plain numbers that cards show and reports draw, and that JSON keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Stretch:
    """Mean KLD, in nats, of the scored tokens `first` to `last` of every window, counted from 0."""

    first: int
    last: int
    kld: Estimate


@dataclass(frozen=True)
class Scores:
    """An artifact's distance from the `reference` on `tokens` in `windows` of `ctx` of a text, which its hash names.
    `ln_ratio` is ln of the ratio of perplexities, KLD is in nats, `top1` a share. `weight_only` says whether
    activations were left unquantized, whatever the scheme."""

    reference: str
    perplexity: Estimate
    reference_perplexity: Estimate
    ln_ratio: Estimate
    kld: Estimate
    kld_p99: float
    top1: Estimate
    by_position: tuple[Stretch, ...]
    tokens: int
    windows: int
    ctx: int
    protocol: str
    text: str
    text_sha256: str
    dtype: str
    weight_only: bool


@dataclass(frozen=True)
class EngineRun:
    """What an engine made of the artifact beside the runtime: the mean KLD between them in nats, what may lie between
    them, and what is wrong, a line each. `versions` are by name, the engine's own among them."""

    engine: str
    versions: Mapping[str, str]
    device: str
    tp: int
    kld: Estimate
    limit: float
    top1: Estimate
    faults: tuple[str, ...]

    @property
    def version(self) -> str:
        """The engine's own, '' where it says none."""
        return self.versions.get(self.engine, "")


@dataclass(frozen=True)
class Cell:
    """All weights of one role in a layer, None outside of layers: how many tensors and elements, in which schemes, bits
    of an element as stored, and the ratio of signal to noise against the source in dB: of all together, of the worst
    tenth of the tensors, the tenth percentile, and the lowest. It is None where nothing differs, `exact`, or where
    nothing was compared; `signal` is the sum of squares of the source's elements."""

    layer: int | None
    role: str
    schemes: tuple[str, ...]
    tensors: int
    weights: int
    bits: float
    exact: bool = False
    signal: float | None = None
    sqnr_db: float | None = None
    decile_db: float | None = None
    lowest_db: float | None = None


@dataclass(frozen=True)
class TaskScore:
    """What lm_eval made of a task by one metric, of the artifact and of the `reference`; `version` is the task's,
    `filter` says which part of an answer counts. `shots` examples were shown before each of so many `samples`, of a
    `total` that the task has; None where the tasks of a group were shown different numbers. `dataset`, `config` and
    `split` are what a task names, None of a group. Standard errors are lm_eval's, None where it has none."""

    task: str
    version: str
    metric: str
    filter: str
    higher_is_better: bool
    shots: int | None
    samples: int
    total: int
    dataset: str | None
    config: str | None
    split: str | None
    value: float
    stderr: float | None
    reference: float
    reference_stderr: float | None

    @property
    def recovery(self) -> float | None:
        """Percent of the reference's score; None of what is better when lower, or where the reference has none."""
        return 100 * (self.value / self.reference) if self.higher_is_better and self.reference > 0 else None


@dataclass(frozen=True)
class TaskScores:
    """Scores in tasks, by this version of `lm_eval` over the runtime in `dtype`; `commands` give them again. `chat` is
    whether questions were put in the model's chat template."""

    reference: str
    lm_eval: str
    dtype: str
    chat: bool
    commands: tuple[str, ...]
    scores: tuple[TaskScore, ...]


@dataclass(frozen=True)
class Measured:
    """All of an artifact: `scores` are None where it was not scored, `cells` in the order of the model, `tasks` None
    where it did none."""

    scores: Scores | None = None
    engines: tuple[EngineRun, ...] = ()
    cells: tuple[Cell, ...] = ()
    tasks: TaskScores | None = None


def measured_json(measured: Measured) -> dict[str, Any]:
    """As JSON; `measured_from` reads it."""
    return asdict(measured)


def measured_from(found: Mapping[str, Any]) -> Measured:
    """What `measured_json` made."""
    scores, tasks = found["scores"], found.get("tasks")  # a release that was made before tasks has none
    return Measured(
        None if scores is None else _scores(scores),
        tuple(
            EngineRun(**run | {"faults": tuple(run["faults"])} | _estimates(run, "kld", "top1"))
            for run in found["engines"]
        ),
        tuple(Cell(**cell | {"schemes": tuple(cell["schemes"])}) for cell in found["cells"]),
        None if tasks is None else _tasks(tasks),
    )


def _scores(found: Mapping[str, Any]) -> Scores:
    stretches = tuple(Stretch(**stretch | _estimates(stretch, "kld")) for stretch in found["by_position"])
    numbers = _estimates(found, "perplexity", "reference_perplexity", "ln_ratio", "kld", "top1")
    return Scores(**dict(found) | numbers | {"by_position": stretches})


def _tasks(found: Mapping[str, Any]) -> TaskScores:
    scores = tuple(TaskScore(**score) for score in found["scores"])
    return TaskScores(**dict(found) | {"commands": tuple(found["commands"]), "scores": scores})


def _estimates(found: Mapping[str, Any], *names: str) -> dict[str, Estimate]:
    return {name: Estimate(**found[name]) for name in names}
