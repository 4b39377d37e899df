"""Prediction requests: one object in one photo per row, from a table or from a folder's names.

A row that cannot be used becomes a `Reject` in its place; nothing is guessed.
"""

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from vlal_dist.config.sections import PredictConfig
from vlal_dist.data.format.photos import Photos
from vlal_dist.data.loading.decode import Box
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.release.model import ExportedModel

SUFFIXES = (".csv", ".jsonl", ".parquet")
_ROWS = 1024
"""Rows of a Parquet file held at once."""

Record = Mapping[str, Any]
"""With `image`, and optionally `object`, `id`, and `box` or x, y, w, h."""


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


def open_requests(
    config: PredictConfig, model: ExportedModel
) -> tuple[Photos, Iterator[Request | Reject], int]:
    """The photos, the requests, and the number of requests (0: not known).

    Raises:
        ConfigError: settings that do not name photos and objects of the model.
        DataError: the table is damaged or lacks `image`; some tables show it only when read.
    """
    if config.object is not None:
        try:
            model.object_id(config.object)
        except DataError as error:
            raise ConfigError(f"predict.object: {error}") from None
    records: Iterable[Record | DataError]
    if config.table is not None:
        table = Path(config.table)
        records, total = _read_table(table)
        photos = Photos(config.images or str(table.parent), setting="predict.images")
    elif config.images is not None:
        if config.object is None and model.info.model.layers.object_gate:
            raise ConfigError(
                "predict.object is absent: this model needs the name of the object that the "
                "photos show; give it, or a predict.table with the columns image and object"
            )
        photos = Photos(config.images, setting="predict.images")
        names = photos.names()
        records, total = [{"image": name, "id": name} for name in names], len(names)
    else:
        raise ConfigError("predict.images and predict.table are absent; give one of them")
    return photos, _parse(records, config.object, model), total


def _parse(
    records: Iterable[Record | DataError], default_object: str | None, model: ExportedModel
) -> Iterator[Request | Reject]:
    for row, record in enumerate(records):
        if isinstance(record, DataError):
            yield reject(row, str(row), "", None, record)
            continue
        name = _text(record.get("object")) or default_object
        image = _text(record.get("image")) or ""
        identity = _text(record.get("id")) or str(row)
        try:
            object_id = model.object_id(name)
            if not image:
                raise DataError("no image: the column image is empty")
            yield Request(row, identity, image, name, object_id, _box(record))
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


def _read_table(path: Path) -> tuple[Iterator[Record | DataError], int]:
    """The rows, read one after another, and their number (0: not known)."""
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
