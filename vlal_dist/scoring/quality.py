"""Are the scores whole, and are they any good? One pass over the score files of a split.

Whole: every shard has a file whose uids are the shard's, so every sample is covered exactly once.
Good: similarities should rank what annotators saw above what they did not see. An AUC near 0.5
means a wrong model, wrong preprocessing or wrong prompts, and shows at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vlal_dist.data.dataset import Dataset, open_split, read_labels
from vlal_dist.data.scores import read_shard_scores
from vlal_dist.errors import DataError
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.method.likelihood import log_likelihood
from vlal_dist.scoring.score_shard import shard_rows
from vlal_dist.storage.store import Store

Floats = npt.NDArray[np.float32]


@dataclass
class Quality:
    """Pooled over what was added.

    Attributes:
        positive, negative: similarities of annotated pairs that are feasible.
        entropy: sum over crops of the entropy of Eq. (2), nats.
        uniform: sum over crops of log |Omega_o|, the entropy of knowing nothing, nats.
        crops: crops with a feasible attribute.
        pairs: similarities.
    """

    positive: list[Floats] = field(default_factory=list)
    negative: list[Floats] = field(default_factory=list)
    entropy: float = 0.0
    uniform: float = 0.0
    crops: int = 0
    pairs: int = 0

    def summary(self) -> dict[str, object]:
        """`auc` (None without both kinds), `entropy_nats`, `uniform_entropy_nats`."""
        positive, negative = _joined(self.positive), _joined(self.negative)
        return {
            "auc": auc(positive, negative),
            "positives": len(positive),
            "negatives": len(negative),
            "entropy_nats": self.entropy / self.crops if self.crops else None,
            "uniform_entropy_nats": self.uniform / self.crops if self.crops else None,
        }


def auc(positive: Floats, negative: Floats) -> float | None:
    """Chance that a positive scores above a negative, ties half; None if either is empty."""
    if not len(positive) or not len(negative):
        return None
    values, rank = np.unique(np.concatenate([positive, negative]), return_inverse=True)
    ups = np.bincount(rank[: len(positive)], minlength=len(values)).astype(np.float64)
    downs = np.bincount(rank[len(positive) :], minlength=len(values)).astype(np.float64)
    below = np.cumsum(downs) - downs
    return float((ups * (below + downs / 2)).sum() / (len(positive) * len(negative)))


def check_split(
    dataset: Dataset,
    split_name: str,
    *,
    store: Store,
    header: Mapping[str, Any],
    temperature: float,
    quality: Quality,
) -> int:
    """Read back every score file of a split, check it, and add to `quality`.

    Args:
        dataset: the opened dataset.
        split_name: which split.
        store: score root.
        header: expected `scorer_digest`, `feasible_digest`, `vocabulary_digest`.
        temperature: tau of Eq. (2), for the entropy.
        quality: added to.

    Returns:
        Samples covered, which is the number of samples of the split.

    Raises:
        DataError: a file is absent, damaged, or does not hold exactly its shard's samples.
    """
    split, labels = open_split(dataset, split_name), read_labels(dataset, split_name)
    covered = 0
    for shard, entry in enumerate(split.shards):
        rows = shard_rows(split, shard)
        scores = read_shard_scores(store, split_name, shard_sha256=entry.sha256, manifest=header)
        object_id = np.asarray(split.index.object_id[rows.start : rows.stop], dtype=np.int64)
        sizes = np.diff(dataset.feasible.indptr)[object_id]
        if not (
            np.array_equal(scores.uid, split.index.uid[rows.start : rows.stop])
            and np.array_equal(np.diff(scores.indptr), sizes)
        ):
            raise DataError(
                f"{store.url}: the scores of {split_name}/{entry.name} do not cover exactly its "
                f"{entry.samples} samples; delete that file and score again"
            )
        covered += len(scores.uid)
        _add_entropy(quality, scores.similarity, scores.indptr, temperature=temperature)
        part = labels.slice(rows.start, len(rows))
        for column, into in (("positive", quality.positive), ("negative", quality.negative)):
            lists = part.column(column).combine_chunks()
            where = _positions(
                dataset.feasible,
                scores.indptr,
                object_id,
                row=np.repeat(np.arange(len(rows)), lists.value_lengths().to_numpy()),
                attribute=lists.flatten().to_numpy(),
                num_attributes=len(dataset.vocabulary.attributes),
            )
            into.append(scores.similarity[where])
    return covered


def _add_entropy(
    quality: Quality, similarity: Floats, indptr: npt.NDArray[np.int64], *, temperature: float
) -> None:
    logs = log_likelihood(similarity, indptr, temperature=temperature).astype(np.float64)
    sizes = np.diff(indptr)
    quality.entropy -= float((np.exp(logs) * logs).sum())
    quality.uniform += float(np.log(sizes[sizes > 0]).sum())
    quality.crops += int((sizes > 0).sum())
    quality.pairs += len(similarity)


def _positions(
    feasible: FeasibleSets,
    indptr: npt.NDArray[np.int64],
    object_id: npt.NDArray[np.int64],
    *,
    row: npt.NDArray[np.int64],
    attribute: npt.NDArray[np.integer[Any]],
    num_attributes: int,
) -> npt.NDArray[np.int64]:
    """Where the similarities of annotated (row, attribute) pairs lie; infeasible ones are left out.

    (Validation and test annotations need not be feasible: the sets come from train.)
    """
    objects = np.repeat(np.arange(feasible.num_objects), np.diff(feasible.indptr))
    pair = objects * num_attributes + feasible.indices  # ascending, by construction of the sets
    wanted = object_id[row] * num_attributes + attribute.astype(np.int64)
    found = np.searchsorted(pair, wanted)
    there = found < len(pair)
    there[there] = pair[found[there]] == wanted[there]
    row, found = row[there], found[there]
    where: npt.NDArray[np.int64] = indptr[row] + found - feasible.indptr[object_id[row]]
    return where


def _joined(parts: list[Floats]) -> Floats:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
