"""The draw of Fig. 3: known answers, its law, and what must not change it."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from tests.method.golden_masks import render
from vlal_dist.errors import ConfigError
from vlal_dist.method.ignore_set import draw_keys, sample_ignore_set, top_ignore_set
from vlal_dist.method.philox import philox4x32, unit_exponential


def draw(weight, *, k, uid=None, visit=None, seed=7, drawable=None):
    weight = torch.as_tensor(weight, dtype=torch.float32)
    rows = len(weight)
    return sample_ignore_set(
        inverse_weight=weight,
        drawable=torch.ones_like(weight, dtype=torch.bool) if drawable is None else drawable,
        num_ignore=k,
        uid=torch.arange(rows) if uid is None else uid,
        visit=torch.zeros(rows, dtype=torch.int64) if visit is None else visit,
        seed=seed,
    )


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    found = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert " ".join(f"{int(word):08x}" for word in found) == words


def test_clock_is_accurate_over_its_whole_range():
    rng = np.random.default_rng(0)
    ends = np.arange(20_000)
    small = (2 ** rng.uniform(0, 32, 200_000)).astype(np.int64)
    seam = 1257966796 + np.arange(-2000, 2000)
    word = np.concatenate([rng.integers(0, 2**32, 500_000), ends, small, 2**32 - 1 - ends, seam])
    word = np.concatenate([word, 2**32 - 1 - small])
    uniform, complement = (word + 0.5) / 2**32, (2**32 - 1 - word + 0.5) / 2**32
    exact = np.where(uniform < 0.5, -np.log1p(-uniform), -np.log(complement))
    clock = unit_exponential(torch.from_numpy(word)).numpy()
    assert clock.dtype == np.float32
    assert np.abs(clock / exact - 1).max() < 2.5e-7
    assert clock.min() > 1.1e-10 and clock.max() < 22.9


def test_golden_bits_and_masks():
    assert render() == (Path(__file__).parent / "golden_masks.txt").read_text()


def test_words_of_a_group_go_to_its_four_attributes():
    uid, visit, seed = torch.tensor([-5]), torch.tensor([3]), 11
    keys = draw_keys(uid=uid, visit=visit, seed=seed, num_attributes=7)
    low, high = (-5) & 0xFFFFFFFF, 0xFFFFFFFF
    for attribute in range(7):
        counter = tuple(torch.tensor([c]) for c in (attribute // 4, 3, low, high))
        word = philox4x32(counter, (11, 0))[attribute % 4]
        assert keys[0, attribute] == unit_exponential(word)[0]


def set_probabilities(weight, k):
    """Exact probability of each set under sequential draws without replacement."""
    result = {}
    for order in itertools.permutations(range(len(weight)), k):
        left, probability = sum(weight), 1.0
        for item in order:
            probability *= weight[item] / left
            left -= weight[item]
        key = tuple(sorted(order))
        result[key] = result.get(key, 0.0) + probability
    return result


@pytest.mark.parametrize(
    ("weight", "k", "seed"),
    [
        ([1, 2, 3, 4, 5, 6], 3, 1),
        ([1, 1, 1, 1, 1, 1], 2, 2),
        ([0.01, 0.2, 0.5, 1.0, 1.0], 3, -3),
        ([5, 1, 0.3, 0.3], 1, 2**33),
    ],
)
def test_law_is_sequential_sampling_without_replacement(weight, k, seed):
    rows = 60_000
    inverse = (max(weight) / torch.tensor(weight, dtype=torch.float32)).repeat(rows, 1)
    mask = draw(inverse, k=k, seed=seed).numpy()
    assert (mask.sum(axis=1) == k).all()
    code = mask @ (1 << np.arange(len(weight)))
    exact = set_probabilities(weight, k)
    observed = np.array([(code == sum(1 << i for i in key)).sum() for key in exact])
    p = stats.chisquare(observed, np.array(list(exact.values())) * rows).pvalue
    assert 1e-4 < p < 1 - 1e-4


def test_law_agrees_with_numpys_choice_at_the_papers_size():
    rng = np.random.default_rng(5)
    rows, size, k = 4000, 60, 15
    g = np.exp(rng.normal(0, 1, size))
    g /= g.sum()
    inverse = torch.from_numpy((g.max() / g).astype(np.float32)).repeat(rows, 1)
    ours = draw(inverse, k=k).sum(dim=0).numpy() / rows
    theirs = np.zeros(size)
    for _ in range(rows):
        theirs[rng.choice(size, k, replace=False, p=g)] += 1 / rows
    spread = np.sqrt((ours * (1 - ours) + theirs * (1 - theirs)) / rows)
    assert np.abs((ours - theirs) / spread).max() < 4.5


def test_neighbouring_counters_are_uncorrelated():
    rows = 15_000
    base = {"seed": 3, "num_attributes": 4}
    uid, zero = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    a = draw_keys(uid=uid, visit=zero, **base)
    for b in (
        draw_keys(uid=uid, visit=zero + 1, **base),
        draw_keys(uid=uid + 1, visit=zero, **base),
        draw_keys(uid=uid + 2**32, visit=zero, **base),
        draw_keys(uid=uid, visit=zero, seed=4, num_attributes=4),
        a.roll(1, dims=1),
    ):
        correlation = np.corrcoef(a.numpy().ravel(), b.numpy().ravel())[0, 1]
        assert abs(correlation) < 4.5 / np.sqrt(4 * rows)


def test_draw_ignores_batch_order_and_split():
    torch.manual_seed(0)
    weight = 1 + torch.rand(37, 23) * 50
    uid = torch.randint(-(2**63), 2**63 - 1, (37,))
    visit = torch.randint(0, 2**32, (37,))
    whole = draw(weight, k=6, uid=uid, visit=visit)
    order = torch.randperm(37)
    assert torch.equal(draw(weight[order], k=6, uid=uid[order], visit=visit[order]), whole[order])
    parts = [draw(weight[s], k=6, uid=uid[s], visit=visit[s]) for s in (slice(0, 5), slice(5, 37))]
    assert torch.equal(torch.cat(parts), whole)
    wide = torch.cat([weight, torch.full((37, 8), torch.inf)], dim=1)
    assert torch.equal(draw(wide, k=6, uid=uid, visit=visit)[:, :23], whole)
    strided = weight.t().contiguous().t()
    assert torch.equal(draw(strided, k=6, uid=uid, visit=visit), whole)


def test_every_part_of_the_key_matters():
    weight = torch.ones(1, 400)
    one = torch.tensor([1])
    first = draw(weight, k=30, uid=one, visit=one, seed=5)
    for other in (
        draw(weight, k=30, uid=one, visit=one, seed=6),
        draw(weight, k=30, uid=one, visit=one, seed=5 + 2**32),
        draw(weight, k=30, uid=one, visit=one + 1, seed=5),
        draw(weight, k=30, uid=one + 1, visit=one, seed=5),
        draw(weight, k=30, uid=one + 2**32, visit=one, seed=5),
    ):
        assert not torch.equal(first, other)


def test_equal_keys_go_to_the_lower_id(monkeypatch):
    clock = torch.tensor([[2.0, 1.0, 1.0, 1.0, 1.0, 0.5]])
    monkeypatch.setattr("vlal_dist.method.ignore_set.draw_keys", lambda **_: clock)
    assert draw(torch.ones(1, 6), k=3).tolist() == [[False, True, True, False, False, True]]
    # Keys that overflow to infinity still beat attributes that cannot be drawn.
    huge = torch.full((1, 6), 3e38)
    huge[0, 1] = torch.inf
    clock.fill_(2.0)
    assert draw(huge, k=4).tolist() == [[True, False, True, True, True, False]]


def test_fewer_than_num_ignore_can_be_drawn():
    weight = torch.tensor([[1.0, 0.0, torch.inf, torch.nan, -1.0, 3.0, 1e-42, 3e38]])
    drawn = torch.tensor([[True, False, False, False, False, True, True, True]])
    for k in (4, 8, 100):
        assert torch.equal(draw(weight, k=k), drawn)
    assert not draw(weight, k=0).any()
    assert not draw(torch.zeros(2, 5), k=3).any()


def test_drawing_set_bounds_the_draw():
    drawable = torch.rand(50, 31, generator=torch.Generator().manual_seed(1)) < 0.4
    mask = draw(torch.ones(50, 31), k=5, drawable=drawable)
    assert not (mask & ~drawable).any()
    assert torch.equal(mask.sum(1), drawable.sum(1).clamp(max=5))


def test_all_takes_the_whole_set_even_with_zero_weight():
    drawable = torch.tensor([[True, False, True]])
    weight = torch.tensor([[0.0, 1.0, torch.inf]])
    assert torch.equal(draw(weight, k="all", drawable=drawable), drawable)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (2, 3), (2, 4), (2, 5)])
def test_odd_shapes(shape):
    mask = draw(torch.ones(shape), k=2)
    assert mask.shape == shape and mask.dtype == torch.bool
    assert (mask.sum(1) == min(2, shape[1])).all()


def test_negative_num_ignore_is_refused():
    with pytest.raises(ConfigError, match="num_ignore is -1"):
        draw(torch.ones(1, 2), k=-1)


def test_process_rng_is_untouched():
    before = torch.get_rng_state()
    draw(torch.ones(4, 9), k=3)
    assert torch.equal(before, torch.get_rng_state())


def top_by_argsort(weight, drawable, k):
    """Of each row the k candidates first in a stable sort: numpy's own ties go to the lower id."""
    candidate = drawable & (weight > 0) & np.isfinite(weight)
    mask = np.zeros_like(candidate)
    for row, order in enumerate(np.argsort(np.where(candidate, weight, np.inf), kind="stable")):
        mask[row, order[candidate[row][order]][:k]] = True
    return mask


