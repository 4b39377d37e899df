"""Queue of runs: several at a time, failures kept, and a clean stop."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from threading import Event

from vlal_dist.errors import VlalError
from vlal_dist.experimenting.jobs import (
    FAILED,
    LOG,
    QUEUED,
    SECONDS,
    TEST,
    Command,
    Job,
    Place,
    commands_of,
    read_json,
)
from vlal_dist.processes import set_on_stop_signal
from vlal_dist.storage.lock import descriptors
from vlal_dist.storage.store import open_store

STOP_S = 30.0
"""Time that runs have to save and exit after a stop signal."""
POLL_S = 0.2
LAST_LINES = 10
_LAUNCHER_LINE = re.compile(r"\[\d{4}-[^]]*\] \[(INFO|WARNING)\] \[(runner|launch)\.py")


def run_queue(
    jobs: Sequence[Job],
    places: Sequence[Place],
    *,
    ended: Callable[[], object],
    commands: Callable[[Job, Place], list[Command]] = commands_of,
) -> dict[str, int]:
    """Run all jobs, as many at a time as there are places; a failed one stops no other.

    Args:
        jobs: in the order of their start; a job waits for the run that gives its prior.
        places: resources of each of the jobs that run at a time.
        ended: called after each run.
        commands: the commands of a run that are still to do.

    Returns:
        Failed run -> exit code of the command that failed.

    Raises:
        KeyboardInterrupt: SIGTERM or SIGINT; running jobs were given time to save and exit.
    """
    waiting, free = list(jobs), list(places)
    active: list[_Attempt] = []
    failures: dict[Path, tuple[str, int]] = {}

    def fail(job: Job, code: int, lines: list[str]) -> None:
        failures[job.root] = job.title, code
        record = json.dumps({"code": code, "lines": lines}, indent=2) + "\n"
        open_store(str(job.root)).replace(FAILED, record.encode())
        for line in lines:
            say(f"  | {line}")
        say(f"FAILED   {job.title}: code {code}, {job.root / LOG}")

    stop = Event()
    with set_on_stop_signal(stop):
        try:
            while waiting or active:
                for job in list(waiting):
                    if job.prior is not None and job.prior in failures:
                        waiting.remove(job)
                        reason = f"needs the model of {job.prior}, and that run failed"
                        fail(job, failures[job.prior][1], [reason])
                        ended()
                pending = {job.root for job in waiting} | {one.job.root for one in active}
                ready = [job for job in waiting if job.prior not in pending]
                for job, place in zip(ready, list(free), strict=False):
                    waiting.remove(job)
                    free.remove(place)
                    active.append(_Attempt(job, place, commands(job, place)))
                    say(f"started  {job.title}; {len(waiting)} waiting")
                for one in list(active):
                    code = one.poll()
                    if code is None:
                        continue
                    active.remove(one)
                    free.insert(0, one.place)
                    if code:
                        fail(one.job, code, one.last_lines())
                    else:
                        say(f"finished {one.summary()}; {len(waiting) + len(active)} left")
                    ended()
                if stop.is_set():
                    raise KeyboardInterrupt
                time.sleep(POLL_S if active else 0)
        finally:
            _stop(active)
    return dict(failures.values())


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class _Attempt:
    """A run under way: its commands one after another, each in a process group of its own.

    Every process inherits the lock of the experiments' root as its standard input.
    """

    def __init__(self, job: Job, place: Place, commands: Sequence[Command]) -> None:
        self.job, self.place = job, place
        self.process: subprocess.Popen[bytes] | None = None
        self._store = open_store(str(job.root))
        self._store.replace(QUEUED, job.config_text.encode())
        self._store.delete(FAILED)
        self._began = time.monotonic()
        self.progress = self._run(commands)

    def poll(self) -> int | None:
        """Start the next command if the last one is done; the exit code once the run has ended."""
        try:
            next(self.progress)
        except StopIteration as end:
            return int(end.value)
        return None

    def summary(self) -> str:
        """Time and test mAP of a run that has finished."""
        groups = read_json(self.job.root / TEST / "result.json").get("groups") or [{"mAP": None}]
        overall = groups[0]["mAP"]
        shown = "none" if overall is None else f"{100 * overall:.2f} %"
        return f"{self.job.title}: {time.monotonic() - self._began:.0f} s, test mAP {shown}"

    def last_lines(self) -> list[str]:
        """The end of the log, without lines of the launcher."""
        with (self.job.root / LOG).open("rb") as log:
            log.seek(-min(log.seek(0, os.SEEK_END), 16_384), os.SEEK_END)
            text = log.read().decode(errors="replace").replace("\r", "\n")
        lines = [line for line in text.split("\n") if line.strip()]
        return [line for line in lines if not _LAUNCHER_LINE.match(line)][-LAST_LINES:]

    def _run(self, commands: Sequence[Command]) -> Generator[None, None, int]:
        """Yields while a command runs; returns 0 or the exit code of the one that failed."""
        for command in commands:
            began = time.monotonic()
            self.process = self._start(command)
            try:
                while self.process.poll() is None:
                    yield
            finally:
                _signal_group(self.process, signal.SIGKILL)
                code = self.process.wait()
                self.process = None
                spent = read_json(self.job.root / SECONDS).get("seconds", 0.0)
                record = {"seconds": round(spent + time.monotonic() - began, 1)}
                self._store.replace(SECONDS, (json.dumps(record) + "\n").encode())
            if code:
                return code if code > 0 else 128 - code  # as shells report a signal
        return 0

    def _start(self, command: Command) -> "subprocess.Popen[bytes]":
        try:
            with (self.job.root / LOG).open("ab", buffering=0) as log:
                log.write(f"\n$ {shlex.join(command.argv)}\n".encode())
                return subprocess.Popen(
                    command.argv,
                    env=command.environment,
                    stdin=next(iter(descriptors()), subprocess.DEVNULL),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise VlalError(
                f"{command.argv[0]} cannot be started: {error.strerror}; "
                "run: pip install 'vlal-dist[train]'"
            ) from None


def _stop(active: Sequence[_Attempt]) -> None:
    """Ask all runs to save and exit; after `STOP_S`, kill what is left of them."""
    processes = [one.process for one in active if one.process is not None]
    for process in processes:
        _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    # The launcher may exit before its ranks have saved: wait for the whole group.
    while time.monotonic() < deadline and any(
        process.poll() is None or _signal_group(process, 0) for process in processes
    ):
        time.sleep(POLL_S)
    for one in active:
        one.progress.close()


def _signal_group(process: "subprocess.Popen[bytes]", number: int) -> bool:
    """Signal a process group; False if it is gone."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
