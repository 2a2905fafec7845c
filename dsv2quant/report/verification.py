"""A verification as text."""

from __future__ import annotations

import math
from typing import Any

from dsv2quant.report.tables import table


def verification_text(r: dict[str, Any]) -> str:
    """What `dsv2quant verify` prints without --json."""
    if r["checked"] == "manifest":
        lines = [f"{r['artifact']}: {r['files']} files match the manifest, {r['tensors']} tensors are as planned"]
    else:
        files = f"{r['files']} file{'s' * (r['files'] > 1)}"
        lines = [f"{r['artifact']}: {r['tensors']} weights in {files} are as its metadata says, all scales finite"]
    if "roles" not in r:
        return lines[0]
    rows = [
        [x["role"], x["scheme"], x["tensors"], _db(x["sqnr_db"]), _db(x["lowest_sqnr_db"]), f"{x['max_error']:.3g}"]
        for x in r["roles"]
    ]
    lines.append(table(["role", "scheme", "tensors", "SQNR dB", "lowest dB", "max error"], rows))
    lines.append("worst tensors:")
    lines += [
        f"  {x['tensor']} ({x['scheme']}): {_db(x['sqnr_db'])} dB, max error {x['max_error']:.3g}" for x in r["worst"]
    ]
    return "\n".join(lines)


def _db(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.2f}"
