"""What a run logs, for TensorBoard, W&B and MLflow, where no tracker can hold up a run.

Each tracker has a thread of its own, which opens it, feeds it and closes it, and a bounded queue:
whoever logs appends to the queue and goes on. What fails is told and tried again; what finds the
queue full is dropped and counted; at the end all of them together get `CLOSE_S` seconds.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

T = TypeVar("T")
logger = logging.getLogger(__name__)

QUEUE = 1000
"""Records that wait at most: with the default log interval, those of 20,000 steps."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 10.0, 600.0
DROPS_TOLD_S = 300.0
CLOSE_S = 5.0
LEFT_OUT = frozenset({"step", "ledger"})


class Record(NamedTuple):
    """A line of `metrics.jsonl` as a tracker takes it.

    Attributes:
        kind: train or validation.
        step: optimizer steps done.
        time: when, in seconds since 1970.
        values: its numbers; those of an inner mapping as `outer/inner`.
    """

    kind: str
    step: int
    time: float
    values: dict[str, float]


class Tracker(Protocol):
    """Where records go. What it raises is told, and tried again."""

    def log(self, record: Record) -> None:
        """Take a record; may take its time."""

    def close(self, *, done: bool) -> None:
        """Deliver what is left; `done`: the run ended in order."""

    def abandon(self) -> None:
        """Leave no process behind; called by another thread, while `log` or `close` hang."""


class Trackers:
    """All trackers of a run.

    Args:
        starts: name -> opens it, in its thread.
        dropped: told the name of a tracker and how many records it did not take.
    """

    def __init__(
        self,
        starts: Mapping[str, Callable[[], Tracker]],
        *,
        dropped: Callable[[str, int], None],
    ) -> None:
        self._all = [
            Background(name, start, dropped=partial(dropped, name))
            for name, start in starts.items()
        ]

    def log(self, record: Mapping[str, object]) -> None:
        """Hand on a line of `metrics.jsonl`, which has a kind and a step; never waits."""
        values = numbers({name: v for name, v in record.items() if name not in LEFT_OUT})
        one = Record(str(record["kind"]), int(str(record["step"])), time.time(), values)
        for tracker in self._all:
            tracker.log(one)

    def close(self, *, done: bool) -> None:
        """Wait `CLOSE_S` at most until all is delivered, then leave the trackers behind."""
        deadline = time.monotonic() + CLOSE_S
        for tracker in self._all:
            tracker.finish(done=done)
        for tracker in self._all:
            tracker.leave(deadline)


class Background:
    """A tracker in a thread of its own.

    Args:
        name: of the tracker, in messages.
        start: opens it, in the thread.
        dropped: told how many records it did not take.
    """

    def __init__(
        self, name: str, start: Callable[[], Tracker], *, dropped: Callable[[int], None]
    ) -> None:
        self._name, self._start, self._dropped = name, start, dropped
        self._waiting: deque[Record] = deque()
        self._changed = threading.Condition()
        self._done: bool | None = None  # until the run has ended
        self._tracker: Tracker | None = None
        self._failure = ""
        self._untold, self._told_at = 0, -DROPS_TOLD_S
        # A daemon: a thread that hangs in a tracker must not keep the process.
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        """Queue a record, or drop it if too many wait."""
        with self._changed:
            if len(self._waiting) < QUEUE:
                self._waiting.append(record)
                self._changed.notify()
                return
        self._dropped(1)
        self._untold += 1
        if time.monotonic() - self._told_at >= DROPS_TOLD_S:
            logger.warning(
                "tracker %s: %d wait already; records dropped: %d; training goes on",
                self._name,
                QUEUE,
                self._untold,
            )
            self._untold, self._told_at = 0, time.monotonic()

    def finish(self, *, done: bool) -> None:
        """Say that no more records come."""
        with self._changed:
            self._done = done
            self._changed.notify()

    def leave(self, deadline: float) -> None:
        """Wait for the thread until a time of the monotonic clock, then give the tracker up."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if hangs := self._thread.is_alive():
            if self._tracker is not None:
                self._tracker.abandon()
            self._thread.join(1.0)
        with self._changed:
            left = len(self._waiting)
        if hangs or left:
            self._dropped(left)
            logger.warning(
                "tracker %s: given up (%s), records not delivered: %d; metrics.jsonl has them all",
                self._name,
                f"no end within {CLOSE_S:.0f} s" if hangs else self._failure,
                left,
            )

    def _work(self) -> None:
        try:
            self._tracker = tracker = persist(self._start, name=self._name, wait=self._ends_within)
            while (record := self._next()) is not None:
                persist(partial(tracker.log, record), name=self._name, wait=self._ends_within)
                with self._changed:
                    self._waiting.popleft()
        except Exception as error:
            self._failure = one_line(error)
            return
        try:
            tracker.close(done=bool(self._done))
        except Exception as error:
            logger.warning("tracker %s: not closed in order: %s", self._name, one_line(error))

    def _next(self) -> Record | None:
        """The first that waits, which stays there until it is taken; None: there come no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._done is not None)
            return self._waiting[0] if self._waiting else None

    def _ends_within(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._done is not None, seconds)


def persist(action: Callable[[], T], *, name: str, wait: Callable[[float], bool]) -> T:
    """Do something, again and again with longer pauses until it works; tell of each failure.

    Args:
        action: what to do.
        name: of the tracker, in the warnings.
        wait: pauses for some seconds; True: it is not to be tried again.

    Raises:
        Exception: of `action`, when `wait` says so.
    """
    pause = FIRST_PAUSE_S
    while True:
        try:
            return action()
        except Exception as error:
            if wait(0.0):
                raise
            logger.warning(
                "tracker %s: %s; training goes on, it is tried again in %.0f s",
                name,
                one_line(error),
                pause,
            )
            if wait(pause):
                raise
        pause = min(2 * pause, LONGEST_PAUSE_S)


def one_line(error: Exception) -> str:
    """An error in a line of a log; those of clients quote whole pages of a server."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def numbers(record: Mapping[str, object]) -> dict[str, float]:
    """The numbers of a record, those of inner mappings as `outer/inner`."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in numbers(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    return found
