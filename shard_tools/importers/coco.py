"""COCO JSON with attributes: by name, by id (Fashionpedia, PACO), or as a vector (OVAD).

A file is one JSON object with the lists `images` (id, file_name), `annotations` (id, image_id,
category_id, bbox of x, y, width, height in pixels, iscrowd), `categories` (id, name) and, where
attributes are given by id, `attributes` (id, name). Facts of the real files:

- OVAD (ovad2000.json): `att_vec` of an annotation has one number per entry of `attributes`: 1
  present, 0 absent, -1 unknown. Names hold their type, `cleanliness:clean/neat`.
- Fashionpedia: `attribute_ids` lists what is present; ids have gaps. The files of its global
  attributes have neither `bbox` nor `category_id`: they speak of the whole photo.
- PACO: `attribute_ids`; `attr_type_to_attr_idxs` lists the ids of each type (color,
  pattern_marking, material, transparency), and an annotation's `unknown_TYPE` is 1 where no
  annotator could tell. A type with 0 was annotated in full. Annotations without `attribute_ids` are
  unannotated. `file_name` has its folder (train2017/000000000009.jpg).
- COCO Attributes is distributed as a pickle, which is not read: it can run any program.

The whole file is held in memory, about eight times its size.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shard_tools.clean.files import read_json
from shard_tools.clean.names import listed, name_problem
from shard_tools.importers.records import Box, Input, Item, Notes, Record, Rejected, list_inputs
from vlal_dist.config.sections import ImportConfig
from vlal_dist.contents import shown
from vlal_dist.errors import DataError

STYLES = ("attributes", "attribute_ids", "att_vec")
"""Keys of an annotation that hold its attributes; the first that occurs is read."""

RULES = {
    "coco.vector": "att_vec: 1 present, 0 absent, -1 unknown (importing.numbers: another reading)",
    "coco.listed": "attributes as a list, attribute_ids: those listed are present",
    "coco.unlisted": "those not listed are what importing.unlisted says (unknown or absent)",
    "coco.types": "not listed, of a type of attr_type_to_attr_idxs with unknown_TYPE 0 and at "
    "least one listed: absent",
    "coco.crowd": "iscrowd 1 marks a group of objects: rejected",
    "coco.ids": "instance_id is the annotation's id; @N follows where an earlier file has the same",
}
"""Name -> rule, for import.json."""

READINGS: dict[str, tuple[int, int, int | None]] = {
    "auto": (1, 0, -1),
    "1/0/-1": (1, 0, -1),
    "1/-1/0": (1, -1, 0),
    "1/0": (1, 0, None),
}
"""importing.numbers -> the numbers of present, absent, unknown."""

PRESENT, ABSENT, UNKNOWN = True, False, None
WORDS = {"present": PRESENT, "absent": ABSENT, "unknown": UNKNOWN}
Labels = dict[str, bool | None]


class _Unusable(Exception):
    """An entry must be rejected; arguments: reason and detail of the `Rejected`."""


@dataclass(frozen=True)
class _Document:
    """What annotations of one file refer to."""

    images: Mapping[str, str]
    categories: Mapping[str, str]
    attributes: Mapping[str, str]
    """Id -> name, in the file's order."""
    vector: Sequence[str]
    """Names at the positions of `att_vec`."""
    types: Mapping[str, Sequence[str]]
    """PACO's type -> names."""
    everything: Sequence[str]
    """All names of the file, for importing.unlisted: absent."""


def read_coco(settings: ImportConfig) -> Iterator[Item]:
    """Read COCO JSON files: a record per annotation, in the files' order.

    A missing `bbox` is the whole photo, a missing `category_id` an object without a name. `line` of
    what is rejected is the position in its list, from 0.

    Raises:
        DataError: a file is absent, no JSON, or no COCO; or no annotation has attributes.
    """
    yield Notes(facts={"rules": RULES})
    seen: set[str] = set()
    for number, one in enumerate(list_inputs(settings)):
        values = _checked(read_json(one.url, setting="importing.inputs"), one.url)
        yield from _read_file(values, one, number, seen, settings)


