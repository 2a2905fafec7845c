"""What a conversion and a calibration did: errors against plain rounding by role, and how many tokens each routed
expert saw, layer by layer; as numbers, as text, as a figure."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any

from dsv2quant.calib.calibration import Outcome, Prepared
from dsv2quant.calib.statistics import Statistics
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.errors import listing
from dsv2quant.planning.gguf_plan import GgufPlan
from dsv2quant.planning.plan import Plan
from dsv2quant.report.tables import gigabytes, table
from dsv2quant.report.warnings import warnings
from dsv2quant.storage.durable import FileEntry

DIGITS = 6  # of an error: how many threads sum it up shows in the sixteenth
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.gate_proj")


def tokens_by_layer(counts: Mapping[str, int]) -> dict[int, list[int]]:
    """Tokens of each expert, by layer, from counts by module."""
    found: dict[int, dict[int, int]] = defaultdict(dict)
    for module, count in counts.items():
        if match := _EXPERT.fullmatch(module):
            found[int(match[1])][int(match[2])] = count
    return {layer: [experts[e] for e in sorted(experts)] for layer, experts in sorted(found.items())}


def coverage_json(tokens: Mapping[int, list[int]], full_rank: int) -> list[dict[str, Any]]:
    """Per layer: fewest, median and most tokens of an expert, their coefficient of variation, how many experts saw
    fewer than `full_rank`, which their Hessian needs, and which saw none."""
    return [
        {
            "layer": layer,
            "fewest": min(counts),
            "median": int(median(counts)),
            "most": max(counts),
            "variation": pstdev(counts) / (fmean(counts) or 1.0),
            "starved": sum(count < full_rank for count in counts),
            "unseen": [expert for expert, count in enumerate(counts) if not count],
        }
        for layer, counts in tokens.items()
    ]


def coverage_text(tokens: Mapping[int, list[int]], full_rank: int) -> str:
    """The same for people: a row per layer."""
    rows = [
        [
            str(row["layer"]),
            *(f"{row[key]:,}" for key in ("fewest", "median", "most")),
            f"{row['variation']:.2f}",
            f"{row['starved']} of {len(tokens[row['layer']])}",
            listing([str(expert) for expert in row["unseen"]], 8) or "none",
        ]
        for row in coverage_json(tokens, full_rank)
    ]
    head = ["layer", "fewest tokens", "median", "most", "variation", f"below {full_rank:,}", "unseen experts"]
    return table(head, rows)


def draw(tokens: Mapping[int, list[int]], full_rank: int, path: str) -> None:
    """A figure, layer × expert, of tokens on a logarithmic scale; experts that saw none are red."""
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    counts = np.array(list(tokens.values()))  # [layers, experts]
    seen = np.ma.masked_equal(counts, 0)
    figure = Figure(figsize=(min(16.0, 3 + 0.12 * counts.shape[1]), min(12.0, 2 + 0.2 * counts.shape[0])))
    axes = figure.add_subplot()
    axes.set_facecolor("red")
    drawn = axes.imshow(seen, aspect="auto", interpolation="nearest", norm=LogNorm(1, max(2, counts.max())))
    axes.set_yticks(range(len(tokens)), [str(layer) for layer in tokens])
    axes.set(xlabel="expert", ylabel="layer", title=f"calibration tokens per expert (full rank: {full_rank:,})")
    figure.colorbar(drawn, ax=axes)
    figure.savefig(path, bbox_inches="tight")


def expert_tokens(prepared: Prepared) -> dict[int, list[int]]:
    """Tokens of each routed expert, by layer: those that its matrices were fitted on, or that were measured."""
    experts = [outcome for outcome in prepared.outcomes if outcome.role.startswith("routed.")]
    fitted = {f"{outcome.module.rpartition('.')[0]}.gate_proj": outcome.tokens for outcome in experts}
    return tokens_by_layer(fitted or (prepared.statistics.counts if prepared.statistics is not None else {}))


def calibration_json(plan: Plan, outcomes: Sequence[Outcome], tokens: Mapping[int, list[int]]) -> dict[str, Any] | None:
    """Errors by layer and role, experts by tokens, and where plain rounding was kept; None without calibration."""
    if not outcomes and not tokens:
        return None
    layer_of = {line.spec.module: line.spec.layer for line in plan.entries}
    groups: dict[tuple[int | None, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[layer_of[outcome.module], outcome.role].append(outcome)
    return {
        "errors": [
            {"layer": layer, "role": role, "matrices": len(found), **_errors(found)}
            for (layer, role), found in groups.items()
        ],
        "experts": coverage_json(tokens, plan.checkpoint.config.hidden_size),
        "kept_rtn": [outcome.module for outcome in outcomes if outcome.kept_rtn],
    }


def calibration_text(plan: Plan, outcomes: Sequence[Outcome], tokens: Mapping[int, list[int]]) -> str:
    """The same for people: a row per role, and a row per layer of experts."""
    by_role: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_role[outcome.role].append(outcome)
    rows = []
    for role, found in by_role.items():
        errors = _errors(found)
        kept = sum(outcome.kept_rtn for outcome in found)
        ratio = errors["error"] / errors["rtn_error"] if errors["rtn_error"] else 1.0
        rows.append(
            [role, str(len(found)), f"{errors['error']:.2e}", f"{errors['rtn_error']:.2e}", f"{ratio:.2f}", str(kept)]
        )
    parts = []
    if rows:
        parts.append(table(["role", "matrices", "output error", "of rounding", "ratio", "rounding kept"], rows))
    if tokens:
        parts.append(coverage_text(tokens, plan.checkpoint.config.hidden_size))
    kept_names = [outcome.module for outcome in outcomes if outcome.kept_rtn]
    if kept_names:
        parts.append(f"plain rounding was better on windows held out, and is kept, in {listing(kept_names)}")
    return "\n".join(parts)


def _errors(found: Sequence[Outcome]) -> dict[str, float]:
    """Mean relative output errors, to so many digits that a manifest has the same bytes whatever the threads."""
    means = {
        "error": sum(o.error for o in found) / len(found),
        "rtn_error": sum(o.rtn_error for o in found) / len(found),
    }
    return {name: float(f"{mean:.{DIGITS}g}") for name, mean in means.items()}


@dataclass(frozen=True)
class Conversion:
    """An artifact that was made of a plan: a folder, or the GGUF file `out`. `files` is the manifest's list;
    `bytes_out` is the size of the shards, of GGUF that of the files; `resumed` counts shards, of GGUF tensors, that
    were kept of an earlier run; `already_complete` says whether this very artifact was there before. `outcomes` say
    what calibration did to each matrix, `expert_tokens` how many tokens each expert had, by layer, and `tuned` what
    tuning did (`tuned` of the manifest)."""

    plan: Plan | GgufPlan
    out: Path
    files: dict[str, FileEntry]
    bytes_out: int
    resumed: int
    already_complete: bool
    outcomes: list[Outcome]
    expert_tokens: dict[int, list[int]]
    seconds: float
    tuned: Mapping[str, Any] | None = None

    @property
    def bits_per_weight(self) -> float:
        copied = self.plan.bytes_copied if isinstance(self.plan, Plan) else 0
        return 8 * (self.bytes_out - copied) / self.plan.parameters


def conversion_json(c: Conversion) -> dict[str, Any]:
    """The object of `dsv2quant convert --json`."""
    sizes = {"bytes_in": c.plan.bytes_in, "bytes_out": c.bytes_out, "bits_per_weight": c.bits_per_weight}
    run = {"already_complete": c.already_complete, "seconds": c.seconds}
    if isinstance(c.plan, GgufPlan):
        about = {"schema": "dsv2quant.convert-gguf/2", "out": str(c.out), "files": c.files}
        return about | sizes | {"tuned": c.tuned, "resumed_tensors": c.resumed} | run
    return {
        "schema": "dsv2quant.convert/2",
        "out": str(c.out),
        "digest": c.plan.digest,
        **sizes,
        "files": c.files,
        "warnings": warnings(c.plan),
        "calibration": calibration_json(c.plan, c.outcomes, c.expert_tokens),
        "tuned": c.tuned,
        "resumed_shards": c.resumed,
        **run,
    }


def conversion_text(c: Conversion) -> str:
    """What `dsv2quant convert` prints."""
    lines = []
    where = c.out
    if isinstance(c.plan, GgufPlan):
        where = where.with_name(next(iter(c.files)) + (f" and {len(c.files) - 1} more" if len(c.files) > 1 else ""))
    elif c.expert_tokens or c.outcomes:
        lines.append(calibration_text(c.plan, c.outcomes, c.expert_tokens))
    if c.tuned is not None:
        lines.append(_tuned_text(c.tuned))
    sizes = f"{gigabytes(c.plan.bytes_in)} → {gigabytes(c.bytes_out)}, {c.bits_per_weight:.2f} bits/weight"
    done = "was already complete" if c.already_complete else f"in {c.seconds:.1f} s"
    return "\n".join([*lines, f"{where}: {sizes}, {done}"])


def _tuned_text(tuned: Mapping[str, Any]) -> str:
    fallen = f"{tuned['kld_before']:.4f} → {tuned['kld_after']:.4f} nats"
    taken = "taken" if tuned["accepted"] else "not taken, because it has not fallen"
    how = "" if tuned["together"] else ", each layer by itself"
    return f"tuned on {tuned['tokens']:,} tokens{how}: KLD of {tuned['held_out_tokens']:,} held out {fallen}, {taken}"


@dataclass(frozen=True)
class Calibrated:
    """What was measured of a checkpoint, and where the statistics and the importance matrix, if any, were written."""

    checkpoint: Checkpoint
    statistics: Statistics
    out: Path
    imatrix: Path | None

    @property
    def expert_tokens(self) -> dict[int, list[int]]:
        """Tokens of each expert, by layer."""
        return tokens_by_layer(self.statistics.counts)


def calibrated_json(c: Calibrated) -> dict[str, Any]:
    """The object of `dsv2quant calibrate --json`."""
    about = c.statistics.describe()
    measured = about.pop("model")
    return {
        "schema": "dsv2quant.calibrate/2",
        "model": measured["name"],
        "revision": measured["revision"],
        "identity": measured["identity"],
        "out": str(c.out),
        "imatrix": None if c.imatrix is None else str(c.imatrix),
        **about,
        "experts": coverage_json(c.expert_tokens, c.checkpoint.config.hidden_size),
    }


def calibrated_text(c: Calibrated) -> str:
    """What `dsv2quant calibrate` prints."""
    found = c.statistics
    lines = [coverage_text(c.expert_tokens, c.checkpoint.config.hidden_size)] if c.expert_tokens else []
    lines.append(f"{c.out}: {len(found.counts)} inputs of {c.checkpoint.model}, {found.tokens:,} tokens")
    if c.imatrix is not None:
        lines.append(f"{c.imatrix}: for llama-quantize --imatrix, {found.windows} chunks of {found.ctx} tokens")
    return "\n".join(lines)
