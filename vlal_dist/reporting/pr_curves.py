"""Precision-recall curves of single attributes as step functions, for inline SVG.

The drawn area is the average precision of the table: precision P_n holds from recall R_(n-1) to
R_n, equal scores are one threshold, nothing is interpolated (Sec. 3.1, `method.metrics`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vlal_dist.evaluation.results import percent

WIDTH, HEIGHT = 240, 190
LEFT, RIGHT, TOP, BOTTOM = 34, 8, 8, 30
MAX_STEPS = 300
LEAST_LABELS = 10

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Steps:
    """A precision-recall curve.

    Attributes:
        recall: float64 [T], ascending, the last is 1; each step ends there.
        precision: float64 [T], on the step that ends there.
    """

    recall: Float64
    precision: Float64


@dataclass(frozen=True)
class PrCurve:
    """One small chart, in SVG units.

    Attributes:
        title: attribute name.
        summary: AP and prevalence in words.
        counts: of annotations, in words.
        path: of the step curve, from recall 0 to 1.
        prevalence: y of the share of positives.
        x_ticks, y_ticks: (position, text).
        width, height, left, right, top, bottom: frame.
    """

    title: str
    summary: str
    counts: str
    path: str
    prevalence: float
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class PrSection:
    """The charts of the page.

    Attributes:
        rule: which attributes may be shown, in words.
        groups: heading -> charts.
    """

    rule: str
    groups: dict[str, list[PrCurve]]


def pr_steps(score: npt.NDArray[np.floating], label: npt.NDArray[np.int8]) -> Steps:
    """The curve of one attribute over its annotated rows.

    Args:
        score: floating [N].
        label: int8 [N], +1 present, -1 absent, 0 unannotated; at least one +1.

    Returns:
        A step per threshold at which recall grows.
    """
    rows = np.flatnonzero(label)
    order = rows[np.argsort(-score[rows], kind="stable")]
    value, positive = score[order], label[order] > 0
    last = np.append(np.flatnonzero(value[1:] != value[:-1]), len(order) - 1)
    found = np.cumsum(positive)[last]
    gains = np.diff(found, prepend=0) > 0
    found, ranked = found[gains], last[gains] + 1
    return Steps(recall=found / found[-1], precision=found / ranked)


def thin_steps(steps: Steps, limit: int) -> Steps:
    """At most `limit` steps: neighbours become one of their mean precision, of the same area."""
    if len(steps.recall) <= limit:
        return steps
    ends = np.linspace(0, len(steps.recall), limit + 1).astype(np.int64)
    gained = np.diff(steps.recall, prepend=0.0)
    area = np.add.reduceat(gained * steps.precision, ends[:-1])
    return Steps(
        recall=steps.recall[ends[1:] - 1], precision=area / np.add.reduceat(gained, ends[:-1])
    )


def draw_pr(steps: Steps, line: dict[str, Any]) -> PrCurve:
    """The chart of one attribute.

    Args:
        steps: its curve.
        line: its row of `attributes.parquet`, with `baseline`.
    """
    thin = thin_steps(steps, MAX_STEPS)
    x = LEFT + thin.recall * (WIDTH - RIGHT - LEFT)
    y = [_place(float(value)) for value in thin.precision]
    path = [f"M{LEFT} {y[0]:g}"]
    for number, (end, level) in enumerate(zip(x.tolist(), y, strict=True)):
        path.append(f"V{level:g}H{end:.2f}" if number else f"H{end:.2f}")
    labelled = line["num_positive"] + line["num_negative"]
    return PrCurve(
        title=line["attribute"],
        summary=f"AP {percent(line['ap'])} %, prevalence {percent(line['baseline'])} %",
        counts=f"{line['num_positive']:,} positive of {labelled:,}",
        path="".join(path),
        prevalence=_place(line["baseline"]),
        x_ticks=[(LEFT + share * (WIDTH - RIGHT - LEFT), f"{share:g}") for share in (0, 0.5, 1)],
        y_ticks=[(_place(share), f"{share:g}") for share in (0, 0.5, 1)],
    )


def choose_curves(
    lines: Sequence[dict[str, Any]], *, count: int
) -> tuple[str, dict[str, list[int]]]:
    """Which attributes are drawn: the best, the worst and the most frequent.

    Args:
        lines: rows of `attributes.parquet`; an `ap` of None is not drawn.
        count: charts per group.

    Returns:
        The rule in words, and heading -> positions in `lines`. An AP over a few crops is chance,
        so that `LEAST_LABELS` of either sign are asked for, if enough attributes have them.
    """
    defined = [n for n, line in enumerate(lines) if line["ap"] is not None]
    firm = [
        n
        for n in defined
        if min(lines[n]["num_positive"], lines[n]["num_negative"]) >= LEAST_LABELS
    ]
    enough = len(firm) >= 2 * count
    chosen = firm if enough else defined
    rule = (
        f"Chosen among the {len(chosen)} attributes with at least "
        f"{LEAST_LABELS if enough else 1} annotated positives and as many negatives."
    )
    by_ap = sorted(chosen, key=lambda n: (-lines[n]["ap"], -lines[n]["num_positive"], n))
    by_count = sorted(chosen, key=lambda n: (-lines[n]["num_positive"], n))
    return rule, {
        "Highest AP": by_ap[:count],
        "Lowest AP": by_ap[::-1][:count],
        "Most positives": by_count[:count],
    }


def draw_pr_curves(
    lines: Sequence[dict[str, Any]],
    score: npt.NDArray[np.float32],
    label: npt.NDArray[np.int8],
    *,
    count: int,
) -> PrSection | str:
    """The charts of the page, or why there are none.

    Args:
        lines: rows of `attributes.parquet`, with `baseline`, in attribute order.
        score: float32 [N, A].
        label: int8 [N, A].
        count: charts per group.
    """
    if count == 0:
        return "evaluation.curves is 0."
    rule, groups = choose_curves(lines, count=count)
    if not groups["Highest AP"]:
        return "No attribute has an annotated positive and an annotated negative in this split."
    return PrSection(
        rule=rule,
        groups={
            name: [draw_pr(pr_steps(score[:, n], label[:, n]), lines[n]) for n in chosen]
            for name, chosen in groups.items()
        },
    )


def _place(share: float) -> float:
    return round(TOP + (1 - share) * (HEIGHT - BOTTOM - TOP), 2)
