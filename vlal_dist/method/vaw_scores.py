"""Sec. 3.1: mA, mR@k and F1@k by the rules of VAW's evaluator, quirks included.

A pair is predicted either above a threshold or among an instance's k best attributes, annotated
or not. Only annotated pairs are counted. The rules for what is undefined: recall is 0 when nothing
is predicted, else -1 without positives; the true negative rate is -1 without negatives; a
balanced accuracy is -1 if either is; a group's mean is -1 if any attribute's value is.

Shapes: N instances, A attributes. Labels +1, -1, 0. Numpy only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_CHUNK_CELLS = 1 << 22  # cells decided at once; bounds memory

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Decisions:
    """Counts over annotated pairs, int64 [A]: true or false, positive or negative decisions."""

    tp: Counts
    fp: Counts
    tn: Counts
    fn: Counts


def select_top_k(score: NDArray[np.floating], top_k: int) -> NDArray[np.bool_]:
    """Bool [N, A]: the top_k highest scores of each row, ties to the lower attribute.

    As in the evaluator, a chosen score of 0 or below does not count as predicted.

    Args:
        score: floating [N, A].
        top_k: >= 1; at most A are chosen.
    """
    k = min(top_k, score.shape[1])
    if k == 0:
        return np.zeros(score.shape, np.bool_)
    kth = np.partition(score, -k, axis=1)[:, -k, None]
    above, tied = score > kth, score == kth
    places = k - above.sum(axis=1, keepdims=True)
    chosen: NDArray[np.bool_] = above | (tied & (np.cumsum(tied, axis=1) <= places))
    return chosen & (score > 0)


def count_decisions(
    score: NDArray[np.floating],
    label: NDArray[np.int8],
    decide: Callable[[NDArray[np.floating]], NDArray[np.bool_]],
) -> Decisions:
    """Count right and wrong decisions of each attribute.

    Args:
        score: floating [N, A].
        label: int8 [N, A].
        decide: rows of scores [n, A] -> bool [n, A], predicted or not.
    """
    num_attributes = score.shape[1]
    totals = np.zeros((4, num_attributes), np.int64)
    height = max(1, _CHUNK_CELLS // max(1, num_attributes))
    for start in range(0, len(score), height):
        predicted = decide(score[start : start + height])
        positive, negative = label[start : start + height] > 0, label[start : start + height] < 0
        for index, cell in enumerate(
            (
                positive & predicted,
                negative & predicted,
                negative & ~predicted,
                positive & ~predicted,
            )
        ):
            totals[index] += cell.sum(axis=0)
    return Decisions(*totals)


def group_scores(
    above: Decisions, top: Decisions, ids: NDArray[np.int64]
) -> tuple[float, float, float]:
    """mA, mR@k and F1@k of a group of attributes.

    Args:
        above: decisions by threshold.
        top: decisions by rank.
        ids: attribute ids of the group, at least one.

    Returns:
        Mean balanced accuracy by threshold, mean recall by rank, and F1 by rank of the pooled
        counts.
    """
    pooled = Decisions(
        *(counts[ids].sum(keepdims=True) for counts in (top.tp, top.fp, top.tn, top.fn))
    )
    accuracy, recall = _balanced_accuracy(above)[ids], _recall(top)[ids]
    return _guarded_mean(accuracy), _guarded_mean(recall), float(_f1(pooled)[0])


def _recall(d: Decisions) -> Floats:
    positives, predicted = d.tp + d.fn, d.tp + d.fp
    value = np.where(positives > 0, d.tp / np.maximum(positives, 1), -1.0)
    return np.where(predicted == 0, 0.0, value)


def _true_negative_rate(d: Decisions) -> Floats:
    negatives = d.fp + d.tn
    return np.where(negatives > 0, d.tn / np.maximum(negatives, 1), -1.0)


def _balanced_accuracy(d: Decisions) -> Floats:
    recall, rate = _recall(d), _true_negative_rate(d)
    return np.where((recall == -1) | (rate == -1), -1.0, (recall + rate) / 2)


def _f1(d: Decisions) -> Floats:
    """2PR / (P + R), 0 if that sum is not positive; precision is 1 when nothing is predicted."""
    predicted = d.tp + d.fp
    precision = np.where(predicted == 0, 1.0, d.tp / np.maximum(predicted, 1))
    recall = _recall(d)
    total = precision + recall
    return np.where(total > 0, 2 * precision * recall / np.where(total > 0, total, 1.0), 0.0)


def _guarded_mean(values: Floats) -> float:
    return -1.0 if (values == -1).any() else float(values.mean())
