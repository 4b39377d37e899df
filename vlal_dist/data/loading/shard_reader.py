"""Verified reads of many samples: local shards by sample, remote shards by block range.

Length and crc32 of every sample's tar range come from the index. What fails the check is read once
more, past every cache; what fails again is damaged. An error of transport is never damage.
"""

import os
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from vlal_dist.data.format.sample_reader import read_again
from vlal_dist.data.hashing import I64, U64, uid_to_hex
from vlal_dist.data.loading.disk_cache import DiskCache
from vlal_dist.data.loading.prefetch import BlockRange, Prefetcher, ShardFile, as_tuples
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.data.order.shuffle import BlockRanges
from vlal_dist.errors import DataError, StorageError

_OPEN_FILES = 256
"""Local shards kept open."""

Data = bytes | memoryview


@dataclass(frozen=True)
class SampleLocations:
    """Where the samples of some rows lie: columns with one entry per row.

    Attributes:
        rows: int64 [n], of the corpus.
        uid: uint64 [n].
        object_id: int64 [n].
        shard: number of the shard in the corpus.
        offset, length, crc32: of the tar range.
        jpg, json, likelihood: (start, stop) of each member's contents within the tar range.
        block, block_offset: the range that a remote sample is read from, and its offset in the
            shard; empty if all shards are local.
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
    block: list[BlockRange]
    block_offset: list[int]

    def between(self, low: int, high: int) -> "SampleLocations":
        """Rows low..high-1 of these."""
        return SampleLocations(**{name: value[low:high] for name, value in vars(self).items()})

    def select(self, places: I64) -> "SampleLocations":
        """The rows at some places of these."""

        def pick(column: Any) -> Any:
            if isinstance(column, np.ndarray):
                return column[places]
            return [column[n] for n in places.tolist()] if column else []

        return SampleLocations(**{name: pick(column) for name, column in vars(self).items()})


@dataclass(frozen=True)
class Damage:
    """A sample that cannot be used.

    Attributes:
        uid: unsigned.
        where: URL of its shard.
        check: the check that failed.
    """

    uid: int
    where: str
    check: str

    def __str__(self) -> str:
        return f"{self.where}: sample uid {uid_to_hex(self.uid)}: {self.check}"


class DamagedError(DataError):
    """A sample failed its check twice."""

    def __init__(self, damage: Damage) -> None:
        super().__init__(
            f"{damage}; the shard or its index was altered or cut: restore it (shard_tools verify "
            "checks all), pack again, or set data.damage quarantine"
        )
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
        remote: fetches from remote shards; None where all are local.
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
        self._lock = threading.Lock()
        self._files: dict[int, _File] = {}
        self.remote: Prefetcher | None = None
        if any(shard.path is None for shard in self._shards):
            self.remote = Prefetcher(corpus, self._shards, cache=cache)

    def locate(self, rows: I64, blocks: BlockRanges | None = None) -> SampleLocations:
        """Look rows up in the index.

        Args:
            rows: int64 [n], of the corpus.
            blocks: ranges that remote rows are read from; None: whole blocks.
        """
        column = {
            name: self.corpus.column(name, rows).astype(np.int64)
            for name in ("object_id", "offset", "length", "crc32")
        }
        block: list[BlockRange] = []
        block_offset: list[int] = []
        if self.remote is not None:
            blocks = blocks or self.whole_blocks(rows)
            block = as_tuples(blocks)
            block_offset = self.corpus.column("offset", blocks.first).tolist()
        return SampleLocations(
            rows=rows,
            uid=self.corpus.column("uid", rows),
            object_id=column["object_id"],
            shard=self._shard_of(rows),
            offset=column["offset"].tolist(),
            length=column["length"].tolist(),
            crc32=column["crc32"].tolist(),
            jpg=self._member("jpg", rows),
            json=self._member("json", rows),
            likelihood=self._member("likelihood", rows),
            block=block,
            block_offset=block_offset,
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
        if self.remote is None:
            return
        # Each range once: many neighbours share one, and each request takes a lock.
        for block, shard in dict.fromkeys(
            zip(as_tuples(blocks), self._shard_of(rows), strict=True)
        ):
            if self._shards[shard].path is None:
                self.remote.request(block, shard)

    def retire(self, position: int) -> None:
        """Drop the ranges that are not used any more from a position on."""
        if self.remote is not None:
            self.remote.retire(position)

    def clear(self) -> None:
        """Drop all ranges, at the end of an epoch."""
        if self.remote is not None:
            self.remote.clear()

    def damage(self, at: SampleLocations, place: int, check: str) -> Damage:
        """Count a damaged row, and describe it."""
        with self._lock:
            self.damaged += 1
        shard = self._shards[at.shard[place]]
        return Damage(int(at.uid[place]), f"{shard.store.url}/{shard.key}", check)

    def close(self) -> None:
        """End the threads and close the files."""
        if self.remote is not None:
            self.remote.close()
        self._files.clear()

    def _member(self, name: str, rows: I64) -> list[tuple[int, int]]:
        start = self.corpus.column(f"{name}_offset", rows).astype(np.int64)
        stop = start + self.corpus.column(f"{name}_length", rows)
        return list(zip(start.tolist(), stop.tolist(), strict=True))

    def _shard_of(self, rows: I64) -> list[int]:
        """The number of each row's shard in the corpus."""
        shards = self.corpus.column("shard", rows).astype(np.int64)
        if len(self.corpus.splits) > 1:
            shards += self._first_shard[self.corpus.locate(rows)[0]]
        found: list[int] = shards.tolist()
        return found

    def _first_read(self, at: SampleLocations, place: int) -> Data | None:
        """A sample of a remote shard, or of a local one that is not open yet.

        None where a remote shard ends before the sample's block range does.
        """
        shard = at.shard[place]
        path = self._shards[shard].path
        if path is not None:
            with self._lock:
                file = self._files.get(shard)
                if file is None:
                    while len(self._files) >= _OPEN_FILES:
                        self._files.pop(next(iter(self._files)))
                    file = self._files[shard] = _File(str(path))
            return os.pread(file.descriptor, at.length[place], at.offset[place])
        assert self.remote is not None
        data = self.remote.request(at.block[place], shard).result()
        if data is None:
            return None
        start = at.offset[place] - at.block_offset[place]
        return memoryview(data)[start : start + at.length[place]]

    def _second_read(self, at: SampleLocations, place: int) -> Data | Damage:
        """Read one sample past every cache; if that fails the check too, it is damaged."""
        shard = at.shard[place]
        file = self._shards[shard]
        with self._lock:
            self.refetched += 1
            self._files.pop(shard, None)
        if file.path is None:
            assert self.remote is not None
            self.remote.discard(at.block[place], shard)
        found = read_again(
            file.store,
            file.key,
            offset=at.offset[place],
            length=at.length[place],
            expected=at.crc32[place],
        )
        return self.damage(at, place, found) if isinstance(found, str) else found
