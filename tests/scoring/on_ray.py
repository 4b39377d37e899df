"""Helpers of the tests on real Ray: processes, their logs, their actors."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.scoring.conftest import Model
from tests.scoring.test_score_clip import PROGRAM, flags

ROOT = Path(__file__).parents[2]
WAIT_S = 120


def on_ray(config: Path, model: Model, scores: Path | str, *more: str) -> list[str]:
    """Arguments of Python that run the program with Ray."""
    arguments = flags(model, scores, "--scoring.use_ray", "true", *more)
    return ["-m", PROGRAM, "--config", str(config), *arguments]


@contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the repository's root with its output in `log`; ended by its own pid."""
    with log.open("wb") as sink:
        process = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(WAIT_S)


def python(*arguments: str) -> list[str]:
    """A command of this Python."""
    return [sys.executable, *arguments]


def wait_until(what: Callable[[], object], log: Path) -> None:
    """Wait for something to come true; else fail with the log."""
    deadline = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def actor_pids(log: Path) -> list[int]:
    """Actors that the driver's log names, in the order in which they became ready."""
    words = log.read_text().split("an actor is ready, process ")[1:]
    return [int(word.split()[0]) for word in words if word.split()]


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return _stat(pid)[0] != "Z"
    except OSError:
        return False


def parent(pid: int) -> int:
    """The pid of a process's parent."""
    return int(_stat(pid)[1])


def wait_until_quiet(pid: int, log: Path) -> None:
    """Wait until a process uses less than a twentieth of a core, or is gone."""
    before, since = -1.0, 0.0

    def quiet() -> bool:
        nonlocal before, since
        if not alive(pid):
            return True
        if time.monotonic() - since < 1:
            return False
        used = sum(map(int, _stat(pid)[11:13])) / os.sysconf("SC_CLK_TCK")
        before, spent, since = used, used - before, time.monotonic()
        return spent < 0.05

    wait_until(quiet, log)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
