"""Charts for inline SVG: training curves, precision-recall curves, values with intervals.

Python computes positions, the templates draw them; no plotting library is needed.

The area of a precision-recall curve is the average precision of the table: precision P_n holds from
recall R_(n-1) to R_n, equal scores are one threshold, nothing is interpolated (Sec. 3.1,
`method.metrics`).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from vlal_dist.evaluation.results import percent

Float64 = npt.NDArray[np.float64]
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
PR_FRAME = Frame(width=240, height=190, left=34, right=232, top=8, bottom=160)
INTERVAL_FRAME = Frame(width=640, height=360, left=68, right=612, top=44, bottom=302)
MAX_POINTS = 1000
MAX_MARKS = 60
MAX_STEPS = 300
MIN_LABELS = 10


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


def draw_curve(points: Sequence[Position], *, title: str, is_share: bool) -> LineChart | None:
    """A chart of (step, value), or None without a point.

    More than `MAX_POINTS` points are averaged in runs of equal length, which the notes say.

    Args:
        points: by step.
        title: heading.
        is_share: values are shares of 1, shown times 100; the notes name the best one.
    """
    if not points:
        return None
    scale = 100.0 if is_share else 1.0
    data = [(x, y * scale) for x, y in points]
    run = math.ceil(len(data) / MAX_POINTS)
    thin = [
        (statistics.fmean(x for x, _ in part), statistics.fmean(y for _, y in part))
        for part in (data[start : start + run] for start in range(0, len(data), run))
    ]
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
    if is_share and len(data) > 1:
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


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value, a unit apart if they are equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def draw_pr_curves(
    lines: Sequence[dict[str, Any]],
    score: npt.NDArray[np.float32],
    label: npt.NDArray[np.int8],
    *,
    count: int,
) -> dict[str, Any] | str:
    """The precision-recall curves of the page, or the reason why there are none.

    Args:
        lines: rows of `attributes.parquet`, with `baseline`, in attribute order.
        score: float32 [N, A].
        label: int8 [N, A].
        count: charts per group.

    Returns:
        `rule`, which attributes may be shown, in words; `groups`, heading -> charts.
    """
    if count == 0:
        return "evaluation.curves is 0."
    rule, groups = choose_curves(lines, count=count)
    if not groups["Highest AP"]:
        return "No attribute has an annotated positive and an annotated negative in this split."
    charts = {
        name: [draw_pr(*pr_steps(score[:, n], label[:, n]), lines[n]) for n in chosen]
        for name, chosen in groups.items()
    }
    return {"rule": rule, "groups": charts}


def choose_curves(
    lines: Sequence[dict[str, Any]], *, count: int
) -> tuple[str, dict[str, list[int]]]:
    """Choose the attributes with the highest AP, the lowest AP and the most positives.

    The AP over a few crops is mostly noise: attributes need `MIN_LABELS` of either sign, if
    enough attributes have them.

    Args:
        lines: rows of `attributes.parquet`; an `ap` of None is not drawn.
        count: charts per group.

    Returns:
        The rule in words, and heading -> positions in `lines`.
    """
    defined = [n for n, line in enumerate(lines) if line["ap"] is not None]
    frequent = [
        n for n in defined if min(lines[n]["num_positive"], lines[n]["num_negative"]) >= MIN_LABELS
    ]
    enough = len(frequent) >= 2 * count
    chosen = frequent if enough else defined
    rule = (
        f"Chosen among the {len(chosen)} attributes with at least "
        f"{MIN_LABELS if enough else 1} annotated positives and as many negatives."
    )
    by_ap = sorted(chosen, key=lambda n: (-lines[n]["ap"], -lines[n]["num_positive"], n))
    by_count = sorted(chosen, key=lambda n: (-lines[n]["num_positive"], n))
    return rule, {
        "Highest AP": by_ap[:count],
        "Lowest AP": by_ap[::-1][:count],
        "Most positives": by_count[:count],
    }


def pr_steps(
    score: npt.NDArray[np.floating], label: npt.NDArray[np.int8]
) -> tuple[Float64, Float64]:
    """The curve of one attribute over its annotated rows, a step per threshold at which recall
    grows.

    Args:
        score: floating [N].
        label: int8 [N], +1 present, -1 absent, 0 unannotated; at least one +1.

    Returns:
        Recall float64 [T] at which each step ends, ascending, the last is 1; precision float64 [T]
        on the step.
    """
    rows = np.flatnonzero(label)
    order = rows[np.argsort(-score[rows], kind="stable")]
    value, positive = score[order], label[order] > 0
    last = np.append(np.flatnonzero(value[1:] != value[:-1]), len(order) - 1)
    found = np.cumsum(positive)[last]
    gains = np.diff(found, prepend=0) > 0
    found, ranked = found[gains], last[gains] + 1
    return found / found[-1], found / ranked


def thin_steps(recall: Float64, precision: Float64, limit: int) -> tuple[Float64, Float64]:
    """At most `limit` steps: neighbours are merged at their mean precision, of the same area."""
    if len(recall) <= limit:
        return recall, precision
    ends = np.linspace(0, len(recall), limit + 1).astype(np.int64)
    gained = np.diff(recall, prepend=0.0)
    area = np.add.reduceat(gained * precision, ends[:-1])
    return recall[ends[1:] - 1], area / np.add.reduceat(gained, ends[:-1])


def draw_pr(recall: Float64, precision: Float64, line: dict[str, Any]) -> LineChart:
    """The chart of one attribute.

    Args:
        recall, precision: of `pr_steps`.
        line: the attribute's row of `attributes.parquet`, with `baseline`.
    """
    recall, precision = thin_steps(recall, precision, MAX_STEPS)
    steps = [
        f"V{PR_FRAME.y(level):g}H{PR_FRAME.x(end):.2f}"
        for end, level in zip(recall.tolist(), precision.tolist(), strict=True)
    ]
    labelled = line["num_positive"] + line["num_negative"]
    return LineChart(
        frame=PR_FRAME,
        title=line["attribute"],
        notes=[
            f"AP {percent(line['ap'])} %, prevalence {percent(line['baseline'])} %",
            f"{line['num_positive']:,} positive of {labelled:,}",
        ],
        path=f"M{PR_FRAME.left} {PR_FRAME.y(float(precision[0])):g}" + "".join(steps),
        x_ticks=[(PR_FRAME.x(share), f"{share:g}") for share in (0, 0.5, 1)],
        y_ticks=[(PR_FRAME.y(share), f"{share:g}") for share in (0, 0.5, 1)],
        baseline=PR_FRAME.y(line["baseline"]),
    )


@dataclass(frozen=True)
class IntervalPoint:
    """A mAP with its interval, in percent.

    Attributes:
        x: NUM_IGNORE, or None: at the right end, apart from the numbers.
        label: under the axis.
        value, low, high: mAP and ends of its interval.
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
    """Test mAP by NUM_IGNORE (Table 2) with error bars, as `templates/intervals.svg` draws it.

    Attributes:
        title: heading, also the text alternative.
        points: one or more, by x; one without x comes last.
    """

    title: str
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
