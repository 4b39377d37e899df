"""Confidence intervals of mAP from a Bayesian bootstrap over the photos of a split.

Rubin, The Bayesian Bootstrap, Annals of Statistics 1981: each replicate draws a weight for each
photo, and computes the AP of each attribute with these weights. Numpy only.

Shapes: N rows (crops), A attributes, R replicates. Labels +1 present, -1 absent, 0 unannotated.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vlal_dist.evaluation.predictions import Predictions

_BLOCK_CELLS = 1 << 18  # weights held beside each other; stays in a core's cache


def image_weights(num_images: int, *, replicates: int, seed: int) -> NDArray[np.float64]:
    """Weights of the photos in each replicate: exponential(1), scaled to mean 1 (Rubin 1981).

    Drawing photos with replacement would leave a rare attribute without any positive in a third of
    the replicates (a single positive: exp(-1)), so that the list of classes behind the mean would
    change from one replicate to the next. These weights are all positive: the list stays.

    The photo is the sampling unit: rows of one photo share its weight,
    `image_weights(...)[:, image_numbers(split)]`.

    Args:
        num_images: photos of the split.
        replicates: R.
        seed: equal seeds give equal weights, for paired comparisons.

    Returns:
        float64 [R, num_images], positive, mean 1 in each row.
    """
    drawn = np.random.default_rng(seed).exponential(size=(replicates, num_images))
    drawn = np.maximum(drawn, np.finfo(np.float64).tiny)  # 0 has a probability, though a tiny one
    scaled: NDArray[np.float64] = drawn / drawn.mean(axis=1, keepdims=True)
    return scaled


def weighted_average_precision(
    score: NDArray[np.floating], label: NDArray[np.int8], weight: NDArray[np.floating]
) -> NDArray[np.float64]:
    """AP of each attribute in each replicate, over its annotated rows (Sec. 3.1).

    As `method.metrics.average_precision` (scikit-learn's rule: equal scores are one threshold),
    with each row counted by its weight.

    Args:
        score: floating [N, A], finite.
        label: int8 [N, A].
        weight: floating [R, N], positive.

    Returns:
        float64 [R, A]; NaN for attributes without a positive or without a negative, those that
        `mAP` leaves out.
    """
    result = np.full((len(weight), score.shape[1]), np.nan)
    ranked = [_rank(score[:, a], label[:, a]) for a in range(score.shape[1])]
    width = max(1, _BLOCK_CELLS // max(1, len(score)))
    for start in range(0, len(weight), width):
        # Rows of a photo side by side in memory: a gather then copies whole lines.
        block = np.ascontiguousarray(weight[start : start + width].T, dtype=np.float64)
        for attribute, one in enumerate(ranked):
            if one is None:
                continue
            order, positive, last, stop = one
            ordered = block[order]
            found = np.cumsum(ordered[positive], axis=0)[last]
            above = np.cumsum(ordered, axis=0)[stop]
            gained = np.diff(found, axis=0, prepend=0.0)
            ap = (gained * (found / above)).sum(axis=0) / found[-1]
            result[start : start + width, attribute] = ap
    return result


def mean_average_precision(
    ap: NDArray[np.float64], ids: Sequence[int] | NDArray[np.integer]
) -> NDArray[np.float64]:
    """`mAP` of a group of attributes in each replicate: the mean over those with a defined AP.

    Args:
        ap: float64 [R, A], NaN where undefined, in all replicates or in none.
        ids: attribute ids of the group.

    Returns:
        float64 [R]; NaN if no AP of the group is defined.
    """
    chosen = ap[:, np.asarray(ids, np.int64)]
    chosen = chosen[:, ~np.isnan(chosen).any(axis=0)]
    return chosen.mean(axis=1) if chosen.shape[1] else np.full(len(ap), np.nan)


def interval(
    estimate: float, replicates: NDArray[np.float64], level: float = 0.95
) -> tuple[float, float]:
    """The central share `level` of the replicates, shifted so that their mean is the estimate.

    The weight of a positive raises both its share of the recall and the precision there, so that
    replicates of a mAP lie above the mAP itself, at times nearly all of them (Efron, Tibshirani,
    An Introduction to the Bootstrap, 1993, ch. 10: the estimate of bias). Only their spread counts.

    Args:
        estimate: with equal weights.
        replicates: float64 [R].
        level: share, within (0, 1).

    Returns:
        Its ends; NaN if a value is.
    """
    moved = replicates - replicates.mean() + estimate
    low, high = np.quantile(moved, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


_Ranked = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def _rank(score: NDArray[np.floating], label: NDArray[np.int8]) -> _Ranked | None:
    """The part of an attribute's AP that no weight changes; None where the AP is undefined.

    Returns:
        order: annotated rows, best score first.
        positive: places of the positives in `order`.
        last: per threshold at which a positive is found, place in `positive` of its last one.
        stop: per such threshold, place in `order` of its last row.
    """
    rows = np.flatnonzero(label)
    order = rows[np.argsort(-score[rows], kind="stable")]
    is_positive = label[order] > 0
    positive = np.flatnonzero(is_positive)
    if len(positive) in (0, len(order)):
        return None
    value = score[order]
    ends = np.append(np.flatnonzero(value[1:] != value[:-1]), len(order) - 1)
    found = np.cumsum(is_positive)[ends]
    gains = np.diff(found, prepend=0) > 0
    return order, positive, found[gains] - 1, ends[gains]


REPLICATES = 1000
SEED = 0
_AT_ONCE = 100  # replicates; bounds memory: their weights over VAW's test split take 17 MB


def group_intervals(
    predictions: Predictions,
    image: NDArray[np.int64],
    groups: Mapping[str, Sequence[int]],
) -> dict[str, tuple[float, float]]:
    """95 % intervals of each group's mAP, from `REPLICATES` replicates over the photos.

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
