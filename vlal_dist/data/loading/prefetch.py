"""Prefetcher for byte ranges of remote shards, in the order of their use."""

import heapq
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from vlal_dist.data.loading.disk_cache import DiskCache
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.data.order.shuffle import BlockRanges
from vlal_dist.errors import TruncatedError
from vlal_dist.storage.store import Store

FETCHES = 16
"""Ranged reads in flight."""

ByteRange = tuple[int, int, int]
"""First row, end, and the position from which on it is not used any more."""


def as_tuples(parts: BlockRanges) -> list[ByteRange]:
    """One tuple per position."""
    columns = (a.tolist() for a in (parts.first, parts.stop, parts.until))
    return list(zip(*columns, strict=True))


class Prefetcher:
    """BlockRanges of the remote shards of a corpus; safe to call from many threads.

    Args:
        corpus: whose rows the parts count.
        stores, keys, sha256: where each shard of the corpus is, and its digest.
        cache: keeps parts on a local disk; None: no such cache.

    Attributes:
        fetches, fetched_bytes: ranged reads from stores so far.
        fetch_s: seconds spent in them, over all threads.
    """

    def __init__(
        self,
        corpus: ConcatSplits,
        *,
        stores: list[Store],
        keys: list[str],
        sha256: list[str],
        cache: DiskCache | None,
    ) -> None:
        self._corpus, self._stores, self._keys, self._sha256 = corpus, stores, keys, sha256
        self._cache = cache
        self._lock = threading.Lock()
        self._held: dict[ByteRange, Future[bytes | None]] = {}
        self._here: dict[ByteRange, bytes] = {}
        self._until: list[tuple[int, ByteRange]] = []
        self._pool = ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch")
        self.fetches, self.fetched_bytes, self.fetch_s = 0, 0, 0.0

    def ask(self, part: ByteRange, shard: int) -> "Future[bytes | None]":
        """A part that is at hand or on its way; one that is neither is asked for.

        Returns:
            Its bytes; None where the shard ends before the part does; the errors of `Store.read`.
        """
        with self._lock:
            future = self._held.get(part)
            if future is None:
                future = self._held[part] = self._pool.submit(self._fetch, part, shard)
                heapq.heappush(self._until, (part[2], part))
            return future

    def get(self, part: ByteRange, shard: int) -> bytes | None:
        """A part, waited for; see `ask`."""
        # A part that has come is looked up without a lock; futures take two each time.
        data = self._here.get(part)
        return self.ask(part, shard).result() if data is None else data

    def range_of(self, part: ByteRange) -> tuple[int, int]:
        """Offset and length of a part in its shard, bytes."""
        ends = np.array([part[0], part[1] - 1])
        offset, last = self._corpus.column("offset", ends).astype(np.int64).tolist()
        return offset, last + int(self._corpus.column("length", ends)[1]) - offset

    def retire(self, position: int) -> None:
        """Forget the parts that are of no use from a position on."""
        with self._lock:
            while self._until and self._until[0][0] <= position:
                part = heapq.heappop(self._until)[1]
                self._held.pop(part, None)
                self._here.pop(part, None)

    def forget(self) -> None:
        """Forget all parts, at the end of an epoch."""
        with self._lock:
            for future in self._held.values():
                future.cancel()
            self._held.clear()
            self._here.clear()
            self._until.clear()

    def discard(self, part: ByteRange, shard: int) -> None:
        """Remove a part from the disk cache: a sample in it failed its check."""
        if self._cache is not None:
            self._cache.discard(self._sha256[shard], *self.range_of(part))

    def close(self) -> None:
        """End the threads."""
        self.forget()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, part: ByteRange, shard: int) -> bytes | None:
        offset, length = self.range_of(part)
        data = None
        if self._cache is not None:
            data = self._cache.get(self._sha256[shard], offset, length)
        if data is None:
            data = self._fetch_range(shard, offset, length)
        with self._lock:
            if data is not None and part in self._held:  # it may be forgotten already
                self._here[part] = data
        return data

    def _fetch_range(self, shard: int, offset: int, length: int) -> bytes | None:
        started = time.perf_counter()
        try:
            data = self._stores[shard].read(self._keys[shard], offset=offset, length=length)
        except TruncatedError:
            return None  # each sample is then looked for by itself
        with self._lock:
            self.fetches += 1
            self.fetched_bytes += len(data)
            self.fetch_s += time.perf_counter() - started
        if self._cache is not None:
            self._cache.put(self._sha256[shard], offset, data)
        return data
