"""Made-up datasets for resume.py: any number of index rows over a few real crops.

`clean` and `pack` make a dataset of 72 crops of 2 kB. Its tar ranges are repeated until a shard
holds 10,000 samples; every further shard is a hard link of that one, or, for a bucket, every row
points into the one object. uids are made up and unique; offsets, lengths and crc32 are those of the
crops, so that every read verifies; labels are the crops', for repeat factors.
"""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.common.data import CROPS, make
from vlal_dist.data.format.dataset import Split, open_dataset, open_split, read_labels
from vlal_dist.data.format.index import (
    BLOCK_TYPES,
    INDEX_TYPES,
    LABELS_SCHEMA,
    Shard,
    encode_arrow,
    encode_blocks,
    encode_shards,
    encode_table,
    form_blocks,
    index_from_columns,
)
from vlal_dist.data.format.tar import tar_end
from vlal_dist.data.hashing import mix

SHARD_SAMPLES = 10_000
BLOCK_BYTES = 512 << 10
SMALL = replace(CROPS, name="small", count=72)
Columns = dict[str, np.ndarray[Any, Any]]


def make_rows(folder: Path, rows: int, *, one_shard: bool = False) -> Path:
    """Write a dataset root of `rows` training samples, unless it is there; returns it.

    Args:
        folder: of the benchmark.
        rows: a multiple of SHARD_SAMPLES.
        one_shard: all rows point into one tar.
    """
    root = folder / f"{'remote' if one_shard else 'local'}-{rows}"
    if (root / "dataset.json").exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    small = make(folder, SMALL)
    shutil.copytree(small, root, ignore=shutil.ignore_patterns("dataset.json", "train"))
    dataset = open_dataset(str(small), cache=folder / "cache")
    (root / "train/shards").mkdir(parents=True)
    tar, one = _shard(folder, open_split(dataset, "train"))
    times = rows // SHARD_SAMPLES
    shards = 1 if one_shard else times
    for number in range(shards):
        os.link(tar, root / f"train/shards/train-{number:06d}.tar")
    digest, size = hashlib.sha256(tar.read_bytes()).hexdigest(), tar.stat().st_size
    names = [f"train-{number:06d}.tar" for number in range(shards)]
    written = {
        "shards.parquet": encode_shards([Shard(n, size, digest, rows // shards) for n in names]),
        "index.arrow": encode_arrow(_index(one, times, one_shard=one_shard)),
        "blocks.arrow": _blocks(one, times, one_shard=one_shard),
        "labels.parquet": _labels(read_labels(dataset, "train"), rows),
    }
    for name, data in written.items():
        (root / "train" / name).write_bytes(data)
    manifest = json.loads((small / "dataset.json").read_text())
    manifest["splits"]["train"].update(
        samples=rows,
        shards=shards,
        bytes=shards * size,
        files={name: hashlib.sha256(data).hexdigest() for name, data in written.items()},
    )
    (root / "dataset.json").write_text(json.dumps(manifest))
    return root


def _shard(folder: Path, split: Split) -> tuple[Path, Columns]:
    """A tar of SHARD_SAMPLES samples, the crops repeated, and the columns of its index."""
    index = split.index
    crop = np.arange(SHARD_SAMPLES) % len(index)
    columns = {name: np.array(getattr(index, name))[crop] for name in INDEX_TYPES}
    length = columns["length"].astype(np.uint64)
    columns["offset"] = np.cumsum(length) - length
    columns["shard"] = np.zeros_like(columns["shard"])
    path = folder / "train.tar"
    ranges = []
    for row in range(len(index)):
        key, first = split.shard_key(int(index.shard[row])), int(index.offset[row])
        ranges.append(split.store.read(key, offset=first, length=int(index.length[row])))
    with path.open("wb") as file:
        file.writelines(ranges[number] for number in crop.tolist())
        file.write(tar_end(file.tell()))
    return path, columns


def _index(one: Columns, times: int, *, one_shard: bool) -> Columns:
    """The index: the shard's, many times over, with uids of its own."""
    columns = {name: np.tile(values, times) for name, values in one.items()}
    columns["uid"] = mix(np.arange(times * SHARD_SAMPLES, dtype=np.uint64))
    if not one_shard:
        columns["shard"] = np.repeat(np.arange(times, dtype=np.uint32), SHARD_SAMPLES)
    return columns


def _blocks(one: Columns, times: int, *, one_shard: bool) -> bytes:
    blocks = form_blocks(index_from_columns(one), block_bytes=BLOCK_BYTES)
    columns = {name: np.tile(getattr(blocks, name), times) for name in BLOCK_TYPES}
    number = np.repeat(np.arange(times, dtype=np.uint64), len(blocks))
    columns["first_row"] += number * np.uint64(SHARD_SAMPLES)
    if not one_shard:
        columns["shard"] = number.astype(np.uint32)
    return encode_blocks(type(blocks)(**columns))


def _labels(labels: pa.Table, rows: int) -> bytes:
    number = pa.array(np.arange(rows)).cast(pa.string())
    crop = pa.array(np.arange(rows) % SHARD_SAMPLES % len(labels))
    lists = labels.select(["positive", "negative"]).take(crop)
    columns = {name: lists[name] for name in lists.column_names}
    return encode_table({"key": number, "instance_id": number, **columns}, LABELS_SCHEMA)
