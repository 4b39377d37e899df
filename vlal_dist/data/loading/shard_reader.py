"""Verified reads of many samples: local shards by sample, remote shards by block range.

Length and crc32 of every sample's tar range come from the index. What fails the check is read once
more, past every cache; what fails again is damaged. An error of transport is never damage.
"""

import os
import threading
from dataclasses import dataclass

import numpy as np
from isal.isal_zlib import crc32

from vlal_dist.data.format.sample_reader import read_again
from vlal_dist.data.hashing import I64, U64, uid_to_hex
from vlal_dist.data.loading.disk_cache import DiskCache
from vlal_dist.data.loading.prefetch import Prefetcher, ShardFile
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.data.order.shuffle import BlockRanges
from vlal_dist.errors import DataError, StorageError

_OPEN_FILES = 256
"""Local shards kept open."""

Data = bytes | memoryview


@dataclass(frozen=True)
class SampleLocations:
    """Where the samples of n rows lie: columns of int64, unless stated otherwise.

    Attributes:
        rows: [n], of the corpus.
        uid: uint64 [n].
        object_id: [n].
        shard: [n], number of the shard in the corpus.
        offset, length, crc32: [n], of the tar range.
        jpg, json, likelihood: [n, 2], start and end of each member's contents in the tar range.
        block: [n, 3], the `BlockRange` that a remote sample is read from.
        block_offset: [n], its first byte in the shard.
    """

    rows: I64
    uid: U64
    object_id: I64
    shard: I64
    offset: I64
    length: I64
    crc32: I64
    jpg: I64
    json: I64
    likelihood: I64
    block: I64
    block_offset: I64

    def select(self, which: I64 | slice) -> "SampleLocations":
        """Some of the rows."""
        return SampleLocations(**{name: column[which] for name, column in vars(self).items()})


@dataclass(frozen=True)
class Damage:
    """A sample that cannot be used.

    Attributes:
        uid: unsigned.
        where: URL of its shard.
        check: the check that failed.
        as_packed: the bytes have their checksum, so that the fault is in what was packed.
    """

    uid: int
    where: str
    check: str
    as_packed: bool = False

    @property
    def remedy(self) -> str:
        """What helps."""
        if self.as_packed:
            return (
                "its bytes are as they were packed: pack the photos into a new paths.dataset "
                "(photos that do not decode are rejected or repaired there), then score and merge"
            )
        return (
            "the shard or its index was altered or cut: restore it (vlal verify checks all), or "
            "pack into a new paths.dataset"
        )

    def __str__(self) -> str:
        return f"{self.where}: sample uid {uid_to_hex(self.uid)}: {self.check}"


class DamagedError(DataError):
    """A sample failed its check twice."""

    def __init__(self, damage: Damage, *, may_quarantine: bool = False) -> None:
        more = "; or set data.damage quarantine, which leaves it out" if may_quarantine else ""
        super().__init__(f"{damage}; {damage.remedy}{more}")
        self.damage = damage


