"""Photos in tables: Parquet and Arrow files with the bytes of images in a column.

Hugging Face's `datasets` writes such columns as struct<bytes: binary, path: string>; a plain binary
column is read too. Rows are decoded a group (of Parquet) or batch (of Arrow) at a time. Groups stay
in memory up to a limit; one that is decoded a second time is kept in a file, because pack reads
photos in an order of its own.
"""

import hashlib
import io
import threading
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from vlal_dist.data.format.index import ARROW_ERRORS
from vlal_dist.data.format.photo_names import (
    Limits,
    MemberIndex,
    MissingPhotoError,
    check_photo,
    has_suffix,
    printable,
)
from vlal_dist.data.format.photo_places import ContainerFile, find_containers
from vlal_dist.errors import ConfigError, DataError, StorageError, bounded
from vlal_dist.storage.checks import translated_errors
from vlal_dist.storage.local import replacing

SUFFIXES = (".parquet", ".arrow", ".feather")
"""Of tables, where content cannot say it: patterns and objects."""
MAGIC = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")
"""First bytes of Parquet, of an Arrow file and of an Arrow stream."""
HELD_BYTES = 256 << 20
"""Decoded groups that a place keeps in memory; at least one."""
LARGEST_GROUP = 4 << 30
"""Bytes of a decoded group; a larger one is refused."""
_BATCH_ROWS = 256
LONGEST_NAME = 1000
"""Characters of a name that a row may give its photo."""


def row_names(paths: Sequence[str | None] | None, *, count: int, stem: str) -> list[str]:
    """The name of the photo in each row of one file; names are unique in the file.

    Args:
        paths: of each row what the column's struct gives as `path`; None: it gives none.
        count: rows of the file.
        stem: name of the file without folders and suffix.

    Returns:
        A row's path where it can be a name below a place and no other row has it, else
        `STEM-ROW`, the row from 0 with eight digits.
    """
    numbered = [f"{stem}-{row:08d}" for row in range(count)]
    if paths is None:
        return numbered
    found = Counter(path for path in paths if path is not None)
    taken = set(numbered)
    return [
        path if path is not None and found[path] == 1 and path not in taken and _is_name(path)
        else number
        for path, number in zip(paths, numbered, strict=True)
    ]  # fmt: skip


def bytes_columns(schema: pa.Schema) -> dict[str, bool]:
    """Columns that can hold the bytes of photos, and whether they give paths as well."""
    return {field.name: has_path for field in schema
            if (has_path := _holds_bytes(field.type)) is not None}  # fmt: skip


def photo_names(url: str, limits: Limits) -> list[str]:
    """The name of the photo in each row of one table, as `Tables` names it.

    Raises:
        ConfigError: no column of bytes, or several and none is named.
        DataError: the file is damaged.
    """
    [found] = find_containers(url, limits.setting)
    file = ContainerFile(*found)
    with _table_errors(file):
        table = _open_table(file, limits)
        return row_names(table.paths(), count=sum(table.rows), stem=file.name)


def _is_name(path: str) -> bool:
    """Whether `Photos` can find a file of that name: relative, without empty parts and `..`."""
    parts = path.split("/")
    return (
        0 < len(path) <= LONGEST_NAME
        and "\\" not in path
        and path.isprintable()
        and not any(part in ("", ".", "..") for part in parts)
    )


class Tables:
    """The rows of one or several tables; see `vlal_dist.data.format.photo_names.Place`."""

    def __init__(self, place: str, limits: Limits) -> None:
        self.where, self._limits = place, limits
        files = [ContainerFile(*found) for found in find_containers(place, limits.setting)]
        self._index = MemberIndex([file.name for file in files])
        self._tables: list[_Table] = []
        for number, file in enumerate(files):
            with _table_errors(file):
                table = _open_table(file, limits)
                names = row_names(table.paths(), count=sum(table.rows), stem=file.name)
            self._tables.append(table)
            places = ((g, row) for g, rows in enumerate(table.rows) for row in range(rows))
            for name, (group, row) in zip(names, places, strict=True):
                self._index.add(number, name, group, row)
        self._groups = _Groups(Path(limits.cache) if limits.cache else None)

    def list_names(self) -> tuple[list[str], Counter[str]]:
        """See `Place.list_names`."""
        return self._index.paths(), +Counter({"hidden": self._index.hidden})

    def candidates(self, name: str, *, anywhere: bool) -> list[str]:
        """See `Place.candidates`."""
        return self._index.candidates(name, anywhere=anywhere)

    def holds(self, name: str) -> bool:
        """See `Place.holds`."""
        return False

    def read(self, path: str, *, listed: bool) -> bytes:
        """See `Place.read`."""
        number, group, row = self._index.where(path)[0]  # names are unique in a file
        table = self._tables[number]
        with _table_errors(table.file):
            cell = self._groups.get(table, group)[row]
            if not cell.is_valid:
                raise MissingPhotoError(
                    f"missing: row {sum(table.rows[:group]) + row} of {printable(table.file.name)} "
                    f"has no bytes in the column {printable(table.column)}"
                )
            content = cell.as_buffer()
            self._limits.check_size(path, content.size)
            data: bytes = content.to_pybytes()
        if listed and not has_suffix(path):
            check_photo(path, data)
        return data


