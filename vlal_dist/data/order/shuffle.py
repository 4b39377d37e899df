"""The order of an epoch (design 4): a pure function of seed, epoch, plan, lanes and window.

    blocks sorted by a keyed hash, laid end to end:      |b7|b2|b9|b0|b4|...|   a line of N visits
    cut into lanes of equal length (longer ones first):  |lane 0|lane 1|lane 2|...|
    permuted inside each lane, window by window:         |..|....|....|  the first window of lane l
                                                         is cut short by l / lanes of a window
    visit i of the epoch:                                the (i div lanes)-th of lane i mod lanes

Ranks, threads and caches appear nowhere above; they only choose which lanes to read. The position
in the stream is (epoch, visits consumed in it), and any position is reached in constant time.
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
_PIECE = 1 << 14
"""Positions whose order is worked out at a time: the cost of a lane is shared by its visits."""
_PIECES = 64
"""Pieces kept: enough for what a rank of many fetches ahead."""


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


@dataclass(frozen=True)
class Places:
    """Some positions of an epoch: what is there.

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
        first, stop: int64 [n], the part of each position: its rows, of the corpus.
        until: int64 [n], position of the epoch from which on the part is not used any more.
    """

    first: I64
    stop: I64
    until: I64


@dataclass(frozen=True)
class _Line:
    """One epoch laid out: virtual blocks in order, and where on the line each begins."""

    epoch: int
    held: EpochRows
    order: I64
    begins: I64
    length: int
    window: int


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
        self._piece = lru_cache(maxsize=_PIECES)(self._open_piece)
        self._rounds = max(1, _PIECE // lanes)

    def length(self, epoch: int) -> int:
        """Visits of an epoch."""
        return self._line(epoch).length

    def at(self, epoch: int, positions: I64) -> Places:
        """What lies at some positions of an epoch."""
        line, place = self._line(epoch), self._line_places(epoch, positions)
        block = self._block_at(line, place)
        row = line.held.row(line.order[block], place - line.begins[block])
        copy = line.held.copy[line.order[block]]
        return Places(row, self.plan.visit(epoch, row, copy))

    def parts(self, epoch: int, positions: I64) -> BlockRanges:
        """Where some positions are read from, and how long that is of use."""
        line, place = self._line(epoch), self._line_places(epoch, positions)
        block = self._block_at(line, place)
        lane_start, lane_stop = self._lane_bounds(line, positions % self.lanes)
        begin = line.begins[block]
        low = np.maximum(begin, lane_start)
        high = np.minimum(begin + line.held.samples[line.order[block]], lane_stop)
        first = line.held.row(line.order[block], low - begin)
        stop = line.held.row(line.order[block], high - 1 - begin) + 1
        lane = positions % self.lanes
        first_window = self._first_window(line, lane)
        last = high - 1 - lane_start
        windows = np.maximum(0, 1 + (last - first_window) // line.window)
        end = np.minimum(first_window + windows * line.window, lane_stop - lane_start)
        return BlockRanges(first, stop, end * self.lanes)

    def _line_places(self, epoch: int, positions: I64) -> I64:
        """Places on the line of some positions of the epoch."""
        length = self.length(epoch)
        if len(positions) and not (positions.min() >= 0 and positions.max() < length):
            raise ValueError(
                f"positions {positions.min()}..{positions.max()} of an epoch of {length}"
            )
        rounds = positions // self.lanes
        piece = rounds // self._rounds
        found = np.empty_like(positions)
        for number in np.unique(piece).tolist():
            here = piece == number
            table, filled = self._piece(epoch, number)
            lane = positions[here] % self.lanes
            self._fill(epoch, number, table, filled, np.unique(lane[~filled[lane]]))
            found[here] = table[rounds[here] - number * self._rounds, lane]
        return found

    def _open_piece(self, epoch: int, number: int) -> tuple[I64, npt.NDArray[np.bool_]]:
        """Line places of consecutive rounds: int64 [rounds, lanes], and which lanes are filled in.

        A rank asks for its own lanes only; the others are never worked out.
        """
        return np.empty((self._rounds, self.lanes), np.int64), np.zeros(self.lanes, np.bool_)

    def _fill(
        self, epoch: int, number: int, table: I64, filled: npt.NDArray[np.bool_], lanes: I64
    ) -> None:
        """Work out some lanes of a piece."""
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

    def _lane_bounds(self, line: _Line, lane: I64) -> tuple[I64, I64]:
        """Where on the line lanes begin and end; the longer lanes come first."""
        shortest, longer = divmod(line.length, self.lanes)
        start = lane * shortest + np.minimum(lane, longer)
        return start, start + shortest + (lane < longer)

    def _first_window(self, line: _Line, lane: I64) -> I64:
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

    def _lay_line(self, epoch: int) -> _Line:
        held = self.plan.rows(epoch)
        key = keyed_hash(held.number.astype(np.uint64), self._seed, ORDER_OF_BLOCKS, epoch)
        order = np.argsort(key, kind="stable")
        ends = np.cumsum(held.samples[order])
        length = int(ends[-1]) if len(ends) else 0
        mean_block = max(1, round(length / max(1, len(order))))
        window = max(1, self._window_blocks * mean_block)
        return _Line(epoch, held, order, ends - held.samples[order], length, window)

    def _block_at(self, line: _Line, place: I64) -> I64:
        return np.searchsorted(line.begins, place, side="right") - 1
