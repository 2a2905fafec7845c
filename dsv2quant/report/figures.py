"""What a report draws: each a function of numbers, that gives an SVG, or None where there is nothing to draw.

An artifact has the colour of its place in the report in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from dsv2quant.report.artifacts import Artifact
from dsv2quant.report.measured import Scores
from dsv2quant.report.scores import pm
from dsv2quant.report.svg import (
    CHARACTER,
    SMALLER,
    Scale,
    axes,
    figure,
    hue,
    legend,
    line,
    mark,
    path,
    rect,
    spread,
    text,
    whisker,
)
from dsv2quant.report.tables import gigabytes

LEFT, RIGHT = 52.0, 388.0
Box = tuple[float, float, float, float]


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of (size, KLD) no other beats in both: their places, by size."""
    best, found = float("inf"), []
    for place in sorted(range(len(points)), key=lambda i: points[i]):
        if points[place][1] < best:
            best = points[place][1]
            found.append(place)
    return found


def size_against_kld(artifacts: Sequence[Artifact]) -> str | None:
    """Points with error bars, and the frontier."""
    known = [(i, a, a.measured.scores) for i, a in enumerate(artifacts)]
    scored = [(i, a, s) for i, a, s in known if s is not None and s.kld.value > 0]
    if not scored:
        return None
    unit = 1e9 if max(a.nbytes for _, a, _ in scored) >= 1e9 else 1e6
    points = [(a.nbytes / unit, s.kld.value) for _, a, s in scored]
    ends = [_ends(s) for _, _, s in scored]
    x = spread([size for size, _ in points], LEFT, RIGHT)
    y = spread([end for pair in ends for end in pair], 262, 34, log=True)
    parts = axes(x, y, f"size, {'GB' if unit == 1e9 else 'MB'}", "mean KLD, nats")
    best = [(x(points[i][0]), y(points[i][1])) for i in frontier(points)]
    parts += [path(best, "muted")]
    boxes = [around(x(size), y(kld), 6) for size, kld in points]
    boxes += [around(at, up, 2) for a, b in pairwise(best) for at, up in between(a, b)]
    names, nameless = short_names(artifacts), {}
    for (i, artifact, scores), (size, kld), (low, high) in zip(scored, points, ends, strict=True):
        about = f"{artifact.name}: {gigabytes(artifact.nbytes)}, KLD {pm(scores.kld, 5)}"
        parts += [whisker(x(size), y(high), y(low), i), mark(x(size), y(kld), i, about)]
        named = label(x(size), y(kld), names[i], boxes, (LEFT + 2, 24, RIGHT + 6, 260))
        parts += named
        if not named:
            nameless[i] = names[i]
    told, end = legend(nameless, 314)
    return figure("Size against distance from the reference", end if nameless else 304, [*parts, *told])


def short_names(artifacts: Sequence[Artifact]) -> dict[int, str]:
    """{colour: name}, without what all names begin with, up to a hyphen."""
    words = [artifact.name.split("-") for artifact in artifacts]
    shared = 0
    while len(words) > 1 and all(len(w) > shared + 1 and w[shared] == words[0][shared] for w in words):
        shared += 1
    return {i: "-".join(w[shared:]) for i, w in enumerate(words)}


def _ends(scores: Scores) -> tuple[float, float]:
    """Two standard errors about the mean; on a logarithmic axis the lower end stays above 0."""
    kld = scores.kld
    return max(kld.value - 2 * kld.stderr, kld.value / 10), kld.value + 2 * kld.stderr


def around(x: float, y: float, radius: float) -> Box:
    return x - radius, y - radius, x + radius, y + radius


def between(a: tuple[float, float], b: tuple[float, float]) -> list[tuple[float, float]]:
    """Points of the line from one to another, which names should not lie on."""
    return [(a[0] + (b[0] - a[0]) * i / 40, a[1] + (b[1] - a[1]) * i / 40) for i in range(1, 40)]


