"""Figures in SVG, by hand: scales, axes and marks, 400 units wide, so that their text can be read on a telephone.

Colours are classes of `STYLE`, which follows the reader's light or dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from dsv2quant.errors import printable

WIDTH = 400.0
CHARACTER = 6.7  # of text at 11 units, about
SMALLER = 9.5 / 11  # what `small` text takes of that
MOST = 48  # characters of a title
COLOURS = 8
# Eight hues that are told apart on white and on near-black, by people who see fewer colours too (Okabe and Ito's, with
# grey for black, and yellow darker on white).
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc5f9b", "#8a6d00", "#3c9fd6", "#b07a00", "#666666")
_DARK = ("#56a8e0", "#ff8b4a", "#2fc69a", "#eb9cc8", "#f0e442", "#8ecdf5", "#e6b13c", "#a9a9a9")


def _coloured(colours: Sequence[str]) -> str:
    return "".join(f".fig .s{i}{{stroke:{c}}}.fig .f{i}{{fill:{c}}}" for i, c in enumerate(colours))


STYLE = (
    ".fig{background:#fff}.fig text{font:11px system-ui,sans-serif;fill:#222}.fig .small{font-size:9.5px}"
    ".fig .title{font-size:13px;font-weight:600}.fig .axis{stroke:#888;stroke-width:1;fill:none}"
    ".fig .rule{stroke:#e3e3e3;stroke-width:1}.fig .line{fill:none;stroke-width:1.6}"
    ".fig .bar{stroke-width:1.3;fill:none}.fig .line.again{stroke-dasharray:5 3}"
    ".fig .muted{stroke:#999;fill:none;stroke-width:1.2;stroke-dasharray:4 3}.fig .bad{fill:#c22}"
    f".fig .none{{fill:#ddd}}.fig .on{{fill:#fff}}.fig .off{{fill:#111}}{_coloured(_LIGHT)}"
    "@media (prefers-color-scheme:dark){.fig{background:#16181c}.fig text{fill:#ddd}.fig .rule{stroke:#30343b}"
    ".fig .bad{fill:#ff6b6b}.fig .none{fill:#3a3e45}.fig .on{fill:#fff}.fig .off{fill:#111}"
    f"{_coloured(_DARK)}}}"
)


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on `start` to `end` of the picture, by their logarithms if `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = map(math.log10, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round numbers within it: of a logarithmic one powers of ten, with 2 and 5 where these are few."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 2, 5), range(1, 10)):
                found = [step * 10.0**power for power in powers for step in steps]
                found = [x for x in found if self.low * 0.999 <= x <= self.high * 1.001]
                if len(found) >= 3:
                    return found
            return found
        raw = (self.high - self.low) / count
        power = 10 ** math.floor(math.log10(raw))
        step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def spread(values: Iterable[float], start: float, end: float, *, log: bool = False) -> Scale:
    """A scale that holds all values, with some room; a logarithmic one by steps of 1, 2 and 5."""
    low, high = min(found := list(values)), max(found)
    if log:
        factor = max((high / low) ** 0.12, 1.15)
        return Scale(low / factor, high * factor, start, end, log=True)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(max(0.0, low - room) if low >= 0 else low - room, high + room, start, end)


def number(value: float, digits: int = 3) -> str:
    """As axes show it: '0.02', '1e-5', '2,000', '20k'."""
    if 1000 <= value < 1e6:
        return f"{value:,.0f}" if value < 1e4 else f"{value / 1000:g}k"
    return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e")


def numbers(values: Sequence[float]) -> list[str]:
    """The same of an axis, with digits enough to tell them apart: '6.185', '6.19'."""
    shown = ([number(value, digits) for value in values] for digits in range(3, 16))
    return next((found for found in shown if len(set(found)) == len(found)), [number(value) for value in values])


def text(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "", turn: float | None = None) -> str:
    """Words at a point, which is their start, middle or end; turned by degrees about it."""
    turned = f' transform="rotate({turn:g} {x:.1f} {y:.1f})"' if turn is not None else ""
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}{turned}>{escape(printable(words))}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def path(points: Sequence[tuple[float, float]], kind: str) -> str:
    joined = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
    return f'<path d="{joined}" class="{kind}"/>'


def rect(x: float, y: float, width: float, height: float, *, kind: str = "", fill: str = "", about: str = "") -> str:
    """A filled rectangle; `about` is told of it where a pointer rests."""
    look = f' class="{kind}"' if kind else f' fill="{fill}"'
    shape = f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.2f}"{look}'
    return f"{shape}><title>{escape(printable(about))}</title></rect>" if about else f"{shape}/>"


def hue(colour: int) -> str:
    """The class of a line's colour, dashed where colours begin again."""
    return f"s{colour % COLOURS}" + " again" * (colour // COLOURS % 2)


def mark(x: float, y: float, colour: int, about: str) -> str:
    """A point, square where colours begin again."""
    title = f"<title>{escape(printable(about))}</title>"
    kind = f"f{colour % COLOURS}"
    if colour // COLOURS % 2:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" class="{kind}">{title}</rect>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.2" class="{kind}">{title}</circle>'


def whisker(x: float, top: float, bottom: float, colour: int) -> str:
    """A vertical error bar."""
    kind = f"bar {hue(colour)}"
    return line(x, top, x, bottom, kind) + line(x - 3, top, x + 3, top, kind) + line(x - 3, bottom, x + 3, bottom, kind)


def axes(x: Scale, y: Scale, x_label: str, y_label: str, *, whole: bool = False) -> list[str]:
    """Both axes with grid, numbers and names; `whole` numbers on x alone."""
    left, right, bottom, top = x.start, x.end, y.start, y.end
    parts = []
    for value, shown in zip(y.ticks(), numbers(y.ticks()), strict=True):
        parts += [line(left, y(value), right, y(value), "rule")]
        parts += [text(left - 5, y(value) + 3.5, shown, anchor="end", kind="small")]
    taken = -math.inf
    for value, shown in zip(x.ticks(7), numbers(x.ticks(7)), strict=True):
        at = x(value)
        if (whole and value != int(value)) or at - len(shown) * CHARACTER / 2 < taken:
            continue
        taken = at + len(shown) * CHARACTER / 2 + 4
        parts += [line(at, bottom, at, bottom + 4, "axis"), text(at, bottom + 15, shown, anchor="middle", kind="small")]
    parts += [path([(left, top), (left, bottom), (right, bottom)], "axis")]
    parts += [text((left + right) / 2, bottom + 31, x_label, anchor="middle")]
    return [*parts, text(12, (top + bottom) / 2, y_label, anchor="middle", turn=-90)]


def legend(names: Mapping[int, str], top: float, *, left: float = 44.0) -> tuple[list[str], float]:
    """A line and a name for each of {colour: name}, as many in a row as fit; and where they end."""
    parts, x, y = [], left, top
    for i, name in names.items():
        width = 22 + len(name) * CHARACTER
        if x > left and x + width > WIDTH:
            x, y = left, y + 15
        parts += [line(x, y - 4, x + 14, y - 4, f"line {hue(i)}"), text(x + 18, y, name)]
        x += width + 8
    return parts, y + 8


def figure(title: str, height: float, parts: Iterable[str]) -> str:
    """A picture for a page that has `STYLE`; it says its title to those who can't see it."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {height:g}" class="fig" role="img"'
    named = f"aria-label={quoteattr(printable(title))}"
    shown = title if len(title) <= MOST else f"{title[: MOST - 1]}…"
    return f"{head} {named}>{text(8, 17, shown, kind='title')}{''.join(parts)}</svg>\n"


def alone(drawn: str) -> str:
    """A picture as a file of its own."""
    return drawn.replace(">", f"><style>{STYLE}</style>", 1)
