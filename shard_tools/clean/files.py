"""Files that `clean` reads and writes: annotation JSON in, the instances root out.

Every output is a pure function of the input: same annotations, same bytes, so that repeating the
command finds its own files and changes nothing.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from shard_tools.clean.columns import TableFile
from shard_tools.clean.names import check_table, listed, name_problem
from shard_tools.clean.records import Reject, RepeatedKeys, shortened
from vlal_dist.data.format.index import REJECTS_SCHEMA
from vlal_dist.errors import DataError, NotFoundError
from vlal_dist.storage.checks import sha256_of
from vlal_dist.storage.store import Store, read_url

FORMAT = 1
MANIFEST = "clean.json"
REJECTS = "rejects.parquet"

logger = logging.getLogger(__name__)


def read_json(url: str, *, setting: str) -> object:
    """Parse a JSON file, local or `s3://`.

    Bytes that are not UTF-8 become lone surrogates, which no name may hold, and integers beyond
    Python's limit of digits become infinite: such a record is rejected, and the others are read. An
    object that repeats a key is a `RepeatedKeys`.

    Args:
        url: path or URL.
        setting: the config key that names it, for messages.

    Raises:
        DataError: there is no such file, or it is not JSON; names the line.
        StorageError: the store cannot be read.
    """
    try:
        data = read_url(url)
    except NotFoundError:
        raise absent(url, setting) from None
    encoding = json.detect_encoding(data)
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    try:
        return parse_text(data.decode(encoding, errors))
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno}, column {error.colno}: {error.msg}"
        if error.msg == "Extra data":
            problem += "; a file holds one JSON value, not one per line (JSON Lines)"
    except ValueError as error:
        problem = shortened(str(error))
    raise DataError(
        f"{setting}: {url} is not JSON ({problem}); correct the file, download it again, or "
        f"correct {setting}"
    )


def absent(url: str, setting: str) -> DataError:
    """The error of a file that is not there."""
    return DataError(f"{setting}: {url} does not exist; download it, or correct {setting}")


def parse_text(text: str) -> object:
    """Parse one JSON value; an object that repeats a key is a `RepeatedKeys`.

    Raises:
        ValueError: it is not JSON (json.JSONDecodeError), or nested too deep.
    """
    try:
        try:
            return _DECODER.decode(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer beyond the limit of digits
            return json.JSONDecoder(object_pairs_hook=_object, parse_int=_number).decode(text)
    except RecursionError:
        raise ValueError("its brackets are nested hundreds deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    several = RepeatedKeys(values)
    several.repeated = tuple(
        key for key, count in Counter(k for k, _ in pairs).items() if count > 1
    )
    return several


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # json.loads makes one for each line


def _number(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:
        return float(digits)


def read_records(url: str, *, setting: str) -> list[object]:
    """The records of one annotation file: a JSON list.

    Raises:
        DataError: absent, not JSON, or not a list.
    """
    records = read_json(url, setting=setting)
    if not isinstance(records, list):
        kind = "object" if isinstance(records, dict) else type(records).__name__
        keys = f" with the keys {listed(records)}" if isinstance(records, dict) and records else ""
        raise DataError(
            f"{setting}: {url} holds a JSON {kind}{keys}, not a list of annotation records "
            f"(docs/your-data.md shows one); correct {setting}"
        )
    return records


def read_name_lists(url: str, *, setting: str) -> dict[str, list[str]]:
    """A JSON object from group name to a list of names (VAW's type and head/tail files).

    Raises:
        DataError: absent, not JSON, of another form, or with a group twice or without a name.
    """
    groups = read_json(url, setting=setting)
    if not isinstance(groups, dict) or not all(
        isinstance(members, list) and all(isinstance(name, str) for name in members)
        for members in groups.values()
    ):
        raise DataError(f"{setting}: {url} must map each group to a list of names")
    _check_keys(groups, what=f"{setting}: {url}", kind="group")
    return groups


def read_merge_table(url: str, *, setting: str) -> dict[str, str]:
    """A merge table: plain JSON name -> representative, or a `vocabulary.json` with `merges`.

    Raises:
        DataError: absent, not JSON, or of another form.
    """
    table = read_json(url, setting=setting)
    if isinstance(table, dict) and isinstance(table.get("merges"), dict):
        table = table["merges"]
    return check_merge_table(table, what=f"{setting}: {url}")


def check_merge_table(table: object, *, what: str) -> dict[str, str]:
    """Return `table` if it maps names to names; `what` opens the message of the DataError."""
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise DataError(
            f"{what} must map object names to representatives (or be a vocabulary.json written by "
            "clean); correct it"
        )
    _check_keys(table, what=what, kind="name")
    check_table(table, what=what, error=DataError)
    return table


def _check_keys(table: dict[str, Any], *, what: str, kind: str) -> None:
    """Refuse keys that occur twice or are no names."""
    if isinstance(table, RepeatedKeys):
        raise DataError(
            f"{what} has a {kind} twice ({listed(table.repeated)}); keep one entry of each"
        )
    for key in table:
        problem = name_problem(key)
        if problem is not None:
            raise DataError(f"{what} has the {kind} {listed([key])} ({problem}); correct it")


class RejectFile(TableFile):
    """`rejects.parquet`, in the order found, with what a summary needs."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, REJECTS_SCHEMA)
        self._count: Counter[str] = Counter()
        self._first: dict[str, Reject] = {}

    def add(self, rejects: Sequence[Reject]) -> None:
        """Add some."""
        self._count.update(reject.reason for reject in rejects)
        for reject in rejects:
            self._first.setdefault(reject.reason, reject)
        columns = {name: [getattr(r, name) for r in rejects] for name in REJECTS_SCHEMA.names}
        self.append(pa.RecordBatch.from_pydict(columns, schema=REJECTS_SCHEMA))

    def count(self, *reasons: str) -> int:
        """How many have one of these reasons."""
        return sum(self._count[reason] for reason in reasons)

    def summary(self) -> str:
        """The commonest reasons, each with its number and an example; empty without rejects."""
        return "; ".join(
            f"{count} {reason}, such as {self._first[reason].instance_id or 'a record'} of "
            f"{self._first[reason].split}: {shortened(self._first[reason].detail)}"
            for reason, count in self._count.most_common(3)
        )


def json_bytes(values: object) -> bytes:
    """JSON text in the order given, one line per entry."""
    return (json.dumps(values, indent=1) + "\n").encode()


def write_root(
    store: Store, files: Mapping[str, bytes | Path], manifest: Mapping[str, object]
) -> None:
    """Write the files, then `clean.json` with the sha256 of each; create-only.

    Args:
        store: the instances root.
        files: key -> bytes, or the file that holds them.
        manifest: further entries of `clean.json`.

    Raises:
        ConflictError: the root holds another cleaning's files; nothing of it is changed.
    """
    digests = {key: sha256_of(data) for key, data in files.items()}
    closing = json_bytes({"format": FORMAT, **manifest, "files": digests})
    if store.exists(MANIFEST):
        # A finished root of another cleaning is refused before a new split is added to it.
        store.create(MANIFEST, closing)
    else:
        store.delete(REJECTS)  # of a cleaning that ended without instances
    created = [store.create(key, data) for key, data in {**files, MANIFEST: closing}.items()]
    if not any(created):
        logger.info("%s already holds exactly these files", store.url)


def write_rejects(store: Store, rejects: RejectFile) -> str:
    """Write the rejects of a cleaning that left nothing, and say where; not in a finished root."""
    if store.exists(MANIFEST):
        return f"{store.url} holds an earlier cleaning and is left as it is"
    rejects.close()
    store.replace(REJECTS, rejects.path.read_bytes())
    return f"all are listed in {store.url}/{REJECTS}"
