"""Intervals over photos: they contain the mAP, shrink with more photos, and are NaN without AP."""

import numpy as np

from vlal_dist.evaluation.bootstrap import group_intervals
from vlal_dist.evaluation.predictions import Predictions
from vlal_dist.method.metrics import evaluate

GROUPS = {"overall": [0, 1, 2], "first": [0], "empty": [2]}


def predictions(rows: int) -> Predictions:
    rng = np.random.default_rng(2)
    label = rng.choice(np.array([-1, 0, 1], np.int8), (rows, 3), p=[0.6, 0.2, 0.2])
    label[:, 2] = np.abs(label[:, 2])  # no negative: undefined
    score = np.clip(0.5 + 0.15 * label + rng.normal(0, 0.2, label.shape), 0, 1)
    number = np.arange(rows)
    return Predictions(number, number.astype(np.uint64), score.astype(np.float32), label)


def test_they_surround_the_figure_and_shrink_with_more_photos() -> None:
    width = []
    for rows in (60, 600):
        found = predictions(rows)
        intervals = group_intervals(found, np.arange(rows), GROUPS)
        exact = evaluate(found.score, found.label, groups=GROUPS).groups
        for name in ("overall", "first"):
            low, high = intervals[name]
            value = exact[name]["mAP"]
            assert value is not None and 0 <= low < value < high <= 1
        assert np.isnan(intervals["empty"]).all()
        width.append(intervals["overall"][1] - intervals["overall"][0])
    assert width[1] < width[0] / 2


def test_crops_of_one_photo_count_as_one_observation() -> None:
    """Each row ten times, in the same photo or in ten: only the latter narrows the interval."""
    one = predictions(60)
    rows = np.repeat(np.arange(60), 10)
    ten = Predictions(
        np.arange(600), np.arange(600).astype(np.uint64), one.score[rows], one.label[rows]
    )
    alone = group_intervals(one, np.arange(60), GROUPS)["overall"]
    together = group_intervals(ten, rows, GROUPS)["overall"]
    apart = group_intervals(ten, np.arange(600), GROUPS)["overall"]
    np.testing.assert_allclose(together, alone, atol=1e-9)
    assert apart[1] - apart[0] < 0.5 * (alone[1] - alone[0])
