"""Training curves as plain numbers for inline SVG: points, ticks, no drawing library.

Reads `metrics.jsonl`: lines `{"kind": "validation", "epoch": .., "step": .., "mAP": ..}` and
`{"kind": "train", "step": .., "loss": ..}`, further keys and kinds are left alone.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlal_dist.errors import DataError

WIDTH, HEIGHT = 520, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34
MAX_POINTS = 1000

Point = tuple[float, float]
Line = dict[str, object]


@dataclass(frozen=True)
class Curve:
    """One line chart, in SVG units.

    Attributes:
        title: heading, also its text alternative.
        summary: first and last (and best) value in words.
        points: `x,y x,y ...` of the polyline.
        marks: x and y of each point, where few enough to be drawn as dots.
        x_ticks, y_ticks: (position, text).
        width, height, left, right, top, bottom: frame.
    """

    title: str
    summary: str
    points: str
    marks: list[Point]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def read_metrics(text: str, *, where: str) -> list[Line]:
    """The lines of `metrics.jsonl`; a last line that a kill cut short is left out.

    Raises:
        DataError: another line is no JSON object.
    """
    raw = [line for line in text.split("\n") if line.strip()]
    lines: list[Line] = []
    for number, line in enumerate(raw):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(raw) - 1:
                break
            raise DataError(
                f"{where}, line {number + 1} is no JSON ({error}); remove that line"
            ) from None
        if not isinstance(value, dict):
            raise DataError(f"{where}, line {number + 1} is no JSON object; remove that line")
        lines.append(value)
    return lines


def series(lines: Sequence[Line], kind: str, key: str) -> list[Point]:
    """(step, value) of one kind of line, by step; a step repeated after a resume: the later."""
    found: dict[float, float] = {}
    for line in lines:
        step, value = line.get("step"), line.get(key)
        if line.get("kind") != kind or not _finite(step) or not _finite(value):
            continue
        found[float(str(step))] = float(str(value))
    return sorted(found.items())


def training_curves(lines: Sequence[Line]) -> list[Curve]:
    """Validation mAP and training loss by step, where they were logged."""
    drawn = (
        draw_curve(series(lines, "validation", "mAP"), title="Validation mAP, %", percent=True),
        draw_curve(series(lines, "train", "loss"), title="Training loss", percent=False),
    )
    return [curve for curve in drawn if curve is not None]


def draw_curve(points: Sequence[Point], *, title: str, percent: bool) -> Curve | None:
    """A chart of (step, value), or None without a point.

    More than `MAX_POINTS` points are averaged in equal runs, which the summary says.

    Args:
        points: by step.
        title: heading.
        percent: values are shares of 1, shown times 100; their best is named in the summary.
    """
    if not points:
        return None
    scale = 100.0 if percent else 1.0
    data = [(x, y * scale) for x, y in points]
    run = math.ceil(len(data) / MAX_POINTS)
    thin = [_mean(data[start : start + run]) for start in range(0, len(data), run)]
    x_low, x_high = _span([x for x, _ in thin], zero=True)
    y_low, y_high = _span([y for _, y in thin], zero=False)
    frame_x, frame_y = WIDTH - RIGHT - LEFT, HEIGHT - BOTTOM - TOP

    def place_x(value: float) -> float:
        return round(LEFT + (value - x_low) / (x_high - x_low) * frame_x, 1)

    def place_y(value: float) -> float:
        return round(TOP + (y_high - value) / (y_high - y_low) * frame_y, 1)

    placed = [(place_x(x), place_y(y)) for x, y in thin]
    summary = f"{data[0][1]:.4g} at step {data[0][0]:g}"
    if len(data) > 1:
        summary += f", {data[-1][1]:.4g} at step {data[-1][0]:g}"
    if percent and len(data) > 1:
        best = max(data, key=lambda point: point[1])
        summary += f"; best {best[1]:.4g} at step {best[0]:g}"
    if run > 1:
        summary += f"; each point is the mean of {run} logged values"
    return Curve(
        title=title,
        summary=summary,
        points=" ".join(f"{x:g},{y:g}" for x, y in placed),
        marks=placed if len(placed) <= 60 else [],
        x_ticks=[(place_x(x), f"{x:g}") for x in ticks(x_low, x_high)],
        y_ticks=[(place_y(y), f"{y:g}") for y in ticks(y_low, y_high)],
    )


def _finite(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(float(str(value)))


def _mean(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _span(values: Sequence[float], *, zero: bool) -> tuple[float, float]:
    """Lowest and highest value, from 0 if asked, never of no width."""
    low, high = (0.0 if zero else min(values)), max(values)
    if high <= low:
        return low - 0.5, low + 0.5
    return low, high


def ticks(low: float, high: float) -> list[float]:
    """Round numbers 1, 2 or 5 x 10^n apart inside the range, about five of them."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]
