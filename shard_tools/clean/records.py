"""Annotation records parsed and checked into instances; duplicates compared.

Pure functions, no I/O. Records are VAW's: image_id, instance_id, instance_bbox (x, y, width, height
in pixels; null: the whole photo), object_name, positive_attributes, negative_attributes; further
fields are ignored.
"""

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
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

WHOLE_PHOTO: Box = (0.0, 0.0, math.inf, math.inf)
"""Box of an instance that is its whole photo; `pack` puts the photo's size in."""


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
        box: x, y, width, height in pixels of the photo, or `WHOLE_PHOTO`.
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


class NotJson(str):
    """What is wrong with a line that holds no JSON, in the place of its record."""

    __slots__ = ()


def parse_records(
    records: Iterable[tuple[int, object]], *, split: str, place: Callable[[int], str]
) -> tuple[list[Instance], list[Reject]]:
    """Read records of one annotation file.

    Args:
        records: each with its number.
        split: the split that the file belongs to.
        place: number -> where the record stands, for the details of rejects.

    Returns:
        Usable instances in order, and rejects.
    """
    instances, rejects = [], []
    for number, record in records:
        try:
            instances.append(_parse_record(record, split=split))
        except _Unusable as error:
            reason, detail = error.args
            rejects.append(Reject(split, _known_id(record), reason, f"{place(number)}: {detail}"))
    return instances, rejects


def compare_duplicates(
    instances: Iterable[tuple[int, Instance]],
) -> tuple[list[int], dict[str, tuple[int, str]]]:
    """Find instances whose id was read before.

    Args:
        instances: each with the number of its row, in reading order.

    Returns:
        Rows of instances that are equal to the first of their id; and of ids with different
        contents the row of the first that differs, with the splits.
    """
    first: dict[str, Instance] = {}
    equal: list[int] = []
    conflicts: dict[str, tuple[int, str]] = {}
    for row, instance in instances:
        known = first.setdefault(instance.instance_id, instance)
        if known is instance:
            continue
        if _content(known) == _content(instance):
            equal.append(row)
        else:
            where = f"{known.split}, {instance.split}" if known.split != instance.split else ""
            conflicts.setdefault(instance.instance_id, (row, where or f"twice in {known.split}"))
    return equal, conflicts


def conflict_error(conflicts: Mapping[str, tuple[int, str]]) -> DataError:
    """The error of ids that stand for different records (`compare_duplicates`)."""
    first = sorted(conflicts.items(), key=lambda one: one[1][0])[:5]
    shown = "; ".join(f"{name} ({where})" for name, (_, where) in first)
    return DataError(
        f"{len(conflicts)} instance ids stand for different records: {shown}; an id must name "
        "one instance of one split: correct the annotation files"
    )


class _Unusable(Exception):
    """A record must be rejected; arguments: reason and detail of the `Reject`."""


def _parse_record(record: object, *, split: str) -> Instance:
    if isinstance(record, NotJson):
        raise _Unusable("not_json", record)
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
    if value is None:
        return WHOLE_PHOTO
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
