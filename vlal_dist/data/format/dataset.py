"""Opening a dataset root: manifest, vocabulary, feasible sets, and the files of each split.

Everything read here is checked against the digests in `dataset.json` before it is used; the shards
are checked sample by sample when they are read. A digest says that a file is the one that its
writer meant, not that the writer can be trusted: types, ranges and references are checked as well.
An index of many gigabytes is hashed and checked once per node, not at every start:
`cache/verified` notes which files were found right.
"""

import hashlib
import json
import logging
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from typing_extensions import TypedDict

from vlal_dist.config.sections import PathsConfig
from vlal_dist.contents import Count, Finite, Sha256, parse_json, shown
from vlal_dist.data.format.annotations import Annotations, check_annotations, map_annotations
from vlal_dist.data.format.index import (
    ARROW_ERRORS,
    LABELS_SCHEMA,
    Blocks,
    Index,
    Shard,
    check_blocks,
    check_index,
    check_parquet,
    checked_table,
    decode_shards,
    map_blocks,
    map_index,
)
from vlal_dist.errors import ConfigError, DataError, NotFoundError, bounded
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.storage.local import replacing
from vlal_dist.storage.store import Store, fetch, open_store
from vlal_dist.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

FORMAT = 1
ROOT_FILES = ("vocabulary.json", "feasible.npz")
"""Copies in every dataset root, which make it self-contained."""
SPLIT_FILES = ("shards.parquet", "index.arrow", "blocks.arrow", "labels.parquet")
IN_PLACE_FILES = ("annotations.arrow",)
"""Further files of a split whose samples lie in tars of others."""
CHECKS = 1
"""Version of the checks that `cache/verified` vouches for."""


class _SplitEntry(TypedDict):
    samples: Count
    shards: Count
    bytes: Count
    rejected: NotRequired[Count]
    files: dict[str, Sha256]
    tars: NotRequired[str]


class _Likelihood(TypedDict):
    scorer_digest: str
    temperature: Finite
    splits: list[str]


class _Manifest(TypedDict):
    """`dataset.json` (docs/formats.md)."""

    name: str
    vocabulary_digest: Sha256
    feasible_digest: Sha256
    files: dict[str, Sha256]
    crops: NotRequired[dict[str, Any]]
    splits: dict[str, _SplitEntry]
    likelihood: NotRequired[_Likelihood | None]


@dataclass(frozen=True)
class Dataset:
    """An opened dataset root.

    Attributes:
        url: the root.
        store: its store.
        manifest: `dataset.json`.
        digest: sha256 (hex) of `dataset.json`'s bytes.
        vocabulary: names and groups.
        feasible: Omega_o of every object.
        cache: local folder for index files of a remote root, and for notes of what was verified.
    """

    url: str
    store: Store
    manifest: dict[str, Any]
    digest: str
    vocabulary: Vocabulary
    feasible: FeasibleSets
    cache: Path

    @property
    def name(self) -> str:
        """The dataset's name, part of every uid."""
        return str(self.manifest["name"])

    @property
    def splits(self) -> list[str]:
        """Names of the splits, in order."""
        return list(self.manifest["splits"])


@dataclass(frozen=True)
class Split:
    """One opened split: shard list, memory-mapped index and blocks.

    Attributes:
        name: of the split.
        store: holds the shards: the dataset's root, or the place of the tars that others wrote.
        shards, index, blocks: as the files of these names have them.
        num_attributes: bounds the attribute ids of its samples; None: they are not checked.
        annotations: of samples in tars of others, which hold no json of ours; None: our own tars.
    """

    name: str
    store: Store
    shards: list[Shard]
    index: Index
    blocks: Blocks
    num_attributes: int | None = None
    annotations: Annotations | None = None

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return len(self.index)

    def shard_key(self, shard: int) -> str:
        """Key of a shard in `store`, by position."""
        name = self.shards[shard].name
        return name if self.annotations is not None else f"{self.name}/shards/{name}"


def open_dataset(url: str, *, cache: Path) -> Dataset:
    """Open a dataset root (written by pack, merge or reshard).

    Raises:
        DataError: no dataset there, another format, or files that differ from their digests.
        StorageError: the store cannot be read.
    """
    store = open_store(url)
    try:
        data = store.read("dataset.json")
    except NotFoundError:
        raise DataError(
            f"{url} holds no dataset.json: vlal pack (or merge) has not finished there; run it, "
            "or correct paths.dataset, paths.merged or data.mix"
        ) from None
    where, remedy = f"{url}/dataset.json", "restore it, or pack again"
    manifest = parse_json(data, dict[str, Any], where=where, remedy=remedy)
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"{url}: dataset format {shown(manifest.get('format'))}, this version reads {FORMAT}; "
            "pack it again, or use the version that wrote it"
        )
    manifest = parse_json(data, _Manifest, where=where, remedy=remedy)
    _check_names(manifest, where)
    manifest = {"crops": {}, "likelihood": None, **manifest}
    contents = {name: store.read(name) for name in ROOT_FILES}
    for name, content in contents.items():
        found = hashlib.sha256(content).hexdigest()
        check_digest(f"{url}/{name}", manifest["files"][name], found)
    vocabulary = Vocabulary.from_json(
        parse_json(
            contents["vocabulary.json"],
            dict[str, Any],
            where=f"{url}/vocabulary.json",
            remedy="run vlal clean again",
        )
    )
    feasible = FeasibleSets.from_npz(contents["feasible.npz"])
    check_digest(f"{url}: vocabulary", manifest["vocabulary_digest"], vocabulary.digest)
    check_digest(f"{url}: feasible sets", manifest["feasible_digest"], feasible.digest)
    feasible.check_fits(len(vocabulary.objects), len(vocabulary.attributes))
    digest = hashlib.sha256(data).hexdigest()
    return Dataset(url, store, manifest, digest, vocabulary, feasible, cache)


