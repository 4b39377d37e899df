"""Prefetcher for block ranges of remote shards, in the order of their use."""

import heapq
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlal_dist.data.loading.disk_cache import DiskCache
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.errors import TruncatedError
from vlal_dist.storage.store import Store

FETCHES = 16
"""Ranged reads in flight."""

BlockRange = tuple[int, int, int]
"""First row, end, and the position of the epoch from which on they are not needed any more."""


@dataclass(frozen=True)
class ShardFile:
    """A shard of a corpus: its store, its key there, its digest, and its path if it is local."""

    store: Store
    key: str
    sha256: str
    path: Path | None


class Prefetcher:
    """Fetches block ranges of the remote shards of a corpus; may be shared by threads.

    Args:
        corpus: its rows are counted by the ranges.
        shards: of the corpus.
        cache: keeps ranges on a local disk; None: no such cache.

    Attributes:
        fetches, fetched_bytes: ranged reads from stores so far.
        fetch_seconds: seconds spent in them, over all threads.
    """

    def __init__(
        self, corpus: ConcatSplits, shards: list[ShardFile], *, cache: DiskCache | None
    ) -> None:
        self._corpus, self._shards, self._cache = corpus, shards, cache
        self._lock = threading.Lock()
        self._held: dict[BlockRange, Future[bytes | None]] = {}
        self._until: list[tuple[int, BlockRange]] = []
        self._pool = ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch")
        self.fetches, self.fetched_bytes, self.fetch_seconds = 0, 0, 0.0

    def request(self, block: BlockRange, shard: int) -> "Future[bytes | None]":
        """Begin to fetch a range, unless it is held or on its way.

        Returns:
            Its bytes; None where the shard ends before the range does; the errors of `Store.read`.
        """
        with self._lock:
            future = self._held.get(block)
            if future is None:
                future = self._held[block] = self._pool.submit(self._fetch, block, shard)
                heapq.heappush(self._until, (block[2], block))
            return future

    def retire(self, position: int) -> None:
        """Drop the ranges that are not used any more from a position on."""
        with self._lock:
            while self._until and self._until[0][0] <= position:
                self._held.pop(heapq.heappop(self._until)[1], None)

    def clear(self) -> None:
        """Drop all ranges, at the end of an epoch."""
        with self._lock:
            for future in self._held.values():
                future.cancel()
            self._held.clear()
            self._until.clear()

    def discard(self, block: BlockRange, shard: int) -> None:
        """Remove a range from the disk cache: a sample in it failed its check."""
        if self._cache is not None:
            self._cache.discard(self._shards[shard].sha256, *self._bytes_of(block))

    def close(self) -> None:
        """End the threads."""
        self.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _bytes_of(self, block: BlockRange) -> tuple[int, int]:
        """Offset and length of a range in its shard, bytes."""
        ends = np.array([block[0], block[1] - 1])
        offset, last = self._corpus.column("offset", ends).astype(np.int64).tolist()
        return offset, last + int(self._corpus.column("length", ends)[1]) - offset

    def _fetch(self, block: BlockRange, shard: int) -> bytes | None:
        offset, length = self._bytes_of(block)
        file, started = self._shards[shard], time.perf_counter()
        if self._cache is not None:
            cached = self._cache.get(file.sha256, offset, length)
            if cached is not None:
                return cached
        try:
            data = file.store.read(file.key, offset=offset, length=length)
        except TruncatedError:
            return None  # each sample is then read by itself
        with self._lock:
            self.fetches += 1
            self.fetched_bytes += len(data)
            self.fetch_seconds += time.perf_counter() - started
        if self._cache is not None:
            self._cache.put(file.sha256, offset, data)
        return data