class _File:
    """A local shard held open; closed when its last reader is done."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ShardReader:
    """Reads verified samples of a corpus; may be shared by threads.

    Args:
        corpus: whose samples are read.
        cache: keeps block ranges of remote shards on a local disk; None: no such cache.

    Attributes:
        remote: whether a shard is remote.
        prefetcher: fetches from remote shards.
        refetched: samples that failed a check and were read once more.
        damaged: samples that failed it again.
    """

    def __init__(self, corpus: ConcatSplits, *, cache: DiskCache | None = None) -> None:
        self.corpus, self.cache = corpus, cache
        self.refetched = self.damaged = 0
        self._first_shard = np.cumsum([0] + [len(split.shards) for split in corpus.splits])
        self._shards: list[ShardFile] = []
        for split in corpus.splits:
            for number, shard in enumerate(split.shards):
                key = split.shard_key(number)
                path = split.store.local_path(key)
                self._shards.append(ShardFile(split.store, key, shard.sha256, path))
        self.remote = any(shard.path is None for shard in self._shards)
        self.prefetcher = Prefetcher(corpus, self._shards, cache=cache)
        self._lock = threading.Lock()
        self._files: dict[int, _File] = {}

    def locate(self, rows: I64, blocks: BlockRanges | None = None) -> SampleLocations:
        """Look rows up in the index.

        Args:
            rows: int64 [n], of the corpus.
            blocks: ranges that remote rows are read from; None: whole blocks.
        """

        def column(name: str) -> I64:
            return self.corpus.column(name, rows).astype(np.int64)

        def member(name: str) -> I64:
            start = column(f"{name}_offset")
            return np.stack([start, start + column(f"{name}_length")], axis=1)

        block = np.zeros((len(rows), 3), dtype=np.int64)
        if self.remote:
            blocks = blocks or self.whole_blocks(rows)
            block = np.stack([blocks.first, blocks.stop, blocks.until], axis=1)
        return SampleLocations(
            rows=rows,
            uid=self.corpus.column("uid", rows),
            object_id=column("object_id"),
            shard=self._shard_of(rows),
            offset=column("offset"),
            length=column("length"),
            crc32=column("crc32"),
            jpg=member("jpg"),
            json=member("json"),
            likelihood=member("likelihood"),
            block=block,
            block_offset=self.corpus.column("offset", block[:, 0]).astype(np.int64),
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
        columns = (c[here].tolist() for c in (at.shard, at.offset, at.length, at.crc32))
        for place, (shard, offset, length, expected) in enumerate(zip(*columns, strict=True), low):
            file = files.get(shard)
            data: Data | Damage | None
            try:
                if file is not None:
                    data = pread(file.descriptor, length, offset)
                else:
                    data = self._first_read(at, place)
                if data is None or len(data) != length or crc32(data) != expected:
                    data = self._second_read(at, place)
            except StorageError:
                raise
            except OSError as error:
                path = self._shards[shard].path
                raise StorageError(f"shard {path}: {error.strerror}; restore it") from None
            found.append(data)
        return found

    def whole_blocks(self, rows: I64) -> BlockRanges:
        """The blocks that rows lie in, each used up to its last row (for reading in order)."""
        first, stop = self.corpus.block_of(rows)
        return BlockRanges(first, stop, stop)

    def prefetch(self, rows: I64, blocks: BlockRanges) -> None:
        """Begin to fetch the ranges of remote rows, in order."""
        # Each range once: many neighbours share one, and each request takes a lock.
        ranges = np.stack([blocks.first, blocks.stop, blocks.until, self._shard_of(rows)], axis=1)
        for first, stop, until, shard in dict.fromkeys(map(tuple, ranges.tolist())):
            if self._shards[shard].path is None:
                self.prefetcher.request((first, stop, until), shard)

    def damage(
        self, at: SampleLocations, place: int, check: str, *, as_packed: bool = False
    ) -> Damage:
        """Count a damaged row, and describe it (see `Damage`)."""
        with self._lock:
            self.damaged += 1
        shard = self._shards[at.shard[place]]
        return Damage(int(at.uid[place]), f"{shard.store.url}/{shard.key}", check, as_packed)

    def close(self) -> None:
        """End the threads and close the files."""
        self.prefetcher.close()
        self._files.clear()

    def _shard_of(self, rows: I64) -> I64:
        """The number of each row's shard in the corpus."""
        shards = self.corpus.column("shard", rows).astype(np.int64)
        if len(self.corpus.splits) > 1:
            shards += self._first_shard[self.corpus.locate(rows)[0]]
        return shards

    def _first_read(self, at: SampleLocations, place: int) -> Data | None:
        """A sample of a remote shard, or of a local one that is not open yet.

        None where a remote shard ends before the sample's block range does.
        """
        shard, offset, length = (int(c[place]) for c in (at.shard, at.offset, at.length))
        path = self._shards[shard].path
        if path is not None:
            with self._lock:
                file = self._files.get(shard)
                if file is None:
                    while len(self._files) >= _OPEN_FILES:
                        self._files.pop(next(iter(self._files)))
                    file = self._files[shard] = _File(str(path))
            return os.pread(file.descriptor, length, offset)
        first, stop, until = at.block[place].tolist()
        data = self.prefetcher.request((first, stop, until), shard).result()
        if data is None:
            return None
        start = offset - int(at.block_offset[place])
        return memoryview(data)[start : start + length]

    def _second_read(self, at: SampleLocations, place: int) -> Data | Damage:
        """Read one sample past every cache; if that fails the check too, it is damaged."""
        shard = int(at.shard[place])
        file = self._shards[shard]
        with self._lock:
            self.refetched += 1
            self._files.pop(shard, None)
        if file.path is None:
            first, stop, until = at.block[place].tolist()
            self.prefetcher.discard((first, stop, until), shard)
        found = read_again(
            file.store,
            file.key,
            offset=int(at.offset[place]),
            length=int(at.length[place]),
            expected=int(at.crc32[place]),
        )
        return self.damage(at, place, found) if isinstance(found, str) else found
