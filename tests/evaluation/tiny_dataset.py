"""A small real dataset, written through the data room, and the truth behind its labels."""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from vlal_dist.data.index import (
    INDEX_TYPES,
    LABELS_SCHEMA,
    Shard,
    encode_blocks,
    encode_index,
    encode_shards,
    encode_table,
    form_blocks,
    index_from_columns,
    sample_uid,
)
from vlal_dist.data.shards import encode_sample, sample_key, tar_end
from vlal_dist.method.feasible import FeasibleSets, feasible_sets
from vlal_dist.storage.store import open_store
from vlal_dist.vocabulary import Vocabulary

HOSTILE = '"><img src=x onerror=alert(1)><script>alert(2)</script>'
VOCABULARY = Vocabulary(
    objects=("ball", "box", "car<b>"),
    attributes=("blue", "dotted", HOSTILE, "large", "red", "round", "small", "square"),
    attribute_type=("color", "texture", "other", "size", "color", "shape", "size", "shape"),
    prevalence=("head", "medium", "tail", "head", "head", "medium", "tail", "medium"),
)
COLOURS = {0: (40, 70, 210), 4: (210, 50, 40)}
SAMPLES = 36


@dataclass(frozen=True)
class Instance:
    """One annotated crop and all that is true of it."""

    instance_id: str
    object_id: int
    positive: list[int]
    negative: list[int]
    true: list[int]


def make_instances(count: int = SAMPLES) -> list[Instance]:
    """Coloured crops with half of their labels hidden, the same on every call."""
    random = np.random.default_rng(5)
    width = len(VOCABULARY.attributes)
    instances = []
    for number in range(count):
        present = random.random(width) < 0.4
        present[[0, 4]] = (number % 2 == 0, number % 2 == 1)
        shown = random.random(width) < 0.5
        shown[[0, 4]] = (number % 3 != 0, True)
        instances.append(
            Instance(
                instance_id=f"{number:05d}" if number % 5 else f"photo {number}.x",
                object_id=int(random.integers(len(VOCABULARY.objects))),
                positive=np.flatnonzero(present & shown).tolist(),
                negative=np.flatnonzero(~present & shown).tolist(),
                true=np.flatnonzero(present).tolist(),
            )
        )
    return instances


def _crop(instance: Instance) -> bytes:
    colour = COLOURS[0] if 0 in instance.true else COLOURS[4]
    image = Image.new("RGB", (96 + instance.object_id * 40, 90), (120, 120, 120))
    image.paste(colour, (18, 18, image.width - 18, 72))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=90)
    return sink.getvalue()


def _feasible(instances: list[Instance]) -> FeasibleSets:
    def ragged(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        indptr = np.concatenate([[0], np.cumsum([len(ids) for ids in lists])])
        return indptr, np.array([i for ids in lists for i in ids], dtype=np.int64)

    positive_indptr, positive = ragged([instance.positive for instance in instances])
    negative_indptr, negative = ragged([instance.negative for instance in instances])
    return feasible_sets(
        object_id=np.array([instance.object_id for instance in instances]),
        positive_indptr=positive_indptr,
        positive=positive,
        negative_indptr=negative_indptr,
        negative=negative,
        num_objects=len(VOCABULARY.objects),
    )


def _write_split(root: Path, split: str, instances: list[Instance]) -> dict[str, object]:
    """Two shards of one split and the files beside them; returns its manifest entry."""
    columns: dict[str, list[int]] = {name: [] for name in INDEX_TYPES}
    shards = []
    folder = root / split / "shards"
    folder.mkdir(parents=True)
    half = -(-len(instances) // 2)
    for number, part in enumerate((instances[:half], instances[half:])):
        data = b""
        for instance in part:
            uid = sample_uid("tiny", instance.instance_id)
            meta = {
                "instance_id": instance.instance_id,
                "image_id": "1",
                "object_id": instance.object_id,
                "box_in_crop": [0, 0, 96, 90],
                "positive": instance.positive,
                "negative": instance.negative,
            }
            sample = encode_sample(
                sample_key(instance.instance_id, uid),
                {"jpg": _crop(instance), "json": json.dumps(meta).encode()},
            )
            row = {"uid": uid, "shard": number, "offset": len(data), "length": len(sample.data)}
            row |= {"object_id": instance.object_id, "crc32": sample.crc32}
            for name in ("jpg", "json"):
                row[f"{name}_offset"], row[f"{name}_length"] = sample.parts[name]
            for name, values in columns.items():
                values.append(row.get(name, 0))
            data += sample.data
        data += tar_end(len(data))
        name = f"{split}-{number:06d}.tar"
        (folder / name).write_bytes(data)
        shards.append(Shard(name, len(data), hashlib.sha256(data).hexdigest(), len(part)))
    index = index_from_columns(columns)
    labels = {
        "key": [sample_key(i.instance_id, sample_uid("tiny", i.instance_id)) for i in instances],
        "instance_id": [instance.instance_id for instance in instances],
        "positive": [instance.positive for instance in instances],
        "negative": [instance.negative for instance in instances],
    }
    files = {
        "shards.parquet": encode_shards(shards),
        "index.arrow": encode_index(index),
        "blocks.arrow": encode_blocks(form_blocks(index, block_bytes=16_384)),
        "labels.parquet": encode_table(labels, LABELS_SCHEMA),
    }
    for name, data in files.items():
        (root / split / name).write_bytes(data)
    return {
        "samples": len(instances),
        "shards": len(shards),
        "bytes": sum(shard.bytes for shard in shards),
        "rejected": 0,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }


def write_dataset(root: Path) -> Path:
    """A dataset root with one split, `test`."""
    root.mkdir()
    instances = make_instances()
    feasible = _feasible(instances)
    manifest = {
        "format": 1,
        "name": "tiny",
        "vocabulary_digest": VOCABULARY.digest,
        "feasible_digest": feasible.digest,
        "crops": {},
        "splits": {"test": _write_split(root, "test", instances)},
        "likelihood": None,
    }
    shared = {
        "vocabulary.json": json.dumps(VOCABULARY.to_json()).encode(),
        "feasible.npz": feasible.to_npz(),
    }
    for name, data in shared.items():
        open_store(str(root)).create(name, data)
    manifest["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in shared.items()}
    (root / "dataset.json").write_text(json.dumps(manifest))
    return root


def write_truth(path: Path) -> Path:
    """Complete labels of every instance, and of one that belongs to no split here."""
    instances = make_instances()[::-1]
    rows = {
        "instance_id": [*(one.instance_id for one in instances), "elsewhere"],
        "positive": [*([VOCABULARY.attributes[i] for i in one.true] for one in instances), ["red"]],
    }
    schema = pa.schema([("instance_id", pa.string()), ("positive", pa.list_(pa.string()))])
    pa.parquet.write_table(pa.table(rows, schema=schema), path)
    return path
