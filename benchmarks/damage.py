"""Damaged shards and S3 faults, our loader beside plain webdataset: `python -m benchmarks.damage`.

Makes the corpus of tests/corpus.py from a small dataset, and the faults by tests/fault_proxy.py
before a real Ceph gateway (moto where Ceph is not installed). Both loaders read the same tars, in
this process, one epoch in order. The table goes to docs/benchmarks/damage.md.

webdataset is used as its documentation shows: WebDataset, decode("pil"), to_tuple with every field
of a sample, the same handler in each stage; from S3 through `pipe:curl` on presigned URLs.
"""

import datetime
import logging
import os
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
    VICTIM,
    Given,
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
from vlal_dist.errors import DataError
from vlal_dist.storage.s3 import S3Store

PAGE = Path(__file__).resolve().parents[1] / "docs/benchmarks/damage.md"
FIELDS = ("jpg", "json", "likelihood.npy")
BURST_EPOCHS = 10
IN_PHOTO = 1000
"""A byte of a sample that is well inside its photo."""
HANDLERS = (wds.reraise_exception, wds.warn_and_continue)
Contents = dict[str, tuple[bytes, ...]]
"""Sample key -> the bytes of its fields."""


@dataclass(frozen=True)
class Cell:
    """What a loader made of a fault.

    Attributes:
        text: for the table.
        told: it ended with an error, or named or warned of what is missing.
        whole: it gave out every sample once, as it was packed.
    """

    text: str
    told: bool
    whole: bool


@dataclass(frozen=True)
class Row:
    """One fault; `cells` are those of our two modes, then of webdataset's two handlers."""

    name: str
    what: str
    cells: list[Cell]


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


@dataclass(frozen=True)
class Bucket:
    """The dataset on an S3 server.

    Attributes:
        server: its name.
        endpoint: where it answers.
        url: root of the dataset.
        client: goes around all faults.
    """

    server: str
    endpoint: str
    url: str
    client: Any


@dataclass(frozen=True)
class S3Fault:
    """A fault between the loaders and the store.

    Attributes:
        name, what: for the table.
        faults: what the proxy does, given the byte of the reply's body that lies in a photo.
        epochs: how many are read under it.
        disturb: done to the bucket, before the last epoch.
        at_start: done before anything is opened instead.
    """

    name: str
    what: str
    faults: Callable[[int], list[Fault]] = field(default=lambda at: [])
    epochs: int = 1
    disturb: Callable[[Bucket], object] | None = None
    at_start: bool = False

    def shown(self, epochs: list[Any]) -> list[Any]:
        """Those of which the table speaks: all, or the one after the disturbance."""
        return epochs[-1:] if self.disturb else epochs


def shard_key(number: int) -> str:
    """Key of a shard of the training split."""
    return f"{SPLIT}/shards/{SPLIT}-{number:06}.tar"


def put(bucket: Bucket, data: bytes) -> None:
    """Write the shard anew, around everything."""
    bucket.client.put_object(**name_of(bucket.url, shard_key(SHARD)), Body=data)


def put_other(bucket: Bucket) -> None:
    """Another shard's bytes in its place."""
    other = bucket.client.get_object(**name_of(bucket.url, shard_key(SHARD + 1)))
    put(bucket, other["Body"].read())


def remove(bucket: Bucket) -> None:
    """The shard goes."""
    bucket.client.delete_object(**name_of(bucket.url, shard_key(SHARD)))


def once(kind: Any, **more: Any) -> Callable[[int], list[Fault]]:
    """In the first read of the shard."""
    return lambda at: [Fault(kind, f"^GET .*/{shard_key(SHARD)}", at=at, **more)]


def busy(share: float) -> Callable[[int], list[Fault]]:
    """For a share of all reads of shards."""
    return lambda at: [Fault("busy", f"^GET .*/{SPLIT}/shards/", times=10**6, chance=share)]


