"""Rows of tables: CSV, TSV, JSON lines, Parquet, Arrow.

A row that cannot be read is an error in its place, and the rows behind it are read.
"""

import codecs
import csv
import json
import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from vlal_dist.contents import shown
from vlal_dist.data.format.photo_names import printable
from vlal_dist.errors import ConfigError, DataError

_ROWS = 1024
"""Rows of a Parquet file held at once."""
_LONGEST_LINE = 1 << 20
"""Characters of a line; a longer one is skipped piece by piece."""
_LONGEST_ROW = 64
"""Lines of one row of a CSV; more are a quote that is not closed."""

SIDES = (("x", "y", "w", "h"), ("x1", "y1", "x2", "y2"), ("x1", "y1", "w", "h"))
"""What gives a box together: its corner and size, or two corners."""

OBJECT_COLUMNS = {
    "image_id": ("image_id",),  # the image where no other column names it
    "object": ("object", "object_name"),
    "id": ("id", "instance_id"),
    "box": ("box", "bbox", "instance_bbox"),
    "x": ("x",),
    "y": ("y",),
    "w": ("w", "width"),
    "h": ("h", "height"),
    "x1": ("x1", "xmin", "x_min", "left"),
    "y1": ("y1", "ymin", "y_min", "top"),
    "x2": ("x2", "xmax", "x_max", "right"),
    "y2": ("y2", "ymax", "y_max", "bottom"),
}
"""What a column says of an object in a photo -> its names, without case."""

Record = Mapping[str, Any]
"""A row by what its columns give."""
Rows = Iterator[tuple[int, int, Record | DataError]]
"""Number of a row, from 0; the line of its file, from 1 (in Parquet and Arrow the row); the row."""


class Columns(Protocol):
    """What the columns of a table give."""

    def resolve(self, names: Sequence[str]) -> dict[str, int]:
        """What a row of JSON lines with these names gives -> place among them.

        Raises:
            DataError: what is wrong, which rejects the row.
        """

    def resolve_header(self, names: Sequence[str], path: Path) -> dict[str, int]:
        """As `resolve`, of a table whose rows all have the same columns.

        Raises:
            ConfigError, DataError: what is wrong, and `path`.
        """

    def end(self, path: Path) -> None:
        """All rows of JSON lines were read."""


def read_rows(path: Path, columns: Columns, *, setting: str) -> tuple[Rows, int]:
    """The rows, read one after another, and their number (0: not known).

    Args:
        path: of the table; its suffix, in any case, gives the format.
        columns: what is read of it.
        setting: what named the table, for messages.

    Raises:
        ConfigError: no such file, or another suffix.
        DataError: the file is damaged, or `columns` refuses its header.
    """
    suffix = path.suffix.lower()
    if not path.is_file():
        raise ConfigError(f"{setting} {path}: no such file; correct the path")
    if suffix == ".json":
        raise ConfigError(
            f"{setting} {path}: a JSON list is not read; write its records on lines of their "
            "own: python -c 'import json,sys; [print(json.dumps(r)) for r in json.load(sys.stdin)]'"
            f" < {path} > {path.with_suffix('.jsonl')}"
        )
    if suffix not in READERS:
        raise ConfigError(f"{setting} {path}: {', '.join(READERS)} are read; convert it")
    return READERS[suffix](path, columns)


def plain_name(name: str) -> str:
    """A column's name without case, surrounding space and byte order mark; `-` and space as `_`."""
    return re.sub(r"[\s-]+", "_", name.strip("\ufeff \t\r\n")).casefold()


def quoted(name: str) -> str:
    """A column's name for messages."""
    return f"'{printable(name, length=100)}'"


