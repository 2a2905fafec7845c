"""What calibration did: errors against plain rounding by role, and how many tokens each expert saw."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

from dsv2quant.calib.calibration import Outcome
from dsv2quant.errors import listing
from dsv2quant.plan import Plan
from dsv2quant.report.tables import table


def calibration_json(plan: Plan, outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    """Errors by layer and role, experts by tokens, and where plain rounding was kept; None without calibration."""
    if not outcomes:
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
        "experts": _experts(plan, outcomes),
        "kept_rtn": [outcome.module for outcome in outcomes if outcome.kept_rtn],
    }


def calibration_text(plan: Plan, outcomes: Sequence[Outcome]) -> str:
    """The same for people: a row per role, a line on the experts."""
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
    lines = [table(["role", "matrices", "output error", "of rounding", "ratio", "rounding kept"], rows)]
    experts = _experts(plan, outcomes)
    if experts:
        lines.append(
            f"tokens per expert: {experts['fewest']:,} to {experts['most']:,}, median {experts['median']:,}; "
            f"{experts['starved']} of {experts['experts']} saw fewer than {experts['full_rank']:,}, which a full-rank "
            f"Hessian needs, {len(experts['unseen'])} none"
        )
        if experts["unseen"]:
            lines.append(f"unseen: {listing(experts['unseen'])}")
    kept_names = [outcome.module for outcome in outcomes if outcome.kept_rtn]
    if kept_names:
        lines.append(f"plain rounding was better on windows kept aside, and is kept, in {listing(kept_names)}")
    return "\n".join(lines)


def _errors(found: Sequence[Outcome]) -> dict[str, float]:
    """Mean relative output errors."""
    return {
        "error": sum(o.error for o in found) / len(found),
        "rtn_error": sum(o.rtn_error for o in found) / len(found),
    }


def _experts(plan: Plan, outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    seen = {o.module.rpartition(".")[0]: o.tokens for o in outcomes if o.role.startswith("routed.")}
    if not seen:
        return None
    full_rank = plan.checkpoint.config.hidden_size
    return {
        "experts": len(seen),
        "fewest": min(seen.values()),
        "median": int(median(seen.values())),
        "most": max(seen.values()),
        "full_rank": full_rank,
        "starved": sum(tokens < full_rank for tokens in seen.values()),
        "unseen": [expert for expert, tokens in seen.items() if not tokens],
    }
