"""Annotation files read into columns: JSON lists whole, JSON lines and Parquet as a stream.

`records.parse_records` decides what a record may be. Rows of Parquet whose values are plainly right
are taken as columns; it sees the others, one by one, so that all forms have the same rules.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from shard_tools.clean.columns import BATCH, NAMED_SCHEMA, SPLITS, Mask, Rows, named_batch
from shard_tools.clean.files import RejectFile, absent, parse_text, read_records
from shard_tools.clean.names import LONGEST_NAME, listed, name_problem
from shard_tools.clean.records import FIELDS, Instance, NotJson, parse_records
from vlal_dist.config.sections import CleanConfig
from vlal_dist.data.format.index import ARROW_ERRORS
from vlal_dist.errors import ConfigError, DataError, NotFoundError, bounded
from vlal_dist.storage.store import FETCH_BYTES, open_store

UNDIVIDED = "all"
"""The one key of `clean.annotations` where `clean.split` divides the photos."""

LINES = (".jsonl", ".ndjson")
"""Suffixes of JSON lines."""

LONGEST_LINE = 64 << 20
"""Bytes of a line that is read."""

logger = logging.getLogger(__name__)


class Division:
    """Splits of undivided photos, by a keyed hash of the photo's name.

    A photo's number is the first 8 bytes of sha256(seed, NUL, image id) over 2^64; it goes to the
    first split whose cumulative share is above it, with all its objects.

    Args:
        shares: `clean.split`, such as 80/10/10: train, val and test in per cent.
        seed: `clean.split_seed`.

    Raises:
        ConfigError: not three shares that sum to 100.
    """

    def __init__(self, shares: str, seed: int) -> None:
        try:
            found = [Fraction(share.strip()) for share in shares.split("/")]
        except (ValueError, ZeroDivisionError):
            found = []
        if len(found) != len(SPLITS) or sum(found) != 100 or min(found) < 0:
            raise ConfigError(
                f"clean.split is {bounded(shares)!r}; give train, val and test in per cent, three "
                "numbers that sum to 100, such as 80/10/10"
            )
        self.splits = [name for name, share in zip(SPLITS, found, strict=True) if share]
        self._seed = seed
        self._below = [sum(found[: place + 1]) * 2**64 / 100 for place in range(len(SPLITS))]

    def number(self, image_id: str) -> int:
        """The position of a photo's split in `SPLITS`."""
        digest = hashlib.sha256(f"{self._seed}\0{image_id}".encode()).digest()
        value = int.from_bytes(digest[:8], "big")
        return next(place for place, below in enumerate(self._below) if value < below)

    def numbers(self, image_id: pa.Array) -> pa.Array:
        """The positions of many, uint8."""
        coded = image_id.dictionary_encode()
        found = np.array([self.number(one) for one in coded.dictionary.to_pylist()], np.uint8)
        return pa.array(found[coded.indices.to_numpy()], pa.uint8())


def read_annotations(settings: CleanConfig, rows: Rows, rejects: RejectFile, folder: Path) -> int:
    """Read all files of `clean.annotations` in order; how many records they hold.

    Args:
        settings: the files, and how undivided photos are divided.
        rows: gets the usable records.
        rejects: gets the others.
        folder: local, for copies of remote files.

    Raises:
        DataError: a file is absent, damaged, or of another form.
        StorageError: a store cannot be read.
    """
    records = 0
    for split, urls in settings.annotations.items():
        for url in urls:
            file = _File(url, f"clean.annotations.{split}", split, settings, rows, rejects)
            with_copy = file.read(folder)
            logger.info("read %d records of %s from %s", with_copy, split, file.source)
            records += with_copy
    return records


