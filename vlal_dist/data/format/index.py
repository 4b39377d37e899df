"""Index, blocks and shard list of a split, and the schemas of its tables (docs/formats.md).

`index.arrow` and `blocks.arrow` are memory-mapped without a copy: a sample is read by the first
without parsing a tar header, and the order of an epoch needs only the second. All files may be a
stranger's: their schema and buffers are checked when they are opened, before a value is read, and
`check_index` and `check_blocks` compare every row with the shards.
"""

import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from vlal_dist.contents import shown
from vlal_dist.data.hashing import uid_to_hex
from vlal_dist.errors import DataError, bounded

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
    """Cut each shard's samples into runs that end at the first sample to reach `block_bytes`.

    In tars of others there may be gaps between samples, which are read with their block; one of
    `block_bytes` or more ends a block.
    """
    rows: list[tuple[int, int, int, int, int]] = []
    first = 0
    shard, offset = index.shard.tolist(), index.offset.tolist()
    end = (index.offset + index.length).tolist()
    for row in range(len(index)):
        size = end[row] - offset[first]
        last = row + 1 == len(index) or shard[row + 1] != shard[row]
        if last or size >= block_bytes or offset[row + 1] - end[row] >= block_bytes:
            rows.append((shard[row], first, row + 1 - first, offset[first], size))
            first = row + 1
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(BLOCK_TYPES)
    return Blocks(
        **{
            name: np.asarray(column, dtype=BLOCK_TYPES[name])
            for name, column in zip(BLOCK_TYPES, columns, strict=True)
        }
    )


def encode_arrow(columns: Mapping[str, Array]) -> bytes:
    """Arrow IPC file bytes of plain columns, in order."""
    arrays = [pa.array(values) for values in columns.values()]
    return encode_batch(pa.record_batch(arrays, names=list(columns)))


def encode_batch(batch: pa.RecordBatch) -> bytes:
    """Arrow IPC file bytes: one record batch, uncompressed."""
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


def read_parquet(data: bytes) -> pa.Table:
    """Read Parquet from memory, in this thread alone.

    In `pyarrow.parquet.read_table` a thread of Arrow's may be the last to hold `data`, and waits
    for the interpreter to free it; if the process ends meanwhile, it aborts ("terminate called
    without an active exception").

    Raises:
        pa.ArrowException: damaged.
    """
    with pa.parquet.ParquetFile(pa.BufferReader(data)) as file:
        return file.read(use_threads=False)


def decode_table(
    source: bytes | Path,
    schema: pa.Schema,
    *,
    where: str,
    rows: int | None = None,
    optional: Collection[str] = (),
    remedy: str = "run vlal verify, and pack again",
) -> pa.Table:
    """Read Parquet that others wrote: of this schema, every buffer checked.

    Args:
        source: the bytes, or a local file.
        schema: names and types of the columns that are read; others are left alone.
        where: name of the file, which begins the message.
        rows: how many it must have, compared before any is decoded; None: any number.
        optional: columns whose values may be null.
        remedy: what to do, which ends the message.

    Raises:
        DataError: damaged, a null, or other columns, types or numbers of rows.
    """
    opened = pa.BufferReader(source) if isinstance(source, bytes) else source
    try:
        with pa.parquet.ParquetFile(opened) as file:
            check_parquet(file, schema, rows=rows)
            table = file.read(columns=schema.names, use_threads=False)
            return checked_table(table, optional=optional)
    except ARROW_ERRORS as error:
        raise DataError(f"{where} is damaged ({bounded(str(error))}); {remedy}") from None


ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, MemoryError)
"""What pyarrow raises on damaged files."""


