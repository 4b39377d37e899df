"""T11: ports, files and shared memory of earlier starts never prevent the next one."""

import json
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.harness import Job, each_once_an_epoch, record

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]

CYCLES = 100


def test_a_taken_rendezvous_port_is_a_clear_error(config: Path, tmp_path: Path) -> None:
    job = Job(config, tmp_path, more=["--training.peer_timeout_s", "5"])  # of the other rank
    with socket.socket() as other:
        other.bind(("", int(job.port)))
        other.listen()
        start = job.start()
        assert start.wait() == 74, start.text()
        start.wait_for_all()
    assert "ranks cannot listen at" in start.text() and "--master_port" in start.text()


def trains_since(began: float) -> Callable[[list[dict[str, Any]]], bool]:
    return lambda events: any(e["event"] == "start" and e["t"] > began for e in events)


def left_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_kills_at_random_times_with_immediate_restarts(
    config: Path, tmp_path: Path, undisturbed: Job
) -> None:
    targets = tmp_path / "targets"
    job = Job(config, tmp_path, more=["--observability.targets", str(targets)])
    draw = random.Random(7)
    shared: set[Path] = set()
    reached = []
    for _ in range(CYCLES):
        start = job.start({"kind": "sleep", "at": "step", "seconds": 0.1, "often": True})
        if draw.random() < 0.5:
            time.sleep(draw.uniform(0.5, 6.0))  # while it starts
        else:
            job.wait_for(start, trains_since(start.began))
            time.sleep(draw.uniform(0.0, 1.5))
        shared |= start.shared_memory()
        start.kill()  # every process, at once; the same ports and folders again
        reached.append(max([e["step"] for e in job.events("step")], default=0))
    start = job.start()
    assert start.wait() == 0, start.text()
    start.wait_for_all(timeout_s=5)
    assert job.bits() == undisturbed.bits()
    each_once_an_epoch(job.trained(), steps=4)
    files = left_in(job.run)
    assert not [name for name in files if ".vlal-tmp-" in name and "checkpoints" in name]
    folders = sorted(path.name for path in (job.run / "checkpoints").iterdir())
    assert folders == ["00000010", "00000012"]
    assert list(targets.glob("*.json")) == []
    assert not [path for path in shared if path.exists()]
    assert json.loads((job.run / "train.result.json").read_text())["code"] == 0
    record("start and kill", cycles=CYCLES, lost=job.lost_steps(), manual_cleaning=0)
