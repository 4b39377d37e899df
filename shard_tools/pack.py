"""`vlal pack`: instances and photos to verified WebDataset shards.

Photos are put in a seeded hash order, the instances of one photo adjacent, and cut into shards by
an estimate of their bytes. Each shard is then one unit of work whose bytes depend on nothing but
its own instances: any number of processes gives the same files, and a killed run continues.
"""

import hashlib
import json
import logging
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from shard_tools.clean.records import WHOLE_PHOTO, Box
from shard_tools.in_place import REPACK, TarTask, index_tar, plan_tars, tars_digest
from shard_tools.instances import (
    InstanceRow,
    Reject,
    read_cleaned,
    read_instances,
)
from shard_tools.shard_writer import (
    Engine,
    ShardReport,
    TarBuilder,
    commit_dataset,
    commit_settings,
    commit_split,
    find_report,
    gather_index,
    open_engine,
    owned_by,
    reopen_dataset,
    run_tasks,
    shard_name,
)
from vlal_dist.config.sections import Config, PackConfig
from vlal_dist.data.format.annotations import ANNOTATIONS_SCHEMA, encode_annotations
from vlal_dist.data.format.dataset import ROOT_FILES, check_digest
from vlal_dist.data.format.images import (
    Photo,
    check_crop_size,
    crop_bounds,
    encode_jpeg,
    read_photo,
)
from vlal_dist.data.format.index import (
    LABELS_SCHEMA,
    REJECTS_SCHEMA,
    check_uids,
    encode_table,
)
from vlal_dist.data.format.photos import Limits, Photos, printable
from vlal_dist.data.format.tar import EncodedSample, encode_sample, sample_key
from vlal_dist.data.hashing import sample_uid
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.observability.metric_definitions import PACK, PACK_RESULTS
from vlal_dist.observability.prometheus_files import TextFile
from vlal_dist.pipeline import pack_inputs
from vlal_dist.program import Counts, Program, make_way
from vlal_dist.remarks import remark
from vlal_dist.storage.store import Store, open_store

CROP_SETTINGS = {"jpeg_quality", "box_expansion", "max_pixels", "background", "keep_metadata"}
"""Settings that the bytes of crops depend on, recorded in the manifest."""

# Bytes of a sample, estimated from its box alone so that a plan reads no photo: JPEG at quality 95
# takes about half a byte per pixel; headers, padding and labels about 2.5 kB.
BYTES_PER_PIXEL = 0.5
BYTES_PER_SAMPLE = 2560
BYTES_PER_PHOTO = 100_000  # of a whole photo, whose size only its file knows


Crop = tuple[int, EncodedSample, dict[str, Any]]
"""uid of a sample, its tar bytes, and what its `KEY.json` says."""
_LIMITS = Limits("pack.images")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardTask:
    """One shard to build in the dataset root `root`; `limits`: of its photos."""

    root: str
    split: str
    name: str
    settings: PackConfig
    instances: list[InstanceRow]
    limits: Limits = _LIMITS

    @property
    def num_instances(self) -> int:
        """Number of instances."""
        return len(self.instances)


def pack(config: Config, flags: Mapping[str, str]) -> Counts:
    """Pack every split of the instances root into the dataset root."""
    with open_engine(
        flags,
        workers=config.pack.workers,
        written={"paths.dataset": config.paths.dataset},
        read={f"pack.images {place}": place for place in config.pack.images},
    ) as engine:
        return _pack(config, flags, engine)


