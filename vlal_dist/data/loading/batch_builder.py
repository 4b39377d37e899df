"""From rows to batches: read, verify, decode, label.

Samples are decoded in a pool of threads, straight into the memory of their batch; the thread that
finishes last makes the labels. Nothing is done sample by sample that can be done for the batch.

Legend: B rows of a batch, A attributes, S image side.
"""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vlal_dist.config.sections import DataConfig
from vlal_dist.data.format.dataset import Dataset
from vlal_dist.data.hashing import I64
from vlal_dist.data.loading.batch import Batch, ImageBuffers
from vlal_dist.data.loading.decode import decode_into
from vlal_dist.data.loading.image_cache import ImageCache
from vlal_dist.data.loading.labels import Data, label_rows, parse_json
from vlal_dist.data.loading.likelihoods import ReadLikelihoods
from vlal_dist.data.loading.shard_reader import Damage, DamagedError, SampleLocations, ShardReader
from vlal_dist.errors import DataError
from vlal_dist.method.likelihood import inverse_weights

_LARGEST_PIECE = 64
"""Rows that a thread takes at a time."""


@dataclass(frozen=True)
class BuiltBatch:
    """What became of the rows asked for.

    Attributes:
        batch: those that could be used, in order.
        kept: bool [n], which these are.
        damaged: why the others could not.
    """

    batch: Batch
    kept: npt.NDArray[np.bool_]
    damaged: list[Damage]


