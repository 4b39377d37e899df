"""The instances root as pack reads it: what clean committed, and the instances of a split."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from typing_extensions import TypedDict

from shard_tools.clean.columns import INSTANCE_SCHEMA
from shard_tools.clean.records import Box
from vlal_dist.contents import Count, Sha256, parse_json
from vlal_dist.data.format.dataset import ROOT_FILES, check_digest
from vlal_dist.data.format.index import decode_table
from vlal_dist.errors import DataError, NotFoundError
from vlal_dist.storage.store import Store

Reject = dict[str, str]
"""A row of `rejects.parquet`."""


@dataclass(frozen=True)
class InstanceRow:
    """One row of `<split>.parquet`: ids as text, box in pixels, labels as sorted attribute ids."""

    instance_id: str
    image_id: str
    object_id: int
    box: Box
    positive: list[int]
    negative: list[int]


class Cleaned(TypedDict):
    """`clean.json` (docs/formats.md)."""

    vocabulary_digest: Sha256
    feasible_digest: Sha256
    splits: dict[Literal["train", "val", "test"], Count]
    files: dict[str, Sha256]


def read_cleaned(source: Store) -> tuple[bytes, Cleaned]:
    """`clean.json`, as bytes and parsed; it names every file that pack reads."""
    try:
        data = source.read("clean.json")
    except NotFoundError:
        raise DataError(
            f"{source.url} holds no clean.json: run vlal clean first, or correct paths.instances"
        ) from None
    where, remedy = f"{source.url}/clean.json", "run vlal clean into a new paths.instances"
    cleaned: Cleaned = parse_json(data, Cleaned, where=where, remedy=remedy)
    files = (*ROOT_FILES, *(f"{split}.parquet" for split in cleaned["splits"]))
    missing = [name for name in files if name not in cleaned["files"]]
    if missing:
        raise DataError(f"{where} has no digest of {', '.join(missing)}; {remedy}")
    return data, cleaned


def read_instances(source: Store, split: str, *, sha256: str) -> Iterator[InstanceRow]:
    """The instances of a split, in the order of the table.

    Raises:
        DataError: the table is not the one that clean committed, or is none of clean's.
    """
    data, where = source.read(f"{split}.parquet"), f"{source.url}/{split}.parquet"
    check_digest(where, sha256, hashlib.sha256(data).hexdigest())
    remedy = "run vlal clean into a new paths.instances"
    for row in decode_table(data, INSTANCE_SCHEMA, where=where, remedy=remedy).to_pylist():
        x, y, w, h = row.pop("box")
        yield InstanceRow(box=(x, y, w, h), **row)
