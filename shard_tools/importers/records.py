"""Records of foreign annotations, the files that hold them, and the root in which they are written.

An importer is a generator of `Record`, `Rejected` and `Notes`. It never raises for the content of
one row; settings, absent and unreadable files are errors.
"""

import contextlib
import glob
import hashlib
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from shard_tools.clean.names import name_problem
from vlal_dist.config.sections import ImportConfig
from vlal_dist.contents import shown
from vlal_dist.errors import ConfigError, NotFoundError, bounded
from vlal_dist.storage.store import find_files, open_store

Box = tuple[float, float, float, float]

SPLITS = ("train", "val", "test", "all")
"""Splits of records; `all` is undivided, and `clean.split` divides it."""
WHOLE = "image"
"""Object name of a photo as a whole."""
BATCH = 65_536
"""Rows that are held before they are written."""
PIECE = 16 << 20
"""Bytes of a remote file that are copied at once."""

RECORDS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("instance_id", pa.string(), nullable=False),
        pa.field("instance_bbox", pa.list_(pa.float64())),
        pa.field("object_name", pa.string(), nullable=False),
        pa.field("positive_attributes", pa.list_(pa.string()), nullable=False),
        pa.field("negative_attributes", pa.list_(pa.string()), nullable=False),
    ]
)
"""`<split>.parquet`: `instance_bbox` is x, y, width, height in pixels, null for the whole photo."""
REJECTED_SCHEMA = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Record:
    """One object of one photo, as `clean` reads it.

    Attributes:
        split: one of `SPLITS`.
        image_id: the photo's name for `Photos`: its file with its folders and suffix.
        instance_id: unique over all files; empty: `image_id` for a whole photo without an object
            name, else `image_id#N`, the N-th object of that photo, from 0.
        object_name: empty: `image`.
        box: x, y, width, height in pixels of the upright photo; None: the whole photo.
        positive, negative: names of attributes that are present, that are absent.
        file, line: where it was read, for rejects; as in `Rejected`.
    """

    split: str
    image_id: str
    instance_id: str
    object_name: str
    box: Box | None
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    file: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True)
class Rejected:
    """What cannot be used, a row of `rejects.parquet`.

    Attributes:
        file: name of the file.
        line: from 1; in JSON formats the position in the list, from 0; 0 where there is none.
        id: of the object, or of the photo; empty where it is not known.
        reason: one word with underscores.
        detail: what was found.
    """

    file: str
    line: int
    id: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Notes:
    """What an importer found out about its input; may be yielded at any place, also repeatedly.

    Attributes:
        facts: entries of `import.json`, such as the mapping of columns that was used.
        settings: `section.key` -> value, entries of `config.yaml`.
    """

    facts: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)


Item = Record | Rejected | Notes


@dataclass(frozen=True, slots=True)
class Input:
    """A file of `importing.inputs`.

    Attributes:
        split: one of `SPLITS`.
        url: path, or `s3://bucket/key`.
        size_bytes: its size.
    """

    split: str
    url: str
    size_bytes: int

    @property
    def name(self) -> str:
        """The file's name without folders, for rejects."""
        return self.url.rpartition("/")[2]

    @contextlib.contextmanager
    def local(self) -> Iterator[Path]:
        """A local file with its bytes; a remote one is copied to `TMPDIR` meanwhile."""
        store, key = _store_of(self.url)
        if (path := store.local_path(key)) is not None:
            yield path
            return
        with tempfile.TemporaryDirectory(prefix="vlal-import-") as folder:
            path = Path(folder, self.name)
            with path.open("wb") as file:
                for offset in range(0, self.size_bytes, PIECE):
                    length = min(PIECE, self.size_bytes - offset)
                    file.write(store.read(key, offset=offset, length=length))
            yield path