def check_parquet(
    file: pa.parquet.ParquetFile, schema: pa.Schema, *, rows: int | None = None
) -> None:
    """Compare what a Parquet file says of itself; a ValueError names the difference."""
    found = {field.name: field.type for field in file.schema_arrow}
    for field in schema:
        if found.get(field.name) != field.type or file.schema_arrow.names.count(field.name) != 1:
            raise ValueError(
                f"column {field.name} is {shown(str(found.get(field.name)))}, not {field.type}"
            )
    if rows is not None and file.metadata.num_rows != rows:
        raise ValueError(f"{file.metadata.num_rows} rows where {rows} are expected")


def checked_table(table: pa.Table, *, optional: Collection[str] = ()) -> pa.Table:
    """The table, if its buffers hold what they say, and no value is null; else a ValueError."""
    table.validate(full=True)
    for name, column in zip(table.column_names, table.columns, strict=True):
        inner = [chunk.flatten() for chunk in column.chunks] if _is_list(column.type) else []
        nulls = column.null_count + sum(values.null_count for values in inner)
        if nulls and name not in optional:
            raise ValueError(f"column {name} holds a null")
    return table


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def decode_shards(
    data: bytes, *, where: str = "shards.parquet", in_place: bool = False
) -> list[Shard]:
    """Read `shards.parquet`; names of tars of others (`in_place`) may have folders.

    Raises:
        DataError: damaged, a name or digest that is none, or a name that occurs twice.
    """
    table = decode_table(data, SHARDS_SCHEMA, where=where)
    shard_name = TAR_KEY if in_place else _SHARD_NAME
    shards = [Shard(*values) for values in zip(*table.to_pydict().values(), strict=True)]
    for row, shard in enumerate(shards):
        if not shard_name.fullmatch(shard.name) or not _SHA256.fullmatch(shard.sha256):
            raise DataError(
                f"{where}: row {row} has name {shown(shard.name)}, sha256 {shown(shard.sha256)}; a "
                "shard is named NAME.tar, its digest has 64 hex digits: pack again"
            )
        if shard.bytes >= 1 << 63:
            raise DataError(f"{where}: row {row} states {shard.bytes} bytes; pack again")
    if len({shard.name for shard in shards}) != len(shards):
        raise DataError(f"{where}: a shard is named twice; pack again")
    return shards


