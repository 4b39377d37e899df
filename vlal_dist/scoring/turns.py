"""Whose turn it is: shards in the making share one encoder, the one begun first goes first.

With two shards under way the second is fetched and decoded while the first is encoded, and begins
to be encoded while the first is written. If they took turns evenly, both would be written at the
same time and the encoder would have nothing to do meanwhile.
"""

import heapq
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count


class Turns:
    """Lets one thread at a time pass, the holder of the lowest ticket first."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._numbers = count()
        self._waiting: list[int] = []
        self._taken = False

    def ticket(self) -> int:
        """A ticket that comes after all that were given out before."""
        return next(self._numbers)

    @contextmanager
    def turn(self, ticket: int) -> Iterator[None]:
        """Wait until nobody with a lower ticket waits, and keep the others out meanwhile."""
        with self._condition:
            heapq.heappush(self._waiting, ticket)
            self._condition.wait_for(lambda: not self._taken and self._waiting[0] == ticket)
            heapq.heappop(self._waiting)
            self._taken = True
        try:
            yield
        finally:
            with self._condition:
                self._taken = False
                self._condition.notify_all()
