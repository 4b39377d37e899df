"""Damaged shards and S3 faults, our loader beside plain webdataset: `python -m benchmarks.damage`.

Makes the corpus of tests/corpus.py from a small dataset, and the faults through tests/fault_proxy.py
before a real Ceph gateway (moto where Ceph is not installed). Both loaders read the same tars, in
this process. The table goes to docs/benchmarks/damage.md.

webdataset is used as its documentation shows: WebDataset, decode("pil"), to_tuple with every field
of a sample, the same handler in each stage; from S3 through `pipe:curl` on presigned URLs.
"""

import argparse
import datetime
import logging
import os
import platform
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3.session
import webdataset as wds
from botocore.config import Config

from tests.ceph import ACCESS_KEY, SECRET_KEY, Cluster, missing_reason
from tests.corpus import (
    KINDS,
    SHARD,
    SPLIT,
    Given,
    all_rows,
    damage,
    damaged_copy,
    name_of,
    open_loader,
    open_remote,
    read_epoch,
    upload,
    write_small_merged,
)
from tests.fault_proxy import Fault, FaultProxy
from vlal_dist.data.dataset import Dataset, check_shard_sizes, open_dataset, open_split
from vlal_dist.data.reader import DamagedError
from vlal_dist.data.rows import RowReader
from vlal_dist.errors import DataError, VlalError
from vlal_dist.storage.s3 import S3Store

PAGE = Path(__file__).resolve().parents[1] / "docs/benchmarks/damage.md"
FIELDS = ("jpg", "json", "likelihood.npy")
BUCKET = "vlal-damage"
Contents = dict[str, tuple[bytes, ...]]
"""Sample key -> the bytes of its fields."""


@dataclass(frozen=True)
class Cell:
    """What a loader made of a fault.

    Attributes:
        text: for the table.
        told: it ended with an error, or warned.
        whole: it gave out every sample once, as it was packed.
    """

    text: str
    told: bool
    whole: bool


@dataclass(frozen=True)
class Row:
    """One fault: what was done, then our two modes, then webdataset's two handlers."""

    name: str
    what: str
    cells: tuple[Cell, Cell, Cell, Cell]


@dataclass(frozen=True)
class Clean:
    """The undamaged dataset.

    Attributes:
        dataset: on a local disk.
        rows: what our loader gives out of it, by epoch.
        contents: what lies in its tars.
    """

    dataset: Dataset
    rows: list[dict[int, tuple[int, str]]]
    contents: Contents


@dataclass(frozen=True)
class S3Fault:
    """A fault between the loader and the store.

    Attributes:
        name, what: for the table.
        faults: what the proxy does, given the byte in the middle of a photo to do it at.
        epochs: how many are read under it.
        before_last: done to the bucket before the last epoch.
        at_start: whether that is before the dataset is opened, not in the middle of a run.
    """

    name: str
    what: str
    faults: Callable[[int], list[Fault]] = field(default=lambda at: [])
    epochs: int = 1
    before_last: Callable[[Any, str], None] | None = None
    at_start: bool = False


def shard_key(number: int) -> str:
    """Key of a shard."""
    return f"{SPLIT}/shards/{SPLIT}-{number:06}.tar"


ONE_SHARD = f"^GET .*/{shard_key(SHARD)}"
ALL_SHARDS = f"^GET .*/{SPLIT}/shards/"


def put_another(client: Any, url: str) -> None:
    """Another shard's bytes, by another writer."""
    body = client.get_object(**name_of(url, shard_key(SHARD + 1)))["Body"].read()
    client.put_object(**name_of(url, shard_key(SHARD)), Body=body)


def remove(client: Any, url: str) -> None:
    """The shard goes."""
    client.delete_object(**name_of(url, shard_key(SHARD)))


def once(kind: Any, **more: Any) -> Callable[[int], list[Fault]]:
    """A fault in the first read of the shard."""
    return lambda at: [Fault(kind, ONE_SHARD, at=at, **more)]


def busy(share: float) -> Callable[[int], list[Fault]]:
    """A share of all reads is refused."""
    return lambda at: [Fault("busy", ALL_SHARDS, times=10**6, chance=share)]


S3_FAULTS = (
    S3Fault("503 burst, 10 %", "10 epochs under it", busy(0.1), epochs=10),
    S3Fault("503 burst, 50 %", "10 epochs under it", busy(0.5), epochs=10),
    S3Fault("outage", "no request is answered for 3 s", once("away", seconds=3.0)),
    S3Fault("reset", "TCP RST within a photo", once("reset")),
    S3Fault("truncation", "the body ends within a photo", once("truncate")),
    S3Fault("truncation, wrong length", "and so says Content-Length", once("short")),
    S3Fault("stall", "3 s of silence within a photo, then the end", once("stall", seconds=3.0)),
    S3Fault("bit flip", "in a photo, on the wire", once("flip")),
    S3Fault(
        "object replaced",
        "another shard's bytes, between two epochs; the second is shown",
        epochs=2,
        before_last=put_another,
    ),
    S3Fault("object missing", "from the start", before_last=remove, at_start=True),
)


