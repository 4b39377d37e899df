"""The embeddings of a shard: from its crops through the encoder, or stored by an earlier scoring.

Crops are decoded in threads that run ahead; encoder batches have one fixed shape and never cross
shards, so that the bytes depend on the shard and the settings alone. An unusable crop (intact bytes
that do not decode, or an empty box) is left out with its reason; its embedding is zero. An altered
shard is an error that stops the run.

Legend: n samples of the shard, D embedding width.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from vlal_dist.data.format.dataset import Split
from vlal_dist.data.format.jpeg import decode_jpeg
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.data.format.scores import quarantined_of, read_shard_scores
from vlal_dist.data.hashing import I64, U64
from vlal_dist.errors import DataError, Stopped
from vlal_dist.scoring.clip import ClipEncoder, Embedding, PhaseSeconds
from vlal_dist.storage.store import Store

BATCHES_AHEAD = 2
"""Encoder batches of decoded crops that wait at most, per shard; bounds memory."""

Embedded = tuple[Embedding, dict[int, str]]
"""float32 [n, D], unit length, zero for an unusable crop; and place in the shard -> why it is."""


@dataclass(frozen=True)
class SplitShard:
    """One shard of an opened split, by its position, with its part of the split's index."""

    split: Split
    position: int

    @property
    def sha256(self) -> str:
        """Digest of the tar."""
        return self.split.shards[self.position].sha256

    @cached_property
    def rows(self) -> range:
        """Rows of the split's index that lie in the shard (they are adjacent)."""
        here = [self.position, self.position + 1]
        return range(*np.searchsorted(self.split.index.shard, here, side="left").tolist())

    @property
    def uid(self) -> U64:
        """uint64 [n]."""
        return np.asarray(self.split.index.uid[self.rows.start : self.rows.stop], dtype=np.uint64)

    @property
    def object_id(self) -> I64:
        """int64 [n]."""
        column = self.split.index.object_id[self.rows.start : self.rows.stop]
        return np.asarray(column, dtype=np.int64)


