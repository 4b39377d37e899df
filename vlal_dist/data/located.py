"""Where the rows of a batch lie: looked up for many at once, cut into batches, read row by row."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from vlal_dist.data.keyed import I64, U64
from vlal_dist.data.parts import Part


@dataclass(frozen=True)
class Located:
    """Where some rows lie, as lists: one entry per row.

    Attributes:
        rows: int64 [n], of the corpus.
        uid: uint64 [n].
        object_id: int64 [n].
        shard: shard, counted through the corpus.
        offset, length, crc32: of the tar range.
        jpg, json, likelihood: (start, stop) of each part's contents within the range.
        part, part_offset: the part that a remote row is read from, and its offset in the shard.
    """

    rows: I64
    uid: U64
    object_id: I64
    shard: list[int]
    offset: list[int]
    length: list[int]
    crc32: list[int]
    jpg: list[tuple[int, int]]
    json: list[tuple[int, int]]
    likelihood: list[tuple[int, int]]
    part: list[Part]
    part_offset: list[int]

    def between(self, low: int, high: int) -> "Located":
        """Rows low..high-1 of these."""
        return Located(**{name: value[low:high] for name, value in vars(self).items()})

    def only(self, places: I64) -> "Located":
        """The rows at some places of these."""

        def pick(value: Any) -> Any:
            if isinstance(value, np.ndarray):
                return value[places]
            return [value[n] for n in places.tolist()] if value else []  # local rows have no part

        return Located(**{name: pick(value) for name, value in vars(self).items()})
