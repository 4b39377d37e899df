"""Data loaders of one rank: the training stream, and evaluation batches in order."""

from collections import deque
from collections.abc import Generator, Iterator, Set
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from vlal_dist.config.sections import TrainingConfig
from vlal_dist.data.hashing import FLIP, I64, U64, uniform
from vlal_dist.data.loading.batch import Batch
from vlal_dist.data.loading.batch_builder import BatchBuilder, BatchRequest, BuiltBatch
from vlal_dist.data.loading.prefetch import FETCHES
from vlal_dist.data.loading.shard_reader import Damage
from vlal_dist.data.order.epoch_plan import EpochPlan
from vlal_dist.data.order.ledger import Ledger
from vlal_dist.data.order.rank_split import (
    StepPlan,
    choose_micro_batches,
    epoch_samples,
    micro_batches_per_rank,
    plan_step,
)
from vlal_dist.data.order.shuffle import Shuffle, choose_lanes
from vlal_dist.errors import ConfigError

_LEDGER_PIECE = 1 << 20
_STRETCH_ROWS = 4096
"""Rows of a rank that are looked up at a time."""


@dataclass
class Step:
    """One step of one rank.

    Attributes:
        micro_batches: this rank's micro-batches, always the same number; one may have 0 rows.
        samples: visits of the whole step, over all ranks, those left out included.
        position: visits of the epoch consumed once this step is done.
        sample_index: per micro-batch, int64 positions within the epoch of its rows.
        left_out: this rank's visits to quarantined samples, which have no row here.
        damaged: samples found damaged in this step, by this rank.
    """

    micro_batches: list[Batch]
    samples: int
    position: int
    sample_index: list[npt.NDArray[np.int64]]
    left_out: Ledger = field(default_factory=Ledger)
    damaged: tuple[Damage, ...] = ()


