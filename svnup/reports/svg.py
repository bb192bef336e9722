"""Small charts as inline SVG in the colours and fonts of the page, and markup that escapes its content."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 480, 290


LEFT, RIGHT, TOP, BOTTOM = 44, 14, 30, 44


LONGEST_NAME = 48  # characters of a row's name that fit a phone; the tooltip has the whole name
N_COLOURS = 8  # of the style sheet, without the neutral one
MARKERS = (
    "m-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0z",
    "m-3.3-3.3h6.6v6.6h-6.6z",
    "m0-4.8l4.8 4.8l-4.8 4.8l-4.8-4.8z",
    "m0-4.6l4.4 7.6h-8.8z",
    "m0 4.6l4.4-7.6h-8.8z",
)


class Markup(str):
    """Text that is markup; any other text is escaped when it is put into an element."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """An HTML or SVG element.

    Args:
        name: of the element.
        children: escaped unless they are Markup.
        attributes: None and False are left out; a trailing underscore of a name is dropped and others become hyphens, as in
            `class_` and `aria_label`.
    """
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    inside = "".join(child if isinstance(child, Markup) else escape(str(child)) for child in children)
    return Markup(f"<{name}{given}>" if name in ("input", "meta") else f"<{name}{given}>{inside}</{name}>")


@dataclass(frozen=True)
class Point:
    """A mark at (x, y) with an error from `low` to `high` and a tooltip."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    tip: str = ""


