"""Completeness and quality of a shard's scores, measured by workers and summed by the driver.

Complete: a committed file holds exactly its shard's samples, and a similarity for each attribute
that is feasible for them. Quality: similarities should rank what annotators saw above what they did
not see. An AUC near 0.5 means a wrong model, wrong preprocessing or wrong prompts; the AUC of one
attribute type shows prompts that make no sense for it.

Legend: n samples of the shard, S its similarities, K its annotated feasible pairs, A attributes,
T attribute types.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlal_dist.data.format.dataset import Dataset, read_labels
from vlal_dist.data.format.scores import (
    MappedScores,
    ShardScores,
    open_scores,
    quarantined_of,
    score_key,
)
from vlal_dist.errors import DataError
from vlal_dist.method.likelihood import log_likelihood
from vlal_dist.remarks import remark
from vlal_dist.scoring.embed import SplitShard
from vlal_dist.storage.store import Store
from vlal_dist.vocabulary import Vocabulary

BINS = 1 << 16
"""Equal bins of cosine in [-1, 1]; one is 3.1e-5 wide."""

NEAR_CHANCE = 0.55
"""AUC below which a model's likelihoods say little of what annotators saw."""
ENOUGH = 50
"""Annotated pairs of each kind, present and absent, from which on the AUC is judged."""

logger = logging.getLogger(__name__)

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ShardQuality:
    """Quality of one shard's likelihoods; plain numpy and numbers, which travel through Ray.

    Attributes:
        similarity: float32 [K], cosines of the annotated pairs that are feasible.
        positive: bool [K], whether the pair is annotated present (else absent).
        kind: uint8 [K], place of the attribute's type in `type_names(vocabulary)`.
        entropy: sum over crops of the entropy of Eq. (2), nats.
        uniform: sum over crops of log |Omega_o|, the entropy of a uniform likelihood, nats.
        crops: crops with a feasible attribute.
        pairs: S.
    """

    similarity: npt.NDArray[np.float32]
    positive: Bools
    kind: npt.NDArray[np.uint8]
    entropy: float
    uniform: float
    crops: int
    pairs: int


def type_names(vocabulary: Vocabulary) -> tuple[str, ...]:
    """Names of the attribute types, sorted: what `ShardQuality.kind` counts."""
    return tuple(sorted(set(vocabulary.attribute_type)))


def measure_shard(
    dataset: Dataset, shard: SplitShard, scores: ShardScores | MappedScores, *, temperature: float
) -> ShardQuality:
    """The quality of the scores of one shard.

    Args:
        dataset: the opened dataset.
        shard: one of its shards.
        scores: its scores.
        temperature: tau of Eq. (2), for the entropy.

    Raises:
        DataError: rows that do not fit together, a similarity that is not finite, labels that
            differ from their digest, or more than 256 attribute types.
        ConfigError: tau is not positive and finite.
        StorageError: the labels cannot be read.
    """
    indptr, similarity = scores.indptr, scores.similarity
    logs = log_likelihood(similarity, indptr, temperature=temperature).astype(np.float64)
    sizes = np.diff(indptr)
    sizes = sizes[sizes > 0]
    row, attribute, positive = _annotated(dataset, shard)
    # Annotations of other splits than train need not be feasible: the sets come from train.
    place = dataset.feasible.locate(shard.object_id[row], attribute)
    there = place >= 0
    return ShardQuality(
        similarity=similarity[indptr[row[there]] + place[there]],
        positive=positive[there],
        kind=_kinds(dataset.vocabulary)[attribute[there]],
        entropy=-float((np.exp(logs) * logs).sum()),
        uniform=float(np.log(sizes).sum()),
        crops=len(sizes),
        pairs=len(similarity),
    )


