"""Weighted AP against scikit-learn and our own AP; weights and intervals against statistics."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import average_precision_score

import vlal_dist.evaluation.bootstrap as bootstrap
from vlal_dist.evaluation.bootstrap import (
    image_weights,
    interval,
    mean_average_precision,
    weighted_average_precision,
)
from vlal_dist.method.metrics import average_precision, evaluate


@st.composite
def weighted_cases(draw):
    """Few distinct scores, so that ties abound."""
    shape = (draw(st.integers(1, 25)), draw(st.integers(1, 5)))
    label = draw(arrays.arrays(np.int8, shape, elements=st.sampled_from([-1, 0, 1])))
    score = draw(arrays.arrays(np.float32, shape, elements=st.integers(0, 8).map(lambda v: v / 8)))
    replicates = (draw(st.integers(1, 3)), shape[0])
    return score, label, draw(arrays.arrays(np.float64, replicates, elements=st.floats(1e-3, 9)))


def oracle_ap(score, label, weight):
    rows = label != 0
    if not (label > 0).any() or not (label < 0).any():
        return np.nan
    return average_precision_score(label[rows] > 0, score[rows], sample_weight=weight[rows])


@given(weighted_cases())
@settings(deadline=None, max_examples=150)
def test_it_equals_scikit_learns(case):
    score, label, weight = case
    expected = [
        [oracle_ap(score[:, a], label[:, a], row) for a in range(score.shape[1])] for row in weight
    ]
    np.testing.assert_allclose(weighted_average_precision(*case), expected, atol=1e-12)


@given(weighted_cases())
@settings(deadline=None, max_examples=150)
def test_with_weight_one_it_is_the_plain_one(case):
    score, label, weight = case
    found = weighted_average_precision(score, label, np.ones_like(weight))
    defined = (label > 0).any(axis=0) & (label < 0).any(axis=0)
    assert np.array_equal(np.isnan(found), np.tile(~defined, (len(weight), 1)))
    expected = np.tile(average_precision(score, label)[defined], (len(weight), 1))
    np.testing.assert_allclose(found[:, defined], expected, atol=1e-12)


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    score, label = rng.random((300, 20)), rng.integers(-1, 2, (300, 20)).astype(np.int8)
    weight = image_weights(300, replicates=11, seed=1)
    whole = weighted_average_precision(score, label, weight)
    monkeypatch.setattr(bootstrap, "_BLOCK_CELLS", 1000)
    assert np.array_equal(weighted_average_precision(score, label, weight), whole)
    assert np.allclose(whole, weighted_average_precision(score, label, 3 * weight), atol=1e-12)


def test_integer_weights_are_repeated_rows():
    rng = np.random.default_rng(2)
    score, label = rng.random((40, 6)), rng.integers(-1, 2, (40, 6)).astype(np.int8)
    times = rng.integers(1, 4, 40)
    repeated = average_precision(np.repeat(score, times, axis=0), np.repeat(label, times, axis=0))
    found = weighted_average_precision(score, label, times[None].astype(float))
    np.testing.assert_allclose(found[0], repeated, atol=1e-12)


def test_weights_are_positive_with_mean_one_and_keyed_by_seed():
    weight = image_weights(400, replicates=300, seed=3)
    assert weight.shape == (300, 400) and (weight > 0).all()
    assert np.allclose(weight.mean(axis=1), 1)
    # Scaled exponentials: Dirichlet(1, .., 1) times n, of variance (n - 1) / (n + 1).
    assert weight.var() == pytest.approx(399 / 401, abs=0.02)
    assert np.array_equal(weight, image_weights(400, replicates=300, seed=3))
    assert not np.array_equal(weight, image_weights(400, replicates=300, seed=4))


def test_the_mean_is_over_the_classes_of_map():
    rng = np.random.default_rng(4)
    score, label = rng.random((30, 5)), rng.integers(-1, 2, (30, 5)).astype(np.int8)
    label[:, 1] = np.abs(label[:, 1])  # no negative
    label[:, 3] = 0
    ap = weighted_average_precision(score, label, np.ones((2, 30)))
    groups = {"overall": [0, 1, 2, 3, 4], "two": [1, 2], "none": [1, 3], "empty": []}
    for name, found in evaluate(score, label, groups=groups).groups.items():
        expected = np.nan if found["mAP"] is None else found["mAP"]
        np.testing.assert_allclose(mean_average_precision(ap, groups[name]), expected, atol=1e-12)


def test_intervals():
    assert interval(50, np.arange(101.0), 0.9) == pytest.approx((5, 95))
    assert interval(0, np.arange(1001.0)) == pytest.approx((-475, 475))  # about the estimate
    assert np.isnan(interval(1, np.array([1.0, np.nan]))).all()


def test_the_interval_covers_as_often_as_it_says():
    """A central 90 % interval holds the truth in about 90 % of the worlds.

    AP of one attribute with 60 positives of 150 rows, scores two overlapping normals; the truth is
    the mean AP over the worlds.
    """
    rng = np.random.default_rng(5)
    worlds = []
    for seed in range(200):
        label = np.where(rng.random((150, 1)) < 0.4, 1, -1).astype(np.int8)
        score = rng.normal(size=(150, 1)) + label
        weight = image_weights(150, replicates=200, seed=seed)
        ap = weighted_average_precision(score, label, weight)[:, 0]
        estimate = float(average_precision(score, label)[0])
        worlds.append((estimate, *interval(estimate, ap, 0.9)))
    found = np.array(worlds)
    covered = ((found[:, 1] <= found[:, 0].mean()) & (found[:, 0].mean() <= found[:, 2])).mean()
    assert 0.8 < covered < 0.97


def test_attributes_without_both_labels_are_nan_without_a_warning():
    label, one = np.zeros((2, 3), np.int8), np.ones((1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(weighted_average_precision(np.zeros((2, 3)), label, one)).all()
