"""Plain-text and Markdown tables, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence

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


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in ("-", "+") or cell in ("", "exact")