class _File:
    """One annotation file on its way into the rows."""

    def __init__(
        self,
        url: str,
        setting: str,
        split: str,
        settings: CleanConfig,
        rows: Rows,
        rejects: RejectFile,
    ) -> None:
        self._url, self._setting, self._split = url, setting, split
        self._rows, self._rejects = rows, rejects
        self._division = None
        if settings.split is not None:
            self._division = Division(settings.split, settings.split_seed)
        self.source = url.rpartition("/")[2]

    def read(self, folder: Path) -> int:
        """Read it; the number of its records."""
        root, slash, name = self._url.rpartition("/")
        store = open_store(root or (slash or "."))
        try:
            size = store.size(name)
            parquet = store.read(name, length=min(4, size)) == b"PAR1"
        except NotFoundError:
            raise absent(self._url, self._setting) from None
        suffix = Path(self.source).suffix.lower()
        if suffix == ".parquet" and not parquet:
            raise self._error("is not Parquet (it does not begin with PAR1)")
        if not parquet and suffix not in LINES:
            records = read_records(self._url, setting=self._setting)
            return self._add_records(enumerate(records), lambda row: f"{self.source}[{row}]")
        path = store.local_path(name)
        copy = folder / "copy" if path is None else None
        if copy is not None:
            with copy.open("wb") as file:
                for offset in range(0, size, FETCH_BYTES):
                    length = min(FETCH_BYTES, size - offset)
                    file.write(store.read(name, offset=offset, length=length))
        try:
            if parquet:
                return self._add_parquet(path or folder / "copy")
            return self._add_records(
                _lines(path or folder / "copy"), lambda line: f"{self.source}:{line}"
            )
        finally:
            if copy is not None:
                copy.unlink()

    def _error(self, problem: str) -> DataError:
        return DataError(
            f"{self._setting}: {self._url} {problem}; write it again, or correct {self._setting}"
        )

    def _add_records(
        self, records: Iterable[tuple[int, object]], place: Callable[[int], str]
    ) -> int:
        count, records = 0, iter(records)
        while some := list(islice(records, BATCH)):
            instances, rejects = parse_records(some, split=self._split, place=place)
            self._rows.append(self._named(instances))
            self._rejects.add(rejects)
            count += len(some)
        return count

    def _named(self, instances: list[Instance]) -> pa.RecordBatch:
        """Instances as columns."""
        return named_batch(instances, self._splits)

    def _splits(self, image_id: pa.Array) -> pa.Array:
        if self._division is not None:
            return self._division.numbers(image_id)
        return pa.array(np.full(len(image_id), SPLITS.index(self._split), np.uint8))

    def _add_parquet(self, path: Path) -> int:
        count = 0
        for batch in self._batches(path):
            self._add_batch(batch, count)
            count += batch.num_rows
        return count

    def _batches(self, path: Path) -> Iterator[pa.RecordBatch]:
        """The columns `FIELDS` of a Parquet file."""
        count = 0
        try:
            with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
                names = file.schema_arrow.names
                for field in FIELDS:
                    if names.count(field) != 1:
                        raise self._error(
                            f"has {names.count(field)} columns {field} (its columns: "
                            f"{listed(names)}), and must have one"
                        )
                for groups in _row_groups(file):
                    for batch in file.iter_batches(
                        BATCH, row_groups=groups, columns=list(FIELDS), use_threads=False
                    ):
                        yield batch
                        count += batch.num_rows
        except ARROW_ERRORS as error:
            if isinstance(error, DataError):
                raise
            raise self._error(
                f"is damaged Parquet after row {count} ({bounded(str(error))})"
            ) from None

    def _add_batch(self, batch: pa.RecordBatch, first: int) -> None:
        plain, columns = _plain(batch)
        others = [
            (first + row, {field: _value(batch[field][row]) for field in FIELDS})
            for row in np.flatnonzero(~plain).tolist()
        ]
        if columns is not None:
            columns.insert(0, self._splits(columns[1]))
            named = pa.RecordBatch.from_arrays(columns, schema=NAMED_SCHEMA)
        if not others:
            self._rows.append(named)
            return
        kept: list[int] = []
        instances: list[Instance] = []
        for number, record in others:
            found, rejects = parse_records(
                [(number, record)], split=self._split, place=lambda row: f"{self.source}[{row}]"
            )
            instances += found
            kept += [number - first] * len(found)
            self._rejects.add(rejects)
        more = self._named(instances)
        if columns is not None:
            more = pa.concat_batches([named, more])
            kept = [*np.flatnonzero(plain).tolist(), *kept]
        self._rows.append(more.take(pa.array(np.argsort(kept))))


def _row_groups(file: pyarrow.parquet.ParquetFile) -> list[list[int]]:
    """The row groups that are read at once: all, except that pyarrow joins no lists of dictionary
    values across row groups.
    """
    kinds = [field.type for field in file.schema_arrow if _is_list(field.type)]
    groups = list(range(file.num_row_groups))
    if any(pa.types.is_dictionary(kind.value_type) for kind in kinds):
        return [[group] for group in groups]
    return [groups]


def _lines(path: Path) -> Iterator[tuple[int, object]]:
    """The values of JSON lines, each with its number from 1; blank lines are passed over."""
    number = 0
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST_LINE)
                yield number, NotJson(f"a line of more than {LONGEST_LINE} bytes")
                continue
            text = line.decode("utf-8", "surrogateescape").lstrip("\ufeff")
            if text.isspace() or not text:
                continue
            try:
                yield number, parse_text(text)
            except ValueError as error:
                yield number, NotJson(f"not JSON: {bounded(str(error))}")