def cell_text(value: object, column: str) -> str | None:
    """A cell as text; None where it is empty (pandas writes NaN).

    Raises:
        DataError: `not text: ...`, bytes or halves of characters that are not Unicode, or a list.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as pandas writes numbers beside empty cells
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"not text: {column} is {shown(value)}")
    text = str(value).strip() if column == "object" else str(value)
    if printable(text, length=len(text)) != text:
        raise DataError(f"not text: {column} is '{printable(text)}', which is not UTF-8")
    return text


def row_box(record: Record) -> tuple[float, float, float, float] | None:
    """The box of a row by the keys of `SIDES`, or `box`, as x, y, width, height; None: it has none.

    Raises:
        DataError: `bad box: ...`.
    """
    sides = next((form for form in SIDES if all(side in record for side in form)), ())
    value = [record[side] for side in sides] if sides else record.get("box")
    if isinstance(value, str):
        value = re.split(r"[,;\s]+", value.strip("[]() \t")) if value.strip() else None
    if value is None or (sides and all(_is_empty(side) for side in value)):
        return None
    numbers = [_number(side) for side in value] if isinstance(value, list | tuple) else []
    if len(numbers) != 4 or not all(math.isfinite(number) for number in numbers):
        form = ", ".join(sides or SIDES[0])
        raise DataError(f"bad box: {shown(value)} is not {form} in pixels")
    x, y, w, h = numbers
    if "x2" in sides:
        w, h = w - x, h - y
        if w <= 0 or h <= 0:
            raise DataError(f"bad box: {shown(value)}: the second corner is not below the first")
    return x, y, w, h


def _is_empty(value: object) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _number(value: object) -> float:
    """A finite number, or NaN."""
    try:
        return math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _parquet_rows(path: Path, columns: Columns) -> tuple[Rows, int]:
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is not Parquet: {error}") from None
    found = columns.resolve_header(names, path)

    def rows() -> Rows:
        row = 0
        for group in range(file.num_row_groups):
            first, count = row, file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(
                    _ROWS, row_groups=[group], columns=[names[place] for place in found.values()]
                ):
                    read = dict(zip(batch.schema.names, batch.columns, strict=True))
                    cells = [_values(read[names[place]]) for place in found.values()]
                    for values in zip(*cells, strict=True):
                        yield row, row + 1, dict(zip(found, values, strict=True))
                        row += 1
            except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                lost = f"rows {row} to {first + count - 1} cannot be read"
                yield row, row + 1, DataError(f"damaged table: {lost}: {error}")
            row = first + count

    return rows(), file.metadata.num_rows


def _values(column: pa.Array) -> list[Any]:
    """The cells; text that is not UTF-8 with its bytes escaped, as `os.fsdecode` does."""
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError, pa.ArrowException):
        return [_value(cell) for cell in column]


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except (ValueError, OverflowError, pa.ArrowException):
        return bytes(cell.as_buffer()) if hasattr(cell, "as_buffer") else b"\xff"


def _csv_rows(path: Path, columns: Columns) -> tuple[Rows, int]:
    with path.open("rb") as raw:
        if raw.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(f"{path} is UTF-16; save it as CSV in UTF-8")
    try:
        with _open_csv(path) as (_, reader):
            header = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{path} is not CSV: {error} in its header") from None
    if any(printable(name, length=len(name)) != name for name in header):
        raise DataError(f"{path} is not CSV in UTF-8: {quoted(', '.join(header))}; save it so")
    return _csv_records(path, header, columns.resolve_header(header, path)), 0


@contextmanager
def _open_csv(path: Path) -> Iterator[tuple["_Lines", Iterator[list[str]]]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first, delimiter = file.readline(_LONGEST_LINE), ","
        file.seek(0)
        if path.suffix.lower() == ".tsv" or ("," not in first and "\t" in first):
            delimiter = "\t"
        elif "," not in first and ";" in first:
            delimiter = ";"
        lines = _Lines(file)
        yield lines, csv.reader(lines, delimiter=delimiter, skipinitialspace=True)


def _csv_records(path: Path, header: Sequence[str], found: Mapping[str, int]) -> Rows:
    with _open_csv(path) as (lines, reader):
        next(reader, None)
        row = 0
        while True:
            lines.record.clear()
            line = lines.number + 1
            record: Record | DataError
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                record = DataError(f"not CSV: {error}")
            else:
                if not cells:  # an empty line
                    continue
                if len(cells) == len(header):
                    record = {meaning: cells[place] for meaning, place in found.items()}
                else:
                    what = f"{len(cells)} cells, the header has {len(header)}"
                    record = DataError(f"bad row: {what}")
            if isinstance(record, DataError):
                lines.put_back()
            yield row, line, record
            row += 1


class _Lines:
    """Lines of a text file, for `csv.reader`; a row that failed gives back all but its first line.

    Attributes:
        record: lines of the row that is being read.
        number: lines that were read.
    """

    def __init__(self, file: TextIO) -> None:
        self._file, self._again = file, deque[str]()
        self.record: list[str] = []
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if len(self.record) == _LONGEST_ROW:
            raise csv.Error(f"a row of more than {_LONGEST_ROW} lines: a quote is not closed")
        line = self._again.popleft() if self._again else self._file.readline(_LONGEST_LINE)
        if not line and self.record:  # else the last cell holds all rows behind the quote
            raise csv.Error("a quote is not closed")
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) == _LONGEST_LINE and not line.endswith("\n"):
            while (rest := self._file.readline(_LONGEST_LINE)) and not rest.endswith("\n"):
                pass
            raise csv.Error(f"a line of more than {_LONGEST_LINE} characters")
        self.record.append(line)
        return line

    def put_back(self) -> None:
        """Read the lines behind the first one again."""
        self._again.extendleft(reversed(self.record[1:]))
        self.number -= max(0, len(self.record) - 1)


def _jsonl_rows(path: Path, columns: Columns) -> tuple[Rows, int]:
    def rows() -> Rows:
        row = number = 0
        with path.open("rb") as file:
            while line := file.readline(_LONGEST_LINE):
                number += 1
                record: Record | DataError
                if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                    while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                        pass
                    record = DataError(f"not JSON: a line of more than {_LONGEST_LINE} bytes")
                elif not line.strip():
                    continue
                else:
                    record = _json_record(line, columns)
                yield row, number, record
                row += 1
        columns.end(path)

    return rows(), 0


def _json_record(line: bytes, columns: Columns) -> Record | DataError:
    try:
        values = json.loads(line, object_pairs_hook=_unique)
    except RecursionError:
        return DataError("not JSON: nested too deeply")
    except ValueError as error:
        return DataError(f"not JSON: {printable(str(error))}")
    if not isinstance(values, dict):
        return DataError("not JSON: no object {...}")
    names = list(values)
    try:
        found = columns.resolve(names)
    except DataError as error:
        return error
    return {meaning: values[names[place]] for meaning, place in found.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return values


def _arrow_rows(path: Path, columns: Columns) -> tuple[Rows, int]:
    try:
        with pa.memory_map(str(path)) as source:
            names = open_arrow(source).schema.names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is not Arrow: {error}") from None
    found = columns.resolve_header(names, path)

    def rows() -> Rows:
        row = 0
        with pa.memory_map(str(path)) as source:
            batches = _arrow_batches(open_arrow(source))
            while True:
                try:
                    batch = next(batches, None)
                    if batch is None:
                        return
                    batch.validate(full=True)
                    read = batch.select([names[place] for place in found.values()])
                    cells = [_values(column) for column in read.columns]
                except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                    yield (
                        row,
                        row + 1,
                        DataError(f"damaged table: no row is read from here: {error}"),
                    )
                    return
                for values in zip(*cells, strict=True):
                    yield row, row + 1, dict(zip(found, values, strict=True))
                    row += 1

    return rows(), 0


def open_arrow(source: Any) -> Any:
    """A reader of an Arrow IPC file, or of a stream, as Hugging Face's `datasets` writes it."""
    try:
        return pyarrow.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pyarrow.ipc.open_stream(source)


def _arrow_batches(reader: Any) -> Iterator[pa.RecordBatch]:
    if hasattr(reader, "num_record_batches"):
        batches = (reader.get_batch(place) for place in range(reader.num_record_batches))
    else:
        batches = iter(reader)
    for batch in batches:
        for first in range(0, batch.num_rows, _ROWS):
            yield batch.slice(first, _ROWS)


READERS: Mapping[str, Callable[[Path, Columns], tuple[Rows, int]]] = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
"""Suffix -> the reader of its format."""
