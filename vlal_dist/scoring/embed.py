"""The embeddings of a shard: from its crops through the encoder, or those stored before.

Crops are decoded in threads that run ahead; encoder batches have one fixed shape and never cross
shards, so that the bytes depend on the shard and the settings alone. A crop that cannot be used
(poison: its bytes are as packed, but are no image, or nothing is left of its box) is left out with
its reason; its embedding is zero. An altered shard is no poison: that stops the run.

Legend: n samples of the shard, D embedding width.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from vlal_dist.data.format.dataset import Split
from vlal_dist.data.format.images import decode_rgb
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.data.format.scores import quarantined_of, read_shard_scores
from vlal_dist.errors import DataError, Stopped
from vlal_dist.scoring.clip import ClipEncoder, Embedding, Seconds, Turns
from vlal_dist.storage.store import Store

BATCHES_AHEAD = 2
"""Encoder batches of decoded crops that wait at most, per shard; bounds memory."""


@dataclass(frozen=True)
class Embedded:
    """What became of the crops of a shard.

    Attributes:
        embedding: float32 [n, D], unit length; zero for a poison crop.
        poison: place in the shard -> why it could not be used.
    """

    embedding: Embedding
    poison: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """One crop: its pixels, or why there are none; seconds it took."""

    pixels: torch.Tensor | None
    problem: str
    fetch_s: float
    decode_s: float


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


def embed_crops(
    reader: SampleReader,
    rows: range,
    *,
    encoder: ClipEncoder,
    pool: Executor,
    turns: Turns,
    seconds: Seconds,
    stopped: Callable[[], bool],
) -> Embedded:
    """Encode the crops of a shard.

    Args:
        reader: reads the split.
        rows: of the shard.
        encoder: the model.
        pool: threads that decode.
        turns: who may use the encoder.
        seconds: added to.
        stopped: asked before each batch.

    Raises:
        DataError: the shard was altered, or none of its crops can be used.
        StorageError: it cannot be read.
        Stopped: `stopped()` became true.
    """
    ticket, batches = turns.ticket(), []
    places: list[int] = []
    waiting: list[torch.Tensor] = []
    poison: dict[int, str] = {}

    def encode() -> None:
        if stopped():
            raise Stopped("stopped; the same command goes on with the shards left")
        with turns.turn(ticket):
            batches.append(encoder.encode_batch(waiting, seconds=seconds))
        waiting.clear()

    ahead = BATCHES_AHEAD * encoder.batch_size
    for place, one in enumerate(_ahead(reader, rows, encoder=encoder, ahead=ahead, pool=pool)):
        seconds.fetch += one.fetch_s
        seconds.decode += one.decode_s
        if one.pixels is None:
            poison[place] = one.problem
            continue
        places.append(place)
        waiting.append(one.pixels)
        if len(waiting) == encoder.batch_size:
            encode()
    if waiting:
        encode()
    if not batches:
        raise DataError(
            f"{reader.split.store.url}/{reader.split.name}: none of the {len(rows)} crops of a "
            f"shard can be used, the first because {poison[0]}; pack again"
        )
    encoded = np.concatenate(batches)
    embedding = np.zeros((len(rows), encoded.shape[1]), dtype=np.float32)
    embedding[places] = encoded
    return Embedded(embedding, poison)


def stored_embeddings(
    store: Store, split: Split, shard: int, *, rows: range, manifest: dict[str, str]
) -> Embedded:
    """The embeddings that an earlier scoring stored, under other prompts or feasible sets.

    Args:
        store: its score root.
        split: the opened split of the present dataset.
        shard: position of the shard in it.
        rows: of the shard.
        manifest: that root's `scores.json`.

    Raises:
        DataError: absent, damaged, or of other samples.
    """
    sha256 = split.shards[shard].sha256
    scores = read_shard_scores(store, split.name, shard_sha256=sha256, manifest=manifest)
    uid = split.index.uid[rows.start : rows.stop]
    if not np.array_equal(scores.uid, uid):
        raise DataError(
            f"{store.url}: the embeddings of {split.name}/{split.shards[shard].name} are of other "
            "samples; score its images again"
        )
    quarantined = quarantined_of(scores.header)
    places = {one: place for place, one in enumerate(uid.tolist()) if one in quarantined}
    return Embedded(scores.embedding, {places[one]: why for one, why in quarantined.items()})


def _ahead(
    reader: SampleReader, rows: range, *, encoder: ClipEncoder, ahead: int, pool: Executor
) -> Iterator[Prepared]:
    """Preprocessed crops in row order, decoded ahead in threads."""
    queue: deque[Future[Prepared]] = deque()
    try:
        for row in rows:
            queue.append(pool.submit(prepare_row, reader, row, encoder))
            if len(queue) > ahead:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        for future in queue:
            future.cancel()


def prepare_row(reader: SampleReader, row: int, encoder: ClipEncoder) -> Prepared:
    """Read, cut and preprocess one crop; a poison one comes back with its reason.

    Raises:
        DataError: the shard was altered.
        StorageError: it cannot be read.
    """
    begun = time.perf_counter()
    sample = reader.read(row)
    read = time.perf_counter()
    pixels, problem = None, ""
    try:
        pixels = encoder.prepare(box_crop(decode_rgb(sample.jpg), sample.box_in_crop))
    except (DataError, OSError, ValueError) as error:
        problem = " ".join(str(error).split())[:200] or type(error).__name__
    return Prepared(pixels, problem, read - begun, time.perf_counter() - read)
