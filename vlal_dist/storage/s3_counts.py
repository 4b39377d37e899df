"""What S3 stores did in this process: the counts of one store, and the sum over all of them."""

import os
import threading
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Counts:
    """What one store did in this process, or all of them did.

    Attributes:
        requests: HTTP requests sent, retries included.
        retries: requests repeated: after a failure, to read on, or to commit again.
        bytes_in: object bytes received.
        bytes_out: object bytes of accepted PUTs.
    """

    requests: int = 0
    retries: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    def __add__(self, more: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(more), strict=True)))


class Tally:
    """Counts that threads add to; of the process that made it."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._lock = threading.Lock()
        _tallies.append((os.getpid(), self))

    def add(self, more: Counts) -> None:
        """Count."""
        with self._lock:
            self.counts += more


_tallies: list[tuple[int, Tally]] = []
"""With the process of each: a forked child inherits the list, not the work."""


def process_counts() -> Counts:
    """What all stores did in this process so far, those that are gone included."""
    own = os.getpid()
    return sum((tally.counts for pid, tally in list(_tallies) if pid == own), Counts())