def list_inputs(settings: ImportConfig, *, folders: bool = False) -> list[Input]:
    """The files of `importing.inputs`, in the order given; those of a glob sorted.

    With `folders`, inputs are folders: of these there is neither a size nor a check here.

    Raises:
        ConfigError: none is given, a split that there is not, or nothing at a place.
        StorageError: a store cannot be listed.
    """
    if not any(settings.inputs.values()):
        raise ConfigError(
            "importing.inputs is empty; give the files to import: --importing.inputs FILE, or of "
            "each split --importing.inputs '{train: [FILE], val: [FILE], test: [FILE]}'"
        )
    for split in settings.inputs:
        if split not in SPLITS:
            raise ConfigError(
                f"importing.inputs has the split {shown(split)}; splits are {', '.join(SPLITS[:3])}"
                ", or all where clean.split shall divide it"
            )
    found = [
        Input(split, url, size)
        for split, places in settings.inputs.items()
        for place in places
        for url, size in ([(place, 0)] if folders else _expand(place))
    ]
    twice = [url for url, count in Counter(one.url for one in found).items() if count > 1]
    if twice:
        raise ConfigError(f"importing.inputs names {bounded(twice[0])} twice; give it once")
    return found


def _expand(place: str) -> Iterator[tuple[str, int]]:
    """The files of a path, a URL or a glob, and their sizes."""
    store, key = _store_of(place)
    if store.local_path(key) is None:
        urls = [f"{at.url}/{one}" for at, one in find_files(place)]
    else:
        path = os.path.expanduser(place)
        urls = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path]
        if os.path.exists(path):  # a name that has brackets in it
            urls = [path]
        if len(urls) == 1 and os.path.isdir(path):
            raise ConfigError(
                f"importing.inputs: {place} is a folder; name its files: {path.rstrip('/')}/*"
            )
    if not urls:
        raise ConfigError(f"importing.inputs: {place} matches no file; correct the pattern")
    for url in urls:
        store, key = _store_of(url)
        try:
            yield url, store.size(key)
        except NotFoundError:
            raise ConfigError(
                f"importing.inputs: {url} does not exist; correct the path, or give s3://..."
            ) from None


def _store_of(url: str) -> tuple[Any, str]:
    root, slash, name = url.rpartition("/")
    if not name:
        raise ConfigError(f"importing.inputs: {shown(url)} is no file; name its files: {url}*")
    return open_store(root or slash or "."), name


