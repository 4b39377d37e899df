"""`vlal reshard`: the same samples, in the same order, in tars of another size.

A sample's tar bytes are copied verbatim after their crc32 check, so uids, keys, labels, likelihoods
and the offsets of members within a sample stay; which sample goes where follows from the source's
index alone. The result depends on the samples and the sizes, not on how they were cut before. The
unit of work is a shard of the target; a killed reshard continues.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from isal.isal_zlib import crc32

from shard_tools.shard_writer import (
    Engine,
    TarBuilder,
    commit_derived,
    commit_settings,
    find_report,
    open_engine,
    open_source,
    open_splits,
    owned_by,
    run_tasks,
    shard_name,
)
from vlal_dist.config.sections import Config
from vlal_dist.data.format.dataset import (
    Dataset,
    Split,
    open_newest,
    read_labels,
    refuse_in_place,
)
from vlal_dist.data.format.index import Array, Index, Shard
from vlal_dist.data.format.sample_reader import parse_meta, read_again
from vlal_dist.data.format.tar import EncodedSample, key_of
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.program import Counts, Program, make_way
from vlal_dist.storage.store import Store, open_store

READ_BYTES = 8 << 20
"""Bytes at which one ranged read of the source ends; a worker's memory is a few of these."""

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
    dataset = open_newest(config.paths)
    with open_engine(
        flags,
        workers=config.pack.workers,
        written={"paths.resharded": config.paths.resharded},
        read={"paths.dataset": f"{dataset.url}/dataset.json"},
    ) as engine:
        return _reshard(config, flags, dataset, engine)


def _reshard(config: Config, flags: Mapping[str, str], dataset: Dataset, engine: Engine) -> Counts:
    pack = config.pack
    refuse_in_place(
        dataset,
        what="which reshard does not copy",
        instead="pack again with another pack.block_bytes, which is all that can change",
    )
    target = open_target(config.paths.resharded, source=dataset.url)
    splits = open_splits(dataset)
    make_way(PROGRAM, config, flags)
    commit_settings(
        target,
        "reshard.json",
        {
            "source_digest": dataset.digest,
            **pack.model_dump(include={"shard_bytes", "block_bytes"}),
        },
    )
    runs = {
        name: cut_runs(split.index.length, size_bytes=pack.shard_bytes)
        for name, split in splits.items()
    }
    tasks = [
        ReshardTask(
            dataset.url, os.path.abspath(config.paths.cache), target.url, name, number, first, stop
        )
        for name, cuts in runs.items()
        for number, (first, stop) in enumerate(cuts)
    ]
    found = run_tasks(
        reshard_shard,
        tasks,
        label="reshard",
        unit="samples",
        sizes=[task.stop - task.first for task in tasks],
        engine=engine,
    )
    by_split = {
        name: (
            [shard for task, shard in zip(tasks, found, strict=True) if task.split == name],
            place_samples(split.index, runs[name]),
        )
        for name, split in splits.items()
    }
    counts = commit_derived(
        target,
        dataset,
        by_split,
        block_bytes=pack.block_bytes,
        likelihood=dataset.manifest["likelihood"],
    )
    return {"source": dataset.url, **counts}


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
    """Write and commit one shard, unless its report says that it is there already."""
    dataset, split = open_source(task.source, task.cache, task.split)
    target, name = open_store(task.target), shard_name(task.split, task.number)
    report = find_report(target, task.split, name)
    if report is None:
        with TarBuilder(name) as builder:
            for row, data in read_samples(dataset, split, task.first, task.stop):
                _add(builder, split.index, row, data)
            report = builder.commit(target, task.split)
    return report.shard


def read_samples(
    dataset: Dataset, split: Split, first: int, stop: int
) -> Iterator[tuple[int, bytes]]:
    """Row and tar range of the samples first..stop-1, checked by crc32, read many at a time.

    Raises:
        DataError: a sample's bytes are not those that were packed; names shard, sample and check.
        StorageError: a shard cannot be read.
    """
    index, store = split.index, split.store
    for begin, end in _reads(index, first, stop):
        offsets, lengths = index.offset[begin:end].tolist(), index.length[begin:end].tolist()
        size = offsets[-1] + lengths[-1] - offsets[0]
        key = split.shard_key(int(index.shard[begin]))
        data = store.read(key, offset=offsets[0], length=size)
        for row, offset, length in zip(range(begin, end), offsets, lengths, strict=True):
            start, expected = offset - offsets[0], int(index.crc32[row])
            sample: bytes | str = data[start : start + length]
            if crc32(sample) != expected:
                sample = read_again(store, key, offset=offset, length=length, expected=expected)
            if isinstance(sample, str):
                name = read_labels(dataset, split.name)["key"][row].as_py()
                raise DataError(
                    f"{dataset.url}/{key}: sample {name} (row {row}): {sample}; the shard was "
                    "altered: restore it, or pack the dataset again"
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
    """Append a sample as it is; its report says what that of pack or merge said."""
    members = index.members(row)
    offset, length = members["json"]
    sample = EncodedSample(key_of(data), data, members, int(index.crc32[row]))
    builder.add(int(index.uid[row]), sample, parse_meta(data[offset : offset + length]))


PROGRAM = Program(
    name="reshard",
    usage="vlal reshard",
    purpose="""Write the same samples, in the same order, in shards and blocks of other sizes
(pack.shard_bytes, pack.block_bytes). Reads paths.merged if it is finished, else paths.dataset;
writes paths.resharded. Repeat the command after an interruption: finished shards are kept.

Score files belong to shards by digest: reshard a merged dataset, whose tars hold the likelihoods,
or reshard a packed one and score it again (as --paths.dataset). To verify, inspect or train on the
result, give its root as --paths.merged.""",
    sections=("paths", "pack", "observability"),
    flags=("engine", "replace", "json"),
    output=lambda config, flags: config.paths.resharded,
    work=reshard,
    owned=owned_by("reshard.json"),
)