def _pack(config: Config, flags: Mapping[str, str], engine: Engine) -> Counts:
    source, target = open_store(config.paths.instances), open_store(config.paths.dataset)
    cleaned, clean = read_cleaned(source)
    settings = _absolute(config.pack)  # workers start elsewhere
    copied = {name: source.read(name) for name in ROOT_FILES}
    for name, data in copied.items():
        found = hashlib.sha256(data).hexdigest()
        check_digest(f"{source.url}/{name}", clean["files"][name], found)
    crops = settings.model_dump(include=CROP_SETTINGS)
    crops["background"] = settings.background.lower()
    recorded = {
        **settings.model_dump(include={"name", "shard_bytes", "block_bytes", "seed"}),
        "clean_sha256": hashlib.sha256(cleaned).hexdigest(),
        "crops": crops,
    }
    instances = {
        split: read_instances(source, split, sha256=clean["files"][f"{split}.parquet"])
        for split in clean["splits"]
    }
    place, restored = None, {}
    tasks: list[ShardTask | TarTask] = []
    if settings.in_place:
        if "retry-rejected" in flags:
            raise ConfigError(
                "pack.in_place: --retry-rejected writes shards again, and tars of others are never "
                "written; correct the photos, and pack into another paths.dataset"
            )
        place, in_place = plan_tars(instances, target.url, settings)
        make_way(PROGRAM, config, flags)
        commit_settings(target, "pack.json", {**recorded, "tars": tars_digest(place, in_place)})
        tasks += in_place
    else:
        _open_places.cache_clear()
        limits = _photo_limits(config)
        _open_photos(settings, limits)  # a wrong path fails before any work
        make_way(PROGRAM, config, flags)
        commit_settings(target, "pack.json", recorded)
        cropped = [
            task
            for split, rows in instances.items()
            for task in plan_shards(rows, split, target.url, settings, limits)
        ]
        if "retry-rejected" in flags:
            restored = {"restored": forget_restored(target, cropped, engine)}
        tasks += cropped
    counter = PackCounts(config.observability.textfiles, root=target.url)
    built = run_tasks(
        _build,
        tasks,
        label="pack",
        unit="instances",
        sizes=[task.num_instances for task in tasks],
        engine=engine,
        finished=counter.add_all,
    )
    reports = [report for found in built for report in found.values()]
    manifest: dict[str, Any] = {"name": settings.name, "likelihood": None, "splits": {}}
    manifest["crops"] = {**crops, "seed": settings.seed}
    manifest["vocabulary_digest"] = clean["vocabulary_digest"]
    manifest["feasible_digest"] = clean["feasible_digest"]
    manifest["files"] = {name: clean["files"][name] for name in ROOT_FILES}
    for name, data in copied.items():
        target.create(name, data)
    indexes = []
    for split in clean["splits"]:
        of_split = [found[split] for found in built if split in found]
        shards, index = gather_index(of_split)
        entry = commit_split(
            target, split, shards, index, _tables(of_split), block_bytes=settings.block_bytes
        )
        if place is not None:
            entry["tars"] = place
        rejected = sum(len(report.rejects) for report in of_split)
        manifest["splits"][split] = {**entry, "rejected": rejected}
        indexes.append(index)
    check_uids(indexes)
    counts = commit_dataset(target, manifest)
    rejects = [reject for report in reports for reject in report.rejects]
    _check_rejected(rejects, settings, read=sum(task.num_instances for task in tasks))
    return {**counts, "rejected": len(rejects), **restored}


def _absolute(settings: PackConfig) -> PackConfig:
    images = [open_store(place).url for place in settings.images]
    return settings.model_copy(update={"images": images})


def plan_shards(
    instances: Iterable[InstanceRow],
    split: str,
    root: str,
    settings: PackConfig,
    limits: Limits = _LIMITS,
) -> list[ShardTask]:
    """Cut a split into shards: photos in seeded hash order, never divided between two shards."""
    tasks: list[ShardTask] = []
    batch: list[InstanceRow] = []
    size = 0.0
    photos = _by_photo(instances, settings.seed)
    for number, photo in enumerate(photos, 1):
        batch.extend(photo)
        size += sum(_estimated_bytes(one.box) for one in photo)
        if size >= settings.shard_bytes or number == len(photos):
            name = shard_name(split, len(tasks))
            tasks.append(ShardTask(root, split, name, settings, batch, limits))
            batch, size = [], 0.0
    return tasks


def _estimated_bytes(box: Box) -> float:
    if box == WHOLE_PHOTO:
        return BYTES_PER_PHOTO + BYTES_PER_SAMPLE
    return box[2] * box[3] * BYTES_PER_PIXEL + BYTES_PER_SAMPLE


def _build(task: ShardTask | TarTask) -> dict[str, ShardReport]:
    """Split -> report of one finished task."""
    return index_tar(task) if isinstance(task, TarTask) else {task.split: build_shard(task)}


def build_shard(task: ShardTask) -> ShardReport:
    """Build and commit one shard, unless its report says that it is there already."""
    store = open_store(task.root)
    if report := find_report(store, task.split, task.name):
        return report
    with TarBuilder(task.name) as builder:
        for crop in _crops(task, task.instances):
            if isinstance(crop, dict):
                builder.report.rejects.append(crop)
            else:
                builder.add(*crop)
        return builder.commit(store, task.split)


def forget_restored(target: Store, tasks: Sequence[ShardTask], engine: Engine) -> int:
    """Take back the shards with rejected instances that can be packed now.

    Returns:
        The number of those instances. Where none can be packed and none has another reason than
        its shard's report says, nothing is changed.
    """
    outcomes = run_tasks(
        retry_shard,
        tasks,
        label="retry",
        unit="instances",
        sizes=[len(task.instances) for task in tasks],
        engine=engine,
    )
    stale: dict[str, list[str]] = {}
    if any(outcome.changed for outcome in outcomes):
        for task, outcome in zip(tasks, outcomes, strict=True):
            if not outcome.equal:
                stale.setdefault(task.split, []).append(task.name)
    restored, tried = sum(o.restored for o in outcomes), sum(o.tried for o in outcomes)
    if stale:
        shards = sum(map(len, stale.values()))
        logger.info(
            "%d of %d rejected instances can be packed now; %d of %d shards are written again",
            restored,
            tried,
            shards,
            len(tasks),
        )
        reopen_dataset(target, stale)
    else:
        logger.info("none of %d rejected instances can be packed now: nothing changes", tried)
    return restored