class _Rows:
    """A Parquet file that is written by batches of `BATCH` rows."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.count, self._schema = path, 0, schema
        self._rows: list[tuple[Any, ...]] = []
        self._writer = pyarrow.parquet.ParquetWriter(
            path, schema, compression="zstd", compression_level=3
        )

    def add(self, row: tuple[Any, ...]) -> None:
        self.count += 1
        self._rows.append(row)
        if len(self._rows) == BATCH:
            self._flush()

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        columns = [
            pa.array(values, type=one.type)
            for values, one in zip(zip(*self._rows, strict=True), self._schema, strict=True)
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self._rows.clear()


class RecordWriter:
    """Files of an imported root, written as the items come.

    Memory: `BATCH` rows of each split, the names that occur, and some 100 bytes per photo whose
    objects are numbered (records without an `instance_id`).

    Args:
        folder: local folder of the files.
        rules: `importing.names`.
        limit: photos taken of each split; 0: all.

    Attributes:
        files: name -> file written.
        counts: what was written, for `import.json`.
        reasons: reason of rejects -> their number.
        examples: reason of rejects -> the first of them.
        facts, settings: the importer's `Notes`.
        full: whether `limit` is reached and no further record can be taken.
    """

    def __init__(self, folder: Path, *, rules: list[str], limit: int = 0) -> None:
        self.files: dict[str, Path] = {}
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, Rejected] = {}
        self.facts: dict[str, object] = {}
        self.settings: dict[str, object] = {}
        self.full = False
        self.labels: Counter[str] = Counter()
        self.objects: Counter[str] = Counter()
        self._folder, self._limit = folder, limit
        self._names = _Names(rules)
        self._rows: dict[str, _Rows] = {}
        self._numbers: dict[bytes, int] = {}
        self._photos: dict[str, set[str]] = {}
        self._rejects = self._open("rejects", REJECTED_SCHEMA)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Records of each split, labels, rejects by reason."""
        return {
            "records": {split: rows.count for split, rows in self._rows.items()},
            "labels": {kind: self.labels[kind] for kind in ("positive", "negative", "boxes")},
            "rejected": dict(sorted(self.reasons.items())),
            "renamed": self._names.changed,
        }

    def add(self, item: Item) -> None:
        """Write one item; a record with names that `clean` would not take becomes a reject."""
        if isinstance(item, Notes):
            self.facts |= item.facts
            self.settings |= item.settings
        elif isinstance(item, Rejected):
            self._reject(item)
        elif not self._limit or self._within_limit(item):
            try:
                row = self._row(item)
            except _Unusable as error:
                reason, detail = error.args
                name = item.instance_id or item.image_id
                self._reject(Rejected(item.file, item.line, name, reason, detail))
                return
            rows = self._rows.get(item.split)
            if rows is None:
                rows = self._rows[item.split] = self._open(item.split, RECORDS_SCHEMA)
            rows.add(row)

    def close(self) -> None:
        """End the files."""
        for rows in (self._rejects, *self._rows.values()):
            rows.close()

    def _open(self, name: str, schema: pa.Schema) -> _Rows:
        path = self.files[f"{name}.parquet"] = self._folder / f"{name}.parquet"
        return _Rows(path, schema)

    def _reject(self, item: Rejected) -> None:
        self.reasons[item.reason] += 1
        file, name, detail = (_printable(text) for text in (item.file, item.id, item.detail))
        self.examples.setdefault(item.reason, item)
        self._rejects.add((file, item.line, name, item.reason, detail))

    def _within_limit(self, record: Record) -> bool:
        known = self._photos.setdefault(record.split, set())
        if record.image_id in known:
            return True
        if len(known) < self._limit:
            known.add(record.image_id)
            return True
        self.full = record.split == "all"  # of other splits rows may follow
        return False

    def _row(self, record: Record) -> tuple[Any, ...]:
        _check(record.image_id, "bad_id", "image_id")
        if record.split not in SPLITS:
            raise _Unusable("bad_split", f"{shown(record.split)}, not one of {', '.join(SPLITS)}")
        name = self._names(record.object_name or WHOLE, "bad_object", "object_name")
        box = record.box
        if box is not None and not (all(map(math.isfinite, box)) and box[2] > 0 and box[3] > 0):
            raise _Unusable(
                "bad_box",
                f"{shown(box)}, not x, y, width, height as finite numbers, the last two above 0",
            )
        positive, negative = (
            [self._names(one, "bad_attributes", "an attribute") for one in names]
            for names in (record.positive, record.negative)
        )
        instance_id = record.instance_id
        if not instance_id:
            instance_id = record.image_id
            if box is not None or record.object_name:
                key = hashlib.blake2b(instance_id.encode(), digest_size=8).digest()
                number = self._numbers[key] = self._numbers.get(key, -1) + 1
                instance_id = f"{instance_id}#{number}"
        _check(instance_id, "bad_id", "instance_id")
        self.labels["positive"] += len(positive)
        self.labels["negative"] += len(negative)
        self.labels["boxes"] += box is not None
        if name in self.objects or len(self.objects) < 2:
            self.objects[name] += 1
        return record.image_id, instance_id, box, name, positive, negative


class _Unusable(Exception):
    """A record must be rejected; arguments: reason and detail."""


def _check(name: str, reason: str, what: str) -> None:
    problem = name_problem(name)
    if problem is not None:
        raise _Unusable(reason, f"{what} is {shown(name)}: {problem}")


_RULES: dict[str, Callable[[str], str]] = {
    "trim": str.strip,
    "lower": str.lower,
    "underscores": lambda name: name.replace("_", " "),
}


class _Names:
    """Names by the rules of `importing.names`, each checked once.

    Attributes:
        changed: rule -> the number of different names that it changed.
    """

    MOST = 1 << 20

    def __init__(self, rules: list[str]) -> None:
        self.changed = dict.fromkeys(rules, 0)
        self._known: dict[str, str] = {}

    def __call__(self, name: str, reason: str, what: str) -> str:
        known = self._known.get(name)
        if known is not None:
            return known
        result = name
        for rule in self.changed:
            before, result = result, _RULES[rule](result)
            self.changed[rule] += before != result
        _check(result, reason, what)
        if len(self._known) >= self.MOST:  # as many names are no vocabulary
            self._known.clear()
        self._known[name] = result
        return result


def _printable(text: str) -> str:
    """A text that Parquet can hold: what is not Unicode or no character is escaped."""
    if text.isprintable():
        return bounded(text, most=500)
    return bounded(text.encode("unicode_escape", "backslashreplace").decode("ascii"), most=500)
