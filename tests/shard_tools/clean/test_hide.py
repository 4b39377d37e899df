"""Hiding labels: the law of what is kept, what it depends on, and what it leaves alone."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from shard_tools.clean.counts import HIDE_QUANTITIES
from shard_tools.clean.hide import poisson_limits
from shard_tools.clean.records import Instance
from tests.shard_tools.clean.columns import Result, clean

POSITIVE = tuple(f"p{number:02d}" for number in range(20))
NEGATIVE = tuple(f"n{number:02d}" for number in range(25))
BASE = Instance("train", "0", "0", "car", (0.0, 0.0, 60.0, 60.0), POSITIVE, NEGATIVE)
MANY = 4000


def hide(instances: list[Instance], *, seed: int = 0) -> tuple[list[Instance], list[Instance]]:
    """What instances keep, and what those of the training split hide, in the order given."""
    result = hiding(instances, seed=seed)
    found = {i.instance_id: i for i in result.instances}
    away = [
        replace(found[name], positive=positive, negative=negative)
        for name, positive, negative in result.hidden
    ]
    return [found[i.instance_id] for i in instances], away


def hiding(instances: list[Instance], *, seed: int = 0) -> Result:
    return clean(instances, hide="vaw_density", hide_seed=seed, min_side=0, require_positive=False)


def instance(name: str, **changes: object) -> Instance:
    return replace(BASE, instance_id=name, **changes)  # type: ignore[arg-type]


def many(seed: int = 0, number: int = MANY) -> list[Instance]:
    return hide([instance(str(n)) for n in range(number)], seed=seed)[0]


def poisson(mean: float, *, least: int, up_to: int = 12) -> dict[int, float]:
    """P(number kept) of `least` + Poisson(mean)."""
    return {n + least: math.exp(-mean) * mean**n / math.factorial(n) for n in range(up_to)}


def fits(found: Iterable[object], law: Mapping[object, float]) -> bool:
    """A chi-square test that a right law fails once in millions; rare values are taken together."""
    observed = Counter(found)
    total = sum(observed.values())
    common = [value for value, share in law.items() if share * total >= 10]
    expected = [law[value] * total for value in common]
    counts = [observed[value] for value in common]
    rest = total - sum(expected)
    if rest >= 1:
        expected.append(rest)
        counts.append(total - sum(counts))
    statistic = sum((o - e) ** 2 / e for o, e in zip(counts, expected, strict=True))
    freedom = len(expected) - 1
    return statistic < freedom + 6 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_numbers_kept_have_the_distribution_of_vaw(seed: int) -> None:
    kept = many(seed)
    positives, negatives = ([len(getattr(i, p)) for i in kept] for p in ("positive", "negative"))
    assert fits(positives, poisson(0.8, least=1))
    assert fits(negatives, poisson(1.2, least=0))
    for wrong in (poisson(1.0, least=1), poisson(0.6, least=1), poisson(1.8, least=0)):
        assert not fits(positives, wrong)
    for wrong in (poisson(1.0, least=0), poisson(1.4, least=0), poisson(0.2, least=1)):
        assert not fits(negatives, wrong)
    assert min(positives) == 1
    # Neither number tells the other.
    assert abs(np.corrcoef(positives, negatives)[0, 1]) < 5 / math.sqrt(MANY)


def test_every_label_is_kept_equally_often() -> None:
    kept = many()
    for polarity, names in (("positive", POSITIVE), ("negative", NEGATIVE)):
        law = dict.fromkeys(names, 1 / len(names))
        lists = [getattr(i, polarity) for i in kept]
        assert fits([name for names in lists for name in names], law)
        first = [name for names_kept in lists for name in names[: len(names_kept)]]
        assert not fits(first, law)
    pairs = Counter(i.positive for i in kept if len(i.positive) == 2)
    assert len(pairs) == math.comb(len(POSITIVE), 2)


def test_the_limits_are_those_of_poisson_in_exact_bits() -> None:
    for mean in (Decimal("0.8"), Decimal("1.2")):
        limits = poisson_limits(mean)
        law = poisson(float(mean), least=0, up_to=len(limits))
        assert np.abs(limits - np.cumsum(list(law.values()))).max() < 1e-15
        assert (np.diff(limits) > 0).all()
        assert limits[-1] == 1 - 2.0**-53
    # exp(-0.8) by its series in exact fractions.
    series = sum(Fraction(-4, 5) ** k / math.factorial(k) for k in range(40))
    assert poisson_limits(Decimal("0.8"))[0] * 2**53 == math.floor(series * 2**53)


def test_golden_choice_of_kept_labels() -> None:
    kept, _ = hide([instance(name) for name in ("0", "1", "2498", "ä")])
    assert [(" ".join(i.positive), " ".join(i.negative)) for i in kept] == [
        ("p01 p19", ""),
        ("p01 p05", ""),
        ("p00 p12", "n20"),
        ("p15 p18", "n01 n04 n23"),
    ]


@pytest.mark.parametrize(
    ("positive", "negative"),
    [((), NEGATIVE), (("p",), ()), (("p", "q"), ("n",)), ((), ()), (POSITIVE, NEGATIVE)],
)
def test_nothing_is_invented_and_nothing_is_lost(
    positive: tuple[str, ...], negative: tuple[str, ...]
) -> None:
    given = [instance(str(n), positive=positive, negative=negative) for n in range(200)]
    kept, hidden = hide(given)
    counts = hiding(given).cleaned.counts["hide"]
    for before, left, away in zip(given, kept, hidden, strict=True):
        assert tuple(sorted((*left.positive, *away.positive))) == positive
        assert tuple(sorted((*left.negative, *away.negative))) == negative
        assert list(left.positive) == sorted(left.positive)
        assert list(away.negative) == sorted(away.negative)
        assert len(left.positive) >= min(1, len(positive))
        assert replace(left, positive=positive, negative=negative) == before
        assert replace(away, positive=positive, negative=negative) == before
    assert list(counts)[-4:] == list(HIDE_QUANTITIES)
    assert counts["kept_positives"] + counts["hidden_positives"] == 200 * len(positive)
    assert counts["kept_negatives"] + counts["hidden_negatives"] == 200 * len(negative)


def test_a_short_list_caps_the_number_and_nothing_else() -> None:
    short, long = (
        hide([instance(str(n), positive=POSITIVE[:k]) for n in range(300)])[0] for k in (2, 20)
    )
    for one, other in zip(short, long, strict=True):
        assert len(one.positive) == min(2, len(other.positive))
        assert one.negative == other.negative


def test_an_instance_keeps_the_same_labels_among_any_others() -> None:
    given = [instance(str(n)) for n in range(50)]
    kept, hidden = hide(given)
    backward = hide(given[::-1])
    assert (backward[0][::-1], backward[1][::-1]) == (kept, hidden)
    for n in (0, 17, 49):
        others = [instance("x", positive=("a", "z"), negative=()), instance("y", split="val")]
        assert hide([*others, given[n]])[0][-1] == kept[n]
    # Neither object, photo nor box are part of its identity.
    moved = [replace(i, object_name="bus", image_id="7") for i in given]
    assert [i.positive for i in hide(moved)[0]] == [i.positive for i in kept]


def test_another_seed_is_another_choice() -> None:
    one, two = many(0, 200), many(1, 200)
    assert many(0, 200) == one
    assert sum(a.positive != b.positive for a, b in zip(one, two, strict=True)) > 150


def test_validation_and_test_stay_whole() -> None:
    given = [instance("a", split="val"), instance("b"), instance("c", split="test")]
    kept, hidden = hide(given)
    assert (kept[0], kept[2]) == (given[0], given[2])
    assert [i.instance_id for i in hidden] == ["b"]
    assert hide([]) == ([], [])
    assert hide(given[:1]) == (given[:1], [])