@dataclass(frozen=True)
class Series:
    """Named points; style 0 is the neutral one of a baseline, others differ in colour, marker and dashes."""

    name: str
    points: Sequence[Point]
    style: int = 1

    @property
    def classes(self) -> str:
        colour = 0 if self.style == 0 else 1 + (self.style - 1) % N_COLOURS
        return f"s c{colour} d{min(3, (self.style - 1) // N_COLOURS) if self.style else 1}"

    @property
    def marker(self) -> str:
        return MARKERS[self.style % len(MARKERS)]


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
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    step = next(s for s in _steps(10.0 ** (math.floor(math.log10(high - low)) - 1)) if (high - low) / s <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(label, first * step, last * step, [round(i * step, 12) for i in range(first, last + 1)])


def _steps(base: float) -> list[float]:
    return [base * factor for factor in (1, 2, 5, 10, 20, 50, 100)]


def logarithmic(label: str, values: Sequence[float]) -> Axis:
    """A logarithmic axis for positive values."""
    low, high = min(values), max(values)
    low, high = (low / 1.2, high * 1.2) if high < 1.2 * low else (low / 1.06, high * 1.06)
    return Axis(f"{label}, log scale", low, high, _decade_ticks(low, high, 4), math.log10)


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


def layers(n: int) -> Axis:
    """The axis of a model's blocks, counted from 0."""
    step = next(s for s in _steps(1) if n / s <= 13)
    return Axis("layer", -0.7, n - 0.3, range(0, n, int(step)))


def lines(title: str, x: Axis, y: Axis, series: Sequence[Series], reference: tuple[float, str] | None = None) -> Markup:
    """A line chart: each series with its markers and a band from low to high, or a whisker for a single point."""
    return _chart(title, x, y, [_line(s, x, y) for s in series], reference)


def scatter(title: str, x: Axis, y: Axis, series: Sequence[Series], upright: tuple[float, str] | None = None) -> Markup:
    """A scatter chart with whiskers; `upright` is a named vertical line."""
    drawn = [_line(s, x, y, joined=False) for s in series]
    if upright is not None:
        px = _x(x, upright[0])
        drawn.insert(0, element("path", class_="ref", d=f"M{px:.1f} {TOP}V{HEIGHT - BOTTOM}"))
        drawn.append(element("text", upright[1], class_="refname", x=f"{px - 5:.1f}", y=TOP + 11, text_anchor="end"))
    return _chart(title, x, y, drawn)


def bars(title: str, x: Axis, y: Axis, series: Series, reference: tuple[float, str] | None = None) -> Markup:
    """A bar chart with whiskers."""
    half = 0.36 * (WIDTH - LEFT - RIGHT) / (x.high - x.low)
    zero = _y(y, 0.0)
    d = "".join(f"M{_x(x, p.x) - half:.1f} {zero:.1f}V{_y(y, p.y):.1f}h{2 * half:.1f}V{zero:.1f}z" for p in series.points)
    drawn = [element("path", class_="bar", d=d), _whiskers(series.points, x, y)]
    return _chart(title, x, y, [element("g", *drawn, class_=series.classes)], reference)


def ranking(title: str, x: Axis, series: Sequence[Series], reference: tuple[float, str] | None = None) -> Markup:
    """One row per series with its first point below its name, to compare series at one place."""
    row, top = 34, 22 if reference else 8
    height = top + row * len(series) + BOTTOM
    drawn = []
    if reference is not None:
        px = _x(x, reference[0], 14)
        drawn.append(element("path", class_="ref", d=f"M{px:.1f} {top}V{height - BOTTOM}"))
        anchor = "start" if x.at(reference[0]) < 0.7 else "end"
        drawn.append(element("text", reference[1], class_="refname", x=f"{px:.1f}", y=top - 6, text_anchor=anchor))
    for i, one in enumerate(series):
        point, cy = one.points[0], top + row * i + 25
        px = _x(x, point.x, 14)
        marks = [element("path", class_="rule", d=f"M14 {cy}H{WIDTH - RIGHT}")]
        if point.low is not None and point.high is not None:
            marks.append(element("path", class_="whisker", d=f"M{_x(x, point.low, 14):.1f} {cy}H{_x(x, point.high, 14):.1f}"))
        marks.append(element("path", class_="m", d=f"M{px:.1f} {cy}{one.marker}", data_tip=point.tip))
        words = one.name if len(one.name) <= LONGEST_NAME else f"{one.name[: LONGEST_NAME - 1]}…"
        name = element("tspan", f"{point.x:.2f}  ", class_="value") + element("tspan", words)
        marks.append(element("text", Markup(name), class_="rowname", x=14, y=cy - 8))
        drawn.append(element("g", *marks, class_=one.classes, data_s=one.name))
    return _svg(title, height, [_x_axis(x, height, 14), *drawn])


def swatch(series: Series) -> Markup:
    """The symbol of a series in a legend."""
    drawn = element("path", class_="line", d="M1 7H27") + element("path", class_="m", d=f"M14 7{series.marker}")
    return element("svg", element("g", Markup(drawn), class_=series.classes), viewBox="0 0 28 14", aria_hidden="true")


def _x(axis: Axis, value: float, left: int = LEFT) -> float:
    return left + axis.at(value) * (WIDTH - left - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.at(value) * (HEIGHT - TOP - BOTTOM)


def _whiskers(points: Sequence[Point], x: Axis, y: Axis) -> Markup:
    d = "".join(
        f"M{_x(x, p.x):.1f} {_y(y, p.low):.1f}V{_y(y, p.high):.1f}" for p in points if p.low is not None and p.high is not None
    )
    return element("path", class_="whisker", d=d) if d else Markup()


def _line(series: Series, x: Axis, y: Axis, joined: bool = True) -> Markup:
    points = [(p, _x(x, p.x), _y(y, p.y)) for p in series.points]
    drawn: list[Markup] = []
    band = [(px, p.low, p.high) for p, px, _ in points if p.low is not None and p.high is not None]
    if joined and len(band) > 1:
        there = " ".join(f"{px:.1f} {_y(y, high):.1f}" for px, _, high in band)
        back = " ".join(f"{px:.1f} {_y(y, low):.1f}" for px, low, _ in reversed(band))
        drawn.append(element("path", class_="band", d=f"M{there} {back}z"))
    else:
        drawn.append(_whiskers(series.points, x, y))
    if joined and len(points) > 1:
        drawn.append(element("path", class_="line", d="M" + " ".join(f"{px:.1f} {py:.1f}" for _, px, py in points)))
    drawn += [
        element("path", class_="m", d=f"M{px:.1f} {py:.1f}{series.marker}", data_tip=p.tip or None) for p, px, py in points
    ]
    return element("g", *drawn, class_=series.classes, data_s=series.name)


def _x_axis(axis: Axis, height: int = HEIGHT, left: int = LEFT) -> Markup:
    at = [(_x(axis, tick, left), axis.show(tick)) for tick in axis.ticks]
    marks = element("path", class_="tick", d="".join(f"M{px:.1f} {height - BOTTOM}v4" for px, _ in at))
    names = [element("text", name, x=f"{px:.1f}", y=height - BOTTOM + 17) for px, name in at]
    label = element("text", axis.label, class_="axis", x=(left + WIDTH - RIGHT) / 2, y=height - 6)
    return element("g", marks, *names, label, text_anchor="middle")


def _chart(title: str, x: Axis, y: Axis, drawn: list[Markup], reference: tuple[float, str] | None = None) -> Markup:
    grid = "".join(f"M{LEFT} {_y(y, t):.1f}H{WIDTH - RIGHT}" for t in y.ticks)
    parts = [element("path", class_="grid", d=grid)]
    names = (element("text", y.show(t), x=LEFT - 7, y=f"{_y(y, t) + 4:.1f}") for t in y.ticks)
    parts += [element("g", *names, text_anchor="end"), _x_axis(x)]
    if y.low < 0 < y.high:
        parts.append(element("path", class_="tick", d=f"M{LEFT} {_y(y, 0.0):.1f}H{WIDTH - RIGHT}"))
    parts.append(element("text", y.label, x=0, y=13))
    parts += drawn
    if reference is not None:
        height = _y(y, reference[0])
        parts.append(element("path", class_="ref", d=f"M{LEFT} {height:.1f}H{WIDTH - RIGHT}"))
        parts.append(element("text", reference[1], class_="refname", x=WIDTH - RIGHT, y=f"{height - 5:.1f}", text_anchor="end"))
    return _svg(title, HEIGHT, parts)


def _svg(title: str, height: int, parts: list[Markup]) -> Markup:
    return element("svg", *parts, class_="chart", viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=title)