_SHARD_NAME = re.compile(r"[^/\0.][^/\0]*\.tar")
TAR_KEY = re.compile(r"(?:[^/\0.][^/\0]*/)*[^/\0.][^/\0]*\.tar")
"""Key of a tar of others below the place that `dataset.json` names: no hidden part, no `..`."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20
"""Rows checked at once, which bounds the memory of a check."""


def check_index(
    index: Index,
    shards: Sequence[Shard],
    *,
    num_objects: int,
    where: str,
    in_place: bool = False,
) -> None:
    """Compare every row of an index with the shards and the vocabulary.

    Takes about 60 ms and 60 MB for a million rows.

    Args:
        index: of a split.
        shards: its shards.
        num_objects: of the vocabulary.
        where: name of the file, for messages.
        in_place: the samples lie in tars of others, and have no json of ours.

    Raises:
        DataError: a row leaves its shard, overlaps the one before, or names no object; a shard has
            another number of samples.
    """
    size = np.array([shard.bytes for shard in shards], dtype=np.uint64)
    for start in range(0, len(index), _CHUNK):
        part = Index(**{name: col[start : start + _CHUNK] for name, col in vars(index).items()})
        before = index.shard[start - 1 : start], index.offset[start - 1 : start]
        if start:  # the end of the row before this part, which is in range
            before = before[0], before[1] + index.length[start - 1 : start]
        for wrong, what in _row_problems(part, size, num_objects, before, in_place):
            if wrong.any():
                row = start + int(np.flatnonzero(wrong)[0])
                values = {name: int(column[row]) for name, column in vars(index).items()}
                del values["uid"], values["crc32"]
                named = ", ".join(f"{name} {value}" for name, value in values.items())
                raise DataError(f"{where}: row {row}: {what} ({named}); {_REPACK}")
    found = np.diff(np.searchsorted(index.shard, np.arange(len(shards) + 1)))
    wrong_shards = np.flatnonzero(found != [shard.samples for shard in shards])
    if len(wrong_shards):
        shard = shards[wrong_shards[0]]
        raise DataError(
            f"{where}: {found[wrong_shards[0]]} samples in {shard.name}, shards.parquet says "
            f"{shard.samples}; {_REPACK}"
        )


_REPACK = "the file was altered: restore it, or pack again"


def _row_problems(
    part: Index, size: Array, num_objects: int, before: tuple[Array, Array], in_place: bool
) -> Iterator[tuple[Array, str]]:
    """Rows that break a rule, rule by rule; a rule may rely on those before it."""
    yield part.shard >= len(size), f"its shard is none of {len(size)}"
    room, length = size[part.shard], part.length.astype(np.uint64)
    yield (part.offset > room) | (length > room - part.offset), "it leaves its shard"
    for name in ("jpg", "json", "likelihood"):
        offset, inner = getattr(part, f"{name}_offset"), getattr(part, f"{name}_length")
        yield offset.astype(np.uint64) + inner > length, f"its {name} leaves the sample"
        if name == "jpg" or (name == "json" and not in_place):
            yield inner == 0, f"it has no {name}"
        elif in_place:
            yield inner != 0, f"it has a {name}, in a tar of others"
    yield part.object_id >= num_objects, f"its object is none of {num_objects}"
    shard = np.concatenate([before[0], part.shard])[:-1]
    end = np.concatenate([before[1], part.offset + length])[:-1]
    first = len(part) - len(shard)  # 1 where there is no row before
    later = part.shard[first:]
    wrong = (later < shard) | ((later == shard) & (part.offset[first:] < end))
    yield np.concatenate([np.zeros(first, np.bool_), wrong]), "it lies before the end of the last"


def check_blocks(blocks: Blocks, index: Index, *, where: str) -> None:
    """Compare every block with the checked index: together they hold each row once, in order.

    Raises:
        DataError: names the first block that does not.
    """
    samples = blocks.samples.astype(np.uint64)
    stop = np.cumsum(samples, dtype=np.uint64)
    fits = int(samples.sum()) == len(index) and np.array_equal(blocks.first_row, stop - samples)
    if fits and len(index):
        first, last = blocks.first_row, stop - 1
        end = index.offset[last] + index.length[last]
        right = (samples > 0) & (index.shard[first] == blocks.shard)
        right &= (index.shard[last] == blocks.shard) & (index.offset[first] == blocks.offset)
        right &= end - index.offset[first] == blocks.bytes
        fits = bool(right.all())
    if not fits or (not len(index) and len(blocks)):
        raise DataError(
            f"{where}: its blocks are not runs of the {len(index)} rows of index.arrow; {_REPACK}"
        )


def _map_columns(path: Path, types: Mapping[str, str]) -> dict[str, Array]:
    """The columns of a memory-mapped Arrow file."""
    batch = map_batch(path, pa.schema(list(types.items())))
    return {name: batch.column(name).to_numpy(zero_copy_only=True) for name in types}


def map_batch(path: Path, schema: pa.Schema) -> pa.RecordBatch:
    """Memory-map an Arrow file of one record batch; a map is never read past the end of its file.

    Raises:
        DataError: damaged, of another schema or number of batches, or a value is null.
    """
    expected = {field.name: str(field.type) for field in schema}
    try:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        found = [(field.name, str(field.type)) for field in file.schema]
        if found != list(expected.items()) or file.num_record_batches != 1:
            raise ValueError(f"{file.num_record_batches} batches of {shown(found, most=500)}")
        batch = file.get_batch(0)
        checked_table(pa.Table.from_batches([batch]))
        return batch
    except ARROW_ERRORS as error:
        raise DataError(
            f"{path} is damaged ({bounded(str(error), most=600)}); expected is one batch of "
            f"{expected}: restore the file, or pack again"
        ) from None
