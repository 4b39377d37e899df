"""Instances as columns: names as numbers, batches of rows in a file on disk.

Memory is that of one batch, of the distinct names, of 8 bytes an instance (the hash of its id), and
of one row group for each file that is written.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from shard_tools.clean.records import Instance, compare_duplicates, conflict_error

I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

SPLITS = ("train", "val", "test")
"""A row's `split` is a position in these."""

BATCH = 1 << 16
"""Rows of a batch."""

ROW_GROUP = 1 << 20
"""Rows of a row group: pyarrow's default for a table that is written at once, so that the bytes are
the same."""

COMPARED = 1 << 20
"""Instances with a repeated id that are compared at a time."""

INSTANCE_SCHEMA = pa.schema(
    [
        pa.field("instance_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("object_id", pa.uint32(), nullable=False),
        pa.field("box", pa.list_(pa.float64(), 4), nullable=False),
        pa.field("positive", pa.list_(pa.uint32()), nullable=False),
        pa.field("negative", pa.list_(pa.uint32()), nullable=False),
    ]
)
"""`box` is x, y, width, height in pixels; `positive` and `negative` are ascending attribute ids."""

READ_SCHEMA = pa.schema([pa.field("split", pa.uint8(), nullable=False), *INSTANCE_SCHEMA])
"""Rows as read: ids are numbers of `Names`, lists are as annotated."""


NAMED_SCHEMA = pa.schema(
    [
        *(READ_SCHEMA.field(name) for name in ("split", "instance_id", "image_id")),
        pa.field("object", pa.string()),
        READ_SCHEMA.field("box"),
        pa.field("positive", pa.list_(pa.string())),
        pa.field("negative", pa.list_(pa.string())),
    ]
)
"""Rows with their names."""


def named_batch(
    instances: Sequence[Instance], splits: Callable[[pa.Array], pa.Array]
) -> pa.RecordBatch:
    """Instances as columns.

    Args:
        instances: some.
        splits: image ids -> positions in `SPLITS`, uint8.
    """
    image_id = pa.array([i.image_id for i in instances], pa.string())
    names = pa.list_(pa.string())
    return pa.RecordBatch.from_arrays(
        [
            splits(image_id),
            pa.array([i.instance_id for i in instances], pa.string()),
            image_id,
            pa.array([i.object_name for i in instances], pa.string()),
            pa.array([i.box for i in instances], NAMED_SCHEMA.field("box").type),
            pa.array([i.positive for i in instances], names),
            pa.array([i.negative for i in instances], names),
        ],
        schema=NAMED_SCHEMA,
    )


class Names:
    """Numbers of names, in the order in which they are first met."""

    def __init__(self) -> None:
        self.number: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.number)

    def add(self, names: Iterable[str]) -> I64:
        """The numbers of some names."""
        number = self.number
        return np.array([number.setdefault(name, len(number)) for name in names], np.int64)

    def encode(self, column: pa.Array) -> pa.Array:
        """The numbers of a text column without nulls: uint32."""
        coded = column.dictionary_encode()
        numbers = self.add(coded.dictionary.to_pylist()).astype(np.uint32)
        return pa.array(numbers[coded.indices.to_numpy()], pa.uint32())

    def table(self, changes: Iterable[tuple[str, str]]) -> I64:
        """Number -> number of the name that replaces it; further names get a number."""
        pairs = [(self.number[old], new) for old, new in changes if old in self.number]
        targets = self.add(new for _, new in pairs)
        found = np.arange(len(self))
        found[[old for old, _ in pairs]] = targets
        return found


class Lists(NamedTuple):
    """Lists of numbers of some rows.

    Attributes:
        row: int64 [S], ascending, the row of each number.
        number: int64 [S].
    """

    row: I64
    number: I64

    @classmethod
    def of(cls, column: pa.Array) -> "Lists":
        """The lists of an Arrow column without nulls."""
        row = np.repeat(np.arange(len(column)), np.diff(column.offsets.to_numpy()))
        return cls(row, column.flatten().to_numpy().astype(np.int64))

    def where(self, keep: Mask) -> "Lists":
        """Those numbers for which `keep` [S] holds, of the same rows."""
        return Lists(self.row[keep], self.number[keep])

    def lengths(self, rows: int) -> I64:
        """Numbers of each of `rows` rows."""
        return np.bincount(self.row, minlength=rows)

    def to_arrow(self, rows: int) -> pa.Array:
        """list<uint32> of `rows` rows."""
        ends = np.concatenate([[0], np.cumsum(self.lengths(rows))])
        values = pa.array(self.number.astype(np.uint32))
        return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), values)


