"""Index, blocks and shard list of a split, and the schemas of its tables (docs/formats.md).

`index.arrow` and `blocks.arrow` are memory-mapped without a copy: a sample is read by the first
without parsing a tar header, and the order of an epoch needs only the second.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from vlal_dist.data.hashing import uid_to_hex
from vlal_dist.errors import DataError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Index:
    """Where each sample lies; one entry per sample, offsets in bytes.

    Attributes:
        uid: uint64, first 8 bytes of sha256(dataset name, NUL, instance id).
        shard: uint32, position in the split's shard list.
        offset, length: uint64, uint32, the sample's tar range.
        jpg_offset, jpg_length, json_offset, json_length, likelihood_offset, likelihood_length:
            uint32, contents of the members, counted from `offset`; 0, 0 where one is absent.
        object_id: uint32.
        crc32: uint32, zlib.crc32 of the whole range.
    """

    uid: Array
    shard: Array
    offset: Array
    length: Array
    jpg_offset: Array
    jpg_length: Array
    json_offset: Array
    json_length: Array
    likelihood_offset: Array
    likelihood_length: Array
    object_id: Array
    crc32: Array

    def __len__(self) -> int:
        return len(self.uid)

    def members(self, row: int) -> dict[str, tuple[int, int]]:
        """Member of a sample -> offset and length of its contents in the tar range, bytes."""
        found = {
            name: (int(offset[row]), int(length[row]))
            for name, offset, length in (
                ("jpg", self.jpg_offset, self.jpg_length),
                ("json", self.json_offset, self.json_length),
                ("likelihood.npy", self.likelihood_offset, self.likelihood_length),
            )
        }
        return {name: place for name, place in found.items() if place[1]}

    def rows_of_shard(self, shard: int) -> range:
        """The rows of a shard, which are adjacent."""
        return range(*np.searchsorted(self.shard, [shard, shard + 1]).tolist())


@dataclass(frozen=True)
class Blocks:
    """Runs of neighbouring samples of about `block_bytes`, never across shards.

    Attributes:
        shard: uint32.
        first_row: uint64, row of the index.
        samples: uint32.
        offset, bytes: uint64, the run's range in the shard.
    """

    shard: Array
    first_row: Array
    samples: Array
    offset: Array
    bytes: Array

    def __len__(self) -> int:
        return len(self.shard)


INDEX_TYPES: dict[str, str] = {
    field.name: {"uid": "uint64", "offset": "uint64"}.get(field.name, "uint32")
    for field in fields(Index)
}
BLOCK_TYPES: dict[str, str] = {
    "shard": "uint32",
    "first_row": "uint64",
    "samples": "uint32",
    "offset": "uint64",
    "bytes": "uint64",
}


@dataclass(frozen=True)
class Shard:
    """One tar: file name, size in bytes, sha256 (hex), number of samples."""

    name: str
    bytes: int
    sha256: str
    samples: int


def index_from_columns(columns: Mapping[str, Any]) -> Index:
    """Build an index from any sequences, with the types of the format."""
    return Index(
        **{name: np.asarray(columns[name], dtype=INDEX_TYPES[name]) for name in INDEX_TYPES}
    )


def check_uids(indexes: Sequence[Index]) -> None:
    """Refuse a dataset in which two samples share a uid (a 64-bit collision, or a duplicate id)."""
    values, counts = np.unique(np.concatenate([one.uid for one in indexes]), return_counts=True)
    if (counts > 1).any():
        twice = uid_to_hex(int(values[counts > 1][0]))
        raise DataError(
            f"two samples share the uid {twice}: duplicate instance ids, or (1 in 10^7 at a "
            "million samples) a collision; choose another pack.name"
        )


def form_blocks(index: Index, *, block_bytes: int) -> Blocks:
    """Cut each shard's samples into runs that end at the first sample to reach `block_bytes`."""
    rows: list[tuple[int, int, int, int, int]] = []
    start = 0
    size = 0
    shard, length = index.shard.tolist(), index.length.tolist()
    for row in range(len(index)):
        size += length[row]
        last = row + 1 == len(index) or shard[row + 1] != shard[row]
        if last or size >= block_bytes:
            rows.append((shard[row], start, row + 1 - start, int(index.offset[start]), size))
            start, size = row + 1, 0
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(BLOCK_TYPES)
    return Blocks(
        **{
            name: np.asarray(column, dtype=BLOCK_TYPES[name])
            for name, column in zip(BLOCK_TYPES, columns, strict=True)
        }
    )


def encode_arrow(columns: Mapping[str, Array]) -> bytes:
    """Arrow IPC file bytes: one record batch, uncompressed, columns in order."""
    batch = pa.record_batch([pa.array(values) for values in columns.values()], names=list(columns))
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def encode_index(index: Index) -> bytes:
    """`index.arrow`."""
    return encode_arrow(vars(index))


def encode_blocks(blocks: Blocks) -> bytes:
    """`blocks.arrow`."""
    return encode_arrow(vars(blocks))


def map_index(path: Path) -> Index:
    """Memory-map `index.arrow`; columns share the map, nothing is copied."""
    return Index(**_map_columns(path, INDEX_TYPES))


def map_blocks(path: Path) -> Blocks:
    """Memory-map `blocks.arrow`."""
    return Blocks(**_map_columns(path, BLOCK_TYPES))


def encode_table(columns: Mapping[str, object], schema: pa.Schema) -> bytes:
    """Parquet bytes with fixed settings: the same rows give the same bytes."""
    table = pa.table(dict(columns), schema=schema)
    sink = io.BytesIO()
    pa.parquet.write_table(table, sink, compression="zstd", row_group_size=65_536)
    return sink.getvalue()


SHARDS_SCHEMA = pa.schema(
    [("shard", pa.string()), ("bytes", pa.uint64()), ("sha256", pa.string()), ("samples", "uint32")]
)
LABELS_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("instance_id", pa.string()),
        ("positive", pa.list_(pa.uint32())),
        ("negative", pa.list_(pa.uint32())),
    ]
)
REJECTS_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("split", "instance_id", "reason", "detail")]
)


def encode_shards(shards: Sequence[Shard]) -> bytes:
    """`shards.parquet`."""
    columns = {name: [getattr(shard, name) for shard in shards] for name in SHARDS_SCHEMA.names[1:]}
    return encode_table({"shard": [shard.name for shard in shards], **columns}, SHARDS_SCHEMA)


def decode_shards(data: bytes) -> list[Shard]:
    """Read `shards.parquet`."""
    rows = pa.parquet.read_table(pa.BufferReader(data)).to_pylist()
    return [Shard(*row.values()) for row in rows]


def _map_columns(path: Path, types: Mapping[str, str]) -> dict[str, Array]:
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    found = {field.name: str(field.type) for field in batch.schema}
    if found != types:
        raise DataError(f"{path}: columns {found}, expected {types}; rebuild the dataset")
    return {name: batch.column(name).to_numpy(zero_copy_only=True) for name in types}
