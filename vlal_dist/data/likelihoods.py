"""Where log-likelihoods come from: the merged tars, or straight from score files.

Both give the same float32 values: `merge` and `ScoreLikelihoods` apply the same Eq. (2) to the
same similarities. Each is called with the rows of a batch and the `likelihood.npy` parts of their
samples, and gives ragged values: float32 [S], and indptr int64 [B + 1].
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlal_dist.data.dataset import Split
from vlal_dist.data.keyed import I64
from vlal_dist.data.labels import Data, Ragged, join_likelihoods
from vlal_dist.data.scores import read_shard_scores
from vlal_dist.errors import DataError
from vlal_dist.method.likelihood import log_likelihood, rescale
from vlal_dist.storage.store import Store

ReadLikelihoods = Callable[[I64, Sequence[Data]], Ragged]


def tar_likelihoods(rows: I64, parts: Sequence[Data]) -> Ragged:
    """The log-likelihoods inside merged tars.

    Raises:
        DataError: a sample has none, or one that cannot be read.
    """
    for row, part in zip(rows.tolist(), parts, strict=True):
        if not len(part):
            raise DataError(
                f"the sample in row {row} has no likelihood: run score_clip and shard_tools merge, "
                "or set method.loss to one that ignores none"
            )
    return join_likelihoods(parts)


def rescaled_tar_likelihoods(*, merged_at: float, temperature: float) -> ReadLikelihoods:
    """The log-likelihoods inside merged tars, at another temperature than merge's."""
    if merged_at == temperature:
        return tar_likelihoods

    def read(rows: I64, parts: Sequence[Data]) -> Ragged:
        values, indptr = tar_likelihoods(rows, parts)
        return (
            rescale(values, indptr, temperature_from=merged_at, temperature_to=temperature),
            indptr,
        )

    return read


class ScoreLikelihoods:
    """Log-likelihoods read from the score root, shard by shard; safe to call from many threads.

    Args:
        split: the opened split.
        scores: store of the score root.
        manifest: its checked `scores.json`.
        temperature: tau of Eq. (2).
        cache_shards: score files kept in memory.
    """

    def __init__(
        self,
        split: Split,
        *,
        scores: Store,
        manifest: Mapping[str, Any],
        temperature: float,
        cache_shards: int = 256,
    ) -> None:
        if split.name not in manifest["splits"]:
            raise DataError(
                f"{scores.url} scores the splits {', '.join(manifest['splits'])}, not "
                f"{split.name}; run score_clip with scoring.splits including it"
            )
        self._split, self._scores, self._manifest = split, scores, manifest
        self._temperature, self._cache_shards = temperature, cache_shards
        self._lock = threading.Lock()
        self._shards: OrderedDict[int, tuple[I64, Any]] = OrderedDict()
        self._first_row = np.concatenate(
            [[0], np.cumsum([shard.samples for shard in split.shards])]
        ).astype(np.int64)

    def __call__(self, rows: I64, parts: Sequence[Data]) -> Ragged:
        """The log-likelihoods of some rows of the split; `parts` is not looked at.

        Raises:
            DataError: a score file is absent, damaged, or of another shard, scorer or dataset.
        """
        values = []
        for row, shard in zip(rows.tolist(), self._split.index.shard[rows].tolist(), strict=True):
            indptr, held = self._shard(shard)
            place = row - int(self._first_row[shard])
            values.append(held[indptr[place] : indptr[place + 1]])
        ends = np.cumsum([len(one) for one in values])
        joined = np.concatenate(values) if values else np.zeros(0, np.float32)
        return joined, np.concatenate([[0], ends]).astype(np.int64)

    def _shard(self, shard: int) -> tuple[I64, Any]:
        with self._lock:
            found = self._shards.get(shard)
            if found is not None:
                self._shards.move_to_end(shard)
                return found
            first, last = self._first_row[shard : shard + 2]
            stated = self._split.shards[shard]
            scores = read_shard_scores(
                self._scores,
                self._split.name,
                shard_sha256=stated.sha256,
                manifest=self._manifest,
            )
            if not np.array_equal(scores.uid, self._split.index.uid[first:last]):
                raise DataError(
                    f"scores of shard {stated.name} hold other samples than the shard; delete "
                    "that score file and score again"
                )
            ragged = log_likelihood(scores.similarity, scores.indptr, temperature=self._temperature)
            self._shards[shard] = (scores.indptr, ragged)
            while len(self._shards) > self._cache_shards:
                self._shards.popitem(last=False)
            return self._shards[shard]