S3_FAULTS = (
    S3Fault("503, 10 %", "of the reads of 10 epochs", busy(0.1), epochs=BURST_EPOCHS),
    S3Fault("503, 50 %", "of the reads of 10 epochs", busy(0.5), epochs=BURST_EPOCHS),
    S3Fault("outage", "no request is answered for 3 s", once("away", seconds=3.0)),
    S3Fault("reset", "TCP RST within a photo", once("reset")),
    S3Fault("truncation", "the body ends within a photo", once("truncate")),
    S3Fault("truncation, wrong length", "and Content-Length says the same", once("short")),
    S3Fault("stall", "3 s of silence within a photo, then the end", once("stall", seconds=3.0)),
    S3Fault("bit flip", "in a photo, on the wire", once("flip")),
    S3Fault(
        "object replaced", "by another shard's bytes; the epoch after", epochs=2, disturb=put_other
    ),
    S3Fault("object missing", "from the start on", disturb=remove, at_start=True),
)


def our_cell(given: list[Given], expected: list[dict[int, tuple[int, str]]], repeats: int) -> Cell:
    """What our loader made of it; a loss without a word ends the benchmark."""
    for one, rows in zip(given, expected, strict=True):
        lost = len(rows) - len(one.rows)
        accounted = one.error is not None or lost == len(one.damaged) == one.left_out.count
        if not (one.rows.items() <= rows.items() and accounted):
            raise SystemExit("our loader gave out a damaged sample, or lost one")
    errors = [one.error for one in given if one.error is not None]
    if errors:
        return Cell(f"stops: {why(errors[0])}", True, False)
    planned, got = (sum(map(len, rows)) for rows in (expected, (one.rows for one in given)))
    text = f"{got} of {planned}"
    refetched = sum(int(one.numbers["refetched"]) for one in given)
    if got < planned:
        return Cell(f"{text}, {planned - got} quarantined", True, False)
    text += f", {counted(repeats, 'read')} repeated" if repeats else ""
    text += f", {counted(refetched, 'sample')} read again: crc32" if refetched else ""
    return Cell(text, False, True)


def counted(number: int, what: str) -> str:
    """1 read, 2 reads."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def why(error: Exception) -> str:
    """The check that ended our epoch."""
    if not isinstance(error, DamagedError):
        return type(error).__name__
    return "crc32" if error.damage.check.startswith("crc32") else "the shard's end"


def refused(dataset: Dataset) -> Cell | None:
    """The trainer's look at all shards before the first step."""
    try:
        check_shard_sizes(open_split(dataset, SPLIT))
    except DataError as error:
        what = "missing" if "is missing" in str(error) else "size"
        return Cell(f"refused at start: {what}", True, False)
    return None


@dataclass
class Tally:
    """One epoch of webdataset.

    Attributes:
        found: how often each sample came as it was packed.
        altered: samples that came otherwise.
        error: what ended it.
        warned: warnings.
    """

    found: Counter[str] = field(default_factory=Counter)
    altered: int = 0
    error: str = ""
    warned: int = 0


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


def webdataset_cell(epochs: list[Tally], expected: Contents) -> Cell:
    """What webdataset made of it."""
    given = sum(len(+one.found) for one in epochs)
    planned = len(expected) * len(epochs)
    altered = sum(one.altered for one in epochs)
    doubled = sum(times - 1 for one in epochs for times in (+one.found).values())
    warned = sum(one.warned for one in epochs)
    text = [f"{given} of {planned}"]
    text += [f"{altered} altered"] if altered else []
    text += [f"{doubled} twice"] if doubled else []
    for name, times in Counter(one.error for one in epochs if one.error).items():
        text.append(name if len(epochs) == 1 else f"{name} in {counted(times, 'epoch')}")
    text += [counted(warned, "warning")] if warned else []
    told = bool(warned or any(one.error for one in epochs))
    whole = given == planned and not altered and not doubled
    text += [] if told or whole else ["**silent**"]
    return Cell(", ".join(text), told, whole)


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


def s3_client() -> Any:
    """boto3's client for the endpoint of the environment, by path and signed as today."""
    config = Config(signature_version="s3v4", s3={"addressing_style": "path"})
    return boto3.session.Session().client("s3", config=config)