@dataclass(frozen=True)
class Retried:
    """Rejected instances of a shard, tried again.

    Attributes:
        tried: their number.
        restored: those that can be packed now.
        changed: whether one is restored or has another reason.
        equal: whether the shard's rejects would be the same, details included.
    """

    tried: int = 0
    restored: int = 0
    changed: bool = False
    equal: bool = True


def retry_shard(task: ShardTask) -> Retried:
    """Try the rejected instances of a finished shard again, without writing."""
    report = find_report(open_store(task.root), task.split, task.name)
    before = [] if report is None else report.rejects
    wanted = {reject["instance_id"] for reject in before}
    crops = list(_crops(task, [one for one in task.instances if one.instance_id in wanted]))
    now = [crop for crop in crops if isinstance(crop, dict)]
    return Retried(
        tried=len(crops),
        restored=len(crops) - len(now),
        changed=[r["reason"] for r in now] != [r["reason"] for r in before],
        equal=now == before,
    )


def _crops(task: ShardTask, instances: Iterable[InstanceRow]) -> Iterator[Crop | Reject]:
    """The sample of each instance, or the reason why there is none; photos are decoded once."""
    photos = _open_photos(task.settings, task.limits)
    groups = [list(group) for _, group in groupby(instances, key=lambda one: one.image_id)]
    read = photos.read_each(group[0].image_id for group in groups)
    for group, data in zip(groups, read, strict=True):
        try:
            if isinstance(data, DataError):
                raise data
            photo = decode_photo(data, task.settings)
        except DataError as error:
            yield from (_reject(task, one, error) for one in group)
            continue
        for instance in group:
            try:
                yield make_sample(instance, photo, task.settings)
            except DataError as error:
                yield _reject(task, instance, error)


def decode_photo(data: bytes, settings: PackConfig) -> Photo:
    """Decode a whole photo; DataError with the reason when it cannot be."""
    return read_photo(
        data,
        max_pixels=settings.max_pixels,
        background=settings.background.lower(),
        keep_metadata=settings.keep_metadata,
    )


def make_sample(instance: InstanceRow, photo: Photo, settings: PackConfig) -> Crop:
    """Crop, encode, and lay out one sample: its uid, its tar bytes, and what `KEY.json` says.

    Where the crop is all of an upright JPEG, the file's own image data are stored, without its
    metadata: nothing is lost to a second compression.

    Raises:
        DataError: the box has no size, lies wholly outside the photo, or is beyond any crop.
    """
    image, box = photo.image, instance.box
    if box == WHOLE_PHOTO:
        box = (0.0, 0.0, float(image.width), float(image.height))
    bounds = crop_bounds(
        box, width=image.width, height=image.height, expansion=settings.box_expansion
    )
    width, height = bounds[2] - bounds[0], bounds[3] - bounds[1]
    check_crop_size(width, height, max_pixels=settings.max_pixels)
    whole = bounds == (0, 0, image.width, image.height)
    jpg = photo.jpeg if whole else None
    if jpg is None:
        jpg = encode_jpeg(image.crop(bounds), quality=settings.jpeg_quality)
    x, y, w, h = box
    meta = {
        "box_in_crop": [x - bounds[0], y - bounds[1], w, h],
        "image_id": instance.image_id,
        "instance_id": instance.instance_id,
        "negative": instance.negative,
        "object_id": instance.object_id,
        "positive": instance.positive,
    }
    uid = sample_uid(settings.name, instance.instance_id)
    members = {"jpg": jpg, "json": json.dumps(meta, separators=(",", ":")).encode()}
    return uid, encode_sample(sample_key(instance.instance_id, uid), members), meta


RESULTS = {
    "missing": "missing",
    "unreadable": "bad_image",
    "not an image": "bad_image",
    "too large": "bad_image",
    "truncated or damaged": "bad_image",
    "unsupported": "bad_image",
    "zero size": "bad_box",
    "box outside": "bad_box",
    "box too large": "bad_box",
    "box too narrow": "bad_box",
}
"""Reason of a reject -> label `result`; any other reason is `other`."""


