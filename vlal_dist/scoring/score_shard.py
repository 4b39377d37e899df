"""Score one shard (Sec. 2.2): crops to embeddings to similarities over feasible attributes.

A plain function of (shard, scorer, settings): the same bytes whoever runs it, and whenever.
Decoding runs ahead in a few threads; encoder batches have one fixed shape and never cross shards.
The file is committed create-only under a name made of both digests; its existence means `done`.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from vlal_dist.data.dataset import Split
from vlal_dist.data.images import decode_rgb
from vlal_dist.data.rows import RowReader
from vlal_dist.data.scores import ShardScores, encode_scores, read_shard_scores, score_key
from vlal_dist.errors import ConflictError, DataError, Stopped
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.scoring.clip import ClipEncoder, Embedding
from vlal_dist.scoring.text_bank import TextBank
from vlal_dist.storage.store import Store

BATCHES_AHEAD = 2
"""Encoder batches of decoded crops that wait at most; bounds memory."""


@dataclass(frozen=True)
class ShardResult:
    """What became of one shard.

    Attributes:
        split: split name.
        shard: position in the split.
        samples: samples of the shard.
        pairs: similarities computed; 0 when nothing was.
        created: whether this call committed the file; False if it was there already.
        identical: whether the file that stands has the bytes computed here (True when nothing was
            computed).
    """

    split: str
    shard: int
    samples: int
    pairs: int
    created: bool
    identical: bool = True


def score_shard(
    split: Split,
    shard: int,
    *,
    store: Store,
    encoder: ClipEncoder,
    bank: TextBank,
    feasible: FeasibleSets,
    header: dict[str, str],
    decode_threads: int,
    stopped: Callable[[], bool] = lambda: False,
) -> ShardResult:
    """Score one shard and commit its score file, unless it is there.

    Args:
        split: the opened split.
        shard: position of the shard in it.
        store: score root.
        encoder: the model; its `batch_size` and `precision` are part of the settings.
        bank: unit vectors of the feasible pairs, float32 [S, D].
        feasible: the pairs.
        header: the score file's digests and temperature, without `shard_sha256`.
        decode_threads: threads that read, decode and preprocess.
        stopped: asked between batches.

    Raises:
        DataError: an altered shard, or a crop that cannot be decoded; names shard and sample.
        StorageError: dataset or score root cannot be used.
        Stopped: `stopped()` became true; nothing is committed.
    """
    sha256, samples = split.shards[shard].sha256, split.shards[shard].samples
    key = score_key(split.name, shard_sha256=sha256, scorer_digest=header["scorer_digest"])
    if store.exists(key):
        return ShardResult(split.name, shard, samples, pairs=0, created=False)
    rows = shard_rows(split, shard)
    embedding = _embed(split, rows, encoder=encoder, threads=decode_threads, stopped=stopped)
    object_id = np.asarray(split.index.object_id[rows.start : rows.stop], dtype=np.int64)
    indptr, similarity = feasible_similarities(embedding, object_id, bank=bank, feasible=feasible)
    scores = ShardScores(
        uid=np.asarray(split.index.uid[rows.start : rows.stop], dtype=np.uint64),
        embedding=embedding,
        indptr=indptr,
        similarity=similarity,
        header={**header, "shard_sha256": sha256},
    )
    try:
        created, identical = store.create(key, encode_scores(scores)), True
    except ConflictError:
        # Another worker finished this shard first on hardware whose last bits differ. Its file
        # stands; it must only be a whole one for the same digests.
        read_shard_scores(store, split.name, shard_sha256=sha256, manifest=header)
        created, identical = False, False
    return ShardResult(split.name, shard, samples, len(similarity), created, identical)


def shard_rows(split: Split, shard: int) -> range:
    """Rows of the split's index that lie in a shard (they are adjacent)."""
    first, last = np.searchsorted(split.index.shard, [shard, shard + 1], side="left").tolist()
    return range(first, last)


def box_crop(pixels: npt.NDArray[np.uint8], box: tuple[float, ...]) -> Image.Image:
    """The raw box as the authors' notebook cuts it: x, y, w, h each truncated; no expansion.

    Raises:
        DataError: nothing is left of the box.
    """
    left, top, width, height = (int(value) for value in box)
    cut = pixels[max(top, 0) : top + height, max(left, 0) : left + width]
    if width < 1 or height < 1 or 0 in cut.shape:
        raise DataError(f"box_in_crop {list(box)} leaves nothing of {pixels.shape[1::-1]} pixels")
    return Image.fromarray(cut)


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


def _embed(
    split: Split,
    rows: range,
    *,
    encoder: ClipEncoder,
    threads: int,
    stopped: Callable[[], bool],
) -> Embedding:
    reader = RowReader(split)
    batches: list[Embedding] = []
    waiting: list[torch.Tensor] = []
    for pixels in _decoded(reader, rows, encoder=encoder, threads=threads):
        waiting.append(pixels)
        if len(waiting) == encoder.batch_size:
            if stopped():
                raise Stopped("stopped; the same command goes on with the shards left")
            batches.append(encoder.encode_prepared(waiting))
            waiting = []
    if waiting:
        batches.append(encoder.encode_prepared(waiting))
    return np.concatenate(batches)


def _decoded(
    reader: RowReader, rows: range, *, encoder: ClipEncoder, threads: int
) -> Iterator[torch.Tensor]:
    """Preprocessed crops in row order, decoded ahead in threads."""
    ahead = BATCHES_AHEAD * encoder.batch_size
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        queue: deque[Future[torch.Tensor]] = deque()
        try:
            for row in rows:
                queue.append(pool.submit(_prepare, reader, row, encoder))
                if len(queue) > ahead:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:
            for future in queue:
                future.cancel()


def _prepare(reader: RowReader, row: int, encoder: ClipEncoder) -> torch.Tensor:
    sample = reader.read(row)
    try:
        return encoder.prepare(box_crop(decode_rgb(sample.jpg), sample.box_in_crop))
    except (DataError, OSError, ValueError) as error:
        split = reader.split
        shard = split.shards[int(split.index.shard[row])].name
        raise DataError(
            f"{split.store.url}/{split.name}/shards/{shard}: sample {sample.key}: {error}; the "
            "shard is whole but this crop cannot be used: correct the photo and pack again"
        ) from None
