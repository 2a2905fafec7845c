"""How many tokens each routed expert saw, layer by layer: numbers, a table, a figure.

What calibration did: errors against plain rounding by role, and how many tokens each expert saw.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, median, pstdev
from typing import Any

from dsv2quant.calib.calibration import Outcome, Prepared
from dsv2quant.errors import listing
from dsv2quant.planning.plan import Plan
from dsv2quant.report.tables import table

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
    """Mean relative output errors."""
    return {
        "error": sum(o.error for o in found) / len(found),
        "rtn_error": sum(o.rtn_error for o in found) / len(found),
    }
