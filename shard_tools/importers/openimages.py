"""Open Images: CSV files of labels of photos, of boxes, and of relationships.

A file is known by its header. Photos are `ImageID` and any suffix. Facts of the real files (V4 to
V7):

- labels (`train-annotations-human-imagelabels.csv`): ImageID, Source, LabelName, Confidence. People
  verified what has the Confidence 1 (present) or 0 (absent); the Source `machine` has fractions.
- boxes (`oidv6-train-annotations-bbox.csv`): ImageID, Source, LabelName, Confidence, XMin, XMax,
  YMin, YMax as shares of the photo's sides, then IsOccluded, IsTruncated, IsGroupOf, IsDepiction,
  IsInside: 1, 0, or -1 unknown.
- relationships (`oidv6-train-annotations-vrd.csv`): ImageID, LabelName1, LabelName2, XMin1, XMax1,
  YMin1, YMax1, XMin2, ..., RelationshipLabel. With `is`, LabelName2 is an attribute of the first
  box (Wooden, Transparent); nothing is stated as absent.
- names (`oidv6-class-descriptions.csv`, `oidv6-attributes-description.csv`): a code such as
  /m/01g317 and a name, with a header or without; given beside the others. What does not begin with
  a slash is a name itself.

Attributes of a photo as a whole are its labels. Objects are boxes; their attributes are the flags
(but IsGroupOf) and the `is` relationships of the same box. Rows are held in memory, sorted by
photo: about 300 bytes per row.
"""

import csv
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
import pyarrow as pa

from shard_tools.clean.names import listed, name_problem
from shard_tools.importers.records import (
    BATCH,
    Box,
    Input,
    Item,
    Notes,
    Record,
    Rejected,
    list_inputs,
)
from vlal_dist.config.sections import ImportConfig
from vlal_dist.contents import shown
from vlal_dist.data.format.images import photo_size
from vlal_dist.data.format.photos import Limits, Photos
from vlal_dist.errors import ConfigError, DataError

MAX_PIXELS = 64_000_000
"""Limit of a photo that is no JPEG, whose size is known when it is decoded."""
DIGITS = 3
"""Of a box in pixels: shares of 6 digits say no more, and whole pixels stay whole."""
SIDES = ("XMin", "XMax", "YMin", "YMax")
FLAGS = {
    "IsOccluded": "occluded",
    "IsTruncated": "truncated",
    "IsDepiction": "depiction",
    "IsInside": "inside",
}
"""Column of a box -> attribute."""
GROUP = "IsGroupOf"
RELATION = "RelationshipLabel"
MACHINE = "machine"
NAMES_HEADERS = (["LabelName", "DisplayName"], ["id", "name"])

COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "relationships": (
        ("ImageID", "LabelName1", "LabelName2", *(f"{side}1" for side in SIDES), RELATION),
        (),
    ),
    "boxes": (("ImageID", "LabelName", *SIDES), ("Confidence", GROUP, *FLAGS)),
    "labels": (("ImageID", "LabelName", "Confidence"), ("Source",)),
}
"""Kind of file -> columns it must have, columns that are read where they are there. The first kind
that fits is taken."""

RULES = {
    "openimages.labels": "attributes of whole photos: Confidence 1 present, 0 absent, between, or "
    "of the Source machine: unknown",
    "openimages.flags": "attributes of boxes: IsOccluded, IsTruncated, IsDepiction, IsInside (or "
    "those of importing.attributes): 1 present, 0 absent, -1 unknown",
    "openimages.is": "attributes of boxes: LabelName2 of relationships `is` with the same photo, "
    "LabelName1 and box (to 5 digits), present; other relationships are left out",
    "openimages.group": "boxes with IsGroupOf 1 hold several objects: rejected",
    "openimages.contradictions": "an attribute both present and absent is unknown",
}
"""Name -> rule, for import.json."""

Row = Mapping[str, Any]
Labels = dict[str, bool | None]


