"""Batch builder: reads, verifies and decodes samples in threads, and labels whole batches.

Samples are decoded straight into the memory of their batch; the thread that finishes last makes
the labels. Python per sample is what loaders spend their time on, so whatever can be done for a
whole batch is.

Legend: B rows of a batch, A attributes, S image side.
"""

import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import torch

from vlal_dist.config.sections import DataConfig
from vlal_dist.data.format.dataset import Dataset
from vlal_dist.data.format.jpeg import Pixels
from vlal_dist.data.hashing import I64, signed_uids, uid_to_hex
from vlal_dist.data.loading.batch import Batch
from vlal_dist.data.loading.decode import ImageCache, decode_into
from vlal_dist.data.loading.likelihoods import ReadLikelihoods
from vlal_dist.data.loading.shard_reader import (
    Damage,
    DamagedError,
    Data,
    SampleLocations,
    ShardReader,
)
from vlal_dist.data.order.ledger import Ledger
from vlal_dist.errors import DataError, bounded
from vlal_dist.method.likelihood import inverse_weights

_LARGEST_PIECE = 64
"""Rows that a thread takes at a time."""


@dataclass(frozen=True)
class BatchRequest:
    """Rows of one batch, and how they are visited.

    Attributes:
        at: n rows, looked up by the reader.
        position: int64 [n], of the epoch.
        visit: int64 [n], running count of each sample's planned visits.
        flip: bool [n], whether the image is to be mirrored.
        left_out: visits that belong here but are not read: their samples are quarantined.
    """

    at: SampleLocations
    position: I64
    visit: I64
    flip: npt.NDArray[np.bool_]
    left_out: Ledger = field(default_factory=Ledger)

    @classmethod
    def plain(cls, at: SampleLocations) -> "BatchRequest":
        """First visits without a flip, as evaluation reads rows."""
        zeros = np.zeros(len(at.rows), dtype=np.int64)
        return cls(at, at.rows, zeros, zeros.astype(np.bool_))


@dataclass(frozen=True)
class BuiltBatch:
    """A finished request.

    Attributes:
        batch: the rows that could be used, in order.
        position: int64 [B], of these.
        damaged: why the others could not be used.
        left_out: visits of the request that have no row in the batch.
    """

    batch: Batch
    position: I64
    damaged: list[Damage]
    left_out: Ledger


@dataclass
class StageCounts:
    """Work of a rank's threads so far; seconds are summed over threads.

    Attributes:
        samples, sample_bytes: samples read, and the bytes of their tar ranges.
        read_seconds: reading and checking, including waits for fetches.
        decode_seconds: decoding and resizing.
        label_seconds: labels and likelihoods of whole batches.
    """

    samples: int = 0
    sample_bytes: int = 0
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    label_seconds: float = 0.0


