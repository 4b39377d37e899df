"""Batches of a split in the order of its rows, for evaluation."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future

import numpy as np

from vlal_dist.data.batch import Batch
from vlal_dist.data.batches import BatchMaker, Made
from vlal_dist.data.keyed import I64

_AHEAD = 2
"""Batches made ahead."""


def evaluation_batches(
    maker: BatchMaker, rows: I64, *, batch_size: int
) -> Generator[Batch, None, None]:
    """Batches of the given ascending rows in order, without augmentation, made ahead."""
    pending: deque[tuple[int, Future[Made]]] = deque()
    try:
        for start in range(0, len(rows), batch_size):
            piece = rows[start : start + batch_size]
            maker.reader.want(piece, maker.reader.blocks(piece))
            zeros = np.zeros(len(piece), dtype=np.int64)
            future = maker.start(maker.reader.locate(piece), zeros, zeros.astype(np.bool_))
            pending.append((int(piece[0]), future))
            if len(pending) > _AHEAD:
                yield _next(maker, pending)
        while pending:
            yield _next(maker, pending)
    finally:
        for _, future in pending:
            future.cancel()
        maker.reader.forget()


def _next(maker: BatchMaker, pending: "deque[tuple[int, Future[Made]]]") -> Batch:
    first_row, future = pending.popleft()
    maker.reader.retire(first_row)
    return future.result().batch
