"""The order of an epoch: a pure function of seed, epoch, plan, lanes and window (docs/stream.md).

    blocks sorted by a keyed hash, laid end to end:      |b7|b2|b9|b0|b4|...|   a line of N visits
    cut into lanes of equal length (longer ones first):  |lane 0|lane 1|lane 2|...|
    permuted inside each lane, window by window:         |..|....|....|  the first window of lane l
                                                         is cut short by l / lanes of a window
    visit i of the epoch:                                the (i div lanes)-th of lane i mod lanes

Ranks, threads and caches only choose which lanes to read. A position in the stream is (epoch,
visits consumed in it), and any position is reached in constant time.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from vlal_dist.data.hashing import I64, ORDER_IN_WINDOW, ORDER_OF_BLOCKS, keyed_hash
from vlal_dist.data.order.epoch_plan import EpochPlan, EpochRows
from vlal_dist.errors import ConfigError

SMALL_LANES = (240, 120, 48, 24, 12, 8, 4, 2, 1)
BLOCKS_PER_LANE = 3
LANES_PER_RANK = 8
_TABLE_VISITS = 1 << 14
"""Visits whose order is computed together: the cost of a lane is shared by its visits."""
_TABLES = 64
"""Tables kept: enough for the visits that a rank of many prefetches."""


def choose_lanes(*, num_blocks: int, world_size: int) -> int:
    """Number of lanes of a dataset, fixed at a run's first start.

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


@dataclass(frozen=True)
class Visits:
    """The visits at some positions of an epoch.

    Attributes:
        row: int64 [n], row of the corpus.
        visit: int64 [n], running count of that sample's planned visits.
    """

    row: I64
    visit: I64


@dataclass(frozen=True)
class BlockRanges:
    """The runs of neighbouring rows that some positions are read from: a block, cut at lane ends.

    Attributes:
        first, stop: int64 [n], the rows first..stop-1 of the corpus, for each position.
        until: int64 [n], position of the epoch from which on the range is not used any more.
    """

    first: I64
    stop: I64
    until: I64


@dataclass(frozen=True)
class _EpochLine:
    """The visits of one epoch laid end to end, before the permutation inside lanes.

    Attributes:
        rows: the epoch's virtual blocks.
        order: int64 [V], virtual blocks in the order of the line.
        begins: int64 [V], place on the line at which each begins.
        length: visits.
        window: shuffle window, visits.
    """

    rows: EpochRows
    order: I64
    begins: I64
    length: int
    window: int

    def blocks(self, places: I64) -> tuple[I64, I64]:
        """The virtual block at each place, and the place at which it begins."""
        number = np.searchsorted(self.begins, places, side="right") - 1
        return self.order[number], self.begins[number]


