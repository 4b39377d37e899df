"""Batches and the training stream of a small dataset: equal content on every layout."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import S3Server
from tests.fixtures.damaged_tars import upload
from vlal_dist.config.sections import DataConfig, TrainingConfig
from vlal_dist.data.format.dataset import Dataset, open_dataset, open_split
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.data.loading.batch import Batch, decoded, on_device
from vlal_dist.data.loading.batch_builder import BatchBuilder, BatchRequest
from vlal_dist.data.loading.decode import decode_into
from vlal_dist.data.loading.likelihoods import tar_likelihoods
from vlal_dist.data.loading.loader import TrainLoader, evaluation_batches
from vlal_dist.data.loading.shard_reader import ShardReader
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.data.order.epoch_plan import EpochPlan
from vlal_dist.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def merged(small: Path) -> Dataset:
    return open_dataset(str(small / "merged"), cache=small / "cache")


def make(
    dataset: Dataset,
    split: str = "train",
    likelihoods: Any = tar_likelihoods,
    **data: Any,
) -> BatchBuilder:
    return BatchBuilder(
        ShardReader(ConcatSplits([open_split(dataset, split)])),
        dataset,
        DataConfig(image_size=64, **data),
        training=True,
        read_likelihoods=likelihoods,
    )


def batch_of(builder: BatchBuilder, rows: Any, visit: Any, flip: Any) -> Batch:
    at = builder.reader.locate(rows)
    return builder.start(BatchRequest(at, rows, visit, flip)).result().batch


def loader(
    dataset: Dataset,
    rank: int = 0,
    world_size: int = 1,
    *,
    batch_size: int = 16,
    seed: int = 3,
    epoch_end: str = "drop",
    **first: int,
) -> TrainLoader:
    builder = make(dataset, epoch_end=epoch_end)
    plan = EpochPlan(builder.reader.corpus, seed=seed)
    training = TrainingConfig(batch_size=batch_size, seed=seed)
    return TrainLoader(builder, plan, training, rank=rank, world_size=world_size, **first)


def samples(steps: Iterator[Any]) -> list[dict[tuple[int, int], torch.Tensor]]:
    """Per step: (uid, visit) -> image."""
    return [
        {
            (int(uid), int(visit)): image
            for batch in (on_device(one, torch.device("cpu")) for one in step.micro_batches)
            for uid, visit, image in zip(batch.uid, batch.visit, batch.image, strict=True)
        }
        for step in steps
    ]


@pytest.mark.parametrize("places", [0, 10, 1000])
def test_cached_images_equal_decoded_ones(
    merged: Dataset, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]

    def decode(jpg: memoryview, out: Any) -> None:
        calls[0] += 1
        decode_into(jpg, out)

    monkeypatch.setattr("vlal_dist.data.loading.batch_builder.decode_into", decode)
    plain = make(merged)
    rows = np.arange(len(plain.reader.corpus))
    visit, flip = np.zeros(len(rows), np.int64), rows % 2 == 0
    keeping = make(merged, decoded_bytes=places * 64 * 64 * 3 + 5)
    kept = keeping.image_cache
    assert kept is not None
    expected = batch_of(plain, rows, visit, flip).image.clone()
    for order in (rows, rows[::-1].copy(), rows):
        calls[0] = 0
        batch = batch_of(keeping, order, visit, flip[order])
        assert torch.equal(batch.image, expected[torch.from_numpy(order)])
        on_device(batch, torch.device("cpu"))  # mirroring must not change the cache
    assert len(kept) == min(places, len(rows))
    assert calls[0] == len(rows) - len(kept)
    plain.close()
    keeping.close()


def test_a_batch_holds_the_contents_of_its_samples(merged: Dataset) -> None:
    builder = make(merged)
    rows = np.array([5, 0, 7])
    cpu = torch.device("cpu")
    batch = batch_of(builder, rows, np.zeros(3, np.int64), np.array([False, True, False]))
    assert batch.image.dtype == torch.uint8
    batch = on_device(batch, cpu)
    plain = on_device(batch_of(builder, rows, np.zeros(3, np.int64), np.zeros(3, np.bool_)), cpu)
    assert batch.image.shape == (3, 3, 64, 64) and batch.image.dtype == torch.float32
    assert float(batch.image.min()) >= 0 and float(batch.image.max()) <= 1
    assert torch.equal(batch.image[1], plain.image[1].flip(2))
    for place, row in enumerate(rows):
        sample = SampleReader(builder.reader.corpus.splits[0]).read(int(row))
        assert torch.where(batch.label[place] == 1)[0].tolist() == sample.positive
        assert torch.where(batch.label[place] == -1)[0].tolist() == sample.negative
        assert int(batch.object_id[place]) == sample.object_id
        assert batch.weight_indptr is not None and batch.inverse_weight is not None
        found = batch.inverse_weight[slice(*batch.weight_indptr[place : place + 2].tolist())]
        assert sample.log_likelihood is not None
        assert len(found) == len(merged.feasible.of(sample.object_id))
        weight = np.exp(sample.log_likelihood.max() - sample.log_likelihood)
        assert np.allclose(found.numpy(), weight, rtol=1e-5)
    builder.close()


def test_a_likelihood_over_another_feasible_set_is_refused(merged: Dataset) -> None:
    def longer(rows: Any, parts: Any) -> Any:
        values, indptr = tar_likelihoods(rows, parts)
        return np.append(values, np.float32(0)), indptr + (np.arange(len(indptr)) == len(rows))

    builder = make(merged, likelihoods=longer)
    rows, zeros = np.array([5, 0, 7]), np.zeros(3, np.int64)
    uid = int(builder.reader.corpus.column("uid", rows)[2])
    with pytest.raises(DataError, match=rf"{uid:016x}: likelihood over \d+ attr.*merge again"):
        batch_of(builder, rows, zeros, zeros.astype(np.bool_))
    builder.close()


def test_jpegs_that_the_device_decodes_are_in_the_batch(merged: Dataset) -> None:
    ready, later = make(merged), make(merged, decode="gpu")
    rows, zeros = np.arange(5), np.zeros(5, np.int64)
    batches = [batch_of(one, rows, zeros, np.ones(5, np.bool_)) for one in (ready, later)]
    assert batches[1].image.shape == (0, 3, 64, 64) and len(batches[1].jpgs or []) == 5
    cpu = torch.device("cpu")
    images = [on_device(decoded(batch, cpu), cpu).image for batch in batches]
    assert (images[0] - images[1]).abs().max() <= 1.01 / 255
    assert torch.equal(batches[0].label, batches[1].label)
    for one in (ready, later):
        one.close()


def test_every_layout_sees_the_same_samples_and_pixels(merged: Dataset) -> None:
    one = loader(merged, lanes=8, micro_batches=4)
    whole = samples(one.epoch(1, 0))
    assert sum(map(len, whole)) == one.end_of_epoch(1, 0) == 64
    for world in (2, 3, 4):
        parts = [loader(merged, rank, world, lanes=8, micro_batches=4) for rank in range(world)]
        for step, per_rank in enumerate(
            zip(*(samples(part.epoch(1, 0)) for part in parts), strict=True)
        ):
            together = {key: image for rank in per_rank for key, image in rank.items()}
            assert together.keys() == whole[step].keys()
            assert all(torch.equal(image, whole[step][key]) for key, image in together.items())
        for part in parts:
            part.close()
    one.close()


def test_resuming_at_a_sample_continues_the_epoch(merged: Dataset) -> None:
    one = loader(merged)
    whole = samples(one.epoch(0, 0))
    assert [set(step) for step in samples(one.epoch(0, 32))] == [set(step) for step in whole[2:]]
    one.close()


def test_visits_change_flips_and_seeds_change_order(merged: Dataset) -> None:
    one, other = loader(merged), loader(merged, seed=4)
    first, second = samples(one.epoch(0, 0)), samples(one.epoch(1, 0))
    images = [
        {uid: image for step in epoch for (uid, _), image in step.items()}
        for epoch in (first, second)
    ]
    both = images[0].keys() & images[1].keys()
    equal = sum(torch.equal(images[0][uid], images[1][uid]) for uid in both)
    assert 0.2 * len(both) < equal < 0.8 * len(both)
    assert list(first[0]) != list(samples(other.epoch(0, 0))[0])
    one.close()
    other.close()


def test_the_exact_end_keeps_every_sample(merged: Dataset) -> None:
    exact = loader(merged, epoch_end="exact", batch_size=20)
    steps = list(exact.epoch(0, 0))
    assert [step.samples for step in steps] == [20, 20, 20, 12] and steps[-1].position == 72
    exact.close()


def test_a_resume_with_another_batch_size_still_drops_the_incomplete_batch(
    merged: Dataset,
) -> None:
    other = loader(merged, batch_size=20)
    assert [step.samples for step in other.epoch(0, 16)] == [20, 20]
    assert other.end_of_epoch(0, 16) == 56 and other.end_of_epoch(0, 0) == 60
    other.close()


def test_ranks_without_rows_still_have_their_micro_batches(merged: Dataset) -> None:
    ranks = [loader(merged, rank, 5, lanes=8, micro_batches=1, batch_size=3) for rank in range(5)]
    for rank, one in enumerate(ranks):
        step = next(one.epoch(0, 0))
        assert len(step.micro_batches) == 1
        assert len(step.micro_batches[0]) == (1 if rank < 3 else 0), rank
        one.close()


def test_impossible_settings_are_refused(merged: Dataset) -> None:
    with pytest.raises(ConfigError, match="lower it"):
        loader(merged, batch_size=100)
    with pytest.raises(ConfigError, match="at most 2 ranks"):
        loader(merged, 0, 3, lanes=2)


def test_training_on_samples_without_likelihood_says_what_to_do(merged: Dataset) -> None:
    builder = make(merged, "val")
    with pytest.raises(DataError, match="run vlal score and vlal merge"):
        batch_of(builder, np.array([0]), np.zeros(1, np.int64), np.zeros(1, np.bool_))
    builder.close()


def test_a_remote_epoch_fetches_each_block_once(
    merged: Dataset, moto_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = moto_s3.url()
    upload(merged, root)
    dataset = open_dataset(root, cache=tmp_path / "cache")
    builder = make(dataset, likelihoods=None, epoch_end="exact")
    plan = EpochPlan(builder.reader.corpus, seed=3)
    one = TrainLoader(builder, plan, TrainingConfig(batch_size=16, seed=3))
    fetched: list[int] = []
    (split,) = builder.reader.corpus.splits
    read = type(split.store).read

    def counting(store: Any, key: str, **where: Any) -> bytes:
        fetched.append(where["offset"])
        return read(store, key, **where)

    monkeypatch.setattr(type(split.store), "read", counting)
    assert sum(len(step) for step in samples(one.epoch(0, 0))) == 72
    assert one.lanes > 1 and len(split.blocks) <= len(fetched) < len(split.blocks) + one.lanes
    one.close()


def test_evaluation_goes_through_the_rows_in_order(merged: Dataset) -> None:
    builder = make(merged, "test", None)
    rows = np.arange(1, 24, 2)
    batches = list(evaluation_batches(builder, rows, batch_size=5))
    assert torch.cat([batch.row for batch in batches]).tolist() == rows.tolist()
    assert [len(batch) for batch in batches] == [5, 5, 2]
    assert batches[0].inverse_weight is None
    builder.close()