def check_shard(
    dataset: Dataset,
    shard: SplitShard,
    *,
    store: Store,
    manifest: Mapping[str, Any],
    temperature: float,
    cache: Path,
) -> tuple[ShardQuality, dict[int, str]]:
    """Read back the committed score file of a shard, check it, and measure it.

    Args:
        dataset: the opened dataset.
        shard: one of its shards.
        store: score root.
        manifest: expected `scorer_digest`, `feasible_digest`, `vocabulary_digest`.
        temperature: tau of Eq. (2), for the entropy.
        cache: local folder for copies of remote score files, which lack the embeddings.

    Returns:
        Its quality, and the quarantined crops: uid -> why.

    Raises:
        DataError: the file is absent, damaged, bound to other digests, or does not hold exactly
            its shard's samples and their feasible attributes; and as `measure_shard`.
        StorageError: it cannot be read or copied.
    """
    scores = open_shard_scores(store, shard, manifest, cache=cache)
    sizes = np.diff(dataset.feasible.indptr)[shard.object_id]
    if not np.array_equal(np.diff(scores.indptr), sizes):
        name, entry = shard.split.name, shard.split.shards[shard.position]
        key = score_key(
            name, shard_sha256=entry.sha256, scorer_digest=str(manifest["scorer_digest"])
        )
        raise DataError(
            f"{store.url}/{key}: the scores of {name}/{entry.name} do not cover exactly the "
            f"feasible attributes of its {entry.samples} samples; delete that file and score again"
        )
    quality = measure_shard(dataset, shard, scores, temperature=temperature)
    return quality, quarantined_of(scores.header)


def open_shard_scores(
    store: Store, shard: SplitShard, manifest: Mapping[str, Any], *, cache: Path
) -> MappedScores:
    """Map the committed score file of a shard; arguments and errors as `check_shard`."""
    return open_scores(
        store,
        shard.split.name,
        shard_sha256=shard.sha256,
        uid=shard.uid,
        manifest=manifest,
        cache=cache,
    )


class QualityTotals:
    """The quality of all shards added so far, in T x 2 histograms (1 MB each type).

    The summary does not depend on the order of the shards, to the last bit. Similarities are
    counted in `BINS` equal bins of [-1, 1]; those in one bin count as equal, so an AUC differs from
    the exact one by at most half the share of (positive, negative) pairs that fall into one bin.

    Args:
        type_names: the vocabulary's attribute types; order and repetition do not matter.

    Attributes:
        pairs: similarities of all shards.
    """

    def __init__(self, type_names: Sequence[str]) -> None:
        self._types = tuple(sorted(set(type_names)))
        self._counts: Ints = np.zeros((len(self._types), 2, BINS), dtype=np.int64)
        # Exact sums (of bounded size): shards come in any order, and sums of floats depend on it.
        self._entropy = self._uniform = Fraction(0)
        self._crops = 0
        self.pairs = 0

    def add(self, shard: ShardQuality) -> None:
        """Count one shard; the caller adds none twice."""
        # float64: float32 would round cosines near a bin's edge into the next bin.
        scaled = (shard.similarity.astype(np.float64) + 1) * (BINS / 2)
        place = np.clip(scaled, 0, BINS - 1).astype(np.int64)  # rounding may leave [-1, 1]
        place += BINS * (2 * shard.kind.astype(np.int64) + shard.positive)
        np.add.at(self._counts.reshape(-1), place, 1)
        self._entropy += Fraction(shard.entropy)
        self._uniform += Fraction(shard.uniform)
        self._crops += shard.crops
        self.pairs += shard.pairs

    def summary(self) -> dict[str, object]:
        """All as plain values, for JSON.

        Returns:
            `auc` (None without both kinds), `positives`, `negatives` over all types;
            `entropy_nats`, `uniform_entropy_nats`, means over the crops with a feasible attribute
            (None without one); `auc_by_type`, type name -> the first three.
        """
        crops = self._crops
        return {
            **_ranking(self._counts.sum(axis=0)),
            "entropy_nats": float(self._entropy / crops) if crops else None,
            "uniform_entropy_nats": float(self._uniform / crops) if crops else None,
            "auc_by_type": {
                name: _ranking(counts)
                for name, counts in zip(self._types, self._counts, strict=True)
            },
        }


