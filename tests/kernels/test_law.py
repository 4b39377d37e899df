"""The law of the compiled draw: that of Fig. 3, one attribute after another without replacement.

Every statistic is also shown laws that are nearly right, and must refuse them. One backend is
enough: all compiled ones draw the same bits (test_draw.py). Seeds are fixed, so nothing here fails
by chance.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from tests.fixtures.draw_statistics import (
    HIGH,
    LOW,
    REFUSED,
    axis,
    chi_square_p,
    drawn_ids,
    indicators,
)
from tests.fixtures.loss_batches import FUSED
from tests.fixtures.wide_matrix import some_of

pytestmark = pytest.mark.skipif(not FUSED, reason="no C++ compiler")
ROWS = 1_000_000


def set_probabilities(weight, k):
    """Exact probability of each set, by enumeration of the orders in which it is drawn."""
    result: dict[int, float] = {}
    for order in itertools.permutations(range(len(weight)), k):
        left, probability = math.fsum(weight), 1.0
        for n, item in enumerate(order):
            probability *= weight[item] / left
            # Not by subtraction: what is left may be 1e-30 of what was there.
            left = math.fsum(w for i, w in enumerate(weight) if i not in order[: n + 1])
        code = sum(1 << item for item in order)
        result[code] = result.get(code, 0.0) + probability
    return result


def fit(observed, probability, rows):
    """p-value of counts; cells with fewer than 5 expected are one; the impossible has 0."""
    expected = np.asarray(probability) * rows
    seen = np.asarray(observed, dtype=np.float64)
    rare = expected < 5
    if expected[rare].sum() < 1e-4:
        if seen[rare].sum() > 0:
            return 0.0
        expected, seen = expected[~rare], seen[~rare]
    elif rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        seen = np.append(seen[~rare], seen[rare].sum())
    if len(expected) == 1:
        return 0.5 if seen[0] == rows else 0.0
    return chi_square_p(((seen - expected) ** 2 / expected).sum(), len(expected) - 1)


def set_counts(ids, size):
    return np.bincount((1 << ids).sum(1).numpy(), minlength=1 << size)


LAWS = [
    ([1, 2, 3, 4, 5, 6, 7], 4, 1, "uid"),
    ([1, 2, 3, 4, 5, 6, 7], 3, -1, "visit"),
    ([1, 1, 1, 1, 1, 1, 1], 3, 2, "both"),
    ([0.001, 0.01, 0.2, 0.5, 1.0, 1.0], 3, -(2**63), "both"),
    ([5, 1, 0.3, 0.3, 0.1], 2, 2**33, "visit"),
    ([5, 1, 0.3, 0.3], 1, 5, "uid"),
    ([1.0, 1.02], 1, 6, "uid"),
]


@pytest.mark.parametrize(("weight", "k", "seed", "along"), some_of(LAWS, 0, 3, 4))
def test_sets_have_the_probabilities_of_successive_draws(weight, k, seed, along):
    exact = set_probabilities(weight, k)
    ids = drawn_ids(weight, k, seed=seed, **axis(along, ROWS))
    assert (ids >= 0).all()
    counts = set_counts(ids, len(weight))
    codes = list(exact)
    assert counts.sum() == counts[codes].sum() == ROWS
    assert LOW < fit(counts[codes], list(exact.values()), ROWS) < HIGH
    # Each attribute on its own: how often it is drawn.
    for item in range(len(weight)):
        included = sum(p for code, p in exact.items() if code >> item & 1)
        times = (ids == item).sum().item()
        assert LOW < fit([times, ROWS - times], [included, 1 - included], ROWS) < HIGH


def test_nearly_right_laws_of_sets_are_refused():
    weight, k = [1, 2, 3, 4, 5, 6, 7], 3
    exact = set_probabilities(weight, k)
    codes, values = list(exact), list(exact.values())
    inverse = 7 / np.array(weight, dtype=np.float64)
    wrong = {
        "weights to the 0.97th power": drawn_ids(
            weight, k, inverse=inverse**0.97, **axis("uid", ROWS)
        ),
        "one weight 2 % off": drawn_ids([1, 2, 3, 4, 5, 6, 7.14], k, **axis("uid", ROWS)),
        "uniform": drawn_ids([1] * 7, k, **axis("uid", ROWS)),
        "uniform clocks": race(np.random.default_rng(0).random((ROWS, 7)) * inverse, k),
    }
    for name, ids in wrong.items():
        counts = set_counts(ids, 7)
        assert fit(counts[codes], values, ROWS) < REFUSED, name
    # A set's probability in proportion to the product of its weights: what draws with replacement
    # give when repetitions are thrown away.
    product = np.array([np.prod([w for i, w in enumerate(weight) if c >> i & 1]) for c in codes])
    counts = np.random.default_rng(1).multinomial(ROWS, product / product.sum())
    assert fit(counts, values, ROWS) < REFUSED


def race(keys, k):
    """The k smallest of each row, ascending."""
    return torch.from_numpy(np.sort(np.argpartition(keys, k, axis=1)[:, :k], axis=1))


PEAKED = [
    ([1e-30, 3e-30, 1e-15, 2e-15, 1.0], 2),
    ([1e-30, 3e-30, 1e-15, 2e-15, 1.0], 4),
    ([1.0, 3e-30, 1e-30, 1e-30, 1e-30, 2e-30], 3),
    ([1e-30, 1e-20, 1e-10, 1.0], 3),
    ([1e-3, 1e-30, 1.0, 1e-4, 3e-30], 4),
]


@pytest.mark.parametrize(("weight", "k"), some_of(PEAKED, 1, 4))
def test_peaked_weights(weight, k):
    """Over thirty decades: what is nothing beside the heaviest still orders the rest."""
    exact = set_probabilities(weight, k)
    codes, values = list(exact), list(exact.values())
    inverse = max(weight) / np.array(weight)
    flat = np.minimum(inverse, 1e12)  # as weights stored too coarsely would be
    right, wrong = (
        set_counts(drawn_ids(weight, k, inverse=i, seed=-9, **axis("both", ROWS)), len(weight))
        for i in (inverse, flat)
    )
    assert right[codes].sum() == ROWS
    assert LOW < fit(right[codes], values, ROWS) < HIGH
    assert fit(wrong[codes], values, ROWS) < REFUSED


def two_samples(one, other):
    """p-value that two samples have one mean, all columns together: Hotelling's statistic."""
    gap = one.mean(0) - other.mean(0)
    spread = one.T.cov() / len(one) + other.T.cov() / len(other)
    return chi_square_p(float(gap @ torch.linalg.solve(spread, gap)), len(gap))


