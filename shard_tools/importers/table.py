"""Tables of annotations: a row per object, or per attribute of an object.

Layouts: `lists` has columns that hold lists of names, `long` a row per object and attribute, `wide`
a column per attribute. What a column gives is known by its name, without case.
"""

import ast
import difflib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from shard_tools.importers.grouping import Groups
from shard_tools.importers.records import Input, Item, Notes, Record, Rejected, list_inputs
from vlal_dist.config.sections import ImportConfig
from vlal_dist.contents import shown
from vlal_dist.data.format.index import ARROW_ERRORS
from vlal_dist.data.format.photo_names import Limits, printable
from vlal_dist.data.format.photo_tables import bytes_columns, photo_names
from vlal_dist.data.format.tables import (
    OBJECT_COLUMNS,
    SIDES,
    cell_text,
    open_arrow,
    plain_name,
    quoted,
    read_rows,
    row_box,
)
from vlal_dist.errors import ConfigError, DataError

MEANINGS = {
    "image": ("image", "file_name", "filename", "photo", "image_path", "path"),
    **OBJECT_COLUMNS,
    "split": ("split",),
    "positive": ("positive", "positive_attributes", "attributes", "tags"),
    "negative": ("negative", "negative_attributes"),
    "attribute": ("attribute", "attribute_name"),
    "value": ("value", "present"),
    "certainty": ("certainty",),
    "": ("instance_polygon", "__index_level_0__"),
}
"""What a column gives -> its names, without case; those of `""` are not read."""
OF_LAYOUT = {
    "lists": ("positive", "negative"),
    "long": ("attribute", "value", "certainty"),
    "wide": (),
}
"""Layout -> the meanings that it alone has."""
_OWN = {meaning for meanings in OF_LAYOUT.values() for meaning in meanings}