def auc(positive: Ints, negative: Ints) -> float | None:
    """Chance that a positive lies in a higher bin than a negative, equal bins half.

    Args:
        positive, negative: int64, same shape [bins]; how many lie in each bin, ascending.

    Returns:
        Between 0 and 1; None if either has none.
    """
    ups, downs = positive.astype(np.float64), negative.astype(np.float64)
    if not ups.any() or not downs.any():
        return None
    below = np.cumsum(downs) - downs
    return float((ups * (below + downs / 2)).sum() / (ups.sum() * downs.sum()))


def auc_interval(value: float, positives: int, negatives: int) -> tuple[float, float]:
    """95 % interval of an AUC of independent pairs (Hanley and McNeil 1982), within [0, 1].

    Pairs of one photo are not independent, so the true interval is somewhat wider.
    """
    first, second = value / (2 - value), 2 * value**2 / (1 + value)
    variance = value * (1 - value)
    variance += (positives - 1) * (first - value**2) + (negatives - 1) * (second - value**2)
    reach = 1.96 * math.sqrt(max(variance, 0) / (positives * negatives))
    return max(value - reach, 0.0), min(value + reach, 1.0)


def warn_near_chance(summary: Mapping[str, Any]) -> None:
    """Remark on likelihoods that rank the annotated pairs hardly better than chance.

    Args:
        summary: of `QualityTotals`; with fewer than `ENOUGH` pairs of a kind nothing is said.
    """
    value, positives, negatives = (summary[name] for name in ("auc", "positives", "negatives"))
    if min(positives, negatives) < ENOUGH or value >= NEAR_CHANCE:
        return
    low, high = auc_interval(value, positives, negatives)
    remark(
        logger,
        "scoring.model",
        "CLIP ranks what annotators saw hardly above what they did not see: AUC %.3f (95 %% "
        "interval %.3f to %.3f, chance 0.5) over %d positive and %d negative labels; try other "
        "scoring.weights or scoring.templates, or train without CLIP: --method.draw_weights "
        "cooccurrence --data.likelihood scores, which needs neither score nor merge",
        value,
        low,
        high,
        positives,
        negatives,
    )


def _ranking(counts: Ints) -> dict[str, float | int | None]:
    """The AUC of one histogram [2, BINS] of negatives and positives, and their numbers."""
    negative, positive = counts
    return {
        "auc": auc(positive, negative),
        "positives": int(positive.sum()),
        "negatives": int(negative.sum()),
    }


def _kinds(vocabulary: Vocabulary) -> npt.NDArray[np.uint8]:
    """uint8 [A]: place of each attribute's type in `type_names`."""
    places = {name: place for place, name in enumerate(type_names(vocabulary))}
    if len(places) > 256:
        raise DataError(
            f"vocabulary: {len(places)} attribute types, at most 256 are supported; give the "
            "attributes coarser types and run vlal clean again"
        )
    return np.array([places[name] for name in vocabulary.attribute_type], dtype=np.uint8)


def _annotated(dataset: Dataset, shard: SplitShard) -> tuple[Ints, Ints, Bools]:
    """Row within the shard, attribute, and whether it is present, of every annotated pair."""
    rows, columns = shard.rows, ("positive", "negative")
    table = read_labels(dataset, shard.split.name, columns=columns, rows=rows)
    lists = [table.column(name).combine_chunks() for name in columns]
    lengths = np.stack([one.value_lengths().to_numpy() for one in lists])
    row = np.concatenate([np.repeat(np.arange(len(rows)), sizes) for sizes in lengths])
    attribute = np.concatenate([one.flatten().to_numpy() for one in lists]).astype(np.int64)
    positive = np.repeat(np.array([True, False]), lengths.sum(axis=1))
    return row, attribute, positive