class EncoderLock:
    """FIFO lock for the encoder: the waiting shard that was started first goes first.

    With two shards under way the second is fetched and decoded while the first is encoded, and
    begins to be encoded while the first is written. If they alternated, both would be written at
    the same time and the encoder would stand idle meanwhile.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._numbers = count()
        self._waiting: set[int] = set()
        self._held = False

    def ticket(self) -> int:
        """A ticket that comes after all those drawn before."""
        return next(self._numbers)

    @contextmanager
    def hold(self, ticket: int) -> Iterator[None]:
        """Wait for the lock until no lower ticket waits, and hold it in the `with` block."""
        with self._condition:
            self._waiting.add(ticket)
            self._condition.wait_for(lambda: not self._held and ticket == min(self._waiting))
            self._waiting.remove(ticket)
            self._held = True
        try:
            yield
        finally:
            with self._condition:
                self._held = False
                self._condition.notify_all()


def embed_crops(
    reader: SampleReader,
    rows: range,
    *,
    encoder: ClipEncoder,
    pool: Executor,
    lock: EncoderLock,
    seconds: PhaseSeconds,
    stop: threading.Event,
) -> Embedded:
    """Encode the crops of a shard.

    Args:
        reader: reads the split.
        rows: of the shard.
        encoder: the model.
        pool: threads that decode.
        lock: held while the encoder is used.
        seconds: added to.
        stop: looked at before each batch.

    Raises:
        DataError: the shard was altered, or none of its crops can be used.
        StorageError: it cannot be read.
        Stopped: `stop` was set.
    """
    ticket = lock.ticket()
    batches: list[Embedding] = []
    places: list[int] = []
    waiting: list[torch.Tensor] = []
    unusable: dict[int, str] = {}

    def encode() -> None:
        if stop.is_set():
            raise Stopped("stopped; repeat the command to score the remaining shards")
        with lock.hold(ticket):
            batches.append(encoder.encode_batch(waiting, seconds=seconds))
        waiting.clear()

    ahead = BATCHES_AHEAD * encoder.batch_size
    for place, crop in enumerate(_prepared(reader, rows, encoder=encoder, ahead=ahead, pool=pool)):
        seconds.fetch += crop.fetch_s
        seconds.decode += crop.decode_s
        if crop.pixels is None:
            unusable[place] = crop.problem
            continue
        places.append(place)
        waiting.append(crop.pixels)
        if len(waiting) == encoder.batch_size:
            encode()
    if waiting:
        encode()
    if not batches:
        raise DataError(
            f"{reader.split.store.url}/{reader.split.name}: none of the {len(rows)} crops of a "
            f"shard can be used, the first because {unusable[0]}; pack again"
        )
    encoded = np.concatenate(batches)
    embedding = np.zeros((len(rows), encoded.shape[1]), dtype=np.float32)
    embedding[places] = encoded
    return embedding, unusable


def stored_embeddings(store: Store, shard: SplitShard, manifest: dict[str, Any]) -> Embedded:
    """The embeddings that an earlier scoring stored, under other prompts or feasible sets.

    Args:
        store: its score root.
        shard: of the present dataset.
        manifest: that root's `scores.json`.

    Raises:
        DataError: absent, damaged, or of other samples.
    """
    name = shard.split.name
    scores = read_shard_scores(store, name, shard_sha256=shard.sha256, manifest=manifest)
    if not np.array_equal(scores.uid, shard.uid):
        raise DataError(
            f"{store.url}: the embeddings of {name}/{shard.split.shards[shard.position].name} are "
            "of other samples; score its images again"
        )
    reasons = quarantined_of(scores.header)
    places = enumerate(scores.uid.tolist())
    return scores.embedding, {place: reasons[uid] for place, uid in places if uid in reasons}


class PreparedCrop(NamedTuple):
    """The pixels of a crop, or why there are none; seconds it took."""

    pixels: torch.Tensor | None
    problem: str
    fetch_s: float
    decode_s: float


def prepare_crop(reader: SampleReader, row: int, encoder: ClipEncoder) -> PreparedCrop:
    """Read, cut and preprocess one crop; an unusable one comes back with its reason.

    Raises:
        DataError: the shard was altered.
        StorageError: it cannot be read.
    """
    started = time.perf_counter()
    sample = reader.read(row)
    read = time.perf_counter()
    pixels, problem = None, ""
    try:
        pixels = encoder.prepare(box_crop(decode_jpeg(sample.jpg), sample.box_in_crop))
    except (DataError, OSError, ValueError) as error:
        problem = " ".join(str(error).split())[:200] or type(error).__name__
    return PreparedCrop(pixels, problem, read - started, time.perf_counter() - read)


def box_crop(pixels: npt.NDArray[np.uint8], box: tuple[float, ...]) -> Image.Image:
    """The raw box as the authors' notebook cuts it: x, y, w, h each truncated; no expansion.

    Raises:
        DataError: the box is empty, or outside of the pixels.
    """
    left, top, width, height = (int(value) for value in box)
    cut = pixels[max(top, 0) : top + height, max(left, 0) : left + width]
    if width < 1 or height < 1 or 0 in cut.shape:
        raise DataError(f"box_in_crop {list(box)} leaves nothing of {pixels.shape[1::-1]} pixels")
    return Image.fromarray(cut)


def _prepared(
    reader: SampleReader, rows: range, *, encoder: ClipEncoder, ahead: int, pool: Executor
) -> Iterator[PreparedCrop]:
    """Preprocessed crops in row order, decoded ahead in threads."""
    queue: deque[Future[PreparedCrop]] = deque()
    try:
        for row in rows:
            queue.append(pool.submit(prepare_crop, reader, row, encoder))
            if len(queue) > ahead:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        for future in queue:
            future.cancel()
