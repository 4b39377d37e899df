"""Where a sample's log-likelihood comes from: the merged tar, or straight from score files.

Both give the same float32 values: `merge` and `ScoreLikelihoods` apply the same Eq. (2) to the
same similarities.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vlal_dist.data.dataset import Split
from vlal_dist.data.rows import Sample
from vlal_dist.data.scores import read_shard_scores
from vlal_dist.errors import DataError
from vlal_dist.method.likelihood import log_likelihood
from vlal_dist.storage.store import Store

Ragged = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]


def likelihood_of_tar(sample: Sample) -> npt.NDArray[np.float32] | None:
    """The log-likelihood inside a merged tar; None before merge."""
    return sample.log_likelihood


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
        self._shards: OrderedDict[int, Ragged] = OrderedDict()
        self._first_row = np.concatenate(
            [[0], np.cumsum([shard.samples for shard in split.shards])]
        ).astype(np.int64)

    def __call__(self, sample: Sample) -> npt.NDArray[np.float32]:
        """The log-likelihood of a sample, float32 over its object's feasible attributes."""
        shard = int(self._split.index.shard[sample.row])
        indptr, values = self._shard(shard)
        place = sample.row - int(self._first_row[shard])
        return values[indptr[place] : indptr[place + 1]]

    def _shard(self, shard: int) -> Ragged:
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