@dataclass
class StageCounts:
    """What the threads of a rank did so far; seconds are summed over threads.

    Attributes:
        samples, sample_bytes: samples read, and the bytes of their tar ranges.
        read_s: reading and checking, with the wait for parts that were not there yet.
        decode_s: decoding and resizing.
        label_s: labels and likelihoods of whole batches.
    """

    samples: int = 0
    sample_bytes: int = 0
    read_s: float = 0.0
    decode_s: float = 0.0
    label_s: float = 0.0


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
        self.quarantines = training and config.damage == "quarantine"
        self.decode_later = training and config.decode == "gpu"
        side = config.image_size
        self.decoded: ImageCache | None = None
        if config.decoded_bytes:
            self.decoded = ImageCache(
                side=side, num_rows=len(reader.corpus), limit_bytes=config.decoded_bytes
            )
        self.counts = StageCounts()
        self._lock = threading.Lock()
        self._buffers = ImageBuffers(side=side, pinned=pinned)
        self._pool = ThreadPoolExecutor(config.threads, thread_name_prefix="decode")

    def start(
        self, at: SampleLocations, visit: I64, flip: npt.NDArray[np.bool_]
    ) -> "Future[BuiltBatch]":
        """Begin a batch of some rows.

        Args:
            at: n rows of the corpus, looked up by the reader.
            visit: int64 [n].
            flip: bool [n].

        Returns:
            The batch once it is made; DamagedError, DataError or StorageError if it cannot be.
        """
        job, count = _Job(self, at, visit, flip), len(at.rows)
        size = max(1, min(_LARGEST_PIECE, -(-count // self.config.threads)))
        pieces = [(low, min(low + size, count)) for low in range(0, count, size)]
        job.left = len(pieces)
        if not pieces:
            job.finish()
        for low, high in pieces:
            self._pool.submit(job.work, low, high)
        return job.future

    def make(self, rows: I64, visit: I64, flip: npt.NDArray[np.bool_]) -> Batch:
        """A batch of the given rows, waited for; errors as `start`."""
        return self.start(self.reader.locate(rows), visit, flip).result().batch

    def count(self, **amounts: float) -> None:
        """Add to the counts."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self.counts, name, getattr(self.counts, name) + amount)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.reader.close()


class _Job:
    """One batch in the making, shared by the threads that work on it."""

    def __init__(
        self, maker: BatchBuilder, at: SampleLocations, visit: I64, flip: npt.NDArray[np.bool_]
    ) -> None:
        self.maker, self.at, self.visit, self.flip = maker, at, visit, flip
        self.future: Future[BuiltBatch] = Future()
        self.left = 0
        self.data: list[Data] = [b""] * len(at.rows)
        self.damage: dict[int, Damage] = {}
        self.image, self.tensor = maker._buffers.take(0 if maker.decode_later else len(at.rows))
        self._lock = threading.Lock()

    def work(self, low: int, high: int) -> None:
        """Read and decode rows low..high-1; the last to finish makes the batch."""
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
        """Make the batch of what was decoded."""
        try:
            started = time.perf_counter()
            made = self._assemble()
            self.maker.count(label_s=time.perf_counter() - started)
        except (DataError, LookupError, TypeError, ValueError) as error:
            self.future.set_exception(self._at_fault() or error)
            return
        except BaseException as error:
            self.future.set_exception(error)
            return
        self.future.set_result(made)

    def _fill(self, low: int, high: int) -> None:
        maker, begun = self.maker, time.perf_counter()
        found = maker.reader.read(self.at, low, high)
        read = time.perf_counter()
        image, jpg = self.image, self.at.jpg
        for place, data in enumerate(found, low):
            if isinstance(data, Damage):
                self._leave_out(place, data)
                continue
            self.data[place] = data
            if maker.decode_later:
                continue
            start, stop = jpg[place]
            try:
                self._decode(place, memoryview(data)[start:stop], image[place])
            except DataError as error:
                self._leave_out(place, maker.reader.damage(self.at, place, str(error)))
        maker.count(
            samples=high - low,
            sample_bytes=sum(self.at.length[low:high]),
            read_s=read - begun,
            decode_s=time.perf_counter() - read,
        )

    def _decode(self, place: int, jpg: memoryview, out: npt.NDArray[np.uint8]) -> None:
        decoded, row = self.maker.decoded, int(self.at.rows[place])
        kept = decoded.get(row) if decoded is not None else None
        if kept is not None:
            out[:] = kept
            return
        decode_into(jpg, out)
        if decoded is not None:
            decoded.keep(row, out)

    def _leave_out(self, place: int, damage: Damage) -> None:
        if not self.maker.quarantines:
            raise DamagedError(damage)
        self.damage[place] = damage

    def _assemble(self) -> BuiltBatch:
        maker, at, data, image = self.maker, self.at, self.data, self.tensor
        visit, flip = self.visit, self.flip
        kept = np.ones(len(at.rows), dtype=np.bool_)
        if self.damage:
            kept[list(self.damage)] = False
            places = np.flatnonzero(kept)
            at, data = at.only(places), [data[n] for n in places]
            visit, flip = visit[kept], flip[kept]
            image = image if maker.decode_later else image[torch.from_numpy(kept)]
        weights = self._weights(at, data) if maker.read_likelihoods else (None, None)
        batch = Batch(
            image=image.permute(0, 3, 1, 2),
            flip=torch.from_numpy(flip),
            object_id=torch.from_numpy(at.object_id),
            label=torch.from_numpy(
                label_rows(parse_json(_members(data, at.json)), maker.num_attributes)
            ),
            uid=torch.from_numpy(at.uid.view(np.int64)),
            visit=torch.from_numpy(visit),
            row=torch.from_numpy(at.rows),
            row_weight=torch.ones(len(data), dtype=torch.float32),
            weight_indptr=weights[0],
            inverse_weight=weights[1],
            jpgs=[bytes(one) for one in _members(data, at.jpg)] if maker.decode_later else None,
            normalize=maker.config.normalize,
        )
        return BuiltBatch(batch, kept, list(self.damage.values()))

    def _at_fault(self) -> DamagedError | None:
        """The first sample whose json or likelihood cannot be read by itself."""
        maker, at = self.maker, self.at
        for place in np.flatnonzero([len(one) > 0 for one in self.data]).tolist():
            one, data = at.between(place, place + 1), self.data[place : place + 1]
            try:
                label_rows(parse_json(_members(data, one.json)), maker.num_attributes)
                if maker.read_likelihoods is not None:
                    maker.read_likelihoods(one.rows, _members(data, one.likelihood))
            except (DataError, LookupError, TypeError, ValueError) as error:
                return DamagedError(maker.reader.damage(at, place, str(error)))
        return None

    def _weights(self, at: SampleLocations, data: list[Data]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse weights of the draw, ragged: int64 [B + 1], float32 [F]."""
        maker = self.maker
        assert maker.read_likelihoods is not None
        values, indptr = maker.read_likelihoods(at.rows, _members(data, at.likelihood))
        found, expected = np.diff(indptr), maker.set_size[at.object_id]
        wrong = np.flatnonzero(found != expected)
        if len(wrong):
            raise DataError(
                f"sample uid {at.uid[wrong[0]]:016x}: likelihood over {found[wrong[0]]} "
                f"attributes, its object has {expected[wrong[0]]} feasible ones; merge again with "
                "the present feasible sets"
            )
        return torch.from_numpy(indptr), torch.from_numpy(inverse_weights(values, indptr))


def _members(data: list[Data], where: list[tuple[int, int]]) -> list[Data]:
    """The same tar member of each sample."""
    return [one[start:stop] for one, (start, stop) in zip(data, where, strict=True)]
