"""The model card, README.md: of a folder, and of GGUF files, for those who want to run the model.

It does not depend on when or where the conversion ran, so that the same plan gives the same bytes. Its last line is the
sha256 of all before it: a card that a person edited has another one, and is not written over.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv2quant.checkpoint.checkpoint import HfCheckpoint
from dsv2quant.errors import printable
from dsv2quant.formats.schemes import CODECS
from dsv2quant.planning.plan import Plan
from dsv2quant.report.fallbacks import fallbacks
from dsv2quant.report.measured import Measured
from dsv2quant.report.origin import ID, MAX_CARD_BYTES, Origin
from dsv2quant.report.plans import beside, serving_notes
from dsv2quant.report.scores import Scored, engines_table, growth, scored_on, scores_table
from dsv2quant.report.tables import count, gigabytes, roles_table, summarize, table
from dsv2quant.report.usage import llama_cpp, usage
from dsv2quant.storage.durable import disk_errors, is_regular, write_whole
from dsv2quant.storage.files import read_bytes
from dsv2quant.version import __version__

if TYPE_CHECKING:
    from dsv2quant.planning.gguf_plan import GgufPlan  # imports numba

# How activations are quantized, by type.
_SERVED = {
    "FP8": {"token": "per token", "group128": "per 1×128 group", "static": "with calibrated scales"},
    "INT8": {"token-int8": "per token"},
}
_SEAL = "<!-- dsv2quant, sha256 of the above: {} -->\n"
_SEALED = re.compile(rb"(.*)<!-- dsv2quant, sha256 of the above: ([0-9a-f]{64}) -->\n", re.DOTALL)
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


def is_persons(path: Path) -> bool:
    """Whether a card lies there that is not as it was written here: a person's, or edited by one."""
    if not is_regular(path):
        return False
    found = _SEALED.fullmatch(read_bytes(path, MAX_CARD_BYTES))
    return found is None or hashlib.sha256(found[1]).hexdigest() != found[2].decode()


def write_card(path: Path, card: bytes) -> bool:
    """Write a card, unless a person's lies there; whether it did. Raises InputError where the disk fails."""
    if is_persons(path):
        return False
    with disk_errors(path):
        write_whole(path, [card])
    return True


def folder_card(
    plan: Plan,
    command: str,
    base: Origin,
    *,
    calibrated: CalibratedOn | None = None,
    measured: Measured | None = None,
    figures: Mapping[str, str] | None = None,
    release: str = "",
    repo: str | None = None,
) -> bytes:
    """Of an artifact in Hugging Face layout, made by `command`; on the hub it is `repo`, if that is known. `figures`
    are titles of pictures by their files, relative to the card. `release` is the file of the release that it is part
    of, in YAML."""
    measured = measured or Measured()
    layouts = {str(CODECS[scheme].quant_method) for scheme in plan.schemes}
    library = "transformers" if "transformers" in plan.targets else plan.targets[0]
    datasets = [] if calibrated is None else _datasets([calibrated.source])
    name = f"{base.name.rpartition('/')[2]}, {plan.recipe.name}"
    size = sum(shard.nbytes for shard in plan.shards)
    intro = f"{_said(base)}, quantized with dsv2quant {__version__} for {', '.join(plan.targets)}{plan.parallel}."
    sections = [
        f"# {name}",
        f"{intro} {_activations(plan)}",
        *(f"{_sentence(note)}" for note in serving_notes(plan)),
        _overview(plan, size),
        "## Use",
        *usage(plan, repo),
        *_evaluation([Scored(plan.recipe.name, size, plan.bits_per_weight, measured.scores)], [measured], base),
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
        "## How it was made",
        f"```\n{command}\n```",
        f"The recipe:\n\n```yaml\n{plan.recipe.text.strip()}\n```",
        *_released(release),
    ]
    tags = [*sorted(layouts), *sorted(plan.schemes)]
    return _sealed([_front(plan.checkpoint, base, library, tags, datasets), *sections])


