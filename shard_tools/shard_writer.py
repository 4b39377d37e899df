"""Shared by pack, merge and reshard: building tars, and committing a dataset once all are there.

Each finished shard leaves its tar and a part file that says everything the final files need; a
killed run therefore continues with the shards that have no part file yet. All commits are
create-only, and `dataset.json` is the last.
"""

import hashlib
import json
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from vlal_dist.data.format.dataset import FORMAT
from vlal_dist.data.format.index import (
    INDEX_TYPES,
    LABELS_SCHEMA,
    REJECTS_SCHEMA,
    Index,
    Shard,
    concat_indexes,
    encode_blocks,
    encode_index,
    encode_shards,
    encode_table,
    form_blocks,
    index_from_columns,
)
from vlal_dist.data.format.tar import MEMBERS, EncodedSample, tar_end
from vlal_dist.data.hashing import uid_to_hex
from vlal_dist.errors import DataError, VlalError
from vlal_dist.observability.logs import Progress
from vlal_dist.storage.store import Store

Task = TypeVar("Task")
Result = TypeVar("Result")

PART_SCHEMA = pa.schema(
    [(name, kind) for name, kind in INDEX_TYPES.items()] + list(LABELS_SCHEMA),
)


@dataclass(frozen=True)
class SampleLabels:
    """What `labels.parquet` says of a sample."""

    key: str
    instance_id: str
    positive: list[int]
    negative: list[int]


@dataclass
class ShardPart:
    """A finished shard: its tar's name, size and digest, and one entry per sample in `columns`.

    `found`: an earlier run had finished it.
    """

    name: str
    size_bytes: int = 0
    sha256: str = ""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    rejects: list[dict[str, str]] = field(default_factory=list)
    found: bool = False

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.columns["uid"])

    def encode(self) -> bytes:
        """Parquet bytes, the shard's own facts in the schema's metadata."""
        facts = {"size_bytes": self.size_bytes, "name": self.name, "rejects": self.rejects}
        facts["sha256"] = self.sha256
        schema = PART_SCHEMA.with_metadata({"part": json.dumps(facts, sort_keys=True)})
        return encode_table(self.columns, schema)

    @classmethod
    def decode(cls, data: bytes) -> "ShardPart":
        """Read `encode`'s bytes."""
        table = pyarrow.parquet.read_table(pa.BufferReader(data))
        facts = json.loads(table.schema.metadata[b"part"])
        return cls(columns=table.to_pydict(), **facts)


class TarBuilder:
    """Writes one tar to a temporary file while collecting its part.

    Args:
        name: file name of the shard.
    """

    def __init__(self, name: str) -> None:
        self.part = ShardPart(name, columns={column: [] for column in PART_SCHEMA.names})
        self._folder = tempfile.TemporaryDirectory(prefix="vlal-")
        self.path = Path(self._folder.name) / name
        self._file = self.path.open("wb")
        self._sha = hashlib.sha256()

    def __enter__(self) -> "TarBuilder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._folder.cleanup()

    def add(self, uid: int, object_id: int, sample: EncodedSample, labels: SampleLabels) -> None:
        """Append one sample."""
        entry: dict[str, Any] = {
            "uid": uid,
            "shard": 0,  # its position is known only once all shards are
            "offset": self.part.size_bytes,
            "length": len(sample.data),
            "object_id": object_id,
            "crc32": sample.crc32,
            **vars(labels),
        }
        for name in MEMBERS:
            place, column = sample.members.get(name, (0, 0)), name.removesuffix(".npy")
            entry[f"{column}_offset"], entry[f"{column}_length"] = place
        for column, values in self.part.columns.items():
            values.append(entry[column])
        self._write(sample.data)

    def finish(self) -> ShardPart:
        """Close the tar; `path` is whole from now on."""
        self._write(tar_end(self.part.size_bytes))
        self._file.close()
        self.part.sha256 = self._sha.hexdigest()
        return self.part

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha.update(data)
        self.part.size_bytes += len(data)