class Shuffle:
    """The order of a plan's visits.

    Args:
        plan: which rows an epoch holds.
        lanes: number of lanes.
        window_blocks: shuffle window of a lane, in mean blocks.
        seed: the run's seed.

    Raises:
        ConfigError: no lane.
    """

    def __init__(self, plan: EpochPlan, *, lanes: int, window_blocks: int, seed: int) -> None:
        if lanes < 1:
            raise ConfigError(f"data.lanes is {lanes}; it must be at least 1")
        self.plan, self.lanes, self._window_blocks, self._seed = plan, lanes, window_blocks, seed
        self._line = lru_cache(maxsize=2)(self._lay_line)
        self._permutation = lru_cache(maxsize=4 * lanes + 16)(self._permute_window)
        self._table = lru_cache(maxsize=_TABLES)(self._new_table)
        self._rounds = max(1, _TABLE_VISITS // lanes)

    def length(self, epoch: int) -> int:
        """Visits of an epoch."""
        return self._line(epoch).length

    def at(self, epoch: int, positions: I64) -> Visits:
        """The visits at some positions of an epoch."""
        line, place = self._line(epoch), self._places(epoch, positions)
        block, begin = line.blocks(place)
        row = line.rows.row(block, place - begin)
        return Visits(row, self.plan.visit(epoch, row, line.rows.copy[block]))

    def block_ranges(self, epoch: int, positions: I64) -> BlockRanges:
        """The rows that are read together with each position, and for how long."""
        line, place = self._line(epoch), self._places(epoch, positions)
        block, begin = line.blocks(place)
        lane = positions % self.lanes
        lane_start, lane_stop = self._lane_bounds(line, lane)
        low = np.maximum(begin, lane_start)
        high = np.minimum(begin + line.rows.samples[block], lane_stop)
        first = line.rows.row(block, low - begin)
        stop = line.rows.row(block, high - 1 - begin) + 1
        first_window = self._first_window(line, lane)
        windows = np.maximum(0, 1 + (high - 1 - lane_start - first_window) // line.window)
        end = np.minimum(first_window + windows * line.window, lane_stop - lane_start)
        return BlockRanges(first, stop, end * self.lanes)

    def _places(self, epoch: int, positions: I64) -> I64:
        """Places on the line of some positions of the epoch."""
        length = self.length(epoch)
        if len(positions) and not (positions.min() >= 0 and positions.max() < length):
            raise ValueError(
                f"positions {positions.min()}..{positions.max()} of an epoch of {length}"
            )
        rounds = positions // self.lanes
        numbers = rounds // self._rounds
        found = np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            table, filled = self._table(epoch, number)
            lane = positions[here] % self.lanes
            self._fill(epoch, number, table, filled, np.unique(lane[~filled[lane]]))
            found[here] = table[rounds[here] - number * self._rounds, lane]
        return found

    def _new_table(self, epoch: int, number: int) -> tuple[I64, npt.NDArray[np.bool_]]:
        """Places of consecutive rounds: int64 [rounds, lanes]; and which lanes are filled in.

        Lanes are filled on first use: a rank uses its own only.
        """
        shape = (self._rounds, self.lanes)
        return np.empty(shape, np.int64), np.zeros(self.lanes, np.bool_)

    def _fill(
        self, epoch: int, number: int, table: I64, filled: npt.NDArray[np.bool_], lanes: I64
    ) -> None:
        """Fill some lanes of a table."""
        line = self._line(epoch)
        start = number * self._rounds
        begins, ends = self._lane_bounds(line, lanes)
        columns = (a.tolist() for a in (lanes, self._first_window(line, lanes), begins, ends))
        for lane, first, begin, end in zip(*columns, strict=True):
            place, stop = start, min(start + self._rounds, end - begin)
            while place < stop:
                window = 0 if place < first else 1 + (place - first) // line.window
                opened = 0 if window == 0 else first + (window - 1) * line.window
                closed = min(first + window * line.window, stop)
                order = self._permutation(epoch, lane, window)[place - opened : closed - opened]
                table[place - start : closed - start, lane] = begin + opened + order
                place = closed
        filled[lanes] = True

    def _lane_bounds(self, line: _EpochLine, lane: I64) -> tuple[I64, I64]:
        """Where on the line lanes begin and end; the longer lanes come first."""
        shortest, longer = divmod(line.length, self.lanes)
        start = lane * shortest + np.minimum(lane, longer)
        return start, start + shortest + (lane < longer)

    def _first_window(self, line: _EpochLine, lane: I64) -> I64:
        """Length of each lane's first window; staggered, so that reads are even over time."""
        return np.maximum(1, line.window - lane * line.window // self.lanes)

    def _permute_window(self, epoch: int, lane: int, window: int) -> I64:
        line, one = self._line(epoch), np.array([lane])
        begin, end = (int(bound[0]) for bound in self._lane_bounds(line, one))
        first = int(self._first_window(line, one)[0])
        start = 0 if window == 0 else first + (window - 1) * line.window
        stop = min(end - begin, first + window * line.window)
        places = np.arange(start, stop, dtype=np.uint64)
        key = keyed_hash(places, self._seed, ORDER_IN_WINDOW, epoch, lane)
        return np.argsort(key, kind="stable")

    def _lay_line(self, epoch: int) -> _EpochLine:
        rows = self.plan.rows(epoch)
        key = keyed_hash(rows.number.astype(np.uint64), self._seed, ORDER_OF_BLOCKS, epoch)
        order = np.argsort(key, kind="stable")
        ends = np.cumsum(rows.samples[order])
        length = int(ends[-1]) if len(ends) else 0
        mean_block = max(1, round(length / max(1, len(order))))
        window = max(1, self._window_blocks * mean_block)
        return _EpochLine(rows, order, ends - rows.samples[order], length, window)
