"""Shards and the files beside them, for pack, merge and reshard.

Each finished shard leaves its tar and a report that says everything the final files need, so that a
killed run continues with the shards that have no report yet. All commits are create-only, and
`dataset.json` is the last (docs/formats.md).
"""

import hashlib
import json
import multiprocessing
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from threading import Event
from typing import Any, NotRequired, TypeVar

import pyarrow as pa
from typing_extensions import TypedDict

from vlal_dist.contents import Count, parse_json, shown
from vlal_dist.data.format.dataset import (
    FORMAT,
    ROOT_FILES,
    Dataset,
    Split,
    check_shard_sizes,
    open_dataset,
    open_split,
    verified_file,
)
from vlal_dist.data.format.index import (
    INDEX_TYPES,
    LABELS_SCHEMA,
    Index,
    Shard,
    decode_table,
    encode_blocks,
    encode_index,
    encode_shards,
    encode_table,
    form_blocks,
    index_from_columns,
)
from vlal_dist.data.format.tar import MEMBERS, EncodedSample, tar_end
from vlal_dist.errors import ConflictError, VlalError
from vlal_dist.observability.logs import Progress
from vlal_dist.processes import set_on_stop_signal
from vlal_dist.program import Counts
from vlal_dist.ray_tasks import (
    check_shared,
    ray_session,
    refuse_relative_in_job,
    run_on_ray,
    wants_ray,
)
from vlal_dist.storage.checks import sha256_of
from vlal_dist.storage.earlier import Owned
from vlal_dist.storage.store import Store

Task = TypeVar("Task")
Result = TypeVar("Result")
Engine = Callable[[Callable[[Any], Any], Sequence[Any], str], Iterator[Any]]
"""Runs a function on each of some tasks, named by a label; their results in order."""

SPLIT_FILES = (
    "shards.parquet",
    "index.arrow",
    "blocks.arrow",
    "labels.parquet",
    "rejects.parquet",
    "annotations.arrow",
)
"""Files beside the shards of a split, made from the reports of all of them."""


def owned_by(settings: str) -> Owned:
    """What a program writes that commits its settings under that name (`commit_settings`)."""
    return Owned(
        rf"(dataset|vocabulary)\.json|{re.escape(settings)}|feasible\.npz"
        rf"|[^/]+/({'|'.join(map(re.escape, SPLIT_FILES))})"
        r"|[^/]+/parts/.+\.parquet|[^/]+/shards/[^/]+\.tar",
        first=settings,
        last="dataset.json",
    )


REPORT_SCHEMA = pa.schema([*INDEX_TYPES.items(), *LABELS_SCHEMA])
IN_PLACE_SCHEMA = pa.schema(
    [*REPORT_SCHEMA, ("image_id", pa.string()), ("width", pa.uint32()), ("height", pa.uint32())]
)
"""Of the report on a tar of others, whose samples stay where they are."""


@dataclass
class ShardReport:
    """A finished shard: its tar's name, size and digest, and one entry per sample in `columns`.

    `source`: sha256 of the shard that merge made it from. `found`: an earlier run had finished it.
    """

    name: str
    size_bytes: int = 0
    sha256: str = ""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    rejects: list[dict[str, str]] = field(default_factory=list)
    source: str = ""
    found: bool = False

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.columns["uid"])

    @property
    def shard(self) -> Shard:
        """The entry of `shards.parquet`."""
        return Shard(self.name, self.size_bytes, self.sha256, self.samples)

    def encode(self) -> bytes:
        """Parquet bytes, the shard's own facts in the schema's metadata."""
        facts = {"size_bytes": self.size_bytes, "name": self.name, "rejects": self.rejects}
        facts["sha256"] = self.sha256
        if self.source:
            facts["source"] = self.source
        schema = IN_PLACE_SCHEMA if "image_id" in self.columns else REPORT_SCHEMA
        schema = schema.with_metadata({"part": json.dumps(facts, sort_keys=True)})
        return encode_table(self.columns, schema)

    @classmethod
    def decode(cls, data: bytes, *, where: str, schema: pa.Schema = REPORT_SCHEMA) -> "ShardReport":
        """Read `encode`'s bytes; `where` names them in the DataError if they are damaged."""
        remedy = "delete it and repeat the command: that shard is written again"
        table = decode_table(data, schema, where=where, remedy=remedy)
        facts: _Facts = parse_json(
            (table.schema.metadata or {}).get(b"part", b"null"), _Facts, where=where, remedy=remedy
        )
        return cls(columns=table.to_pydict(), found=True, **facts)


