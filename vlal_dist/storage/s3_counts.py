"""Counts of S3 requests and of their repetitions, by reason.

Without botocore, so that a training reports them where no S3 client is installed.
"""

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Reason = Literal[
    "throttled",  # the store asked for fewer requests (429, 503)
    "error",  # it failed (5xx), or answered another request
    "unreachable",  # no connection, or one that ended before the answer
    "timeout",  # no answer, or silence within one
    "truncated",  # the body ended early; what arrived is kept
    "altered",  # the bytes differ from the recorded sha256
    "commit",  # a create-only PUT met another one, or a delete
    "redirected",  # the store named another place
]
"""Why a request was repeated."""
REASONS: tuple[Reason, ...] = get_args(Reason)


@dataclass(frozen=True)
class S3Counts:
    """Requests of one store, or of all stores, in this process.

    Attributes:
        requests: HTTP requests sent, repetitions included.
        repeated: requests repeated, by reason; only reasons that occurred.
        bytes_in: object bytes received.
        bytes_out: object bytes of accepted PUTs.
    """

    requests: int = 0
    repeated: Mapping[Reason, int] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0

    def __add__(self, more: "S3Counts") -> "S3Counts":
        repeated = dict(self.repeated)
        for reason, count in more.repeated.items():
            repeated[reason] = repeated.get(reason, 0) + count
        return S3Counts(
            self.requests + more.requests,
            repeated,
            self.bytes_in + more.bytes_in,
            self.bytes_out + more.bytes_out,
        )


class S3Tally:
    """Thread-safe `S3Counts` of the process that made it."""

    def __init__(self) -> None:
        self.counts = S3Counts()
        self._lock = threading.Lock()
        _tallies.append((os.getpid(), self))

    def add(self, more: S3Counts) -> None:
        """Add to the counts."""
        with self._lock:
            self.counts += more


_tallies: list[tuple[int, S3Tally]] = []
"""With the process of each: a forked child inherits the list, but not the work."""


def process_counts() -> S3Counts:
    """S3Counts of all stores of this process, closed ones included."""
    own = os.getpid()
    return sum((tally.counts for pid, tally in list(_tallies) if pid == own), S3Counts())
