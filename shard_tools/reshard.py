"""`python -m shard_tools reshard`: the same samples, in the same order, in tars of another size.

A sample's tar bytes are copied verbatim after their crc32 check, so uids, keys, labels, likelihoods
and the offsets of members within a sample stay; which sample goes where follows from the source's
index alone. The result depends on the samples and the sizes, not on how they were cut before. The
unit of work is a shard of the target; a killed reshard continues.
"""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from shard_tools.shard_writer import (
    SampleLabels,
    ShardPart,
    TarBuilder,
    commit_dataset,
    commit_shard,
    part_key,
    run_tasks,
    shard_name,
)
from vlal_dist.config.sections import Config
from vlal_dist.data.format.dataset import (
    Dataset,
    Split,
    check_digest,
    check_shard_sizes,
    open_dataset,
    open_split,
    read_labels,
)
from vlal_dist.data.format.index import (
    Array,
    Index,
    Shard,
    encode_blocks,
    encode_index,
    encode_shards,
    form_blocks,
)
from vlal_dist.data.format.tar import EncodedSample, key_of
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.program import Counts, Program
from vlal_dist.storage.checks import sha256_of
from vlal_dist.storage.store import Store, fetch, open_store

READ_BYTES = 8 << 20
"""Bytes at which one ranged read of the source ends; a worker's memory is a few of these."""

KEPT = ("labels.parquet", "rejects.parquet")
"""Files of a split that do not depend on how it is cut."""

Run = tuple[int, int]
"""Neighbouring rows of an index: the first, and the one after the last."""


@dataclass(frozen=True)
class ReshardTask:
    """One shard of the target: rows first..stop-1 of the source's split."""

    source: str
    cache: str
    target: str
    split: str
    number: int
    first: int
    stop: int