class _Facts(TypedDict):
    """A shard's own facts in its report's metadata."""

    name: str
    size_bytes: Count
    sha256: str
    rejects: list[dict[str, str]]
    source: NotRequired[str]


class TarBuilder:
    """Writes one tar to a temporary file while collecting its report.

    Args:
        name: file name of the shard.
    """

    def __init__(self, name: str) -> None:
        self.report = ShardReport(name, columns={column: [] for column in REPORT_SCHEMA.names})
        self._folder = tempfile.TemporaryDirectory(prefix="vlal-")
        self._path = Path(self._folder.name) / name
        self._file = self._path.open("wb")
        self._sha = hashlib.sha256()

    def __enter__(self) -> "TarBuilder":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._folder.cleanup()

    def add(self, uid: int, sample: EncodedSample, meta: Mapping[str, Any]) -> None:
        """Append one sample.

        Args:
            uid: unsigned 64-bit name.
            sample: key and tar bytes.
            meta: what its `KEY.json` says.
        """
        entry: dict[str, Any] = {
            "uid": uid,
            "shard": 0,  # its position is known only once all shards are
            "offset": self.report.size_bytes,
            "length": len(sample.data),
            "crc32": sample.crc32,
            "key": sample.key,
            **{name: meta[name] for name in ("object_id", "instance_id", "positive", "negative")},
        }
        for name in MEMBERS:
            column = name.removesuffix(".npy")
            place = sample.members.get(name, (0, 0))
            entry[f"{column}_offset"], entry[f"{column}_length"] = place
        for column, values in self.report.columns.items():
            values.append(entry[column])
        self._write(sample.data)

    def commit(self, store: Store, split: str) -> ShardReport:
        """Commit the tar, then its report; a tar without samples leaves only the latter.

        A tar of other bytes is replaced: no report vouches for it, so its build was killed, and
        photos have changed since. Where one does, another attempt at this shard has finished.
        """
        self._write(tar_end(self.report.size_bytes))
        self._file.close()
        self.report.sha256 = self._sha.hexdigest()
        key = shard_key(split, self.report.name)
        if self.report.samples:
            try:
                store.create(key, self._path)
            except ConflictError:
                if there := find_report(store, split, self.report.name):
                    return there  # of another attempt, which finished first: its tar stays
                store.delete(key)
                store.create(key, self._path)
        elif there := find_report(store, split, self.report.name):
            return there
        else:
            store.delete(key)
        store.create(report_key(split, self.report.name), self.report.encode())
        return self.report

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha.update(data)
        self.report.size_bytes += len(data)


def report_key(split: str, shard: str) -> str:
    """Storage key of a shard's report."""
    return f"{split}/parts/{shard.removesuffix('.tar')}.parquet"


def shard_key(split: str, shard: str) -> str:
    """Storage key of a shard's tar."""
    return f"{split}/shards/{shard}"


def find_report(
    store: Store, split: str, shard: str, *, schema: pa.Schema = REPORT_SCHEMA
) -> ShardReport | None:
    """The report of a shard that is there already; None: the shard is still to be written."""
    key = report_key(split, shard)
    if not store.exists(key):
        return None
    return ShardReport.decode(store.read(key), where=f"{store.url}/{key}", schema=schema)


def shard_name(split: str, number: int) -> str:
    """File name of a shard."""
    return f"{split}-{number:06d}.tar"


@lru_cache(maxsize=1)
def open_source(url: str, cache: str, split: str) -> tuple[Dataset, Split]:
    """A dataset and one of its splits, kept for the next task of the same split."""
    dataset = open_dataset(url, cache=Path(cache))
    return dataset, open_split(dataset, split)


