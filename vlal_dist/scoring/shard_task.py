"""Score one shard (Sec. 2.2): embeddings to similarities over feasible attributes, committed once.

A plain function of (shard, scorer, settings): the same bytes whoever runs it, and whenever. The
file is committed create-only under a name made of both digests; its existence means `done`.

Legend: n samples of the shard, D embedding width, S feasible pairs.
"""

import json
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vlal_dist.data.format.dataset import Split
from vlal_dist.data.format.scores import ShardScores, encode_scores, read_shard_scores, score_key
from vlal_dist.errors import ConflictError
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.scoring.clip import Embedding, Seconds
from vlal_dist.scoring.embed import Embedded, shard_rows
from vlal_dist.scoring.quality import ShardQuality
from vlal_dist.scoring.text_bank import TextBank
from vlal_dist.storage.store import Store


@dataclass(frozen=True)
class ShardResult:
    """What became of one shard.

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
    seconds: Seconds


@dataclass(frozen=True)
class Committed:
    """What stands in the score root now.

    Attributes:
        scores: those computed here.
        created: whether this call committed the file; False if another worker came first.
        identical: whether the file that stands has the bytes computed here.
    """

    scores: ShardScores
    created: bool
    identical: bool


def commit_scores(
    embedded: Embedded,
    split: Split,
    shard: int,
    *,
    store: Store,
    bank: TextBank,
    feasible: FeasibleSets,
    header: dict[str, str],
    seconds: Seconds,
) -> Committed:
    """Similarities of a shard's embeddings, in its score file.

    Args:
        embedded: of the shard's crops.
        split: the opened split.
        shard: position of the shard in it.
        store: score root.
        bank: unit vectors of the feasible pairs, float32 [S, D].
        feasible: the pairs.
        header: the score file's digests and temperature, without `shard_sha256`.
        seconds: added to.

    Raises:
        DataError: the file that another worker committed is damaged.
        StorageError: the score root cannot be used.
    """
    started = time.perf_counter()
    rows, sha256 = shard_rows(split, shard), split.shards[shard].sha256
    object_id = np.asarray(split.index.object_id[rows.start : rows.stop], dtype=np.int64)
    uid = np.asarray(split.index.uid[rows.start : rows.stop], dtype=np.uint64)
    indptr, similarity = feasible_similarities(
        embedded.embedding, object_id, bank=bank, feasible=feasible
    )
    header = {**header, "shard_sha256": sha256}
    if embedded.poison:
        named = {f"{uid[place]:016x}": why for place, why in sorted(embedded.poison.items())}
        header["quarantined"] = json.dumps(named)
    scores = ShardScores(uid, embedded.embedding, indptr, similarity, header)
    key = score_key(split.name, shard_sha256=sha256, scorer_digest=header["scorer_digest"])
    try:
        created, identical = store.create(key, encode_scores(scores)), True
    except ConflictError:
        # Another worker finished this shard first on hardware whose last bits differ. Its file
        # stands; it must only be a whole one for the same digests.
        read_shard_scores(store, split.name, shard_sha256=sha256, manifest=header)
        created, identical = False, False
    seconds.write += time.perf_counter() - started
    return Committed(scores, created, identical)


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
