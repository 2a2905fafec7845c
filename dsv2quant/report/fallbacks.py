"""What of a plan gets another scheme or type than was asked for, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv2quant.planning.plan import Entry, Plan
from dsv2quant.planning.recipe import spelled

if TYPE_CHECKING:
    from dsv2quant.planning.gguf_plan import GgufPlan  # imports numba


@dataclass(frozen=True)
class Fallback:
    """Tensors of one kind that fell back for one reason: `what` they are for people, and their names."""

    what: str
    scheme: str
    reason: str
    tensors: tuple[str, ...]


def fallbacks(plan: Plan | GgufPlan) -> list[Fallback]:
    """In the order of the plan."""
    return _of_folder(plan) if isinstance(plan, Plan) else _of_gguf(plan)


def _of_folder(plan: Plan) -> list[Fallback]:
    groups: dict[tuple[str, str, str], list[Entry]] = defaultdict(list)
    for entry in plan.entries:
        if entry.reason:
            groups[entry.spec.role, entry.scheme, entry.reason].append(entry)
    return [
        Fallback(_where(role, entries), scheme, reason, tuple(entry.spec.name for entry in entries))
        for (role, scheme, reason), entries in groups.items()
    ]


def _of_gguf(plan: GgufPlan) -> list[Fallback]:
    groups = defaultdict(list)
    for entry in plan.entries:
        if entry.reason:
            groups[entry.tensor.kind, entry.type, entry.reason].append(entry)
    found = []
    for (kind, type_, reason), entries in groups.items():
        layers = spelled(e.tensor.layer for e in entries if e.tensor.layer is not None)
        found.append(Fallback(f"{kind}, {layers}", type_, reason, tuple(entry.name for entry in entries)))
    return found


def _where(role: str, entries: Sequence[Entry]) -> str:
    """'kv_a_proj_with_mqa [576, 5120], 60 tensors in layers 0-59'."""
    layers = sorted({entry.spec.layer for entry in entries if entry.spec.layer is not None})
    count = f"{len(entries)} tensor{'s' * (len(entries) > 1)}"
    shape = f"{role} {list(entries[0].spec.shape)}, {count}"
    if not layers:
        return shape
    if len(layers) == 1:
        return f"{shape} in layer {layers[0]}"
    contiguous = layers[-1] - layers[0] + 1 == len(layers)
    return f"{shape} in layers {f'{layers[0]}-{layers[-1]}' if contiguous else ', '.join(map(str, layers))}"