class _Unusable(Exception):
    """A row must be rejected; arguments: reason and detail."""


@dataclass
class _Object:
    """A box of a photo, with what is known of it; sides are shares."""

    name: str
    sides: tuple[float, float, float, float]
    labels: Labels
    file: str
    line: int


def read_openimages(settings: ImportConfig) -> Iterator[Item]:
    """Read Open Images' CSV files: a record per labelled photo, and one per box.

    Boxes become pixels by the size of the photo, whose header is read from `importing.photos`.

    Raises:
        ConfigError: boxes without importing.photos, or no file with labels.
        DataError: a file that is none of these, or codes without a file of names.
    """
    unknown = [name for name in settings.attributes if name not in FLAGS]
    if unknown:
        raise ConfigError(
            f"importing.attributes has {listed(unknown)}; of Open Images' boxes it lists columns "
            f"out of {', '.join(FLAGS)}"
        )
    kinds = [(one, _kind(one)) for one in list_inputs(settings)]
    names = _read_names([one for one, kind in kinds if kind == "names"])
    if all(kind == "names" for _, kind in kinds):
        raise ConfigError(
            "importing.inputs has files of names alone; add labels, boxes or relationships, such "
            "as train-annotations-human-imagelabels.csv"
        )
    by_boxes = [one.url for one, kind in kinds if kind in ("boxes", "relationships")]
    if by_boxes and not settings.photos:
        raise ConfigError(
            f"{by_boxes[0]} gives boxes as shares of the photo's sides, and importing.photos is "
            "empty; name the place of the photos there: their headers give the sizes"
        )
    yield Notes(facts={"rules": RULES, "kinds": {one.url: kind for one, kind in kinds}})
    photos = Photos(settings.photos, Limits("importing.photos")) if by_boxes else None
    for split in dict.fromkeys(one.split for one, _ in kinds):
        files = [(one, kind) for one, kind in kinds if one.split == split and kind != "names"]
        if files:
            yield from _read_split(split, files, names, settings, photos)


def _read_split(
    split: str,
    files: Sequence[tuple[Input, str]],
    names: Mapping[str, str],
    settings: ImportConfig,
    photos: Photos | None,
) -> Iterator[Item]:
    rejects: list[Rejected] = []
    tables = [_read_rows(one, kind, number, rejects) for number, (one, kind) in enumerate(files)]
    yield from rejects
    left_out: Counter[str] = Counter()
    rows = _sorted_rows(tables)
    for image_id, group in groupby(rows, key=lambda row: row["ImageID"]):
        labels: Labels = {}
        objects: dict[tuple[str, tuple[float, ...]], _Object] = {}
        first: tuple[str, int] | None = None
        for row in group:
            one, kind = files[row["file"]]
            place = (one.name, row["line"])
            try:
                if (problem := name_problem(image_id)) is not None:
                    raise _Unusable("bad_id", f"ImageID is {shown(image_id, most=80)}: {problem}")
                if kind == "labels":
                    name, value = _label(row, names)
                    _note(labels, name, value)
                    first = first or place
                elif kind == "boxes":
                    _add_box(objects, row, place, names, settings)
                elif row[RELATION] == "is":
                    _add_relation(objects, row, place, names)
                else:
                    left_out[row[RELATION]] += 1
            except _Unusable as error:
                reason, detail = error.args
                yield Rejected(*place, image_id, reason, detail)
        if first is not None:
            yield _record(split, image_id, labels, place=first)
        yield from _boxes(split, image_id, list(objects.values()), photos)
    if left_out:
        most = dict(left_out.most_common(20))
        yield Notes(facts={f"relationships_left_out_{split}": most})


