"""Line charts as inline SVG: a few series, linear or log axes, no script, colours that follow the page's theme."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 520, 330  # units of the viewBox; the picture takes the width of its column
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 12, 46
LETTER = 9  # width of a tick label's letter, for labels that must not meet
MOST = 300  # points drawn of one series


@dataclasses.dataclass(frozen=True)
class Series:
    """`color` is any CSS colour, `marker` one of circle, square, diamond, triangle or "" for a bare line."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str = "currentColor"
    marker: str = ""
    dash: bool = False


def number(value: float) -> str:
    """A short form of a tick: 12000 -> '12k', 0.00012 -> '1.2e-4'."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if size and size < 1e-3:
        digits, power = f"{value:.1e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


def chart(
    series: Sequence[Series],
    *,
    label: str,
    xlabel: str,
    xlog: bool = False,
    ylog: bool = False,
    xticks: Sequence[float] | None = None,
    xformat: Callable[[float], str] = number,
    yformat: Callable[[float], str] = number,
) -> Markup:
    """An <svg> element; points that are not finite, or not positive on a log axis, are left out. '' without points."""
    series = [dataclasses.replace(s, points=_usable(s.points, xlog, ylog)) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return Markup("")
    xs, ys = ([p[axis] for s in series for p in s.points] for axis in (0, 1))
    x, y = _Axis(xs, xlog, LEFT, WIDTH - RIGHT, pad=0.03), _Axis(ys, ylog, HEIGHT - BOTTOM, TOP, pad=0.07)
    parts = []
    for value in y.ticks(5):
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/><text class="tick" x="{}" y="{}" '
                'text-anchor="end">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, LEFT - 8, _r(y(value) + 4), yformat(value), y=_r(y(value)))
        )
    free = math.inf  # left end of the label to the right
    for value in sorted(x.ticks(6) if xticks is None else xticks, reverse=True):
        text, at = xformat(value), _r(x(value))
        parts.append(
            Markup('<line class="grid" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(at, TOP, HEIGHT - BOTTOM)
        )
        if at + LETTER * len(text) / 2 < free:
            free = at - LETTER * (len(text) / 2 + 0.7)
            parts.append(
                Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                    at, HEIGHT - BOTTOM + 18, text
                )
            )
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, xlabel
        )
    )
    for s in series:
        path = " ".join(f"{_r(x(a))},{_r(y(b))}" for a, b in s.points)
        marks = [
            _mark(s.marker or "circle", x(a), y(b), f"{s.name}: {xformat(a)}, {yformat(b)}")
            for a, b in s.points
            if s.marker or len(s.points) == 1
        ]
        parts.append(
            Markup('<g style="--c:{}"><polyline class="line{}" points="{}"/>{}</g>').format(
                s.color, " dash" if s.dash else "", path, Markup("").join(marks)
            )
        )
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(parts)
    )


STYLE = """
:root { --ink: #1d1f24; --soft: #5c616b; --faint: #e4e2dc; --card: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e9e7e2; --soft: #a2a6ae; --faint: #2b2f36; --card: #1c1f24; } }
.card { fill: var(--card); } text { fill: var(--soft); font: 13px system-ui, sans-serif; }
.title { fill: var(--ink); font-weight: 600; font-size: 14px; } .grid { stroke: var(--faint); }
.line { fill: none; stroke: var(--c); stroke-width: 2; } .dash { stroke-dasharray: 5 4; }
.mark { fill: var(--c); stroke: var(--card); stroke-width: 1.2; }
"""


def document(picture: Markup, title: str, series: Sequence[Series]) -> str:
    """A chart as an SVG file of its own: title above, a legend of two columns below, light and dark."""
    rows = [(18 + 250 * (i % 2), HEIGHT + 52 + 20 * (i // 2), s) for i, s in enumerate(series)]
    legend = Markup("").join(
        Markup('<g style="--c:{}"><path class="line{}" d="M{} {}h22"/>{}<text x="{}" y="{}">{}</text></g>').format(
            s.color, " dash" if s.dash else "", x, y - 4,
            _mark(s.marker, x + 11, y - 4, s.name) if s.marker else "", x + 30, y, s.name)
        for x, y, s in rows
    )
    inner = Markup('<svg y="30" width="{}" height="{}">{}</svg>').format(WIDTH, HEIGHT, picture)
    height = HEIGHT + 44 + 20 * -(-len(series) // 2)
    return Markup('<svg xmlns="http://www.w3.org/2000/svg" width="{0}" viewBox="0 0 {0} {1}"><style>{2}</style>'
                  '<rect class="card" width="{0}" height="{1}"/><text class="title" x="18" y="22">{3}</text>{4}{5}'
                  "</svg>\n").format(WIDTH, height, Markup(STYLE), title, inner, legend)


def _usable(points, xlog, ylog) -> list[tuple[float, float]]:
    points = [
        (a, b)
        for a, b in points
        if a is not None
        and b is not None
        and math.isfinite(a)
        and math.isfinite(b)
        and (a > 0 or not xlog)
        and (b > 0 or not ylog)
    ]
    step = -(-len(points) // MOST)
    return points[:: step or 1] + ([points[-1]] if step > 1 and (len(points) - 1) % step else [])


class _Axis:
    """Value -> position; ends padded by a fraction of the span."""

    def __init__(self, values, log: bool, start: float, end: float, pad: float):
        self.log, self.start, self.end = log, start, end
        low, high = self._f(min(values)), self._f(max(values))
        span = (high - low) or (0.5 if log else abs(high) or 1.0)
        self.low, self.high = low - pad * span, high + pad * span
        if not log and low >= 0 > self.low:
            self.low = 0.0

    def _f(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        return self.start + (self._f(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        if self.log:
            for steps in ((1, 2, 5), (1, 3), (1,)):
                powers = range(math.floor(self.low), math.ceil(self.high) + 1)
                found = [s * 10.0**p for p in powers for s in steps if self.low <= math.log10(s * 10.0**p) <= self.high]
                if len(found) <= most + 1:
                    break
            if len(found) >= 2:
                return found[:: -(-len(found) // (most + 1))]
            low, high = 10**self.low, 10**self.high  # less than a decade without two round numbers in it
        else:
            low, high = self.low, self.high
        rough = (high - low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
        return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _mark(kind: str, x: float, y: float, title: str) -> Markup:
    r, x, y = 4.2, _r(x), _r(y)
    shapes = {
        "circle": f'<circle cx="{x}" cy="{y}" r="{r}"',
        "square": f'<rect x="{x - r}" y="{y - r}" width="{2 * r}" height="{2 * r}"',
        "diamond": f'<path d="M{x} {y - 1.3 * r}l{1.3 * r} {1.3 * r}l{-1.3 * r} {1.3 * r}l{-1.3 * r} {-1.3 * r}z"',
        "triangle": f'<path d="M{x} {y - 1.2 * r}l{1.2 * r} {2.2 * r}h{-2.4 * r}z"',
    }
    return Markup(shapes[kind]) + Markup(' class="mark"><title>{}</title></{}>').format(
        title, shapes[kind][1:].split()[0]
    )


def _r(value: float) -> float:
    return round(value, 1)
