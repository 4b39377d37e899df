"""The queue with short commands in place of training: order, failures, the lock, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.fixtures.rank_processes import ROOT
from vlal_dist.config.sections import ExperimentsConfig
from vlal_dist.errors import ConfigError, StorageError
from vlal_dist.experimenting.jobs import Command, Job, Place, places, state_of
from vlal_dist.experimenting.queue import run_queue
from vlal_dist.storage import lock
from vlal_dist.storage.lock import writer_lock

PLACE = Place(ranks=1, devices=(), cores=1)


def job(root: Path, name: str, code: str, *, prior: str | None = None) -> Job:
    """A run whose only command is Python code, stored in place of its configuration."""
    return Job(name, 7, root / name, code, None if prior is None else root / prior, False)


def commands(one: Job, place: Place) -> list[Command]:
    return [Command("train", [sys.executable, "-c", one.config_text], dict(os.environ))]


def run(root: Path, jobs: list[Job], at_once: int = 1) -> dict[str, int]:
    """Failed runs and their exit codes."""
    with writer_lock(str(root), program="table1"):
        return run_queue(jobs, [PLACE] * at_once, ended=lambda: None, commands=commands)


def test_a_failure_is_recorded_and_stops_no_other(tmp_path: Path) -> None:
    loud = "print('[2026-01-01 00:00:00] [INFO] [launch.py:1:main] x'); print('why'); exit(65)"
    jobs = [
        job(tmp_path, "bad", loud),
        job(tmp_path, "needy", "", prior="bad"),
        job(tmp_path, "good", "print('fine')"),
        job(tmp_path, "killed", "import os; os.kill(os.getpid(), 9)"),
    ]
    failures = run(tmp_path, jobs)
    assert failures == {"bad seed 7": 65, "needy seed 7": 65, "killed seed 7": 137}
    record = json.loads((tmp_path / "bad" / "failed.json").read_text())
    command, *lines = record["lines"]
    assert record["code"] == 65
    assert command.startswith("$ ") and lines == ["why"]  # without the launcher's own lines
    assert state_of(jobs[0]) == "failed" and state_of(jobs[2]) == "started"
    assert "fine" in (tmp_path / "good" / "log.txt").read_text()
    run(tmp_path, [job(tmp_path, "bad", "pass")])  # a repeat forgets the failure
    assert not (tmp_path / "bad" / "failed.json").exists()


def test_as_many_at_a_time_as_there_are_places_and_a_prior_comes_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = (
        "import pathlib, time; root = pathlib.Path({root!r}); mine = root / 'on' / {name!r};"
        "mine.mkdir(parents=True); time.sleep(0.5);"
        "open(root / 'seen', 'a').write('%d\\n' % len(list((root / 'on').iterdir())));"
        "time.sleep(0.5); mine.rmdir()"
    )
    names = ["a", "b", "c"]
    jobs = [
        job(tmp_path, name, note.format(root=str(tmp_path), name=name), prior=prior)
        for name, prior in zip(names, ["c", None, None], strict=True)
    ]
    assert run(tmp_path, jobs, at_once=2) == {}
    shown = capsys.readouterr().out
    assert shown.index("finished c seed 7") < shown.index("started  a seed 7")
    seen = [int(line) for line in (tmp_path / "seen").read_text().split()]
    assert max(seen) <= 2 and len(seen) == 3


SCRIPT = """
import sys
from pathlib import Path
from tests.experimenting.test_queue import job, run
root = Path(sys.argv[1])
child = "import subprocess, sys; subprocess.run([sys.executable, '-c', %r])"
run(root, [job(root, "slow", child % sys.argv[2])])
"""
SLEEP = "import pathlib, time; pathlib.Path({path!r}).touch(); time.sleep(120)"


@contextmanager
def slow_queue(root: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A queue in a process of its own, and the group of its run, whose grandchild sleeps."""
    sleep = SLEEP.format(path=str(root / "sleeps"))
    front = subprocess.Popen([sys.executable, "-c", SCRIPT, str(root), sleep], cwd=ROOT)
    group = 0
    try:
        deadline = time.monotonic() + 60
        while not (root / "sleeps").exists():
            assert front.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        (group,) = (child.pid for child in psutil.Process(front.pid).children())
        yield front, group
    finally:
        front.kill()
        front.wait()
        if group:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


def test_a_run_left_by_a_killed_queue_locks_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "LEFT_BEHIND_S", 0.5)
    with slow_queue(tmp_path) as (front, group):
        front.kill()
        front.wait()
        # Even without the process that the queue started: its own child still works.
        os.kill(group, signal.SIGKILL)
        with pytest.raises(StorageError, match=r"table1 .* was killed, .* still write here: \d+;"):
            run(tmp_path, [job(tmp_path, "other", "")])
        os.killpg(group, signal.SIGKILL)
        monkeypatch.setattr(lock, "LEFT_BEHIND_S", 20.0)
        assert run(tmp_path, [job(tmp_path, "other", "")]) == {}


def test_a_signal_ends_the_whole_group(tmp_path: Path) -> None:
    with slow_queue(tmp_path) as (front, group):
        front.send_signal(signal.SIGTERM)
        front.wait(40)
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)
        assert "seconds" in json.loads((tmp_path / "slow" / "seconds.json").read_text())


def test_too_few_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"experiments\.ranks is 2 and 1 CUDA devices"):
        places(ExperimentsConfig(ranks=2), devices=["3"], cores=4)


def test_devices_and_cores_are_divided() -> None:
    divided = places(ExperimentsConfig(jobs=2, ranks=2), devices=["0", "1", "2", "3"], cores=9)
    assert [place.devices for place in divided] == [("0", "1"), ("2", "3")]
    assert [place.cores for place in divided] == [4, 4]
    shared = places(ExperimentsConfig(jobs=3, ranks=1), devices=["4", "6"], cores=2)
    assert [place.devices for place in shared] == [("4",), ("6",), ("4",)]
    assert places(ExperimentsConfig(jobs=1, ranks=2), devices=[], cores=1) == [Place(2, (), 1)]