class Rows:
    """All instances as read, in a file.

    Args:
        path: of the file, which must not be there.

    Attributes:
        objects, attributes: the names of the rows' numbers.
    """

    def __init__(self, path: Path) -> None:
        self.objects, self.attributes = Names(), Names()
        self._path, self._hashes = path, list[I64]()
        self._writer = pa.ipc.new_stream(
            str(path), READ_SCHEMA, options=pa.ipc.IpcWriteOptions(compression="lz4")
        )

    def __len__(self) -> int:
        return sum(map(len, self._hashes))

    def append(self, named: pa.RecordBatch) -> None:
        """Add rows of `NAMED_SCHEMA`, without nulls."""
        if named.num_rows:
            ids = named["instance_id"].to_pylist()
            self._hashes.append(np.fromiter(map(hash, ids), np.int64, len(ids)))
            lists = []
            for column in (named["positive"], named["negative"]):
                ends = column.offsets.to_numpy()
                numbers = self.attributes.encode(column.flatten())
                lists.append(pa.ListArray.from_arrays(pa.array(ends - ends[0]), numbers))
            columns = [*named.columns[:3], self.objects.encode(named["object"]), named["box"]]
            self._writer.write_batch(
                pa.RecordBatch.from_arrays([*columns, *lists], schema=READ_SCHEMA)
            )

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """All batches; none can be appended any more."""
        self._writer.close()
        with pa.OSFile(str(self._path)) as file, pa.ipc.open_stream(file) as reader:
            yield from reader

    def instances_of(self, batch: pa.RecordBatch) -> list[Instance]:
        """Rows as instances, with their names."""
        objects, attributes = list(self.objects.number), list(self.attributes.number)
        return [
            Instance(
                split=SPLITS[row["split"]],
                instance_id=row["instance_id"],
                image_id=row["image_id"],
                object_name=objects[row["object_id"]],
                box=tuple(row["box"]),
                positive=tuple(attributes[number] for number in row["positive"]),
                negative=tuple(attributes[number] for number in row["negative"]),
            )
            for row in batch.to_pylist()
        ]

    def duplicates(self) -> I64:
        """Rows that repeat an earlier one, ascending.

        Ids of equal hash are compared exactly, `COMPARED` at a time.

        Raises:
            DataError: one instance id stands for different contents or in two splits.
        """
        hashes = np.concatenate([np.zeros(0, np.int64), *self._hashes])
        ordered = np.sort(hashes)
        values, counts = np.unique(ordered[1:][ordered[1:] == ordered[:-1]], return_counts=True)
        del ordered, hashes
        part = np.cumsum(counts + 1) // COMPARED
        equal: list[int] = []
        conflicts: dict[str, tuple[int, str]] = {}
        for number in np.unique(part):
            found = compare_duplicates(self._with_hash(values[part == number]))
            equal += found[0]
            conflicts |= found[1]
        if conflicts:
            raise conflict_error(conflicts)
        return np.array(sorted(equal), np.int64)

    def _with_hash(self, values: I64) -> Iterator[tuple[int, Instance]]:
        """Instances whose id has one of some hashes (ascending), with their row."""
        first = 0
        for hashes, batch in zip(self._hashes, self, strict=True):
            place = np.minimum(np.searchsorted(values, hashes), len(values) - 1)
            chosen = np.flatnonzero(values[place] == hashes)
            instances = self.instances_of(batch.take(pa.array(chosen)))
            yield from zip((first + chosen).tolist(), instances, strict=True)
            first += len(hashes)


class TableFile(AbstractContextManager["TableFile"]):
    """A Parquet file written batch by batch: the bytes of one `write_table` of all rows.

    They depend on the rows and on pyarrow's version alone.

    Attributes:
        path: of the file.
        schema: of its rows.
        num_rows: added so far.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.num_rows = path, 0
        self.schema, self._pending = schema, list[pa.RecordBatch]()
        self._writer = pyarrow.parquet.ParquetWriter(
            path, schema, compression="zstd", compression_level=3
        )

    def append(self, batch: pa.RecordBatch) -> None:
        """Add rows of the schema."""
        before, self.num_rows = self.num_rows, self.num_rows + batch.num_rows
        self._pending.append(batch)
        while before // ROW_GROUP < self.num_rows // ROW_GROUP:
            take = ROW_GROUP - before % ROW_GROUP
            self._pending[-1] = batch.slice(0, take)
            self._write()
            batch, before = batch.slice(take), before + take
            self._pending = [batch] if batch.num_rows else []

    def _write(self) -> None:
        table = pa.Table.from_batches(self._pending, self.schema).combine_chunks()
        self._writer.write_table(table, row_group_size=ROW_GROUP)

    def close(self) -> None:
        """Write the rest."""
        if self._writer.is_open:
            if self._pending or not self.num_rows:
                self._write()
            self._pending = []
            self._writer.close()

    def __exit__(self, *_: object) -> None:
        self.close()
