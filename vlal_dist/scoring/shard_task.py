"""Score one shard (Sec. 2.2): embeddings to similarities over feasible attributes, committed once.

A function of (shard, scorer, settings) alone: the same bytes on every worker and in every run. The
file is committed create-only under a name made of both digests; its existence means `done`.

Legend: n samples of the shard, D embedding width, S feasible pairs.
"""

import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vlal_dist.data.format.scores import ShardScores, encode_scores, read_shard_scores, score_key
from vlal_dist.errors import ConflictError
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.scoring.clip import Embedding, PhaseSeconds
from vlal_dist.scoring.embed import Embedded, SplitShard
from vlal_dist.scoring.quality import ShardQuality
from vlal_dist.scoring.text_bank import TextBank
from vlal_dist.storage.store import Store


@dataclass(frozen=True)
class ShardResult:
    """What a worker answers about one shard.

    Attributes:
        split: split name.
        shard: position in the split.
        samples: samples of the shard.
        images: crops encoded by this call.
        created: whether this call committed the file; False if it was there already.
        identical: whether the file that stands has the bytes computed here (True when nothing was
            computed).
        quality: of the likelihoods.
        quarantined: uid -> why its crop could not be used.
        seconds: where the time went.
    """

    split: str
    shard: int
    samples: int
    images: int
    created: bool
    identical: bool
    quality: ShardQuality
    quarantined: dict[int, str]
    seconds: PhaseSeconds


def shard_scores(
    embedded: Embedded,
    shard: SplitShard,
    *,
    bank: TextBank,
    feasible: FeasibleSets,
    header: dict[str, str],
) -> ShardScores:
    """Similarities of a shard's embeddings, with the header of their file.

    Args:
        embedded: embeddings of the shard's crops, and which of them are unusable.
        shard: whose crops.
        bank: unit vectors of the feasible pairs, float32 [S, D].
        feasible: the pairs.
        header: the scorer's digests and temperature.
    """
    embedding, unusable = embedded
    uid = shard.uid
    indptr, similarity = feasible_similarities(
        embedding, shard.object_id, bank=bank, feasible=feasible
    )
    header = {**header, "shard_sha256": shard.sha256}
    if unusable:
        named = {f"{uid[place]:016x}": why for place, why in sorted(unusable.items())}
        header["quarantined"] = json.dumps(named)
    return ShardScores(uid, embedding, indptr, similarity, header)


def commit_scores(store: Store, split: str, scores: ShardScores) -> tuple[bool, bool]:
    """Commit the score file of a shard, unless one is there.

    Returns:
        Whether this call created it, and whether the one that stands has the same bytes.

    Raises:
        DataError: the file that another worker committed is damaged.
        StorageError: the score root cannot be used.
    """
    sha256, scorer = scores.header["shard_sha256"], scores.header["scorer_digest"]
    key = score_key(split, shard_sha256=sha256, scorer_digest=scorer)
    try:
        return store.create(key, encode_scores(scores)), True
    except ConflictError:
        # Another worker finished this shard first on hardware whose last bits differ. Its file
        # stands; it must only be a whole one for the same digests.
        read_shard_scores(store, split, shard_sha256=sha256, manifest=scores.header)
        return False, False


def feasible_similarities(
    embedding: Embedding,
    object_id: npt.NDArray[np.int64],
    *,
    bank: TextBank,
    feasible: FeasibleSets,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Cosines of each crop with the prompts of its object's feasible attributes; float32.

    Args:
        embedding: float32 [n, D], unit length.
        object_id: int64 [n].
        bank: float32 [S, D], unit length.
        feasible: Omega_o of every object, S pairs.

    Returns:
        indptr int64 [n + 1] and similarity float32, attributes ascending within a row.
    """
    sizes = np.diff(feasible.indptr)[object_id]
    indptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    similarity = np.empty(int(indptr[-1]), dtype=np.float32)
    images, texts = torch.from_numpy(embedding), torch.from_numpy(bank)
    order = np.argsort(object_id, kind="stable")
    starts = np.flatnonzero(np.diff(object_id[order], prepend=-1))
    for members in np.split(order, starts[1:]):
        # One product per object: its crops against its own prompts, no others.
        first, last = feasible.indptr[object_id[members[0]] + np.arange(2)].tolist()
        cosines = (images[torch.from_numpy(members)] @ texts[first:last].T).numpy()
        similarity[indptr[members][:, None] + np.arange(last - first)] = cosines
    return indptr, similarity
