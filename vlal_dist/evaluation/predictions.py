"""Scores and labels of one split as arrays: merge over ranks, check, save, load.

VAW's test split, 21,082 x 591, takes 62 MB of memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import safetensors.numpy

from vlal_dist.contents import shown
from vlal_dist.errors import DataError, VlalError, bounded
from vlal_dist.method.metrics import counted_labels
from vlal_dist.storage.store import Store

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Predictions:
    """Scores and labels of N samples and A attributes.

    Attributes:
        row: int64 [N], row of the split's index.
        uid: uint64 [N].
        score: float32 [N, A] in [0, 1].
        label: int8 [N, A], +1 annotated present, -1 annotated absent, 0 unannotated.

    Raises:
        DataError: shapes differ, or a score lies outside [0, 1] or is no number.
    """

    row: Int64
    uid: UInt64
    score: Float32
    label: Int8

    def __post_init__(self) -> None:
        if self.score.shape != self.label.shape or self.score.ndim != 2:
            raise DataError(
                f"predictions: scores have shape {self.score.shape}, labels {self.label.shape}; "
                "both must be [samples, attributes]: evaluate again"
            )
        if not len(self.row) == len(self.uid) == len(self.score):
            raise DataError(
                f"predictions: {len(self.row)} rows, {len(self.uid)} uids and "
                f"{len(self.score)} scores must be as many: evaluate again"
            )
        bad = ~((self.score >= 0) & (self.score <= 1)).all(axis=1)
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            raise DataError(
                f"predictions: {int(bad.sum())} of {len(self.row)} samples, first row "
                f"{self.row[first]} (uid {self.uid[first]}), have a score outside [0, 1] or no "
                "number: the model has diverged; train with a lower rate or take older weights"
            )


def merge_predictions(parts: Sequence[Predictions], *, num_samples: int) -> Predictions:
    """Join the predictions of all ranks, in row order.

    Args:
        parts: predictions of disjoint rows, in any order; some may be empty.
        num_samples: N of the whole split; rows must be exactly 0 .. N-1.

    Raises:
        DataError: a row occurs twice or is missing; the first such rows are named.
    """
    whole = concatenate(parts)
    row = whole.row
    in_range = row[(row >= 0) & (row < num_samples)]
    times = np.bincount(in_range, minlength=num_samples)
    doubled, missed = np.flatnonzero(times > 1), np.flatnonzero(times == 0)
    foreign = len(row) - len(in_range)
    if len(doubled) or len(missed) or foreign:
        raise DataError(
            f"predictions of {num_samples} samples: {len(doubled)} rows come twice "
            f"{doubled[:3].tolist()}, {len(missed)} are missing {missed[:3].tolist()}, {foreign} "
            "lie outside the split; every row must come once: evaluate again, and report this"
        )
    order = np.argsort(row, kind="stable")
    return Predictions(row[order], whole.uid[order], whole.score[order], whole.label[order])


def concatenate(parts: Sequence[Predictions]) -> Predictions:
    """Predictions one after another; at least one."""
    return Predictions(
        row=np.concatenate([part.row for part in parts]),
        uid=np.concatenate([part.uid for part in parts]),
        score=np.concatenate([part.score for part in parts]),
        label=np.concatenate([part.label for part in parts]),
    )


def as_counted(predictions: Predictions, unannotated: str) -> Predictions:
    """The same with the labels that metrics count (`method.metrics.counted_labels`)."""
    return replace(predictions, label=counted_labels(predictions.label, unannotated))


def label_matrix(positive: pa.ChunkedArray, negative: pa.ChunkedArray, *, width: int) -> Int8:
    """Two list<uint32> columns of attribute ids to int8 [N, width] of +1, -1, 0."""
    label = np.zeros((len(positive), width), dtype=np.int8)
    for column, value in ((positive, 1), (negative, -1)):
        lists = column.combine_chunks()
        row = np.repeat(np.arange(len(lists)), np.diff(lists.offsets.to_numpy()))
        label[row, lists.flatten().to_numpy()] = value
    return label


def save_predictions(store: Store, key: str, predictions: Predictions) -> None:
    """Write `predictions.safetensors` (docs/formats.md); an earlier one is replaced."""
    store.replace(key, safetensors.numpy.save(dict(vars(predictions))))


def load_predictions(store: Store, key: str) -> Predictions:
    """Read what `save_predictions` wrote.

    Raises:
        NotFoundError: there is none.
        DataError: the file is damaged or holds other arrays.
    """
    try:
        arrays = safetensors.numpy.load(store.read(key))
        found = {name: (str(array.dtype), array.ndim) for name, array in arrays.items()}
        if found != _ARRAYS:
            raise ValueError(f"arrays {shown(found)}, expected {_ARRAYS}")
        if np.abs(arrays["label"].astype(np.int16)).max(initial=0) > 1:
            raise ValueError("a label is none of -1, 0, 1")
        return Predictions(**arrays)
    except VlalError:
        raise
    except Exception as error:  # tensors of others raise any type, OverflowError too
        raise DataError(
            f"{store.url}: {key} is damaged or incomplete ({bounded(str(error))}); "
            "run vlal evaluate again"
        ) from None


_ARRAYS = {"row": ("int64", 1), "uid": ("uint64", 1), "score": ("float32", 2), "label": ("int8", 2)}
"""Name -> type and number of dimensions, docs/formats.md."""
