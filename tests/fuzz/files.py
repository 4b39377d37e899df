"""A merged dataset of eight samples as bytes, which is sealed again after a change."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.fixtures.tiny_dataset import VOCABULARY, make_instances
from vlal_dist.data.format.index import (
    INDEX_TYPES,
    LABELS_SCHEMA,
    Index,
    Shard,
    encode_blocks,
    encode_index,
    encode_shards,
    encode_table,
    form_blocks,
    index_from_columns,
)
from vlal_dist.data.format.tar import encode_sample, sample_key, tar_end
from vlal_dist.data.hashing import sample_uid
from vlal_dist.method.feasible import FeasibleSets

NAME, SPLIT, SAMPLES, HALF = "tiny", "test", 8, 4
SHARDS = [f"{SPLIT}/shards/{SPLIT}-{number:06d}.tar" for number in (0, 1)]
Members = list[dict[str, bytes]]


def feasible_of() -> FeasibleSets:
    """Sets of different sizes for the three objects."""
    labels = np.array([[1, 1, 0, 0, 1, 0, 0, 0], [0, 1, 1, -1, 0, 0, 1, 1], [1] * 8])
    return FeasibleSets.from_labels([0, 1, 2], labels)


def make_members() -> Members:
    """jpg, json and likelihood.npy of each sample."""
    feasible, found = feasible_of(), []
    for one in make_instances(SAMPLES):
        sink = io.BytesIO()
        Image.new("RGB", (24, 16), (10 * one.object_id, 90, 30)).save(sink, "JPEG", quality=90)
        width = len(feasible.of(one.object_id))
        values = np.full(width, -np.log(width), np.float32)
        npy = io.BytesIO()
        np.lib.format.write_array(npy, values, version=(1, 0), allow_pickle=False)
        meta = {
            "instance_id": one.instance_id,
            "image_id": f"{len(found) // 2}",
            "object_id": one.object_id,
            "box_in_crop": [0, 0, 24, 16],
            "positive": one.positive,
            "negative": one.negative,
        }
        found.append(
            {
                "jpg": sink.getvalue(),
                "json": json.dumps(meta).encode(),
                "likelihood.npy": npy.getvalue(),
            }
        )
    return found


def build(members: Members, *, labels: Sequence[Any] | None = None) -> dict[str, bytes]:
    """The files of a dataset root, by key; whatever the members hold, the index fits them."""
    instances = make_instances(SAMPLES)
    columns: dict[str, list[int]] = {name: [] for name in INDEX_TYPES}
    files: dict[str, bytes] = {}
    shards, data = [], b""
    for number, (one, contents) in enumerate(zip(instances, members, strict=True)):
        uid = sample_uid(NAME, one.instance_id)
        sample = encode_sample(sample_key(one.instance_id, uid), contents)
        row = {"uid": uid, "shard": number // HALF, "offset": len(data)}
        row |= {"length": len(sample.data), "object_id": one.object_id, "crc32": sample.crc32}
        for name, column in (("jpg", "jpg"), ("json", "json"), ("likelihood.npy", "likelihood")):
            row[f"{column}_offset"], row[f"{column}_length"] = sample.members[name]
        for name, values in columns.items():
            values.append(row[name])
        data += sample.data
        if number % HALF == HALF - 1:
            data += tar_end(len(data))
            key = SHARDS[number // HALF]
            sha256 = hashlib.sha256(data).hexdigest()
            shards.append(Shard(key.rpartition("/")[2], len(data), sha256, HALF))
            files[key], data = data, b""
    index = index_from_columns(columns)
    table = {
        "key": [sample_key(i.instance_id, sample_uid(NAME, i.instance_id)) for i in instances],
        "instance_id": [one.instance_id for one in instances],
        "positive": [one.positive for one in instances],
        "negative": [one.negative for one in instances],
    }
    return files | {
        f"{SPLIT}/shards.parquet": encode_shards(shards),
        f"{SPLIT}/index.arrow": encode_index(index),
        f"{SPLIT}/blocks.arrow": encode_blocks(form_blocks(index, block_bytes=4096)),
        f"{SPLIT}/labels.parquet": encode_table(table, LABELS_SCHEMA),
        "vocabulary.json": json.dumps(VOCABULARY.to_json()).encode(),
        "feasible.npz": feasible_of().to_npz(),
    }


def seal(files: Mapping[str, bytes]) -> bytes:
    """`dataset.json` with the digests of the files as they are."""
    digest = {key: hashlib.sha256(data).hexdigest() for key, data in files.items()}
    return json.dumps(
        {
            "format": 1,
            "name": NAME,
            "vocabulary_digest": VOCABULARY.digest,
            "feasible_digest": feasible_of().digest,
            "crops": {"box_expansion": 0.0},
            "files": {name: digest[name] for name in ("vocabulary.json", "feasible.npz")},
            "likelihood": {"scorer_digest": "5c" * 32, "temperature": 0.05, "splits": [SPLIT]},
            "splits": {
                SPLIT: {
                    "samples": SAMPLES,
                    "shards": 2,
                    "bytes": sum(len(files[key]) for key in SHARDS),
                    "rejected": 0,
                    "files": {
                        key.rpartition("/")[2]: digest[key]
                        for key in files
                        if key.startswith(f"{SPLIT}/") and key not in SHARDS
                    },
                }
            },
        }
    ).encode()


def write(root: Path, files: Mapping[str, bytes]) -> Path:
    """Write files below a folder."""
    for key, data in files.items():
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def changed_index(index: Index, column: str, row: int, value: int) -> bytes:
    """`index.arrow` with one other number."""
    columns = {name: np.array(values) for name, values in vars(index).items()}
    limit = np.iinfo(columns[column].dtype).max
    columns[column][row % len(index)] = min(max(value, 0), limit)
    return encode_index(Index(**columns))


MEMBERS = make_members()
FILES = build(MEMBERS)
"""The files of the root that is mutated; `seal` makes its `dataset.json`."""
