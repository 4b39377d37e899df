"""Log-likelihoods of a batch: from merged tars, from score files, or of the object alone.

Tars and score files give the same float32 values: `merge` and `ScoreLikelihoods` apply Eq. (2) to
the same similarities. `ObjectLikelihoods` replaces them in runs without CLIP. Each is called with
the rows of a batch and the `KEY.likelihood.npy` members of their samples, and returns ragged
values: float32 [V], and indptr int64 [B + 1].
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from vlal_dist.data.format.dataset import Split
from vlal_dist.data.format.scores import MappedScores, open_scores
from vlal_dist.data.hashing import I64
from vlal_dist.data.loading.shard_reader import Data
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.errors import DataError
from vlal_dist.method.feasible import FeasibleSets, decode_npy
from vlal_dist.method.likelihood import Float32, log_likelihood, rescale
from vlal_dist.storage.store import Store

Ragged = tuple[Float32, I64]
"""Values float32 [V], and indptr int64 [B + 1]."""
ReadLikelihoods = Callable[[I64, Sequence[Data]], Ragged]


def tar_likelihoods(rows: I64, members: Sequence[Data]) -> Ragged:
    """The log-likelihoods inside merged tars.

    Raises:
        DataError: a sample has none, or one that cannot be read.
    """
    for row, member in zip(rows.tolist(), members, strict=True):
        if not len(member):
            raise DataError(
                f"the sample in row {row} has no likelihood: run vlal score and vlal merge, "
                "or set method.loss to one that ignores none"
            )
    return join_likelihoods(members)


def join_likelihoods(members: Sequence[Data]) -> Ragged:
    """The arrays in the `KEY.likelihood.npy` of many samples, one after the other.

    Raises:
        DataError: one of them is no float32 vector.
    """
    values = []
    for member in members:
        try:
            values.append(decode_npy(member, "<f4"))
        except DataError as error:
            raise DataError(f"a likelihood cannot be read: {error}; merge again") from None
    return _ragged(values)


def _ragged(values: Sequence[Float32]) -> Ragged:
    indptr = np.concatenate([[0], np.cumsum([len(one) for one in values])]).astype(np.int64)
    return np.concatenate(values) if values else np.zeros(0, np.float32), indptr


def rescaled_tar_likelihoods(*, merged_at: float, temperature: float) -> ReadLikelihoods:
    """The log-likelihoods inside merged tars, rescaled from merge's temperature to another."""
    if merged_at == temperature:
        return tar_likelihoods

    def read(rows: I64, members: Sequence[Data]) -> Ragged:
        values, indptr = tar_likelihoods(rows, members)
        rescaled = rescale(values, indptr, temperature_from=merged_at, temperature_to=temperature)
        return rescaled, indptr

    return read


class ObjectLikelihoods:
    """Log-weights that depend on the object alone: a draw without CLIP (ablation).

    Args:
        corpus: to which the rows belong.
        feasible: Omega_o of every object.
        cooccurrence: log(positive_count + 1) of (object, attribute) instead of 0 for all. With
            the 1, an attribute that was only ever annotated absent can be drawn, as in Eq. (2).
    """

    def __init__(self, corpus: ConcatSplits, feasible: FeasibleSets, *, cooccurrence: bool) -> None:
        self._corpus, self._indptr = corpus, feasible.indptr
        count = feasible.positive_count if cooccurrence else np.zeros(len(feasible.indices))
        self._value = np.log1p(count.astype(np.float64)).astype(np.float32)

    def __call__(self, rows: I64, members: Sequence[Data]) -> Ragged:
        """The log-weights of some rows of the corpus; `members` is ignored."""
        object_id = self._corpus.column("object_id", rows).astype(np.int64)
        length = np.diff(self._indptr)[object_id]
        indptr = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
        shift = np.repeat(self._indptr[object_id] - indptr[:-1], length)
        return self._value[np.arange(indptr[-1]) + shift], indptr


class ScoreLikelihoods:
    """Log-likelihoods of the similarities in score files; may be shared by threads.

    Score files stay mapped once they are opened. No lock is held while one is read.

    Args:
        split: the opened split.
        scores: store of the score root.
        manifest: its checked `scores.json`.
        temperature: tau of Eq. (2).
        cache: local folder for copies of remote score files.
    """

    def __init__(
        self,
        split: Split,
        *,
        scores: Store,
        manifest: Mapping[str, Any],
        temperature: float,
        cache: Path,
    ) -> None:
        if split.name not in manifest["splits"]:
            raise DataError(
                f"{scores.url} scores the splits {', '.join(manifest['splits'])}, not "
                f"{split.name}; run vlal score with scoring.splits including it"
            )
        self._split, self._scores, self._manifest = split, scores, manifest
        self._temperature, self._cache = temperature, cache
        self._lock = threading.Lock()
        self._shards: dict[int, Future[MappedScores]] = {}
        samples = [shard.samples for shard in split.shards]
        self._first_row = np.concatenate([[0], np.cumsum(samples)]).astype(np.int64)

    def __call__(self, rows: I64, members: Sequence[Data]) -> Ragged:
        """The log-likelihoods of some rows of the split; `members` is ignored.

        Raises:
            DataError: a score file is absent, damaged, or of another shard, scorer or dataset.
            StorageError: a score file cannot be read.
        """
        shards = self._split.index.shard[rows]
        places = (rows - self._first_row[shards]).tolist()
        values = [
            self._shard(shard).row(place)
            for shard, place in zip(shards.tolist(), places, strict=True)
        ]
        joined, indptr = _ragged(values)
        return log_likelihood(joined, indptr, temperature=self._temperature), indptr

    def _shard(self, shard: int) -> MappedScores:
        """The scores of a shard, opened by the first thread that needs it; the others wait."""
        with self._lock:
            found = self._shards.get(shard)
            if opens := found is None:
                found = self._shards[shard] = Future()
        if opens:
            try:
                found.set_result(self._open(shard))
            except BaseException as error:
                with self._lock:  # A later batch tries again.
                    del self._shards[shard]
                found.set_exception(error)
        return found.result()

    def _open(self, shard: int) -> MappedScores:
        first, last = self._first_row[shard : shard + 2]
        return open_scores(
            self._scores,
            self._split.name,
            shard_sha256=self._split.shards[shard].sha256,
            uid=self._split.index.uid[first:last],
            manifest=self._manifest,
            cache=self._cache,
        )
