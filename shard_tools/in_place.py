"""Packing in place: index, checksums and labels of samples that stay in tars of others.

A tar is one unit of work, whose samples may belong to several splits. It is read once, by its own
headers, and never written. Members of one key must be adjacent, as webdataset has them; a row of
the index is the range of all members of its sample.
"""

import hashlib
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from shard_tools.clean.records import WHOLE_PHOTO
from shard_tools.instances import InstanceRow, Reject
from shard_tools.shard_writer import IN_PLACE_SCHEMA, ShardReport, find_report, report_key
from shard_tools.tar_samples import Listing, list_samples
from vlal_dist.config.sections import PackConfig
from vlal_dist.data.format.images import check_crop_size
from vlal_dist.data.format.index import TAR_KEY
from vlal_dist.data.format.jpeg import upright_size
from vlal_dist.data.format.photo_names import Limits, choose, name_forms, printable
from vlal_dist.data.format.photo_tars import Tar, Tars, find_tars
from vlal_dist.data.format.photos import Photos
from vlal_dist.data.hashing import sample_uid
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.storage.store import FETCH_BYTES, open_store

REPACK = "pack with pack.in_place false into another paths.dataset"
_LONGEST = (1 << 32) - 1
"""Bytes of a sample's range; the index has 32 bits for them."""


@dataclass(frozen=True)
class TarTask:
    """One tar to index for the dataset root `root`.

    Attributes:
        root: where reports are written.
        tar: the tar.
        key: its name below the place of all tars.
        settings: of pack.
        instances: split -> instances whose photos it holds.
    """

    root: str
    tar: Tar
    key: str
    settings: PackConfig
    instances: dict[str, list[InstanceRow]]

    @property
    def num_instances(self) -> int:
        """Number of instances."""
        return sum(map(len, self.instances.values()))


def plan_tars(
    instances: Mapping[Any, Iterable[InstanceRow]], root: str, settings: PackConfig
) -> tuple[str, list[TarTask]]:
    """Assign instances to the tars that hold their photos.

    Returns:
        The place that all tars lie below, and a task for each of them. An instance of no tar is
        given to the first, where it is missing.

    Raises:
        ConfigError: pack.images names something else than tars, two of the same name, or one in
            the root.
    """
    limits = Limits("pack.images", settings.max_bytes, settings.follow_links)
    tars = open_tars(settings.images, limits.setting)
    within = [tar.url for tar in tars.values() if tar.url.startswith(f"{open_store(root).url}/")]
    if within:
        raise ConfigError(
            f"pack.images: {printable(within[0])} lies in paths.dataset {root}, whose files pack "
            "may remove (--replace); give another paths.dataset"
        )
    place, keys = common_place(list(tars.values()))
    tasks = {
        name: TarTask(root, tar, key, settings, {split: [] for split in instances})
        for (name, tar), key in zip(tars.items(), keys, strict=True)
    }
    first, photos = next(iter(tasks.values())), None
    for split, rows in instances.items():
        for row in rows:
            task = tasks.get(row.image_id.partition("/")[0])
            if task is None:
                photos = photos or Photos(settings.images, limits)
                task = tasks.get(_tar_of(photos, row.image_id), first)
            task.instances[split].append(row)
    return place, list(tasks.values())


def open_tars(places: Sequence[str], setting: str) -> dict[str, Tar]:
    """All tars of `pack.images` by name, in order.

    Raises:
        ConfigError: none, a place that names no tars, or two tars of the same name.
    """
    tars: dict[str, Tar] = {}
    for place in places:
        if not place.lower().endswith(".tar"):
            raise ConfigError(
                f"{setting} {place}: packing in place reads tars; give them, or a pattern such as "
                "FOLDER/*.tar or s3://BUCKET/*.tar, or set pack.in_place false"
            )
        for tar in find_tars(open_store(place).url, setting):
            if (other := tars.setdefault(tar.name, tar)) is not tar:
                raise ConfigError(
                    f"{setting}: {other.url} and {tar.url} would give their photos the same names "
                    f"({tar.name}/...); rename one, or pack them into two roots"
                )
    if not tars:
        raise ConfigError(f"{setting} is empty; give the tars that hold the photos")
    return tars


def common_place(tars: Sequence[Tar]) -> tuple[str, list[str]]:
    """The deepest folder or prefix that holds all tars, and the key of each below it.

    Raises:
        ConfigError: they lie in several stores, or a name is hidden.
    """
    parts = [tar.url.split("/") for tar in tars]
    folders = zip(*(one[:-1] for one in parts), strict=False)
    depth = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, folders))
    place = "/".join(parts[0][:depth])
    remote = {tar.store.local_path("any") is None for tar in tars}
    if len(remote) > 1 or (remote == {True} and depth < 3):
        raise ConfigError(
            "pack.images: tars that are packed in place lie in one bucket or one file system; pack "
            "them into several roots, and train on them with data.mix"
        )
    keys = ["/".join(one[depth:]) for one in parts]
    for key in keys:
        if not TAR_KEY.fullmatch(key):
            raise ConfigError(
                f"pack.images: {printable(key)} below {printable(place)} is no name for a tar that "
                "is packed in place: it ends in .tar, and no part begins with a dot; rename it"
            )
    return place or "/", keys


