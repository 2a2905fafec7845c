"""What calibration did: errors against plain rounding by role, and how many tokens each expert saw."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from dsv2quant.calib.calibration import Outcome
from dsv2quant.calib.prepared import Prepared
from dsv2quant.errors import listing
from dsv2quant.plan import Plan
from dsv2quant.report.coverage import coverage_json, coverage_text, tokens_by_layer
from dsv2quant.report.tables import table


def expert_tokens(prepared: Prepared) -> dict[int, list[int]]:
    """Tokens of each routed expert, by layer: those that its matrices were fitted on, or that were measured."""
    experts = [outcome for outcome in prepared.outcomes if outcome.role.startswith("routed.")]
    fitted = {f"{outcome.module.rpartition('.')[0]}.gate_proj": outcome.tokens for outcome in experts}
    return tokens_by_layer(fitted or (prepared.statistics.counts if prepared.statistics is not None else {}))


def calibration_json(plan: Plan, outcomes: Sequence[Outcome], tokens: Mapping[int, list[int]]) -> dict[str, Any] | None:
    """Errors by layer and role, experts by tokens, and where plain rounding was kept; None without calibration."""
    if not outcomes and not tokens:
        return None
    layer_of = {line.slot.module: line.slot.layer for line in plan.lines}
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
        parts.append(f"plain rounding was better on windows kept aside, and is kept, in {listing(kept_names)}")
    return "\n".join(parts)


def _errors(found: Sequence[Outcome]) -> dict[str, float]:
    """Mean relative output errors."""
    return {
        "error": sum(o.error for o in found) / len(found),
        "rtn_error": sum(o.rtn_error for o in found) / len(found),
    }