def gguf_card(
    files: Sequence[GgufFile],
    base: Origin,
    *,
    figures: Mapping[str, str] | None = None,
    release: str = "",
    repo: str | None = None,
) -> bytes:
    """Of a folder of GGUF files, all made of the same base model; the rest is as of a folder."""
    checkpoint = files[0].plan.checkpoint
    imatrices = {m.source: m for m in (file.plan.options.imatrix for file in files) if m is not None}
    rows = [
        Scored(f.plan.options.file_type, sum(f.files.values()), f.bits_per_weight, f.measured.scores) for f in files
    ]
    sections = [
        f"# {base.name.rpartition('/')[2]}, GGUF",
        f"{_said(base)}, quantized with dsv2quant {__version__} for llama.cpp. {count(files[0].plan.parameters)} "
        "parameters.",
        scores_table([Scored(x.name, x.nbytes, x.bits_per_weight, None) for x in rows], markdown=True),
        "## Use",
        llama_cpp([(file.plan.options.file_type, next(iter(file.files))) for file in files], repo),
        *dict.fromkeys(_sentence(note) for file in files for note in _notes(file.plan)),
        *_evaluation(rows, [file.measured for file in files], base),
        *_shown(figures),
    ]
    for matrix in imatrices.values():
        texts = [Path(name).name if name.startswith("/") else name for name in matrix.datasets]
        tokens = f"{matrix.chunk_count * matrix.chunk_size:,} tokens of {', '.join(texts)}"
        sections += ["## Calibration", f"The importance matrix was measured on {tokens}."]
    fallen = [part for file in files for part in _fallen(file.plan, file.plan.options.file_type)]
    sections += [*fallen, "## Files", _files({name: size for file in files for name, size in file.files.items()})]
    sections += ["## How it was made", "```\n" + "\n".join(file.command for file in files) + "\n```"]
    sections += _released(release)
    datasets = _datasets([name for matrix in imatrices.values() for name in matrix.datasets])
    front = _front(checkpoint, base, "gguf", ["gguf", *(["imatrix"] if imatrices else [])], datasets)
    return _sealed([front, *sections])


def _released(release: str) -> list[str]:
    return (
        [f"As part of a release (`dsv2quant release --recipe`):\n\n```yaml\n{release.strip()}\n```"] if release else []
    )


def _notes(plan: GgufPlan) -> list[str]:
    """What whoever runs a file should know, without paths of this machine."""
    matrix = plan.options.imatrix
    return [note.replace(matrix.source, Path(matrix.source).name) if matrix else note for note in plan.notes]


def _sealed(parts: Sequence[str]) -> bytes:
    content = ("\n\n".join(parts) + "\n\n").encode(errors="backslashreplace")
    return content + _SEAL.format(hashlib.sha256(content).hexdigest()).encode()


def _front(
    checkpoint: HfCheckpoint, base: Origin, library: str, tags: Sequence[str], datasets: Sequence[str]
) -> str:  # fmt: skip
    """What the hub reads, by huggingface_hub's own class for it."""
    from huggingface_hub import ModelCardData

    sees = checkpoint.whole is not None
    kind = str(checkpoint.raw_config.get("model_type", "deepseek_v2"))
    related = {} if base.id is None else {"base_model_relation": "quantized"}
    data = ModelCardData(
        base_model=base.id, datasets=list(datasets) or None, library_name=library,
        pipeline_tag=base.pipeline_tag or ("image-text-to-text" if sees else "text-generation"),
        tags=[kind, *tags, *(["conversational"] if _chats(checkpoint) else [])],
        **base.carried, **related, quantized_by="dsv2quant",
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---"


def _chats(checkpoint: HfCheckpoint) -> bool:
    """Whether it has a chat template, as far as names and its tokenizer's configuration tell."""
    carried = checkpoint.carried_files()
    in_config = b'"chat_template"' in carried.get("tokenizer_config.json", b"")
    return in_config or any(name.startswith("chat_template") for name in carried)


def _datasets(sources: Sequence[str]) -> list[str]:
    """The ids of data sets among the names of texts, without what follows them: a split, a column, a revision."""
    ids = (re.split("[:#@]", source)[0] for source in sources)
    return [found for found in dict.fromkeys(ids) if ID.fullmatch(found)]


def _said(base: Origin) -> str:
    link = f"[{base.id}](https://huggingface.co/{base.id})" if base.id else printable(base.name)
    return link + (f" at revision {base.revision}" if base.revision else "")


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


def _overview(plan: Plan, size: int) -> str:
    config = plan.checkpoint.config
    rows = [
        ["architecture", config.architecture],
        ["parameters", f"{count(plan.parameters)}" + " of its language model" * bool(plan.copies)],
        ["size", f"{gigabytes(size)}, {plan.bits_per_weight:.2f} bits per weight"],
        ["weights", ", ".join(sorted(plan.schemes))],
        ["context", f"{config.max_position_embeddings:,} tokens"],
        ["KV-cache scales", "for FP8" if any(entry.kv_scales for entry in plan.entries) else "none"],
    ]
    return table(["", ""], rows, markdown=True)


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
    for row, each in zip(rows, measured, strict=True):
        if each.engines:
            parts += [f"{row.name} in engines, beside dsv2quant's runtime:", engines_table(each.engines, markdown=True)]
    return ["## Evaluation", *parts] if parts else []


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
    if len(files) <= MANY:
        return shown
    total = gigabytes(sum(files.values()))
    return f"<details><summary>{len(files)} files, {total}</summary>\n\n{shown}\n\n</details>"