def _plain(batch: pa.RecordBatch) -> tuple[Mask, list[pa.Array] | None]:
    """Rows of Parquet that are certainly right, and their columns as in `NAMED_SCHEMA`, from the
    instance id on; None where no row is.
    """
    none = np.zeros(batch.num_rows, np.bool_)
    try:
        batch.validate(full=True)
        ids = [_texts(batch[name]) for name in ("instance_id", "image_id")]
        name = _texts(batch["object_name"], integers=False)
        lists = [_lists(batch[field]) for field in ("positive_attributes", "negative_attributes")]
        boxes, plain = _boxes(batch["instance_bbox"])
    except (pa.ArrowException, _OtherType):  # not UTF-8, or not of these types
        return none, None
    for text in ids:
        plain = plain & _is_plain_id(text)
    plain = plain & _are_names(name)
    for column in lists:
        # Whether all values between a row's two offsets are names.
        wrong = np.concatenate([[0], np.cumsum(~_are_names(column.values))])
        ends = wrong[column.offsets.to_numpy()]
        plain = plain & (ends[1:] == ends[:-1]) & column.is_valid().to_numpy(zero_copy_only=False)
    if not plain.any():
        return none, None
    columns = [*ids, name, boxes, *lists]
    if not plain.all():
        columns = [column.filter(pa.array(plain)) for column in columns]
    return plain, columns


class _OtherType(Exception):
    """A column of a type of which single rows are looked at."""


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _texts(column: pa.Array, *, integers: bool = True) -> pa.Array:
    if _is_text(column.type) or (integers and pa.types.is_integer(column.type)):
        return column.cast(pa.string())
    raise _OtherType


def _lists(column: pa.Array) -> pa.Array:
    kind = column.type
    if _is_list(kind) and (_is_text(kind.value_type) or pa.types.is_null(kind.value_type)):
        return column.cast(pa.list_(pa.string()))
    raise _OtherType


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _boxes(column: pa.Array) -> tuple[pa.Array, Mask]:
    """Boxes as in `NAMED_SCHEMA`, and which are right; null is the whole photo."""
    kind, count = column.type, len(column)
    sides = np.tile([0.0, 0.0, np.inf, np.inf], (count, 1))
    null = column.is_null().to_numpy(zero_copy_only=False)
    right = null.copy()
    if not pa.types.is_null(kind):
        inner = kind.value_type if _is_list(kind) else None
        if inner is None or not (pa.types.is_floating(inner) or pa.types.is_integer(inner)):
            raise _OtherType
        lists = column.cast(pa.list_(pa.float64()), safe=False)
        offsets = lists.offsets.to_numpy()
        values = lists.values.to_numpy(zero_copy_only=False)  # a null becomes NaN
        four = np.flatnonzero(~null & (np.diff(offsets) == 4))
        found = values[offsets[four][:, None] + np.arange(4)]
        fine = np.isfinite(found).all(axis=1) & (found[:, 2:] > 0).all(axis=1)
        sides[four[fine]] = found[fine]
        right[four[fine]] = True
    flat = pa.array(sides.ravel())
    return pa.FixedSizeListArray.from_arrays(flat, 4), right


def _is_plain_id(column: pa.Array) -> Mask:
    """Texts of printable characters, which `name_problem` accepts; it sees the others."""
    length = pc.utf8_length(column)
    right = pc.and_(pc.greater(length, 0), pc.less_equal(length, LONGEST_NAME))
    right = pc.and_(right, pc.invert(pc.utf8_is_space(column)))
    right = pc.and_(right, pc.utf8_is_printable(column))
    return pc.fill_null(right, False).to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def _are_names(column: pa.Array) -> Mask:
    """Which texts are names; null is none."""
    coded = column.dictionary_encode()
    right = np.array([name_problem(name) is None for name in coded.dictionary.to_pylist()], bool)
    indices = pc.fill_null(coded.indices, len(right)).to_numpy()
    return np.append(right, False)[indices]  # type: ignore[no-any-return]


def _value(cell: pa.Scalar) -> Any:
    """A value of Parquet as JSON would give it; bytes that are not UTF-8 as lone surrogates."""
    if not cell.is_valid:
        return None
    if pa.types.is_dictionary(cell.type):
        return _value(cell.value)
    if _is_list(cell.type):
        return [_value(one) for one in cell.values]
    if _is_text(cell.type):
        return cell.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
    try:
        return cell.as_py()
    except (ValueError, OverflowError, pa.ArrowException):
        return f"a {cell.type} that cannot be shown"
