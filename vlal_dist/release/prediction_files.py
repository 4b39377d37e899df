"""Files of predictions: JSON lines or Parquet with a row per object, CSV with a row per attribute.

A file appears under its name when it is finished, and not before. Names that are no Unicode text
are written with `\\udcXX` for each byte that is none.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from vlal_dist.data.format.photos import printable
from vlal_dist.errors import ConfigError
from vlal_dist.release.predict import Answer
from vlal_dist.release.requests import Reject
from vlal_dist.storage.local import replacing

_GROUP_ROWS = 8192
"""Rows of a Parquet row group, about, which are held until it is written."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""Beginnings of cells that spreadsheets run (OWASP, CSV injection)."""

Write = Callable[[Sequence[Answer]], None]


@contextmanager
def open_output(path: Path, *, thresholds: bool) -> Iterator[Write]:
    """A file of predictions, written batch by batch; its suffix gives the format.

    Args:
        path: of the finished file; an earlier one is replaced.
        thresholds: whether the file says which attributes are present.

    Raises:
        ConfigError: another suffix.
    """
    writers = {".jsonl": _jsonl, ".parquet": _parquet, ".csv": _csv}
    if path.suffix.lower() not in writers:
        raise ConfigError(f"predict.output {path}: {', '.join(writers)} are written; rename it")
    writer = writers[path.suffix.lower()]
    with replacing(path) as temporary, writer(temporary, thresholds) as write:
        yield write


@contextmanager
def open_rejects(path: Path) -> Iterator[Callable[[Reject], None]]:
    """A file of rejects as JSON lines; without any there is no file, an earlier one is removed."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:

        def write(reject: Reject) -> None:
            values = {
                key: _text(value) if isinstance(value, str) else value
                for key, value in asdict(reject).items()
            }
            file.write(json.dumps(values, ensure_ascii=False) + "\n")

        yield write
    if not path.stat().st_size:
        path.unlink()


@contextmanager
def _jsonl(path: Path, thresholds: bool) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as file:

        def write(answers: Sequence[Answer]) -> None:
            for row in _rows(answers, thresholds):
                for attribute in row["attributes"]:
                    attribute["probability"] = _short(attribute["probability"])
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

        yield write


@contextmanager
def _csv(path: Path, thresholds: bool) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="") as file:
        columns = ["row", "id", "image", "object", "x", "y", "w", "h"]
        columns += ["rank", "attribute", "probability", *(["present"] if thresholds else [])]
        writer = csv.writer(file)
        writer.writerow(columns)

        def write(answers: Sequence[Answer]) -> None:
            for row in _rows(answers, thresholds):
                attributes, box = row.pop("attributes"), row.pop("box") or [None] * 4
                named = [_cell(value) for value in row.values()]
                for rank, one in enumerate(attributes, 1):
                    name = _cell(one["name"])
                    cells = [*named, *box, rank, name, _short(one["probability"])]
                    writer.writerow(cells + ([str(one["present"]).lower()] if thresholds else []))

        yield write


@contextmanager
def _parquet(path: Path, thresholds: bool) -> Iterator[Write]:
    fields = [("name", pa.string()), ("probability", pa.float32())]
    fields += [("present", pa.bool_())] if thresholds else []
    schema = pa.schema(
        [
            ("row", pa.int64()),
            ("id", pa.string()),
            ("image", pa.string()),
            ("object", pa.string()),
            ("box", pa.list_(pa.float64())),
            ("attributes", pa.list_(pa.struct(fields))),
        ]
    )
    held: list[pa.Table] = []

    def flush(least: int) -> None:
        if sum(map(len, held)) >= least:
            file.write_table(pa.concat_tables(held).combine_chunks())
            held.clear()

    def write(answers: Sequence[Answer]) -> None:
        held.append(pa.Table.from_pylist(_rows(answers, thresholds), schema=schema))
        flush(_GROUP_ROWS)

    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        yield write
        flush(1)


def _rows(answers: Sequence[Answer], thresholds: bool) -> list[dict[str, Any]]:
    keys = ("name", "probability", "present") if thresholds else ("name", "probability")
    return [
        {
            "row": request.row,
            "id": _text(request.id),
            "image": _text(request.image),
            "object": request.object_name,
            "box": request.box,
            "attributes": [{key: getattr(one, key) for key in keys} for one in attributes],
        }
        for request, attributes in answers
    ]


def _short(probability: float) -> float:
    """Six digits, which float32 has."""
    return float(f"{probability:.6g}")


def _text(text: str) -> str:
    return printable(text, length=len(text))


def _cell(value: object) -> object:
    """A value for a CSV: text that a spreadsheet would run as a formula gets an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
