"""How many tokens each routed expert saw, layer by layer: numbers, a table, a figure."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean, median, pstdev
from typing import Any

from dsv2quant.errors import listing
from dsv2quant.report.tables import table

_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.gate_proj")


def tokens_by_layer(counts: Mapping[str, int]) -> dict[int, list[int]]:
    """Tokens of each expert, by layer, from counts by module."""
    found: dict[int, dict[int, int]] = defaultdict(dict)
    for module, count in counts.items():
        if match := _EXPERT.fullmatch(module):
            found[int(match[1])][int(match[2])] = count
    return {layer: [experts[e] for e in sorted(experts)] for layer, experts in sorted(found.items())}


def coverage_json(tokens: Mapping[int, list[int]], full_rank: int) -> list[dict[str, Any]]:
    """Per layer: fewest, median and most tokens of an expert, their coefficient of variation, how many experts saw
    fewer than `full_rank`, which their Hessian needs, and which saw none."""
    return [
        {
            "layer": layer,
            "fewest": min(counts),
            "median": int(median(counts)),
            "most": max(counts),
            "variation": pstdev(counts) / (fmean(counts) or 1.0),
            "starved": sum(count < full_rank for count in counts),
            "unseen": [expert for expert, count in enumerate(counts) if not count],
        }
        for layer, counts in tokens.items()
    ]


def coverage_text(tokens: Mapping[int, list[int]], full_rank: int) -> str:
    """The same for people: a row per layer."""
    rows = [
        [
            str(row["layer"]),
            *(f"{row[key]:,}" for key in ("fewest", "median", "most")),
            f"{row['variation']:.2f}",
            f"{row['starved']} of {len(tokens[row['layer']])}",
            listing([str(expert) for expert in row["unseen"]], 8) or "none",
        ]
        for row in coverage_json(tokens, full_rank)
    ]
    head = ["layer", "fewest tokens", "median", "most", "variation", f"below {full_rank:,}", "unseen experts"]
    return table(head, rows)


def draw(tokens: Mapping[int, list[int]], full_rank: int, path: str) -> None:
    """A figure, layer × expert, of tokens on a logarithmic scale; experts that saw none are red."""
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    counts = np.array(list(tokens.values()))  # [layers, experts]
    seen = np.ma.masked_equal(counts, 0)
    figure = Figure(figsize=(min(16.0, 3 + 0.12 * counts.shape[1]), min(12.0, 2 + 0.2 * counts.shape[0])))
    axes = figure.add_subplot()
    axes.set_facecolor("red")
    drawn = axes.imshow(seen, aspect="auto", interpolation="nearest", norm=LogNorm(1, max(2, counts.max())))
    axes.set_yticks(range(len(tokens)), [str(layer) for layer in tokens])
    axes.set(xlabel="expert", ylabel="layer", title=f"calibration tokens per expert (full rank: {full_rank:,})")
    figure.colorbar(drawn, ax=axes)
    figure.savefig(path, bbox_inches="tight")
