"""`vlal verify`: check every byte of a dataset against its manifest.

tarfile and webdataset end quietly on a damaged header, so everything is checked: digests and sizes
of all files, the place of every member, every crc32, crop, label and likelihood, and the uids.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shard_tools.shard_writer import dataset_counts, open_engine, open_source, run_tasks
from vlal_dist.config.sections import Config
from vlal_dist.data.format.dataset import Dataset, Split, open_newest, open_split, read_labels
from vlal_dist.data.format.index import check_uids
from vlal_dist.data.format.jpeg import decode_jpeg
from vlal_dist.data.format.sample_reader import Sample, SampleReader
from vlal_dist.data.format.tar import list_members
from vlal_dist.data.hashing import sample_uid, uid_to_hex
from vlal_dist.errors import DataError, NotFoundError
from vlal_dist.program import Counts, Program, only_reads

TOLERANCE = 1e-4

ALONE_BYTES = 64 << 20
"""Size up to which one process verifies a dataset: others take longer to start."""


@dataclass(frozen=True)
class VerifyTask:
    """One shard of a split, by position."""

    root: str
    cache: str
    split: str
    shard: int


def verify(config: Config, flags: Mapping[str, str]) -> Counts:
    """Verify paths.merged where it exists, else paths.dataset; the first fault stops."""
    dataset = open_newest(config.paths)
    splits = {name: open_split(dataset, name) for name in dataset.splits}
    num_bytes = sum(shard.bytes for split in splits.values() for shard in split.shards)
    with open_engine(
        flags,
        workers=config.pack.workers if num_bytes > ALONE_BYTES else None,
        written={},
        read={"the dataset": f"{dataset.url}/dataset.json"},
    ) as engine:
        for split in splits.values():
            _check_files(dataset, split)
        tasks = [
            VerifyTask(dataset.url, os.path.abspath(config.paths.cache), name, shard)
            for name, split in splits.items()
            for shard in range(len(split.shards))
        ]
        run_tasks(
            verify_shard,
            tasks,
            label=f"verify {dataset.url}",
            unit="samples",
            sizes=[splits[task.split].shards[task.shard].samples for task in tasks],
            engine=engine,
        )
    check_uids([split.index for split in splits.values()])
    return {"root": dataset.url, **dataset_counts(dataset.manifest, dataset.digest)}


def verify_shard(task: VerifyTask) -> None:
    """Check the tar of a shard, and each of its samples.

    Raises:
        DataError: the first fault; names shard or sample, and what is wrong.
        StorageError: the shard cannot be read.
    """
    dataset, split = open_source(task.root, task.cache, task.split)
    _check_shard(split, task.shard)
    rows = split.index.rows_of_shard(task.shard)
    labels = read_labels(dataset, split.name, rows=rows).to_pylist()
    reader = SampleReader(split)
    for row, stated in zip(rows, labels, strict=True):
        _check_sample(dataset, split, reader.read(row), stated)


def _check_files(dataset: Dataset, split: Split) -> None:
    entry = dataset.manifest["splits"][split.name]
    for name, expected in entry["files"].items():
        found = hashlib.sha256(dataset.store.read(f"{split.name}/{name}")).hexdigest()
        if found != expected:
            raise DataError(
                f"{dataset.url}/{split.name}/{name}: sha256 {found} where {expected} is expected; "
                "restore it, or pack again"
            )
    if split.annotations is not None:
        return  # the place of the tars is another's, and may hold more
    stated = {f"{split.name}/shards/{shard.name}" for shard in split.shards}
    extra = sorted(set(dataset.store.list_keys(f"{split.name}/shards/")) - stated)
    if extra:
        raise DataError(f"{dataset.url}: {extra[0]} is in no manifest; remove it")


def _check_shard(split: Split, shard: int) -> None:
    """Size, digest, and every member where the index says it is."""
    stated, key = split.shards[shard], split.shard_key(shard)
    where = f"{split.store.url}/{key}"
    try:
        data = split.store.read(key)
    except NotFoundError:
        raise DataError(f"{where} is missing; restore it, or pack again") from None
    found = hashlib.sha256(data).hexdigest()
    if len(data) != stated.bytes or found != stated.sha256:
        raise DataError(
            f"{where}: {len(data)} bytes, sha256 {found}, where {stated.bytes} bytes, "
            f"{stated.sha256} are expected; the shard was altered or cut: restore it, or pack again"
        )
    index = split.index
    rows = index.rows_of_shard(shard)
    expected = sorted(
        (int(index.offset[row]) + offset, length)
        for row in rows
        for offset, length in index.members(row).values()
    )
    members = [(offset, size) for _, offset, size in list_members(data)]
    if split.annotations is not None:  # of a tar of others every sample, but not every member
        held = set(members)
        members = [place for place in expected if place in held]
    if members != expected or len(rows) != stated.samples:
        raise DataError(
            f"{where}: {len(members)} members of {len(rows)} samples do not lie where "
            "index.arrow says; pack again"
        )


def _check_sample(dataset: Dataset, split: Split, sample: Sample, row: Mapping[str, Any]) -> None:
    """Check a sample against the vocabulary, the feasible sets and its row of `labels.parquet`."""
    where = f"{dataset.url}: split {split.name}, sample {sample.key}"
    in_place = split.annotations is not None
    if sample.uid != sample_uid(dataset.name, sample.instance_id):
        uid = uid_to_hex(sample.uid)
        raise DataError(f"{where}: uid {uid} is not that of its instance; pack again")
    width = len(dataset.vocabulary.attributes)
    ids = sample.positive + sample.negative
    if len(set(ids)) != len(ids) or any(not 0 <= one < width for one in ids):
        raise DataError(f"{where}: labels overlap or leave 0..{width - 1}; clean and pack again")
    if any(getattr(sample, name) != stated for name, stated in row.items()):
        raise DataError(f"{where}: labels.parquet differs from the tar; pack again")
    try:
        height, width, _ = decode_jpeg(sample.jpg).shape
        if in_place and sample.box_in_crop != (0, 0, width, height):
            raise DataError(f"a photo of {width}x{height} pixels, annotations.arrow has another")
    except DataError as error:
        raise DataError(
            f"{where}: {error}; pack the photos into a new paths.dataset, which rejects or repairs "
            "those that do not decode"
        ) from None
    if sample.log_likelihood is None:
        return
    expected = len(dataset.feasible.of(sample.object_id))
    total = float(np.exp(sample.log_likelihood.astype(np.float64)).sum())
    if len(sample.log_likelihood) != expected or (
        expected and not abs(total - 1) <= TOLERANCE  # a NaN is not
    ):
        raise DataError(
            f"{where}: likelihood over {len(sample.log_likelihood)} attributes summing to "
            f"{total:.6f}, expected {expected} and 1; merge again"
        )


PROGRAM = Program(
    name="verify",
    usage="vlal verify",
    purpose="Check a dataset end to end: digests, sizes, every tar member, crc32, crop, label and "
    "likelihood. Reads paths.merged if it is finished, else paths.dataset; writes nothing but its "
    "result beside the run.",
    sections=("paths", "pack", "observability"),
    flags=("engine", "json"),
    output=lambda config, flags: config.paths.run,
    writes=only_reads,
    work=verify,
)