@contextmanager
def s3_server(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and endpoint of a server of our own."""
    os.environ |= {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    if missing_reason() is None:
        cluster = Cluster(folder)
        cluster.start()
        yield "Ceph RADOS Gateway", cluster.endpoint
        cluster.stop(kill=True)
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"moto (no Ceph here: {missing_reason()})", f"http://{host}:{port}"
    server.stop()


def read_clean(folder: Path) -> Clean:
    """Make the dataset and read it undamaged."""
    dataset = open_dataset(str(write_small_merged(folder)), cache=folder / "cache")
    loader = open_loader(dataset)
    rows = [read_epoch(loader, epoch).rows for epoch in range(BURST_EPOCHS)]
    loader.close()
    split = open_split(dataset, SPLIT)
    samples = [RowReader(split).read_parts(row) for row in range(split.num_samples)]
    contents = {key: tuple(parts[name] for name in FIELDS) for key, parts in samples}
    urls = [str(dataset.store.local_path(split.shard_key(n))) for n in range(len(split.shards))]
    undamaged = webdataset_cell([read_webdataset(urls, contents, HANDLERS[0])], contents)
    if undamaged.told or not (undamaged.whole and all(len(one) == len(contents) for one in rows)):
        raise SystemExit("the undamaged dataset is not read whole")
    return Clean(dataset, rows, contents)


def page(damaged: list[Row], faults: list[Row], server: str) -> str:
    """The whole page: a line per fault, then the sums of each loader."""
    lines = [
        "# Damaged shards and S3 faults",
        "",
        f"Measured {datetime.date.today()} by `python -m benchmarks.damage`, about five minutes "
        f"(Ceph where it is installed, else moto). Here: {server}; webdataset {wds.__version__}.",
        "",
        *NOTES,
        "",
        "| | ours, `strict` | ours, `quarantine` | webdataset, default | `warn_and_continue` |",
        "|---|---|---|---|---|",
    ]
    for title, rows in (("At rest, on a local disk", damaged), ("Between loader and S3", faults)):
        lines.append(f"| *{title}* | | | | |")
        for row in rows:
            cells = " | ".join(cell.text for cell in row.cells)
            lines.append(f"| **{row.name}**: {row.what} | {cells} |")
    rows = [*damaged, *faults]
    lines.append("| *All together* | | | | |")
    for name, counts in SUMS.items():
        columns = zip(*(row.cells for row in rows), strict=True)
        cells = " | ".join(f"**{sum(map(counts, column))} of {len(rows)}**" for column in columns)
        lines.append(f"| **{name}** | {cells} |")
    return "\n".join([*lines, ""])


SUMS: dict[str, Callable[[Cell], bool]] = {
    "detected, healed or harmless": lambda cell: cell.told or cell.whole,
    "every sample given out, as packed": lambda cell: cell.whole,
    "samples lost, altered or doubled without a word": lambda cell: not cell.told | cell.whole,
}
NOTES = (
    'One of 4 shards of 18 samples is damaged, or met by a fault. "n of 72" is how many samples '
    "of an epoch were given out with the bytes that were packed; then come those that were altered "
    "or given twice, and what was said about it.",
    "",
    "- Ours: the trainer's look at the sizes of all shards at the start, then the loader. `strict` "
    "stops before the step that holds a damaged sample. `quarantine` is the loader's result; the "
    "trainer warns of a shard of another size at the start, and refuses a missing one in both "
    "modes.",
    '- webdataset: `WebDataset`, `decode("pil")`, `to_tuple("jpg", "json", "likelihood.npy")`, '
    "with the same handler in each stage; from S3 through `pipe:curl -s -f -L` on presigned URLs. "
    "It takes names from the tar, so two swapped samples and garbage after the end do it no harm. "
    "How many samples come before an error over S3 varies with timing.",
    "- Detected: an error or a warning. Healed or harmless: every sample came once, as packed. "
    "With `warn_and_continue` a detected fault still ends as a shorter epoch.",
)


def main() -> None:
    """Everything, then the page."""
    logging.getLogger("vlal_dist").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clean = read_clean(folder / "small")
        damaged = [at_rest(clean, kind, folder / kind) for kind in KINDS]
        with s3_server(folder / "server") as (server, endpoint):
            os.environ["AWS_ENDPOINT_URL"] = endpoint
            client = s3_client()
            client.create_bucket(Bucket="damage")
            bucket = Bucket(server, endpoint, "s3://damage/small", client)
            upload(clean.dataset, bucket.url)
            faults = [over_s3(clean, bucket, f, folder / f.name) for f in S3_FAULTS]
    text = page(damaged, faults, server)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
