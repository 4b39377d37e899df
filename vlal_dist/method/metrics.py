"""Sec. 3.1: average precision and the scores of a split, per attribute and per group.

Only annotated pairs count. Two means of the average precision (AP): `mAP` over attributes with a
defined AP (at least one positive and one negative), and `mAP_vaw` over all attributes by the rule
of VAW's evaluator (no positive: 0; no negative: 1). Numpy only.

mA, mR@k and F1@k follow VAW's evaluator, quirks included. A pair is predicted either above a
threshold or among an instance's k best attributes, annotated or not; only annotated pairs count.
Recall is 0 when nothing is predicted, else -1 without positives; the true negative rate is -1
without negatives; a balanced accuracy is -1 if either is; a group's mean is -1 if any attribute's
value is.

Shapes: N instances, A attributes. Labels +1 present, -1 absent, 0 unannotated.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlal_dist.errors import DataError
from vlal_dist.method.feasible import as_array, checked_labels

_CHUNK_CELLS = 1 << 22  # cells sorted or decided at once; bounds memory

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


def counted_labels(label: NDArray[np.int8], unannotated: str) -> NDArray[np.int8]:
    """Labels as a metric counts them.

    Args:
        label: int8 [N, A].
        unannotated: `excluded`, or `negative`: every unannotated pair, of any object and attribute,
            is absent. Data of tags alone has no other negatives.

    Returns:
        int8 [N, A].
    """
    return np.where(label == 0, np.int8(-1), label) if unannotated == "negative" else label


@dataclass(frozen=True)
class AttributeScores:
    """Per attribute, in attribute order.

    Attributes:
        ap: float64 [A], average precision; 0 without positives, 1 without negatives.
        num_positive: int64 [A].
        num_negative: int64 [A].
        num_unannotated: int64 [A].
    """

    ap: NDArray[np.float64]
    num_positive: NDArray[np.int64]
    num_negative: NDArray[np.int64]
    num_unannotated: NDArray[np.int64]

    @property
    def defined(self) -> NDArray[np.bool_]:
        """Bool [A]: the attribute has a positive and a negative."""
        return (self.num_positive > 0) & (self.num_negative > 0)


@dataclass(frozen=True)
class Evaluation:
    """Scores of a split.

    Attributes:
        groups: group name -> `mAP` (None if no AP is defined), `num_classes` behind it,
            `mAP_vaw` and `num_classes_vaw`, `mA`, `mR@15`, `F1@15` (15: top_k). Shares of 1; -1
            where VAW's evaluator gives -1; None for a group without attributes.
        attributes: scores of each attribute.
        names: of the attributes, if they were given.
    """

    groups: dict[str, dict[str, float | int | None]]
    attributes: AttributeScores
    names: tuple[str, ...] | None = None

    @property
    def mAP(self) -> float | None:
        """Mean AP over all attributes whose AP is defined; None if there is none."""
        return _mean_ap(self.attributes, slice(None))[0]

    @property
    def ap(self) -> dict[str, float | None]:
        """AP by attribute name, or by id as text without names; None where it is not defined."""
        names = self.names or [str(number) for number in range(len(self.attributes.ap))]
        values = zip(names, self.attributes.ap, self.attributes.defined, strict=True)
        return {name: float(value) if defined else None for name, value, defined in values}


def evaluate(
    scores: Any,
    labels: Any,
    names: Sequence[str] | None = None,
    groups: Mapping[str, Sequence[int | str]] | None = None,
    *,
    top_k: int = 15,
    threshold: float = 0.5,
) -> Evaluation:
    """All scores of Sec. 3.1 on a split.

    Args:
        scores: floating [N, A], numpy or torch; in [0, 1] for `mA` to make sense.
        labels: [N, A] of any integer or float type: +1 present, -1 absent, 0 unannotated.
        names: of the A attributes, distinct.
        groups: group name -> attribute ids, or names (`Vocabulary.groups`); None: one group of all
            attributes, `overall`.
        top_k: attributes predicted per instance in mR@k and F1@k, >= 1; at most A are.
        threshold: score above which an attribute is predicted in mA.

    Raises:
        DataError: shapes differ, a score is not finite, a label is not -1, 0 or 1, or a group
            names an attribute that is not there (a ValueError).

    Example:
        >>> import vlal_dist as vlal
        >>> scores = [[0.9, 0.2], [0.6, 0.8], [0.7, 0.1]]
        >>> labels = [[1, -1], [1, 1], [-1, 0]]
        >>> result = vlal.evaluate(scores, labels, names=["red", "wooden"])
        >>> round(result.mAP, 4)
        0.9167
        >>> result.groups["overall"]["num_classes"]
        2
        >>> {name: round(ap, 4) for name, ap in result.ap.items()}
        {'red': 0.8333, 'wooden': 1.0}
    """
    score, label = as_array(scores), checked_labels(as_array(labels))
    if not np.issubdtype(score.dtype, np.floating):
        raise DataError(f"scores: {score.dtype}; give floating [N, A]")
    ap = average_precision(score, label)
    if top_k < 1:
        raise DataError(f"top_k is {top_k}; give 1 or more")
    attributes = AttributeScores(
        ap=ap,
        num_positive=(label > 0).sum(axis=0),
        num_negative=(label < 0).sum(axis=0),
        num_unannotated=(label == 0).sum(axis=0),
    )
    if names is not None and not len(names) == len(set(names)) == len(ap):
        raise DataError(f"names: {len(names)}; give distinct ones for all {len(ap)} attributes")
    above = count_decisions(score, label, lambda rows: rows > threshold)
    top = count_decisions(score, label, lambda rows: select_top_k(rows, top_k))
    results: dict[str, dict[str, float | int | None]] = {}
    for name, members in ({"overall": range(len(ap))} if groups is None else groups).items():
        ids = _attribute_ids(name, members, names, len(ap))
        mean, defined = _mean_ap(attributes, ids)
        vaw = group_scores(above, top, ids) if len(ids) else (None, None, None)
        results[name] = {
            "mAP": mean,
            "num_classes": defined,
            "mAP_vaw": float(ap[ids].mean()) if len(ids) else None,
            "num_classes_vaw": len(ids),
            "mA": vaw[0],
            f"mR@{top_k}": vaw[1],
            f"F1@{top_k}": vaw[2],
        }
    return Evaluation(results, attributes, None if names is None else tuple(names))


def _mean_ap(attributes: AttributeScores, ids: Counts | slice) -> tuple[float | None, int]:
    """Mean over the attributes whose AP is defined, and their number."""
    defined = attributes.ap[ids][attributes.defined[ids]]
    return float(defined.mean()) if len(defined) else None, len(defined)


def _attribute_ids(
    group: str, members: Sequence[int | str], names: Sequence[str] | None, num_attributes: int
) -> Counts:
    """The ids of a group's attributes."""
    by_name = {} if names is None else {name: number for number, name in enumerate(names)}
    ids = []
    for member in members:
        number = by_name.get(member, -1) if isinstance(member, str) else int(member)
        if not 0 <= number < num_attributes:
            raise DataError(
                f"group {group!r} has the attribute {member!r}; give ids in "
                f"0..{num_attributes - 1}, or names that are in `names`"
            )
        ids.append(number)
    return np.asarray(ids, np.int64)