class BatchBuilder:
    """Turns rows of a corpus into batches.

    Args:
        reader: reads the rows.
        dataset: its vocabulary and feasible sets; likelihoods must be as long as these.
        config: image size, normalisation, decoding threads, memory for decoded images.
        training: follow `config.damage` and `config.decode`; otherwise the CPU decodes and the
            first damaged sample raises.
        read_likelihoods: where log-likelihoods come from; None: batches have none.
        pinned: page-locked image memory, for copies to a GPU.
    """

    def __init__(
        self,
        reader: ShardReader,
        dataset: Dataset,
        config: DataConfig,
        *,
        training: bool = False,
        read_likelihoods: ReadLikelihoods | None = None,
        pinned: bool = False,
    ) -> None:
        self.reader, self.config, self.read_likelihoods = reader, config, read_likelihoods
        self.num_attributes = len(dataset.vocabulary.attributes)
        self.set_size = np.diff(dataset.feasible.indptr)
        self._in_place = any(split.annotations is not None for split in reader.corpus.splits)
        self.training = training
        self.quarantines = training and config.damage == "quarantine"
        self.decode_later = training and config.decode == "gpu"
        side = config.image_size
        self.image_cache: ImageCache | None = None
        if config.decoded_bytes:
            self.image_cache = ImageCache(
                side=side, num_rows=len(reader.corpus), limit_bytes=config.decoded_bytes
            )
        self.counts = StageCounts()
        self.lock = threading.Lock()  # of the counts
        self.buffers = ImageBuffers(side=side, pinned=pinned)
        self._pool = ThreadPoolExecutor(config.threads, thread_name_prefix="decode")

    def start(self, request: BatchRequest) -> "Future[BuiltBatch]":
        """Begin a batch.

        Returns:
            The finished batch; DamagedError, DataError or StorageError if it cannot be built.
        """
        job, count = _Job(self, request), len(request.at.rows)
        size = max(1, min(_LARGEST_PIECE, -(-count // self.config.threads)))
        pieces = [(low, min(low + size, count)) for low in range(0, count, size)]
        job.left = len(pieces)
        if not pieces:
            job.finish()
        for low, high in pieces:
            self._pool.submit(job.work, low, high)
        return job.future

    def labels_of(self, at: SampleLocations, data: list[Data]) -> npt.NDArray[np.int8]:
        """Labels of rows, int8 [B, A]: of our own tars from their json, else from annotations.

        Raises:
            DataError: a json cannot be read.
        """
        if not self._in_place:
            return label_rows(_members(data, at.json), self.num_attributes)
        corpus = self.reader.corpus
        which, local = corpus.locate(at.rows)
        label = np.zeros((len(data), self.num_attributes), dtype=np.int8)
        for number, split in enumerate(corpus.splits):
            here = np.flatnonzero(which == number)
            if split.annotations is not None:
                label[here] = split.annotations.label_rows(local[here], self.num_attributes)
            else:
                jsons = _members([data[n] for n in here], at.json[here])
                label[here] = label_rows(jsons, self.num_attributes)
        return label

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.reader.close()


class _Job:
    """One batch in progress, shared by the threads that work on it."""

    def __init__(self, builder: BatchBuilder, request: BatchRequest) -> None:
        count = len(request.at.rows)
        self.builder, self.request, self.at = builder, request, request.at
        self.future: Future[BuiltBatch] = Future()
        self.left = 0
        self.data: list[Data] = [b""] * count
        self.damage: dict[int, Damage] = {}
        self.pixels, self.image = builder.buffers.take(0 if builder.decode_later else count)
        self._lock = threading.Lock()

    def work(self, low: int, high: int) -> None:
        """Read and decode rows low..high-1; the last call to finish builds the batch."""
        try:
            if not self.future.cancelled():
                self._fill(low, high)
        except BaseException as error:
            with self._lock:
                if not self.future.done():
                    self.future.set_exception(error)
        with self._lock:
            self.left -= 1
            last = self.left == 0 and not self.future.done()
        if last:
            self.finish()

    def finish(self) -> None:
        """Build the batch from the samples that were decoded."""
        try:
            started = time.perf_counter()
            built = self._build()
            with self.builder.lock:
                self.builder.counts.label_seconds += time.perf_counter() - started
        except (DataError, LookupError, TypeError, ValueError) as error:
            self.future.set_exception(self._first_unreadable() or error)
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(built)

    def _fill(self, low: int, high: int) -> None:
        builder, started = self.builder, time.perf_counter()
        found = builder.reader.read(self.at, low, high)
        read = time.perf_counter()
        jpg = self.at.jpg[low:high].tolist()
        for place, (data, (start, stop)) in enumerate(zip(found, jpg, strict=True), low):
            if isinstance(data, Damage):
                self._leave_out(place, data)
                continue
            self.data[place] = data
            if builder.decode_later:
                continue
            try:
                self._decode(place, memoryview(data)[start:stop])
            except DataError as error:
                damage = builder.reader.damage(self.at, place, str(error), as_packed=True)
                self._leave_out(place, damage)
        with builder.lock:
            builder.counts.samples += high - low
            builder.counts.sample_bytes += int(self.at.length[low:high].sum())
            builder.counts.read_seconds += read - started
            builder.counts.decode_seconds += time.perf_counter() - read

    def _decode(self, place: int, jpg: memoryview) -> None:
        cache, row, out = self.builder.image_cache, int(self.at.rows[place]), self.pixels[place]
        kept = cache.get(row) if cache is not None else None
        if kept is not None:
            out[:] = kept
            return
        decode_into(jpg, out)
        if cache is not None:
            cache.keep(row, out)

    def _leave_out(self, place: int, damage: Damage) -> None:
        if not self.builder.quarantines:
            raise DamagedError(damage, may_quarantine=self.builder.training)
        self.damage[place] = damage

    def _build(self) -> BuiltBatch:
        builder, request, at, data = self.builder, self.request, self.at, self.data
        position, visit, flip, image = request.position, request.visit, request.flip, self.image
        left_out = request.left_out
        if self.damage:
            kept = np.ones(len(at.rows), dtype=np.bool_)
            kept[list(self.damage)] = False
            left_out += Ledger.of(at.uid[~kept], visit[~kept])
            places = np.flatnonzero(kept)
            at, data = at.select(places), [data[n] for n in places]
            position, visit, flip = position[kept], visit[kept], flip[kept]
            image = image if builder.decode_later else image[torch.from_numpy(kept)]
        weights = self._weights(at, data) if builder.read_likelihoods else (None, None)
        batch = Batch(
            image=image.permute(0, 3, 1, 2),
            flip=torch.from_numpy(flip),
            object_id=torch.from_numpy(at.object_id),
            label=torch.from_numpy(builder.labels_of(at, data)),
            uid=torch.from_numpy(signed_uids(at.uid)),
            visit=torch.from_numpy(visit),
            row=torch.from_numpy(at.rows),
            row_weight=torch.ones(len(data), dtype=torch.float32),
            weight_indptr=weights[0],
            inverse_weight=weights[1],
            jpgs=[bytes(one) for one in _members(data, at.jpg)] if builder.decode_later else None,
            normalize=builder.config.normalize,
        )
        return BuiltBatch(batch, position, list(self.damage.values()), left_out)

    def _first_unreadable(self) -> DamagedError | None:
        """The first sample whose json or likelihood cannot be read by itself."""
        builder, at = self.builder, self.at
        for place in np.flatnonzero([len(one) > 0 for one in self.data]).tolist():
            one, data = at.select(slice(place, place + 1)), self.data[place : place + 1]
            try:
                builder.labels_of(one, data)
                if builder.read_likelihoods is not None:
                    builder.read_likelihoods(one.rows, _members(data, one.likelihood))
            except (DataError, LookupError, TypeError, ValueError) as error:
                return DamagedError(builder.reader.damage(at, place, str(error), as_packed=True))
        return None

    def _weights(self, at: SampleLocations, data: list[Data]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse weights of the draw, ragged: int64 [B + 1], float32 [F]."""
        builder = self.builder
        assert builder.read_likelihoods is not None
        values, indptr = builder.read_likelihoods(at.rows, _members(data, at.likelihood))
        found, expected = np.diff(indptr), builder.set_size[at.object_id]
        wrong = np.flatnonzero(found != expected)
        if len(wrong):
            raise DataError(
                f"sample uid {uid_to_hex(int(at.uid[wrong[0]]))}: likelihood over "
                f"{found[wrong[0]]} attributes, its object has {expected[wrong[0]]} feasible ones; "
                "merge again with the present feasible sets"
            )
        return torch.from_numpy(indptr), torch.from_numpy(inverse_weights(values, indptr))


class ImageBuffers:
    """uint8 images [n, S, S, 3], reused once the last tensor on them is gone.

    First writes to fresh memory cost up to a fifth of the time of small crops.

    Args:
        side: S, pixels.
        pinned: page-locked memory, for copies to a GPU that do not wait. torch's own pool then
            does the reuse: it knows when a copy has ended.
    """

    def __init__(self, *, side: int, pinned: bool) -> None:
        self._side, self._pinned = side, pinned
        self._lock = threading.Lock()
        self._free: list[Pixels] = []

    def take(self, count: int) -> tuple[Pixels, torch.Tensor]:
        """Memory for `count` images: one array to write, and a tensor of the same memory."""
        shape = (count, self._side, self._side, 3)
        if self._pinned:
            tensor = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            return tensor.numpy(), tensor
        with self._lock:
            fitting = (n for n, buffer in enumerate(self._free) if len(buffer) >= count)
            number = next(fitting, None)
            buffer = None if number is None else self._free.pop(number)
        if buffer is None:
            buffer = np.empty(shape, dtype=np.uint8)
        view = buffer[:count]
        # torch keeps `view` alive as long as any tensor shares its memory.
        weakref.finalize(view, self._free.append, buffer).atexit = False
        return view, torch.from_numpy(view)


def label_rows(jsons: Sequence[Data], num_attributes: int) -> npt.NDArray[np.int8]:
    """The labels in the `KEY.json` of B samples, parsed in one call.

    Returns:
        int8 [B, A]: +1 annotated present, -1 annotated absent, 0 unannotated.

    Raises:
        DataError: a json cannot be read, or names an attribute id beyond A.
    """
    try:
        samples: list[dict[str, Any]] = orjson.loads(b"[" + b",".join(jsons) + b"]")
        lists = [one["positive"] for one in samples] + [one["negative"] for one in samples]
        counts = [len(one) for one in lists]
        ids = np.fromiter(chain.from_iterable(lists), dtype=np.int64, count=sum(counts))
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise DataError(
            f"a sample's json cannot be read: {bounded(repr(error))}; pack again"
        ) from None
    label = np.zeros((len(jsons), num_attributes), dtype=np.int8)
    if len(samples) != len(jsons):
        raise DataError(f"{len(jsons)} samples hold {len(samples)} JSON values; pack again")
    if len(ids) and not 0 <= ids.min() <= ids.max() < num_attributes:
        raise DataError(f"a sample names attribute {ids.max()} of {num_attributes}; pack again")
    places = np.repeat(np.arange(len(lists)) % len(samples) * num_attributes, counts) + ids
    positives = sum(counts[: len(samples)])
    flat = label.reshape(-1)
    flat[places[:positives]] = 1
    # Negative wins a clash (authors' target builder).
    flat[places[positives:]] = -1
    return label


def _members(data: list[Data], where: I64) -> list[Data]:
    """The same tar member of each sample."""
    return [one[start:stop] for one, (start, stop) in zip(data, where.tolist(), strict=True)]
