"""Small charts as inline SVG in the colours and fonts of the page.

Names of lines stand beside a chart and never in it: in its legend, and for a reference line at its top right. Marks carry the
runs that they are of, so that the page's filter can move them (svnup/assets/report.js).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from markupsafe import Markup, escape

WIDTH, HEIGHT = 480, 290
RIGHT, TOP, BOTTOM = 14, 30, 44
LETTER = 7.6  # widths of a letter of a label, in the largest of the sizes that the style sheet has for phones
PITCH = 16  # height of a line of labels there
N_COLOURS = 8  # of the style sheet, without the neutral one
FARTHEST = 0.6  # of the values' range: a reference farther from them is named beside the chart, and not in it
MARKERS = (
    "m-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0z",
    "m-3.3-3.3h6.6v6.6h-6.6z",
    "m0-4.8l4.8 4.8l-4.8 4.8l-4.8-4.8z",
    "m0-4.6l4.4 7.6h-8.8z",
    "m0 4.6l4.4-7.6h-8.8z",
)
LONG = 16  # characters of a word that may break inside
# There it breaks behind what joins its parts, and behind a dot or hyphen between letters, but not inside a number.
JOINT = re.compile(r"(?<=[_/,:@|(\[])(?=\w)|(?<=[A-Za-z][.-])(?=[A-Za-z])|(?<=\w)(?=[(\[])")


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """An SVG element.

    Args:
        name: of the element.
        children: escaped unless they are Markup.
        attributes: None and False are left out; a trailing underscore of a name is dropped and others become hyphens, as in
            `class_` and `aria_label`.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    inside = "".join(escape(child) for child in children)
    return Markup(f"<{name}{given}>{inside}</{name}>")


@dataclass(frozen=True)
class Point:
    """A mark at (x, y) with an error from `low` to `high`, a tooltip, and the places of its runs where they are its own."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    tip: str = ""
    runs: Sequence[int] = ()


@dataclass(frozen=True)
class Series:
    """Named points; style 0 is the neutral one of a baseline, others differ in colour, marker and dashes.

    `runs` are the places of the runs that it is of.
    """

    name: str
    points: Sequence[Point]
    style: int = 1
    runs: Sequence[int] = ()

    @property
    def classes(self) -> str:
        colour = 0 if self.style == 0 else 1 + (self.style - 1) % N_COLOURS
        return f"s c{colour} d{min(3, (self.style - 1) // N_COLOURS) if self.style else 1}"

    @property
    def marker(self) -> str:
        return MARKERS[self.style % len(MARKERS)]


@dataclass(frozen=True)
class Reference:
    """A named line across a chart, at a value of its axis of measured values."""

    value: float
    name: str


def pieces(text: str) -> list[str]:
    """A text in the pieces between which it may break: words, and the parts of long ones."""
    words = re.split(r"(?<=\s)(?=\S)", text)
    return [piece for word in words for piece in (JOINT.split(word) if len(word) > LONG else [word])]


def ends(series: Sequence[Series]) -> list[float]:
    """All values of some series, with the ends of their errors."""
    return [v for one in series for p in one.points for v in (p.y, p.low, p.high) if v is not None]


# -- axes


def _plain(value: float) -> float:
    return value


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high` with ticks.

    Args:
        label: its name.
        low: value at its beginning.
        high: value at its end.
        ticks: values with a tick.
        scale: maps values to positions, such as the logarithm.
        show: the text of a tick.
    """

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    scale: Callable[[float], float] = field(default=_plain)
    show: Callable[[float], str] = "{:g}".format

    def at(self, value: float) -> float:
        """The position of a value as a fraction of the axis."""
        low, high = self.scale(self.low), self.scale(self.high)
        return (self.scale(value) - low) / ((high - low) or 1.0)


