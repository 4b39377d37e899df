"""Precision-recall curves: the drawn area is the AP of the table."""

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vlal_dist.method.metrics import average_precision
from vlal_dist.reporting.charts import (
    MIN_LABELS,
    PR_FRAME,
    LineChart,
    choose_curves,
    draw_pr,
    draw_pr_curves,
    pr_steps,
    thin_steps,
)


def make_line(label: npt.NDArray[np.int8], ap: float | None, name: str = "red") -> dict[str, Any]:
    positive, negative = int((label > 0).sum()), int((label < 0).sum())
    return {
        "attribute": name,
        "num_positive": positive,
        "num_negative": negative,
        "ap": ap,
        "baseline": positive / max(1, positive + negative),
    }


def drawn_area(curve: LineChart) -> float:
    """Area under the step path, as a share of the frame; recall must only grow."""
    x = y = area = 0.0
    for command, first, second in re.findall(r"([MHV])([\d.]+)(?: ([\d.]+))?", curve.path):
        if command == "M":
            x, y = float(first), float(second)
            assert x == PR_FRAME.left
        elif command == "V":
            y = float(first)
        else:
            assert float(first) >= x
            area += (float(first) - x) * (PR_FRAME.bottom - y)
            x = float(first)
    assert x == PR_FRAME.right
    return area / ((PR_FRAME.right - PR_FRAME.left) * (PR_FRAME.bottom - PR_FRAME.top))


@st.composite
def cases(draw: st.DrawFn) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """Few distinct scores, so that ties abound; one positive at least."""
    count = draw(st.integers(1, 40))
    label = draw(arrays.arrays(np.int8, count, elements=st.sampled_from([-1, 0, 1])))
    label[draw(st.integers(0, count - 1))] = 1
    score = draw(arrays.arrays(np.float32, count, elements=st.integers(0, 8).map(lambda v: v / 8)))
    return score, label


@given(cases())
@settings(deadline=None, max_examples=200)
def test_the_drawn_area_is_the_average_precision(
    case: tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]],
) -> None:
    score, label = case
    expected = float(average_precision(score[:, None], label[:, None])[0])
    curve = draw_pr(*pr_steps(score, label), make_line(label, expected))
    assert drawn_area(curve) == pytest.approx(expected, abs=1e-3)


def test_thinning_keeps_the_area() -> None:
    rng = np.random.default_rng(0)
    label = rng.choice(np.array([-1, 0, 1], np.int8), 20_000)
    score = (rng.random(20_000) + 0.3 * label).astype(np.float32)
    steps = pr_steps(score, label)
    thin = thin_steps(*steps, 300)
    assert len(steps[0]) > 5000 and len(thin[0]) == 300 and thin[0][-1] == 1

    def area(recall: npt.NDArray[np.float64], precision: npt.NDArray[np.float64]) -> float:
        return float((np.diff(recall, prepend=0) * precision).sum())

    expected = float(average_precision(score[:, None], label[:, None])[0])
    assert area(*thin) == pytest.approx(expected, abs=1e-12)
    assert area(*thin) == pytest.approx(area(*steps), abs=1e-12)


def test_best_worst_and_most_frequent_have_enough_labels() -> None:
    label = np.ones(MIN_LABELS, np.int8)
    firm = np.concatenate([label, -label])
    lines = [make_line(firm, ap) for ap in (0.5, 0.9, 0.1, 0.7)]
    lines[3]["num_positive"] += 1
    lines += [make_line(np.array([1, -1], np.int8), 1.0), make_line(label, None)]
    rule, groups = choose_curves(lines, count=2)
    assert groups == {"Highest AP": [1, 3], "Lowest AP": [2, 0], "Most positives": [3, 0]}
    assert "the 4 attributes" in rule and f"at least {MIN_LABELS} " in rule
    rule, groups = choose_curves(lines, count=3)  # too few have enough: all that are defined
    assert groups["Highest AP"] == [4, 1, 3] and "the 5 attributes with at least 1 " in rule


def test_without_curves_there_is_a_reason() -> None:
    label = np.ones((3, 1), np.int8)
    score = np.zeros((3, 1), np.float32)
    lines = [make_line(label[:, 0], None)]
    assert "No attribute" in str(draw_pr_curves(lines, score, label, count=2))
    assert draw_pr_curves(lines, score, label, count=0) == "evaluation.curves is 0."
