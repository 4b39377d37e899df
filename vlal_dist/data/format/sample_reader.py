"""Reading single samples of a split: ranged, verified, safe to call from many threads.

Local shards are read sample by sample; remote ones block by block, the last few blocks kept.
"""

import io
import json
import os
import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from isal.isal_zlib import crc32

from vlal_dist.data.format.dataset import Split
from vlal_dist.data.format.tar import key_of
from vlal_dist.data.hashing import uid_to_hex
from vlal_dist.errors import DataError, StorageError


@dataclass(frozen=True)
class Sample:
    """One crop with its labels.

    Attributes:
        row: row of the split's index.
        uid: unsigned 64-bit name.
        key: the sample's key in the tar.
        instance_id: the annotation's id.
        object_id: object.
        jpg: the crop's JPEG bytes.
        box_in_crop: x, y, width, height of the raw box inside the crop, pixels.
        positive, negative: attribute ids annotated present and absent, ascending.
        log_likelihood: float32 over the object's feasible attributes, or None before merge.
    """

    row: int
    uid: int
    key: str
    instance_id: str
    object_id: int
    jpg: bytes
    box_in_crop: tuple[float, float, float, float]
    positive: list[int]
    negative: list[int]
    log_likelihood: npt.NDArray[np.float32] | None


class SampleReader:
    """Reads samples of one split by row.

    Args:
        split: the opened split.
        cache_blocks: blocks of a remote split kept in memory.
    """

    def __init__(self, split: Split, *, cache_blocks: int = 64) -> None:
        self.split = split
        self.cache_blocks = cache_blocks
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, Future[bytes]] = OrderedDict()

    def read_range(self, row: int) -> bytes:
        """The sample's tar range, checked by length and crc32; what fails is fetched once more.

        Raises:
            DataError: the bytes are not those that were packed; names shard, sample and check.
            StorageError: the shard cannot be read.
        """
        index = self.split.index
        shard, offset, length = (
            int(index.shard[row]),
            int(index.offset[row]),
            int(index.length[row]),
        )
        data = self._read(row, shard, offset, length)
        if self._fault(row, data):  # perhaps altered on the way: once more
            self._forget_block(row)
            data = self._read(row, shard, offset, length)
        if fault := self._fault(row, data):
            self._damaged(row, fault)
        return data

    def read_parts(self, row: int) -> tuple[str, dict[str, bytes]]:
        """The key and the contents of every part of a sample; errors as `read_range`."""
        data = self.read_range(row)
        index = self.split.index
        where = {
            "jpg": (index.jpg_offset[row], index.jpg_length[row]),
            "json": (index.json_offset[row], index.json_length[row]),
            "likelihood.npy": (index.likelihood_offset[row], index.likelihood_length[row]),
        }
        parts = {
            name: data[int(offset) : int(offset) + int(length)]
            for name, (offset, length) in where.items()
            if int(length)
        }
        return key_of(data), parts

    def read(self, row: int) -> Sample:
        """One verified sample; errors as `read_range`."""
        key, parts = self.read_parts(row)
        meta = json.loads(parts["json"])
        if meta["object_id"] != int(self.split.index.object_id[row]):
            self._damaged(row, f"object {meta['object_id']} where index.arrow has another")
        likelihood = None
        if "likelihood.npy" in parts:
            stream = io.BytesIO(parts["likelihood.npy"])
            likelihood = np.lib.format.read_array(stream, allow_pickle=False)
        x, y, w, h = meta["box_in_crop"]
        return Sample(
            row=row,
            uid=int(self.split.index.uid[row]),
            key=key,
            instance_id=meta["instance_id"],
            object_id=int(meta["object_id"]),
            jpg=parts["jpg"],
            box_in_crop=(x, y, w, h),
            positive=meta["positive"],
            negative=meta["negative"],
            log_likelihood=likelihood,
        )

    def _read(self, row: int, shard: int, offset: int, length: int) -> bytes:
        key = self.split.shard_key(shard)
        path = self.split.store.local_path(key)
        if path is None:
            block = self._block_of(row)
            start = offset - int(self.split.blocks.offset[block])
            return self._block(block)[start : start + length]
        # Opened for each read: a split may have more shards than a process may have open files.
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                return os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError(f"shard {path}: {error.strerror}; restore it") from None

    def _fault(self, row: int, data: bytes) -> str:
        """What is wrong with a sample's bytes; empty: nothing."""
        expected, length = int(self.split.index.crc32[row]), int(self.split.index.length[row])
        if len(data) != length:
            return f"{len(data)} bytes where {length} are expected"
        crc = crc32(data)
        return "" if crc == expected else f"crc32 {crc:08x} where {expected:08x} is expected"

    def _forget_block(self, row: int) -> None:
        with self._lock:
            self._blocks.pop(self._block_of(row), None)

    def _block_of(self, row: int) -> int:
        return int(np.searchsorted(self.split.blocks.first_row, row, side="right")) - 1

    def _block(self, block: int) -> bytes:
        """A remote block; one thread fetches it, the others wait for that one."""
        with self._lock:
            waiting = self._blocks.get(block)
            if waiting is not None:
                self._blocks.move_to_end(block)
            else:
                mine: Future[bytes] = Future()
                self._blocks[block] = mine
                while len(self._blocks) > self.cache_blocks:
                    self._blocks.popitem(last=False)
        if waiting is not None:
            return waiting.result()
        blocks = self.split.blocks
        key = self.split.shard_key(int(blocks.shard[block]))
        try:
            offset, length = int(blocks.offset[block]), int(blocks.bytes[block])
            mine.set_result(self.split.store.read(key, offset=offset, length=length))
        except BaseException as error:
            mine.set_exception(error)
            with self._lock:
                self._blocks.pop(block, None)
        return mine.result()

    def _damaged(self, row: int, check: str) -> None:
        key, uid = self.split.shard_key(int(self.split.index.shard[row])), self.split.index.uid[row]
        raise DataError(
            f"{self.split.store.url}/{key}: sample row {row} (uid {uid_to_hex(int(uid))}): {check}"
            "; shard or index was altered or cut: restore it, or pack the dataset again"
        )
