"""T1: a rank killed at any point: the supervisor restarts the job, the result is bit-identical."""

import time
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.harness import Job, each_once_an_epoch, record

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]

Fault = dict[str, Any]
INTERVAL = 2  # steps between checkpoints


def kill(rank: int, at: str, step: int, nth: int = 0) -> Fault:
    return {"kind": "kill", "rank": rank, "at": at, "step": step, "nth": nth}


def check_supervised(job: Job, undisturbed: Job, faults: list[Fault]) -> None:
    start = job.start(*faults)
    code = start.wait(timeout_s=120 * (1 + len(faults)))
    start.wait_for_all(timeout_s=5)
    assert code == 0, start.text()
    done = [{key: e[key] for key in ("rank", "at", "step")} for e in job.events("fault")]
    assert done == [{key: one[key] for key in ("rank", "at", "step")} for one in faults]
    assert job.bits() == undisturbed.bits()
    each_once_an_epoch(job.trained(), steps=4)
    lost = job.lost_steps()
    assert len(lost) == len(faults) and max(lost) <= INTERVAL
    record("kill", lost=lost, seconds_to_first_step=job.seconds_to_first_step())


def test_killed_in_the_gradient_in_a_save_and_at_an_epochs_end(
    config: Path, tmp_path: Path, undisturbed: Job
) -> None:
    faults = [kill(1, "gradient", 1), kill(0, "save", 4, 2), kill(1, "epoch", 8)]
    check_supervised(Job(config, tmp_path, supervised=True), undisturbed, faults)


GRID = [
    [kill(r, "start", 0), kill(r, "step", 0), kill(r, "gradient", 3), kill(r, "applied", 6)]
    for r in (0, 1)
] + [
    [kill(0, "save", 2 + 2 * nth, nth) for nth in range(4)],  # each file, COMPLETE too
    [kill(0, "save", 4 + 2 * nth, 3 - nth) for nth in range(4)],
    [kill(0, "best", 4), kill(0, "validate", 8), kill(0, "epoch", 12)],
    [kill(1, "validate", 4), kill(1, "epoch", 8), kill(1, "validate", 12)],
    [kill(0, "gradient", 4), kill(1, "gradient", 5), kill(0, "gradient", 11)],
    [kill(1, "step", 2), kill(0, "step", 7), kill(1, "applied", 12)],
    [kill(1, "start", 0), kill(1, "gradient", 0), kill(1, "step", 10)],
    [kill(0, "step", 4), kill(0, "applied", 5), kill(0, "epoch", 8), kill(0, "save", 12, 1)],
]


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", range(len(GRID)))
def test_killed_at_any_point(config: Path, tmp_path: Path, undisturbed: Job, number: int) -> None:
    check_supervised(Job(config, tmp_path, supervised=True), undisturbed, GRID[number])


@pytest.mark.parametrize(
    "rank", [1, *(pytest.param(r, marks=pytest.mark.nightly) for r in (0, 1, 0, 1, 0))]
)
def test_without_the_supervisor_a_kill_ends_all_ranks(
    config: Path, tmp_path: Path, undisturbed: Job, rank: int
) -> None:
    job = Job(config, tmp_path)
    start = job.start(kill(rank, "gradient", 5))
    code = start.wait()
    start.wait_for_all(timeout_s=60)
    (fault,) = job.events("fault")
    gone = time.time()
    assert code not in (0, 75), start.text()
    if rank == 1:
        assert "another rank died" in start.text()
    record("killed, all gone", code=code, seconds=gone - fault["t"])
    again = job.start()
    assert again.wait() == 0, again.text()
    assert job.bits() == undisturbed.bits() and job.lost_steps() == [1]
