"""Decision thresholds of each attribute, which maximise F1 on the validation split.

Only annotated pairs count, as in mAP (Sec. 3.1): among all attributes of a crop, unlikely ones
included, precision is lower than here.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from vlal_dist.contents import Count, Share, parse_json
from vlal_dist.errors import DataError
from vlal_dist.evaluation.predictions import Predictions


@dataclass(frozen=True)
class AttributeThreshold:
    """The threshold of one attribute.

    Attributes:
        value: in (0, 1): present where the probability is at least that.
        own: whether it is the attribute's own, or the pooled one.
        num_positive, num_negative: annotated pairs of the attribute.
    """

    value: Share
    own: bool
    num_positive: Count
    num_negative: Count


@dataclass(frozen=True)
class Thresholds:
    """The content of `thresholds.json`.

    Attributes:
        pooled: the threshold of all attributes together.
        split: learned on.
        min_annotated: positives, and negatives, that an own threshold needed.
        attributes: by name, in id order.
    """

    pooled: Share
    split: str
    min_annotated: Count
    attributes: dict[str, AttributeThreshold]

    def describe(self) -> str:
        """A few words for summaries."""
        own = sum(one.own for one in self.attributes.values())
        return f"{own} own, {len(self.attributes) - own} pooled ({self.pooled:.3f})"


def best_threshold(
    score: npt.NDArray[np.float32], positive: npt.NDArray[np.bool_]
) -> tuple[float, float]:
    """The threshold that maximises F1 = 2 TP / (2 TP + FP + FN), and that F1.

    It lies halfway between two neighbouring scores (below the lowest: halfway to 0), so that
    rounding elsewhere moves no sample across it. Ties: the highest threshold.

    Args:
        score: float32 [n] in [0, 1].
        positive: bool [n], at least one true.
    """
    order = np.argsort(-score, kind="stable")
    ranked = score[order].astype(np.float64)
    found = np.cumsum(positive[order])
    called = np.arange(1, len(ranked) + 1)
    f1 = 2 * found / (called + found[-1])
    # No threshold separates equal scores.
    f1[:-1][ranked[1:] == ranked[:-1]] = -1
    best = int(np.argmax(f1))
    below = np.append(ranked[1:], 0.0)
    return float((ranked[best] + below[best]) / 2), float(f1[best])


def learn_thresholds(
    predictions: Predictions, names: Sequence[str], *, split: str, min_annotated: int
) -> Thresholds | str:
    """A threshold for each attribute, or the reason why there is none.

    Args:
        predictions: of N samples and A attributes.
        names: of the attributes.
        split: name of the split, for the record.
        min_annotated: attributes with fewer positives, or fewer negatives, take the pooled
            threshold.
    """
    score, label = predictions.score, predictions.label
    annotated = label != 0
    num_positive, num_negative = (label > 0).sum(axis=0), (label < 0).sum(axis=0)
    if not num_positive.sum() or not num_negative.sum():
        return f"the split {split} has no annotated positive, or no annotated negative"
    pooled, _ = best_threshold(score[annotated], label[annotated] > 0)
    attributes = {}
    for column, name in enumerate(names):
        counts = int(num_positive[column]), int(num_negative[column])
        value, own = pooled, min(counts) >= min_annotated
        if own:
            rows = annotated[:, column]
            value, _ = best_threshold(score[rows, column], label[rows, column] > 0)
        attributes[name] = AttributeThreshold(value, own, *counts)
    return Thresholds(pooled, split, min_annotated, attributes)


def encode_thresholds(thresholds: Thresholds) -> bytes:
    """`thresholds.json`."""
    return (json.dumps(asdict(thresholds), indent=1) + "\n").encode()


def decode_thresholds(data: bytes, names: Sequence[str], *, where: str) -> Thresholds:
    """Read what `encode_thresholds` wrote; DataError: damaged, or other attributes than `names`."""
    thresholds: Thresholds = parse_json(data, Thresholds, where=where, remedy="export again")
    if list(thresholds.attributes) != list(names):
        raise DataError(f"{where} has other attributes than the model; export again")
    return thresholds