PRESENT, ABSENT, UNKNOWN = True, False, None
_MEANT = {"present": PRESENT, "absent": ABSENT, "unknown": UNKNOWN}
WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("present", "yes", "true", "y", "t", "positive"), PRESENT),
    **dict.fromkeys(("absent", "no", "false", "n", "f", "negative"), ABSENT),
    **dict.fromkeys(("unknown", "", "na", "n/a", "nan", "none", "null", "?"), UNKNOWN),
}
"""Texts of values, without case and blanks around them."""
NUMBERS: dict[str, dict[float, bool | None]] = {
    "auto": {1: PRESENT, 0: ABSENT},
    "1/0": {1: PRESENT, 0: ABSENT},
    "1/0/-1": {1: PRESENT, 0: ABSENT, -1: UNKNOWN},
    "1/-1/0": {1: PRESENT, -1: ABSENT, 0: UNKNOWN},
}
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Texts of the column `split`, without case."""
PEEKED = 1000
"""Rows by which the layout is decided."""

logger = logging.getLogger(__name__)


_Bytes = tuple[str | None, tuple[str, ...]]
"""The column with the bytes of photos, if any is read, and all columns of bytes."""


class _Unusable(Exception):
    """A row must be rejected; arguments: reason and detail."""


class _Ambiguous(DataError):
    """A value of which no rule says what it means."""


@dataclass(frozen=True)
class _Layout:
    """What is read of one file.

    Attributes:
        name: lists, long or wide.
        columns: meaning -> name of the column.
        attributes: wide: columns that are attributes.
        left_out: columns that are not read.
    """

    name: str
    columns: dict[str, str]
    attributes: tuple[str, ...]
    left_out: frozenset[str]

    def facts(self) -> dict[str, object]:
        """For `import.json`."""
        found: dict[str, object] = {"layout": self.name, "columns": self.columns}
        if self.name == "wide":
            found["attributes"] = list(self.attributes)
        if self.left_out:
            found["left_out"] = sorted(self.left_out)
        return found


class _AllColumns:
    """Reads every column but some, by its name, and lists the names.

    Args:
        skipped: names of columns that are not read.
    """

    def __init__(self, skipped: Sequence[str]) -> None:
        self.names: dict[str, None] = {}
        self._skipped = frozenset(skipped)

    def resolve(self, names: Sequence[str]) -> dict[str, int]:
        """See `Columns`."""
        self.names.update(dict.fromkeys(names))
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"two columns: {quoted(twice)} occurs twice; rename one")
        return {name: place for place, name in enumerate(names) if name not in self._skipped}

    def resolve_header(self, names: Sequence[str], path: Path) -> dict[str, int]:
        """See `Columns`."""
        try:
            return self.resolve(names)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    def end(self, path: Path) -> None:
        """See `Columns`."""


class _ReadColumns:
    """Reads what a layout names: meaning, or `=` and the name of an attribute -> place."""

    def __init__(self, layout: _Layout) -> None:
        self._keys = {name: meaning for meaning, name in layout.columns.items()}
        self._keys |= {name: f"={name}" for name in layout.attributes}
        self._left_out = layout.left_out

    def resolve(self, names: Sequence[str]) -> dict[str, int]:
        """See `Columns`."""
        found = {}
        for place, name in enumerate(names):
            if (key := self._keys.get(name)) is not None:
                found[key] = place
            elif name not in self._left_out:
                raise DataError(
                    f"unknown column: {quoted(name)} is not in the first {PEEKED} rows; name it as "
                    "importing.attributes, importing.columns or importing.ignore_columns"
                )
        return found

    def resolve_header(self, names: Sequence[str], path: Path) -> dict[str, int]:
        """See `Columns`."""
        return self.resolve(names)

    def end(self, path: Path) -> None:
        """See `Columns`."""


class _Values:
    """What the values of attributes mean, by section `importing`."""

    def __init__(self, settings: ImportConfig) -> None:
        self._rule, self._numbers = settings.numbers, NUMBERS[settings.numbers]
        own = {text.strip().casefold(): _MEANT[one] for text, one in settings.values.items()}
        self._words = WORDS | own
        self._least = settings.min_certainty
        self._known: dict[str, bool | None] = {}

    def read(self, cell: object) -> bool | None:
        """Present, absent, or unknown (None).

        Raises:
            DataError: -1, of which no rule says what it means.
            _Unusable: it is no value.
        """
        if cell is None or isinstance(cell, bool):
            return cell
        if isinstance(cell, str):
            if cell not in self._known:
                if len(self._known) > PEEKED:
                    self._known.clear()
                self._known[cell] = self._read(cell.strip().casefold())
            return self._known[cell]
        if isinstance(cell, int | float):
            if cell != cell:
                return UNKNOWN
            if cell in self._numbers and not self._words.keys() - WORDS.keys():
                return self._numbers[cell]
            return self._read(f"{cell:g}" if abs(cell) < 1e9 else shown(cell))
        raise _Unusable("bad_value", f"{shown(cell)} is no value")

    def _read(self, text: str) -> bool | None:
        if text in self._words:
            return self._words[text]
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if number in self._numbers:
            return self._numbers[number]
        if number == -1 and self._rule == "auto":
            raise _Ambiguous(
                "a value is -1, which is written for unknown as well as for absent; "
                "--importing.numbers 1/0/-1 reads 0 as absent and -1 as unknown, 1/-1/0 reads -1 "
                "as absent and 0 as unknown"
            )
        raise _Unusable(
            "bad_value",
            f"{shown(text)} is no value; say what it means: importing.values "
            f"{{{printable(text, length=40)}: unknown}}",
        )

    def is_certain(self, cell: object) -> bool:
        """Whether the certainty of a label reaches `importing.min_certainty`."""
        try:
            number = math.nan if isinstance(cell, bool) else float(cell)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if number != number:
            raise _Unusable("bad_certainty", f"certainty is {shown(cell)}, not a number")
        return self._least is None or number >= self._least


def read_table(settings: ImportConfig) -> Iterator[Item]:
    """The records of the tables `importing.inputs`.

    Raises:
        ConfigError: settings that do not fit the tables.
        DataError: an unreadable table, or columns that are not understood.
    """
    inputs, values = list_inputs(settings), _Values(settings)
    places: dict[str, str] = {}
    layouts: dict[str, _Layout] = {}
    with Groups() as groups:
        for one in inputs:
            with one.local() as path:
                photos = _photo_column(path, one, settings)
                layout = _decide(path, one, settings, photos, values)
                if all(layout != other for other in layouts.values()):
                    layouts[one.url] = layout
                    logger.info("%s: layout %s, columns %s", one.url, layout.name, layout.columns)
                if len({other.name for other in layouts.values()}) > 1:
                    kinds = {other.name: url for url, other in layouts.items()}
                    found = ", ".join(f"{url} is {name}" for name, url in kinds.items())
                    raise DataError(f"tables of several layouts: {found}; import them one by one")
                names = _row_photos(one, photos[0], places)
                rows = _records(path, one, layout, values, names)
                if layout.name != "long":
                    yield from rows
                    continue
                for item in rows:
                    if isinstance(item, Record):
                        groups.add(item)
                    else:
                        yield item
        yield _notes(settings, layouts, photos=list(dict.fromkeys(places.values())))
        yield from groups.merged()


def _notes(settings: ImportConfig, layouts: dict[str, _Layout], photos: list[str]) -> Notes:
    rules: dict[str, object] = {"numbers": settings.numbers, "values": settings.values}
    if settings.min_certainty is not None:
        rules["certainty"] = f"below {settings.min_certainty:g}: unknown"
    if any("split" in layout.columns for layout in layouts.values()):
        rules["split"] = SPLITS
    facts = {"tables": {url: one.facts() for url, one in layouts.items()}, "rules": rules}
    own = settings.columns.get("image")
    found: dict[str, object] = {"pack.images": [*settings.photos, *photos]} if photos else {}
    if photos and own is not None:
        found["pack.image_column"] = own
    return Notes(facts, found)


def _photo_column(path: Path, one: Input, settings: ImportConfig) -> _Bytes:
    """The column with the bytes of photos, if any is read, and the columns of bytes."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            found = bytes_columns(pyarrow.parquet.read_schema(path))
        elif suffix in (".arrow", ".feather"):
            with pa.memory_map(str(path)) as source:
                found = bytes_columns(open_arrow(source).schema)
        else:
            return None, ()
    except ARROW_ERRORS as error:
        raise DataError(f"{one.url} is damaged: {error}; restore it") from None
    ignored = {plain_name(name) for name in settings.ignore_columns}
    read = [name for name in found if plain_name(name) not in ignored]
    own = settings.columns.get("image")
    if own is not None:
        read = [name for name in read if name == own]
    if len(read) > 1:
        raise ConfigError(
            f"{one.url}: the columns {', '.join(map(quoted, read))} all hold bytes; name the one "
            f"with the photos: --importing.columns.image {read[0]}"
        )
    return (read[0] if read else None), tuple(found)