class _Table(ABC):
    """One file: rows in groups.

    Attributes:
        file: where it is.
        column: of the images.
        rows: number of rows of each group.
    """

    def __init__(self, file: ContainerFile, column: str, rows: Sequence[int]) -> None:
        self.file, self.column, self.rows = file, column, list(rows)

    @abstractmethod
    def paths(self) -> list[str | None] | None:
        """The `path` of each row; None: the column has none."""

    @abstractmethod
    def batches(self, group: int) -> Iterator[pa.Array]:
        """The image column of a group, piece by piece."""

    def decode(self, group: int) -> pa.ChunkedArray:
        """Bytes of the photos of a group, as large_binary.

        Raises:
            DataError: too large.
        """
        chunks, size_bytes = [], 0
        for array in self.batches(group):
            array.validate(full=True)
            if isinstance(array, pa.DictionaryArray):
                array = array.dictionary_decode()
            if pa.types.is_struct(array.type):
                array = array.flatten()[array.type.get_field_index("bytes")]
            chunks.append(array.cast(pa.large_binary()))
            size_bytes += chunks[-1].nbytes
            if size_bytes > LARGEST_GROUP:
                raise DataError(
                    f"unreadable: a row group of {printable(self.file.url)} has more than "
                    f"{LARGEST_GROUP} bytes; write the file with fewer rows in a group"
                )
        column = pa.chunked_array(chunks, pa.large_binary())
        if len(column) != self.rows[group]:
            raise ValueError(f"group {group} has {len(column)} rows, not {self.rows[group]}")
        return column


class _Parquet(_Table):
    def __init__(self, file: ContainerFile, limits: Limits) -> None:
        self._parquet = pa.parquet.ParquetFile(pa.PythonFile(_Ranges(file), "r"), pre_buffer=True)
        column, self._has_paths = _image_column(self._parquet.schema_arrow, file, limits)
        found = self._parquet.metadata
        rows = [found.row_group(group).num_rows for group in range(found.num_row_groups)]
        super().__init__(file, column, rows)

    def paths(self) -> list[str | None] | None:
        if not self._has_paths:
            return None
        read = self._parquet.iter_batches(columns=[f"{self.column}.path"], use_threads=False)
        return [path for batch in read for path in _paths(batch.column(0))]

    def batches(self, group: int) -> Iterator[pa.Array]:
        for batch in self._parquet.iter_batches(
            _BATCH_ROWS, row_groups=[group], columns=[self.column], use_threads=False
        ):
            yield batch.column(0)


class _Arrow(_Table):
    """An Arrow file, or the stream that `datasets` keeps in its cache; local only."""

    def __init__(self, file: ContainerFile, limits: Limits) -> None:
        if file.changed_ns is None:
            raise ConfigError(
                f"{limits.setting} {file.url}: Arrow files are read from a local folder only; copy "
                "it there, or save it as Parquet"
            )
        self._source = pa.PythonFile(_Ranges(file), "r")
        self._starts: list[int] = []
        self._reader = None
        if file.read(0, min(6, file.size_bytes)) == MAGIC[1]:
            self._reader = pa.ipc.open_file(self._source)
            self._schema = self._reader.schema
        else:
            self._schema = pa.ipc.read_schema(self._source)
            self._find_batches()
        column, self._has_paths = _image_column(self._schema, file, limits)
        count = self._reader.num_record_batches if self._reader else len(self._starts)
        super().__init__(file, column, [])
        self.rows = [self._batch(group).num_rows for group in range(count)]

    def _find_batches(self) -> None:
        while (start := self._source.tell()) < self._source.size():
            try:
                message = pa.ipc.read_message(self._source)
            except EOFError:
                return
            if message.type != "record batch":
                raise ValueError(f"it holds a {message.type}; save it as Parquet")
            self._starts.append(start)

    def _batch(self, group: int) -> pa.RecordBatch:
        if self._reader is not None:
            return self._reader.get_batch(group)
        self._source.seek(self._starts[group])
        return pa.ipc.read_record_batch(pa.ipc.read_message(self._source), self._schema)

    def paths(self) -> list[str | None] | None:
        if not self._has_paths:
            return None
        found: list[str | None] = []
        for group in range(len(self.rows)):
            column = self._batch(group).column(self.column)
            column.validate(full=True)
            found += _paths(column)
        return found

    def batches(self, group: int) -> Iterator[pa.Array]:
        yield self._batch(group).column(self.column)


