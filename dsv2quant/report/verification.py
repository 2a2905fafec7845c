"""A verification as text."""

from __future__ import annotations

import math
from typing import Any

from dsv2quant.report.tables import table

_CHECKED = {
    "manifest": "{files} match the manifest, {tensors} tensors are as planned",
    "blocks": "{tensors} weights in {files} are as its metadata says, all scales finite; "
    "no manifest lies beside it, so other bytes are not checked",
    "nothing": "{tensors} tensors in {files} are as config.json says; it has no manifest, so no checksum is checked",
}


def verification_text(r: dict[str, Any]) -> str:
    """What `dsv2quant verify` prints without --json."""
    files = f"{len(r['files'])} file{'s' * (len(r['files']) != 1)}"
    lines = [f"{r['model']}: {_CHECKED[r['checked']].format(files=files, tensors=r['tensors'])}"]
    if r["edited"]:
        lines.append(f"edited since (texts may be): {', '.join(r['edited'])}")
    if r["added"]:
        lines.append(f"not in the manifest, and loaded by no program: {', '.join(r['added'])}")
    if "roles" not in r:
        return "\n".join(lines)
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