def linear(label: str, values: Sequence[float], *, zero: bool = False) -> Axis:
    """A linear axis for values, which includes 0 if `zero`."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    margin = max(0.5, 0.05 * abs(low)) if low == high else 0.0
    low, high = low - margin, high + margin
    step = next(s for s in _steps(10.0 ** (math.floor(math.log10(high - low)) - 1)) if (high - low) / s <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(label, first * step, last * step, [round(i * step, 12) for i in range(first, last + 1)])


def _steps(base: float) -> list[float]:
    return [base * factor for factor in (1, 2, 5, 10, 20, 50, 100)]


def logarithmic(label: str, values: Sequence[float], reference: Reference | None = None) -> Axis:
    """A logarithmic axis for positive values, and for a reference that is not far from them."""
    low, high = min(values), max(values)
    if reference is not None and _is_near(reference.value, low, high):
        low, high = min(low, reference.value), max(high, reference.value)
    low, high = (low / 1.2, high * 1.2) if high < 1.2 * low else (low / 1.06, high * 1.06)
    return Axis(f"{label}, log scale", low, high, _decade_ticks(low, high, 4), math.log10)


def _is_near(value: float, low: float, high: float) -> bool:
    beyond = max(low / value, value / high)
    return low == high or math.log(max(beyond, 1.0)) <= FARTHEST * math.log(high / low)


def _decade_ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers between two, of the coarsest kind with at least `wanted` of them; at most eight."""
    if high < 3 * low:
        return [tick for tick in linear("", [low, high]).ticks if low <= tick <= high]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few: list[float] = []
    for digits in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        few = [t for t in (round(d * 10.0**e, 12) for e in decades for d in digits) if low <= t <= high]
        if len(few) >= wanted:
            break
    return few[:: 1 + len(few) // 8]


def symlog(label: str, values: Sequence[float]) -> Axis:
    """A linear axis, or a symmetric logarithmic one if the largest value is more than eight times the median."""
    positive = sorted(v for v in values if v > 0)
    if not positive or not positive[-1] > 8 * sorted(values)[len(values) // 2] > 0:
        return linear(label, values, zero=True)
    knee = positive[0]

    def scale(value: float) -> float:
        return math.copysign(math.log10(1 + abs(value) / knee), value)

    low, high = min(0.0, *values), positive[-1] * 1.1
    above = _decade_ticks(knee, high, 3)
    return Axis(f"{label}, log scale", low, high, [t for t in (-above[-1], -above[0], 0.0, *above) if t >= low], scale)


def sparsities(label: str, values: Sequence[float]) -> Axis:
    """An axis with a tick at each of a few values, and a margin at both ends."""
    spots = sorted(set(values))
    ticks = spots if len(spots) <= 9 else [t for t in linear("", spots).ticks if spots[0] <= t <= spots[-1]]
    margin = 0.02 * (spots[-1] - spots[0])
    return Axis(label, spots[0] - margin, spots[-1] + margin, ticks)


def layers(n: int) -> Axis:
    """The axis of a model's blocks, counted from 0."""
    step = next(s for s in _steps(1) if n / s <= 13)
    return Axis("layer", -0.7, n - 0.3, range(0, n, int(step)))


# -- charts


@dataclass(frozen=True)
class _Plot:
    """Where the values of two axes lie in a chart."""

    x: Axis
    y: Axis
    reference: str = ""  # how it is named

    @cached_property
    def left(self) -> float:
        """Width that the widest tick of the upright axis takes."""
        return 14 + LETTER * max((len(self.y.show(t)) for t in self.y.ticks), default=1)

    @cached_property
    def top(self) -> int:
        crowded = self.reference and LETTER * (len(self.y.label) + len(self.reference) + 5) > WIDTH
        return TOP + (PITCH if crowded else 0)

    def px(self, value: float) -> float:
        return self.left + self.x.at(value) * (WIDTH - self.left - RIGHT)

    def py(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.y.at(value) * (HEIGHT - self.top - BOTTOM)

    def chart(self, title: str, drawn: Sequence[Markup]) -> Markup:
        grid = "".join(f"M{self.left:.1f} {self.py(t):.1f}H{WIDTH - RIGHT}" for t in self.y.ticks)
        names = (element("text", self.y.show(t), x=f"{self.left - 7:.1f}", y=f"{self.py(t) + 4:.1f}") for t in self.y.ticks)
        parts = [element("path", class_="grid", d=grid), element("g", *names, text_anchor="end")]
        parts.append(_below(self.x, HEIGHT, self.left))
        if self.y.low < 0 < self.y.high:
            parts.append(element("path", class_="tick", d=f"M{self.left:.1f} {self.py(0.0):.1f}H{WIDTH - RIGHT}"))
        parts.append(element("text", self.y.label, x=0, y=13))
        if self.reference:
            parts.append(_named(self.reference, self.top - 17))
        return _svg(title, HEIGHT, [*parts, *drawn])


def lines(title: str, x: Axis, y: Axis, series: Sequence[Series], reference: Reference | None = None) -> Markup:
    """A line chart: each series with its markers and a band from low to high, or a whisker for a single point."""
    plot = _Plot(x, y, _name_of(reference, y))
    return plot.chart(title, [*_level(plot, reference), *(_line(s, plot) for s in series)])


def scatter(title: str, x: Axis, y: Axis, series: Sequence[Series], upright: Reference | None = None) -> Markup:
    """A scatter chart with whiskers; `upright` is a named vertical line."""
    plot = _Plot(x, y, _name_of(upright, x, upright=True))
    drawn = [_line(s, plot, joined=False) for s in series]
    if upright is not None and _inside(upright, x):
        ref = f"M{plot.px(upright.value):.1f} {plot.top}V{HEIGHT - BOTTOM}"
        drawn.insert(0, element("path", class_="ref", d=ref))
    return plot.chart(title, drawn)


def bars(title: str, x: Axis, y: Axis, series: Series, reference: Reference | None = None) -> Markup:
    """A bar chart with whiskers; several bars of a unit of the axis stand side by side."""
    plot = _Plot(x, y, _name_of(reference, y))
    apart = min((b.x - a.x for a, b in zip(series.points, series.points[1:], strict=False)), default=1.0)
    half = 0.36 * apart * (plot.px(1.0) - plot.px(0.0))
    zero = plot.py(0.0)
    d = "".join(f"M{plot.px(p.x) - half:.1f} {zero:.1f}V{plot.py(p.y):.1f}h{2 * half:.1f}V{zero:.1f}z" for p in series.points)
    drawn = [element("path", class_="bar", d=d)]
    if whiskers := "".join(_whisker(p, plot) for p in series.points):
        drawn.append(element("path", class_="whisker", d=whiskers))
    return plot.chart(title, [element("g", *drawn, class_=series.classes), *_level(plot, reference)])


def ranking(title: str, x: Axis, series: Sequence[Series], reference: Reference | None = None) -> Markup:
    """One row per series with its first point below its name, to compare series at one place."""
    name, left = _name_of(reference, x, upright=True), 14.0
    top = 24.0 if name else 6.0
    inside = reference is not None and _inside(reference, x)
    rows: list[Markup] = []
    for one in series:
        point = one.points[0]
        words = _wrapped(f"{point.x:.2f}  {one.name}", int((WIDTH - left) / LETTER))
        cy = top + PITCH * len(words) + 5
        px = _x(x, point.x, left)
        marks = [element("path", class_="rule", d=f"M{left:g} {cy:g}H{WIDTH - RIGHT}")]
        if inside and reference is not None:  # only beside the rule, so that it crosses no name
            marks.append(element("path", class_="ref", d=f"M{_x(x, reference.value, left):.1f} {cy - 3:g}v8"))
        if point.low is not None and point.high is not None:
            whisker = f"M{_x(x, point.low, left):.1f} {cy:g}H{_x(x, point.high, left):.1f}"
            marks.append(element("path", class_="whisker", d=whisker))
        marks.append(element("path", class_="m", d=f"M{px:.1f} {cy:g}{one.marker}", data_tip=point.tip))
        value, _, first = words[0].partition("  ")
        shown = [element("tspan", f"{value}  ", class_="value"), element("tspan", first)]
        shown += [element("tspan", text, x=left, dy=PITCH) for text in words[1:]]
        marks.append(element("text", *shown, class_="rowname", x=left, y=f"{top + PITCH - 3:g}"))
        height = PITCH * len(words) + 18
        rows.append(element("g", *marks, class_=one.classes, data_s=one.name, data_runs=_places(one.runs), data_row=height))
        top += height
    total = int(top) + BOTTOM
    names = [_named(name, 13)] if name else []
    return _svg(title, total, [*names, *rows, _below(x, total, left)])


def swatch(series: Series) -> Markup:
    """The symbol of a series in a legend."""
    drawn = element("path", class_="line", d="M1 7H27"), element("path", class_="m", d=f"M14 7{series.marker}")
    return element("svg", element("g", *drawn, class_=series.classes), viewBox="0 0 28 14", aria_hidden="true")


def _x(axis: Axis, value: float, left: float) -> float:
    return left + axis.at(value) * (WIDTH - left - RIGHT)


def _places(runs: Sequence[int]) -> str | None:
    return " ".join(map(str, runs)) or None


def _inside(reference: Reference, axis: Axis) -> bool:
    return -1e-9 <= axis.at(reference.value) <= 1 + 1e-9


def _name_of(reference: Reference | None, axis: Axis, upright: bool = False) -> str:
    """How a reference line is named beside a chart, which says so where it would lie outside."""
    if reference is None or _inside(reference, axis):
        return reference.name if reference is not None else ""
    sides = ("left of", "right of") if upright else ("below", "above")
    return f"{reference.name} ({sides[axis.at(reference.value) > 0]} the chart)"


def _named(name: str, y: float) -> Markup:
    """The name of a reference at the top right, behind a sample of its line."""
    return element("text", f"┄┄ {name}", class_="refname", x=WIDTH - RIGHT, y=f"{y:g}", text_anchor="end")


def _level(plot: _Plot, reference: Reference | None) -> list[Markup]:
    if reference is None or not _inside(reference, plot.y):
        return []
    return [element("path", class_="ref", d=f"M{plot.left:.1f} {plot.py(reference.value):.1f}H{WIDTH - RIGHT}")]


def _whisker(point: Point, plot: _Plot) -> str:
    if point.low is None or point.high is None:
        return ""
    return f"M{plot.px(point.x):.1f} {plot.py(point.low):.1f}V{plot.py(point.high):.1f}"


def _line(series: Series, plot: _Plot, joined: bool = True) -> Markup:
    points = [(p, plot.px(p.x), plot.py(p.y)) for p in series.points]
    drawn: list[Markup] = []
    band = [(px, plot.py(p.low), plot.py(p.high)) for p, px, _ in points if p.low is not None and p.high is not None]
    banded = joined and len(band) > 1
    if banded:
        there = " ".join(f"{px:.1f} {high:.1f}" for px, _, high in band)
        back = " ".join(f"{px:.1f} {low:.1f}" for px, low, _ in reversed(band))
        drawn.append(element("path", class_="band", d=f"M{there} {back}z"))
    if joined and len(points) > 1:
        drawn.append(element("path", class_="line", d="M" + " ".join(f"{px:.1f} {py:.1f}" for _, px, py in points)))
    for p, px, py in points:
        runs, error = _places(p.runs), None
        if p.low is not None and p.high is not None:
            error = f"{plot.py(p.low):.1f} {plot.py(p.high):.1f}" if banded and runs else None  # to make the band anew of it
            drawn += [] if banded else [element("path", class_="whisker", d=_whisker(p, plot), data_runs=runs)]
        d = f"M{px:.1f} {py:.1f}{series.marker}"
        drawn.append(element("path", class_="m", d=d, data_tip=p.tip or None, data_runs=runs, data_error=error))
    return element("g", *drawn, class_=series.classes, data_s=series.name, data_runs=_places(series.runs))


def _below(axis: Axis, height: float, left: float) -> Markup:
    """A level axis at the bottom, without the names of ticks that would lie on others."""
    names, end = [], -math.inf
    for tick in axis.ticks:
        px, text = _x(axis, tick, left), axis.show(tick)
        if px - LETTER * len(text) / 2 > end + 3:
            names.append(element("text", text, x=f"{px:.1f}", y=f"{height - BOTTOM + 17:g}"))
            end = px + LETTER * len(text) / 2
    marks = "".join(f"M{_x(axis, tick, left):.1f} {height - BOTTOM:g}v4" for tick in axis.ticks)
    label = element("text", axis.label, class_="axis", x=f"{(left + WIDTH - RIGHT) / 2:g}", y=f"{height - 6:g}")
    return element("g", element("path", class_="tick", d=marks), *names, label, text_anchor="middle", class_="below")


def _wrapped(text: str, width: int) -> list[str]:
    """A text in lines of at most `width` characters, broken between its pieces; only a longer piece is cut."""
    lines = [""]
    for part in pieces(text):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        while len(part) > width:
            lines[-1:] = [part[:width], ""]
            part = part[width:]
        lines[-1] += part
    return [line.rstrip() for line in lines if line.strip()]


def _svg(title: str, height: float, parts: Sequence[Markup]) -> Markup:
    return element("svg", *parts, class_="chart", viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=title)
