"""Labels of one object gathered from rows that lie apart, with bounded memory."""

import contextlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator

from shard_tools.importers.records import Box, Record, Rejected
from vlal_dist.errors import StorageError

BATCH = 10_000
"""Runs of rows that are held before they are written."""
CACHE_KIB = 65_536
"""Memory of the database; what is more is sorted on disk."""


class Groups:
    """Records of the same object joined into one, in the order of their first rows.

    Rows of an object that follow each other are joined at once; the joined rows go to a database in
    `TMPDIR`, which sorts them. An object is known by its id, without one by split, photo, object
    and box.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vlal-import-")
        self._database: sqlite3.Connection | None = None
        self._first: Record | None = None
        self._positive: dict[str, None] = {}
        self._negative: dict[str, None] = {}
        self._pending: list[tuple[int, str, str]] = []
        self._count = 0

    def __enter__(self) -> "Groups":
        return self

    def __exit__(self, *error: object) -> None:
        if self._database is not None:
            self._database.close()
        self._folder.cleanup()

    def add(self, record: Record) -> None:
        """Add a row."""
        if self._first is None or _head(self._first) != _head(record):
            self._end_run()
            self._first = record
        self._positive.update(dict.fromkeys(record.positive))
        self._negative.update(dict.fromkeys(record.negative))

    def merged(self) -> Iterator[Record | Rejected]:
        """The joined records; a reject where rows of one id differ in photo, object or box."""
        self._end_run()
        self._flush()
        if self._database is None:
            return
        with _storage_errors():
            rows = self._database.execute(
                "SELECT key, value FROM (SELECT n, key, value, min(n) OVER (PARTITION BY key) AS "
                "first FROM runs) ORDER BY first, n"
            )
            last, known = None, ""
            for key, value in rows:
                record = _read(value)
                if last is None or key != known:
                    if last is not None:
                        yield last
                    last, known = record, key
                elif _head(last) != _head(record):
                    yield Rejected(
                        record.file, record.line, record.instance_id, "conflict",
                        f"line {last.line} of {last.file} has the same id with another photo, "
                        "split, object or box",
                    )  # fmt: skip
                else:
                    last = _joined(last, record)
            if last is not None:
                yield last

    def _end_run(self) -> None:
        if self._first is None:
            return
        first, box = self._first, self._first.box
        key = first.instance_id and json.dumps(first.instance_id)
        value = [first.split, first.image_id, first.instance_id, first.object_name, box,
                 list(self._positive), list(self._negative), first.file, first.line]  # fmt: skip
        self._pending.append((self._count, key or json.dumps(value[:5]), json.dumps(value)))
        self._count += 1
        self._first, self._positive, self._negative = None, {}, {}
        if len(self._pending) == BATCH:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        with _storage_errors():
            if self._database is None:
                path = os.path.join(self._folder.name, "runs.sqlite")
                self._database = sqlite3.connect(path, isolation_level=None)
                for pragma in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE",
                               f"cache_size = -{CACHE_KIB}"):  # fmt: skip
                    self._database.execute(f"PRAGMA {pragma}")
                self._database.execute("CREATE TABLE runs (n INTEGER, key TEXT, value TEXT)")
            self._database.execute("BEGIN")
            self._database.executemany("INSERT INTO runs VALUES (?, ?, ?)", self._pending)
            self._database.execute("COMMIT")
        self._pending.clear()


def _head(record: Record) -> tuple[str, str, str, str, Box | None]:
    return record.split, record.image_id, record.instance_id, record.object_name, record.box


def _read(value: str) -> Record:
    split, image, identity, name, box, positive, negative, file, line = json.loads(value)
    box = None if box is None else tuple(box)
    return Record(split, image, identity, name, box, tuple(positive), tuple(negative), file, line)


def _joined(first: Record, more: Record) -> Record:
    positive = tuple(dict.fromkeys((*first.positive, *more.positive)))
    negative = tuple(dict.fromkeys((*first.negative, *more.negative)))
    return Record(*_head(first), positive, negative, first.file, first.line)


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(
            f"sorting rows in {tempfile.gettempdir()}: {error}; free space there, or set TMPDIR to "
            "a folder with as many bytes as the tables have"
        ) from None
