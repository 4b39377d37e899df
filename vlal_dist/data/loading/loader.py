"""Data loaders of one rank: the training stream, and the evaluation batches."""

from collections import deque
from collections.abc import Generator, Iterator, Set
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from vlal_dist.config.sections import TrainingConfig
from vlal_dist.data.hashing import FLIP, I64, U64, uniform
from vlal_dist.data.loading.batch import Batch
from vlal_dist.data.loading.batch_builder import BatchBuilder, BuiltBatch
from vlal_dist.data.loading.prefetch import FETCHES
from vlal_dist.data.loading.shard_reader import Damage, SampleLocations
from vlal_dist.data.order.epoch_plan import EpochPlan
from vlal_dist.data.order.ledger import Ledger
from vlal_dist.data.order.rank_split import (
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


@dataclass(frozen=True)
class _Rows:
    """This rank's rows of one micro-batch: where they lie, and what of it is left out.

    Attributes:
        positions: int64 [n], of the epoch.
        visit: int64 [n].
        flip: bool [n].
        at: where the rows lie.
        left_out: visits to samples quarantined before.
    """

    positions: I64
    visit: I64
    flip: npt.NDArray[np.bool_]
    at: SampleLocations
    left_out: Ledger


@dataclass(frozen=True)
class _Coming:
    """A step on its way: its rows, and their batches in the making."""

    start: int
    samples: int
    asked: list[tuple[_Rows, "Future[BuiltBatch]"]]


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

    def epoch(self, epoch: int, start: int, quarantined: Set[int] = frozenset()) -> Iterator[Step]:
        """Steps of an epoch from position `start` on, made ahead in order.

        Args:
            epoch: 0-based.
            start: visits of this epoch already consumed.
            quarantined: uids of samples that are left out; may grow while the epoch runs.
        """
        reader, end = self.builder.reader, self.end_of_epoch(epoch, start)
        coming: deque[_Coming] = deque()
        wanted = start
        try:
            for first, samples, rows in self._cut(epoch, start, end, quarantined):
                if reader.remote and wanted < min(end, first + self._horizon):
                    wanted = self._want(epoch, wanted, min(end, first + 2 * self._horizon))
                asked = [(one, self.builder.start(one.at, one.visit, one.flip)) for one in rows]
                coming.append(_Coming(first, samples, asked))
                if len(coming) > self.data.prefetch_steps:
                    yield self._finish(coming)
            while coming:
                yield self._finish(coming)
        finally:
            for step in coming:
                for _, made in step.asked:
                    made.cancel()
            reader.forget()

    def ledger_of(self, epoch: int, start: int, stop: int) -> Ledger:
        """The ledger of the visits at positions start..stop-1, such as a dropped end."""
        total = Ledger()
        for first in range(start, stop, _LEDGER_PIECE):
            places = self.stream.at(epoch, np.arange(first, min(first + _LEDGER_PIECE, stop)))
            total += Ledger.of(self._uids(places.row), places.visit)
        return total

    def numbers(self) -> dict[str, float]:
        """What this rank's stream did so far, for its metrics: counts, seconds, and the queue."""
        made, reader, remote = self.builder.counts, self.builder.reader, self.builder.reader.remote
        cache = None if reader.cache is None else reader.cache.counts
        return {
            "samples": made.samples,
            "sample_bytes": made.sample_bytes,
            "read_seconds": made.read_s,
            "decode_seconds": made.decode_s,
            "label_seconds": made.label_s,
            "ready_steps": self.ready_steps,
            "fetches": remote.fetches if remote else 0,
            "fetched_bytes": remote.fetched_bytes if remote else 0,
            "fetch_seconds": remote.fetch_s if remote else 0.0,
            "refetched": reader.refetched,
            "damaged": reader.damaged,
            **({} if cache is None else {f"cache_{k}": v for k, v in asdict(cache).items()}),
        }

    def close(self) -> None:
        """End the threads."""
        self.builder.close()

    def _cut(
        self, epoch: int, start: int, end: int, quarantined: Set[int]
    ) -> Iterator[tuple[int, int, list[_Rows]]]:
        """Start, samples and this rank's micro-batches of each step.

        Looked up for many steps at once: one step alone is too small for numpy to be quick.
        """
        own_rows = max(1, self.training.batch_size // self._world_size)
        stretch = max(1, _STRETCH_ROWS // own_rows) * self.training.batch_size
        for begin in range(start, end, stretch):
            steps = [
                plan_step(
                    start=first,
                    samples=min(self.training.batch_size, end - first),
                    lanes=self.lanes,
                    micro_batches=self.micro_batches,
                    rank=self._rank,
                    world_size=self._world_size,
                )
                for first in range(begin, min(begin + stretch, end), self.training.batch_size)
            ]
            pieces = [positions for step in steps for positions in step.micro_batches]
            rows = self._look_up(epoch, pieces, quarantined)
            for step in steps:
                yield step.start, step.samples, [next(rows) for _ in step.micro_batches]

    def _look_up(self, epoch: int, pieces: list[I64], quarantined: Set[int]) -> Iterator[_Rows]:
        """The rows of consecutive micro-batches."""
        reader, every = self.builder.reader, np.concatenate(pieces)
        places = self.stream.at(epoch, every)
        uid = self._uids(places.row)
        flip = uniform(uid, places.visit, seed=self.training.seed, purpose=FLIP) < self.data.flip
        away = np.isin(uid, np.fromiter(quarantined, np.uint64, len(quarantined)))
        parts = self.stream.parts(epoch, every[~away]) if reader.remote else None
        at = reader.locate(places.row[~away], parts)
        done = high = 0
        for piece in pieces:
            part = slice(done, done := done + len(piece))
            stay, low = ~away[part], high
            high += int(stay.sum())
            left_out = Ledger()
            if not stay.all():
                left_out = Ledger.of(uid[part][~stay], places.visit[part][~stay])
            yield _Rows(
                positions=piece[stay],
                visit=places.visit[part][stay],
                flip=flip[part][stay],
                at=at.between(low, high),
                left_out=left_out,
            )

    def _finish(self, coming: deque[_Coming]) -> Step:
        """The oldest step, waited for."""
        step = coming.popleft()
        self.builder.reader.retire(step.start)
        self.ready_steps = sum(all(made.done() for _, made in s.asked) for s in coming)
        left_out, index, damaged, batches = Ledger(), [], [], []
        for rows, future in step.asked:
            made = future.result()
            left_out += rows.left_out
            if made.damaged:
                away = rows.at.rows[~made.kept], rows.visit[~made.kept]
                left_out += Ledger.of(self._uids(away[0]), away[1])
            index.append(rows.positions[made.kept])
            damaged += made.damaged
            batches.append(made.batch)
        return Step(
            micro_batches=batches,
            samples=step.samples,
            position=step.start + step.samples,
            sample_index=index,
            left_out=left_out,
            damaged=tuple(damaged),
        )

    def _want(self, epoch: int, start: int, stop: int) -> int:
        """Ask for the parts of this rank's positions from start on; returns `stop`."""
        positions = np.arange(start, stop, dtype=np.int64)
        mine = positions[(positions % self.lanes) % self._world_size == self._rank]
        if len(mine):
            rows = self.stream.at(epoch, mine).row
            self.builder.reader.want(rows, self.stream.parts(epoch, mine))
        return stop

    def _uids(self, rows: I64) -> U64:
        return self.builder.reader.corpus.column("uid", rows)


_AHEAD = 2
"""Batches made ahead."""


def evaluation_batches(
    builder: BatchBuilder, rows: I64, *, batch_size: int
) -> Generator[Batch, None, None]:
    """Batches of the given ascending rows in order, without augmentation, made ahead."""
    pending: deque[tuple[int, Future[BuiltBatch]]] = deque()
    try:
        for start in range(0, len(rows), batch_size):
            piece = rows[start : start + batch_size]
            builder.reader.want(piece, builder.reader.blocks(piece))
            zeros = np.zeros(len(piece), dtype=np.int64)
            future = builder.start(builder.reader.locate(piece), zeros, zeros.astype(np.bool_))
            pending.append((int(piece[0]), future))
            if len(pending) > _AHEAD:
                yield _next(builder, pending)
        while pending:
            yield _next(builder, pending)
    finally:
        for _, future in pending:
            future.cancel()
        builder.reader.forget()


def _next(builder: BatchBuilder, pending: "deque[tuple[int, Future[BuiltBatch]]]") -> Batch:
    first_row, future = pending.popleft()
    builder.reader.retire(first_row)
    return future.result().batch