def our_cell(given: Given, expected: dict[int, tuple[int, str]], *, repeats: int = 0) -> Cell:
    """What our loader made of it; a sample that is not as packed would end the benchmark."""
    if not given.rows.items() <= expected.items():
        raise SystemExit("our loader gave out a damaged sample")
    whole, out = given.rows == expected, f"{len(given.rows)} of {len(expected)}"
    lost = len(expected) - len(given.rows)
    if given.error is not None:
        check = type(given.error).__name__
        if isinstance(given.error, DamagedError):
            check = given.error.damage.check
            check = "crc32" if check.startswith("crc32") else "the shard's end"
        return Cell(f"stops: {check}", True, False)
    if lost:
        if lost != len(given.damaged) or lost != given.left_out.count:
            raise SystemExit("our loader lost a sample without a word")
        return Cell(f"{out}, {lost} left out by name", True, False)
    refetched = int(given.numbers["refetched"])
    how = [f"{repeats} reads repeated"] if repeats else []
    how += [f"{refetched} sample fetched again (crc32)"] if refetched else []
    return Cell(", ".join([out, *how]), False, whole)


def at_start(dataset: Dataset) -> Cell | None:
    """The trainer's look at all shards before the first step."""
    try:
        check_shard_sizes(open_split(dataset, SPLIT))
    except DataError as error:
        why = "missing" if "missing" in str(error) else "size"
        return Cell(f"refused at start: {why}", True, False)
    return None


def read_ours(dataset: Dataset, epochs: int, *, quarantine: bool) -> list[Given]:
    """Epochs of one rank."""
    loader = open_loader(dataset, quarantine=quarantine)
    given = [read_epoch(loader, epoch) for epoch in range(epochs)]
    loader.close()
    return given


def read_webdataset(urls: Sequence[str], expected: Contents, handler: Any, epochs: int = 1) -> Cell:
    """What webdataset gives out of some tars; under an error the epoch is over."""
    found: Counter[str] = Counter()
    altered, errors = 0, []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(epochs):
            dataset = wds.WebDataset(list(urls), shardshuffle=False, handler=handler)
            samples = (
                dataset.map(keep_bytes)
                .decode("pil", handler=handler)
                .to_tuple("__key__", "__bytes__", *FIELDS, handler=handler)
            )
            try:
                for key, contents, *_ in samples:
                    found[key] += 1
                    altered += contents != expected[key]
            except Exception as error:
                errors.append(type(error).__name__)
    given, planned = sum(found.values()), len(expected) * epochs
    doubled = sum(max(0, times - epochs) for times in found.values())
    notes = [f"{altered} altered"] if altered else []
    notes += [f"{doubled} twice"] if doubled else []
    loud = Counter(errors)
    notes += [name if n == 1 else f"{n} x {name}" for name, n in loud.items()]
    notes += [f"{len(warned)} warnings"] if len(warned) > 1 else ["a warning"] * len(warned)
    whole = given == planned and not altered and not doubled
    told = bool(errors or warned)
    silent = [] if told or whole else ["**silent**"]
    return Cell(", ".join([f"{given} of {planned}", *notes, *silent]), told, whole)


def keep_bytes(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with the bytes of its fields, to compare with what was packed."""
    return {**sample, "__bytes__": tuple(sample.get(name, b"") for name in FIELDS)}


def webdataset_cells(urls: Sequence[str], expected: Contents, epochs: int = 1) -> Iterator[Cell]:
    """Both handlers."""
    for handler in (wds.reraise_exception, wds.warn_and_continue):
        yield read_webdataset(urls, expected, handler, epochs)


def at_rest(clean: Clean, kind: str, folder: Path) -> Row:
    """One kind of damage on a local disk."""
    root = folder / kind
    damaged_copy(clean.dataset, root, kind)
    dataset = open_dataset(str(root), cache=root / "cache")
    ours = [
        our_cell(read_ours(dataset, 1, quarantine=mode)[0], clean.rows[0]) for mode in (False, True)
    ]
    refused = at_start(dataset)
    urls = sorted(str(path) for path in (root / SPLIT / "shards").iterdir())
    what = " ".join((KINDS[kind].__doc__ or "").split()).rstrip(".")
    both = tuple(webdataset_cells(urls, clean.contents))
    return Row(kind.replace("_", " "), what, (refused or ours[0], ours[1], *both))


def over_s3(clean: Clean, fault: S3Fault, endpoint: str, folder: Path) -> Row:
    """One fault, before every loader anew."""
    start, stop = photo(clean.dataset)
    first_block = open_split(clean.dataset, SPLIT).blocks
    begin = int(first_block.offset[first_block.shard == SHARD][0])
    ours = [
        our_row(clean, fault, endpoint, folder / f"{fault.name}-{mode}", mode, at=100 - begin + begin)
        for mode in (False, True)
    ]
    del start, stop
    return Row(fault.name, fault.what, (*ours, *ours))
