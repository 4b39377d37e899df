"""Tables of prediction requests: rows of CSV, JSON lines and Parquet, by what their columns mean.

A row that cannot be read is an error in its place, and the rows behind it are read.
"""

import codecs
import csv
import json
import logging
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet

from vlal_dist.data.format.photos import printable
from vlal_dist.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

COLUMNS = {
    "image": ("image", "file_name", "filename", "photo"),
    "image_id": ("image_id",),  # the image where no column above names it
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
    "": ("positive_attributes", "negative_attributes", "instance_polygon"),
}
"""What a column gives -> its names, without case; those of `""` are VAW's, and not read."""
SIDES = (("x", "y", "w", "h"), ("x1", "y1", "x2", "y2"), ("x1", "y1", "w", "h"))
"""Columns that give a box together."""
_MEANING = {name: meaning for meaning, names in COLUMNS.items() for name in names}
_ALLOWED = (
    "; ".join(
        f"{meaning}: {' '.join(COLUMNS[meaning])}" for meaning in ("image", "object", "id", "box")
    ).replace("photo;", "photo image_id;")
    + "; or the box by "
    + " or ".join(" ".join(sides) for sides in SIDES[:2])
)

_ROWS = 1024
"""Rows of a Parquet file held at once."""
_LONGEST_LINE = 1 << 20
"""Characters of a line; a longer one is skipped piece by piece."""
_LONGEST_ROW = 64
"""Lines of one row of a CSV; more are a quote that is not closed."""

Record = Mapping[str, Any]
"""A row by what its columns give: the keys of `COLUMNS`."""
Rows = Iterator[tuple[int, Record | DataError]]
"""Number of a row, from 0, and the row."""


def read_table(path: Path, ignored: Sequence[str]) -> tuple[Rows, int]:
    """The rows, read one after another, and their number (0: not known).

    Args:
        path: of the table; its suffix, in any case, gives the format.
        ignored: names of columns that are left out.

    Raises:
        ConfigError: no such file, or another suffix; `ignored` names a column that is not there.
        DataError: the file is damaged, or a column is not understood (JSON lines: the row has it).
    """
    readers = {
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".jsonl": _jsonl_rows,
        ".ndjson": _jsonl_rows,
        ".parquet": _parquet_rows,
    }
    suffix = path.suffix.lower()
    if not path.is_file():
        raise ConfigError(f"predict.table {path}: no such file; correct the path")
    if suffix == ".json":
        raise ConfigError(
            f"predict.table {path}: a JSON list is not read; write its records on lines of their "
            "own: python -c 'import json,sys; [print(json.dumps(r)) for r in json.load(sys.stdin)]'"
            f" < {path} > {path.with_suffix('.jsonl')}"
        )
    if suffix not in readers:
        raise ConfigError(f"predict.table {path}: {', '.join(readers)} are read; convert it")
    return readers[suffix](path, _Columns(ignored))


class _Columns:
    """The meaning of column names.

    Args:
        ignored: names that are left out.
    """

    def __init__(self, ignored: Sequence[str]) -> None:
        self._ignored = {_plain(name): name for name in ignored}
        self._met: set[str] = set()
        self._corners_logged = False

    def resolve(self, names: Sequence[str]) -> dict[str, int]:
        """Meaning -> place among `names`.

        Raises:
            DataError: `unknown column: ...`, `two columns: ...` or `bad box: ...`.
        """
        found: dict[str, int] = {}
        for place, name in enumerate(names):
            if (plain := _plain(name)) in self._ignored:
                self._met.add(plain)
                continue
            meaning = _MEANING.get(plain)
            if meaning is None:
                raise DataError(
                    f"unknown column: {_quoted(name)} is not understood; known are {_ALLOWED}; "
                    f'rename it, or leave it out: --predict.ignore_columns "[{_quoted(name)}]"'
                )
            if meaning in found and meaning:
                raise _two_columns(names[found[meaning]], name, what=meaning)
            found[meaning] = place
        found.pop("", None)
        sides = [side for side in found if any(side in form for form in SIDES)]
        if sides and "box" in found:
            raise _two_columns(names[found["box"]], names[found[sides[0]]], what="box")
        if sides and not any(set(sides) == set(form) for form in SIDES):
            raise DataError(
                f"bad box: {', '.join(_quoted(names[found[side]]) for side in sides)} are not "
                f"complete; a box is {' or '.join(' '.join(form) for form in SIDES)}; add what is "
                "missing, or leave these out by predict.ignore_columns"
            )
        if "x2" in found and not self._corners_logged:
            self._corners_logged = True
            corners = ", ".join(_quoted(names[found[side]]) for side in SIDES[1])
            logger.info("the columns %s are read as two corners of the box, in pixels", corners)
        if "image_id" in found:
            found.setdefault("image", found.pop("image_id"))
        return found

    def resolve_header(self, names: Sequence[str], path: Path) -> dict[str, int]:
        """As `resolve`, of a table whose rows all have the same columns."""
        try:
            found = self.resolve(names)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        listed = printable(", ".join(names), length=1000)
        for name in self.not_met():
            raise ConfigError(
                f"predict.ignore_columns: {path} has no column {name!r}; it has {listed}"
            )
        if "image" not in found:
            raise DataError(
                f"{path} has the columns {listed}; needed is image; known are {_ALLOWED}"
            )
        return found

    def not_met(self) -> list[str]:
        """Names to be left out of which there was no column."""
        return [name for plain, name in self._ignored.items() if plain not in self._met]


