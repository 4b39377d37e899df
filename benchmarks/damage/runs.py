"""Both loaders of benchmarks/damage/damage.py on the undamaged dataset, and under each fault.

Ours is opened anew for each fault, without and with quarantine; webdataset with either handler.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import webdataset as wds

from benchmarks.damage.cells import Cell, Contents, Row, Tally, our_cell, webdataset_cell
from benchmarks.damage.s3 import BURST_EPOCHS, Bucket, S3Fault, put, s3_client, shard_key
from tests.fixtures.damaged_tars import (
    KINDS,
    SHARD,
    SPLIT,
    VICTIM,
    damaged_copy,
    name_of,
    open_loader,
    open_remote,
    read_epoch,
    write_small_merged,
)
from tests.fixtures.fault_proxy import FaultProxy
from vlal_dist.data.format.dataset import Dataset, check_shard_sizes, open_dataset, open_split
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.errors import DataError
from vlal_dist.storage.s3 import S3Store

FIELDS = ("jpg", "json", "likelihood.npy")
IN_PHOTO = 1000
"""A byte of a sample that is well inside its photo."""
HANDLERS = (wds.reraise_exception, wds.warn_and_continue)


@dataclass(frozen=True)
class Clean:
    """The undamaged dataset.

    Attributes:
        dataset: on a local disk.
        rows: what our loader gives out of it, in each epoch.
        contents: what lies in its tars.
    """

    dataset: Dataset
    rows: list[dict[int, tuple[int, str]]]
    contents: Contents


def read_clean(folder: Path) -> Clean:
    """Make the dataset and read it undamaged."""
    dataset = open_dataset(str(write_small_merged(folder)), cache=folder / "cache")
    loader = open_loader(dataset)
    rows = [read_epoch(loader, epoch).rows for epoch in range(BURST_EPOCHS)]
    loader.close()
    split = open_split(dataset, SPLIT)
    samples = [SampleReader(split).read_members(row) for row in range(split.num_samples)]
    contents = {key: tuple(parts[name] for name in FIELDS) for key, parts in samples}
    urls = [str(dataset.store.local_path(split.shard_key(n))) for n in range(len(split.shards))]
    undamaged = webdataset_cell([read_webdataset(urls, contents, HANDLERS[0])], contents)
    if undamaged.told or not (undamaged.whole and all(len(one) == len(contents) for one in rows)):
        raise SystemExit("the undamaged dataset is not read whole")
    return Clean(dataset, rows, contents)


def refused(dataset: Dataset) -> Cell | None:
    """The trainer's look at all shards before the first step."""
    try:
        check_shard_sizes(open_split(dataset, SPLIT))
    except DataError as error:
        what = "missing" if "is missing" in str(error) else "size"
        return Cell(f"refused at start: {what}", True, False)
    return None


def read_webdataset(urls: Sequence[str], expected: Contents, handler: Any) -> Tally:
    """One epoch over some tars; an error ends it."""
    tally = Tally()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)  # of files that it leaves open
        samples = (
            wds.WebDataset(list(urls), shardshuffle=False, handler=handler)
            .map(keep_bytes)
            .decode("pil", handler=handler)
            .to_tuple("__key__", "__bytes__", *FIELDS, handler=handler)
        )
        try:
            for key, contents, *_ in samples:
                same = contents == expected[key]
                tally.found[key] += same
                tally.altered += not same
        except Exception as error:
            tally.error = type(error).__name__
    tally.warned = len(warned)
    return tally


def keep_bytes(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with the bytes of its fields, to compare with what was packed."""
    return {**sample, "__bytes__": tuple(sample.get(name, b"") for name in FIELDS)}


def at_rest(clean: Clean, kind: str, folder: Path) -> Row:
    """One kind of damage on a local disk."""
    damaged_copy(clean.dataset, folder / "root", kind)
    dataset = open_dataset(str(folder / "root"), cache=folder)
    cells = []
    for quarantine in (False, True):
        loader = open_loader(dataset, quarantine=quarantine)
        cells.append(our_cell([read_epoch(loader)], clean.rows[:1], 0))
        loader.close()
    cells[0] = refused(dataset) or cells[0]
    urls = sorted(str(path) for path in (folder / "root" / SPLIT / "shards").iterdir())
    for handler in HANDLERS:
        tally = read_webdataset(urls, clean.contents, handler)
        cells.append(webdataset_cell([tally], clean.contents))
    what = " ".join((KINDS[kind].__doc__ or "").split()).rstrip(".")
    return Row(kind.replace("_", " "), what[0].lower() + what[1:], cells)


@contextmanager
def faulty(clean: Clean, bucket: Bucket, fault: S3Fault) -> Iterator[FaultProxy]:
    """A whole bucket behind a proxy that does nothing yet."""
    put(bucket, clean.dataset.store.read(shard_key(SHARD)))
    with FaultProxy(bucket.endpoint) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        if fault.disturb and fault.at_start:
            fault.disturb(bucket)
        yield proxy


def epochs_of(fault: S3Fault, bucket: Bucket, read: Callable[[int], Any]) -> list[Any]:
    """The epochs under a fault that the table speaks of."""
    given = []
    for epoch in range(fault.epochs):
        if fault.disturb and not fault.at_start and epoch == fault.epochs - 1:
            fault.disturb(bucket)
        given.append(read(epoch))
    return fault.shown(given)


def ours_under(
    clean: Clean, bucket: Bucket, fault: S3Fault, folder: Path, *, quarantine: bool
) -> Cell:
    """What our loader makes of a fault of S3."""
    with faulty(clean, bucket, fault) as proxy:
        dataset = open_remote(bucket.url, folder)
        if cell := refused(dataset):
            return cell
        assert isinstance(dataset.store, S3Store)
        loader, before = open_loader(dataset, quarantine=quarantine), dataset.store.counts.retries
        proxy.faults = fault.faults(IN_PHOTO)
        given = epochs_of(fault, bucket, lambda epoch: read_epoch(loader, epoch))
        loader.close()
        repeats = dataset.store.counts.retries - before
    return our_cell(given, fault.shown(clean.rows[: fault.epochs]), repeats)


def webdataset_under(clean: Clean, bucket: Bucket, fault: S3Fault, handler: Any) -> Cell:
    """What webdataset makes of a fault of S3."""
    split = open_split(clean.dataset, SPLIT)
    first_row = sum(shard.samples for shard in split.shards[:SHARD])
    with faulty(clean, bucket, fault) as proxy:
        # It reads the shard in one request.
        proxy.faults = fault.faults(int(split.index.offset[first_row + VICTIM]) + IN_PHOTO)
        client = s3_client()
        urls = [
            f"pipe:curl -s -f -L '{client.generate_presigned_url('get_object', Params=name)}'"
            for name in (name_of(bucket.url, shard_key(n)) for n in range(len(split.shards)))
        ]
        tallies = epochs_of(
            fault, bucket, lambda epoch: read_webdataset(urls, clean.contents, handler)
        )
    return webdataset_cell(tallies, clean.contents)


def over_s3(clean: Clean, bucket: Bucket, fault: S3Fault, folder: Path) -> Row:
    """One fault, for each loader anew."""
    ours = [
        ours_under(clean, bucket, fault, folder / str(mode), quarantine=mode)
        for mode in (False, True)
    ]
    theirs = [webdataset_under(clean, bucket, fault, handler) for handler in HANDLERS]
    return Row(fault.name, fault.what, ours + theirs)
