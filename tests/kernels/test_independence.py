"""Draws of one sample's visits, of neighbouring samples, and of other seeds know nothing of each
other.

Each attribute's being drawn in one is held against every attribute's in the other, so a shift by
one word or one block would show as well as a copy. Seeds are fixed.
"""

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
ROWS, SIZE, K, SEED = 100_000, 12, 4, 3
NEIGHBOURS = {
    "next visit": {"visit": 1},
    "visit after the next": {"visit": 2},
    "visit 65536 later": {"visit": 2**16},
    "visit of the upper half": {"visit": 2**31},
    "next uid": {"uid": 1},
    "uid four further": {"uid": 4},
    "uid's next high word": {"uid": 2**32},
    "uid of the upper half": {"uid": -(2**63)},
    "next uid, visit before": {"uid": 1, "visit": -1},
    "next seed": {"seed": 1},
    "seed's next high word": {"seed": 2**32},
    "seed and visit": {"seed": 1, "visit": 1},
    "seed and uid": {"seed": -1, "uid": 1},
}


def draws(along="both", *, uid=0, visit=0, seed=0):
    """Which attributes are drawn, all weights equal: float64 [ROWS, SIZE]."""
    rows = axis(along, ROWS)
    rows = {"uid": rows["uid"] + uid, "visit": rows["visit"] + visit}
    return indicators(drawn_ids([1.0] * SIZE, K, seed=SEED + seed, **rows), SIZE)


def independence_p(one, other):
    """p-value that two equally weighted draws are independent, over all pairs of attributes.

    Of k from A, each with p = k / A, the centred indicators have covariance c (I - J / A),
    c = p (1 - p) A / (A - 1): equal in every direction but the one in which their sum is fixed.
    """
    rows, size = one.shape
    p = K / size
    cross = (one - p).T @ (other - p) / rows
    unit = p * (1 - p) * size / (size - 1)
    return chi_square_p(float(rows * cross.square().sum() / unit**2), (size - 1) ** 2)


@pytest.mark.parametrize("along", some_of(["both", "uid", "visit"], 0))
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours_are_uncorrelated(name, along):
    one, other = draws(along), draws(along, **NEIGHBOURS[name])
    assert LOW < independence_p(one, other) < HIGH
    # Each pair of attributes within the noise of ROWS rows; 144 pairs.
    p = K / SIZE
    correlation = ((one - p).T @ (other - p) / ROWS / (p * (1 - p))).abs().max()
    assert correlation < 4.5 / ROWS**0.5


@pytest.mark.parametrize("along", some_of(["uid", "visit"], 1))
@pytest.mark.parametrize("lag", [1, 2, 4, 8, 97])
def test_a_run_of_rows_has_no_serial_correlation(along, lag):
    drawn = draws(along)
    assert LOW < independence_p(drawn[:-lag], drawn[lag:]) < HIGH


def test_rows_are_all_different():
    """As often as sets of 30 from 180 coincide by chance: never."""
    ids = drawn_ids([1.0] * 180, 30, **axis("both", ROWS))
    assert len(ids.unique(dim=0)) == ROWS


def test_one_row_in_thirty_that_is_a_copy_is_noticed():
    one, other = draws(), draws(visit=1)
    copied = torch.arange(ROWS)[:, None] % 30 == 0
    assert independence_p(one, torch.where(copied, one, other)) < REFUSED
    shifted = one.roll(1, dims=1)
    assert independence_p(one, torch.where(copied, shifted, other)) < REFUSED
    assert independence_p(one, one) == 0
