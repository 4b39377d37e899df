"""Real runs, stopped and started again on one and two ranks: at every step the undisturbed ledger.

Two visits' sets with one ledger differ with a chance of 2^-64, so equal ledgers are equal sets.
"""

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.fixtures import epoch_oracle
from tests.fixtures.interrupted_runs import (
    BATCH_SIZE,
    EPOCHS,
    Cut,
    Record,
    Schedule,
    random_schedule,
    train,
)

pytestmark = pytest.mark.deepspeed

Ledgers = dict[int, tuple[int, dict[str, int]]]
"""Step -> its epoch, and the running ledger of that epoch."""


@pytest.fixture(scope="module")
def undisturbed(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ledgers]:
    """Ledgers of the run on one rank that nothing stops, for each kind of epoch end."""

    @cache
    def ledgers(epoch_end: str) -> Ledgers:
        run = tmp_path_factory.mktemp(f"undisturbed-{epoch_end}")
        schedule = Schedule((), 1, epoch_end, checkpoint_steps=0)
        lines = train(small, run, schedule).lines
        found = {x["step"]: (x["epoch"], x["ledger"]) for x in lines if x["kind"] == "train"}
        check_ends(small, epoch_end, found)
        return found

    return ledgers


def check_ends(small: Path, epoch_end: str, found: Ledgers) -> None:
    """At the end of each epoch: the oracle's ledger, with `drop` but for the dropped visits."""
    name = json.loads((small / "merged/dataset.json").read_text())["name"]
    uids = epoch_oracle.uids(small / "merged/train", name=name)
    dropped = len(uids) % BATCH_SIZE if epoch_end == "drop" else 0
    assert epoch_end == "exact" or dropped == 2
    last = {epoch: ledger for _, (epoch, ledger) in sorted(found.items())}
    assert list(last) == list(range(EPOCHS))
    for epoch, ledger in last.items():
        planned = epoch_oracle.planned(uids, [1.0] * len(uids), seed=99, epoch=epoch)
        missing = (
            pair
            for pair in itertools.combinations(planned, dropped)
            if epoch_oracle.ledger(set(planned) - set(pair)) == ledger
        )
        assert next(missing, None) is not None, (epoch, ledger)


def check(
    small: Path, run: Path, schedule: Schedule, undisturbed: Callable[[str], Ledgers]
) -> Record:
    """Carry a schedule out, and compare all that it wrote."""
    expected, record = undisturbed(schedule.epoch_end), train(small, run, schedule)
    wrong = [
        (step, epoch, ledger)
        for step, epoch, ledger in record.ledgers
        if expected[step] != (epoch, ledger)
    ]
    assert not wrong, f"{len(wrong)} of {len(record.ledgers)}: {wrong[:3]}"
    lines = [x for x in record.lines if x["kind"] == "train"]
    steps = [x["step"] for x in lines]
    assert all(expected[x["step"]] == (x["epoch"], x["ledger"]) for x in lines)
    assert steps == sorted(set(steps)) and steps[-1] == max(expected)
    # A step that a signal stopped is in its checkpoint, and has no line.
    assert set(expected) - set(steps) <= set(record.resumed_at)
    print(
        f"starts {1 + len(schedule.cuts)}, resumed at {record.resumed_at}, ledgers compared "
        f"{len(record.ledgers)}, of steps {len({step for step, _, _ in record.ledgers})}"
    )
    return record


@pytest.mark.nightly
def test_two_ranks_killed_in_a_save_then_stopped_then_one_rank(
    small: Path, tmp_path: Path, undisturbed: Callable[[str], Ledgers]
) -> None:
    schedule = Schedule((Cut(2, "kill in save", 3), Cut(2, "term", 2)), 1, "exact")
    record = check(small, tmp_path, schedule, undisturbed)
    assert 2 <= record.resumed_at[0] < record.resumed_at[1]


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(10))
def test_random_schedules(
    small: Path, tmp_path: Path, undisturbed: Callable[[str], Ledgers], seed: int
) -> None:
    schedule = random_schedule(seed)
    print(schedule)
    check(small, tmp_path, schedule, undisturbed)