def _kind(one: Input) -> str:
    """What a file holds, by its first line: a key of `COLUMNS`, or `names`."""
    _, header = next(_lines(one), (0, []))
    for kind, (needed, _) in COLUMNS.items():
        if all(column in header for column in needed):
            return kind
    if header[:1] and (header[0].startswith("/") or header[:2] in NAMES_HEADERS):
        return "names"
    wanted = "; ".join(f"{kind}: {', '.join(needed)}" for kind, (needed, _) in COLUMNS.items())
    raise DataError(
        f"importing.inputs: {one.url} begins with {shown(','.join(header), most=120)}, which is no "
        f"header of Open Images ({wanted}; names: LabelName, DisplayName); leave it out, or import "
        "it with `vlal import table`"
    )


def _lines(one: Input) -> Iterator[tuple[int, list[str]]]:
    """Number (from 1) and fields of each line; no fields where it is not UTF-8 or not CSV.

    A line is a row: a damaged quotation mark costs one line, not the rest of the file.
    """
    with (
        one.local() as path,
        path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file,
    ):
        for number, text in enumerate(file, start=1):
            line = text.rstrip("\r\n")
            try:
                if not line.isascii():
                    line.encode()
                yield number, next(csv.reader([line]), []) if '"' in line else line.split(",")
            except (UnicodeEncodeError, csv.Error):
                yield number, []


def _read_rows(one: Input, kind: str, number: int, rejects: list[Rejected]) -> pa.Table:
    """The file's columns as text, `file` (its number) and `line`; unreadable lines are rejected."""
    needed, optional = COLUMNS[kind]
    lines = _lines(one)
    _, header = next(lines)
    names = [*needed, *(name for name in optional if name in header)]
    places = [header.index(name) for name in names]
    schema = pa.schema([*((name, pa.large_string()) for name in names), ("line", pa.int64())])
    tables: list[pa.Table] = []
    while batch := list(islice(lines, BATCH)):
        good = [(at, fields) for at, fields in batch if len(fields) == len(header)]
        for at, fields in batch if len(good) < len(batch) else ():
            if len(fields) != len(header) and fields != [""]:
                detail = f"{len(fields)} fields, expected {len(header)}: {shown(fields, most=80)}"
                what = detail if fields else "not UTF-8, or no CSV"
                rejects.append(Rejected(one.name, at, "", "bad_line", what))
        columns = [
            pa.array([fields[place] for _, fields in good], pa.large_string()) for place in places
        ]
        tables.append(pa.table([*columns, pa.array([at for at, _ in good])], schema=schema))
    table = pa.concat_tables([schema.empty_table(), *tables])
    return table.append_column("file", pa.array(np.full(len(table), number, np.int32)))


def _sorted_rows(tables: Sequence[pa.Table]) -> Iterator[Row]:
    """Rows of all tables by photo, within a photo in the files' order."""
    whole = pa.concat_tables(tables, promote_options="default")
    order = [(name, "ascending") for name in ("ImageID", "file", "line")]
    for batch in whole.sort_by(order).to_batches(max_chunksize=BATCH):
        yield from batch.to_pylist()


def _read_names(files: Sequence[Input]) -> dict[str, str]:
    """Code -> name, of all files of names; of a code with two names the first."""
    return {
        fields[0]: fields[1]
        for one in reversed(files)
        for _, fields in reversed(list(_lines(one)))
        if len(fields) == 2 and fields[0].startswith("/") and name_problem(fields[1]) is None
    }


def _named(row: Row, column: str, names: Mapping[str, str]) -> str:
    code: str = row[column]
    if code in names:
        return names[code]
    if code.startswith("/"):
        more = "" if names else "; add class-descriptions.csv to importing.inputs"
        raise _Unusable("unknown_name", f"{column} {shown(code, most=80)} has no name{more}")
    if (problem := name_problem(code)) is not None:
        raise _Unusable("bad_name", f"{column} is {shown(code, most=80)}: {problem}")
    return code


def _number(row: Row, column: str, low: float, high: float) -> float:
    text = row[column]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise _Unusable(
            "bad_number",
            f"{column} is {shown(text, most=80)}, not a number from {low:g} to {high:g}",
        )
    return value


