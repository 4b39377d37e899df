"""Intervals of a result's mAP: what other photos of the same kind could have given (Table 1)."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from vlal_dist.evaluation.bootstrap import (
    image_weights,
    interval,
    mean_average_precision,
    weighted_average_precision,
)
from vlal_dist.evaluation.predictions import Predictions

REPLICATES = 1000
SEED = 0
_AT_ONCE = 100  # replicates; bounds memory: their weights over VAW's test split take 17 MB


def group_intervals(
    predictions: Predictions,
    image: npt.NDArray[np.int64],
    groups: Mapping[str, Sequence[int]],
) -> dict[str, tuple[float, float]]:
    """Each group's mAP, less and more by the spread of bootstrap replicates over the photos.

    The central 95 % of `REPLICATES` replicates, about the mAP (`bootstrap.interval`).

    Args:
        predictions: of a split, N rows.
        image: int64 [N], number of each row's photo, from 0 without gaps.
        groups: group name -> attribute ids.

    Returns:
        Group name -> ends, within [0, 1]; NaN where no AP of the group is defined.
    """
    score, label = predictions.score, predictions.label
    weights = image_weights(int(image.max()) + 1, replicates=REPLICATES, seed=SEED)
    ap = np.concatenate(
        [
            weighted_average_precision(score, label, weights[start : start + _AT_ONCE, image])
            for start in range(0, REPLICATES, _AT_ONCE)
        ]
    )
    plain = weighted_average_precision(score, label, np.ones((1, len(score))))
    found = {}
    for name, ids in groups.items():
        estimate = float(mean_average_precision(plain, ids)[0])
        low, high = np.clip(interval(estimate, mean_average_precision(ap, ids)), 0.0, 1.0)
        found[name] = (float(low), float(high))
    return found
