"""Datasets for a training loop of your own: samples by index, or batches in `vlal train`'s order.

Both read roots of merge (or pack) with the reader of `vlal train`: every sample is verified by its
crc32, and images hold the same bits.

Shapes: B rows of a batch, A attributes, S image side.
"""

import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from vlal_dist.config.sections import DataConfig, TrainingConfig
from vlal_dist.data.format.dataset import open_dataset, open_split
from vlal_dist.data.format.jpeg import decode_jpeg
from vlal_dist.data.loading.batch import Batch
from vlal_dist.data.loading.batch_builder import BatchBuilder, BatchRequest
from vlal_dist.data.loading.likelihoods import tar_likelihoods
from vlal_dist.data.loading.loader import Step, TrainLoader
from vlal_dist.data.loading.shard_reader import DamagedError, ShardReader
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.data.order.epoch_plan import EpochPlan
from vlal_dist.data.order.shuffle import BlockRanges
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.processes import launcher_number
from vlal_dist.vocabulary import Vocabulary

Transform = Callable[[Image.Image], Any]


class _Shards:
    """An opened split of a root, and how its samples are read: what both datasets share.

    Only the arguments are pickled; unpickling opens the root again.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        config: DataConfig,
        transform: Transform | None,
        cache: str | Path,
    ) -> None:
        self.root, self.split, self.transform = str(root), split, transform
        self._config, self._cache = config, Path(cache)
        if transform is not None:  # samples come with their JPEG bytes
            self._config = config.model_copy(update={"decode": "gpu"})
        self._open()

    def _open(self) -> None:
        self._dataset = open_dataset(self.root, cache=self._cache)
        self._corpus = ConcatSplits([open_split(self._dataset, self.split)])

    @property
    def vocabulary(self) -> Vocabulary:
        """Names of objects and attributes, and groups of attributes."""
        return self._dataset.vocabulary

    @property
    def feasible(self) -> FeasibleSets:
        """Omega_o of every object (Sec. 2.2), as `SelectiveLoss(feasible=...)` takes it."""
        return self._dataset.feasible

    @property
    def objects(self) -> tuple[str, ...]:
        """Name of each `object_id`."""
        return self._dataset.vocabulary.objects

    @property
    def attributes(self) -> tuple[str, ...]:
        """Name of each column of `labels` and `likelihood`."""
        return self._dataset.vocabulary.attributes

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_dataset", "_corpus", "_builder")
        kept = {name: value for name, value in vars(self).items() if name not in dropped}
        return {**kept, "_digest": self._dataset.digest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        digest = state.pop("_digest")
        vars(self).update(state)
        self._open()
        if self._dataset.digest != digest:
            raise DataError(
                f"{self.root}: dataset.json has sha256 {self._dataset.digest}, it was {digest} in "
                "the process that opened the root; start again with the present root"
            )

    def _make_builder(self) -> BatchBuilder:
        likelihood = self._dataset.manifest.get("likelihood")
        merged = likelihood is not None and self.split in likelihood["splits"]
        return BatchBuilder(
            ShardReader(self._corpus),
            self._dataset,
            self._config,
            training=self.transform is not None,
            read_likelihoods=tar_likelihoods if merged else None,
        )

    def _images(self, builder: BatchBuilder, batch: Batch) -> Tensor | list[Any]:
        """Decoded images, mirrored where the batch says so; or what the transform makes of them."""
        if self.transform is None:
            # Row by row takes a thirtieth of the time of an index at 224 x 224.
            for row in batch.flip.nonzero().flatten().tolist():
                batch.image[row] = batch.image[row].flip(-1)
            return batch.image
        found = []
        for jpg, row in zip(batch.jpgs or [], batch.row, strict=True):
            try:
                photo = Image.fromarray(decode_jpeg(jpg))
            except DataError as error:
                at = builder.reader.locate(row.numpy()[None])
                damage = builder.reader.damage(at, 0, str(error), as_packed=True)
                raise _refusal(DamagedError(damage)) from None
            found.append(self.transform(photo))
        return found

    def _fields(self, batch: Batch) -> dict[str, Tensor]:
        """Everything but the images."""
        fields = {"object_id": batch.object_id, "labels": batch.label, "sample_id": batch.uid}
        if batch.weight_indptr is not None and batch.inverse_weight is not None:
            fields["likelihood"] = likelihoods(
                batch.weight_indptr,
                batch.inverse_weight,
                object_id=batch.object_id,
                feasible=self.feasible,
                num_attributes=len(self.attributes),
            )
        return fields


def likelihoods(
    indptr: Tensor,
    inverse_weight: Tensor,
    *,
    object_id: Tensor,
    feasible: FeasibleSets,
    num_attributes: int,
) -> Tensor:
    """Eq. (2) as a matrix, from a batch's inverse weights (max g / g).

    In float64 the quotient max g / g rounds back to the same float32 inverse weights, so that a
    draw by the result is the draw of `vlal train`, bit for bit.

    Args:
        indptr: int64 [B + 1], rows of `inverse_weight`.
        inverse_weight: float32 [F], each row over its object's set, in the set's order.
        object_id: int64 [B].
        feasible: Omega_o of all objects.
        num_attributes: A.

    Returns:
        float64 [B, A]: each row sums to 1 over its object's set, and is 0 elsewhere and where
        nothing can be drawn.
    """
    starts, objects = indptr.numpy(), object_id.numpy()
    weight = inverse_weight.numpy().astype(np.float64)
    row = np.repeat(np.arange(len(objects)), np.diff(starts))
    place = np.arange(len(weight)) + (feasible.indptr[objects] - starts[:-1])[row]
    value = np.divide(1.0, weight, out=np.zeros_like(weight), where=np.isfinite(weight))
    total = np.bincount(row, weights=value, minlength=len(objects))[row]
    dense = np.zeros((len(objects), num_attributes))
    dense[row, feasible.indices[place]] = np.divide(value, total, out=value, where=total > 0)
    return torch.from_numpy(dense)


def _refusal(error: DamagedError) -> DataError:
    """The error of a damaged sample, in a type that a DataLoader can raise again."""
    return DataError(f"{error.damage}; {error.damage.remedy}")


class ShardDataset(_Shards, Dataset[dict[str, Any]]):
    """The samples of a split by index, for `torch.utils.data.DataLoader`.

    An item is a dict:

    - `image`: uint8 [3, S, S], the bits that `vlal train` decodes; or what `transform` returned;
    - `labels`: int8 [A], +1 annotated present, -1 annotated absent, 0 unannotated;
    - `object_id`: int, index of `objects`;
    - `sample_id`: int, the bits of the sample's 64-bit name as int64, which key draws;
    - `likelihood`: float64 [A], Eq. (2), sums to 1 over the object's feasible set and is 0
      elsewhere; absent where the root's samples carry none (pack; a split that was not scored).

    Safe with any start method of workers: each process opens the shards itself, on first use. A
    DataLoader reads a batch in one call. Of a remote root exactly the bytes of each sample are
    fetched, 16 requests at a time; `ShardStream` reads it in larger pieces.

    Args:
        root: folder or URL (`s3://bucket/prefix`) that merge or pack wrote.
        split: name.
        image_size: S, pixels, at least 64: crops are resized to squares (bilinear, antialiased).
        transform: called with each crop as stored (a PIL image, RGB) instead of the resize.
        cache: local folder for the index of a remote root.

    Raises:
        DataError: no such root or split, or damaged files; when a sample is read, one that was
            altered or cannot be decoded, by shard, sample and reason.
        StorageError: the store cannot be read.
        ValueError: `image_size` out of range.

    Example:
        >>> import vlal_dist as vlal
        >>> from torch.utils.data import DataLoader
        >>> dataset = vlal.ShardDataset(root, split="train", image_size=64)
        >>> dataset[0]["image"].shape
        torch.Size([3, 64, 64])
        >>> batch = next(iter(DataLoader(dataset, batch_size=8, shuffle=True)))
        >>> batch["labels"].shape == (8, len(dataset.attributes))
        True
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        image_size: int = 224,
        transform: Transform | None = None,
        cache: str | Path = "runs/cache",
    ) -> None:
        config = DataConfig(image_size=image_size)
        super().__init__(root, split, config=config, transform=transform, cache=cache)
        self._builder: tuple[int, BatchBuilder] | None = None

    def __len__(self) -> int:
        return len(self._corpus)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample; negative indices count from the end."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several samples, read and decoded together."""
        rows = np.array([operator.index(one) for one in indices], dtype=np.int64)
        wrong = rows[(rows < -len(self)) | (rows >= len(self))]
        if len(wrong):
            raise IndexError(f"index {wrong[0]} of a dataset of {len(self)} samples")
        builder = self._builder_here()
        batch = self._read(builder, rows % len(self))
        images, fields = self._images(builder, batch), self._fields(batch)
        plain = {name: fields.pop(name).tolist() for name in ("object_id", "sample_id")}
        return [
            {"image": images[n]}
            | {name: rows[n] for name, rows in fields.items()}
            | {name: values[n] for name, values in plain.items()}
            for n in range(len(batch))
        ]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._builder = None

    def _read(self, builder: BatchBuilder, rows: Any) -> Batch:
        reader = builder.reader
        # Each remote sample is a range of its own, dropped from memory right after its use.
        blocks = BlockRanges(rows, rows + 1, np.zeros_like(rows))
        if reader.remote:
            reader.prefetch(rows, blocks)
        try:
            return builder.start(BatchRequest.plain(reader.locate(rows, blocks))).result().batch
        except DamagedError as error:
            raise _refusal(error) from None
        finally:
            reader.prefetcher.retire(0)

    def _builder_here(self) -> BatchBuilder:
        """The batch builder of this process: threads do not outlive a fork."""
        if self._builder is None or self._builder[0] != os.getpid():
            self._builder = os.getpid(), self._make_builder()
        return self._builder[1]


