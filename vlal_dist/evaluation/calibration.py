"""Does the vision-language likelihood know what annotators saw? Likelihood against annotation.

Eq. (2) gives probabilities within a feasible set, so that their size depends on the set's: the
likelihood relative to uniform, g |Omega_o|, compares crops of different objects.
"""

from dataclasses import dataclass

import numpy as np

from vlal_dist.evaluation.training_crops import TrainingCrops

WIDTH, HEIGHT = 720, 280
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 24, 62
EDGES = tuple(float(edge) for edge in 10.0 ** np.arange(-3.0, 2.01, 0.25))


@dataclass(frozen=True)
class Bin:
    """Annotated feasible pairs whose likelihood relative to uniform lies in one range.

    Attributes:
        low, high: its ends; 0 and infinity for the outermost.
        pairs: annotated pairs.
        positive: those annotated present.
    """

    low: float
    high: float
    pairs: int
    positive: int

    @property
    def share(self) -> float:
        """Share annotated present, of 1."""
        return self.positive / self.pairs if self.pairs else 0.0


@dataclass(frozen=True)
class Bar:
    """A bin as drawn, in SVG units, with its texts."""

    x: float
    y: float
    width: float
    height: float
    share: str
    pairs: str
    range: str


@dataclass(frozen=True)
class CalibrationSection:
    """The chart.

    Attributes:
        summary: what it shows, in words.
        bars: one per bin.
        overall: y of the share annotated present over all bins.
        x_ticks, y_ticks: (position, text).
        width, height, left, right, top, bottom: frame.
    """

    summary: str
    bars: list[Bar]
    overall: float
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def calibration_bins(crops: TrainingCrops) -> list[Bin]:
    """Annotated feasible pairs by g |Omega_o|, in bins of a quarter of a decade.

    Empty bins at either end are left out. The two outermost of all are open.
    """
    row, column = np.nonzero(crops.feasible & (crops.label != 0))
    ratio = crops.likelihood[row, column] * crops.feasible.sum(axis=1)[row]
    positive = crops.label[row, column] > 0
    place = np.searchsorted(EDGES, ratio, side="right")
    pairs = np.bincount(place, minlength=len(EDGES) + 1)
    found = np.bincount(place[positive], minlength=len(EDGES) + 1)
    ends = (0.0, *EDGES, float("inf"))
    used = np.flatnonzero(pairs)
    kept = range(int(used[0]), int(used[-1]) + 1) if len(used) else range(0)
    return [Bin(ends[n], ends[n + 1], int(pairs[n]), int(found[n])) for n in kept]


def draw_calibration(crops: TrainingCrops) -> CalibrationSection | str:
    """The chart, or why there is none."""
    bins = calibration_bins(crops)
    total, positive = sum(one.pairs for one in bins), sum(one.positive for one in bins)
    if not total:
        return "None of the counted crops has an annotated feasible attribute."
    step = (WIDTH - RIGHT - LEFT) / len(bins)
    bars = [
        Bar(
            x=round(LEFT + number * step + 3, 1),
            y=_place(one.share),
            width=round(step - 6, 1),
            height=round(HEIGHT - BOTTOM - _place(one.share), 1),
            share=f"{100 * one.share:.0f}%" if one.pairs else "",
            pairs=_short(one.pairs),
            range=_range(one),
        )
        for number, one in enumerate(bins)
    ]
    inner = [(number, one.low) for number, one in enumerate(bins) if one.low > 0]
    return CalibrationSection(
        summary=(
            f"{total:,} annotated feasible pairs of the first {len(crops.uid):,} crops of split "
            f"{crops.split}; {100 * positive / total:.1f} % of them are annotated present."
        ),
        bars=bars,
        overall=_place(positive / total),
        x_ticks=[
            (round(LEFT + number * step, 1), f"{low:g}")
            for number, low in inner
            if abs(np.log10(low) - round(float(np.log10(low)))) < 1e-6
        ],
        y_ticks=[(_place(share), f"{100 * share:g}%") for share in (0, 0.25, 0.5, 0.75, 1)],
    )


def _place(share: float) -> float:
    return round(TOP + (1 - share) * (HEIGHT - BOTTOM - TOP), 1)


def _range(one: Bin) -> str:
    if one.low == 0:
        return f"below {one.high:.2g}"
    return f"{one.low:.2g} or more" if np.isinf(one.high) else f"{one.low:.2g} to {one.high:.2g}"


def _short(count: int) -> str:
    return f"{count / 1000:.1f}k" if count >= 10_000 else f"{count:,}"
