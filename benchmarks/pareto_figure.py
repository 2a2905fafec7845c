"""Draws docs/pareto.svg of the rows of pareto.py.

    python benchmarks/pareto_figure.py benchmarks/results/pareto.csv -o docs/pareto.svg

A panel for each text on dsv2-mini, and one for each other model on prose. Lines join what no other of the same side
beats in both size, to a tenth of a bit, and distance; bars are two standard errors, most of them within the marks. All
but our GGUF files have their names where there is room.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from dsv2quant.report.figures import LEFT, RIGHT, around, between, frontier, label
from dsv2quant.report.svg import alone, axes, figure, hue, legend, mark, path, spread, text, whisker

FIRST = "dsv2-mini"
TOP, PITCH, PLOT = 78.0, 250.0, 190.0  # of the first plot, from one to the next, and their height
# Colours by their numbers in report/svg.py; 8 more is a square.
STOCK, OURS, FOLDER, PEER = 1, 0, 8, 2
COLOURS = {"llama.cpp": STOCK, "preset": OURS, "search": OURS, "folder": FOLDER, "peer": PEER}
Row = dict[str, str]


def cross(x: float, y: float) -> str:
    """A peer's mark, through which another can be seen."""
    ends = ((x - 4, y - 4), (x + 4, y + 4)), ((x - 4, y + 4), (x + 4, y - 4))
    return "".join(path(pair, f"line {hue(PEER)}") for pair in ends)


def panel(title: str, rows: Sequence[Row], top: float) -> list[str]:
    """Size against distance of one model on one text, with the axes' names."""
    points = [(float(row["bits/weight"]), float(row["KLD"])) for row in rows]
    errors = [2 * float(row["stderr"]) for row in rows]
    x = spread([bits for bits, _ in points], LEFT, RIGHT)
    bounds = [bound for (_, kld), error in zip(points, errors, strict=True) for bound in (kld - error, kld + error)]
    y = spread(bounds, top + PLOT, top, log=True)
    parts = [*axes(x, y, "bits per weight of the whole model", "mean KLD, nats"), text(LEFT, top - 7, title)]
    boxes = [around(x(bits), y(kld), 5) for bits, kld in points]
    for colour in (STOCK, OURS):
        side = [point for row, point in zip(rows, points, strict=True) if COLOURS[row["kind"]] == colour]
        places = frontier([(round(bits, 1), kld) for bits, kld in side])
        best = [(x(bits), y(kld)) for bits, kld in (side[i] for i in places)]
        parts.append(path(best, f"line {hue(colour)}"))
        boxes += [around(*point, 2) for a, b in pairwise(best) for point in between(a, b)]
    for row, (bits, kld), error in zip(rows, points, errors, strict=True):
        colour = COLOURS[row["kind"]]
        about = f"{row['artifact']}: {bits:.2f} bits/weight, KLD {kld:.4f} ± {error / 2:.4f}"
        parts.append(whisker(x(bits), y(kld + error), y(kld - error), colour))
        parts.append(cross(x(bits), y(kld)) if colour == PEER else mark(x(bits), y(kld), colour, about))
    within = (LEFT + 2, top - 4, RIGHT + 8, top + PLOT - 2)
    for row, (bits, kld) in zip(rows, points, strict=True):
        if COLOURS[row["kind"]] != OURS:
            parts += label(x(bits), y(kld), row["artifact"], boxes, within, kind="small", reach=(0, 4))
    return parts


def key(top: float) -> list[str]:
    """What lines and marks are."""
    lines, _ = legend({STOCK: "llama.cpp's mixes, imatrix", OURS: "ours, GGUF"}, top)
    squares = [mark(51, top + 13, FOLDER, ""), text(62, top + 17, "ours, folders for vLLM")]
    return [*lines, *squares, cross(259, top + 13), text(270, top + 17, "peers', the same")]


def draw(rows: Sequence[Row]) -> str:
    panels = list(dict.fromkeys((row["model"], row["domain"]) for row in rows))
    panels = [(model, domain) for model, domain in panels if model == FIRST or domain == "prose"]
    parts = key(38)
    for number, (model, domain) in enumerate(panels):
        shown = [row for row in rows if (row["model"], row["domain"]) == (model, domain)]
        parts += panel(f"{model}, {domain}", shown, TOP + number * PITCH)
    return alone(figure("Size against distance from BF16", TOP + len(panels) * PITCH - 20, parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    with options.results.open(newline="") as file:
        options.out.write_text(draw(list(csv.DictReader(file))))


if __name__ == "__main__":
    main()