def inclusions(ids, size):
    """Whether each attribute is drawn; the last one is decided by the others."""
    return indicators(ids, size)[:, :-1]


def pairs(ids, size):
    """Whether two neighbours are drawn together, of every seventh pair."""
    drawn = indicators(ids, size)
    return (drawn[:, :-1] * drawn[:, 1:])[:, ::7]


def systematic(inclusion, rows, rng):
    """A sampler with given inclusion probabilities whose pairs are wrong: equal steps."""
    ends = inclusion.cumsum(0).numpy()
    ends[-1] = round(ends[-1])
    steps = rng.random((rows, 1)) + np.arange(round(ends[-1]))
    return torch.from_numpy(np.searchsorted(ends, steps, side="right"))


def test_numpys_choice_at_the_papers_size():
    """F = 180, k = 30: the sampler that Fig. 3 names."""
    rng = np.random.default_rng(5)
    rows, size, k = 30_000, 180, 30
    weight = np.exp(rng.normal(0, 1, size))
    weight /= weight.sum()
    inverse = weight.max() / weight
    choices = np.stack([rng.choice(size, k, replace=False, p=weight) for _ in range(rows)])
    theirs, many = torch.from_numpy(choices), axis("both", 3 * rows)
    ours = drawn_ids(weight, k, **many)
    wrong = {
        "weights to the 0.97th power": drawn_ids(weight, k, inverse=inverse**0.97, **many),
        "uniform": drawn_ids(np.ones(size), k, **many),
        "uniform clocks": race(rng.random((rows, size)) * inverse, k),
        "with replacement": torch.from_numpy(rng.choice(size, (rows, k), p=weight)),
    }
    for features in (inclusions, pairs):
        assert LOW < two_samples(features(ours, size), features(theirs, size)) < HIGH
    for name, ids in wrong.items():
        assert two_samples(inclusions(ids, size), inclusions(theirs, size)) < REFUSED, name
    means_only = systematic(indicators(ours, size).mean(0), rows, rng)
    assert LOW < two_samples(inclusions(means_only, size), inclusions(theirs, size)) < HIGH
    assert two_samples(pairs(means_only, size), pairs(theirs, size)) < REFUSED