def _check_names(manifest: dict[str, Any], where: str) -> None:
    """A DataError where a manifest lacks a file, or a split's name is not one of a folder."""
    listed: list[tuple[Any, tuple[str, ...]]] = [(manifest["files"], ROOT_FILES)]
    listed += [
        (entry["files"], (*SPLIT_FILES, *(IN_PLACE_FILES if "tars" in entry else ())))
        for entry in manifest["splits"].values()
    ]
    missing = [name for files, names in listed for name in names if name not in files]
    if missing:
        raise DataError(f"{where}: no digest of {missing[0]}; restore it, or pack again")
    for name in manifest["splits"]:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise DataError(f"{where}: a split cannot be named {shown(name)}; pack again")


def open_newest(paths: PathsConfig) -> Dataset:
    """Open `paths.merged` where it is finished, else `paths.dataset`; errors as `open_dataset`."""
    merged = open_store(paths.merged).exists("dataset.json")
    return open_dataset(paths.merged if merged else paths.dataset, cache=Path(paths.cache))


def check_digest(what: str, expected: str, found: str) -> None:
    """Raise a DataError naming both digests when they differ."""
    if expected != found:
        raise DataError(
            f"{what}: digest {found} where {expected} is expected; the files do not belong "
            "together: rebuild the later stage from the earlier one"
        )


def open_split(dataset: Dataset, split: str) -> Split:
    """Open one split; index and blocks are memory-mapped (downloaded once from a remote root).

    Raises:
        DataError: no such split, or a file that differs from its digest.
    """
    if split not in dataset.manifest["splits"]:
        raise DataError(f"{dataset.url} has no split {split!r}; it has {', '.join(dataset.splits)}")
    entry, where = dataset.manifest["splits"][split], f"{dataset.url}: {split}"
    in_place = "tars" in entry
    shards = decode_shards(
        verified_file(dataset, split, "shards.parquet").read_bytes(),
        where=f"{where}/shards.parquet",
        in_place=in_place,
    )
    num_objects, width = len(dataset.vocabulary.objects), len(dataset.vocabulary.attributes)

    def check_rows(path: Path) -> None:
        check_index(
            map_index(path),
            shards,
            num_objects=num_objects,
            where=f"{where}/index.arrow",
            in_place=in_place,
        )

    def check_runs(path: Path) -> None:
        check_blocks(map_blocks(path), index, where=f"{where}/blocks.arrow")

    index = map_index(verified_file(dataset, split, "index.arrow", check=check_rows))
    blocks = map_blocks(verified_file(dataset, split, "blocks.arrow", check=check_runs))
    for what, samples in (
        ("index.arrow", len(index)),
        ("blocks.arrow", int(blocks.samples.sum())),
        ("shards.parquet", sum(shard.samples for shard in shards)),
    ):
        if samples != entry["samples"]:
            raise DataError(
                f"{where}/{what} holds {samples} samples, dataset.json says "
                f"{entry['samples']}; run vlal verify, and pack again"
            )
    found = Split(split, dataset.store, shards, index, blocks, num_attributes=width)
    if not in_place:
        return found

    def check_labels(path: Path) -> None:
        check_annotations(
            map_annotations(path),
            rows=len(index),
            num_attributes=width,
            where=f"{where}/annotations.arrow",
        )

    path = verified_file(dataset, split, "annotations.arrow", check=check_labels)
    annotations = map_annotations(path)
    return replace(found, store=open_store(entry["tars"]), annotations=annotations)


def refuse_in_place(dataset: Dataset, *, what: str, instead: str) -> None:
    """Raise a ConfigError where samples lie in tars of others.

    Args:
        dataset: the opened dataset.
        what: which the program does not do with such tars.
        instead: what to do.
    """
    if any("tars" in entry for entry in dataset.manifest["splits"].values()):
        raise ConfigError(
            f"{dataset.url} was packed in place: its samples lie in tars of others, {what}; "
            f"{instead}, or pack with pack.in_place false into another paths.dataset"
        )


