"""Concatenated splits: row r of the corpus is row r - start[s] of its split s.

A run on one dataset is a corpus of one split; a mix (`data.mix`) has more. Columns of the indexes
stay memory-mapped; only the blocks are concatenated.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vlal_dist.data.format.dataset import Split
from vlal_dist.data.hashing import I64

Array = npt.NDArray[Any]


class ConcatSplits:
    """Several splits read as one.

    Attributes:
        splits: the opened splits, in order.
        start: int64 [n + 1], the row at which each split begins; the last is the total.
        first_row: int64 [K], row at which each block begins.
        samples: int64 [K], samples of each block.
    """

    def __init__(self, splits: Sequence[Split]) -> None:
        self.splits = list(splits)
        sizes = [split.num_samples for split in self.splits]
        self.start: I64 = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.first_row: I64 = np.concatenate(
            [
                split.blocks.first_row.astype(np.int64) + begin
                for split, begin in zip(self.splits, self.start[:-1], strict=True)
            ]
        )
        self.samples: I64 = np.concatenate(
            [split.blocks.samples.astype(np.int64) for split in self.splits]
        )

    @property
    def remote(self) -> bool:
        """Whether a split lies in a remote store."""
        return any(split.store.local_path("dataset.json") is None for split in self.splits)

    @property
    def largest_block(self) -> int:
        """Size of the largest block, bytes."""
        return max(int(split.blocks.bytes.max(initial=0)) for split in self.splits)

    def __len__(self) -> int:
        return int(self.start[-1])

    def column(self, name: str, rows: I64) -> Array:
        """A column of the index at some rows, in their order."""
        if len(self.splits) == 1:
            return getattr(self.splits[0].index, name)[rows]  # type: ignore[no-any-return]
        which, local = self.locate(rows)
        found: Array = np.zeros(len(rows), dtype=getattr(self.splits[0].index, name).dtype)
        for number, split in enumerate(self.splits):
            here = which == number
            found[here] = getattr(split.index, name)[local[here]]
        return found

    def locate(self, rows: I64) -> tuple[I64, I64]:
        """The split of each row, and its row there."""
        which = np.searchsorted(self.start, rows, side="right") - 1
        return which, rows - self.start[which]

    def block_of(self, rows: I64) -> tuple[I64, I64]:
        """First row and end of the block that each row lies in."""
        block = np.searchsorted(self.first_row, rows, side="right") - 1
        return self.first_row[block], self.first_row[block] + self.samples[block]
