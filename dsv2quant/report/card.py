"""The model card, README.md: of a folder, and of GGUF files, for those who want to run the model.

It does not depend on when or where the conversion ran, so that the same plan gives the same bytes. storage/card.py has
what becomes of it as a file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv2quant.formats.schemes import CODECS
from dsv2quant.planning.consumers import ENGINES
from dsv2quant.planning.memory import Workload, cache_per_token
from dsv2quant.planning.plan import Plan
from dsv2quant.report.base_model import CardModel
from dsv2quant.report.fallbacks import fallbacks
from dsv2quant.report.front import dataset_ids, front_matter
from dsv2quant.report.measured import Measured
from dsv2quant.report.origin import Origin
from dsv2quant.report.plans import beside, serving_notes, types_table
from dsv2quant.report.scores import Scored, engines_table, growth, scored_on, scores_table
from dsv2quant.report.tables import folded, gigabytes, roles_table, summarize, table
from dsv2quant.report.tasks import beside_table, done_by, task_table
from dsv2quant.report.usage import llama_cpp, usage
from dsv2quant.storage.card import sealed
from dsv2quant.storage.durable import MANIFEST_FILE
from dsv2quant.storage.manifest import gguf_stem
from dsv2quant.version import __version__

if TYPE_CHECKING:
    from dsv2quant.planning.gguf_plan import GgufPlan  # imports numba

# How activations are quantized, by type.
_SERVED = {
    "FP8": {"token": "per token", "group128": "per 1×128 group", "static": "with calibrated scales"},
    "INT8": {"token-int8": "per token"},
}
MANY = 8  # files, above which a card folds their list


@dataclass(frozen=True)
class CalibratedOn:
    """The text of a calibration, and what of it each layer's experts saw (`coverage_json` of report/calibration.py)."""

    source: str
    text_sha256: str
    windows: int
    ctx: int
    coverage: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def of(cls, described: Mapping[str, Any], coverage: Sequence[Mapping[str, Any]]) -> CalibratedOn | None:
        """What a manifest says of it under `calibration`, measured then or before; None where it says nothing."""
        found = described if "text_sha256" in described else described.get("statistics", {}).get("calibration")
        if found is None:
            return None
        return cls(found["source"], found["text_sha256"], found["windows"], found["ctx"], coverage)


@dataclass(frozen=True)
class GgufFile:
    """An artifact in GGUF: its plan, the command that made it, the bytes of its files by name, and what was measured of
    it."""

    plan: GgufPlan
    command: str
    files: Mapping[str, int]
    measured: Measured = field(default_factory=Measured)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(self.files.values()) / self.plan.parameters


def folder_card(
    plan: Plan,
    command: str,
    base: Origin,
    *,
    calibrated: CalibratedOn | None = None,
    measured: Measured | None = None,
    figures: Mapping[str, str] | None = None,
    release: str = "",
) -> bytes:
    """Of an artifact in Hugging Face layout, made by `command`. `figures` are titles of pictures by their files,
    relative to the card. `release` is the file of the release that it is part of, in YAML."""
    measured = measured or Measured()
    library = "transformers" if "transformers" in plan.targets else plan.targets[0]
    size = sum(shard.nbytes for shard in plan.shards)
    rows = [Scored(plan.recipe.name, size, plan.bits_per_weight, measured.scores, measured.tasks)]
    model = CardModel.of(plan.checkpoint, base)
    tags = [*sorted({str(CODECS[scheme].quant_method) for scheme in plan.schemes}), *sorted(plan.schemes)]
    tags += sorted({entry.method for entry in plan.entries} & {"gptq", "awq"} - set(tags))
    datasets = [] if calibrated is None else dataset_ids([calibrated.source])
    name = f"{model.title}, {plan.recipe.name}"
    intro = f"{model.said}, quantized with dsv2quant {__version__} for {', '.join(plan.targets)}{plan.parallel}."
    sections = [
        f"# {name}",
        f"{intro} {_activations(plan)}",
        *(f"{_sentence(note)}" for note in serving_notes(plan)),
        _overview(plan, model, size),
        "## Use",
        *usage(plan, chats=model.chats),
        *model.asked(),
        *_evaluation(rows, [measured], base),
        *_shown(figures),
        "## Weights",
        f"{gigabytes(plan.bytes_in)} became {gigabytes(plan.bytes_out)}: {plan.bits_per_weight:.2f} bits per weight.",
        *(_sentence(line) for line in beside(plan)),
        roles_table(
            summarize((x.spec, x.scheme, x.weight.nbytes, x.nbytes) for x in plan.entries), before=True, markdown=True
        ),
        *_fallen(plan),
        *([] if calibrated is None else _calibration(calibrated)),
        "## Files",
        _files({shard.file: shard.nbytes for shard in plan.shards}),
        f"`{MANIFEST_FILE}` has the sha256 of each; `dsv2quant verify .` holds them against it.",
        "## How it was made",
        f"```\n{command}\n```",
        f"The recipe:\n\n```yaml\n{plan.recipe.text.strip()}\n```",
        *_released(release),
        *model.card(),
    ]
    front = front_matter(plan.checkpoint, base, name, library, [*tags, *model.tags], datasets, rows)
    return _card([front, *sections])