def verified_file(
    dataset: Dataset, split: str, name: str, *, check: Callable[[Path], None] | None = None
) -> Path:
    """A local file with the bytes of a split's file whose digest is in `dataset.json`.

    A file whose digest was right once, and that passed `check`, is not read again while its name,
    device, inode, size and times stay, which finds replaced and cut files. Other damage of an index
    shows when its samples fail their crc32, and `verify` hashes everything.

    Raises:
        DataError: another digest, or what `check` raises.
        StorageError: the file cannot be read.
    """
    key, expected = f"{split}/{name}", dataset.manifest["splits"][split]["files"][name]
    copied = dataset.store.local_path(key) is None
    downloaded = copied and not (dataset.cache / expected).is_file()
    path = fetch(dataset.store, key, cache=dataset.cache, sha256=expected)
    stat, note = path.stat(), dataset.cache / "verified" / expected
    state = json.dumps([
        str(path.absolute()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns,
        stat.st_ctime_ns, CHECKS, dataset.digest if check else None,
    ])  # fmt: skip
    with suppress(OSError):
        if note.read_bytes() == state.encode():
            return path
    if not downloaded:  # else hashed during the download
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if copied and found != expected:
            raise DataError(
                f"{path}, the local copy of {dataset.url}/{key}, has sha256 {found}: it was "
                "altered; delete it, and it is fetched again"
            )
        check_digest(f"{dataset.url}/{key}", expected, found)
    if check is not None:
        check(path)
    # Where the cache cannot be written, the next start hashes and checks again.
    with suppress(OSError), replacing(note) as unfinished:
        unfinished.write_text(state)
    return path


def check_shard_sizes(split: Split, *, may_be_damaged: bool = False) -> None:
    """Find a missing or truncated shard before work begins, not in the middle of an epoch.

    Args:
        split: the opened split.
        may_be_damaged: warn of another size, because damaged samples will be left out.

    Raises:
        DataError: a shard is absent, or has another size.
    """

    def check(number: int) -> None:
        shard, key = split.shards[number], split.shard_key(number)
        try:
            found = split.store.size(key)
        except NotFoundError:
            raise DataError(
                f"{split.store.url}/{key} is missing; restore it, or pack again"
            ) from None
        if found != shard.bytes:
            problem = (
                f"{split.store.url}/{key}: {found} bytes where {shard.bytes} are expected; the "
                "shard was altered or cut: restore it, or pack again"
            )
            if not may_be_damaged:
                raise DataError(problem)
            logger.warning("%s; its damaged samples will be left out", problem)

    with ThreadPoolExecutor(max_workers=16) as pool:
        list(pool.map(check, range(len(split.shards))))


def read_labels(
    dataset: Dataset,
    split: str,
    *,
    columns: Sequence[str] | None = None,
    rows: range | None = None,
) -> pa.Table:
    """`labels.parquet` of a split: key, instance_id, positive, negative; row-aligned.

    The file is hashed once per node, like an index; a remote one is copied to the cache once.

    Args:
        dataset: the opened dataset.
        split: name.
        columns: those that are decoded; None: all.
        rows: those that are read, with the row groups that hold them; None: all.

    Raises:
        DataError: no such rows, or a file that differs from its digest.
    """
    where = f"{dataset.url}: {split}/labels.parquet"
    chosen = list(LABELS_SCHEMA.names if columns is None else columns)
    schema = pa.schema([LABELS_SCHEMA.field(name) for name in chosen])
    samples = dataset.manifest["splits"][split]["samples"]
    rows = range(samples) if rows is None else rows
    path = verified_file(dataset, split, "labels.parquet")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            check_parquet(file, schema, rows=samples)
            table = checked_table(_read_rows(file, chosen, rows, where))
    except ARROW_ERRORS as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{where} is damaged ({bounded(str(error))}); run vlal verify, and pack again"
        ) from None
    width = len(dataset.vocabulary.attributes)
    for name in {"positive", "negative"} & set(chosen):
        for chunk in table[name].chunks:
            if np.max(chunk.flatten().to_numpy(), initial=0) >= width:
                raise DataError(
                    f"{where}: {name} holds attribute ids outside 0..{width - 1}; pack again"
                )
    return table


def _read_rows(
    file: pyarrow.parquet.ParquetFile, columns: list[str], rows: range, where: str
) -> pa.Table:
    """Some rows, with the row groups that hold them."""
    start, stop = rows.start, rows.stop
    groups = range(file.num_row_groups)
    ends = list(accumulate(file.metadata.row_group(group).num_rows for group in groups))
    if not 0 <= start <= stop <= file.metadata.num_rows:
        raise DataError(
            f"{where} has {file.metadata.num_rows} rows, not those from {start} to {stop}; "
            "run vlal verify, and pack again"
        )
    first, last = bisect_right(ends, start), bisect_left(ends, stop)
    wanted = list(groups[first : last + 1])
    table = file.read_row_groups(wanted, columns=columns, use_threads=False)
    return table.slice(start - ends[first - 1] if first else start, stop - start)
