"""The step `hide`: hide training labels until a dataset is as sparsely annotated as VAW.

An experiment on unannotated labels needs many of them, and their true values. So a training
instance of a densely annotated dataset keeps a few labels; how many and which depends on hashes of
(seed, instance id, attribute name) alone. Validation and test stay whole.

The hidden labels go to a file that only this module names. Nothing that packs, scores, trains or
evaluates may open it (tests remove it and get the same bytes).
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from decimal import Context, Decimal, localcontext
from itertools import chain, compress, pairwise
from operator import not_

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shard_tools.clean.counts import HIDE_QUANTITIES
from shard_tools.clean.files import instances_table, parquet_bytes
from shard_tools.clean.records import Instance
from vlal_dist.data.hashing import (
    HIDE_NEGATIVES,
    HIDE_POSITIVES,
    I64,
    U64,
    keyed_hash,
    text_hash,
    uniform,
)
from vlal_dist.vocabulary import Vocabulary

HIDDEN = "hidden.parquet"
SPLIT = "train"

logger = logging.getLogger(__name__)


KEPT_POSITIVES, KEPT_NEGATIVES = (1, Decimal("0.8")), (0, Decimal("1.2"))
"""`vaw_density`: labels that an instance keeps at least, and mean of the Poisson number of further
ones, at most those that it has. VAW: 3.0 annotations per training instance, 1.8 of them positive.
"""


def hide_labels(
    instances: Sequence[Instance], *, seed: int
) -> tuple[list[Instance], list[Instance]]:
    """Hide labels of training instances, as `clean.hide` vaw_density.

    Args:
        instances: of all splits; lists sorted and disjoint (`resolve_clashes`).
        seed: of the numbers and the choice.

    Returns:
        All instances with the labels that they keep, in the order given; and the training
        instances alone with those that were hidden, as their lists.
    """
    train = [instance for instance in instances if instance.split == SPLIT]
    uid = _hashes([instance.instance_id for instance in train])
    divided = []
    for lists, (least, mean), purpose in (
        ([i.positive for i in train], KEPT_POSITIVES, HIDE_POSITIVES),
        ([i.negative for i in train], KEPT_NEGATIVES, HIDE_NEGATIVES),
    ):
        wanted = least + _poisson(uid, mean, seed=seed, purpose=purpose)
        divided.append(_divide(lists, uid, wanted, seed=seed, purpose=purpose))
    triples = list(zip(train, *divided, strict=True))
    kept = iter([replace(i, positive=p[0], negative=n[0]) for i, p, n in triples])
    hidden = [replace(i, positive=p[1], negative=n[1]) for i, p, n in triples]
    return [next(kept) if i.split == SPLIT else i for i in instances], hidden


def count_hidden(instances: Sequence[Instance], hidden: Sequence[Instance]) -> dict[str, int]:
    """Training labels kept and hidden, of each polarity (`counts.HIDE_QUANTITIES`).

    Args:
        instances: after hiding, of all splits.
        hidden: training instances with their hidden labels.
    """
    train = [instance for instance in instances if instance.split == SPLIT]
    numbers = [
        sum(len(getattr(instance, polarity)) for instance in some)
        for polarity in ("positive", "negative")
        for some in (train, hidden)
    ]
    logger.info(
        "hide: of %d training instances, %d positives kept and %d hidden, %d negatives kept and "
        "%d hidden",
        len(train),
        *numbers,
    )
    return dict(zip(HIDE_QUANTITIES, numbers, strict=True))


def hidden_files(hidden: Sequence[Instance] | None, vocabulary: Vocabulary) -> dict[str, bytes]:
    """The file of hidden labels: instance id and hidden ids, in the order of the training split.

    Args:
        hidden: training instances with their hidden labels; None: the step did not run.
        vocabulary: of the names before hiding.
    """
    if hidden is None:
        return {}
    table: pa.Table = instances_table(hidden, vocabulary).select(
        ["instance_id", "positive", "negative"]
    )
    return {HIDDEN: parquet_bytes(table)}


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


def _divide(
    lists: Sequence[tuple[str, ...]], uid: U64, wanted: I64, *, seed: int, purpose: int
) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The names kept and hidden of each list: the `wanted` ones of lowest hash are kept."""
    names = list(chain.from_iterable(lists))
    lengths = np.array([len(one) for one in lists], np.int64)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    row = np.repeat(np.arange(len(lists)), lengths)
    salt = keyed_hash(uid, seed, purpose)[row]
    order = np.lexsort((keyed_hash(salt + _hashes(names), seed, purpose), row))
    keep = np.empty(len(names), np.bool_)
    keep[order] = np.arange(len(names)) - ends[row] < wanted[row]
    kept = keep.tolist()
    return [
        (tuple(compress(names[a:b], kept[a:b])), tuple(compress(names[a:b], map(not_, kept[a:b]))))
        for a, b in pairwise(ends.tolist())
    ]


def _hashes(texts: Sequence[str]) -> U64:
    known = {text: text_hash(text) for text in dict.fromkeys(texts)}
    return np.fromiter((known[text] for text in texts), np.uint64, len(texts))


def _floor(probability: Decimal) -> int:
    return int(probability * 2**53)
