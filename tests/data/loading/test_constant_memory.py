"""A dozen epochs leave nothing behind: memory, handles and threads stay where they were."""

import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import S3Server
from tests.fixtures.damaged_tars import upload
from vlal_dist.config.sections import DataConfig, TrainingConfig
from vlal_dist.data.format.dataset import open_dataset, open_split
from vlal_dist.data.loading.batch_builder import BatchBuilder
from vlal_dist.data.loading.disk_cache import DiskCache
from vlal_dist.data.loading.loader import TrainLoader
from vlal_dist.data.loading.shard_reader import ShardReader
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.data.order.epoch_plan import EpochPlan

EPOCHS, WARM = 12, 4


def memory_bytes() -> int:
    """Private memory of this process."""
    text = Path("/proc/self/smaps_rollup").read_text()
    fields = (line.split() for line in text.splitlines() if line.startswith("Private"))
    return sum(int(field[1]) for field in fields) * 1024


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_dozen_epochs_leave_nothing_behind(
    where: str, small: Path, moto_s3: S3Server, tmp_path: Path
) -> None:
    dataset = open_dataset(str(small / "dataset"), cache=tmp_path / "cache")
    if where == "s3":
        root = moto_s3.url()
        upload(dataset, root)
        dataset = open_dataset(root, cache=tmp_path / "cache")
    corpus = ConcatSplits([open_split(dataset, "train")])
    cache = None
    if where == "s3":
        largest = corpus.largest_block
        cache = DiskCache(tmp_path / "c", limit_bytes=4 * largest, largest_bytes=largest)
    builder = BatchBuilder(
        ShardReader(corpus, cache=cache),
        dataset,
        DataConfig(epoch_end="exact"),
    )
    loader = TrainLoader(
        builder,
        EpochPlan(corpus, seed=1),
        TrainingConfig(batch_size=8, seed=1),
    )
    found = []
    for epoch in range(EPOCHS):
        rows = [b.row.numpy().copy() for s in loader.epoch(epoch, 0) for b in s.micro_batches]
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(corpus)))
        gc.collect()
        found.append((memory_bytes(), handles(), threading.active_count()))
    loader.close()
    memory, descriptors, threads = (np.array(column[WARM:]) for column in zip(*found, strict=True))
    assert threads.max() == threads.min(), found
    if (
        where == "local"
    ):  # boto3's pool of connections grows and shrinks with the servers' keep-alive
        assert descriptors.max() == descriptors.min(), found
    else:
        assert descriptors.max() - descriptors.min() <= 64, found
    # A batch of eight is 1.2 MB: one kept per epoch would show as 7 MB, without the largest step,
    # which may be a new thread's arena.
    grown = np.diff(memory)
    assert grown.sum() - grown.max() < 3e6, found
