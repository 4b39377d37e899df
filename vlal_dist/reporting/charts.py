"""Charts for inline SVG: plot frame, round ticks, training curves, values with intervals.

Python computes positions, the templates draw them; no plotting library is needed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

Position = tuple[float, float]
Tick = tuple[float, str]
"""Position on an axis, and its text."""


@dataclass(frozen=True)
class Frame:
    """Size of a chart and edges of its plot area, in SVG units; y grows downwards."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int

    def x(self, share: float) -> float:
        """Position of a share of the plot's width."""
        return round(self.left + share * (self.right - self.left), 2)

    def y(self, share: float) -> float:
        """Position of a share of the plot's height, from the bottom."""
        return round(self.bottom - share * (self.bottom - self.top), 2)


TRAINING_FRAME = Frame(width=520, height=220, left=56, right=508, top=12, bottom=186)
INTERVAL_FRAME = Frame(width=640, height=360, left=68, right=612, top=44, bottom=302)
MAX_POINTS = 1000
MAX_MARKS = 60


@dataclass(frozen=True)
class LineChart:
    """One curve, placed in its frame.

    Attributes:
        frame: size and plot area.
        title: heading, also part of the text alternative.
        notes: what the curve shows, in words.
        path: data of an SVG path.
        x_ticks, y_ticks: (position, text).
        marks: points drawn as dots.
        baseline: y of a dashed line, or None.
    """

    frame: Frame
    title: str
    notes: list[str]
    path: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Position] = field(default_factory=list)
    baseline: float | None = None


def draw_curve(points: Sequence[Position], *, title: str, percent: bool) -> LineChart | None:
    """A chart of (step, value), or None without a point.

    More than `MAX_POINTS` points are averaged in runs of equal length, which the notes say.

    Args:
        points: by step.
        title: heading.
        percent: values are shares of 1, shown times 100; the notes name the best one.
    """
    if not points:
        return None
    scale = 100.0 if percent else 1.0
    data = [(x, y * scale) for x, y in points]
    run = math.ceil(len(data) / MAX_POINTS)
    thin = [_mean(data[start : start + run]) for start in range(0, len(data), run)]
    x_low, x_high = _span([0.0, *(x for x, _ in thin)])
    y_low, y_high = _span([y for _, y in thin])
    frame = TRAINING_FRAME

    def place_x(value: float) -> float:
        return frame.x((value - x_low) / (x_high - x_low))

    def place_y(value: float) -> float:
        return frame.y((value - y_low) / (y_high - y_low))

    placed = [(place_x(x), place_y(y)) for x, y in thin]
    note = f"{data[0][1]:.4g} at step {data[0][0]:g}"
    if len(data) > 1:
        note += f", {data[-1][1]:.4g} at step {data[-1][0]:g}"
    if percent and len(data) > 1:
        best = max(data, key=lambda point: point[1])
        note += f"; best {best[1]:.4g} at step {best[0]:g}"
    if run > 1:
        note += f"; each point is the mean of {run} logged values"
    return LineChart(
        frame=frame,
        title=title,
        notes=[note],
        path="M" + " ".join(f"{x:g},{y:g}" for x, y in placed),
        x_ticks=[(place_x(x), f"{x:g}") for x in ticks(x_low, x_high)],
        y_ticks=[(place_y(y), f"{y:g}") for y in ticks(y_low, y_high)],
        marks=placed if len(placed) <= MAX_MARKS else [],
    )


def ticks(low: float, high: float) -> list[float]:
    """Round numbers 1, 2 or 5 x 10^n apart inside the range, about five of them."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _mean(points: Sequence[Position]) -> Position:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value, a unit apart if they are equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


@dataclass(frozen=True)
class IntervalPoint:
    """A value with its interval.

    Attributes:
        x: place on the axis, or None: at the right end, apart from the numbers.
        label: under the axis.
        value, low, high: in the axis' unit.
        singles: the values behind a mean, drawn as rings.
        marked: drawn as the reference.
    """

    x: float | None
    label: str
    value: float
    low: float
    high: float
    singles: tuple[float, ...] = ()
    marked: bool = False


@dataclass(frozen=True)
class IntervalChart:
    """Values with error bars (`templates/intervals.svg`); valid with one point or more.

    Attributes:
        title: heading, also the text alternative.
        x_title, y_title: of the axes.
        points: by x; one without x comes last.
    """

    title: str
    x_title: str
    y_title: str
    points: list[IntervalPoint]
    frame: Frame = INTERVAL_FRAME

    def x(self, point: IntervalPoint) -> float:
        """Position of a point; 24 units at both ends are left for the bars."""
        numbers = [one.x for one in self.points if one.x is not None]
        share = 1.0
        if point.x is not None:
            first, last = min(numbers), max(numbers)
            share = (point.x - first) / (last - first) if last > first else 0.5
            share *= 0.86 if len(numbers) < len(self.points) else 1.0
        return self.frame.left + 24 + share * (self.frame.right - self.frame.left - 48)

    def y(self, value: float) -> float:
        """Position of a value."""
        low, high = self._range
        return self.frame.y((value - low) / (high - low))

    def levels(self) -> list[float]:
        """Values with a line across the plot."""
        return ticks(*self._range)

    @cached_property
    def _range(self) -> tuple[float, float]:
        low = min(min(point.low, *point.singles, point.value) for point in self.points)
        high = max(max(point.high, *point.singles, point.value) for point in self.points)
        margin = 0.08 * (high - low) or 0.5
        return low - margin, high + margin
