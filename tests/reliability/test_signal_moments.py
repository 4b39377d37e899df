"""T3, T4: a signal at any moment of a run, and a second one while the first is handled."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.harness import Job, record

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]


def term(rank: int, at: str, step: int, nth: int = 0, times: int = 1) -> dict[str, Any]:
    where = {"rank": rank, "at": at, "step": step, "nth": nth}
    return {"kind": "signal", "signal": "SIGTERM", "times": times, **where}


MOMENTS = {
    "the first step": [term(1, "step", 0)],
    "a save": [term(0, "save", 2, 1)],
    "an epoch's end": [term(1, "epoch", 4)],
    "a validation": [term(1, "validate", 4)],
    "the best model's save": [term(0, "best", 4)],
    "the beginning": [term(1, "start", 0)],
    "its own save, again": [term(1, "step", 4), term(0, "save", 5, 1, times=3)],
    "the last step": [term(0, "gradient", 11)],
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "moment",
    # CI has the one that sends a second signal too.
    [pytest.param(m, marks=[pytest.mark.nightly] * (m != "its own save, again")) for m in MOMENTS],
)
def test_a_signal_at_any_moment(
    config: Path, tmp_path: Path, undisturbed: Job, moment: str
) -> None:
    job = Job(config, tmp_path)
    start = job.start(*MOMENTS[moment])
    code = start.wait()
    start.wait_for_all(timeout_s=30)
    assert code == 75, start.text()
    assert [e["code"] for e in job.events("end")] == [75, 75]
    fault = job.events("fault")[0]
    seconds = max(e["t"] for e in job.events("end")) - fault["t"]
    assert len(job.events("fault")) == len(MOMENTS[moment])
    record("moment", moment=moment, seconds_to_exit=seconds)
    again = job.start()
    assert again.wait() == 0, again.text()
    assert job.lost_steps() == [0] and job.bits() == undisturbed.bits()


@pytest.mark.nightly
@pytest.mark.timeout(400)
@pytest.mark.parametrize("after_s", [0.3, 1.5, 2.5, 3.5, 5.0, 7.0])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_before_the_first_step(
    config: Path, tmp_path: Path, after_s: float, number: signal.Signals
) -> None:
    """The front process ends while launcher and ranks are still starting."""
    job = Job(config, tmp_path, more=["--training.epochs", "500"])
    start = job.start()
    time.sleep(after_s)
    os.kill(start.process.pid, number)
    start.wait()
    record("early", after_s=after_s, signal=number.name, seconds=start.wait_for_all())