class TrainLoader:
    """The training stream of one rank.

    Args:
        builder: builds the batches; its configuration also states the order of an epoch.
        plan: which samples an epoch holds.
        training: batch size, micro-batches per rank at the first start, and seed of the order and
            the flips.
        rank, world_size: this rank, and how many there are.
        lanes, micro_batches: those of the run's first start; 0: chosen now (docs/stream.md).

    Raises:
        ConfigError: more ranks than lanes, or a batch larger than an epoch that drops its end.
    """

    def __init__(
        self,
        builder: BatchBuilder,
        plan: EpochPlan,
        training: TrainingConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        lanes: int = 0,
        micro_batches: int = 0,
    ) -> None:
        self.builder, self.plan, self.data, self.training = builder, plan, builder.config, training
        self._rank, self._world_size, self.ready_steps = rank, world_size, 0
        blocks, batch_size = len(plan.corpus.samples), training.batch_size
        self.lanes = (
            lanes or self.data.lanes or choose_lanes(num_blocks=blocks, world_size=world_size)
        )
        if world_size > self.lanes:
            raise ConfigError(
                f"{world_size} ranks but {self.lanes} lanes; start at most {self.lanes} ranks"
            )
        self.micro_batches = micro_batches or choose_micro_batches(
            lanes=self.lanes, world_size=world_size, accumulation=training.accumulation
        )
        self.micro_batches_per_step = micro_batches_per_rank(
            micro_batches=self.micro_batches, world_size=world_size
        )
        self.stream = Shuffle(
            plan, lanes=self.lanes, window_blocks=self.data.window_blocks, seed=training.seed
        )
        mean_block = max(1, self.stream.length(0) // max(1, blocks))
        # Far enough ahead that each rank has as many reads in flight as it has fetching threads.
        self._horizon = max(
            self.data.prefetch_steps * batch_size, FETCHES * mean_block * world_size
        )
        if self.end_of_epoch(0, 0) == 0:
            raise ConfigError(
                f"training.batch_size {batch_size} exceeds the {self.stream.length(0)} samples of "
                "an epoch; lower it, or set data.epoch_end exact"
            )

    def end_of_epoch(self, epoch: int, start: int) -> int:
        """Where the epoch ends that is at position `start`: `drop` leaves out an incomplete batch.

        After a resume with another B the whole batches are counted from `start`.
        """
        left = self.stream.length(epoch) - start
        return start + epoch_samples(
            num_samples=left, batch_size=self.training.batch_size, epoch_end=self.data.epoch_end
        )

    def epoch(
        self,
        epoch: int,
        start: int,
        quarantined: Set[int] = frozenset(),
        *,
        first: int = 0,
        every: int = 1,
    ) -> Iterator[Step]:
        """Steps of an epoch from position `start` on, prefetched in order.

        Args:
            epoch: 0-based.
            start: visits of this epoch already consumed.
            quarantined: uids of samples that are left out; may grow while the epoch runs.
            first, every: only the steps number first, first + every, ... from `start` on, the share
                of one of several processes that work for this rank.
        """
        reader, end = self.builder.reader, self.end_of_epoch(epoch, start)
        batch_size = self.training.batch_size
        starts = range(start, end, batch_size)[first::every]
        pending: deque[tuple[StepPlan, list[Future[BuiltBatch]]]] = deque()
        requested = start
        try:
            for step, requests in self._requests(epoch, starts, end, quarantined):
                if reader.remote and requested < min(end, step.start + self._horizon):
                    stop = min(end, step.start + 2 * self._horizon)
                    positions = np.arange(requested, stop, dtype=np.int64)
                    number = (positions - start) // batch_size
                    self._prefetch(epoch, positions[number % every == first])
                    requested = stop
                pending.append((step, [self.builder.start(one) for one in requests]))
                if len(pending) > self.data.prefetch_steps:
                    yield self._finish(pending)
            while pending:
                yield self._finish(pending)
        finally:
            for _, futures in pending:
                for future in futures:
                    future.cancel()
            reader.prefetcher.clear()

    def ledger_of(self, epoch: int, start: int, stop: int) -> Ledger:
        """The ledger of the visits at positions start..stop-1, such as a dropped end."""
        total = Ledger()
        for first in range(start, stop, _LEDGER_PIECE):
            places = self.stream.at(epoch, np.arange(first, min(first + _LEDGER_PIECE, stop)))
            total += Ledger.of(self._uids(places.row), places.visit)
        return total

    def numbers(self) -> dict[str, float]:
        """Counts of this rank so far, for its metrics: work, seconds, and steps that are ready."""
        reader, fetched = self.builder.reader, self.builder.reader.prefetcher
        cache = {} if reader.cache is None else asdict(reader.cache.counts)
        return {
            **asdict(self.builder.counts),
            "ready_steps": self.ready_steps,
            "fetches": fetched.fetches,
            "fetched_bytes": fetched.fetched_bytes,
            "fetch_seconds": fetched.fetch_seconds,
            "refetched": reader.refetched,
            "damaged": reader.damaged,
            **{f"cache_{name}": value for name, value in cache.items()},
        }

    def close(self) -> None:
        """End the threads."""
        self.builder.close()

    def _requests(
        self, epoch: int, starts: range, end: int, quarantined: Set[int]
    ) -> Iterator[tuple[StepPlan, list[BatchRequest]]]:
        """The steps that begin at `starts`, and the requests of this rank's micro-batches.

        Rows are looked up for many steps at once: one step is too small for numpy to be quick.
        """
        batch_size = self.training.batch_size
        own_rows = max(1, batch_size // self._world_size)
        stretch = max(1, _STRETCH_ROWS // own_rows)
        for begin in range(0, len(starts), stretch):
            steps = [
                plan_step(
                    start=first,
                    samples=min(batch_size, end - first),
                    lanes=self.lanes,
                    micro_batches=self.micro_batches,
                    rank=self._rank,
                    world_size=self._world_size,
                )
                for first in starts[begin : begin + stretch]
            ]
            pieces = [positions for step in steps for positions in step.micro_batches]
            requests = self._look_up(epoch, pieces, quarantined)
            for step in steps:
                yield step, [next(requests) for _ in step.micro_batches]

    def _look_up(
        self, epoch: int, pieces: list[I64], quarantined: Set[int]
    ) -> Iterator[BatchRequest]:
        """The requests of consecutive micro-batches, given as positions of the epoch."""
        reader, every = self.builder.reader, np.concatenate(pieces)
        places = self.stream.at(epoch, every)
        uid = self._uids(places.row)
        flip = uniform(uid, places.visit, seed=self.training.seed, purpose=FLIP) < self.data.flip
        away = np.isin(uid, np.fromiter(quarantined, np.uint64, len(quarantined)))
        blocks = self.stream.block_ranges(epoch, every[~away]) if reader.remote else None
        at = reader.locate(places.row[~away], blocks)
        done = high = 0
        for piece in pieces:
            here = slice(done, done := done + len(piece))
            stay, low = ~away[here], high
            high += int(stay.sum())
            left_out = Ledger()
            if not stay.all():
                left_out = Ledger.of(uid[here][~stay], places.visit[here][~stay])
            yield BatchRequest(
                at=at.select(slice(low, high)),
                position=piece[stay],
                visit=places.visit[here][stay],
                flip=flip[here][stay],
                left_out=left_out,
            )

    def _finish(self, pending: deque[tuple[StepPlan, list["Future[BuiltBatch]"]]]) -> Step:
        """The oldest step, waited for."""
        step, futures = pending.popleft()
        self.builder.reader.prefetcher.retire(step.start)
        self.ready_steps = sum(all(one.done() for one in others) for _, others in pending)
        built = [future.result() for future in futures]
        return Step(
            micro_batches=[one.batch for one in built],
            samples=step.samples,
            position=step.start + step.samples,
            sample_index=[one.position for one in built],
            left_out=sum((one.left_out for one in built), Ledger()),
            damaged=tuple(damage for one in built for damage in one.damaged),
        )

    def _prefetch(self, epoch: int, positions: I64) -> None:
        """Begin to fetch the block ranges of this rank's share of some positions."""
        mine = positions[(positions % self.lanes) % self._world_size == self._rank]
        if len(mine):
            rows = self.stream.at(epoch, mine).row
            self.builder.reader.prefetch(rows, self.stream.block_ranges(epoch, mine))

    def _uids(self, rows: I64) -> U64:
        return self.builder.reader.corpus.column("uid", rows)


_AHEAD = 2
"""Batches built ahead."""


def evaluation_batches(
    builder: BatchBuilder, rows: I64, *, batch_size: int
) -> Generator[Batch, None, None]:
    """Batches of the given ascending rows in order, without augmentation, built ahead."""
    reader, pending = builder.reader, deque[tuple[int, Future[BuiltBatch]]]()
    try:
        for start in range(0, len(rows), batch_size):
            piece = rows[start : start + batch_size]
            reader.prefetch(piece, reader.whole_blocks(piece))
            future = builder.start(BatchRequest.plain(reader.locate(piece)))
            pending.append((int(piece[0]), future))
            if len(pending) > _AHEAD:
                yield _next(builder, pending)
        while pending:
            yield _next(builder, pending)
    finally:
        for _, future in pending:
            future.cancel()
        reader.prefetcher.clear()


def _next(builder: BatchBuilder, pending: "deque[tuple[int, Future[BuiltBatch]]]") -> Batch:
    first_row, future = pending.popleft()
    builder.reader.prefetcher.retire(first_row)
    return future.result().batch
