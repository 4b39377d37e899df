"""What is asked: one object in one photo per row, from a table or from a folder's names.

A row that cannot be used becomes a Reject in its place; nothing is guessed.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from vlal_dist.data.loading.decode import Box
from vlal_dist.errors import ConfigError, DataError

SUFFIXES = (".csv", ".jsonl", ".parquet")
_ROWS = 1024
"""Rows of a Parquet file held at once."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """One object in one photo.

    Attributes:
        row: of the table or of the listing, from 0.
        id: the table's, else the row in a table, the name in a folder.
        image: name of the photo.
        object_name: as given; None for a model without an object gate.
        object_id: of the model's vocabulary.
        box: x, y, width, height in pixels; None: the whole photo.
    """

    row: int
    id: str
    image: str
    object_name: str | None
    object_id: int
    box: Box | None


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used: the reason in a few words, and what was found."""

    row: int
    id: str
    image: str
    object: str | None
    reason: str
    detail: str


def reject(row: int, id: str, image: str, object_name: str | None, error: DataError) -> Reject:
    """From an error whose text is `reason: detail`."""
    reason, _, detail = str(error).partition(":")
    return Reject(row, id, image, object_name, reason, detail.strip())


def folder_records(names: Iterable[str]) -> Iterator[Record]:
    """A record per photo."""
    return ({"image": name, "id": name} for name in names)


def read_table(path: Path) -> tuple[Iterator[Record | DataError], int]:
    """The rows of a table, read as they are asked for, and how many they are (0: not known).

    Raises:
        ConfigError: no such file, or another suffix.
        DataError: the file is not what its suffix says (when it is read), or lacks `image`.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"predict.table {path}: {', '.join(SUFFIXES)} are read; convert it")
    if not path.is_file():
        raise ConfigError(f"predict.table {path}: no such file; correct the path")
    if path.suffix == ".parquet":
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except pa.ArrowException as error:
            raise DataError(f"{path} is not Parquet: {error}") from None
        _check_columns(file.schema_arrow.names, path)
        return _parquet_rows(file, path), file.metadata.num_rows
    return (_csv_rows if path.suffix == ".csv" else _jsonl_rows)(path), 0


def parse_rows(
    records: Iterable[Record | DataError],
    *,
    object_name: str | None,
    object_id: Callable[[str | None], int],
) -> Iterator[Request | Reject]:
    """Requests of records, in order.

    Args:
        records: with `image`, and optionally `object`, `id`, and `box` or x, y, w, h.
        object_name: where a record has none.
        object_id: id of a name; DataError if there is none.
    """
    known: dict[str | None, int | DataError] = {}  # the search for near names takes milliseconds
    for row, record in enumerate(records):
        if isinstance(record, DataError):
            yield reject(row, str(row), "", None, record)
            continue
        name = _text(record.get("object")) or object_name
        image = _text(record.get("image")) or ""
        identity = _text(record.get("id")) or str(row)
        try:
            if name not in known:
                try:
                    known[name] = object_id(name)
                except DataError as error:
                    known[name] = error
            found = known[name]
            if isinstance(found, DataError):
                raise found
            if not image:
                raise DataError("no image: the column image is empty")
            yield Request(row, identity, image, name, found, _box(record))
        except DataError as error:
            yield reject(row, identity, image, name, error)


def _text(value: object) -> str | None:
    """A cell as text; None where it is empty (pandas writes NaN)."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    return str(value)


def _box(record: Record) -> Box | None:
    value = record.get("box")
    if isinstance(value, str):
        value = re.split(r"[,\s]+", value.strip("[]() \t")) if value.strip() else None
    if value is None:
        value = [record.get(side) for side in ("x", "y", "w", "h")]
        if all(_text(side) is None for side in value):
            return None
    try:
        x, y, w, h = (float(side) for side in value)
    except (TypeError, ValueError):
        raise DataError(f"bad box: {value!r} is not x, y, width, height in pixels") from None
    return x, y, w, h


def _check_columns(names: Iterable[str], path: Path) -> None:
    names = list(names)
    if "image" not in names:
        raise DataError(
            f"{path} has the columns {', '.join(names)}; needed is image, possible are object, "
            "box (or x, y, w, h) and id"
        )


def _parquet_rows(file: pyarrow.parquet.ParquetFile, path: Path) -> Iterator[Record]:
    wanted = [n for n in file.schema_arrow.names if n in ("image", "object", "box", "id", *"xywh")]
    try:
        for batch in file.iter_batches(batch_size=_ROWS, columns=wanted):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged: {error}") from None


def _csv_rows(path: Path) -> Iterator[Record]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            _check_columns(reader.fieldnames or [], path)
            yield from reader
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not CSV in UTF-8: {error}") from None


def _jsonl_rows(path: Path) -> Iterator[Record | DataError]:
    with path.open("rb") as file:
        for line in filter(bytes.strip, file):
            try:
                record = json.loads(line)
            except ValueError as error:
                yield DataError(f"not JSON: {error}")
                continue
            yield record if isinstance(record, dict) else DataError("not JSON: no object {...}")
