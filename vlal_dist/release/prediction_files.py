"""What predict writes: JSON lines or Parquet with a row per object, CSV with a row per attribute.

A file appears under its name when it is finished, and not before.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from vlal_dist.errors import ConfigError
from vlal_dist.release.requests import Reject, Request
from vlal_dist.storage.checks import TEMPORARY_PREFIX

SUFFIXES = (".jsonl", ".parquet", ".csv")
_GROUP_ROWS = 8192
"""Rows of a Parquet row group, about; what is held until it is written."""


@dataclass(frozen=True)
class Predicted:
    """A batch's answers.

    Attributes:
        requests: B of them.
        attribute_id: int64 [B, k], likeliest first.
        probability: float32 [B, k].
        present: bool [B, k], by the thresholds; None: not asked for.
    """

    requests: Sequence[Request]
    attribute_id: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float32]
    present: npt.NDArray[np.bool_] | None


Write = Callable[[Predicted], None]


@contextmanager
def open_output(path: Path, names: Sequence[str], *, thresholds: bool) -> Iterator[Write]:
    """A file of predictions, written batch by batch; the suffix says which kind.

    Args:
        path: of the finished file; an earlier one is replaced.
        names: of the attributes.
        thresholds: whether batches say what is present.

    Raises:
        ConfigError: another suffix.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"predict.output {path}: {', '.join(SUFFIXES)} are written; rename it")
    writer = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[path.suffix]
    with finished_file(path) as temporary, writer(temporary, names, thresholds) as write:
        yield write


@contextmanager
def open_rejects(path: Path) -> Iterator[Callable[[Reject], None]]:
    """A file of rejects as JSON lines; without any there is no file, an earlier one is removed."""
    count = 0
    with finished_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:

        def write(reject: Reject) -> None:
            nonlocal count
            count += 1
            file.write(json.dumps(asdict(reject), ensure_ascii=False) + "\n")

        yield write
    if not count:
        path.unlink()


@contextmanager
def finished_file(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, which takes the real one at the end of the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _jsonl(path: Path, names: Sequence[str], thresholds: bool) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as file:

        def write(batch: Predicted) -> None:
            for head, attributes in zip(_heads(batch), _attributes(batch, names), strict=True):
                file.write(json.dumps({**head, "attributes": attributes}, ensure_ascii=False))
                file.write("\n")

        yield write


@contextmanager
def _csv(path: Path, names: Sequence[str], thresholds: bool) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="") as file:
        columns = ["row", "id", "image", "object", "x", "y", "w", "h"]
        columns += ["rank", "attribute", "probability", *(["present"] if thresholds else [])]
        writer = csv.writer(file)
        writer.writerow(columns)

        def write(batch: Predicted) -> None:
            for head, attributes in zip(_heads(batch), _attributes(batch, names), strict=True):
                box = head.pop("box") or [None] * 4
                for rank, attribute in enumerate(attributes, 1):
                    cells = [
                        str(v).lower() if isinstance(v, bool) else v for v in attribute.values()
                    ]
                    writer.writerow([*head.values(), *box, rank, *cells])

        yield write


@contextmanager
def _parquet(path: Path, names: Sequence[str], thresholds: bool) -> Iterator[Write]:
    dictionary = pa.array(names, pa.string())
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

    def write(batch: Predicted) -> None:
        columns = [dictionary.take(pa.array(batch.attribute_id.ravel()))]
        columns.append(pa.array(batch.probability.ravel()))
        if batch.present is not None:
            columns.append(pa.array(batch.present.ravel()))
        rows, k = batch.attribute_id.shape
        items = pa.StructArray.from_arrays(columns, fields=list(schema.field(5).type.value_type))
        offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * k)
        heads = pa.Table.from_pylist(list(_heads(batch)), schema=pa.schema(list(schema)[:5]))
        lists = pa.ListArray.from_arrays(offsets, items)
        held.append(heads.append_column(schema.field(5), lists))
        if sum(len(table) for table in held) >= _GROUP_ROWS:
            flush()

    def flush() -> None:
        if held:
            file.write_table(pa.concat_tables(held).combine_chunks())
            held.clear()

    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        yield write
        flush()


def _heads(batch: Predicted) -> Iterator[dict[str, Any]]:
    for one in batch.requests:
        box = None if one.box is None else list(one.box)
        head = {"row": one.row, "id": one.id, "image": one.image, "object": one.object_name}
        yield {**head, "box": box}


def _attributes(batch: Predicted, names: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """Of each row, in order; probabilities with six digits, which float32 has."""
    ids, values = batch.attribute_id.tolist(), batch.probability.tolist()
    present = [None] * len(ids) if batch.present is None else batch.present.tolist()
    for row_ids, row_values, row_present in zip(ids, values, present, strict=True):
        found = [
            {"name": names[i], "probability": float(f"{value:.6g}")}
            for i, value in zip(row_ids, row_values, strict=True)
        ]
        for place, value in enumerate(row_present or []):
            found[place]["present"] = value
        yield found
