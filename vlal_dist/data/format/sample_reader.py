"""Reading single samples of a split: ranged, verified, safe to call from many threads.

Local shards are read sample by sample; remote ones block by block, the last few blocks kept.
"""

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NotRequired

import numpy as np
import numpy.typing as npt
from isal.isal_zlib import crc32
from typing_extensions import TypedDict

from vlal_dist.contents import Count, Finite, parse_json
from vlal_dist.data.format.dataset import Split
from vlal_dist.data.format.tar import key_of
from vlal_dist.data.hashing import uid_to_hex
from vlal_dist.errors import DataError, TruncatedError
from vlal_dist.method.feasible import decode_npy
from vlal_dist.storage.store import Store


class _Meta(TypedDict):
    """`KEY.json` (docs/formats.md)."""

    instance_id: str
    image_id: NotRequired[str]
    object_id: Count
    box_in_crop: tuple[Finite, Finite, Finite, Finite]
    positive: list[Count]
    negative: list[Count]


def parse_meta(data: bytes) -> dict[str, Any]:
    """The `KEY.json` of a sample; a DataError unless it holds what pack writes there."""
    return parse_json(data, _Meta, where="its json", remedy="pack again")  # type: ignore[no-any-return]


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
        image_id: the photo's name in the annotations; empty where the dataset does not say it.
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
    image_id: str = ""


def read_again(store: Store, key: str, *, offset: int, length: int, expected: int) -> bytes | str:
    """Read a sample whose tar range failed its check once more, past every cache.

    Args:
        store: holds the shard.
        key: the shard.
        offset: of the sample's tar range, bytes.
        length: of that range, bytes.
        expected: its crc32.

    Returns:
        The bytes; or, where they fail the check again, what is wrong with them.

    Raises:
        StorageError: the shard cannot be read.
    """
    try:
        data = store.read(key, offset=offset, length=length)
    except TruncatedError:
        return f"the shard ends before its {length} bytes at offset {offset} do"
    found = crc32(data)
    return data if found == expected else f"crc32 {found:08x} where {expected:08x} is expected"


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
        """The sample's tar range, checked by length and crc32; a failed check is retried once.

        Raises:
            DataError: the bytes are not those that were packed; names shard, sample and check.
            StorageError: the shard cannot be read.
        """
        index, key = self.split.index, self.split.shard_key(int(self.split.index.shard[row]))
        offset, length = int(index.offset[row]), int(index.length[row])
        expected = int(index.crc32[row])
        try:
            data = self._read(row, key, offset, length)
            if len(data) == length and crc32(data) == expected:
                return data
        except TruncatedError:
            pass
        with self._lock:
            self._blocks.pop(self._block_of(row), None)
        again = read_again(self.split.store, key, offset=offset, length=length, expected=expected)
        if isinstance(again, str):
            raise self._damaged(row, again)
        return again

    def read_members(self, row: int) -> tuple[str, dict[str, bytes]]:
        """The key and the contents of every member of a sample; errors as `read_range`."""
        data, members = self.read_range(row), self.split.index.members(row)
        annotations = self.split.annotations
        contents = {name: data[at : at + length] for name, (at, length) in members.items()}
        try:
            return key_of(data) if annotations is None else annotations.text("key", row), contents
        except DataError as error:
            raise self._damaged(row, str(error)) from None

    def read(self, row: int) -> Sample:
        """One verified sample; errors as `read_range`."""
        key, members = self.read_members(row)
        likelihood = None
        try:
            meta = self._meta(row, members)
            if "likelihood.npy" in members:
                likelihood = decode_npy(members["likelihood.npy"], "<f4").copy()
        except DataError as error:
            raise self._damaged(row, str(error)) from None
        if meta["object_id"] != int(self.split.index.object_id[row]):
            raise self._damaged(row, f"object {meta['object_id']} where index.arrow has another")
        most = self.split.num_attributes
        if most is not None and max(meta["positive"] + meta["negative"], default=-1) >= most:
            raise self._damaged(row, f"it names an attribute outside 0..{most - 1}")
        x, y, w, h = meta["box_in_crop"]
        return Sample(
            row=row,
            uid=int(self.split.index.uid[row]),
            key=key,
            instance_id=meta["instance_id"],
            object_id=int(meta["object_id"]),
            jpg=members["jpg"],
            box_in_crop=(x, y, w, h),
            positive=meta["positive"],
            negative=meta["negative"],
            log_likelihood=likelihood,
            image_id=meta.get("image_id", ""),
        )

    def _meta(self, row: int, members: dict[str, bytes]) -> dict[str, Any]:
        """What `KEY.json` says; of a sample in a tar of others the same from its annotations."""
        found = self.split.annotations
        if found is None:
            return parse_meta(members["json"])
        return {
            "instance_id": found.text("instance_id", row),
            "object_id": int(self.split.index.object_id[row]),
            "box_in_crop": (0.0, 0.0, float(found.width[row]), float(found.height[row])),
            "positive": found.positive.of(row),
            "negative": found.negative.of(row),
        }

    def _read(self, row: int, key: str, offset: int, length: int) -> bytes:
        if self.split.store.local_path(key) is not None:
            return self.split.store.read(key, offset=offset, length=length)
        block = self._block_of(row)
        start = offset - int(self.split.blocks.offset[block])
        return self._block(block)[start : start + length]

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

    def _damaged(self, row: int, check: str) -> DataError:
        index = self.split.index
        key, uid = self.split.shard_key(int(index.shard[row])), uid_to_hex(int(index.uid[row]))
        return DataError(
            f"{self.split.store.url}/{key}: sample row {row} (uid {uid}): {check}; "
            "shard or index was altered or cut: restore it, or pack the dataset again"
        )