def average_precision(score: NDArray[np.floating], label: NDArray[np.int8]) -> NDArray[np.float64]:
    """AP of each attribute over its annotated instances, as scikit-learn computes it (Sec. 3.1).

    Sum of (R_n - R_(n-1)) P_n over distinct scores, descending; nothing is interpolated.

    Args:
        score: floating [N, A].
        label: int8 [N, A].

    Returns:
        float64 [A]; 0 without positives, 1 without negatives.

    Raises:
        DataError: shapes differ, or a score is not finite.
    """
    if score.shape != label.shape or score.ndim != 2:
        raise DataError(f"scores {score.shape} and labels {label.shape} must be one [N, A]")
    width = max(1, _CHUNK_CELLS // max(1, score.shape[0]))
    result = np.zeros(score.shape[1])
    for start in range(0, score.shape[1], width):
        columns = slice(start, start + width)
        result[columns] = _average_precision(score[:, columns], label[:, columns])
    return result


def _average_precision(score: NDArray[np.floating], label: NDArray[np.int8]) -> NDArray[np.float64]:
    """AP of a few columns: annotated pairs end to end, attribute by attribute, best score first."""
    num_attributes = label.shape[1]
    column, row = np.nonzero(label.T)
    if not np.isfinite(score).all():
        raise DataError("a score is not finite; predict again with a model whose loss is finite")
    value, positive = score[row, column], label[row, column] > 0
    order = np.lexsort((-value, column))
    column, value, positive = column[order], value[order], positive[order]
    size = np.bincount(column, minlength=num_attributes)
    total = np.bincount(column[positive], minlength=num_attributes)
    before = np.cumsum(size) - size
    rank = np.arange(1, len(column) + 1) - before[column]
    found = np.cumsum(positive) - (np.cumsum(total) - total)[column]
    # A threshold is the last of a run of equal scores of one attribute.
    last = np.ones(len(column), np.bool_)
    last[:-1] = (value[1:] != value[:-1]) | (column[1:] != column[:-1])
    column, rank, found = column[last], rank[last], found[last]
    first = np.ones(len(column), np.bool_)
    first[1:] = column[1:] != column[:-1]
    gained = found - np.where(first, 0, np.roll(found, 1))
    return np.bincount(column, gained * (found / rank), num_attributes) / np.maximum(total, 1)


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
        hits, refused = (positive & predicted, negative & predicted), ~predicted
        for index, cell in enumerate((*hits, negative & refused, positive & refused)):
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
    recall, negatives = _recall(above), above.fp + above.tn
    rate = np.where(negatives > 0, above.tn / np.maximum(negatives, 1), -1.0)
    accuracy = np.where((recall == -1) | (rate == -1), -1.0, (recall + rate) / 2)
    means = [
        -1.0 if (v == -1).any() else float(v.mean()) for v in (accuracy[ids], _recall(top)[ids])
    ]
    return means[0], means[1], float(_f1(pooled)[0])


def _recall(d: Decisions) -> Floats:
    positives, predicted = d.tp + d.fn, d.tp + d.fp
    value = np.where(positives > 0, d.tp / np.maximum(positives, 1), -1.0)
    return np.where(predicted == 0, 0.0, value)


def _f1(d: Decisions) -> Floats:
    """2PR / (P + R), 0 if that sum is not positive; precision is 1 when nothing is predicted."""
    predicted = d.tp + d.fp
    precision = np.where(predicted == 0, 1.0, d.tp / np.maximum(predicted, 1))
    recall = _recall(d)
    total = precision + recall
    return np.where(total > 0, 2 * precision * recall / np.where(total > 0, total, 1.0), 0.0)
