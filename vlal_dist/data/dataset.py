"""Opening a dataset root: manifest, vocabulary, feasible sets, and the files of each split.

Everything read here is checked against the digests in `dataset.json` before it is used; the shards
are checked sample by sample when they are read.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from vlal_dist.data.index import Blocks, Index, Shard, decode_shards, map_blocks, map_index
from vlal_dist.errors import DataError, NotFoundError
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.storage.store import Store, fetch, open_store
from vlal_dist.vocabulary import Vocabulary

FORMAT = 1
SPLIT_FILES = ("shards.parquet", "index.arrow", "blocks.arrow", "labels.parquet")


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
        cache: local folder for index files of a remote root.
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
    """One opened split: shard list, memory-mapped index and blocks."""

    name: str
    store: Store
    shards: list[Shard]
    index: Index
    blocks: Blocks

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return len(self.index)

    def shard_key(self, shard: int) -> str:
        """Storage key of a shard, by position."""
        return f"{self.name}/shards/{self.shards[shard].name}"


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
            f"{url} holds no dataset.json: pack (or merge) has not finished there; run it, "
            "or correct paths.dataset / paths.merged"
        ) from None
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise DataError(f"{url}/dataset.json is damaged ({error}); pack again") from None
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"{url}: dataset format {manifest.get('format')}, this version reads {FORMAT}; "
            "pack it again, or use the version that wrote it"
        )
    contents = {name: store.read(name) for name in ("vocabulary.json", "feasible.npz")}
    for name, content in contents.items():
        found = hashlib.sha256(content).hexdigest()
        check_digest(f"{url}/{name}", manifest["files"][name], found)
    vocabulary = Vocabulary.from_json(json.loads(contents["vocabulary.json"]))
    feasible = FeasibleSets.from_npz(contents["feasible.npz"])
    check_digest(f"{url}: vocabulary", manifest["vocabulary_digest"], vocabulary.digest)
    check_digest(f"{url}: feasible sets", manifest["feasible_digest"], feasible.digest)
    digest = hashlib.sha256(data).hexdigest()
    return Dataset(url, store, manifest, digest, vocabulary, feasible, cache)


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
    entry = dataset.manifest["splits"][split]
    paths = {
        name: fetch(
            dataset.store, f"{split}/{name}", cache=dataset.cache, sha256=entry["files"][name]
        )
        for name in SPLIT_FILES[:3]
    }
    for name, path in paths.items():
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        check_digest(f"{dataset.url}/{split}/{name}", entry["files"][name], found)
    shards = decode_shards(paths["shards.parquet"].read_bytes())
    index, blocks = map_index(paths["index.arrow"]), map_blocks(paths["blocks.arrow"])
    for what, samples in (
        ("index.arrow", len(index)),
        ("blocks.arrow", int(blocks.samples.sum())),
        ("shards.parquet", sum(shard.samples for shard in shards)),
    ):
        if samples != entry["samples"]:
            raise DataError(
                f"{dataset.url}: {split}/{what} holds {samples} samples, dataset.json says "
                f"{entry['samples']}; run shard_tools verify, and pack again"
            )
    return Split(split, dataset.store, shards, index, blocks)


def check_shard_sizes(split: Split) -> None:
    """Tell a missing or truncated shard before work begins, not in the middle of an epoch.

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
            raise DataError(
                f"{split.store.url}/{key}: {found} bytes where {shard.bytes} are expected; the "
                "shard was altered or cut: restore it, or pack again"
            )

    with ThreadPoolExecutor(max_workers=16) as pool:
        list(pool.map(check, range(len(split.shards))))


def read_labels(dataset: Dataset, split: str) -> pa.Table:
    """`labels.parquet` of a split: key, instance_id, positive, negative; row-aligned."""
    data = dataset.store.read(f"{split}/labels.parquet")
    expected = dataset.manifest["splits"][split]["files"]["labels.parquet"]
    check_digest(
        f"{dataset.url}: {split}/labels.parquet", expected, hashlib.sha256(data).hexdigest()
    )
    return pyarrow.parquet.read_table(pa.BufferReader(data))
