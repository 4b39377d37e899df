"""From rows to batches: read, verify, decode, augment, label.

Legend: B rows of a batch, A attributes, S image side. Samples decode in a shared pool of threads.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vlal_dist.data.dataset import Split
from vlal_dist.data.images import decode_rgb, resize_square, to_planes
from vlal_dist.data.rows import RowReader, Sample
from vlal_dist.errors import DataError
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.method.likelihood import inverse_weights

ReadLikelihood = Callable[[Sample], npt.NDArray[np.float32] | None]


@dataclass
class Batch:
    """Rows ready for a forward pass.

    Attributes:
        image: float32 [B, 3, S, S] in [0, 1], or ImageNet-normalised.
        object_id: int64 [B].
        label: int8 [B, A]; +1 annotated present, -1 annotated absent, 0 unannotated.
        uid: int64 [B], the bits of the unsigned uid.
        visit: int64 [B], running count of the sample's planned visits.
        row: int64 [B], row of the split's index.
        row_weight: float32 [B]; 0 for a dummy row.
        inverse_weight: float32 [B, A], (max likelihood) / likelihood; 0 where it cannot be drawn;
            None where the samples have no likelihood.
        feasible: bool [B, A], Omega_o.
    """

    image: Tensor
    object_id: Tensor
    label: Tensor
    uid: Tensor
    visit: Tensor
    row: Tensor
    row_weight: Tensor
    inverse_weight: Tensor | None
    feasible: Tensor

    def __len__(self) -> int:
        return len(self.row)


class BatchMaker:
    """Turns rows of one split into batches.

    Args:
        split: the opened split.
        feasible: Omega_o of every object.
        num_attributes: A.
        image_size: S, pixels.
        normalize: ImageNet mean and standard deviation.
        threads: decoding threads.
        read_likelihood: where log-likelihoods come from; None: not needed.
    """

    def __init__(
        self,
        split: Split,
        *,
        feasible: FeasibleSets,
        num_attributes: int,
        image_size: int,
        normalize: bool,
        threads: int,
        read_likelihood: ReadLikelihood | None = None,
    ) -> None:
        self.split, self.feasible, self.num_attributes = split, feasible, num_attributes
        self.image_size, self.normalize = image_size, normalize
        self.read_likelihood = read_likelihood
        self.reader = RowReader(split)
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="decode")

    def make(
        self, rows: npt.NDArray[np.int64], visit: npt.NDArray[np.int64], flip: npt.NDArray[np.bool_]
    ) -> Batch:
        """A batch of the given rows; errors of reading and decoding as `RowReader.read`."""
        count, side, width = len(rows), self.image_size, self.num_attributes
        image = np.empty((count, 3, side, side), dtype=np.float32)
        label = np.zeros((count, width), dtype=np.int8)
        feasible = np.zeros((count, width), dtype=np.bool_)
        inverse_weight = (
            np.zeros((count, width), dtype=np.float32) if self.read_likelihood else None
        )

        def fill(place: int) -> None:
            sample = self.reader.read(int(rows[place]))
            pixels = resize_square(_decode(sample), side)
            to_planes(pixels, flip=bool(flip[place]), normalize=self.normalize, out=image[place])
            label[place, sample.positive] = 1
            label[place, sample.negative] = -1  # negative wins a clash (authors' target builder)
            ids = self.feasible.of(sample.object_id)
            feasible[place, ids] = True
            if inverse_weight is not None:
                inverse_weight[place, ids] = self._inverse_weights(sample, len(ids))

        for _ in self._pool.map(fill, range(count)):
            pass
        index = self.split.index
        return Batch(
            image=torch.from_numpy(image),
            object_id=torch.from_numpy(index.object_id[rows].astype(np.int64)),
            label=torch.from_numpy(label),
            uid=torch.from_numpy(index.uid[rows].astype(np.uint64).view(np.int64)),
            visit=torch.from_numpy(visit.astype(np.int64)),
            row=torch.from_numpy(rows.astype(np.int64)),
            row_weight=torch.ones(count, dtype=torch.float32),
            inverse_weight=None if inverse_weight is None else torch.from_numpy(inverse_weight),
            feasible=torch.from_numpy(feasible),
        )

    def keep_blocks(self, count: int) -> None:
        """Keep so many blocks of a remote split in memory: those that open windows still need."""
        self.reader.cache_blocks = count

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _inverse_weights(self, sample: Sample, expected: int) -> npt.NDArray[np.float32]:
        assert self.read_likelihood is not None
        log_likelihood = self.read_likelihood(sample)
        if log_likelihood is None:
            raise DataError(
                f"sample {sample.key} of split {self.split.name} has no likelihood: run score_clip "
                "and shard_tools merge, or set method.loss to one that ignores none"
            )
        if len(log_likelihood) != expected:
            raise DataError(
                f"sample {sample.key}: likelihood over {len(log_likelihood)} attributes, its "
                f"object has {expected} feasible ones; merge again with the present feasible sets"
            )
        indptr = np.array([0, expected], dtype=np.int64)
        weights = inverse_weights(log_likelihood, indptr)
        # An infinite inverse weight means "cannot be drawn", as 0 does in a dense row.
        return np.where(np.isfinite(weights), weights, np.float32(0))


def _decode(sample: Sample) -> npt.NDArray[np.uint8]:
    try:
        return decode_rgb(sample.jpg)
    except DataError as error:
        raise DataError(f"sample {sample.key}: {error}") from None


def evaluation_batches(
    maker: BatchMaker, rows: npt.NDArray[np.int64], *, batch_size: int
) -> Iterator[Batch]:
    """Batches of the given rows in order, without augmentation, one prepared ahead."""
    pieces: Sequence[npt.NDArray[np.int64]] = [
        rows[start : start + batch_size] for start in range(0, len(rows), batch_size)
    ]

    def make(piece: npt.NDArray[np.int64]) -> Batch:
        zeros = np.zeros(len(piece), dtype=np.int64)
        return maker.make(piece, zeros, zeros.astype(np.bool_))

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead") as ahead:
        following: Future[Batch] | None = None
        for number, piece in enumerate(pieces):
            current = following or ahead.submit(make, piece)
            following = ahead.submit(make, pieces[number + 1]) if number + 1 < len(pieces) else None
            yield current.result()
