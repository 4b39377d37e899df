"""Predictions: merging over ranks, checks, and the file."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from vlal_dist.errors import DataError, NotFoundError
from vlal_dist.evaluation.predictions import (
    Predictions,
    label_matrix,
    load_predictions,
    merge_predictions,
    save_predictions,
)
from vlal_dist.storage.store import open_store


def make(rows: list[int], attributes: int = 3) -> Predictions:
    row = np.array(rows, dtype=np.int64)
    random = np.random.default_rng(1)
    score = random.random((20, attributes), dtype=np.float32)[row]
    label = random.integers(-1, 2, (20, attributes)).astype(np.int8)[row]
    return Predictions(row=row, uid=row.astype(np.uint64) + 2**63, score=score, label=label)


def same(left: Predictions, right: Predictions) -> bool:
    names = ("row", "uid", "score", "label")
    return all(np.array_equal(getattr(left, n), getattr(right, n)) for n in names)


def test_ranks_merge_into_row_order() -> None:
    parts = [make([1, 3, 5]), make([4, 0, 2]), make([])]
    assert same(merge_predictions(parts, num_samples=6), make(list(range(6))))


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([[0, 1], [1, 2]], r"1 rows come twice \[1\]"),
        ([[0], [2]], r"1 are missing \[1\]"),
        ([[0, 1, 2, 7]], "1 lie outside"),
        ([[-1, 0, 1, 2]], "1 lie outside"),
    ],
)
def test_rows_twice_missing_or_outside_are_refused(parts: list[list[int]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        merge_predictions([make(part) for part in parts], num_samples=3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.01, 1.5])
def test_scores_outside_0_1_are_refused(bad: float) -> None:
    good = make([4, 5])
    good.score[1, 2] = bad
    with pytest.raises(DataError, match=r"first row 5 .*diverged"):
        Predictions(row=good.row, uid=good.uid, score=good.score, label=good.label)


def test_shapes_that_differ_are_refused() -> None:
    good = make([4, 5])
    with pytest.raises(DataError, match="labels"):
        Predictions(row=good.row, uid=good.uid, score=good.score, label=good.label[:, :2])
    with pytest.raises(DataError, match="as many"):
        Predictions(row=good.row[:1], uid=good.uid, score=good.score, label=good.label)


def test_file_round_trip_and_damage(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    save_predictions(store, "a/predictions.safetensors", make([0, 1]))
    save_predictions(store, "a/predictions.safetensors", make([0, 1, 2]))
    assert same(load_predictions(store, "a/predictions.safetensors"), make([0, 1, 2]))
    with pytest.raises(NotFoundError):
        load_predictions(store, "b/predictions.safetensors")
    store.replace("b", store.read("a/predictions.safetensors")[:-3])
    with pytest.raises(DataError, match="damaged"):
        load_predictions(store, "b")


def test_label_matrix_of_chunked_and_sliced_lists() -> None:
    kind = pa.list_(pa.uint32())
    positive = pa.chunked_array([pa.array([[9], [0, 2], []], kind)[1:], pa.array([[1]], kind)])
    negative = pa.chunked_array([pa.array([[1], [0], []], kind)])
    expected = [[1, -1, 1], [-1, 0, 0], [0, 1, 0]]
    assert label_matrix(positive, negative, width=3).tolist() == expected