def _row_photos(one: Input, column: str | None, places: dict[str, str]) -> list[str] | None:
    """Names of the photos in a table's rows; refuses names that an earlier table has."""
    if column is None:
        return None
    names = photo_names(one.url, Limits("importing.inputs", image_column=column))
    for name in names:
        if places.setdefault(name, one.url) != one.url:
            raise DataError(
                f"{places[name]} and {one.url} both have a photo {quoted(name)}; rename one file, "
                "or write the column's paths with their folders"
            )
    return names


def _decide(
    path: Path, one: Input, settings: ImportConfig, bytes_read: _Bytes, values: _Values
) -> _Layout:
    """The layout of a table, by its columns and first rows."""
    photo, skipped = bytes_read
    columns = _AllColumns(skipped)
    rows = read_rows(path, columns, setting="importing.inputs")[0]
    head = [(line, row) for _, line, row in islice(rows, PEEKED) if not isinstance(row, DataError)]
    names = list(columns.names)
    own = _own_columns(names, one, settings) | ({} if photo is None else {"image": photo})
    found, left_out = dict(own), list[str]()
    rest = [] if settings.layout in ("lists", "long") else list(settings.attributes)
    ignored = {plain_name(name) for name in settings.ignore_columns}
    for name in settings.ignore_columns:
        if plain_name(name) not in map(plain_name, names):
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            raise ConfigError(
                f"importing.ignore_columns: {one.url} has no column {quoted(name)}; the nearest is "
                f"{quoted(near[0] if near else '')}"
            )
    meanings = {name: meaning for meaning, aliases in MEANINGS.items() for name in aliases}
    kind = settings.layout
    if kind == "auto":
        met = {meanings.get(plain_name(name)) for name in names if plain_name(name) not in ignored}
        met = (met | set(own)) - {None}
        kind = "wide" if rest else "long" if "attribute" in met else "lists"
        if kind == "lists" and not met & {"positive", "negative"}:
            kind = "wide"
    for name in names:
        meaning = meanings.get(plain_name(name))
        if name in own.values() or name in rest:
            continue
        if plain_name(name) in ignored or meaning == "" or meaning in own:
            left_out.append(name)
        elif meaning is None or meaning in _OWN - set(OF_LAYOUT[kind]):
            (left_out if name in skipped else rest).append(name)
        elif meaning in found:
            raise DataError(
                f"{one.url}: the columns {quoted(found[meaning])} and {quoted(name)} both give the "
                f'{meaning}; leave one out: --importing.ignore_columns "[{quoted(name)}]"'
            )
        else:
            found[meaning] = name
    if (last := found.pop("image_id", None)) is not None and found.setdefault(
        "image", last
    ) != last:
        left_out.append(last)
    return _checked(_Layout(kind, found, tuple(rest), frozenset(left_out)), one, settings, head,
                    values)  # fmt: skip