def gguf_card(
    files: Sequence[GgufFile], base: Origin, *, figures: Mapping[str, str] | None = None, release: str = ""
) -> bytes:
    """Of a folder of GGUF files, all made of the same base model; the rest is as of a folder."""
    plans = [file.plan for file in files]
    checkpoint, model = plans[0].checkpoint, CardModel.of(plans[0].checkpoint, base)
    imatrices = {m.source: m for m in (plan.options.imatrix for plan in plans) if m is not None}
    names = _names(files)
    rows = [
        Scored(name, sum(file.files.values()), file.bits_per_weight, file.measured.scores, file.measured.tasks)
        for name, file in zip(names, files, strict=True)
    ]
    sections = [
        f"# {model.title}, GGUF",
        f"{model.said}, quantized with dsv2quant {__version__} for llama.cpp.",
        _choice(rows, files),
        table(["", ""], [*model.kind(plans[0].parameters), *model.terms()], markdown=True),
        "## Use",
        *llama_cpp(
            [list(file.files) for file in files], chats=model.chats, experts=bool(checkpoint.config.n_routed_experts)
        ),
        *model.asked(),
        *dict.fromkeys(_sentence(note) for plan in plans for note in _notes(plan)),
        *_evaluation(rows, [file.measured for file in files], base),
        *_shown(figures),
        "## Weights",
    ]
    for name, plan in zip(names, plans, strict=True):
        sections += [folded(f"{name}: types by tensor", types_table(plan, markdown=True)), *_fallen(plan, name)]
    for matrix in imatrices.values():
        texts = [Path(name).name if name.startswith("/") else name for name in matrix.datasets]
        tokens = f"{matrix.chunk_count * matrix.chunk_size:,} tokens of {', '.join(texts)}"
        sections += ["## Calibration", f"The importance matrix was measured on {tokens}."]
    sections += ["## Files", _files({name: size for file in files for name, size in file.files.items()})]
    sections += ["Beside each, `NAME.gguf.json` has its sha256; `dsv2quant verify NAME.gguf` holds it against that."]
    sections += ["## How it was made", "```\n" + "\n".join(file.command for file in files) + "\n```"]
    sections += [*_released(release), *model.card()]
    datasets = dataset_ids(name for matrix in imatrices.values() for name in matrix.datasets)
    tags = ["gguf", *(["imatrix"] if imatrices else []), *model.tags]
    return _card([front_matter(checkpoint, base, f"{model.title}, GGUF", "gguf", tags, datasets, rows), *sections])


def _released(release: str) -> list[str]:
    return (
        [f"As part of a release (`dsv2quant release --recipe`):\n\n```yaml\n{release.strip()}\n```"] if release else []
    )


def _notes(plan: GgufPlan) -> list[str]:
    """What whoever runs a file should know, without paths of this machine."""
    matrix = plan.options.imatrix
    return [note.replace(matrix.source, Path(matrix.source).name) if matrix else note for note in plan.notes]


def _card(parts: Sequence[str]) -> bytes:
    return sealed(("\n\n".join(parts) + "\n\n").encode(errors="backslashreplace"))


def _sentence(text: str) -> str:
    """With a capital, but for the name of a file or key."""
    is_name = re.search(r"[._]", text.partition(" ")[0]) is not None
    return f"{text}." if is_name else f"{text[0].upper()}{text[1:]}."


def _activations(plan: Plan) -> str:
    activations = {a for a in (CODECS[scheme].activation for scheme in plan.schemes) if a}
    quantized = [
        f"to {kind} {' and '.join(how)}"
        for kind, ways in _SERVED.items()
        if (how := [words for activation, words in sorted(ways.items()) if activation in activations])
    ]
    if not quantized:
        return "Activations are not quantized."
    return f"Activations are quantized {' and '.join(quantized)} when it is served."


def _overview(plan: Plan, model: CardModel, size: int) -> str:
    cache = cache_per_token(plan.checkpoint.config, Workload((1,), (1,)))
    scales = "with scales for FP8" if any(entry.kv_scales for entry in plan.entries) else "without scales for FP8"
    rows = [
        *model.kind(plan.parameters),
        ["size", f"{gigabytes(size)}, {plan.bits_per_weight:.2f} bits per weight"],
        ["weights", ", ".join(sorted(plan.schemes))],
        ["KV cache", f"{f'{gigabytes(cache)} a token in BF16, ' * bool(set(plan.targets) & set(ENGINES))}{scales}"],
        *model.terms(),
    ]
    return table(["", ""], rows, markdown=True)


