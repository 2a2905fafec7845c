"""A report's figures as files of their own, for cards: SVG, in the reader's light or dark scheme."""

from __future__ import annotations

from collections.abc import Sequence

from dsv2quant.report.artifacts import Artifact
from dsv2quant.report.figures import bits_by_depth, coverage, kld_by_position, size_against_kld
from dsv2quant.report.heatmap import colour_range, sqnr_heatmap
from dsv2quant.report.svg import alone
from dsv2quant.storage.manifest import PICTURES


def pictures(artifacts: Sequence[Artifact]) -> dict[str, tuple[str, str]]:
    """{file: (title, content)} of what artifacts that share a card have to show: beside each other, and of a single one
    its layers. `artifacts` have colours in their order."""
    found = {
        # A single one has no frontier.
        "size-kld": ("Size against distance from the reference", size_against_kld(artifacts if artifacts[1:] else ())),
        "position-kld": ("Distance by position in the window", kld_by_position(artifacts)),
        "depth-bits": ("Bits per weight by depth", bits_by_depth(artifacts)),
    }
    if len(artifacts) == 1:
        found |= {
            "sqnr": (
                "Signal to noise of weights, by layer and role",
                sqnr_heatmap(artifacts[0], *colour_range(artifacts)),
            ),
            "coverage": ("Calibration tokens by expert", coverage(artifacts[0])),
        }
    return {f"{PICTURES}/{name}.svg": (title, alone(svg)) for name, (title, svg) in found.items() if svg is not None}