def run_tasks(
    work: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    label: str,
    unit: str,
    sizes: Sequence[int],
    workers: int,
    finished: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run one task per shard in processes, with progress; results in the order of the tasks.

    Args:
        work: a module's function, run in the workers.
        tasks: one per shard.
        label, unit: for the progress.
        sizes: units in each task.
        workers: processes; 0: one per core.
        finished: told each result.

    Raises:
        VlalError: what a task raised, or a worker was killed.
    """
    # Spawned, not forked: the parent holds threads of pyarrow and perhaps an S3 client.
    context = multiprocessing.get_context("spawn")
    count = max(1, min(workers or os.cpu_count() or 1, len(tasks)))
    results: list[Result] = []
    try:
        with (
            Progress(label, total=sum(sizes), unit=unit) as progress,
            ProcessPoolExecutor(count, mp_context=context, initializer=_follow_parent) as pool,
        ):
            for size, result in zip(sizes, pool.map(work, tasks), strict=True):
                results.append(result)
                finished(result)
                progress.advance(size)
    except BrokenProcessPool:
        raise VlalError(
            f"{label}: a worker process was killed, often for want of memory; lower pack.workers "
            "and repeat the command: finished shards are kept"
        ) from None
    return results


def _follow_parent() -> None:
    """End with the parent: a killed parent must not leave workers beside its rerun."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def part_key(split: str, shard: str) -> str:
    """Storage key of a shard's part file."""
    return f"{split}/parts/{shard.removesuffix('.tar')}.parquet"


def shard_name(split: str, number: int) -> str:
    """File name of a shard."""
    return f"{split}-{number:06d}.tar"


def commit_shard(store: Store, split: str, builder: TarBuilder) -> ShardPart:
    """Commit a finished tar, then its part file; a tar without samples leaves only the latter."""
    part = builder.finish()
    if part.samples:
        store.create(f"{split}/shards/{part.name}", builder.path)
    store.create(part_key(split, part.name), part.encode())
    return part


def commit_split(
    store: Store,
    split: str,
    parts: Sequence[ShardPart],
    *,
    block_bytes: int,
    rejects: Sequence[Mapping[str, str]] | None = None,
) -> tuple[dict[str, Any], Index]:
    """Write a split's index, blocks, shard list, labels and rejects; its manifest entry.

    Args:
        store: the dataset root.
        split: name.
        parts: of all shards, in order.
        block_bytes: size at which a block ends.
        rejects: those of the dataset that is merged; None: those of the parts.
    """
    filled = [part for part in parts if part.samples]
    indexes = []
    for position, part in enumerate(filled):
        indexes.append(index_from_columns({**part.columns, "shard": [position] * part.samples}))
    index = concat_indexes(indexes)
    shards = [Shard(part.name, part.size_bytes, part.sha256, part.samples) for part in filled]
    labels = {
        name: [value for part in filled for value in part.columns[name]]
        for name in LABELS_SCHEMA.names
    }
    if rejects is None:
        rejects = [reject for part in parts for reject in part.rejects]
    reject_columns = {name: [row[name] for row in rejects] for name in REJECTS_SCHEMA.names}
    contents = {
        "shards.parquet": encode_shards(shards),
        "index.arrow": encode_index(index),
        "blocks.arrow": encode_blocks(form_blocks(index, block_bytes=block_bytes)),
        "labels.parquet": encode_table(labels, LABELS_SCHEMA),
        "rejects.parquet": encode_table(reject_columns, REJECTS_SCHEMA),
    }
    for name, data in contents.items():
        store.create(f"{split}/{name}", data)
    entry = {
        "samples": len(index),
        "shards": len(shards),
        "bytes": sum(shard.bytes for shard in shards),
        "rejected": len(rejects),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
    }
    return entry, index


def check_uids(indexes: Mapping[str, Index]) -> None:
    """Refuse a dataset in which two samples share a uid (a 64-bit collision, or a duplicate id)."""
    uids = np.concatenate([index.uid for index in indexes.values()])
    values, counts = np.unique(uids, return_counts=True)
    if len(values) != len(uids):
        twice = int(values[counts > 1][0])
        raise DataError(
            f"two samples share the uid {uid_to_hex(twice)}: duplicate instance ids, or (1 in 10^7 "
            "at a million samples) a collision; choose another pack.name"
        )


def commit_dataset(store: Store, manifest: Mapping[str, Any]) -> str:
    """Commit `dataset.json`, the last file; returns the dataset digest (sha256, hex)."""
    data = (json.dumps({"format": FORMAT, **manifest}, indent=2, sort_keys=True) + "\n").encode()
    store.create("dataset.json", data)
    return hashlib.sha256(data).hexdigest()
