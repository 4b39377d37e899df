"""The training stream of one rank: steps of micro-batches, prepared ahead of their use."""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlal_dist.data.batches import Batch, BatchMaker
from vlal_dist.data.stream import (
    FLIP,
    Stream,
    choose_lanes,
    choose_micro_batches,
    epoch_samples,
    micro_batches_per_rank,
    plan_step,
    uniform,
)
from vlal_dist.errors import ConfigError


@dataclass
class Step:
    """One step of one rank.

    Attributes:
        micro_batches: this rank's micro-batches, always the same number; one may have 0 rows.
        samples: rows of the whole step, over all ranks.
        position: samples of the epoch consumed once this step is done.
        sample_index: per micro-batch, int64 positions within the epoch of its rows.
    """

    micro_batches: list[Batch]
    samples: int
    position: int
    sample_index: list[npt.NDArray[np.int64]]


class TrainLoader:
    """The training stream of one rank.

    Args:
        maker: makes the batches.
        batch_size: B, samples of a step over all ranks.
        accumulation: micro-batches per rank and step at the first start.
        rank, world_size: this rank, and how many.
        seed: order and flips.
        lanes: 0 for design 4's rule.
        micro_batches: M, 0 for design 4's rule.
        window_blocks: shuffle window of a lane, blocks.
        epoch_end: `drop` or `exact`.
        flip: probability of a horizontal flip.
        prefetch_steps: steps prepared ahead.
    """

    def __init__(
        self,
        maker: BatchMaker,
        *,
        batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
        lanes: int = 0,
        micro_batches: int = 0,
        window_blocks: int = 3,
        epoch_end: str = "drop",
        flip: float = 0.5,
        prefetch_steps: int = 4,
    ) -> None:
        blocks = maker.split.blocks
        self.lanes = lanes or choose_lanes(num_blocks=len(blocks), world_size=world_size)
        if world_size > self.lanes:
            raise ConfigError(
                f"{world_size} ranks but {self.lanes} lanes; start at most {self.lanes} ranks"
            )
        self.micro_batches = micro_batches or choose_micro_batches(
            lanes=self.lanes, world_size=world_size, accumulation=accumulation
        )
        self.stream = Stream(
            first_row=blocks.first_row,
            samples=blocks.samples,
            lanes=self.lanes,
            window_blocks=window_blocks,
            seed=seed,
        )
        self.epoch_samples = epoch_samples(
            num_samples=len(self.stream), batch_size=batch_size, epoch_end=epoch_end
        )
        if self.epoch_samples == 0:
            raise ConfigError(
                f"training.batch_size {batch_size} exceeds the {len(self.stream)} samples of split "
                f"{maker.split.name}; lower it, or set data.epoch_end exact"
            )
        self.micro_batches_per_step = micro_batches_per_rank(
            micro_batches=self.micro_batches, world_size=world_size
        )
        self.steps_per_epoch = -(-self.epoch_samples // batch_size)
        self._maker, self._batch_size, self._seed, self._flip = maker, batch_size, seed, flip
        self._rank, self._world_size = rank, world_size
        self._prefetch, self._epoch_end = prefetch_steps, epoch_end
        # A window may touch one block more than it is long; steps prepared ahead open the next one.
        own_lanes = -(-self.lanes // world_size)
        maker.keep_blocks(own_lanes * (window_blocks + 2))
        self._ahead = ThreadPoolExecutor(max_workers=2, thread_name_prefix="step")

    def end_of_epoch(self, start: int) -> int:
        """Where the epoch ends that is at sample `start`: `drop` leaves out an incomplete batch.

        After a resume with another B the whole batches are counted from `start`.
        """
        left = len(self.stream) - start
        return start + epoch_samples(
            num_samples=left, batch_size=self._batch_size, epoch_end=self._epoch_end
        )

    def epoch(self, epoch: int, start: int) -> Iterator[Step]:
        """Steps of an epoch from sample `start` on, prepared ahead in order.

        Args:
            epoch: 0-based; also the visit number of every sample.
            start: samples of this epoch already consumed.
        """
        stop = threading.Event()
        pending: deque[Future[Step]] = deque()
        end = self.end_of_epoch(start)
        try:
            for first in range(start, end, self._batch_size):
                samples = min(self._batch_size, end - first)
                pending.append(self._ahead.submit(self._prepare, epoch, first, samples, stop))
                if len(pending) > self._prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            stop.set()
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """End the threads."""
        self._ahead.shutdown(wait=True, cancel_futures=True)
        self._maker.close()

    def _prepare(self, epoch: int, start: int, samples: int, stop: threading.Event) -> Step:
        plan = plan_step(
            start=start,
            samples=samples,
            lanes=self.lanes,
            micro_batches=self.micro_batches,
            rank=self._rank,
            world_size=self._world_size,
        )
        batches = []
        for positions in plan.micro_batches:
            if stop.is_set():
                break
            rows = self.stream.rows_at(epoch, positions)
            visit = np.full(len(rows), epoch, dtype=np.int64)
            uid = self._maker.split.index.uid[rows]
            flip = uniform(uid, visit, seed=self._seed, purpose=FLIP) < self._flip
            batches.append(self._maker.make(rows, visit, flip))
        return Step(batches, samples, start + samples, plan.micro_batches)