def _own_columns(names: Sequence[str], one: Input, settings: ImportConfig) -> dict[str, str]:
    """`importing.columns` with the names as the table has them."""
    found = {}
    for meaning, wanted in settings.columns.items():
        if meaning not in MEANINGS or not meaning:
            known = ", ".join(name for name in MEANINGS if name)
            raise ConfigError(f"importing.columns.{shown(meaning)}: meanings are {known}")
        near = [name for name in names if plain_name(name) == plain_name(wanted)]
        if not near:
            raise ConfigError(
                f"importing.columns.{meaning}: {one.url} has no column {quoted(wanted)}; it has "
                f"{printable(', '.join(names), length=1000)}"
            )
        found[meaning] = wanted if wanted in near else near[0]
    return found


def _checked(
    layout: _Layout, one: Input, settings: ImportConfig, head: Sequence[tuple[int, Any]],
    values: _Values,
) -> _Layout:  # fmt: skip
    """The layout; raises where it cannot be read."""
    listed = printable(", ".join([*layout.columns.values(), *layout.attributes]), length=1000)
    if "image" not in layout.columns:
        raise DataError(
            f"{one.url} has the columns {listed or 'none'}; none names the photo: call it "
            "image, or name it by --importing.columns.image COLUMN"
        )
    sides = [side for side in layout.columns if any(side in form for form in SIDES)]
    if sides and ("box" in layout.columns or not any(set(sides) == set(form) for form in SIDES)):
        names = ", ".join(quoted(layout.columns[side]) for side in sides)
        raise DataError(
            f"{one.url}: the columns {names} are not one box, which is "
            f"{' or '.join(' '.join(form) for form in SIDES)}; leave out what is none by "
            "importing.ignore_columns"
        )
    if "split" in layout.columns and one.split != "all":
        raise ConfigError(
            f"importing.inputs gives {one.url} as {one.split}, and it has the column "
            f"{quoted(layout.columns['split'])}; give it without a split, or leave the column out: "
            "importing.ignore_columns"
        )
    if "certainty" in layout.columns and settings.min_certainty is None:
        raise ConfigError(
            f"{one.url} has the column {quoted(layout.columns['certainty'])}; say which labels "
            "count: --importing.min_certainty NUMBER (below it: unknown), or leave it out: "
            "importing.ignore_columns"
        )
    if layout.name == "long" and "attribute" not in layout.columns:
        raise DataError(
            f"{one.url} has the columns {listed}; layout long needs the one with the attribute: "
            "--importing.columns.attribute COLUMN"
        )
    if layout.name == "lists" and not {"positive", "negative"} & set(layout.columns):
        raise DataError(
            f"{one.url} has the columns {listed}; layout lists needs one with names: "
            "--importing.columns.positive COLUMN"
        )
    if layout.name == "wide" and not layout.attributes:
        raise DataError(
            f"{one.url} has the columns {listed}; none is an attribute, nor lists attributes; see "
            "Import in docs/your-data.md"
        )
    rest = [name for name in layout.attributes if name not in settings.attributes]
    if rest and settings.attributes and layout.name == "wide":
        raise _not_understood(rest[0], one, "is not in importing.attributes")
    for name in rest:
        _check_rest(name, layout, one, head, values)
    known = {name for _, row in head for name in row}
    if absent := [name for name in settings.attributes if head and name not in known]:
        raise ConfigError(
            f"importing.attributes: {one.url} has no column {quoted(absent[0])}; it has {listed}"
        )
    return layout


