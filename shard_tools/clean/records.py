"""Annotation records parsed and checked into instances; duplicates dropped.

Pure functions from lists to lists, no I/O. Records are VAW's: image_id, instance_id, instance_bbox
(x, y, width, height in pixels), object_name, positive_attributes, negative_attributes; further
fields are ignored.
"""

import math
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from shard_tools.clean.names import name_problem
from vlal_dist.errors import DataError

FIELDS = (
    "image_id",
    "instance_id",
    "instance_bbox",
    "object_name",
    "positive_attributes",
    "negative_attributes",
)

Box = tuple[float, float, float, float]


class RepeatedKeys(dict[str, Any]):
    """A JSON object that held a key more than once; `repeated` names those keys."""

    repeated: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Instance:
    """One annotated object in one photo.

    Attributes:
        split: train, val or test.
        instance_id: unique over all splits.
        image_id: names the photo, `{image_id}.jpg`.
        object_name: as annotated, or its representative after the merge.
        box: x, y, width, height in pixels of the photo.
        positive: attribute names annotated as present, as listed (repeats are kept).
        negative: attribute names annotated as absent, as listed.
    """

    split: str
    instance_id: str
    image_id: str
    object_name: str
    box: Box
    positive: tuple[str, ...]
    negative: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that cannot be used: its place, the reason in one word, and the value found.

    `instance_id` is the record's own text with what is not Unicode escaped, empty without one.
    """

    split: str
    instance_id: str
    reason: str
    detail: str


def parse_records(
    records: Sequence[object], *, split: str, source: str
) -> tuple[list[Instance], list[Reject]]:
    """Read one annotation file's records.

    Args:
        records: the file's list.
        split: the split that the file belongs to.
        source: file name, for the details of rejects.

    Returns:
        Usable instances in order, and rejects.
    """
    instances, rejects = [], []
    for position, record in enumerate(records):
        try:
            instances.append(_parse_record(record, split=split))
        except _Unusable as error:
            reason, detail = error.args
            place = f"{source}[{position}]"
            rejects.append(Reject(split, _known_id(record), reason, f"{place}: {detail}"))
    return instances, rejects


def reject_summary(rejects: Sequence[Reject]) -> str:
    """The commonest reasons, each with its number and an example; empty without rejects."""
    first = {reject.reason: reject for reject in reversed(rejects)}
    counts = Counter(reject.reason for reject in rejects).most_common(3)
    return "; ".join(
        f"{count} {reason}, such as {first[reason].instance_id or 'a record'} of "
        f"{first[reason].split}: {shortened(first[reason].detail)}"
        for reason, count in counts
    )


def drop_duplicates(instances: Sequence[Instance]) -> tuple[list[Instance], list[Reject]]:
    """Keep the first of identical instances.

    Raises:
        DataError: one instance id stands for different contents or in two splits.
    """
    first: dict[str, Instance] = {}
    rejects: list[Reject] = []
    conflicts: dict[str, str] = {}
    for instance in instances:
        known = first.setdefault(instance.instance_id, instance)
        if known is instance:
            continue
        if _content(known) == _content(instance):
            detail = "the same instance was read before"
            rejects.append(Reject(instance.split, instance.instance_id, "duplicate", detail))
        else:
            where = f"{known.split}, {instance.split}" if known.split != instance.split else ""
            conflicts.setdefault(instance.instance_id, where or f"twice in {known.split}")
    if conflicts:
        shown = "; ".join(f"{name} ({where})" for name, where in list(conflicts.items())[:5])
        raise DataError(
            f"{len(conflicts)} instance ids stand for different records: {shown}; an id must name "
            "one instance of one split: correct the annotation files"
        )
    return list(first.values()), rejects


class _Unusable(Exception):
    """A record must be rejected; arguments: reason and detail of the `Reject`."""


def _parse_record(record: object, *, split: str) -> Instance:
    if not isinstance(record, dict):
        raise _Unusable("not_a_record", f"{type(record).__name__} where an object is expected")
    if isinstance(record, RepeatedKeys):
        repeated = [field for field in FIELDS if field in record.repeated]
        if repeated:
            raise _Unusable("repeated_field", ", ".join(repeated))
    missing = [field for field in FIELDS if field not in record]
    if missing:
        raise _Unusable("missing_field", ", ".join(missing))
    return Instance(
        split=split,
        instance_id=_id(record, "instance_id"),
        image_id=_id(record, "image_id"),
        object_name=_name(record["object_name"], "bad_object", "object_name"),
        box=_box(record["instance_bbox"]),
        positive=_names(record["positive_attributes"], "positive_attributes"),
        negative=_names(record["negative_attributes"], "negative_attributes"),
    )


def _id(record: Mapping[str, object], field: str) -> str:
    value = record[field]
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    elif not isinstance(value, str):
        raise _Unusable("bad_id", f"{field} is {_short(value)}, not a text or an integer")
    return _name(value, "bad_id", field)


def _name(value: object, reason: str, what: str) -> str:
    problem = name_problem(value)
    if problem is not None:
        raise _Unusable(reason, f"{what} is {_short(value)}: {problem}")
    return str(value)


def _names(value: object, field: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _Unusable("bad_attributes", f"{field} is {_short(value)}, not a list of names")
    for name in value:
        _name(name, "bad_attributes", f"a name in {field}")
    return tuple(value)


def _box(value: object) -> Box:
    sides = value if isinstance(value, list) else []
    if len(sides) == 4 and all(type(side) in (int, float) for side in sides):
        with suppress(OverflowError):
            x, y, width, height = map(float, sides)
            if all(map(math.isfinite, (x, y, width, height))) and width > 0 and height > 0:
                return x, y, width, height
    raise _Unusable(
        "bad_box",
        f"instance_bbox is {_short(value)}, not four finite numbers with width and height above 0",
    )


def _known_id(record: object) -> str:
    value = record.get("instance_id") if isinstance(record, dict) else None
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    text = str(value).strip()
    return shortened(text if text.isprintable() else repr(text)[1:-1])


def _content(instance: Instance) -> object:
    return replace(
        instance,
        positive=tuple(sorted(set(instance.positive))),
        negative=tuple(sorted(set(instance.negative))),
    )


def shortened(text: str, limit: int = 120) -> str:
    """A text, or its beginning where it is long."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _short(value: object) -> str:
    """A value as ASCII text of bounded length, however large or deep it is."""
    text = reprlib.repr(value).encode("ascii", errors="backslashreplace").decode()
    return shortened(text, 80)