class ShardStream(_Shards, IterableDataset[dict[str, Any]]):
    """The batches of an epoch in the order of `vlal train`, flips included.

    Iterate it directly (threads read and decode ahead), or with
    `DataLoader(stream, batch_size=None, num_workers=N)`. A batch is a dict of tensors:

    - `image`: uint8 [B, 3, S, S], mirrored with probability 1/2 as keyed by seed, sample and epoch;
      or the collated results of `transform`, which mirrors by itself if it is to;
    - `labels`: int8 [B, A]; `object_id`, `sample_id`: int64 [B]; `likelihood`: float64 [B, A];
      as in `ShardDataset`;
    - `epoch`: int64 [B], which visit to the sample this is; with `sample_id` it keys the draws;
    - `position`: int64 [2], epoch, and visits of it consumed after this batch, over all ranks.

    An iterator goes from the stream's position to the end of the epoch, whose incomplete last batch
    is left out; `len` is the number of batches of a whole epoch. Call `set_epoch` before each
    epoch, as with torch's DistributedSampler; without it the same batches come again. The order
    is a function of seed, epoch and root: not of workers, threads or ranks (docs/stream.md).

    Each rank gets its rows of every global batch; ranks differ by a few rows where their number
    does not divide `batch_size` or 240.

    Of a local root any number of workers share the work. Of a remote one each worker fetches the
    block ranges of its own batches, so that N workers fetch nearly everything N times: use
    `num_workers` 0 or 1 there, threads do the fetching.

    Args:
        root: folder or URL (`s3://bucket/prefix`) that merge or pack wrote.
        split: name.
        batch_size: rows of a batch, over all ranks.
        seed: of order and flips (`training.seed`).
        rank, world_size: None: those of torch.distributed; before it is initialised, those in the
            environment (RANK, WORLD_SIZE); without either, one rank.
        image_size: S, pixels, at least 64.
        transform: called with each crop as stored (a PIL image, RGB) instead of resize and flip;
            a random one is not repeated at a resume.
        threads: decoding threads of each process that reads.
        cache: local folder for the index of a remote root.

    Raises:
        ConfigError: more ranks than the order has lanes, or a batch larger than the split.
        DataError, StorageError, ValueError: as `ShardDataset`.

    Example:
        >>> import vlal_dist as vlal
        >>> stream = vlal.ShardStream(root, batch_size=16, image_size=64)
        >>> for epoch in range(stream.epoch, 2):
        ...     stream.set_epoch(epoch)
        ...     for batch in stream:
        ...         state = stream.state_dict(batch)
        >>> state["epoch"], state["position"] == len(stream) * 16
        (1, True)
        >>> stream.load_state_dict(state)
        >>> len(list(stream))
        0
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        batch_size: int = 64,
        seed: int = 99,
        rank: int | None = None,
        world_size: int | None = None,
        image_size: int = 224,
        transform: Transform | None = None,
        threads: int = 2,
        cache: str | Path = "runs/cache",
    ) -> None:
        config = DataConfig(image_size=image_size, threads=threads)
        super().__init__(root, split, config=config, transform=transform, cache=cache)
        self._training = TrainingConfig(batch_size=batch_size, seed=seed)
        self._rank, self._world_size = _place(rank, world_size)
        if batch_size > len(self._corpus):
            raise ConfigError(
                f"batch_size {batch_size} exceeds the {len(self._corpus)} samples of split "
                f"{split!r}; lower it"
            )
        with closing(self._loader(lanes=0)) as loader:
            lanes = loader.lanes
        # Epoch, visits consumed at the start, lanes, and whether workers iterate. Shared, so that
        # workers that stay alive between epochs see them.
        self._shared = _shared(torch.tensor([0, 0, lanes, 0]))
        self._after: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self._corpus) // self._training.batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        self._shared[3] = worker is not None
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch, start, lanes, _ = self._shared.tolist()
        self._after = None
        return self._batches(epoch, start, lanes=lanes, first=first, every=every)

    def _batches(
        self, epoch: int, start: int, *, lanes: int, first: int, every: int
    ) -> Iterator[dict[str, Any]]:
        with closing(self._loader(lanes=lanes)) as loader:
            steps = loader.epoch(epoch, start, first=first, every=every)
            while True:
                try:
                    step = next(steps, None)
                except DamagedError as error:
                    raise _refusal(error) from None
                if step is None:
                    return
                self._after = epoch, step.position
                yield self._batch(loader.builder, step, epoch)

    def _batch(self, builder: BatchBuilder, step: Step, epoch: int) -> dict[str, Any]:
        (batch,) = step.micro_batches
        image = self._images(builder, batch)
        if isinstance(image, list):
            image = default_collate(image) if image else torch.empty(0)
        position = torch.tensor([epoch, step.position])
        return {
            "image": image, **self._fields(batch), "epoch": batch.visit, "position": position
        }  # fmt: skip

    def _loader(self, *, lanes: int) -> TrainLoader:
        return TrainLoader(
            self._make_builder(),
            EpochPlan(self._corpus, seed=self._training.seed),
            self._training,
            rank=self._rank,
            world_size=self._world_size,
            lanes=lanes,
            micro_batches=1,
        )

    @property
    def epoch(self) -> int:
        """The epoch of the next iterator, 0-based."""
        return int(self._shared[0])

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; if it is the present one, its position is kept.

        Args:
            epoch: 0-based.
        """
        if epoch < 0:
            raise ValueError(f"epoch {epoch}; epochs count from 0")
        if epoch != self.epoch:
            self._go_to(epoch, 0)

    def state_dict(self, batch: Mapping[str, Any] | None = None) -> dict[str, int | str]:
        """Position in the stream, for `load_state_dict`: a dict of integers and texts.

        Args:
            batch: the last batch that was trained on. None: the last one that this stream yielded;
                workers of a DataLoader run ahead, so with them the batch is needed.

        Raises:
            ValueError: no batch, but workers iterate; or batches that were collated again.
        """
        if batch is not None:
            if batch["position"].shape != (2,):
                raise ValueError(
                    f"the batch's position has shape {list(batch['position'].shape)}; give a batch "
                    "as the stream yields it: DataLoader(stream, batch_size=None)"
                )
            epoch, position = batch["position"].tolist()
        elif self._shared[3]:
            raise ValueError(
                "workers of a DataLoader read ahead: give the last batch that was trained on, "
                "state_dict(batch)"
            )
        else:
            epoch, position = self._after or self._shared[:2].tolist()
        lanes = int(self._shared[2])
        return {"epoch": epoch, "position": position, "lanes": lanes, **self._binding()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after a batch; numbers of ranks, workers and threads may be others.

        Args:
            state: from `state_dict`.

        Raises:
            ConfigError: more ranks than the state's order has lanes.
            DataError: the state of another root, split, seed or batch size.
        """
        for name, own in self._binding().items():
            if state.get(name) != own:
                raise DataError(
                    f"the stream's {name} is {own}, the state has {state.get(name)}; open the "
                    "stream as when the state was saved, or begin without the state"
                )
        if not 0 <= state["position"] <= len(self._corpus):
            raise DataError(
                f"the state's position is {state['position']}, the split has {len(self._corpus)} "
                "samples; begin without the state"
            )
        self._loader(lanes=state["lanes"]).close()  # refuses too many ranks
        self._shared[2] = state["lanes"]
        self._go_to(state["epoch"], state["position"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._shared = _shared(self._shared)

    def _go_to(self, epoch: int, position: int) -> None:
        self._after = None
        self._shared[0], self._shared[1], self._shared[3] = epoch, position, 0

    def _binding(self) -> dict[str, int | str]:
        """What a state is bound to."""
        return {
            "batch_size": self._training.batch_size,
            "seed": self._training.seed,
            "split": self.split,
            "digest": self._dataset.digest,
        }


def _shared(values: Tensor) -> Tensor:
    """The same values in memory that worker processes share."""
    return values.share_memory_()  # type: ignore[no-any-return, no-untyped-call]


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """The given rank and number of ranks, or those of this process."""
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank is {rank}, world_size is {world_size}; give both, or neither")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            rank, world_size = (launcher_number(*one) for one in _LAUNCHERS)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}; ranks count from 0")
    return rank, world_size


_LAUNCHERS = (("RANK", 0), ("WORLD_SIZE", 1))
"""Variables that torchrun sets, and their values without it."""