def _note(labels: Labels, name: str, value: bool | None) -> None:
    """Add a label; contradicting ones are unknown, and stay so."""
    if value is not None:
        labels[name] = value if labels.get(name, value) is value else None


def _label(row: Row, names: Mapping[str, str]) -> tuple[str, bool | None]:
    name, confidence = _named(row, "LabelName", names), _number(row, "Confidence", 0, 1)
    machine = row.get("Source") == MACHINE
    return name, None if machine or confidence not in (0, 1) else confidence == 1


def _object(
    objects: dict[tuple[str, tuple[float, ...]], _Object],
    row: Row,
    place: tuple[str, int],
    name: str,
    end: str = "",
) -> _Object:
    """The object of a row's box, a new one where none has its name and sides.

    A box may reach beyond the photo; sides beyond -1 to 2 are pixels, or damage.
    """
    left, right, top, bottom = (_number(row, f"{side}{end}", -1, 2) for side in SIDES)
    if left >= right or top >= bottom:
        raise _Unusable("bad_box", f"a box from {left:g}, {top:g} to {right:g}, {bottom:g}")
    key = (name, tuple(round(side, 5) for side in (left, right, top, bottom)))
    return objects.setdefault(key, _Object(name, (left, right, top, bottom), {}, *place))


def _add_box(
    objects: dict[tuple[str, tuple[float, ...]], _Object],
    row: Row,
    place: tuple[str, int],
    names: Mapping[str, str],
    settings: ImportConfig,
) -> None:
    name = _named(row, "LabelName", names)
    if row.get("Confidence") is not None and (share := _number(row, "Confidence", 0, 1)) != 1:
        raise _Unusable("unverified", f"a box of Confidence {share:g}")
    if row.get(GROUP) is not None and _number(row, GROUP, -1, 1) == 1:
        raise _Unusable("group", f"{GROUP} is 1: several objects")
    flags: Labels = {}
    for column in settings.attributes or FLAGS:
        if row.get(column) is not None:
            value = _number(row, column, -1, 1)
            if value not in (-1, 0, 1):
                raise _Unusable("bad_number", f"{column} is {value:g}, not 1, 0 or -1")
            flags[FLAGS[column]] = {1: True, 0: False, -1: None}[int(value)]
    found = _object(objects, row, place, name)
    for flag, state in flags.items():
        _note(found.labels, flag, state)


def _add_relation(
    objects: dict[tuple[str, tuple[float, ...]], _Object],
    row: Row,
    place: tuple[str, int],
    names: Mapping[str, str],
) -> None:
    name, attribute = _named(row, "LabelName1", names), _named(row, "LabelName2", names)
    _note(_object(objects, row, place, name, "1").labels, attribute, True)


def _boxes(
    split: str, image_id: str, objects: Sequence[_Object], photos: Photos | None
) -> Iterator[Item]:
    """The records of a photo's boxes, in pixels."""
    if not objects or photos is None:
        return
    try:
        width, height = photo_size(photos.read(image_id), max_pixels=MAX_PIXELS)
    except DataError as error:
        for one in objects:
            yield Rejected(one.file, one.line, image_id, "no_size", str(error))
        return
    for one in objects:
        left, right, top, bottom = one.sides
        x, y, w, h = left * width, top * height, (right - left) * width, (bottom - top) * height
        sides = (round(x, DIGITS), round(y, DIGITS), round(w, DIGITS), round(h, DIGITS))
        yield _record(split, image_id, one.labels, place=(one.file, one.line), name=one.name,
                      box=sides)  # fmt: skip


def _record(
    split: str,
    image_id: str,
    labels: Labels,
    *,
    place: tuple[str, int],
    name: str = "",
    box: Box | None = None,
) -> Record:
    return Record(
        split=split,
        image_id=image_id,
        instance_id="",
        object_name=name,
        box=box,
        positive=tuple(name for name, value in labels.items() if value is True),
        negative=tuple(name for name, value in labels.items() if value is False),
        file=place[0],
        line=place[1],
    )
