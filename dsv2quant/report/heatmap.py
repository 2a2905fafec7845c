"""The errors of an artifact's weights as a picture: layer × role, in dB."""

from __future__ import annotations

from collections.abc import Sequence

from dsv2quant.arch.spec import ROLES
from dsv2quant.report.artifacts import Artifact
from dsv2quant.report.measured import Cell
from dsv2quant.report.svg import figure, number, rect, text

LEFT, TOP, ACROSS, DOWN = 46.0, 116.0, 298.0, 420.0
LEAST = 12.0  # dB from one end of the colours to the other: less is no difference to look at
# From low to high ratios: dark red, orange, pale, blue, dark blue, each of another lightness, and none that red and
# green tell apart.
_COLOURS = ((0x7F, 0x1D, 0x1D), (0xD9, 0x5F, 0x0E), (0xF2, 0xE2, 0xA0), (0x5B, 0xA3, 0xCF), (0x10, 0x3A, 0x73))


def colour_range(artifacts: Sequence[Artifact]) -> tuple[float, float]:
    """The lowest and the highest ratio, in dB, that colours of all of them are for: so they compare."""
    cells = [cell for artifact in artifacts for cell in artifact.measured.cells]
    values = [value for cell in cells for value in (cell.sqnr_db, cell.decile_db) if value is not None] or [0.0]
    room = max(0.0, LEAST - (max(values) - min(values))) / 2
    return min(values) - room, max(values) + room


def sqnr_heatmap(artifact: Artifact, low: float, high: float) -> str | None:
    """Ratios of signal to noise in colours from `low` to `high` dB, of experts with the worst tenth's as a stripe; None
    where nothing was compared."""
    cells = artifact.measured.cells
    if all(cell.sqnr_db is None for cell in cells):
        return None
    roles = [role for role in ROLES if any(cell.role == role and cell.sqnr_db is not None for cell in cells)]
    layers = list(dict.fromkeys(cell.layer for cell in cells if cell.role in roles))
    width, height = ACROSS / len(roles), min(22.0, DOWN / len(layers))
    parts = [
        text(LEFT + (i + 0.5) * width + 3, TOP - 6, role, kind="small", turn=-60) for i, role in enumerate(roles)
    ]  # fmt: skip
    every = max(1, round(13 / height))  # a number of a layer needs so many rows
    for row, layer in enumerate(layers):
        if layer is None or layer % every == 0:
            shown = "–" if layer is None else str(layer)
            parts += [text(LEFT - 5, TOP + (row + 0.5) * height + 3.5, shown, anchor="end", kind="small")]
    parts += [text(12, TOP + len(layers) * height / 2, "layer", anchor="middle", turn=-90)]
    place = {layer: TOP + row * height for row, layer in enumerate(layers)}
    for cell in cells:
        if cell.role in roles:
            left = LEFT + roles.index(cell.role) * width
            parts += _cell(cell, left, place[cell.layer], width - 1, height - min(1.0, height / 8), low, high)
    bottom = TOP + len(layers) * height
    return figure(f"SQNR: {artifact.name}", bottom + 56, [*parts, *_key(low, high, bottom + 14)])


def _cell(cell: Cell, x: float, y: float, width: float, height: float, low: float, high: float) -> list[str]:
    where = f"{cell.role}, layer {cell.layer}" if cell.layer is not None else cell.role
    where = f"{where}, {', '.join(cell.schemes)}"
    if cell.sqnr_db is None:
        return [rect(x, y, width, height, kind="none", about=f"{where}: {'exact' if cell.exact else 'not compared'}")]
    about = f"{where}: {cell.sqnr_db:.2f} dB, lowest {cell.lowest_db:.2f} of {cell.tensors}"
    parts = [rect(x, y, width, height, fill=_colour(cell.sqnr_db, low, high), about=about)]
    inner = width
    if cell.tensors > 1 and cell.decile_db is not None:
        inner = 0.72 * width
        worst = f"{where}: worst tenth {cell.decile_db:.2f} dB"
        parts += [rect(x + inner, y, width - inner, height, fill=_colour(cell.decile_db, low, high), about=worst)]
    if height >= 12 and inner >= 12:
        kind = "on" if _luminance(_mixed(cell.sqnr_db, low, high)) < 0.5 else "off"
        parts += [
            text(x + inner / 2, y + height / 2 + 3.5, f"{cell.sqnr_db:.0f}", anchor="middle", kind=f"small {kind}")
        ]
    return parts


def _key(low: float, high: float, y: float) -> list[str]:
    """The colours, and what grey and the stripe are."""
    steps = 40
    parts = [
        rect(LEFT + 4 * i, y, 4.2, 9, fill=_colour(low + (high - low) * i / (steps - 1), low, high))
        for i in range(steps)
    ]
    parts += [
        text(LEFT, y + 21, number(low), kind="small"),
        text(LEFT + 80, y + 21, "dB", anchor="middle", kind="small"),
    ]
    parts += [text(LEFT + 160, y + 21, number(high), anchor="end", kind="small")]
    parts += [rect(LEFT + 178, y, 12, 9, kind="none"), text(LEFT + 194, y + 8, "exact", kind="small")]
    return [*parts, text(LEFT + 178, y + 21, "stripe: worst tenth of the experts", kind="small")]


def _mixed(value: float, low: float, high: float) -> tuple[float, float, float]:
    place = min(max((value - low) / (high - low), 0.0), 1.0) * (len(_COLOURS) - 1)
    i = min(int(place), len(_COLOURS) - 2)
    part = place - i
    r, g, b = ((1 - part) * a + part * c for a, c in zip(_COLOURS[i], _COLOURS[i + 1], strict=True))
    return r, g, b


def _colour(value: float, low: float, high: float) -> str:
    return "#" + "".join(f"{round(c):02x}" for c in _mixed(value, low, high))


def _luminance(colour: Sequence[float]) -> float:
    """As seen, 0 to 1 (ITU-R BT.709)."""
    r, g, b = colour
    return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255
