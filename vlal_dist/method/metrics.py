"""Sec. 3.1: average precision and the scores of a split, per attribute and per group.

Only annotated pairs count. Two means of the average precision (AP): `mAP` over attributes with a
defined AP (at least one positive and one negative), and `mAP_vaw` over all attributes by the rule
of VAW's evaluator (no positive: 0; no negative: 1); its others: `vaw_scores.py`. Numpy only.

Shapes: N instances, A attributes. Labels +1 present, -1 absent, 0 unannotated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlal_dist.errors import DataError
from vlal_dist.method.vaw_scores import count_decisions, group_scores, select_top_k

_CHUNK_CELLS = 1 << 22  # cells sorted at once; bounds memory


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
        """Bool [A]: the AP says something, there being a positive and a negative."""
        return (self.num_positive > 0) & (self.num_negative > 0)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_scores` finds.

    Attributes:
        groups: group name -> `mAP` (None if no AP is defined), `num_classes` behind it,
            `mAP_vaw` and `num_classes_vaw`, `mA`, `mR@15`, `F1@15` (15: top_k). Shares of 1; -1
            where VAW's evaluator says so; None for a group without attributes.
        attributes: the attributes' own.
    """

    groups: dict[str, dict[str, float | int | None]]
    attributes: AttributeScores


def evaluate_scores(
    score: NDArray[np.floating],
    label: NDArray[np.int8],
    groups: Mapping[str, Sequence[int]],
    *,
    top_k: int = 15,
    threshold: float = 0.5,
) -> Evaluation:
    """All scores of Sec. 3.1 on a split.

    Args:
        score: floating [N, A], in [0, 1] for `mA` to make sense.
        label: int8 [N, A].
        groups: group name -> attribute ids (`Vocabulary.groups`).
        top_k: attributes predicted per instance in mR@k and F1@k; at most A are.
        threshold: score above which an attribute is predicted in mA.

    Raises:
        DataError: shapes differ, or a score is not finite.
    """
    attributes = AttributeScores(
        ap=average_precision(score, label),
        num_positive=(label > 0).sum(axis=0),
        num_negative=(label < 0).sum(axis=0),
        num_unannotated=(label == 0).sum(axis=0),
    )
    above = count_decisions(score, label, lambda rows: rows > threshold)
    top = count_decisions(score, label, lambda rows: select_top_k(rows, top_k))
    results: dict[str, dict[str, float | int | None]] = {}
    for name, members in groups.items():
        ids = np.asarray(members, np.int64)
        defined = attributes.ap[ids][attributes.defined[ids]]
        vaw = group_scores(above, top, ids) if len(ids) else (None, None, None)
        results[name] = {
            "mAP": float(defined.mean()) if len(defined) else None,
            "num_classes": len(defined),
            "mAP_vaw": float(attributes.ap[ids].mean()) if len(ids) else None,
            "num_classes_vaw": len(ids),
            "mA": vaw[0],
            f"mR@{top_k}": vaw[1],
            f"F1@{top_k}": vaw[2],
        }
    return Evaluation(groups=results, attributes=attributes)


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
