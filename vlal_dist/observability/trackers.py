"""Trackers (TensorBoard, W&B, MLflow) that cannot hold up a run.

Each tracker has a thread, which opens, feeds and closes it, and a bounded queue that logging only
appends to. Failures are logged and retried; records that find the queue full are dropped and
counted. At the end all trackers together get `CLOSE_S` seconds.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, TypeVar

T = TypeVar("T")
logger = logging.getLogger(__name__)

QUEUE = 1000
"""Largest number of waiting records: with the default log interval, those of 20,000 steps."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 10.0, 600.0
DROPS_LOGGED_S = 300.0
CLOSE_S = 5.0
NOT_TRACKED = frozenset({"step", "ledger"})


class Record(NamedTuple):
    """A line of `metrics.jsonl` as a tracker takes it.

    Attributes:
        kind: train or validation.
        step: optimizer steps done.
        time: seconds since 1970.
        values: its numbers; those of an inner mapping as `outer/inner`.
    """

    kind: str
    step: int
    time: float
    values: dict[str, float]


class Tracker:
    """Receives records, in a thread of its own; an error that it raises is logged and retried."""

    def log(self, record: Record) -> None:
        """Take a record; may block."""
        raise NotImplementedError

    def close(self, *, done: bool) -> None:
        """Deliver what is left; `done`: the run ended without an error or a stop."""

    def abandon(self) -> None:
        """Leave no process behind; called by another thread, while `log` or `close` hang."""


class Trackers:
    """All trackers of a run.

    Args:
        starts: name -> opens the tracker, in its thread.
        dropped: called with the name of a tracker and the number of records that it did not take.
    """

    def __init__(
        self, starts: Mapping[str, Callable[[], Tracker]], *, dropped: Callable[[str, int], None]
    ) -> None:
        self._all = [Background(name, start, dropped=dropped) for name, start in starts.items()]

    def log(self, record: Mapping[str, object]) -> None:
        """Queue a line of `metrics.jsonl`, which has a kind and a step; never blocks."""
        values = numbers({name: v for name, v in record.items() if name not in NOT_TRACKED})
        one = Record(str(record["kind"]), int(str(record["step"])), time.time(), values)
        for tracker in self._all:
            tracker.log(one)

    def close(self, *, done: bool) -> None:
        """Wait at most `CLOSE_S` until all is delivered, then abandon what hangs."""
        deadline = time.monotonic() + CLOSE_S
        for tracker in self._all:
            tracker.finish(done=done)
        for tracker in self._all:
            tracker.leave(deadline)


class Background:
    """A tracker in a thread of its own; arguments as of `Trackers`."""

    def __init__(
        self, name: str, start: Callable[[], Tracker], *, dropped: Callable[[str, int], None]
    ) -> None:
        self._name, self._start, self._dropped = name, start, dropped
        self._waiting: deque[Record] = deque()
        self._changed = threading.Condition()
        self._done: bool | None = None  # until the run has ended
        self._tracker: Tracker | None = None
        self._failure = ""
        self._drops, self._drops_logged_at = 0, -DROPS_LOGGED_S
        # A daemon: a thread that hangs in a tracker must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        """Queue a record, or drop it when the queue is full."""
        with self._changed:
            if len(self._waiting) < QUEUE:
                self._waiting.append(record)
                self._changed.notify()
                return
        self._dropped(self._name, 1)
        self._drops += 1
        if time.monotonic() - self._drops_logged_at >= DROPS_LOGGED_S:
            logger.warning(
                "tracker %s: its queue of %d records is full; records dropped: %d; training goes "
                "on",
                self._name,
                QUEUE,
                self._drops,
            )
            self._drops, self._drops_logged_at = 0, time.monotonic()

    def finish(self, *, done: bool) -> None:
        """Announce that no more records come."""
        with self._changed:
            self._done = done
            self._changed.notify()

    def leave(self, deadline: float) -> None:
        """Wait for the thread until a time of the monotonic clock, then abandon the tracker."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if hangs := self._thread.is_alive():
            if self._tracker is not None:
                self._tracker.abandon()
            self._thread.join(1.0)
        with self._changed:
            left = len(self._waiting)
        if hangs or left:
            self._dropped(self._name, left)
            logger.warning(
                "tracker %s: abandoned (%s); records not delivered: %d; metrics.jsonl has them all",
                self._name,
                f"not finished within {CLOSE_S:.0f} s" if hangs else self._failure,
                left,
            )

    def _work(self) -> None:
        retry = partial(persist, name=self._name, wait=self._ends_within)
        try:
            self._tracker = tracker = retry(self._start)
            while (record := self._next()) is not None:
                retry(partial(tracker.log, record))
                with self._changed:
                    self._waiting.popleft()
        except Exception as error:
            self._failure = one_line(error)
            return
        try:
            tracker.close(done=bool(self._done))
        except Exception as error:
            logger.warning("tracker %s: not closed cleanly: %s", self._name, one_line(error))

    def _next(self) -> Record | None:
        """The oldest waiting record, which stays queued until it is taken; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._done is not None)
            return self._waiting[0] if self._waiting else None

    def _ends_within(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._done is not None, seconds)


def persist(action: Callable[[], T], *, name: str, wait: Callable[[float], bool]) -> T:
    """Retry an action, with growing pauses, until it succeeds; each failure is logged.

    Args:
        action: what to do.
        name: of the tracker, for the warnings.
        wait: pauses for some seconds; returns True to stop retrying.

    Raises:
        Exception: of `action`, when `wait` returns True.
    """
    pause = FIRST_PAUSE_S
    while True:
        try:
            return action()
        except Exception as error:
            if wait(0.0):
                raise
            logger.warning(
                "tracker %s: %s; retrying in %.0f s; training goes on", name, one_line(error), pause
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
