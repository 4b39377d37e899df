"""One queue per root, and a stop that waits for a good moment."""

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from vlal_dist.errors import Stopped
from vlal_dist.experimenting.jobs import read_json

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