def open_splits(dataset: Dataset) -> dict[str, Split]:
    """Open every split; checks the sizes of its shards and the files that are copied."""
    splits = {name: open_split(dataset, name) for name in dataset.splits}
    for split in splits.values():
        kept_files(dataset, split.name)
        check_shard_sizes(split)
    return splits


def run_tasks(
    work: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    label: str,
    unit: str,
    sizes: Sequence[int],
    engine: Engine,
    finished: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run one task per shard, with progress; results in the order of the tasks.

    Args:
        work: a module's function, run in the workers.
        tasks: one per shard.
        label, unit: for the progress.
        sizes: units in each task.
        engine: runs them (`open_engine`).
        finished: called with each result.

    Raises:
        VlalError: what a task raised, or a worker was killed.
    """
    results: list[Result] = []
    with Progress(label, total=sum(sizes), unit=unit) as progress:
        for size, result in zip(sizes, engine(work, tasks, label), strict=True):
            results.append(result)
            finished(result)
            progress.advance(size)
    return results


@contextmanager
def open_engine(
    flags: Mapping[str, str],
    *,
    workers: int | None,
    written: Mapping[str, str],
    read: Mapping[str, str],
) -> Iterator[Engine]:
    """What runs tasks: processes of this machine, or with `--engine ray` a Ray, where it works.

    Args:
        flags: of the program.
        workers: tasks at a time; 0: one per core, or as the Ray has room; None: without a Ray, one
            after another in this process.
        written: setting -> root that the tasks write.
        read: setting -> file or folder that they read.

    Raises:
        UsageError: another engine.
        ConfigError: a local path that the nodes of the Ray do not share.
        StorageError: the Ray does not answer.
    """
    if not wants_ray(flags):
        if workers is None:
            yield lambda work, tasks, label: map(work, tasks)
        else:
            yield partial(_in_processes, workers)
        return
    for setting, place in {**written, **read}.items():
        refuse_relative_in_job(setting, place)
    stop = Event()
    with (
        set_on_stop_signal(stop),
        ray_session(actors=workers or os.cpu_count() or 1, cpus_per_actor=1, stop=stop),
        set_on_stop_signal(stop),  # again: ray.init replaces the handlers
    ):
        check_shared(written, read, stop=stop)
        yield lambda work, tasks, label: run_on_ray(
            work, tasks, label=label, stop=stop, most=workers or 0
        )


def _in_processes(
    workers: int, work: Callable[[Any], Any], tasks: Sequence[Any], label: str
) -> Iterator[Any]:
    """Results of the tasks in order, by processes; VlalError where one was killed."""
    # Spawned, not forked: the parent holds threads of pyarrow and perhaps an S3 client.
    context = multiprocessing.get_context("spawn")
    count = max(1, min(workers or os.cpu_count() or 1, len(tasks)))
    try:
        with ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_parent) as pool:
            yield from pool.map(work, tasks)
    except BrokenProcessPool:
        raise VlalError(
            f"{label}: a worker process was killed, often for lack of memory; lower pack.workers "
            "and repeat the command: finished shards are kept"
        ) from None


def _end_with_parent() -> None:
    """End with the parent: a killed parent must not leave workers beside its rerun."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def commit_settings(store: Store, name: str, settings: Mapping[str, Any]) -> None:
    """Commit what the shards depend on, before any of them.

    Raises:
        ConflictError: a run with other settings began here; its shards must not be continued.
    """
    try:
        store.create(name, _json(settings))
    except ConflictError:
        stored = parse_json(
            store.read(name), dict[str, Any], where=f"{store.url}/{name}", remedy="use a new root"
        )
        then, now = _flat(stored), _flat(settings)
        differ = [key for key in dict.fromkeys([*now, *then]) if then.get(key) != now.get(key)]
        found = (
            f"{key} was {shown(then.get(key), most=20)}, now {shown(now.get(key), most=20)}"
            for key in differ
        )
        raise ConflictError(
            f"{store.url} was made from other input or with other settings: {'; '.join(found)} "
            "(None: not there, such as an option that is newer than the root); set them back, or "
            "give another root. Nothing was changed"
        ) from None


def reopen_dataset(store: Store, stale: Mapping[str, Sequence[str]]) -> None:
    """Take a dataset's commit back, so that some of its shards are written again.

    `dataset.json` goes first and the reports of stale shards last: killed at any moment, the next
    run finds reports of finished shards only and no file that was made from others.

    Args:
        store: the dataset root.
        stale: split -> shards; of each of these splits the files beside the shards go as well.
    """
    store.delete("dataset.json")
    for split in stale:
        for name in SPLIT_FILES:
            store.delete(f"{split}/{name}")
    for split, shards in stale.items():
        for shard in shards:
            store.delete(report_key(split, shard))
            store.delete(shard_key(split, shard))


def gather_index(reports: Sequence[ShardReport]) -> tuple[list[Shard], Index]:
    """Shard list and index of a split, from the reports of its shards in order."""
    filled = [report for report in reports if report.samples]
    columns = {
        name: [value for report in filled for value in report.columns[name]] for name in INDEX_TYPES
    }
    columns["shard"] = [n for n, report in enumerate(filled) for _ in range(report.samples)]
    return [report.shard for report in filled], index_from_columns(columns)


def commit_split(
    store: Store,
    split: str,
    shards: Sequence[Shard],
    index: Index,
    files: Mapping[str, bytes | Path],
    *,
    block_bytes: int,
) -> dict[str, Any]:
    """Write the files beside a split's shards.

    Args:
        store: the dataset root.
        split: name.
        shards: in order.
        index: of all samples.
        files: name -> labels and rejects.
        block_bytes: size at which a block ends.

    Returns:
        The split's entry of `dataset.json`, without `rejected`.
    """
    contents: dict[str, bytes | Path] = {
        "shards.parquet": encode_shards(shards),
        "index.arrow": encode_index(index),
        "blocks.arrow": encode_blocks(form_blocks(index, block_bytes=block_bytes)),
        **files,
    }
    for name, data in contents.items():
        store.create(f"{split}/{name}", data)
    return {
        "samples": len(index),
        "shards": len(shards),
        "bytes": sum(shard.bytes for shard in shards),
        "files": {name: sha256_of(data) for name, data in contents.items()},
    }


def commit_dataset(store: Store, manifest: Mapping[str, Any]) -> Counts:
    """Commit `dataset.json`, the last file; returns the closing counts."""
    data = _json({"format": FORMAT, **manifest})
    store.create("dataset.json", data)
    return dataset_counts(manifest, hashlib.sha256(data).hexdigest())


def commit_derived(
    store: Store,
    dataset: Dataset,
    splits: Mapping[str, tuple[Sequence[Shard], Index]],
    *,
    block_bytes: int,
    likelihood: Mapping[str, Any] | None,
) -> Counts:
    """Commit a dataset that holds the samples of another one, in other shards.

    Args:
        store: the new root, whose shards are written.
        dataset: the other one; its labels and rejects are copied.
        splits: name -> shards and index.
        block_bytes: size at which a block ends.
        likelihood: the entry of `dataset.json`.
    """
    for name in ROOT_FILES:
        store.create(name, dataset.store.read(name))
    entries = {}
    for name, (shards, index) in splits.items():
        files = kept_files(dataset, name)
        entry = commit_split(store, name, shards, index, files, block_bytes=block_bytes)
        entries[name] = {**dataset.manifest["splits"][name], **entry}
    return commit_dataset(store, {**dataset.manifest, "likelihood": likelihood, "splits": entries})


def kept_files(dataset: Dataset, split: str) -> dict[str, bytes | Path]:
    """Local files of a split's labels and rejects, which do not depend on its shards.

    Raises:
        DataError: a file differs from its digest.
    """
    names = ("labels.parquet", "rejects.parquet")
    return {name: verified_file(dataset, split, name) for name in names}


def dataset_counts(manifest: Mapping[str, Any], digest: str) -> Counts:
    """Closing counts of a tool that wrote or read a dataset."""
    splits = manifest["splits"]
    return {
        "samples": {name: entry["samples"] for name, entry in splits.items()},
        "shards": sum(entry["shards"] for entry in splits.values()),
        "bytes": sum(entry["bytes"] for entry in splits.values()),
        "dataset": digest[:16],
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        flat |= {f"{prefix}{key}": value} if inner is None else inner
    return flat


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
