"""What S3 stores did in this process: the counts of one store, and the sum over all of them."""

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Reason = Literal[
    "throttled",  # the store asked for fewer requests (429, 503)
    "error",  # it failed (5xx), or answered something else than was asked
    "unreachable",  # no connection, or one that ended before the answer
    "timeout",  # no answer, or silence within one
    "truncated",  # the body ended early; what came is kept
    "altered",  # what arrived had another sha256 than was recorded
    "commit",  # a create-only PUT met another one, or a delete
    "redirected",  # the store named another place
]
"""Why a request was repeated."""
REASONS: tuple[Reason, ...] = get_args(Reason)


@dataclass(frozen=True)
class Counts:
    """What one store did in this process, or all of them did.

    Attributes:
        requests: HTTP requests sent, repetitions included.
        repeated: reason -> requests repeated for it; those of which there were any.
        bytes_in: object bytes received.
        bytes_out: object bytes of accepted PUTs.
    """

    requests: int = 0
    repeated: Mapping[Reason, int] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0

    @property
    def retries(self) -> int:
        """Requests repeated for any reason."""
        return sum(self.repeated.values())

    def __add__(self, more: "Counts") -> "Counts":
        repeated = dict(self.repeated)
        for reason, count in more.repeated.items():
            repeated[reason] = repeated.get(reason, 0) + count
        return Counts(
            self.requests + more.requests,
            repeated,
            self.bytes_in + more.bytes_in,
            self.bytes_out + more.bytes_out,
        )


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
