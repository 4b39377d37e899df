"""Verified reads of many samples: local shards by sample, remote shards by byte range.

Nothing read is trusted: length and crc32 of every sample's tar range come from the index. What
fails the check is fetched once more, past every cache; what fails again is damaged. An error of
transport is never taken for damage.
"""

import os
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from vlal_dist.data.format.sample_reader import read_again
from vlal_dist.data.hashing import I64, U64
from vlal_dist.data.loading.disk_cache import DiskCache
from vlal_dist.data.loading.prefetch import ByteRange, Prefetcher, as_tuples
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.data.order.shuffle import BlockRanges
from vlal_dist.errors import DataError, StorageError


@dataclass(frozen=True)
class SampleLocations:
    """Where some rows lie, as lists: one entry per row.

    Attributes:
        rows: int64 [n], of the corpus.
        uid: uint64 [n].
        object_id: int64 [n].
        shard: shard, counted through the corpus.
        offset, length, crc32: of the tar range.
        jpg, json, likelihood: (start, stop) of each part's contents within the range.
        part, part_offset: the part that a remote row is read from, and its offset in the shard.
    """

    rows: I64
    uid: U64
    object_id: I64
    shard: list[int]
    offset: list[int]
    length: list[int]
    crc32: list[int]
    jpg: list[tuple[int, int]]
    json: list[tuple[int, int]]
    likelihood: list[tuple[int, int]]
    part: list[ByteRange]
    part_offset: list[int]

    def between(self, low: int, high: int) -> "SampleLocations":
        """Rows low..high-1 of these."""
        return SampleLocations(**{name: value[low:high] for name, value in vars(self).items()})

    def only(self, places: I64) -> "SampleLocations":
        """The rows at some places of these."""

        def pick(value: Any) -> Any:
            if isinstance(value, np.ndarray):
                return value[places]
            return [value[n] for n in places.tolist()] if value else []  # local rows have no part

        return SampleLocations(**{name: pick(value) for name, value in vars(self).items()})


_OPEN_FILES = 256
"""Local shards kept open."""

Data = bytes | memoryview


@dataclass(frozen=True)
class Damage:
    """A sample that cannot be used.

    Attributes:
        uid: its name.
        where: URL of its shard.
        check: what it failed.
    """

    uid: int
    where: str
    check: str

    def __str__(self) -> str:
        return f"{self.where}: sample uid {self.uid:016x}: {self.check}"


class DamagedError(DataError):
    """A sample failed its check twice."""

    def __init__(self, damage: Damage) -> None:
        super().__init__(
            f"{damage}; the shard or its index was altered or cut: restore it (shard_tools verify "
            "checks all), pack again, or set data.damage quarantine"
        )
        self.damage = damage


