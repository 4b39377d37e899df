"""Tars of webdataset, such as img2dataset's KEY.jpg, KEY.txt, KEY.json: photos and their labels.

webdataset reads the json members; which members there are, where they lie and whether the tar is
whole, it does not say, so the tar is listed as well. Nothing is copied: the configuration leaves
the photos where they are (`pack.in_place`).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shard_tools.importers.records import Input, Item, Notes, Record, Rejected, list_inputs
from shard_tools.tar_samples import Listing, TarSample, list_samples
from vlal_dist.config.sections import ImportConfig
from vlal_dist.contents import parse_json, shown
from vlal_dist.data.format.photo_names import SUFFIXES
from vlal_dist.data.format.photo_tars import find_tars
from vlal_dist.errors import ConfigError, DataError, bounded

MEANINGS = {
    "positive": ("positive", "positive_attributes"),
    "negative": ("negative", "negative_attributes"),
    "object": ("object", "object_name"),
    "split": ("split",),
}
"""Meaning -> keys of a sample's json that are looked for where importing.columns names none."""
SPLIT_NAMES = {"validation": "val", "valid": "val", "dev": "val"}
LONGEST_JSON = 16 << 20
"""Bytes of a json member that is read."""

RULES = {
    "webdataset.sample": "adjacent members of one key, which ends at the first dot of the name",
    "webdataset.photo": "the only member of a photo's suffix; of several that without a second dot",
    "webdataset.name": "a photo is named TAR/MEMBER, the tar without folders and .tar",
    "webdataset.split": "validation, valid and dev in the json mean val",
}
"""Name -> rule, for import.json."""


def read_webdataset(settings: ImportConfig) -> Iterator[Item]:
    """The records of tars, one per sample.

    Raises:
        ConfigError: a file that is no .tar, two of the same name, or an unknown meaning.
    """
    keys = _keys(settings.columns)
    inputs, names = list_inputs(settings), dict[str, str]()
    for one in inputs:
        if not one.name.endswith(".tar"):
            raise ConfigError(
                f"importing.inputs: {bounded(one.url)} is no .tar; give tars, unpacked if they are "
                "compressed"
            )
        if (other := names.setdefault(one.name, one.url)) != one.url:
            raise ConfigError(
                f"importing.inputs: {bounded(other)} and {bounded(one.url)} would give their "
                "photos the same names; rename one, or import them into two roots"
            )
    images = settings.photos or [place for places in settings.inputs.values() for place in places]
    yield Notes(
        facts={"columns": {meaning: list(found) for meaning, found in keys.items()},
               "rules": RULES},
        settings={"pack.images": images, "pack.in_place": True, "data.likelihood": "scores"},
    )  # fmt: skip
    for one in inputs:
        yield from _read_tar(one, keys)


def _keys(columns: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Meaning -> keys that are looked for, the first that a sample has."""
    unknown = [name for name in columns if name not in MEANINGS]
    if unknown:
        raise ConfigError(
            f"importing.columns: {shown(unknown[0])} is no meaning of webdataset; they are "
            f"{', '.join(MEANINGS)}"
        )
    return {
        meaning: (columns[meaning],) if meaning in columns else found
        for meaning, found in MEANINGS.items()
    }


def _read_tar(one: Input, keys: Mapping[str, tuple[str, ...]]) -> Iterator[Item]:
    with one.local() as path:
        tar = find_tars(str(path), "importing.inputs")[0]
        listing = list_samples(tar)
        wanted = {
            member.name
            for sample in listing.samples
            for number, suffix in zip(sample.members, sample.suffixes, strict=True)
            for member in [listing.members[number]]
            if suffix == "json" and member.size <= LONGEST_JSON
        }
        jsons = _read_jsons(path, wanted)
        key, data = next(jsons, ("", b""))
        for number, sample in enumerate(listing.samples, 1):
            found = b""
            if sample.key == key:
                found = data
                key, data = next(jsons, ("", b""))
            yield _record(one, tar.name, listing, sample, number, found, keys)
    if listing.damage:
        damage = listing.damage.replace(str(path), one.url)
        yield Rejected(one.name, len(listing.samples), "", "damaged_tar", damage)


def _read_jsons(path: Path, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    """Key and json of the samples that have one, in order, as webdataset reads them.

    What it cannot read is left out; the listing says why.
    """
    # Here, because it imports torch, which the other tools do without.
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with path.open("rb") as stream:
        sources: list[dict[str, Any]] = [{"url": path.name, "stream": stream}]
        files = tar_file_expander(
            sources, handler=lambda error: True, select_files=wanted.__contains__
        )
        for sample in group_by_keys(files, handler=lambda error: True):
            yield sample["__key__"], sample.get("json", b"")


def _record(
    one: Input,
    tar: str,
    listing: Listing,
    sample: TarSample,
    number: int,
    data: bytes,
    keys: Mapping[str, tuple[str, ...]],
) -> Record | Rejected:
    """What a sample says of its photo; `number` counts samples from 1."""

    def reject(reason: str, detail: str) -> Rejected:
        return Rejected(one.name, number, sample.key, reason, bounded(detail))

    photos = [
        (suffix, listing.members[place].name)
        for place, suffix in zip(sample.members, sample.suffixes, strict=True)
        if f".{suffix}".endswith(SUFFIXES)
    ]
    if len(photos) > 1:
        photos = [(suffix, name) for suffix, name in photos if "." not in suffix]
    if len(photos) != 1:
        count = len(photos) or "no"
        return reject("no_photo", f"{count} members of a photo's suffix: {shown(sample.suffixes)}")
    if sample.key in listing.repeated:
        return reject("not_adjacent", "members of its key lie in several places of the tar")
    if len(set(sample.suffixes)) != len(sample.suffixes):
        return reject("repeated_member", f"members {shown(sample.suffixes)}")
    if not data:
        return reject("no_labels", "it has no json, or one that cannot be read")
    try:
        about = parse_json(data, dict[str, Any], where="its json", remedy="", nan=True)
    except DataError as error:
        return reject("bad_json", str(error).removesuffix("; "))
    values = {
        meaning: next((about[key] for key in found if about.get(key) is not None), None)
        for meaning, found in keys.items()
    }
    if values["positive"] is None and values["negative"] is None:
        looked = [key for meaning in ("positive", "negative") for key in keys[meaning]]
        return reject(
            "no_labels",
            f"its json has none of {', '.join(looked)} (importing.columns): {shown(list(about))}",
        )
    labels = {meaning: values[meaning] or [] for meaning in ("positive", "negative")}
    for meaning, names in labels.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return reject("bad_labels", f"{meaning} is {shown(names)}, not a list of names")
    object_name, split = values["object"] or "", values["split"] or one.split
    if not isinstance(object_name, str) or not isinstance(split, str):
        return reject("bad_json", f"object {shown(object_name)} or split {shown(split)} is no text")
    parts = [part for part in photos[0][1].split("/") if part not in ("", ".")]
    return Record(
        split=SPLIT_NAMES.get(split, split),
        image_id="/".join([tar, *parts]),
        instance_id="",
        object_name=object_name,
        box=None,
        positive=tuple(labels["positive"]),
        negative=tuple(labels["negative"]),
        file=one.name,
        line=number,
    )
