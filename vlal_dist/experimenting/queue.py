"""One queue per root, and a stop that waits for a good moment."""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from vlal_dist.errors import Stopped, VlalError
from vlal_dist.experimenting.jobs import (
    FAILED,
    LOG,
    QUEUED,
    SECONDS,
    Job,
    Place,
    Step,
    read_json,
    steps_of,
)
from vlal_dist.storage.store import open_store

LOCK, RUNNING = "lock", "running.json"


@contextmanager
def locked(root: Path) -> Iterator[int]:
    """The root's lock, held as long as this descriptor or a child's copy of it is open.

    Raises:
        Stopped: somebody else holds it; names the process groups that the holder noted.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            groups = read_json(root / RUNNING) or {}
            who = ", ".join(f"{title} (process group {pid})" for title, pid in groups.items())
            raise Stopped(
                f"another queue, or a run that it left behind, works in {root}: {who or 'starting'}"
                "; wait for it, or end it (kill -TERM -GROUP), then repeat the command"
            ) from None
        yield lock
    finally:
        os.close(lock)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that fills with the signals that ask to stop; looked at between two polls."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {n: signal.signal(n, receive) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


STOP_S = 30.0
"""How long a run may take to save and leave."""
POLL_S = 0.2
LAST_LINES = 10
_CHATTER = re.compile(r"\[\d{4}-[^]]*\] \[(INFO|WARNING)\] \[(runner|launch)\.py")
"""What the launcher says in any case."""


class RunsFailedError(VlalError):
    """Some runs ended with an error; the program ends with the code of the first."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        job: the run.
        code: 0, or the exit code of the command that failed.
        seconds: of this attempt.
        lines: the last of the log; empty for a success.
        left: runs of the queue that have not ended.
    """

    job: Job
    code: int
    seconds: float
    lines: list[str]
    left: int


@dataclass
class _Active:
    """A run under way."""

    job: Job
    place: Place
    steps: list[Step]
    began: float = field(default_factory=time.monotonic)
    step_began: float = 0.0
    process: "subprocess.Popen[bytes] | None" = None


def run_queue(
    jobs: Sequence[Job],
    places: Sequence[Place],
    *,
    root: Path,
    started: Callable[[Job, int], None],
    ended: Callable[[Outcome], None],
    steps: Callable[[Job, Place], list[Step]] = steps_of,
) -> list[Outcome]:
    """Run all jobs, as many at a time as there are places; a failed one stops no other.

    Args:
        jobs: in the order of their start; a job waits for the run that gives its prior.
        places: what each of those running at a time may use.
        root: root of the experiments, local.
        started: told each run that starts, and how many are then waiting.
        ended: told how each run ended.
        steps: the commands of a run that are still to do.

    Returns:
        The failed ones.

    Raises:
        Stopped: another queue, or a run that it left behind, still works in this root.
        KeyboardInterrupt: SIGTERM or SIGINT; what ran was asked to save and leave.
    """
    waiting, free = list(jobs), list(places)
    active: list[_Active] = []
    failures: list[Outcome] = []

    def end(outcome: Outcome) -> None:
        if outcome.code:
            failures.append(outcome)
        ended(outcome)

    with locked(root) as lock, stop_signals() as requested:
        try:
            while waiting or active:
                for job, cause in _orphaned(waiting, failures):
                    waiting.remove(job)
                    lines = [f"needs the model of {job.prior}, and that run failed"]
                    end(_failed(job, cause.code, 0.0, lines, left=len(waiting) + len(active)))
                while free and (ready := _next_ready(waiting, active)) is not None:
                    waiting.remove(ready)
                    active.append(_begin(ready, free.pop(0), steps))
                    started(ready, len(waiting))
                for one in list(active):
                    code = _advance(one, lock)
                    if code is not None:
                        active.remove(one)
                        free.insert(0, one.place)
                        end(_outcome(one, code, left=len(waiting) + len(active)))
                _note(root, active)
                if requested:
                    raise KeyboardInterrupt
                time.sleep(POLL_S if active else 0)
        finally:
            _end_all(active)
            _note(root, [])
    return failures


def _next_ready(waiting: Sequence[Job], active: Sequence[_Active]) -> Job | None:
    """The first that waits for no other run."""
    pending = {job.root for job in waiting} | {one.job.root for one in active}
    return next((job for job in waiting if job.prior not in pending), None)


def _orphaned(waiting: Sequence[Job], failures: Sequence[Outcome]) -> list[tuple[Job, Outcome]]:
    """Runs whose prior cannot come any more, and the failure that is to blame."""
    failed = {outcome.job.root: outcome for outcome in failures}
    return [(job, failed[job.prior]) for job in waiting if job.prior in failed]


def _begin(job: Job, place: Place, steps: Callable[[Job, Place], list[Step]]) -> _Active:
    store = open_store(str(job.root))
    store.replace(QUEUED, job.config_text.encode())
    store.delete(FAILED)
    return _Active(job, place, steps(job, place))


def _advance(one: _Active, lock: int) -> int | None:
    """Start the next command if the last one is done; the run's exit code once it has ended."""
    if one.process is not None:
        code = one.process.poll()
        if code is None:
            return None
        _leave(one)
        if code:
            return code if code > 0 else 128 - code  # shells report a signal so
    if not one.steps:
        return 0
    step = one.steps.pop(0)
    try:
        with (one.job.root / LOG).open("ab", buffering=0) as log:
            log.write(f"\n$ {shlex.join(step.command)}\n".encode())
            one.process = subprocess.Popen(
                step.command,
                env=step.environment,
                stdin=lock,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        raise VlalError(
            f"{step.command[0]} cannot be started: {error.strerror}; run make setup"
        ) from None
    one.step_began = time.monotonic()
    return None


def _leave(one: _Active) -> None:
    """After a command: nothing of its group stays, and its seconds are entered."""
    assert one.process is not None
    _signal_group(one.process, signal.SIGKILL)
    one.process = None
    spent = read_json(one.job.root / SECONDS) or {}
    seconds = float(str(spent.get("seconds", 0.0))) + time.monotonic() - one.step_began
    store = open_store(str(one.job.root))
    store.replace(SECONDS, (json.dumps({"seconds": round(seconds, 1)}) + "\n").encode())


def _outcome(one: _Active, code: int, *, left: int) -> Outcome:
    seconds = time.monotonic() - one.began
    if code == 0:
        return Outcome(one.job, 0, seconds, [], left)
    with (one.job.root / LOG).open("rb") as log:
        log.seek(-min(log.seek(0, os.SEEK_END), 16_384), os.SEEK_END)
        text = log.read().decode(errors="replace").replace("\r", "\n")
    lines = [line for line in text.split("\n") if line.strip() and not _CHATTER.match(line)]
    return _failed(one.job, code, seconds, lines[-LAST_LINES:], left=left)


def _failed(job: Job, code: int, seconds: float, lines: list[str], *, left: int) -> Outcome:
    record = json.dumps({"code": code, "lines": lines}, indent=2) + "\n"
    open_store(str(job.root)).replace(FAILED, record.encode())
    return Outcome(job, code, seconds, lines, left)


def _end_all(active: Sequence[_Active]) -> None:
    """Ask all to save and leave; after a while, end what is left of them."""
    running = [one for one in active if one.process is not None]
    for one in running:
        assert one.process is not None
        _signal_group(one.process, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    for one in running:
        assert one.process is not None
        # The launcher may leave before its ranks have saved.
        while _group_lives(one.process) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        _signal_group(one.process, signal.SIGKILL)
        one.process.wait()
        _leave(one)


def _group_lives(process: "subprocess.Popen[bytes]") -> bool:
    process.poll()  # a leader that has ended is reaped, or it would count as alive
    return _signal_group(process, 0)


def _signal_group(process: "subprocess.Popen[bytes]", number: int) -> bool:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _note(root: Path, active: Sequence[_Active]) -> None:
    """Who runs: told to a later queue should this program be killed."""
    groups = {one.job.title: one.process.pid for one in active if one.process is not None}
    if groups != read_json(root / RUNNING):
        open_store(str(root)).replace(RUNNING, (json.dumps(groups) + "\n").encode())
