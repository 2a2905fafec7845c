"""What `push` did, as text and as JSON."""

from __future__ import annotations

from typing import Any

from dsv2quant.report.tables import gigabytes, values_of
from dsv2quant.storage.push import Pushed


def pushed_json(p: Pushed) -> dict[str, Any]:
    """The object of `dsv2quant push --json`."""
    names = ("artifact", "repo", "url", "revision", "commit", "sent", "kept")
    return {"schema": "dsv2quant.push/1", **values_of(p, *names), "bytes": p.nbytes}


def pushed_text(p: Pushed) -> str:
    """What `dsv2quant push` prints without --json."""
    sent = f"{len(p.sent)} file{'s' * (len(p.sent) != 1)}, {gigabytes(p.nbytes)}, sent"
    there = f"; {len(p.kept)} were there already" if p.kept else ""
    return f"{p.artifact}: {sent} to {p.url}, branch {p.revision} at {p.commit[:12]}{there}"
