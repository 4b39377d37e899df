"""The step `hide`: hide training labels until a dataset is as sparsely annotated as VAW.

An experiment on unannotated labels needs many of them, and their true values. So a training
instance of a densely annotated dataset keeps a few labels; how many and which depends on hashes of
(seed, instance id, attribute name) alone. Validation and test stay whole.

The hidden labels go to a file that only this module names. Nothing that packs, scores, trains or
evaluates may open it (tests remove it and get the same bytes).
"""

import logging
from collections.abc import Mapping, Sequence
from decimal import Context, Decimal, localcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shard_tools.clean.columns import INSTANCE_SCHEMA, SPLITS, Lists, Mask, TableFile
from shard_tools.clean.counts import HIDE_QUANTITIES, POLARITIES, Tally
from vlal_dist.data.hashing import (
    HIDE_NEGATIVES,
    HIDE_POSITIVES,
    I64,
    U64,
    keyed_hash,
    text_hash,
    uniform,
)

HIDDEN = "hidden.parquet"
SPLIT = "train"

logger = logging.getLogger(__name__)


KEPT_POSITIVES, KEPT_NEGATIVES = (1, Decimal("0.8")), (0, Decimal("1.2"))
"""`vaw_density`: labels that an instance keeps at least, and mean of the Poisson number of further
ones, at most those that it has. VAW: 3.0 annotations per training instance, 1.8 of them positive.
"""


class Hiding:
    """Hides labels of training instances, as `clean.hide` vaw_density.

    Args:
        attributes: names, by id.
        seed: of the numbers and the choice.
    """

    def __init__(self, attributes: Sequence[str], *, seed: int) -> None:
        self._names, self._seed = _hashes(attributes), seed
        self._hidden = dict.fromkeys(POLARITIES, 0)
        self._file: TableFile | None = None

    def open(self, folder: Path) -> TableFile:
        """The file of hidden labels: instance id and hidden ids, in the order of the training
        split; `hide` fills it.
        """
        fields = [INSTANCE_SCHEMA.field(name) for name in ("instance_id", *POLARITIES)]
        self._file = TableFile(folder / HIDDEN, pa.schema(fields))
        return self._file

    def hide(
        self, instance_id: pa.Array, group: I64, lists: Mapping[str, Lists]
    ) -> dict[str, Lists]:
        """What some instances keep.

        Args:
            instance_id: text [n].
            group: [n], splits.
            lists: sorted and disjoint.
        """
        train = np.flatnonzero(group == SPLITS.index(SPLIT))
        place = np.full(len(group), -1)
        place[train] = np.arange(len(train))
        ids = instance_id.take(pa.array(train))
        uid = _hashes(ids.to_pylist())
        kept, columns = {}, [ids]
        for (polarity, found), (least, mean), purpose in zip(
            lists.items(), (KEPT_POSITIVES, KEPT_NEGATIVES), (HIDE_POSITIVES, HIDE_NEGATIVES),
            strict=True,
        ):  # fmt: skip
            wanted = least + _poisson(uid, mean, seed=self._seed, purpose=purpose)
            ours = place[found.row] >= 0
            some = Lists(place[found.row[ours]], found.number[ours])
            keep = self._kept(some, uid, wanted, purpose)
            hidden = some.where(~keep)
            self._hidden[polarity] += len(hidden.number)
            columns.append(hidden.to_arrow(len(train)))
            stays = np.ones(len(found.row), np.bool_)
            stays[ours] = keep
            kept[polarity] = found.where(stays)
        if self._file is not None and len(train):
            self._file.append(pa.RecordBatch.from_arrays(columns, schema=self._file.schema))
        return kept

    def _kept(self, lists: Lists, uid: U64, wanted: I64, purpose: int) -> Mask:
        """Which labels are kept: of each list the `wanted` ones of lowest hash."""
        salt = keyed_hash(uid, self._seed, purpose)[lists.row]
        hashes = keyed_hash(salt + self._names[lists.number], self._seed, purpose)
        first = np.searchsorted(lists.row, lists.row)
        keep = np.empty(len(lists.row), np.bool_)
        order = np.lexsort((hashes, lists.row))
        keep[order] = np.arange(len(order)) - first < wanted[lists.row]
        return keep

    def count(self, tally: Tally) -> dict[str, int]:
        """Training labels kept and hidden, of each polarity (`counts.HIDE_QUANTITIES`).

        Args:
            tally: after hiding.
        """
        place = SPLITS.index(SPLIT)
        kept = tally.attributes([place])
        numbers = [
            number
            for polarity in POLARITIES
            for number in (int(kept[polarity].sum()), self._hidden[polarity])
        ]
        logger.info(
            "hide: of %d training instances, %d positives kept and %d hidden, %d negatives kept "
            "and %d hidden",
            tally.instances[place].sum(),
            *numbers,
        )
        return dict(zip(HIDE_QUANTITIES, numbers, strict=True))


def poisson_limits(mean: Decimal) -> npt.NDArray[np.float64]:
    """P(n <= 0), P(n <= 1), ... of a Poisson number, rounded down to multiples of 2^-53.

    `searchsorted(limits, u, side="right")` of a uniform u in [0, 1) of 53 bits has the law (inverse
    transform). Decimal's exp is correctly rounded, as no libm's is: the same bits everywhere.

    Args:
        mean: above 0.

    Returns:
        float64 [K], ascending, the last one 1 - 2^-53: larger numbers are rarer than that.
    """
    with localcontext(Context(prec=60)):
        term = (-mean).exp()
        total, limits = term, [_floor(term)]
        while limits[-1] < 2**53 - 1:
            term = term * mean / len(limits)
            total += term
            limits.append(_floor(total))
    return np.array(limits, np.float64) * 2.0**-53


def _poisson(uid: U64, mean: Decimal, *, seed: int, purpose: int) -> I64:
    """A Poisson number for each instance."""
    draw = uniform(uid, np.zeros(len(uid), np.int64), seed=seed, purpose=purpose)
    return np.searchsorted(poisson_limits(mean), draw, side="right")


def _hashes(texts: Sequence[str]) -> U64:
    known = {text: text_hash(text) for text in dict.fromkeys(texts)}
    return np.fromiter((known[text] for text in texts), np.uint64, len(texts))


def _floor(probability: Decimal) -> int:
    return int(probability * 2**53)
