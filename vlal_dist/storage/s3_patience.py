"""Patience with S3: what every request does while the store is away or busy.

All repetition happens here, in one loop; the client below sends each request once.
"""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from vlal_dist.errors import StorageError
from vlal_dist.storage.s3_client import S3Client
from vlal_dist.storage.s3_errors import OutageError

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRIES = 5
"""Times that a request, a body or a commit is tried at least before giving up."""
OUTAGE_S = 60.0
"""Seconds after a request's first failure at which it gives up (and not before `TRIES` tries)."""


def patiently(attempt: Callable[[], T], client: S3Client, *, always: bool = False) -> T:
    """Repeat an attempt while the store is out of reach or busy.

    Args:
        attempt: raises OutageError where another one may succeed; may be carried out by the store
            although it failed here.
        client: waits between attempts.
        always: wait for a store that has never answered this process, too. Without it such a
            store, which is rather misnamed than away, is given up after `TRIES` tries.

    Raises:
        StorageError: `OUTAGE_S` after the first failure it still fails.
    """
    tries, failing_since = 0, 0.0
    while True:
        try:
            return attempt()
        except OutageError as error:
            problem = error
        patient = always or client.answered
        tries += 1
        failing_since = failing_since or time.monotonic()
        failing_s = time.monotonic() - failing_since
        if tries >= TRIES and not (patient and failing_s < OUTAGE_S):
            raise StorageError(
                f"{problem}; given up after {tries} tries, {failing_s:.0f} s after the first failed"
            ) from problem
        logger.warning("%s; try %d follows", problem, tries + 1)
        client.pause(tries, problem.reason)