def tars_digest(place: str, tasks: Sequence[TarTask]) -> str:
    """What a started root holds of its tars: where they are, their names and sizes."""
    lines = [place, *(f"{task.key} {task.tar.size_bytes}" for task in tasks)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _tar_of(photos: Photos, image_id: str) -> str:
    """Name of the tar that holds a photo whose name lacks it; empty: none, or several."""
    try:
        place, path = photos.find(image_id)
    except DataError:
        return ""
    return place.locate(path)[0].name if isinstance(place, Tars) else ""


def index_tar(task: TarTask) -> dict[str, ShardReport]:
    """Index one tar and commit its report of each split, unless they are there already."""
    store = open_store(task.root)
    found = {
        split: find_report(store, split, task.key, schema=IN_PLACE_SCHEMA)
        for split in task.instances
    }
    reports = {split: report for split, report in found.items() if report is not None}
    if len(reports) == len(task.instances):
        return reports
    with _local_tar(task.tar) as (tar, sha256):
        listing = list_samples(tar)
        listing.damage = listing.damage.replace(printable(tar.url), printable(task.tar.url))
        for split, instances in task.instances.items():
            if split in reports:
                continue
            report = ShardReport(
                task.key,
                size_bytes=tar.size_bytes,
                sha256=sha256,
                columns={name: [] for name in IN_PLACE_SCHEMA.names},
            )
            _index_split(report, tar, listing, task.settings, split, instances)
            store.create(report_key(split, task.key), report.encode())
            reports[split] = report
    return {split: reports[split] for split in task.instances}


@contextmanager
def _local_tar(tar: Tar) -> Iterator[tuple[Tar, str]]:
    """The tar as a local file, downloaded for the time being if it is remote, and its sha256."""
    sha256 = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="vlal-") as folder:
        path = Path(folder, f"{tar.name}.tar")
        remote = tar.changed_ns is None
        with path.open("wb") as file:
            for offset in range(0, tar.size_bytes, FETCH_BYTES):
                piece = tar.read(offset, min(FETCH_BYTES, tar.size_bytes - offset))
                sha256.update(piece)
                if remote:
                    file.write(piece)
        yield find_tars(str(path), "pack.images")[0] if remote else tar, sha256.hexdigest()


def _index_split(
    report: ShardReport,
    tar: Tar,
    listing: Listing,
    settings: PackConfig,
    split: str,
    instances: Sequence[InstanceRow],
) -> None:
    """Add the rows of a split in the order of the tar, and what is rejected."""
    rows: list[tuple[int, InstanceRow]] = []
    for instance in instances:
        try:
            rows.append((_find(listing, tar, instance), instance))
        except DataError as error:
            report.rejects.append(_reject(split, instance, error))
    end = 0
    for number, instance in sorted(rows, key=lambda row: row[0]):
        try:
            entry = _entry(tar, listing, number, instance, settings)
            if entry["offset"] < end:
                raise DataError(f"not in place: its sample has another instance; {REPACK}")
        except DataError as error:
            report.rejects.append(_reject(split, instance, error))
            continue
        end = entry["offset"] + entry["length"]
        for name, values in report.columns.items():
            values.append(entry[name])


def _find(listing: Listing, tar: Tar, instance: InstanceRow) -> int:
    """Number of the member that holds an instance's photo; DataError with the reason if none."""
    if instance.box != WHOLE_PHOTO:
        raise DataError(f"not in place: it has a box, whose crop must be stored; {REPACK}")
    for form in name_forms(instance.image_id):
        for anywhere in (False, True):
            path = choose(form, listing.names.candidates(form, anywhere=anywhere), where=tar.name)
            if path is None:
                continue
            found = listing.names.where(path)
            if len(found) > 1:
                raise DataError(f"ambiguous: {tar.name} has {len(found)} members of that name")
            return found[0][1]
    damage = f"; {listing.damage}" if listing.damage else ""
    raise DataError(f"missing: no member {printable(instance.image_id)}{damage}")


def _entry(
    tar: Tar, listing: Listing, number: int, instance: InstanceRow, settings: PackConfig
) -> dict[str, Any]:
    """A row of the report.

    Raises:
        DataError: the sample cannot be used in place.
    """
    member, sample = listing.members[number], listing.sample[number]
    if sample is None:
        raise DataError("not in place: the member's name has no suffix, so it is no sample")
    if sample.key in listing.repeated:
        raise DataError(f"not in place: members of its key lie in several places; {REPACK}")
    suffix, count = Counter(sample.suffixes).most_common(1)[0]
    if count > 1:
        raise DataError(f"not in place: its sample has {count} members {suffix}; {REPACK}")
    length = sample.end - sample.start
    if length > min(_LONGEST, tar.size_bytes - sample.start):
        raise DataError(f"not in place: its sample has {length} bytes, at most {_LONGEST}")
    Limits("pack.images", settings.max_bytes).check_size(member.name, member.size)
    data = tar.read(sample.start, length)
    at = member.offset - sample.start
    jpg = data[at : at + member.size]
    if not jpg.startswith(b"\xff\xd8\xff"):
        raise DataError(f"not in place: no JPEG; {REPACK}")
    try:
        width, height = upright_size(jpg, max_pixels=settings.max_pixels)
        check_crop_size(width, height, max_pixels=settings.max_pixels)
    except DataError as error:
        raise DataError(f"{error}; {REPACK}") from None
    return {
        **dict.fromkeys(("shard", "json_offset", "json_length"), 0),
        **dict.fromkeys(("likelihood_offset", "likelihood_length"), 0),
        "uid": sample_uid(settings.name, instance.instance_id),
        "offset": sample.start,
        "length": length,
        "jpg_offset": at,
        "jpg_length": member.size,
        "object_id": instance.object_id,
        "crc32": zlib.crc32(data),
        "key": sample.key,
        "instance_id": instance.instance_id,
        "positive": instance.positive,
        "negative": instance.negative,
        "image_id": instance.image_id,
        "width": width,
        "height": height,
    }


def _reject(split: str, instance: InstanceRow, error: DataError) -> Reject:
    reason, _, detail = str(error).partition(":")
    return {
        "split": split,
        "instance_id": instance.instance_id,
        "reason": reason,
        "detail": detail.strip(),
    }
