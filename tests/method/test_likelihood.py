"""Eq. (2) over ragged rows, and the inverse weights of the draw."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlal_dist.errors import ConfigError, DataError
from vlal_dist.method.likelihood import inverse_weights, log_likelihood, rescale


def rows_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


@given(st.lists(st.integers(0, 12), min_size=0, max_size=12), st.sampled_from([0.01, 0.1, 1.0]))
@settings(deadline=None)
def test_rows_are_softmaxes(lengths, temperature):
    indptr = rows_of(lengths)
    similarity = np.random.default_rng(indptr[-1]).uniform(-1, 1, indptr[-1]).astype(np.float32)
    result = log_likelihood(similarity, indptr, temperature=temperature)
    assert result.dtype == np.float32 and len(result) == len(similarity)
    for start, end in itertools.pairwise(indptr):
        scaled = similarity[start:end].astype(np.float64) / temperature
        if len(scaled):
            exact = scaled - scaled.max() - np.log(np.exp(scaled - scaled.max()).sum())
            np.testing.assert_allclose(result[start:end], exact, rtol=1e-6, atol=1e-9)
            assert np.exp(result[start:end].astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)


def test_one_feasible_attribute_is_certain():
    assert log_likelihood(np.float32([0.3]), rows_of([0, 1, 0]), temperature=0.01).tolist() == [0]


def test_rescale_equals_scoring_with_the_other_temperature():
    indptr = rows_of([5, 0, 40])
    similarity = np.random.default_rng(0).normal(0.2, 0.05, 45).astype(np.float32)
    coarse = log_likelihood(similarity, indptr, temperature=0.05)
    fine = rescale(coarse, indptr, temperature_from=0.05, temperature_to=0.01)
    exact = log_likelihood(similarity, indptr, temperature=0.01)
    np.testing.assert_allclose(fine, exact, rtol=1e-6, atol=1e-5)
    same = rescale(exact, indptr, temperature_from=0.01, temperature_to=0.01)
    np.testing.assert_allclose(same, exact, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf])
def test_temperature_out_of_range(temperature):
    with pytest.raises(ConfigError, match="temperature"):
        log_likelihood(np.zeros(1, np.float32), rows_of([1]), temperature=temperature)
    with pytest.raises(ConfigError, match="temperature"):
        rescale(
            np.zeros(1, np.float32), rows_of([1]), temperature_from=temperature, temperature_to=1
        )


@pytest.mark.parametrize("indptr", [[0, 2], [0, 2, 1, 3], [1, 3], []])
def test_rows_that_do_not_fit(indptr):
    values, indptr = np.zeros(3, np.float32), np.array(indptr, np.int64)
    with pytest.raises(DataError, match="indptr"):
        log_likelihood(values, indptr, temperature=1.0)
    with pytest.raises(DataError, match="indptr"):
        inverse_weights(values, indptr)


def test_similarities_must_be_finite():
    with pytest.raises(DataError, match="finite"):
        log_likelihood(np.float32([0, np.nan]), rows_of([2]), temperature=1.0)


def test_inverse_weights_are_accurate_over_the_whole_range():
    rng = np.random.default_rng(0)
    distance = rng.uniform(0, 88.7228, 400_000)
    distance = np.concatenate([[0], distance, 2 ** rng.uniform(-40, 6, 100_000)])
    distance = distance.astype(np.float32)
    found = inverse_weights(-distance, rows_of([len(distance)]))
    assert found.dtype == np.float32
    assert np.abs(found / np.exp(distance.astype(np.float64)) - 1).max() < 3e-7
    assert found[0] == 1 and found.min() == 1
    assert np.isfinite(found).all()


def test_inverse_weights_are_relative_to_each_rows_maximum():
    values = np.float32([-1, -2, -3, -50, -49])
    found = inverse_weights(values, rows_of([3, 0, 2]))
    np.testing.assert_allclose(found, np.exp([0, 1, 2, 1, 0]), rtol=3e-7)


def test_what_cannot_be_drawn_is_infinite():
    values = np.float32([0, np.nan, -np.inf, -88.7, -88.73, -3e38, -np.inf, np.nan, 0])
    found = inverse_weights(values, rows_of([6, 2, 1]))
    drawable = np.isfinite(found)
    assert drawable.tolist() == [True, False, False, True, False, False, False, False, True]
    assert (found[~drawable] == np.inf).all()
    assert not len(inverse_weights(np.zeros(0, np.float32), rows_of([0, 0])))
