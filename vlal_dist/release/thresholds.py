"""Decision thresholds of each attribute, which maximise F1 on the validation split.

Only annotated pairs count, as in mAP (Sec. 3.1): among all attributes of a crop, unlikely ones
included, precision is lower than here.

Shapes: N samples, A attributes.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vlal_dist.errors import DataError

_COLUMNS = ("value", "own", "num_positive", "num_negative")
"""The fields of `Thresholds` that have an entry per attribute."""


@dataclass(frozen=True)
class Thresholds:
    """Thresholds in attribute order.

    Attributes:
        value: A thresholds in (0, 1): present where the probability is at least that.
        own: whether each is the attribute's own, or the pooled one.
        num_positive, num_negative: annotated pairs of the attribute.
        pooled: the threshold of all attributes together.
        split: learned on.
        min_annotated: positives, and negatives, that an own threshold needed.
    """

    value: list[float]
    own: list[bool]
    num_positive: list[int]
    num_negative: list[int]
    pooled: float
    split: str
    min_annotated: int

    def describe(self) -> str:
        """In a few words, for summaries."""
        return f"{sum(self.own)} own, {len(self.own) - sum(self.own)} pooled ({self.pooled:.3f})"


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
    score: npt.NDArray[np.float32],
    label: npt.NDArray[np.int8],
    *,
    split: str,
    min_annotated: int,
) -> Thresholds | str:
    """A threshold for each attribute, or the reason why there is none.

    Args:
        score: float32 [N, A], probabilities.
        label: int8 [N, A]; +1 annotated present, -1 annotated absent, 0 unannotated.
        split: name of the split, for the record.
        min_annotated: attributes with fewer positives, or fewer negatives, take the pooled
            threshold.
    """
    annotated = label != 0
    num_positive, num_negative = (label > 0).sum(axis=0), (label < 0).sum(axis=0)
    if not num_positive.sum() or not num_negative.sum():
        return f"the split {split} has no annotated positive, or no annotated negative"
    pooled, _ = best_threshold(score[annotated], label[annotated] > 0)
    own = (num_positive >= min_annotated) & (num_negative >= min_annotated)
    value = np.full(label.shape[1], pooled)
    for attribute in np.flatnonzero(own):
        rows = annotated[:, attribute]
        value[attribute], _ = best_threshold(score[rows, attribute], label[rows, attribute] > 0)
    return Thresholds(
        value=value.tolist(),
        own=own.tolist(),
        num_positive=num_positive.tolist(),
        num_negative=num_negative.tolist(),
        pooled=pooled,
        split=split,
        min_annotated=min_annotated,
    )


def encode_thresholds(thresholds: Thresholds, attributes: tuple[str, ...]) -> bytes:
    """`thresholds.json`: a record for each attribute, by name."""
    values = asdict(thresholds)
    per_attribute = zip(*(values.pop(column) for column in _COLUMNS), strict=True)
    values["attributes"] = {
        name: dict(zip(_COLUMNS, record, strict=True))
        for name, record in zip(attributes, per_attribute, strict=True)
    }
    return (json.dumps(values, indent=1) + "\n").encode()


def decode_thresholds(data: bytes, attributes: tuple[str, ...], *, where: str) -> Thresholds:
    """Read what `encode_thresholds` wrote.

    Raises:
        DataError: other attributes, or damaged.
    """
    try:
        values: dict[str, Any] = json.loads(data)
        records = values.pop("attributes")
        for column in _COLUMNS:
            values[column] = [record[column] for record in records.values()]
        thresholds = Thresholds(**values)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where} is damaged ({error}); export again") from None
    if tuple(records) != attributes:
        raise DataError(f"{where} has other attributes than the model; export again")
    return thresholds