def _check_rest(
    name: str, layout: _Layout, one: Input, head: Sequence[tuple[int, Any]], values: _Values
) -> None:
    """Refuse a column without a meaning that is no attribute."""
    if layout.name != "wide":
        raise _not_understood(name, one, f"is none of layout {layout.name}")
    for line, row in head:
        try:
            values.read(row.get(name))
        except _Unusable as error:
            raise _not_understood(name, one, f"line {line}: {error.args[1]}") from None
        except DataError as error:
            raise DataError(f"{one.url}: column {quoted(name)}, line {line}: {error}") from None


def _not_understood(name: str, one: Input, why: str) -> DataError:
    return DataError(
        f"{one.url}: the column {quoted(name)} is not understood ({why}); leave it out: "
        f'--importing.ignore_columns "[{quoted(name)}]"; or say what it gives: '
        f"--importing.columns.MEANING {quoted(name)} with one of "
        f"{', '.join(meaning for meaning in MEANINGS if meaning)}; or name the attributes: "
        "importing.attributes"
    )


def _records(
    path: Path, one: Input, layout: _Layout, values: _Values, photos: Sequence[str] | None
) -> Iterator[Record | Rejected]:
    """A record per row, of layout long with its one label, and rejects."""
    if photos is not None:
        layout = replace(layout, left_out=layout.left_out | {layout.columns["image"]})
        del (columns := dict(layout.columns))["image"]
        layout = replace(layout, columns=columns)
    for number, line, row in read_rows(path, _ReadColumns(layout), setting="importing.inputs")[0]:
        identity = ""
        try:
            if isinstance(row, DataError):
                raise row
            image = cell_text(row.get("image"), "image") if photos is None else photos[number]
            identity = cell_text(row.get("id"), "id") or ""
            if not image:
                raise _Unusable("no_image", "the column of the photo is empty")
            positive, negative = _labels(row, layout, values)
            split = one.split
            if "split" in layout.columns:
                text = cell_text(row.get("split"), "split") or ""
                if text.strip().casefold() not in SPLITS:
                    raise _Unusable("bad_split", f"{shown(text)}, not one of {', '.join(SPLITS)}")
                split = SPLITS[text.strip().casefold()]
            name = cell_text(row.get("object"), "object") or ""
            yield Record(split, image, identity, name, row_box(row), positive, negative,
                         one.name, line)  # fmt: skip
        except _Unusable as error:
            yield Rejected(one.name, line, identity, error.args[0], error.args[1])
        except _Ambiguous as error:
            raise DataError(f"{one.url}, line {line}: {error}") from None
        except DataError as error:
            reason, _, detail = str(error).partition(":")
            yield Rejected(one.name, line, identity, reason.replace(" ", "_"), detail.strip())


def _labels(row: Any, layout: _Layout, values: _Values) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of attributes that are present, and that are absent."""
    if layout.name == "lists":
        return _names(row.get("positive")), _names(row.get("negative"))
    if layout.name == "wide":
        positive, negative = list[str](), list[str]()
        for attribute in layout.attributes:
            value = values.read(row.get(f"={attribute}"))
            if value is not UNKNOWN:
                (positive if value else negative).append(attribute)
        return tuple(positive), tuple(negative)
    name = cell_text(row.get("attribute"), "attribute")
    if name is None:
        raise _Unusable("no_attribute", "the column of the attribute is empty")
    value = values.read(row.get("value")) if "value" in layout.columns else PRESENT
    if "certainty" in layout.columns and not values.is_certain(row.get("certainty")):
        value = UNKNOWN
    return ((name,), ()) if value else ((), (name,)) if value is ABSENT else ((), ())


def _names(cell: object) -> tuple[str, ...]:
    """Names of a cell: a list, or a text that holds one, or is split by `|` or `;`."""
    if isinstance(cell, bytes):
        cell = cell.decode("utf-8", "surrogateescape")
    if cell is None or cell != cell:
        return ()
    if isinstance(cell, str):
        text = cell.strip()
        if not text.startswith("["):
            separator = "|" if "|" in text else ";"
            return tuple(name for one in text.split(separator) if (name := one.strip()))
        cell = _parsed(text)
    if not isinstance(cell, list | tuple) or not all(isinstance(name, str) for name in cell):
        raise _Unusable("bad_attributes", f"{shown(cell)} is no list of names")
    return tuple(cell)


def _parsed(text: str) -> object:
    """A list as JSON or as Python writes it (pandas in CSV); else the text."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise _Unusable("bad_attributes", f"{shown(text)} is no list of names")