def _names(files: Sequence[GgufFile]) -> list[str]:
    """File types, or names of files where two have one type."""
    types = Counter(file.plan.options.file_type for file in files)
    kinds = [(file.plan.options.file_type, next(iter(file.files))) for file in files]
    return [kind if types[kind] == 1 else gguf_stem(first) for kind, first in kinds]


def _choice(rows: Sequence[Scored], files: Sequence[GgufFile]) -> str:
    """What whoever downloads chooses by: size, and the types that hold most weights."""
    lines = []
    for row, file in zip(rows, files, strict=True):
        weights = Counter[str]()
        for entry in file.plan.entries:
            weights[entry.type] += entry.tensor.size
        types = ", ".join(f"{kind} {n / weights.total():.0%}" for kind, n in weights.most_common(3))
        first = next(iter(file.files))
        lines.append([row.name, gigabytes(row.nbytes), f"{row.bits_per_weight:.2f}", types, f"[{first}]({first})"])
    return table(["artifact", "size", "bits/weight", "most weights in", "file"], lines, markdown=True)


def _evaluation(rows: Sequence[Scored], measured: Sequence[Measured], base: Origin) -> list[str]:
    """Distances from the reference, and what engines made of it; nothing where nothing was measured."""
    parts = []
    found = [(row.name, row.scores) for row in rows if row.scores is not None]
    if found:
        scores = found[0][1]
        grew = ", ".join(f"{name} {growth(s)}" for name, s in found)
        ran = f"dsv2quant eval-ppl ARTIFACT --reference {base.name} --ctx {scores.ctx} --limit {scores.windows}"
        parts += [scores_table(rows, markdown=True), f"Perplexity grew by: {grew}."]
        parts += [_sentence(scored_on([s for _, s in found])), f"```\n{ran}\n```"]
        unmeasured = "Other" if any(row.tasks for row in rows) else "Tasks, other"
        parts += [f"{unmeasured} texts and longer contexts were not measured."]
    for row, each in zip(rows, measured, strict=True):
        if each.engines:
            parts += [f"{row.name} in engines, beside dsv2quant's runtime:", engines_table(each.engines, markdown=True)]
        parts += _verified(row, each, base)
    parts += _tasks(rows)
    return ["## Evaluation", *parts] if parts else []


def _tasks(rows: Sequence[Scored]) -> list[str]:
    """Scores in tasks: of one artifact by every metric, of several by one of each task, beside each other."""
    done = [(row.name, row.tasks) for row in rows if row.tasks is not None]
    if not done:
        return []
    name, tasks = done[0]
    shown = task_table(tasks, name, markdown=True) if len(done) == 1 else beside_table(done, markdown=True)
    return ["### Tasks", shown, _sentence(done_by(tasks)), "```\n" + "\n".join(tasks.commands) + "\n```"]


def _verified(row: Scored, measured: Measured, base: Origin) -> list[str]:
    """What came of holding weights against the source's."""
    compared = [cell for cell in measured.cells if cell.exact or cell.signal is not None]
    if not compared:
        return []
    lowest = min((cell.lowest_db for cell in compared if cell.lowest_db is not None), default=None)
    found = "none differs" if lowest is None else f"signal is {lowest:.2f} dB above noise at least"
    tensors = sum(cell.tensors for cell in compared)
    return [
        f"{row.name}: all {tensors:,} tensors were decoded as consumers do and held against the source's; {found} "
        f"(`dsv2quant verify ARTIFACT --source {base.name}`)."
    ]


def _shown(figures: Mapping[str, str] | None) -> list[str]:
    return [f"![{title}]({file})" for file, title in (figures or {}).items()]


def _fallen(plan: Plan | GgufPlan, name: str = "") -> list[str]:
    """What is in another scheme than was asked for."""
    found = [[each.what, each.scheme, each.reason] for each in fallbacks(plan)]
    if not found:
        return []
    return [f"Fallbacks{f' of {name}' * bool(name)}:", table(["tensors", "in", "why"], found, markdown=True)]


def _calibration(c: CalibratedOn) -> list[str]:
    lines = [
        "## Calibration",
        f"On {c.windows * c.ctx:,} tokens, {c.windows} windows of {c.ctx}, of {c.source} (sha256 {c.text_sha256}).",
    ]
    if c.coverage:
        fewest, most = min(row["fewest"] for row in c.coverage), max(row["most"] for row in c.coverage)
        unseen, starved = sum(len(row["unseen"]) for row in c.coverage), sum(row["starved"] for row in c.coverage)
        lines.append(
            f"A routed expert saw {fewest:,} to {most:,} tokens; {unseen} of them saw none, and {starved} fewer than "
            "their inputs have channels."
        )
    return lines


def _files(files: Mapping[str, int]) -> str:
    shown = table(["file", "size"], [[name, gigabytes(size)] for name, size in files.items()], markdown=True)
    return shown if len(files) <= MANY else folded(f"{len(files)} files, {gigabytes(sum(files.values()))}", shown)
