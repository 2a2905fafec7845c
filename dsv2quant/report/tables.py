"""Plain-text and Markdown tables, and numbers as people read them.

Totals per role and scheme, for `plan`, `inspect` and the model card.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dsv2quant.arch.spec import ROLES, TensorSpec
from dsv2quant.errors import printable


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, markdown: bool = False) -> str:
    """Columns as wide as their widest cell; the first column is aligned left, numbers right."""
    cells = [[printable(str(cell)) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    rule = [("-" * (w - 1) + ":") if r and markdown else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(cells[0]), line(rule), *(line(row) for row in cells[1:])])


def folded(title: str, content: str) -> str:
    """Markdown that is seen when its title is clicked."""
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"


def gigabytes(nbytes: int) -> str:
    """Bytes in the decimal unit that suits: '31.41 GB', '11.9 MB', '512 B'."""
    for unit, size, digits in (("GB", 10**9, 2), ("MB", 10**6, 2), ("kB", 10**3, 1)):
        if nbytes >= size:
            return f"{nbytes / size:.{digits}f} {unit}"
    return f"{nbytes} B"


def count(number: int) -> str:
    """A count of parameters: '15.71 B', '8.96 M', '512'."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def values_of(found: object, *names: str) -> dict[str, Any]:
    """Attributes by name, as JSON objects show them."""
    return {name: getattr(found, name) for name in names}


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in ("-", "+") or cell in ("", "exact")


SAID = ("role", "scheme", "tensors", "weights", "bits_per_weight")  # of a RoleSummary by `plan` and `inspect` alike


@dataclass(frozen=True)
class RoleSummary:
    """All tensors of one role with one scheme; `weights` counts elements."""

    role: str
    scheme: str
    tensors: int
    weights: int
    bytes_before: int
    bytes_after: int

    @property
    def bits_per_weight(self) -> float:
        """As it is stored."""
        return 8 * self.bytes_after / self.weights


def summarize(tensors: Iterable[tuple[TensorSpec, str, int, int]]) -> list[RoleSummary]:
    """Group (spec, scheme, bytes before, bytes after) by role and scheme, in the order of `names.ROLES`."""
    totals: dict[tuple[str, str], list[int]] = {}
    for spec, scheme, before, after in tensors:
        total = totals.setdefault((spec.role, scheme), [0, 0, 0, 0])
        for i, value in enumerate((1, spec.size, before, after)):
            total[i] += value
    ordered = sorted(totals.items(), key=lambda item: (ROLES.index(item[0][0]), item[0][1]))
    return [RoleSummary(role, scheme, *total) for (role, scheme), total in ordered]


def roles_table(roles: Sequence[RoleSummary], *, before: bool, markdown: bool = False) -> str:
    """One row per role and scheme; `before` adds the sizes that the plan starts from."""
    sizes = ["before", "after"] if before else ["size"]
    rows = []
    for r in roles:
        nbytes = [r.bytes_before, r.bytes_after] if before else [r.bytes_after]
        rows.append([r.role, r.scheme, r.tensors, *map(gigabytes, nbytes), f"{r.bits_per_weight:.2f}"])
    return table(["role", "scheme", "tensors", *sizes, "bits/weight"], rows, markdown=markdown)