class PackCounts:
    """Counts finished shards, including those that an interrupted run left.

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

    def add(self, report: ShardReport) -> None:
        """Count a finished shard and update the file."""
        self.instances["written"] += report.samples
        for reject in report.rejects:
            self.instances[RESULTS.get(reject["reason"], "other")] += 1
        self.shards["skipped" if report.found else "written"] += 1
        self.size_bytes += report.size_bytes
        self._write()

    def add_all(self, reports: Mapping[str, ShardReport]) -> None:
        """Count the reports of a finished task."""
        for report in reports.values():
            self.add(report)

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


def _photo_limits(config: Config) -> Limits:
    """What may be read of photos, under a name of this command: its processes share lists."""
    return Limits(
        "pack.images",
        config.pack.max_bytes,
        config.pack.follow_links,
        image_column=config.pack.image_column,
        cache=os.path.abspath(config.paths.cache),
        command=secrets.token_hex(8),
    )


def _open_photos(settings: PackConfig, limits: Limits) -> Photos:
    if not settings.images:
        raise ConfigError(
            "pack.images is empty; name what holds the photos: a folder, zip, tar, table or s3://"
        )
    return _open_places(tuple(settings.images), limits)


@lru_cache(maxsize=1)
def _open_places(places: tuple[str, ...], limits: Limits) -> Photos:
    # Kept per process: listing a zip of 100,000 photos takes a second.
    return Photos(places, limits)


def _reject(task: ShardTask, instance: InstanceRow, error: DataError) -> Reject:
    # Without paths of places: equal photos give equal bytes wherever they lie.
    wheres, text = [open_store(place).url for place in task.settings.images], str(error)
    for where in (", ".join(wheres), *wheres):
        text = text.replace(f" {printable(where)}", " pack.images")
    reason, _, detail = text.partition(":")
    return {
        "split": task.split,
        "instance_id": instance.instance_id,
        "reason": reason,
        "detail": detail.strip(),
    }


def _tables(reports: list[ShardReport]) -> dict[str, bytes | Path]:
    """Labels and rejects of a split."""
    labels = {
        name: [value for report in reports for value in report.columns[name]]
        for name in LABELS_SCHEMA.names
    }
    rejects = [reject for report in reports for reject in report.rejects]
    columns = {name: [reject[name] for reject in rejects] for name in REJECTS_SCHEMA.names}
    files: dict[str, bytes | Path] = {
        "labels.parquet": encode_table(labels, LABELS_SCHEMA),
        "rejects.parquet": encode_table(columns, REJECTS_SCHEMA),
    }
    if reports and "image_id" in reports[0].columns:
        files["annotations.arrow"] = encode_annotations(
            {
                name: [value for report in reports for value in report.columns[name]]
                for name in ANNOTATIONS_SCHEMA.names
            }
        )
    return files


def _by_photo(instances: Iterable[InstanceRow], seed: int) -> list[list[InstanceRow]]:
    photos: dict[str, list[InstanceRow]] = {}
    for instance in instances:
        photos.setdefault(instance.image_id, []).append(instance)
    order = sorted(photos, key=lambda image: hashlib.sha256(f"{seed}\0{image}".encode()).digest())
    return [photos[image] for image in order]


def _check_rejected(rejects: Sequence[Reject], settings: PackConfig, *, read: int) -> None:
    """Say what was rejected; DataError when it is above the limit."""
    if not rejects:
        return
    counts = Counter(reject["reason"] for reject in rejects)
    first = {reject["reason"]: reject for reject in reversed(rejects)}
    shown = "; ".join(
        f"{count} {reason}, such as {first[reason]['instance_id'][:100]} of "
        f"{first[reason]['split']}: {first[reason]['detail'][:200]}"
        for reason, count in counts.most_common(3)
    )
    max_rejected = settings.max_rejected
    remedies = {
        f"{REPACK}; or correct them, and pack into another paths.dataset"
        if settings.in_place
        else "correct boxes in the annotations, and repeat clean and pack with --replace"
        if RESULTS.get(reason) == "bad_box"
        else "correct pack.images or restore the photos, and repeat with --retry-rejected"
        for reason in counts
    }
    text = f"{len(rejects)} of {read} instances rejected ({shown})"
    remedy = "; ".join(sorted(remedies, reverse=True))
    if len(rejects) > max_rejected * read:
        raise DataError(
            f"pack: {text}, more than pack.max_rejected {max_rejected:g}; the dataset is complete "
            f"without them, and rejects.parquet of each split lists them: {remedy}; or raise the "
            "limit"
        )
    remark(logger, "pack.images", "%s; %s", text, remedy)


PROGRAM = Program(
    name="pack",
    usage="vlal pack",
    purpose="Crop every instance out of its photo and pack the crops with their labels into "
    "WebDataset tars with an index. Reads paths.instances, writes paths.dataset. Repeat the "
    "command after an interruption: finished shards are kept.",
    sections=("paths", "pack", "observability"),
    flags=("engine", "retry-rejected", "replace", "json"),
    output=lambda config, flags: config.paths.dataset,
    work=pack,
    inputs=pack_inputs,
    owned=owned_by("pack.json"),
)