def label(
    x: float, y: float, name: str, boxes: list[Box], within: Box, *, kind: str = "", reach: Sequence[float] = (0, 8, 16)
) -> list[str]:
    """A point's name where nothing else lies, `reach` away: near enough to be seen as its; nothing where no place is
    left."""
    width = len(name) * CHARACTER * (SMALLER if kind == "small" else 1)
    for away in reach:
        for left, base in (
            (x + 8, y + 4 - away), (x - 8 - width, y + 4 - away), (x + 8, y + 4 + away), (x - 8 - width, y + 4 + away),
            (x - width / 2, y - 10 - away), (x - width / 2, y + 18 + away),
        ):  # fmt: skip
            box = (left, base - 10, left + width, base + 3)
            inside = box[0] >= within[0] and box[1] >= within[1] and box[2] <= within[2] and box[3] <= within[3]
            if inside and not any(_meet(box, other) for other in boxes):
                boxes.append(box)
                return [text(left, base, name, kind=kind)]
    return []


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def bits_by_depth(artifacts: Sequence[Artifact]) -> str | None:
    """Bits per weight of each layer, a line for each artifact."""
    curves = {i: _bits(artifact) for i, artifact in enumerate(artifacts)}
    layers = sorted({layer for curve in curves.values() for layer in curve})
    if not layers:
        return None
    marks, top = legend(short_names(artifacts), 36)
    bottom = top + 190
    x = Scale(min(layers) - 0.5, max(layers) + 0.5, LEFT, RIGHT)
    y = Scale(0, 1.08 * max(bits for curve in curves.values() for bits in curve.values()), bottom, top + 4)
    parts = [*marks, *axes(x, y, "layer", "bits per weight", whole=True)]
    for i, curve in curves.items():
        steps = [(x(layer + side), y(bits)) for layer, bits in sorted(curve.items()) for side in (-0.5, 0.5)]
        parts += [path(steps, f"line {hue(i)}")] if steps else []
    return figure("Bits per weight by depth", bottom + 42, parts)


def _bits(artifact: Artifact) -> dict[int, float]:
    totals: dict[int, tuple[float, int]] = {}
    for cell in artifact.measured.cells:
        if cell.layer is not None:
            bits, weights = totals.get(cell.layer, (0.0, 0))
            totals[cell.layer] = bits + cell.bits * cell.weights, weights + cell.weights
    return {layer: bits / weights for layer, (bits, weights) in totals.items()}


def kld_by_position(artifacts: Sequence[Artifact]) -> str | None:
    """Mean KLD along the window, with its error, a line for each artifact."""
    known = {i: a.measured.scores.by_position for i, a in enumerate(artifacts) if a.measured.scores is not None}
    curves = {i: stretches for i, stretches in known.items() if all(s.kld.value > 0 for s in stretches) and stretches}
    if not curves:
        return None
    marks, top = legend(short_names(artifacts), 36)
    bottom = top + 200
    x = Scale(0, max(stretches[-1].last + 1 for stretches in curves.values()), LEFT, RIGHT)
    values = [s.kld for stretches in curves.values() for s in stretches]
    y = spread([e for k in values for e in (max(k.value - k.stderr, k.value / 3), k.value + k.stderr)],
               bottom, top + 4, log=True)  # fmt: skip
    parts = [*marks, *axes(x, y, "position in the window, tokens", "mean KLD, nats")]
    for i, stretches in curves.items():
        points = [(x((s.first + s.last + 1) / 2), s.kld) for s in stretches]
        parts += [path([(at, y(kld.value)) for at, kld in points], f"line {hue(i)}")]
        for at, kld in points:
            low = max(kld.value - kld.stderr, kld.value / 3)
            parts += [line(at, y(kld.value + kld.stderr), at, y(low), f"bar {hue(i)}")]
    return figure("Distance by position in the window", bottom + 42, parts)


def coverage(artifact: Artifact) -> str | None:
    """Per layer the fewest, median and most tokens that an expert saw in calibration."""
    rows = artifact.coverage
    if not rows:
        return None
    x = Scale(rows[0]["layer"] - 0.5, rows[-1]["layer"] + 0.5, LEFT, RIGHT)
    y = spread([max(row[key], 1) for row in rows for key in ("fewest", "most")], 232, 34, log=True)
    parts = axes(x, y, "layer", "tokens of an expert", whole=True)
    half = min(7.0, 0.35 * (x(1) - x(0)))
    for row in rows:
        at, low, high = x(row["layer"]), y(max(row["fewest"], 1)), y(row["most"])
        unseen = len(row["unseen"])
        about = f"layer {row['layer']}: {row['fewest']:,} to {row['most']:,}, median {row['median']:,}; {unseen} unseen"
        parts += [rect(at - half, high, 2 * half, max(low - high, 1), kind="f5", about=about)]
        parts += [rect(at - half, y(max(row["median"], 1)) - 1, 2 * half, 2, kind="f0")]
        parts += [rect(at - half, y.start - 4, 2 * half, 4, kind="bad", about=about)] * bool(unseen)
    key = [
        rect(LEFT, 276, 12, 8, kind="f5"),
        text(LEFT + 16, 284, "fewest to most"),
        rect(LEFT + 108, 279, 12, 2, kind="f0"),
    ]
    key += [text(LEFT + 124, 284, "median"), rect(LEFT + 178, 276, 12, 8, kind="bad")]
    return figure(
        f"Calibration tokens: {artifact.name}",
        294,
        [*parts, *key, text(LEFT + 194, 284, "experts that saw none")],
    )
