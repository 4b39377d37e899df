"""The order of an epoch (design 4): a pure function of seed, epoch, blocks, lanes and window.

    blocks sorted by a keyed hash, laid end to end:      |b7|b2|b9|b0|b4|...|   a line of N samples
    cut into lanes of equal length (longer ones first):  |lane 0|lane 1|lane 2|...|
    permuted inside each lane, window by window:         |..|....|....|  the first window of lane l
                                                         is cut short by l / lanes of a window
    sample i of the epoch:                               the (i div lanes)-th of lane i mod lanes

Ranks, workers and caches appear nowhere above; they only choose which lanes to read. The position
in the stream is (epoch, samples consumed in it), and any position is reached in constant time.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from vlal_dist.errors import ConfigError

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

SMALL_LANES = (240, 120, 48, 24, 12, 8, 4, 2, 1)
BLOCKS_PER_LANE = 3
LANES_PER_RANK = 8

# Purposes keep the hashes of blocks, windows and augmentations apart.
ORDER_OF_BLOCKS, ORDER_IN_WINDOW, FLIP = 1, 2, 3

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix(values: U64) -> U64:
    """The finaliser of splitmix64: a bijection on 64 bits, ours for good (no library's stream)."""
    x = values.astype(np.uint64, copy=True)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def keyed_hash(values: U64, *key: int) -> U64:
    """A 64-bit hash of each value under a key of integers; equal on every machine.

    Distinct values have distinct hashes under one key.
    """
    state = np.zeros(1, dtype=np.uint64)
    for word in key:
        state = mix(state + np.uint64((word * _GOLDEN + _GOLDEN) & _MASK))
    return mix(mix(values.astype(np.uint64, copy=False) + state) ^ state)


def uniform(uid: U64, visit: I64, *, seed: int, purpose: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each (sample, visit), independent of any layout.

    Args:
        uid: uint64 [n].
        visit: int64 [n], running count of the sample's planned visits.
        seed: the run's seed.
        purpose: keeps different uses apart.
    """
    bits = keyed_hash(keyed_hash(uid, seed, purpose) + visit.astype(np.uint64), seed, purpose)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choose_lanes(*, num_blocks: int, world_size: int) -> int:
    """Lanes of a dataset, by design 4's rule; fixed at a run's first start.

    240 x 2^k, the smallest that gives each rank 8; on small datasets the largest of 240, ..., 1
    that leaves each lane 3 blocks, but the smallest of these >= `world_size` if that is larger.
    """
    lanes = 240
    while lanes < LANES_PER_RANK * world_size:
        lanes *= 2
    if num_blocks >= BLOCKS_PER_LANE * lanes:
        return lanes
    fitting = next((n for n in SMALL_LANES if num_blocks >= BLOCKS_PER_LANE * n), 1)
    enough = [n for n in SMALL_LANES if n >= world_size]
    return max(fitting, min(enough)) if enough else lanes


def choose_micro_batches(*, lanes: int, world_size: int, accumulation: int) -> int:
    """M: the largest divisor of `lanes` not above world size x accumulation (design 4)."""
    most = world_size * accumulation
    return max(m for m in range(1, min(lanes, most) + 1) if lanes % m == 0)


@dataclass(frozen=True)
class StreamSettings:
    """What fixes the order of an epoch."""

    seed: int
    lanes: int
    window_blocks: int
    num_samples: int
    num_blocks: int


class Stream:
    """The order of samples of one split.

    Args:
        first_row: row at which each block begins, uint64 [K].
        samples: samples of each block, uint32 [K].
        lanes: number of lanes.
        window_blocks: shuffle window of a lane, in mean blocks.
        seed: the run's seed.
    """

    def __init__(
        self,
        *,
        first_row: U64,
        samples: npt.NDArray[np.uint32],
        lanes: int,
        window_blocks: int,
        seed: int,
    ) -> None:
        if len(samples) == 0:
            raise ConfigError("the split holds no sample; nothing can be streamed")
        if lanes < 1:
            raise ConfigError(f"data.lanes is {lanes}; it must be at least 1")
        self._first_row = first_row.astype(np.int64)
        self._samples = samples.astype(np.int64)
        total = int(self._samples.sum())
        self.settings = StreamSettings(seed, lanes, window_blocks, total, len(samples))
        mean_block = max(1, round(total / len(samples)))
        self._window = max(1, window_blocks * mean_block)
        self._line = lru_cache(maxsize=2)(self._lay_line)
        self._permutation = lru_cache(maxsize=4 * lanes + 16)(self._permute_window)

    def __len__(self) -> int:
        return self.settings.num_samples

    def rows(self, epoch: int, start: int, stop: int) -> I64:
        """Index rows of samples start..stop-1 of an epoch, int64, in order."""
        return self.rows_at(epoch, np.arange(start, stop, dtype=np.int64))

    def rows_at(self, epoch: int, samples: I64) -> I64:
        """Index rows of the given samples (positions within the epoch)."""
        if len(samples) and not (samples.min() >= 0 and samples.max() < len(self)):
            raise ValueError(f"samples {samples.min()}..{samples.max()} of an epoch of {len(self)}")
        lanes = self.settings.lanes
        lane, place = samples % lanes, samples // lanes
        shortest, longer = divmod(len(self), lanes)
        lane_start = lane * shortest + np.minimum(lane, longer)
        first = self._first_window(lane)
        window = np.where(place < first, 0, 1 + (place - first) // self._window)
        start = np.where(window == 0, 0, first + (window - 1) * self._window)
        line = np.empty_like(samples)
        for one_lane, one_window in np.unique(np.stack([lane, window], 1), axis=0).tolist():
            inside = (lane == one_lane) & (window == one_window)
            permutation = self._permutation(epoch, one_lane, one_window)
            line[inside] = (
                lane_start[inside] + start[inside] + permutation[place[inside] - start[inside]]
            )
        return self._row_of_line(epoch, line)

    def _first_window(self, lane: I64) -> I64:
        """Length of each lane's first window; staggered, so that reads are even over time."""
        return np.maximum(1, self._window - lane * self._window // self.settings.lanes)

    def _permute_window(self, epoch: int, lane: int, window: int) -> I64:
        shortest, longer = divmod(len(self), self.settings.lanes)
        length = shortest + (1 if lane < longer else 0)
        first = int(self._first_window(np.array([lane]))[0])
        start = 0 if window == 0 else first + (window - 1) * self._window
        stop = min(length, first + window * self._window)
        places = np.arange(start, stop, dtype=np.uint64)
        seed = self.settings.seed
        return np.argsort(keyed_hash(places, seed, ORDER_IN_WINDOW, epoch, lane), kind="stable")

    def _lay_line(self, epoch: int) -> tuple[I64, I64]:
        """Blocks in the epoch's order, and the line position at which each begins."""
        blocks = np.arange(len(self._samples), dtype=np.uint64)
        order = np.argsort(
            keyed_hash(blocks, self.settings.seed, ORDER_OF_BLOCKS, epoch), kind="stable"
        )
        ends = np.cumsum(self._samples[order])
        return order, ends - self._samples[order]

    def _row_of_line(self, epoch: int, line: I64) -> I64:
        order, begins = self._line(epoch)
        at = np.searchsorted(begins, line, side="right") - 1
        # Blocks without a sample share their successor's beginning; the last of equals is right.
        rows: I64 = self._first_row[order[at]] + line - begins[at]
        return rows


@dataclass(frozen=True)
class StepPlan:
    """What one rank does in one step.

    Attributes:
        start: first sample of the step (position in the epoch).
        samples: samples of the whole step, over all ranks.
        micro_batches: samples (positions in the epoch) of each of this rank's micro-batches, in
            order; possibly empty.
    """

    start: int
    samples: int
    micro_batches: list[I64]


def micro_batches_per_rank(*, micro_batches: int, world_size: int) -> int:
    """Forward passes of each rank in each step: ceil(M / W)."""
    return -(-micro_batches // world_size)


def plan_step(
    *, start: int, samples: int, lanes: int, micro_batches: int, rank: int, world_size: int
) -> StepPlan:
    """Cut the step [start, start + samples) into this rank's micro-batches (design 4).

    Sample i belongs to micro-batch i mod M. When W divides M, rank r runs the micro-batches
    m = r mod W; otherwise it cuts its rows, those of the lanes l = r mod W, into ceil(M / W)
    micro-batches of nearly equal size.
    """
    taken = np.arange(start, start + samples, dtype=np.int64)
    if micro_batches % world_size == 0:
        own = [taken[taken % micro_batches == m] for m in range(rank, micro_batches, world_size)]
    else:
        mine = taken[(taken % lanes) % world_size == rank]
        count = micro_batches_per_rank(micro_batches=micro_batches, world_size=world_size)
        own = [part.astype(np.int64) for part in np.array_split(mine, count)]
    return StepPlan(start=start, samples=samples, micro_batches=own)


def epoch_samples(*, num_samples: int, batch_size: int, epoch_end: str) -> int:
    """Samples of an epoch that are trained on: all, or without the incomplete last batch."""
    return num_samples if epoch_end == "exact" else num_samples // batch_size * batch_size
