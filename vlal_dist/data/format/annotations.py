"""Annotations of samples that lie in tars of others, beside the tars, memory-mapped.

`annotations.arrow` says of each row of the index what `KEY.json` says of a sample of our own tars
(docs/formats.md). Labels of a batch are gathered from its columns without a copy of the file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlal_dist.data.format.index import Array, encode_batch, map_batch
from vlal_dist.data.hashing import I64
from vlal_dist.errors import DataError

TEXTS = ("key", "instance_id", "image_id")
ANNOTATIONS_SCHEMA = pa.schema(
    [
        *((name, pa.large_string()) for name in TEXTS),
        ("positive", pa.large_list(pa.uint32())),
        ("negative", pa.large_list(pa.uint32())),
        ("width", pa.uint32()),
        ("height", pa.uint32()),
    ]
)
"""Offsets have 64 bits: the texts of 100 million samples take more than 2 GB."""


@dataclass(frozen=True)
class Ragged:
    """Ids of each row: those of row r are `ids[ends[r] : ends[r + 1]]`."""

    ends: Array
    ids: Array

    def of(self, row: int) -> list[int]:
        """The ids of one row."""
        found: list[int] = self.ids[int(self.ends[row]) : int(self.ends[row + 1])].tolist()
        return found

    def gather(self, rows: I64) -> tuple[I64, I64]:
        """Place in `rows`, and id, of every id of these rows."""
        first = self.ends[rows].astype(np.int64)
        counts = self.ends[rows + 1].astype(np.int64) - first
        place = np.repeat(np.arange(len(rows)), counts)
        start = np.cumsum(counts) - counts
        at = np.arange(len(place)) - start[place] + first[place]
        return place, self.ids[at].astype(np.int64)


class Annotations:
    """The annotations of a split, memory-mapped.

    Args:
        batch: of `ANNOTATIONS_SCHEMA`, checked.
    """

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self.positive, self.negative = _ragged(batch["positive"]), _ragged(batch["negative"])
        self.width: Array = batch["width"].to_numpy(zero_copy_only=True)
        self.height: Array = batch["height"].to_numpy(zero_copy_only=True)

    def __len__(self) -> int:
        return len(self.width)

    def text(self, name: str, row: int) -> str:
        """One of `TEXTS` of a row."""
        return str(self._batch[name][row].as_py())

    def texts(self, name: str) -> list[str]:
        """One of `TEXTS` of all rows."""
        found: list[str] = self._batch[name].to_pylist()
        return found

    def label_rows(self, rows: I64, num_attributes: int) -> npt.NDArray[np.int8]:
        """Labels of rows: int8 [B, A], +1 annotated present, -1 annotated absent, 0 unannotated."""
        label = np.zeros((len(rows), num_attributes), dtype=np.int8)
        label[self.positive.gather(rows)] = 1
        label[self.negative.gather(rows)] = -1
        return label


def encode_annotations(columns: dict[str, Any]) -> bytes:
    """`annotations.arrow`: one record batch, uncompressed."""
    return encode_batch(
        pa.record_batch(
            [pa.array(columns[field.name], type=field.type) for field in ANNOTATIONS_SCHEMA],
            schema=ANNOTATIONS_SCHEMA,
        )
    )


def map_annotations(path: Path) -> Annotations:
    """Memory-map `annotations.arrow`; every buffer is checked.

    Raises:
        DataError: damaged, or of other columns.
    """
    return Annotations(map_batch(path, ANNOTATIONS_SCHEMA))


def check_annotations(found: Annotations, *, rows: int, num_attributes: int, where: str) -> None:
    """Compare annotations with the index and the vocabulary.

    Raises:
        DataError: another number of rows, an unknown attribute, or a photo without pixels.
    """
    if len(found) != rows:
        raise DataError(f"{where} holds {len(found)} rows, index.arrow {rows}; pack again")
    for name, ids in (("positive", found.positive.ids), ("negative", found.negative.ids)):
        if np.max(ids, initial=0) >= num_attributes:
            raise DataError(
                f"{where}: {name} holds attribute ids outside 0..{num_attributes - 1}; pack again"
            )
    if not (np.all(found.width) and np.all(found.height)):
        raise DataError(f"{where}: a photo has no pixels; pack again")


def _ragged(column: pa.Array) -> Ragged:
    return Ragged(
        column.offsets.to_numpy(zero_copy_only=True), column.values.to_numpy(zero_copy_only=True)
    )