def _open_table(file: ContainerFile, limits: Limits) -> _Table:
    is_parquet = file.read(0, min(4, file.size_bytes)) == MAGIC[0]
    table = _Parquet(file, limits) if is_parquet else _Arrow(file, limits)
    if min(table.rows, default=0) < 0 or sum(table.rows) > file.size_bytes:
        raise ValueError(f"it says that it has {sum(table.rows)} rows")
    return table


def _image_column(schema: pa.Schema, file: ContainerFile, limits: Limits) -> tuple[str, bool]:
    """The column with the bytes of photos, and whether it gives their paths.

    Raises:
        ConfigError: none, or which of several is not said.
    """
    wanted, option = limits.image_column, limits.option("image_column")
    found = bytes_columns(schema)
    if wanted is None and len(found) == 1:
        return next(iter(found.items()))
    if wanted is not None and wanted in found and schema.names.count(wanted) == 1:
        return wanted, found[wanted]
    listed = printable(", ".join(found) or "none", length=500)
    what = f"no such column {wanted!r}" if wanted else f"{len(found)} columns can hold photos"
    remedy = f"name the one that is meant as {option}" if found else "give the photos themselves"
    raise ConfigError(
        f"{limits.setting} {file.url}: {what}; binary, or a struct with `bytes`, are: {listed}; "
        f"{remedy}"
    )


def _holds_bytes(kind: pa.DataType) -> bool | None:
    """Whether a column of bytes gives paths as well; None: it is no column of bytes."""
    if isinstance(kind, pa.DictionaryType):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        if len(fields) < kind.num_fields or not _is_binary(fields.get("bytes", pa.null())):
            return None
        path = fields.get("path", pa.null())
        return bool(pa.types.is_string(path) or pa.types.is_large_string(path))
    return False if _is_binary(kind) else None


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _paths(column: pa.Array) -> list[str | None]:
    """Paths of a struct column; text that is not UTF-8 counts as none."""
    column.validate(full=False)
    values = column.flatten()[column.type.get_field_index("path")]
    try:
        values.validate(full=True)
        return values.to_pylist()  # type: ignore[no-any-return]
    except ARROW_ERRORS:
        return [_text(value) for value in values.cast(pa.large_binary()).to_pylist()]


def _text(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


class _Groups:
    """Decoded groups: the latest in memory, those that came back in files.

    Args:
        folder: for the files; None: they are decoded again.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._held: OrderedDict[tuple[str, int], pa.ChunkedArray] = OrderedDict()
        self._seen: set[tuple[str, int]] = set()

    def get(self, table: _Table, group: int) -> pa.ChunkedArray:
        """The photos of a group, large_binary."""
        key = (table.file.url, group)
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
            stored = None if self._folder is None else _stored_path(self._folder, table, group)
            if stored is not None and (key in self._seen or stored.is_file()):
                return _stored(stored, table, group)
            self._seen.add(key)
            return self._hold(key, table.decode(group))

    def _hold(self, key: tuple[str, int], column: pa.ChunkedArray) -> pa.ChunkedArray:
        self._held[key] = column
        while len(self._held) > 1 and sum(c.nbytes for c in self._held.values()) > HELD_BYTES:
            self._held.popitem(last=False)
        return column


def _stored_path(folder: Path, table: _Table, group: int) -> Path:
    file = table.file
    text = f"{file.url}\0{file.size_bytes}\0{file.changed_ns}\0{table.column}\0{group}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return folder / "photos" / f"{digest[:32]}.arrow"


def _stored(path: Path, table: _Table, group: int) -> pa.ChunkedArray:
    """The photos of a group as a map of a file, written by the first process that needs it."""
    schema = pa.schema([("bytes", pa.large_binary())])
    if not path.is_file():
        written = pa.Table.from_arrays([table.decode(group)], schema=schema)
        with translated_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with (
            translated_errors(path),
            replacing(path) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            writer.write_table(written)
    column = pa.ipc.open_file(pa.memory_map(str(path))).read_all().column(0)
    column.validate(full=True)
    return column


class _Ranges(io.RawIOBase):
    """A file for pyarrow to seek in."""

    def __init__(self, file: ContainerFile) -> None:
        super().__init__()
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._file.size_bytes)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._file.size_bytes - self._at, 0)
        size = left if size < 0 else min(size, left)
        data = self._file.read(self._at, size) if size else b""
        self._at += len(data)
        return data


@contextmanager
def _table_errors(file: ContainerFile) -> Iterator[None]:
    try:
        yield
    except (DataError, ConfigError, StorageError):
        raise
    except ARROW_ERRORS as error:
        raise DataError(
            f"unreadable: {printable(file.url)} is damaged ({bounded(str(error))}); restore it"
        ) from None