@pytest.mark.parametrize("k", [0, 1, 5, 30, 100])
def test_top_takes_the_smallest_inverse_weights_and_ties_go_to_the_lower_id(k):
    rng = np.random.default_rng(k)
    for levels in (1, 3, 10_000):  # all equal, many ties, hardly any
        weight = (1 + rng.integers(levels, size=(40, 37)) / 7).astype(np.float32)
        weight[rng.random(weight.shape) < 0.2] = rng.choice([np.inf, np.nan, 0.0, -1.0])
        drawable = rng.random(weight.shape) < 0.8
        found = top_ignore_set(
            inverse_weight=torch.from_numpy(weight),
            drawable=torch.from_numpy(drawable),
            num_ignore=k,
        )
        assert np.array_equal(found.numpy(), top_by_argsort(weight, drawable, k))


def test_top_takes_as_many_as_the_draw_does():
    rng = np.random.default_rng(3)
    weight = torch.from_numpy(rng.choice([1, 2.5, 3e38, np.inf, 0], (60, 11)).astype(np.float32))
    drawable = torch.from_numpy(rng.random((60, 11)) < 0.6)
    for k in (0, 3, 11, "all"):
        top = top_ignore_set(inverse_weight=weight, drawable=drawable, num_ignore=k)
        assert torch.equal(top.sum(1), draw(weight, k=k, drawable=drawable).sum(1))
        assert not (top & ~drawable).any()
    with pytest.raises(ConfigError, match="num_ignore is -1"):
        top_ignore_set(inverse_weight=weight, drawable=drawable, num_ignore=-1)


def test_nothing_broadcasts_and_no_tensor_is_missing():
    """One row of labels, weights or sets is not taken for all."""
    from vlal_dist.method.selective_loss import assign_terms

    label, mask = torch.zeros(4, 7, dtype=torch.int8), torch.ones(4, 7, dtype=torch.bool)
    weight = torch.ones(4, 7)
    with pytest.raises(ValueError, match="of one shape"):
        assign_terms(label[0], mask, mask)
    with pytest.raises(ValueError, match="of one shape"):
        assign_terms(label, mask[:1], mask)
    with pytest.raises(ValueError, match="of one shape"):
        top_ignore_set(inverse_weight=weight[:1], drawable=mask, num_ignore=2)
    with pytest.raises(ValueError, match="sparse"):
        top_ignore_set(inverse_weight=weight.to("meta"), drawable=mask, num_ignore=2)
    with pytest.raises(TypeError, match="drawable: NoneType"):
        top_ignore_set(inverse_weight=weight, drawable=None, num_ignore=2)
