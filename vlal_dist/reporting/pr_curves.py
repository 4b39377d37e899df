"""Precision-recall curves of single attributes: step functions, and which of them are shown.

The drawn area is the average precision of the table: precision P_n holds from recall R_(n-1) to
R_n, equal scores are one threshold, nothing is interpolated (Sec. 3.1, `method.metrics`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vlal_dist.evaluation.results import percent
from vlal_dist.reporting.charts import Frame, LineChart

FRAME = Frame(width=240, height=190, left=34, right=232, top=8, bottom=160)
MAX_STEPS = 300
MIN_LABELS = 10

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PrSection:
    """The charts of the page.

    Attributes:
        rule: which attributes may be shown, in words.
        groups: heading -> charts.
    """

    rule: str
    groups: dict[str, list[LineChart]]


def draw_pr_curves(
    lines: Sequence[dict[str, Any]],
    score: npt.NDArray[np.float32],
    label: npt.NDArray[np.int8],
    *,
    count: int,
) -> PrSection | str:
    """The charts of the page, or the reason why there are none.

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
        rule,
        {
            name: [draw_pr(*pr_steps(score[:, n], label[:, n]), lines[n]) for n in chosen]
            for name, chosen in groups.items()
        },
    )


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
        f"V{FRAME.y(level):g}H{FRAME.x(end):.2f}"
        for end, level in zip(recall.tolist(), precision.tolist(), strict=True)
    ]
    labelled = line["num_positive"] + line["num_negative"]
    return LineChart(
        frame=FRAME,
        title=line["attribute"],
        notes=[
            f"AP {percent(line['ap'])} %, prevalence {percent(line['baseline'])} %",
            f"{line['num_positive']:,} positive of {labelled:,}",
        ],
        path=f"M{FRAME.left} {FRAME.y(float(precision[0])):g}" + "".join(steps),
        x_ticks=[(FRAME.x(share), f"{share:g}") for share in (0, 0.5, 1)],
        y_ticks=[(FRAME.y(share), f"{share:g}") for share in (0, 0.5, 1)],
        baseline=FRAME.y(line["baseline"]),
    )
