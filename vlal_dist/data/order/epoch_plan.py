"""Content of an epoch: which samples it holds and how often, from a rate for each sample.

A row with rate w is visited w times per epoch on average: after e epochs

    visits(e) = floor(w e + u),   u in [0, 1) keyed by (seed, uid)

so that epoch e holds visits(e + 1) - visits(e) of them, and the running count of a sample's visits
needs no history: everything is a pure function of (seed, epoch, manifests, rates). With the rate 1
everywhere, epoch e is visit e of every sample.

Rates are multiples of 2^-16. The copies of a row within an epoch lie in different virtual blocks,
(block, copy), which the order of the epoch places far apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from vlal_dist.data.hashing import I64, PHASE, U64, keyed_hash, mix_visits
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.data.order.ledger import Ledger
from vlal_dist.errors import ConfigError

RATE_BITS = 16
ONE = 1 << RATE_BITS
MOST_PASSES = 4096
_PIECE_ROWS = 1 << 20


@dataclass(frozen=True)
class EpochRows:
    """The rows of one epoch, block by block.

    Attributes:
        number: int64 [V], block + copy x number of blocks, which the order hashes.
        copy: int64 [V], which of the epoch's visits of its rows this virtual block holds.
        first: int64 [V], its first row; or, with `listed`, where its rows begin in that list.
        samples: int64 [V].
        listed: int64 [P], rows in the order of the virtual blocks; None: they hold all their rows.
    """

    number: I64
    copy: I64
    first: I64
    samples: I64
    listed: I64 | None

    def row(self, block: I64, place: I64) -> I64:
        """The row at a place of a virtual block."""
        at = self.first[block] + place
        return at if self.listed is None else self.listed[at]


def fixed_rate(passes: float) -> int:
    """Passes per epoch as a multiple of 2^-16.

    Raises:
        ConfigError: not in 2^-16 .. 4096.
    """
    fixed = round(passes * ONE)
    if not 1 <= fixed <= MOST_PASSES * ONE:
        raise ConfigError(
            f"{passes} passes per epoch; allowed are {1 / ONE:.2g} to {MOST_PASSES} (data.mix, "
            "data.repeat_threshold)"
        )
    return fixed


class EpochPlan:
    """The visits of every epoch.

    Args:
        corpus: the training samples.
        seed: the run's seed; it decides in which epochs a fraction of a pass falls.
        passes: passes per epoch over each split of the corpus.
        factor: float64 [N], what each row's rate is multiplied by (0: left out); None: 1.

    Raises:
        ConfigError: a rate out of range, or nothing is left to train on.
    """

    def __init__(
        self,
        corpus: ConcatSplits,
        *,
        seed: int,
        passes: tuple[float, ...] = (1.0,),
        factor: npt.NDArray[np.float64] | None = None,
    ) -> None:
        self.corpus, self._seed = corpus, seed
        self._by_split = np.array([fixed_rate(one) for one in passes], dtype=np.int64)
        self._rate: npt.NDArray[np.uint32] | None = None
        if factor is not None:
            self._rate = self._row_rates(passes, factor)
        elif (self._by_split % ONE).any():
            self._rate = np.repeat(self._by_split, np.diff(corpus.start)).astype(np.uint32)
        if len(corpus) == 0 or (self._rate is not None and not self._rate.any()):
            raise ConfigError(
                "no sample is left to train on; check data.mix, data.subset and the split"
            )
        self.rows = lru_cache(maxsize=2)(self._lay_out)

    def visit(self, epoch: int, rows: I64, copy: I64) -> I64:
        """Running count of each sample's planned visits: int64 [n]."""
        return self._before(epoch, rows) + copy

    def ledger(self, epoch: int, start: int = 0, stop: int | None = None) -> Ledger:
        """The ledger of all planned visits of the epoch to rows start..stop-1."""
        stop = len(self.corpus) if stop is None else stop
        ledgers = (Ledger.of(uid, visit) for uid, visit in self._visits(epoch, start, stop))
        return sum(ledgers, Ledger())

    def find(self, epoch: int, one: Ledger) -> int | None:
        """The uid whose visit in the epoch is the one of a ledger of a single visit."""
        for uid, visit in self._visits(epoch, 0, len(self.corpus)):
            found = uid[mix_visits(uid, visit) == np.uint64(one.sum)]
            if len(found):
                return int(found[0])
        return None

    def _visits(self, epoch: int, start: int, stop: int) -> Iterator[tuple[U64, I64]]:
        """uid and visit number of the planned visits to rows start..stop-1, in pieces."""
        for rows in _pieces(start, stop):
            uid = self.corpus.column("uid", rows)
            begin, end = self._before(epoch, rows), self._before(epoch + 1, rows)
            for copy in range(int((end - begin).max(initial=0))):
                here = end - begin > copy
                yield uid[here], begin[here] + copy

    def _before(self, epoch: int, rows: I64) -> I64:
        """Visits of each row before the epoch."""
        if self._rate is None:
            which, _ = self.corpus.locate(rows)
            return self._by_split[which] // ONE * epoch
        phase = keyed_hash(self.corpus.column("uid", rows), self._seed, PHASE) >> np.uint64(48)
        rate = self._rate[rows].astype(np.int64)
        # A row that is left out must stay so: its phase alone never reaches a whole visit.
        return (rate * epoch + phase.astype(np.int64)) >> RATE_BITS

    def _lay_out(self, epoch: int) -> EpochRows:
        if self._rate is None:
            return self._whole_blocks()
        count = np.empty(len(self.corpus), dtype=np.int64)
        for rows in _pieces(0, len(count)):
            count[rows] = self._before(epoch + 1, rows) - self._before(epoch, rows)
        blocks, copies, sizes, listed = [], [], [], []
        for copy in range(int(count.max(initial=0))):
            rows = np.flatnonzero(count > copy)
            ends = self.corpus.first_row + self.corpus.samples
            samples = np.searchsorted(rows, ends) - np.searchsorted(rows, self.corpus.first_row)
            used = np.flatnonzero(samples)
            blocks.append(used)
            copies.append(np.full(len(used), copy, dtype=np.int64))
            sizes.append(samples[used])
            listed.append(rows)
        if not blocks:  # a few samples at a small fraction of a pass
            none = np.zeros(0, dtype=np.int64)
            return EpochRows(none, none, none, none, none)
        block, copy_of, size = (np.concatenate(one) for one in (blocks, copies, sizes))
        number = block + copy_of * len(self.corpus.first_row)
        return EpochRows(number, copy_of, np.cumsum(size) - size, size, np.concatenate(listed))

    def _whole_blocks(self) -> EpochRows:
        """Every split a whole number of times: no array of the size of the index is made."""
        corpus = self.corpus
        which, _ = corpus.locate(corpus.first_row)
        times = self._by_split[which] // ONE
        copies = [
            np.flatnonzero((times > copy) & (corpus.samples > 0))
            for copy in range(int(times.max()))
        ]
        block = np.concatenate(copies)
        copy_of = np.repeat(np.arange(len(copies)), [len(one) for one in copies])
        number = block + copy_of * len(corpus.first_row)
        return EpochRows(number, copy_of, corpus.first_row[block], corpus.samples[block], None)

    def _row_rates(
        self, passes: tuple[float, ...], factor: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.uint32]:
        by_row = np.repeat(np.array(passes), np.diff(self.corpus.start))
        rate = np.rint(by_row * factor * ONE)
        if len(rate) and float(rate.max()) > MOST_PASSES * ONE:
            fixed_rate(float(rate.max()) / ONE)
        return rate.astype(np.uint32)


def _pieces(start: int, stop: int) -> Iterator[I64]:
    """Rows start..stop-1, at most _PIECE_ROWS at a time."""
    for first in range(start, stop, _PIECE_ROWS):
        yield np.arange(first, min(first + _PIECE_ROWS, stop), dtype=np.int64)
