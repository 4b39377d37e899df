"""T2: a signal to any process of the job: one save by all ranks, no orphan, nothing lost."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.reliability.harness import Job, Start, record

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]

SLOW = {"kind": "sleep", "at": "step", "seconds": 0.25, "often": True}
"""Slows every step of every rank, so that a signal arrives during training."""
BARE = ("rank", "launch", "group", "front")


def send(start: Start, target: str, number: signal.Signals, job: Job) -> None:
    if target == "rank":
        rank = next(e["pid"] for e in job.events("begin") if e["rank"] == 1)
        os.kill(rank, number)
    elif target == "launch":
        os.kill(start.find("deepspeed.launcher.launch"), number)
    elif target == "front":
        os.kill(start.find("bin/deepspeed"), number)
    elif target == "group":
        os.killpg(start.process.pid, number)
    else:
        os.kill(start.process.pid, number)


def check(job: Job, undisturbed: Job, target: str, number: signal.Signals) -> None:
    start = job.start(SLOW)
    job.wait_for_step(start, 3)
    at = time.time()
    send(start, target, number, job)
    code = start.wait()
    start.wait_for_all(timeout_s=60)
    gone = time.time() - at
    made = max(e["step"] for e in job.events("step"))
    state = job.state()
    assert state["step"] == made, "nothing that was trained is lost"
    assert "stopped by" in start.text()
    ends = [e["code"] for e in job.events("end")]
    assert ends == [75, 75], start.text()
    if job.supervised or target == "rank":
        assert code == 75, start.text()
    else:
        assert code != 0 or (target, number) == ("launch", signal.SIGUSR1), start.text()
    saved = [e for e in job.events("saved") if e["t"] > at]
    record(
        "signal",
        target=target,
        signal=number.name,
        supervised=job.supervised,
        code=code,
        seconds_to_stop=min(e["t"] for e in job.events("end")) - at,
        seconds_until_all_gone=gone,
        seconds_of_the_save=saved[-1]["seconds"] if saved else 0.0,
        saves=len(saved),
    )
    again = job.start()
    assert again.wait() == 0, again.text()
    assert job.lost_steps() == [0] and job.bits() == undisturbed.bits()


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("target", "supervised"), [("front", False), ("supervisor", True)])
def test_sigterm_to_the_launcher_or_the_supervisor(
    config: Path, tmp_path: Path, undisturbed: Job, target: str, supervised: bool
) -> None:
    job = Job(config, tmp_path, supervised=supervised)
    check(job, undisturbed, target, signal.SIGTERM)


@pytest.mark.nightly
@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize(
    ("target", "supervised"),
    [*((one, False) for one in BARE), *((one, True) for one in (*BARE, "supervisor"))],
)
def test_any_signal_to_any_process(
    config: Path,
    tmp_path: Path,
    undisturbed: Job,
    target: str,
    supervised: bool,
    number: signal.Signals,
) -> None:
    check(Job(config, tmp_path, supervised=supervised), undisturbed, target, number)