def _checked(values: object, url: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise DataError(
            f"importing.inputs: {url} holds a JSON {type(values).__name__}, not COCO's object with "
            "images and annotations; a list of records is read by `vlal clean` as it is, JSON "
            "lines by `vlal import table`"
        )
    for key in ("images", "annotations"):
        if not isinstance(values.get(key), list):
            raise DataError(
                f"importing.inputs: {url} has no list {key!r} (its keys: {listed(values)}); give "
                "COCO's file of annotations with its images"
            )
    annotations = values["annotations"]
    if annotations and not any(
        isinstance(one, dict) and any(style in one for style in STYLES) for one in annotations
    ):
        first = next((one for one in annotations if isinstance(one, dict)), {})
        raise DataError(
            f"importing.inputs: {url}: no annotation has attributes, as {' or '.join(STYLES)} "
            f"(keys of the first: {listed(first) or 'none'}); give a file with attributes, or "
            "write them as a table for `vlal import table`"
        )
    return values


def _read_file(
    values: Mapping[str, Any], one: Input, number: int, seen: set[str], settings: ImportConfig
) -> Iterator[Item]:
    rejects: list[Rejected] = []
    document = _read_document(values, one.name, rejects)
    yield from rejects
    here: set[str] = set()
    for position, entry in enumerate(values["annotations"]):
        try:
            record = _read_annotation(entry, one.split, document, settings)
            if record.instance_id in here:
                raise _Unusable("repeated_id", "an earlier annotation has the same id")
        except _Unusable as error:
            reason, detail = error.args
            where = f"annotations[{position}]: {detail}"
            yield Rejected(one.name, position, _known_id(entry), reason, where)
            continue
        instance_id = record.instance_id
        if instance_id:
            here.add(instance_id)
            instance_id = f"{instance_id}@{number}" if instance_id in seen else instance_id
        yield replace(record, instance_id=instance_id, file=one.name, line=position)
    seen |= here


def _read_document(values: Mapping[str, Any], file: str, rejects: list[Rejected]) -> _Document:
    images = _names_by_id(values["images"], "images", "file_name", file, rejects)
    categories = _names_by_id(values.get("categories"), "categories", "name", file, rejects)
    attributes = _names_by_id(values.get("attributes"), "attributes", "name", file, rejects)
    # Where ids are positions, as OVAD's are, the order of the list does not matter.
    ordered = [attributes.get(str(index)) for index in range(len(attributes))]
    entries = values.get("attributes")
    whole = isinstance(entries, list) and len(entries) == len(attributes)
    by_id = [name for name in ordered if name is not None]
    vector = by_id if len(by_id) == len(attributes) else list(attributes.values())
    types = values.get("attr_type_to_attr_idxs")
    of_type: dict[str, list[str]] = {}
    for kind, ids in types.items() if isinstance(types, dict) else ():
        keys = [_key(value) for value in ids] if isinstance(ids, list) else []
        of_type[kind] = [attributes[key] for key in keys if key in attributes]
    everything = dict.fromkeys(attributes.values())
    for entry in values["annotations"]:
        found = entry.get("attributes") if isinstance(entry, dict) else None
        if isinstance(found, list):
            everything.update(dict.fromkeys(name for name in found if name_problem(name) is None))
    return _Document(
        images, categories, attributes, vector if whole else [], of_type, list(everything)
    )


def _names_by_id(
    entries: object, kind: str, field: str, file: str, rejects: list[Rejected]
) -> dict[str, str]:
    """Id -> name of the entries of a list, of equal ids the first; the unusable are rejected."""
    if entries is None:
        return {}
    if not isinstance(entries, list):
        rejects.append(Rejected(file, 0, "", "not_a_list", f"{kind} is {shown(entries, most=80)}"))
        return {}
    names: dict[str, str] = {}
    for position, entry in enumerate(entries):
        key = _key(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get(field) if isinstance(entry, dict) else None
        problem = name_problem(name)
        if key is None:
            detail = f"{shown(entry, most=80)} has no id"
        elif problem is not None:
            detail = f"{field} is {shown(name, most=80)}: {problem}"
        elif names.setdefault(key, str(name)) != name:
            detail = f"the id stands for {shown(names[key], most=80)} before"
        else:
            continue
        where = f"{kind}[{position}]: {detail}"
        rejects.append(Rejected(file, position, key or "", f"bad_{kind}", where))
    return names


def _read_annotation(
    entry: object, split: str, document: _Document, settings: ImportConfig
) -> Record:
    if not isinstance(entry, dict):
        raise _Unusable("not_a_record", f"{shown(entry, most=80)} where an object is expected")
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, None, False):
        raise _Unusable("crowd", f"iscrowd is {shown(crowd, most=80)}: no single object")
    image_id = _looked_up(entry, "image_id", document.images, "images")
    name = ""
    if entry.get("category_id") is not None:
        name = _looked_up(entry, "category_id", document.categories, "categories")
    instance_id = "" if entry.get("id") is None else _key(entry["id"])
    if instance_id is None or (instance_id and name_problem(instance_id) is not None):
        raise _Unusable("bad_id", f"id is {shown(entry['id'], most=80)}")
    box = None if entry.get("bbox") is None else _box(entry["bbox"])
    labels = _labels(entry, document, settings)
    return Record(
        split=split,
        image_id=image_id,
        instance_id=instance_id,
        object_name=name,
        box=box,
        positive=tuple(name for name, value in labels.items() if value is PRESENT),
        negative=tuple(name for name, value in labels.items() if value is ABSENT),
    )


def _labels(entry: Mapping[str, Any], document: _Document, settings: ImportConfig) -> Labels:
    style = next((style for style in STYLES if entry.get(style) is not None), None)
    if style is None:
        return {}
    given = entry[style]
    if style == "attributes" and isinstance(given, dict):
        return {name: _value(value, name, settings) for name, value in given.items()}
    if not isinstance(given, list):
        raise _Unusable("bad_attributes", f"{style} is {shown(given, most=80)}, not a list")
    if style == "att_vec":
        if len(given) != len(document.vector):
            raise _Unusable(
                "bad_attributes",
                f"att_vec has {len(given)} values, the list attributes {len(document.vector)} "
                "entries that can be used",
            )
        pairs = zip(document.vector, given, strict=True)
        return {name: _value(value, name, settings) for name, value in pairs}
    if style == "attribute_ids":
        given = [_of_id(value, document) for value in given]
    for name in given:
        problem = name_problem(name)
        if problem is not None:
            raise _Unusable("bad_attributes", f"a name is {shown(name, most=80)}: {problem}")
    labels: Labels = dict.fromkeys(given, PRESENT)
    for kind, names in document.types.items():
        if entry.get(f"unknown_{kind}") == 0 and any(name in labels for name in names):
            labels = {**dict.fromkeys(names, ABSENT), **labels}
    if settings.unlisted == "absent":
        labels = {**dict.fromkeys(document.everything, ABSENT), **labels}
    return labels


def _value(value: object, name: object, settings: ImportConfig) -> bool | None:
    """What a value of a vector or of an object of attributes says."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        present, absent, unknown = READINGS[settings.numbers]
        if value == present:
            return PRESENT
        if value == absent:
            return ABSENT
        if unknown is not None and value == unknown:
            return UNKNOWN
    elif isinstance(value, str) and value in settings.values:
        return WORDS[settings.values[value]]
    raise _Unusable(
        "bad_value",
        f"{shown(name, most=80)} is {shown(value, most=80)}: numbers are read as "
        f"{'1/0/-1' if settings.numbers == 'auto' else settings.numbers} (importing.numbers), "
        "texts as importing.values says",
    )


def _of_id(value: object, document: _Document) -> str:
    key = _key(value)
    if key is None or key not in document.attributes:
        raise _Unusable(
            "bad_attributes", f"attribute id {shown(value, most=80)} is not in the list attributes"
        )
    return document.attributes[key]


def _looked_up(entry: Mapping[str, Any], field: str, names: Mapping[str, str], kind: str) -> str:
    value = entry.get(field)
    key = _key(value)
    if key is None or key not in names:
        given = f"is {shown(value, most=80)}, which" if field in entry else "is absent, and"
        raise _Unusable(f"unknown_{kind}", f"{field} {given} no usable entry of {kind} has")
    return names[key]


def _key(value: object) -> str | None:
    """An id as text: 7, 7.0 and "7" are one; None for what is no id."""
    if isinstance(value, str):
        return value or None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float):
        return str(int(value)) if math.isfinite(value) and value.is_integer() else None
    return str(value)


def _box(value: object) -> Box:
    sides = value if isinstance(value, list) else []
    if len(sides) == 4 and all(type(side) in (int, float) for side in sides):
        try:
            x, y, width, height = map(float, sides)
        except OverflowError:
            x = math.inf
        else:
            if all(map(math.isfinite, (x, y, width, height))) and width > 0 and height > 0:
                return x, y, width, height
    raise _Unusable(
        "bad_box",
        f"bbox is {shown(value, most=80)}, not four finite numbers with width and height above 0",
    )


def _known_id(entry: object) -> str:
    """The annotation's id as text of bounded length, for the rejects; empty without one."""
    key = _key(entry.get("id")) if isinstance(entry, dict) else None
    return "" if key is None else key if name_problem(key) is None else shown(key, most=80)