class _File:
    """A local shard held open; closed when nobody reads from it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ShardReader:
    """Reads verified samples of a corpus; safe to call from many threads.

    Args:
        corpus: what is read.
        cache: keeps parts of remote shards on a local disk; None: no such cache.

    Attributes:
        remote: parts of remote shards; None where all are local.
        refetched: samples that failed a check and were read once more.
        damaged: samples that failed it again.
    """

    def __init__(self, corpus: ConcatSplits, *, cache: DiskCache | None = None) -> None:
        self.corpus, self.cache = corpus, cache
        self.refetched = self.damaged = 0
        self._first_shard = np.cumsum([0] + [len(split.shards) for split in corpus.splits])
        self._stores = [split.store for split in corpus.splits for _ in split.shards]
        self._keys = [s.shard_key(n) for s in corpus.splits for n in range(len(s.shards))]
        paths = [store.local_path(k) for store, k in zip(self._stores, self._keys, strict=True)]
        self._paths = [None if path is None else str(path) for path in paths]
        self._lock = threading.Lock()
        self._files: dict[int, _File] = {}
        self.remote: Prefetcher | None = None
        if None in self._paths:
            sha256 = [shard.sha256 for split in corpus.splits for shard in split.shards]
            self.remote = Prefetcher(
                corpus, stores=self._stores, keys=self._keys, sha256=sha256, cache=cache
            )

    def locate(self, rows: I64, parts: BlockRanges | None = None) -> SampleLocations:
        """Look rows up in the index.

        Args:
            rows: int64 [n], of the corpus.
            parts: what remote rows are read from; None: whole blocks.
        """
        column = {
            name: self.corpus.column(name, rows).astype(np.int64)
            for name in ("offset", "length", "crc32")
        }
        part: list[ByteRange] = []
        part_offset: list[int] = []
        if self.remote is not None:
            parts = parts or self.blocks(rows)
            part = as_tuples(parts)
            part_offset = self.corpus.column("offset", parts.first).tolist()
        return SampleLocations(
            rows=rows,
            uid=self.corpus.column("uid", rows),
            object_id=self.corpus.column("object_id", rows).astype(np.int64),
            shard=self._shards(rows),
            offset=column["offset"].tolist(),
            length=column["length"].tolist(),
            crc32=column["crc32"].tolist(),
            jpg=self._between("jpg", rows),
            json=self._between("json", rows),
            likelihood=self._between("likelihood", rows),
            part=part,
            part_offset=part_offset,
        )

    def read(self, at: SampleLocations, low: int, high: int) -> list[Data | Damage]:
        """The tar ranges of rows low..high-1, checked by length and crc32.

        Returns:
            The bytes of each row; or, where they failed the check and a fresh read failed again,
            what is wrong.

        Raises:
            StorageError: a shard cannot be read.
            ReplacedError: a shard was replaced since it was first read.
        """
        found: list[Data | Damage] = []
        files, pread, here = self._files, os.pread, slice(low, high)
        ranges = zip(at.shard[here], at.offset[here], at.length[here], at.crc32[here], strict=True)
        for place, (shard, offset, length, expected) in enumerate(ranges, low):
            file = files.get(shard)
            data: Data | Damage | None
            try:
                if file is not None:
                    data = pread(file.descriptor, length, offset)
                else:
                    data = self._first_read(at, place)
                if data is None or len(data) != length or crc32(data) != expected:
                    data = self._again(at, place)
            except OSError as error:
                raise self._unreadable(shard, error) from None
            found.append(data)
        return found

    def blocks(self, rows: I64) -> BlockRanges:
        """The whole blocks that rows lie in, of use up to their last row (for reading in order)."""
        first, stop = self.corpus.block_of(rows)
        return BlockRanges(first, stop, stop)

    def want(self, rows: I64, parts: BlockRanges) -> None:
        """Begin to fetch the parts of remote rows, in order, unless they are at hand already."""
        if self.remote is None:
            return
        # Each part once: neighbours in a part are many, and asking takes a lock.
        for part, shard in dict.fromkeys(zip(as_tuples(parts), self._shards(rows), strict=True)):
            if self._paths[shard] is None:
                self.remote.ask(part, shard)

    def retire(self, position: int) -> None:
        """Forget the parts that are of no use from a position on."""
        if self.remote is not None:
            self.remote.retire(position)

    def forget(self) -> None:
        """Forget all parts, at the end of an epoch."""
        if self.remote is not None:
            self.remote.forget()

    def damage(self, at: SampleLocations, place: int, check: str) -> Damage:
        """Say of a row what is wrong with it, and count it."""
        with self._lock:
            self.damaged += 1
        uid = int(at.uid[place])
        store, key = self._stores[at.shard[place]], self._keys[at.shard[place]]
        return Damage(uid, f"{store.url}/{key}", check)

    def close(self) -> None:
        """End the threads and close the files."""
        if self.remote is not None:
            self.remote.close()
        self._files.clear()

    def _between(self, name: str, rows: I64) -> list[tuple[int, int]]:
        start = self.corpus.column(f"{name}_offset", rows).astype(np.int64)
        stop = start + self.corpus.column(f"{name}_length", rows)
        return list(zip(start.tolist(), stop.tolist(), strict=True))

    def _shards(self, rows: I64) -> list[int]:
        """The shard of each row, counted through the corpus."""
        shards = self.corpus.column("shard", rows).astype(np.int64)
        if len(self.corpus.splits) > 1:
            shards += self._first_shard[self.corpus.locate(rows)[0]]
        found: list[int] = shards.tolist()
        return found

    def _first_read(self, at: SampleLocations, place: int) -> Data | None:
        """A row of a remote shard, or of a local one that is not open yet.

        None where a remote shard ends before the part does.
        """
        shard = at.shard[place]
        path = self._paths[shard]
        if path is not None:
            file = self._open(shard, path)  # held: another thread may push it out meanwhile
            return os.pread(file.descriptor, at.length[place], at.offset[place])
        assert self.remote is not None
        data = self.remote.get(at.part[place], shard)
        if data is None:
            return None
        start = at.offset[place] - at.part_offset[place]
        return memoryview(data)[start : start + at.length[place]]

    def _open(self, shard: int, path: str) -> _File:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                while len(self._files) >= _OPEN_FILES:
                    self._files.pop(next(iter(self._files)))
                file = self._files[shard] = _File(path)
            return file

    def _unreadable(self, shard: int, error: OSError) -> OSError:
        """A store's own error, or one that says which file could not be read."""
        if isinstance(error, StorageError):
            return error
        return StorageError(f"shard {self._paths[shard]}: {error.strerror}; restore it")

    def _again(self, at: SampleLocations, place: int) -> Data | Damage:
        """Read one sample past every cache; if that fails the check too, it is damaged."""
        shard = at.shard[place]
        with self._lock:
            self.refetched += 1
            self._files.pop(shard, None)
        if self._paths[shard] is None:
            assert self.remote is not None
            self.remote.discard(at.part[place], shard)
        found = read_again(
            self._stores[shard],
            self._keys[shard],
            offset=at.offset[place],
            length=at.length[place],
            expected=at.crc32[place],
        )
        return self.damage(at, place, found) if isinstance(found, str) else found
