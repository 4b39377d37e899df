"""`python -m shard_tools pack`: instances and photos to verified WebDataset shards.

Photos are put in a seeded hash order, the instances of one photo adjacent, and cut into shards by
an estimate of their bytes. Each shard is then one unit of work whose bytes depend on nothing but
its own instances: any number of processes gives the same files, and a killed run continues.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.parquet
from PIL import Image

from shard_tools.shard_writer import (
    SampleLabels,
    ShardPart,
    TarBuilder,
    check_uids,
    commit_dataset,
    commit_shard,
    commit_split,
    part_key,
    run_tasks,
    shard_name,
)
from vlal_dist.config.sections import Config, PackConfig
from vlal_dist.data.format.dataset import check_digest
from vlal_dist.data.format.images import crop_bounds, encode_jpeg, is_plain_jpeg, open_photo
from vlal_dist.data.format.photos import PhotoSource
from vlal_dist.data.format.tar import EncodedSample, encode_sample, sample_key
from vlal_dist.data.hashing import sample_uid
from vlal_dist.errors import DataError, NotFoundError
from vlal_dist.observability.metric_definitions import PACK, PACK_RESULTS
from vlal_dist.observability.prometheus_files import TextFile
from vlal_dist.program import Counts, Program
from vlal_dist.storage.store import Store, open_store

JPEG_SIDE = 65_500  # pixels; the encoder's limit


@dataclass(frozen=True)
class Instance:
    """One row of `<split>.parquet`: ids as text, box in pixels, labels as sorted attribute ids."""

    instance_id: str
    image_id: str
    object_id: int
    box: tuple[float, float, float, float]
    positive: list[int]
    negative: list[int]


@dataclass(frozen=True)
class CropSettings:
    """What fixes the bytes of a crop; recorded in `dataset.json`."""

    jpeg_quality: int
    box_expansion: float
    max_pixels: int


@dataclass(frozen=True)
class Photo:
    """A photo decoded once for all its instances."""

    data: bytes
    image: Image.Image
    plain_jpeg: bool


def decode_photo(data: bytes, settings: CropSettings) -> Photo:
    """Decode a whole photo; DataError with the reason when it cannot be."""
    image = open_photo(data, max_pixels=settings.max_pixels)
    return Photo(data=data, image=image, plain_jpeg=is_plain_jpeg(data))


def make_sample(
    instance: Instance, photo: Photo, *, dataset_name: str, settings: CropSettings
) -> tuple[int, str, EncodedSample]:
    """Crop, encode, and lay out one sample: uid, key, tar bytes.

    The original file's bytes are kept when it is an upright RGB or grey JPEG and the crop is all
    of it: nothing is lost to a second compression.

    Raises:
        DataError: the box has no size, lies wholly outside the photo, or is beyond any crop.
    """
    image = photo.image
    bounds = crop_bounds(
        instance.box, width=image.width, height=image.height, expansion=settings.box_expansion
    )
    width, height = bounds[2] - bounds[0], bounds[3] - bounds[1]
    if max(width, height) > JPEG_SIDE or width * height > settings.max_pixels:
        raise DataError(f"box too large: a crop of {width}x{height} pixels, see pack.max_pixels")
    whole = bounds == (0, 0, image.width, image.height)
    jpg = (
        photo.data
        if whole and photo.plain_jpeg
        else encode_jpeg(image.crop(bounds), quality=settings.jpeg_quality)
    )
    x, y, w, h = instance.box
    meta = {
        "box_in_crop": [x - bounds[0], y - bounds[1], w, h],
        "image_id": instance.image_id,
        "instance_id": instance.instance_id,
        "negative": instance.negative,
        "object_id": instance.object_id,
        "positive": instance.positive,
    }
    uid = sample_uid(dataset_name, instance.instance_id)
    key = sample_key(instance.instance_id, uid)
    parts = {"jpg": jpg, "json": json.dumps(meta, separators=(",", ":")).encode()}
    return uid, key, encode_sample(key, parts)


RESULTS = {
    "missing": "missing",
    "unreadable": "bad_image",
    "not an image": "bad_image",
    "too large": "bad_image",
    "truncated or damaged": "bad_image",
    "zero size": "bad_box",
    "box outside": "bad_box",
    "box too large": "bad_box",
}
"""Reason of a reject -> label `result`; any other reason is `other`."""


class PackCounts:
    """Counts finished shards; of a run that goes on, those of the runs before too.

    Args:
        textfiles: folder of node_exporter's collector; None: the counts are kept only.
        root: the dataset root, as an absolute path or URL.

    Attributes:
        instances: result -> instances; with the last shard they are all rows of the input.
        shards: `written` by this run, or `skipped` because an earlier one did -> shards.
        size_bytes: of their tars.
    """

    def __init__(self, textfiles: str | None, *, root: str) -> None:
        self.instances = dict.fromkeys(PACK_RESULTS, 0)
        self.shards = {"written": 0, "skipped": 0}
        self.size_bytes = 0
        self._root = root
        self._file = TextFile(Path(textfiles), what="packing", root=root) if textfiles else None
        self._write()

    def add(self, part: ShardPart) -> None:
        """Count a finished shard, and say so."""
        self.instances["written"] += part.samples
        for reject in part.rejects:
            self.instances[RESULTS.get(reject["reason"], "other")] += 1
        self.shards["skipped" if part.found else "written"] += 1
        self.size_bytes += part.size_bytes
        self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        readings: dict[tuple[str, ...], float] = {
            ("vlal_pack_bytes_total", self._root): self.size_bytes
        }
        for result, count in self.instances.items():
            readings["vlal_pack_instances_total", self._root, result] = count
        for result, count in self.shards.items():
            readings["vlal_pack_shards_total", self._root, result] = count
        self._file.write(PACK, readings)


# Bytes of a sample, estimated from its box alone so that a plan reads no photo: JPEG at quality 95
# takes about half a byte per pixel; headers, padding and labels about 2.5 kB.
BYTES_PER_PIXEL = 0.5
BYTES_PER_SAMPLE = 2560

COPIED = ("vocabulary.json", "feasible.npz")
"""Files of the instances root that make a dataset self-contained."""


@dataclass(frozen=True)
class ShardTask:
    """One shard to build."""

    root: str
    split: str
    name: str
    images: list[str]
    dataset_name: str
    crops: CropSettings
    instances: list[Instance]


def pack(config: Config, flags: Mapping[str, str]) -> Counts:
    """Pack every split of the instances root into the dataset root."""
    source, target = open_store(config.paths.instances), open_store(config.paths.dataset)
    cleaned = _read_cleaned(source)
    crops = CropSettings(
        config.pack.jpeg_quality, config.pack.box_expansion, config.pack.max_pixels
    )
    settings = {
        "name": config.pack.name,
        "clean_sha256": hashlib.sha256(cleaned).hexdigest(),
        "crops": asdict(crops),
        "shard_bytes": config.pack.shard_bytes,
        "block_bytes": config.pack.block_bytes,
        "seed": config.pack.seed,
    }
    clean = json.loads(cleaned)
    copied = {name: source.read(name) for name in COPIED}
    for name, data in copied.items():
        found = hashlib.sha256(data).hexdigest()
        check_digest(f"{source.url}/{name}", clean["files"][name], found)
    # Committed first: a rerun with other settings must not continue this one's shards.
    target.create("pack.json", (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
    PhotoSource(config.pack.images)  # a wrong path is told before any work
    tasks = [
        task
        for split in clean["splits"]
        for task in plan_shards(
            read_instances(source, split, sha256=clean["files"][f"{split}.parquet"]),
            split,
            config.paths.dataset,
            config.pack,
            crops,
        )
    ]
    parts = run_tasks(
        build_shard,
        tasks,
        label="pack",
        unit="instances",
        sizes=[len(task.instances) for task in tasks],
        workers=config.pack.workers,
        finished=PackCounts(config.observability.textfiles, root=target.url).add,
    )
    manifest: dict[str, Any] = {"name": config.pack.name, "likelihood": None, "splits": {}}
    manifest["crops"] = {**asdict(crops), "seed": config.pack.seed}
    manifest |= {name: clean[name] for name in ("vocabulary_digest", "feasible_digest")}
    manifest["files"] = {name: clean["files"][name] for name in COPIED}
    for name, data in copied.items():
        target.create(name, data)
    indexes = {}
    for split in clean["splits"]:
        manifest["splits"][split], indexes[split] = commit_split(
            target,
            split,
            [part for task, part in zip(tasks, parts, strict=True) if task.split == split],
            block_bytes=config.pack.block_bytes,
        )
    check_uids(indexes)
    digest = commit_dataset(target, manifest)
    return _closing_counts(manifest, digest, config.pack.max_rejected)


def plan_shards(
    instances: Iterable[Instance],
    split: str,
    root: str,
    settings: PackConfig,
    crops: CropSettings,
) -> list[ShardTask]:
    """Cut a split into shards: photos in seeded hash order, never divided between two shards."""
    tasks: list[ShardTask] = []
    batch: list[Instance] = []
    size = 0.0

    def close() -> None:
        name = shard_name(split, len(tasks))
        tasks.append(ShardTask(root, split, name, settings.images, settings.name, crops, batch))

    for photo in _by_photo(instances, settings.seed):
        batch.extend(photo)
        size += sum(one.box[2] * one.box[3] * BYTES_PER_PIXEL + BYTES_PER_SAMPLE for one in photo)
        if size >= settings.shard_bytes:
            close()
            batch, size = [], 0.0
    if batch:
        close()
    return tasks


def build_shard(task: ShardTask) -> ShardPart:
    """Build and commit one shard, unless its part file says that it is there already."""
    store = open_store(task.root)
    key = part_key(task.split, task.name)
    if store.exists(key):
        return replace(ShardPart.decode(store.read(key)), found=True)
    photos = _photo_source(tuple(task.images))
    with TarBuilder(task.name) as builder:
        for image_id, group in groupby(task.instances, key=lambda one: one.image_id):
            instances = list(group)
            try:
                photo = _photo(photos, image_id, task.crops)
            except DataError as error:
                builder.part.rejects += [_reject(task.split, one, error) for one in instances]
                continue
            for instance in instances:
                _add(builder, task, instance, photo)
        return commit_shard(store, task.split, builder)


def _add(builder: TarBuilder, task: ShardTask, instance: Instance, photo: Photo) -> None:
    try:
        uid, key, sample = make_sample(
            instance, photo, dataset_name=task.dataset_name, settings=task.crops
        )
    except DataError as error:
        builder.part.rejects.append(_reject(task.split, instance, error))
        return
    labels = SampleLabels(key, instance.instance_id, instance.positive, instance.negative)
    builder.add(uid, instance.object_id, sample, labels)


@lru_cache(maxsize=1)
def _photo_source(places: tuple[str, ...]) -> PhotoSource:
    # Kept per process: listing a zip of 100,000 photos takes a second.
    return PhotoSource(places)


def _photo(photos: PhotoSource, image_id: str, crops: CropSettings) -> Photo:
    data = photos.read(image_id)
    if data is None:
        raise DataError("missing: no such photo in pack.images")
    return decode_photo(data, crops)


def _reject(split: str, instance: Instance, error: DataError) -> dict[str, str]:
    reason, _, detail = str(error).partition(":")
    return {
        "split": split,
        "instance_id": instance.instance_id,
        "reason": reason,
        "detail": detail.strip(),
    }


def _read_cleaned(source: Store) -> bytes:
    try:
        return source.read("clean.json")
    except NotFoundError:
        raise DataError(
            f"{source.url} holds no clean.json: run `python -m shard_tools clean` first, "
            "or correct paths.instances"
        ) from None


def read_instances(source: Store, split: str, *, sha256: str) -> Iterator[Instance]:
    """The instances of a split, in the order of the table.

    Raises:
        DataError: the table is not the one that clean committed.
    """
    data = source.read(f"{split}.parquet")
    check_digest(f"{source.url}/{split}.parquet", sha256, hashlib.sha256(data).hexdigest())
    for row in pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist():
        x, y, w, h = row.pop("box")
        yield Instance(box=(x, y, w, h), **row)


def _by_photo(instances: Iterable[Instance], seed: int) -> list[list[Instance]]:
    photos: dict[str, list[Instance]] = {}
    for instance in instances:
        photos.setdefault(instance.image_id, []).append(instance)
    order = sorted(photos, key=lambda image: hashlib.sha256(f"{seed}\0{image}".encode()).digest())
    return [photos[image] for image in order]


def _closing_counts(manifest: Mapping[str, Any], digest: str, max_rejected: float) -> Counts:
    splits = manifest["splits"]
    samples = {split: entry["samples"] for split, entry in splits.items()}
    rejected = sum(entry["rejected"] for entry in splits.values())
    read = sum(samples.values()) + rejected
    if rejected > max_rejected * read:
        raise DataError(
            f"pack: {rejected} of {read} instances rejected, more than pack.max_rejected "
            f"{max_rejected}; the dataset is complete without them: see rejects.parquet of each "
            "split for the reasons; mend the input and pack into a new paths.dataset, or raise the "
            "limit"
        )
    return {
        "samples": samples,
        "shards": sum(entry["shards"] for entry in splits.values()),
        "bytes": sum(entry["bytes"] for entry in splits.values()),
        "rejected": rejected,
        "dataset": digest[:16],
    }


PROGRAM = Program(
    name="pack",
    usage="python -m shard_tools pack",
    purpose="Crop every instance out of its photo and pack the crops with their labels into "
    "WebDataset tars with an index. Reads paths.instances, writes paths.dataset. Repeat the "
    "command after an interruption: finished shards are kept.",
    sections=("paths", "pack", "observability"),
    flags=("json",),
    output=lambda config, flags: config.paths.dataset,
    work=pack,
)
