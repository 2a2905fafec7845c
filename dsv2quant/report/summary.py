"""Totals per role and scheme, for `plan`, `inspect` and the model card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dsv2quant.names import ROLES, Slot
from dsv2quant.report.tables import gigabytes, table


@dataclass(frozen=True)
class RoleSummary:
    """All tensors of one role with one scheme; `weights` counts elements, `bits` is stored bits per weight."""

    role: str
    scheme: str
    count: int
    weights: int
    bytes_before: int
    bytes_after: int

    @property
    def bits(self) -> float:
        return 8 * self.bytes_after / self.weights


def summarize(tensors: Iterable[tuple[Slot, str, int, int]]) -> list[RoleSummary]:
    """Group (slot, scheme, bytes before, bytes after) by role and scheme, in the order of `names.ROLES`."""
    totals: dict[tuple[str, str], list[int]] = {}
    for slot, scheme, before, after in tensors:
        total = totals.setdefault((slot.role, scheme), [0, 0, 0, 0])
        for i, value in enumerate((1, slot.size, before, after)):
            total[i] += value
    ordered = sorted(totals.items(), key=lambda item: (ROLES.index(item[0][0]), item[0][1]))
    return [RoleSummary(role, scheme, *total) for (role, scheme), total in ordered]


def roles_table(roles: Sequence[RoleSummary], *, before: bool, markdown: bool = False) -> str:
    """One row per role and scheme; `before` adds the sizes that the plan starts from."""
    sizes = ["before", "after"] if before else ["size"]
    rows = []
    for r in roles:
        nbytes = [r.bytes_before, r.bytes_after] if before else [r.bytes_after]
        rows.append([r.role, r.scheme, r.count, *map(gigabytes, nbytes), f"{r.bits:.2f}"])
    return table(["role", "scheme", "tensors", *sizes, "bits/weight"], rows, markdown=markdown)
