"""Thresholds against an exhaustive search, and which attributes have one of their own."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from vlal_dist.errors import DataError
from vlal_dist.evaluation.predictions import Predictions
from vlal_dist.release.thresholds import (
    Thresholds,
    best_threshold,
    decode_thresholds,
    encode_thresholds,
    learn_thresholds,
)

NAMES = ("red", "round", 'od"d', "soft")


@pytest.mark.parametrize("seed", range(8))
def test_no_other_threshold_has_a_higher_f1(seed: int) -> None:
    random = np.random.default_rng(seed)
    # Few distinct values: ties inside and outside of the best cut.
    score = random.integers(0, 12, 40).astype(np.float32) / 12
    positive = random.random(40) < 0.3
    positive[0] = True
    threshold, f1 = best_threshold(score, positive)
    assert f1 == pytest.approx(f1_score(positive, score >= threshold))
    between = (np.arange(14) - 0.5) / 12  # one in every gap: no other gives another prediction
    tried = [f1_score(positive, score >= t, zero_division=0) for t in between]
    assert f1 == pytest.approx(max(tried))


def test_it_lies_between_scores_and_the_highest_of_equals_is_taken() -> None:
    score = np.array([0.9, 0.8, 0.3, 0.1], np.float32)
    threshold, f1 = best_threshold(score, np.array([True, True, False, False]))
    assert (threshold, f1) == (pytest.approx(0.55), 1.0)
    # F1 is 2/3 after the first and after the second positive.
    threshold, f1 = best_threshold(score, np.array([True, False, False, True]))
    assert (threshold, f1) == (pytest.approx(0.85), pytest.approx(2 / 3))
    assert best_threshold(score, np.ones(4, np.bool_)) == (pytest.approx(0.05), 1.0)
    assert best_threshold(np.zeros(2, np.float32), np.array([True, False]))[0] == 0


def predictions(score: np.ndarray, label: np.ndarray) -> Predictions:
    row = np.arange(len(score))
    return Predictions(row, row.astype(np.uint64), score, label)


def own(thresholds: Thresholds) -> list[bool]:
    return [one.own for one in thresholds.attributes.values()]


def learned(min_annotated: int = 3) -> Thresholds:
    random = np.random.default_rng(1)
    label = random.choice(np.array([-1, 0, 1], np.int8), size=(60, len(NAMES)))
    label[:, 1] = np.where(np.arange(60) < 2, 1, np.minimum(label[:, 1], 0))  # two positives
    label[:, 2] = np.maximum(label[:, 2], 0)  # no negative: F1 would call everything present
    score = random.random((60, len(NAMES))).astype(np.float32)
    score[label == 0] = 1.0  # unannotated pairs must not count
    found = learn_thresholds(
        predictions(score, label), NAMES, split="val", min_annotated=min_annotated
    )
    assert isinstance(found, Thresholds) and tuple(found.attributes) == NAMES
    rows = label[:, 0] != 0
    assert found.attributes["red"].value == best_threshold(score[rows, 0], label[rows, 0] > 0)[0]
    assert found.pooled == best_threshold(score[label != 0], label[label != 0] > 0)[0]
    return found


def test_few_annotations_take_the_pooled_threshold() -> None:
    found = learned()
    assert own(found) == [True, False, False, True]
    assert found.attributes["round"].value == found.attributes['od"d'].value == found.pooled
    assert "2 own, 2 pooled" in found.describe()
    assert own(learned(min_annotated=1)) == [True, True, False, True]


def test_without_annotations_there_is_a_reason() -> None:
    label = np.array([[1, 0]], np.int8)
    one = predictions(np.ones((1, 2), np.float32), label)
    found = learn_thresholds(one, NAMES[:2], split="val", min_annotated=1)
    assert isinstance(found, str) and "no annotated negative" in found


def test_the_file_reads_back_and_belongs_to_its_attributes() -> None:
    found = learned()
    data = encode_thresholds(found)
    assert decode_thresholds(data, NAMES, where="here") == found
    with pytest.raises(DataError, match="other attributes"):
        decode_thresholds(data, NAMES[::-1], where="here")
    with pytest.raises(DataError, match="damaged"):
        decode_thresholds(data.replace(b'"own"', b'"won"'), NAMES, where="here")