def _two_columns(first: str, second: str, *, what: str) -> DataError:
    same = _plain(first) == _plain(second)
    remedy = "remove or rename one" if same else "leave one out by predict.ignore_columns"
    return DataError(
        f"two columns: {_quoted(first)} and {_quoted(second)} both give the {what}; {remedy}"
    )


def _plain(name: str) -> str:
    """A column's name without case, surrounding space and byte order mark; `-` and space as `_`."""
    return re.sub(r"[\s-]+", "_", name.strip("\ufeff \t\r\n")).casefold()


def _quoted(name: str) -> str:
    return f"'{printable(name, length=100)}'"


def _parquet_rows(path: Path, columns: _Columns) -> tuple[Rows, int]:
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
                        yield row, dict(zip(found, values, strict=True))
                        row += 1
            except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                lost = f"rows {row} to {first + count - 1} cannot be read"
                yield row, DataError(f"damaged table: {lost}: {error}")
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


def _csv_rows(path: Path, columns: _Columns) -> tuple[Rows, int]:
    with path.open("rb") as raw:
        if raw.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(f"{path} is UTF-16; save it as CSV in UTF-8")
    try:
        with _open_csv(path) as (_, reader):
            header = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{path} is not CSV: {error} in its header") from None
    if any(printable(name, length=len(name)) != name for name in header):
        raise DataError(f"{path} is not CSV in UTF-8: {_quoted(', '.join(header))}; save it so")
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
        next(reader)
        row = 0
        while True:
            lines.record.clear()
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
            yield row, record
            row += 1


class _Lines:
    """Lines of a text file, for `csv.reader`; a row that failed gives back all but its first line.

    Attributes:
        record: lines of the row that is being read.
    """

    def __init__(self, file: TextIO) -> None:
        self._file, self._again = file, deque[str]()
        self.record: list[str] = []

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
        if len(line) == _LONGEST_LINE and not line.endswith("\n"):
            while (rest := self._file.readline(_LONGEST_LINE)) and not rest.endswith("\n"):
                pass
            raise csv.Error(f"a line of more than {_LONGEST_LINE} characters")
        self.record.append(line)
        return line

    def put_back(self) -> None:
        """Read the lines behind the first one again."""
        self._again.extendleft(reversed(self.record[1:]))


def _jsonl_rows(path: Path, columns: _Columns) -> tuple[Rows, int]:
    def rows() -> Rows:
        row = 0
        with path.open("rb") as file:
            while line := file.readline(_LONGEST_LINE):
                record: Record | DataError
                if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                    while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                        pass
                    record = DataError(f"not JSON: a line of more than {_LONGEST_LINE} bytes")
                elif not line.strip():
                    continue
                else:
                    record = _json_record(line, columns)
                yield row, record
                row += 1
        for name in columns.not_met():
            logger.warning("predict.ignore_columns: no row of %s has %r", path, name)

    return rows(), 0


def _json_record(line: bytes, columns: _Columns) -> Record | DataError:
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