def reshard(config: Config, flags: Mapping[str, str]) -> Counts:
    """Write the samples of paths.merged where it exists, else of paths.dataset, in other shards."""
    source, cache = config.paths.merged, Path(config.paths.cache)
    if not open_store(source).exists("dataset.json"):
        source = config.paths.dataset
    target = open_target(config.paths.resharded, source=source)
    dataset = open_dataset(source, cache=cache)
    splits = {name: open_split(dataset, name) for name in dataset.splits}
    kept = {name: _kept_files(dataset, name) for name in splits}
    for split in splits.values():
        check_shard_sizes(split)
    settings = {
        "source_digest": dataset.digest,
        "shard_bytes": config.pack.shard_bytes,
        "block_bytes": config.pack.block_bytes,
    }
    # Committed first: a rerun with other sizes must not continue this one's shards.
    target.create("reshard.json", (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
    runs = {
        name: cut_runs(split.index.length, size_bytes=config.pack.shard_bytes)
        for name, split in splits.items()
    }
    tasks = [
        ReshardTask(source, str(cache), config.paths.resharded, name, number, first, stop)
        for name, cuts in runs.items()
        for number, (first, stop) in enumerate(cuts)
    ]
    found = run_tasks(
        reshard_shard,
        tasks,
        label="reshard",
        unit="samples",
        sizes=[task.stop - task.first for task in tasks],
        workers=config.pack.workers,
    )
    for name in ("vocabulary.json", "feasible.npz"):
        target.create(name, dataset.store.read(name))
    manifest = {key: value for key, value in dataset.manifest.items() if key != "format"}
    manifest["splits"] = {}
    for name, split in splits.items():
        shards = [one for task, one in zip(tasks, found, strict=True) if task.split == name]
        index = place_samples(split.index, runs[name])
        files = _commit_files(target, name, shards, index, kept[name], config.pack.block_bytes)
        sizes = {"shards": len(shards), "bytes": sum(shard.bytes for shard in shards)}
        manifest["splits"][name] = {**dataset.manifest["splits"][name], **sizes, "files": files}
    digest = commit_dataset(target, manifest)
    entries = manifest["splits"]
    return {
        "source": source,
        "samples": {name: entry["samples"] for name, entry in entries.items()},
        "shards": sum(entry["shards"] for entry in entries.values()),
        "bytes": sum(entry["bytes"] for entry in entries.values()),
        "dataset": digest[:16],
    }


def open_target(url: str, *, source: str) -> Store:
    """Open the root to write.

    Raises:
        ConfigError: it is the source, or a root that pack or merge writes.
    """
    target = open_store(url)
    if target.url == open_store(source).url:
        raise ConfigError(
            f"paths.resharded {url} is the root that is read: samples are written to a root of "
            "their own, nothing is edited in place; choose another paths.resharded"
        )
    for name in ("pack.json", "merge.json"):
        if target.exists(name):
            raise ConfigError(
                f"paths.resharded {url} holds {name}, so another dataset is written there; choose "
                "a root of its own"
            )
    return target


def cut_runs(length: Array, *, size_bytes: int) -> list[Run]:
    """Cut samples into runs that end at the first sample to reach a size; the last may be smaller.

    Args:
        length: uint32 [n], bytes of each sample.
        size_bytes: the size.
    """
    ends = np.cumsum(length, dtype=np.int64)
    runs: list[Run] = []
    first, done = 0, 0
    while first < len(ends):
        stop = min(int(np.searchsorted(ends, done + size_bytes)) + 1, len(ends))
        runs.append((first, stop))
        first, done = stop, int(ends[stop - 1])
    return runs


def place_samples(index: Index, runs: Sequence[Run]) -> Index:
    """The index of the same samples when each run is a shard: only shard and offset change."""
    length = index.length.astype(np.uint64)
    start = np.cumsum(length, dtype=np.uint64) - length
    bounds = np.asarray(runs, dtype=np.int64).reshape(-1, 2)
    samples = bounds[:, 1] - bounds[:, 0]
    shard = np.repeat(np.arange(len(runs), dtype=np.uint32), samples)
    return replace(index, shard=shard, offset=start - np.repeat(start[bounds[:, 0]], samples))


def reshard_shard(task: ReshardTask) -> Shard:
    """Write and commit one shard, unless its part file says that it is there already."""
    dataset, split = _open(task.source, task.cache, task.split)
    target, name = open_store(task.target), shard_name(task.split, task.number)
    key = part_key(task.split, name)
    if target.exists(key):
        part = ShardPart.decode(target.read(key))
    else:
        with TarBuilder(name) as builder:
            for row, data in read_samples(dataset, split, task.first, task.stop):
                _add(builder, split.index, row, data)
            part = commit_shard(target, task.split, builder)
    return Shard(part.name, part.size_bytes, part.sha256, part.samples)


@lru_cache(maxsize=1)
def _open(source: str, cache: str, split: str) -> tuple[Dataset, Split]:
    # Kept per process: the tasks of a split follow each other.
    dataset = open_dataset(source, cache=Path(cache))
    return dataset, open_split(dataset, split)


def read_samples(
    dataset: Dataset, split: Split, first: int, stop: int
) -> Iterator[tuple[int, bytes]]:
    """Row and tar range of the samples first..stop-1, checked by crc32, read many at a time.

    Raises:
        DataError: a sample's bytes are not those that were packed; names shard, sample and check.
        StorageError: a shard cannot be read.
    """
    index = split.index
    for begin, end in _reads(index, first, stop):
        offsets, lengths = index.offset[begin:end].tolist(), index.length[begin:end].tolist()
        crcs = index.crc32[begin:end].tolist()
        size = offsets[-1] + lengths[-1] - offsets[0]
        key = split.shard_key(int(index.shard[begin]))
        data = split.store.read(key, offset=offsets[0], length=size)
        for place, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
            start = offset - offsets[0]
            sample = data[start : start + length]
            row, crc32 = begin + place, zlib.crc32(sample)
            if crc32 != crcs[place]:
                name = read_labels(dataset, split.name)["key"][row].as_py()
                raise DataError(
                    f"{dataset.url}/{key}: sample {name} (row {row}): crc32 {crc32:08x} where "
                    f"{crcs[place]:08x} is expected; the shard was altered: restore it, or pack "
                    "the dataset again"
                )
            yield row, sample


def _reads(index: Index, first: int, stop: int) -> Iterator[Run]:
    """Runs of one source shard each, of about READ_BYTES: neighbours in a shard are adjacent."""
    while first < stop:
        last = int(np.searchsorted(index.shard, index.shard[first], side="right"))
        within = min(last, stop)
        for begin, end in cut_runs(index.length[first:within], size_bytes=READ_BYTES):
            yield first + begin, first + end
        first = within


def _add(builder: TarBuilder, index: Index, row: int, data: bytes) -> None:
    """Append a sample as it is; its part file's entry says what pack's or merge's said."""
    members = index.members(row)
    offset, length = members["json"]
    meta = json.loads(data[offset : offset + length])
    labels = SampleLabels(key_of(data), meta["instance_id"], meta["positive"], meta["negative"])
    sample = EncodedSample(data, members, int(index.crc32[row]))
    builder.add(int(index.uid[row]), int(index.object_id[row]), sample, labels)


def _kept_files(dataset: Dataset, split: str) -> dict[str, Path]:
    """Local files of KEPT, checked against their digests."""
    files = {}
    for name in KEPT:
        expected = dataset.manifest["splits"][split]["files"][name]
        files[name] = fetch(dataset.store, f"{split}/{name}", cache=dataset.cache, sha256=expected)
        check_digest(f"{dataset.url}/{split}/{name}", expected, sha256_of(files[name]))
    return files


def _commit_files(
    target: Store,
    split: str,
    shards: Sequence[Shard],
    index: Index,
    kept: Mapping[str, Path],
    block_bytes: int,
) -> dict[str, str]:
    """Write the files beside a split's shards; their digests by name."""
    contents: dict[str, bytes | Path] = {
        "shards.parquet": encode_shards(shards),
        "index.arrow": encode_index(index),
        "blocks.arrow": encode_blocks(form_blocks(index, block_bytes=block_bytes)),
        **kept,
    }
    for name, data in contents.items():
        target.create(f"{split}/{name}", data)
    return {name: sha256_of(data) for name, data in contents.items()}


PROGRAM = Program(
    name="reshard",
    usage="python -m shard_tools reshard",
    purpose="""Write the same samples, in the same order, in shards and blocks of other sizes
(pack.shard_bytes, pack.block_bytes). Reads paths.merged if it is finished, else paths.dataset;
writes paths.resharded. Repeat the command after an interruption: finished shards are kept.

Score files belong to shards by digest: reshard a merged dataset, whose tars hold the likelihoods,
or reshard a packed one and score it again (as --paths.dataset). To verify, inspect or train on the
result, give its root as --paths.merged.""",
    sections=("paths", "pack", "observability"),
    flags=("json",),
    output=lambda config, flags: config.paths.resharded,
    work=reshard,
)
