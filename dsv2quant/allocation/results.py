"""What `search` found, as text and as JSON."""

from __future__ import annotations

from typing import Any

from dsv2quant.allocation.search import Searched
from dsv2quant.report.tables import gigabytes, table, values_of


def searched_json(s: Searched) -> dict[str, Any]:
    """The object of `dsv2quant search --json`."""
    point = ("nbytes", "predicted", "measured", "stderr")
    return {
        "schema": "dsv2quant.search/1",
        "recipe": str(s.out),
        "mix": values_of(s.mix.point, *point),
        "first": values_of(s.mix.first, *point),
        "bound": s.mix.bound,
        "curve": [values_of(each, "nbytes", "predicted") for each in s.mix.curve],
        "chosen": dict(s.mix.chosen),
        "tokens": s.tokens,
        "text": s.source,
        "seconds": s.seconds,
    }


def searched_text(s: Searched) -> str:
    """What `dsv2quant search` prints without --json."""
    point, parameters = s.mix.point, s.plan.parameters
    bits = [(p, 8 * p.nbytes / parameters) for p in s.mix.curve]
    rows = [(gigabytes(p.nbytes), f"{b:.3f}", f"{p.predicted:.5f}") for p, b in bits]
    return "\n".join(
        (
            "What the best mix of a size costs, as single swaps predict:",
            table(("size", "bits/weight", "KLD, nats"), rows),
            f"{s.out}: {gigabytes(point.nbytes)}, {8 * point.nbytes / parameters:.3f} bits per weight, KLD "
            f"{point.measured:.5f} ± {point.stderr:.5f} nats on {s.tokens:,} tokens of {s.source} "
            f"({point.predicted:.5f} predicted)",
        )
    )
