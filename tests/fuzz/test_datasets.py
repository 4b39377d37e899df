"""Foreign datasets: every file of a root, mutated under digests that fit."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from shard_tools.verify import verify
from tests.fixtures.tiny_dataset import VOCABULARY
from tests.fuzz.files import (
    FILES,
    HALF,
    MEMBERS,
    SAMPLES,
    SHARDS,
    SPLIT,
    build,
    changed_index,
    seal,
    write,
)
from tests.fuzz.mutations import (
    byte_ops,
    explore,
    mutate_bytes,
    mutate_json,
    numbers,
    obeys,
    pick,
    tree_ops,
)
from vlal_dist.config.load import load_config
from vlal_dist.config.sections import DataConfig
from vlal_dist.data.format.dataset import Dataset, open_dataset, open_split, read_labels
from vlal_dist.data.format.index import (
    BLOCK_TYPES,
    INDEX_TYPES,
    Blocks,
    decode_shards,
    encode_blocks,
    encode_shards,
    map_blocks,
    map_index,
)
from vlal_dist.data.format.photo_groups import image_numbers
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.data.loading.batch_builder import BatchBuilder
from vlal_dist.data.loading.likelihoods import tar_likelihoods
from vlal_dist.data.loading.loader import evaluation_batches
from vlal_dist.data.loading.shard_reader import ShardReader
from vlal_dist.data.order.concat import ConcatSplits

NO_CACHE = Path(os.devnull, "cache")
"""Cannot be written, so that each example is hashed and checked."""
TABLES = (f"{SPLIT}/shards.parquet", f"{SPLIT}/index.arrow", f"{SPLIT}/blocks.arrow",
          f"{SPLIT}/labels.parquet", "feasible.npz", "vocabulary.json")  # fmt: skip
WIDTH, OBJECTS = len(VOCABULARY.attributes), len(VOCABULARY.objects)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = build(MEMBERS)
    return write(tmp_path_factory.mktemp("fuzz") / "root", files | {"dataset.json": seal(files)})


def use(root: Path) -> Dataset:
    """Open a dataset, read all of it, and check that what is given out lies in its range."""
    dataset = open_dataset(str(root), cache=NO_CACHE)
    for name in dataset.splits:
        split = open_split(dataset, name)
        index, sizes = split.index, [shard.bytes for shard in split.shards]
        for row in range(len(index)):
            assert int(index.offset[row]) + int(index.length[row]) <= sizes[index.shard[row]]
            assert index.object_id[row] < len(dataset.vocabulary.objects)
            for at, length in index.members(row).values():
                assert at + length <= index.length[row]
        table = read_labels(dataset, name).to_pylist()
        width = len(dataset.vocabulary.attributes)
        assert all(one < width for line in table for one in line["positive"] + line["negative"])
        photo = image_numbers(split)
        assert len(photo) == len(index) and photo.min(initial=0) >= 0
        reader = SampleReader(split)
        for row in range(len(index)):
            sample = reader.read(row)
            assert all(0 <= one < width for one in sample.positive + sample.negative)
            assert np.isfinite(sample.box_in_crop).all()
    return dataset


def changed(root: Path, key: str, data: bytes, read: Callable[[Path], Any]) -> Any:
    """Read a root with another file, sealed; the root is as before afterwards."""
    files = FILES | {key: data}
    write(root, {key: data, "dataset.json": seal(files)})
    try:
        return obeys(lambda: read(root))
    finally:
        write(root, {key: FILES[key], "dataset.json": seal(FILES)})


def test_the_unchanged_root_is_read(root: Path) -> None:
    assert use(root).splits == [SPLIT]
    assert config_verify(root)["root"] == str(root)


def config_verify(root: Path) -> Any:
    """`vlal verify` of a root."""
    paths = {"dataset": root, "merged": root, "cache": NO_CACHE, "run": root / "none"}
    config = load_config(None, {f"paths.{name}": str(path) for name, path in paths.items()})
    return verify(config, {})


def test_tables(root: Path, times: int) -> None:
    def check(key: str, ops: Any) -> None:
        changed(root, key, mutate_bytes(FILES[key], ops), use)

    explore("dataset tables, bytes", check, pick(TABLES), byte_ops, examples=250, times=times)


def test_index_numbers(root: Path, times: int) -> None:
    index = map_index(root / SPLIT / "index.arrow")

    def check(column: str, row: int, value: int) -> None:
        changed(root, f"{SPLIT}/index.arrow", changed_index(index, column, row, value), use)

    drawn = pick(list(INDEX_TYPES)), st.integers(0, SAMPLES - 1), numbers | st.integers(0, 20_000)
    explore("index, numbers", check, *drawn, examples=120, times=times)


def test_block_numbers(root: Path, times: int) -> None:
    blocks = map_blocks(root / SPLIT / "blocks.arrow")

    def check(column: str, row: int, value: int) -> None:
        columns = {name: np.array(values) for name, values in vars(blocks).items()}
        limit = int(np.iinfo(columns[column].dtype).max)
        columns[column][row % len(blocks)] = min(max(value, 0), limit)
        data = encode_blocks(Blocks(**columns))
        given = changed(root, f"{SPLIT}/blocks.arrow", data, use)
        assert given is None or data == FILES[f"{SPLIT}/blocks.arrow"]

    drawn = pick(list(BLOCK_TYPES)), st.integers(0, 9), numbers | st.integers(0, 20_000)
    explore("blocks, numbers", check, *drawn, examples=60, times=times)


def test_manifest_and_vocabulary(root: Path, times: int) -> None:
    whole = FILES | {"dataset.json": seal(FILES)}

    def check(key: str, ops: Any) -> None:
        data = mutate_json(whole[key], ops)
        if key == "dataset.json":
            write(root, {key: data})
            try:
                obeys(lambda: use(root))
            finally:
                write(root, {key: whole[key]})
        else:
            changed(root, key, data, use)

    drawn = pick(["dataset.json", "vocabulary.json"]), tree_ops
    explore("dataset.json, vocabulary.json", check, *drawn, examples=200, times=times)


def test_other_files_under_a_name(root: Path) -> None:
    for key in TABLES:
        for other in FILES.values():
            if other != FILES[key]:
                assert changed(root, key, other, use) is None, key


def read_batches(root: Path) -> int:
    """All rows as training and evaluation read them; the number of crops."""
    dataset = open_dataset(str(root), cache=NO_CACHE)
    reader = ShardReader(ConcatSplits([open_split(dataset, SPLIT)]))
    builder = BatchBuilder(
        reader, dataset, DataConfig(image_size=64), read_likelihoods=tar_likelihoods
    )
    try:
        count = 0
        for batch in evaluation_batches(builder, np.arange(SAMPLES), batch_size=HALF):
            assert batch.label.abs().max() <= 1 and batch.label.shape[1] == WIDTH
            assert batch.object_id.max() < OBJECTS
            count += len(batch.row)
        return count
    finally:
        builder.close()


MEMBER_READERS = {"samples": use, "verify": config_verify, "batches": read_batches}


@pytest.mark.parametrize("reader", MEMBER_READERS)
def test_members(root: Path, times: int, reader: str) -> None:
    """Contents of a sample under checksums, index and digests that fit."""

    def check(member: str, row: int, tree: Any, ops: Any, as_tree: bool) -> None:
        old = MEMBERS[row][member]
        whole = member == "json" and as_tree
        data = mutate_json(old, tree) if whole else mutate_bytes(old, ops)
        members = [dict(one) for one in MEMBERS]
        members[row][member] = data or b"\0"
        files = build(members)
        write(root, files | {"dataset.json": seal(files)})
        try:
            obeys(lambda: MEMBER_READERS[reader](root))
        finally:
            write(root, FILES | {"dataset.json": seal(FILES)})

    drawn = (pick(list(MEMBERS[0])), st.integers(0, SAMPLES - 1), tree_ops, byte_ops, st.booleans())
    explore(f"members, {reader}", check, *drawn, examples=50, times=times)


def test_shards_without_a_seal(root: Path, times: int) -> None:
    """A damaged shard gives the samples that were packed, or an error; never others."""
    dataset = open_dataset(str(root), cache=NO_CACHE)
    right = [SampleReader(open_split(dataset, SPLIT)).read(row).jpg for row in range(SAMPLES)]

    def check(key: str, ops: Any) -> None:
        write(root, {key: mutate_bytes(FILES[key], ops)})
        try:
            reader = SampleReader(open_split(dataset, SPLIT))
            for row in range(SAMPLES):
                sample = obeys(lambda row=row: reader.read(row))
                assert sample is None or sample.jpg == right[row]
        finally:
            write(root, {key: FILES[key]})

    explore("shards", check, pick(SHARDS), byte_ops, examples=100, times=times)


def test_tar_headers(root: Path, times: int) -> None:
    """A shard whose digest fits, but whose headers are a stranger's."""

    def check(key: str, ops: Any) -> None:

        data = mutate_bytes(FILES[key], ops)
        shards = decode_shards(FILES[f"{SPLIT}/shards.parquet"])
        number = SHARDS.index(key)
        shards[number] = replace(
            shards[number], bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
        )
        files = FILES | {key: data, f"{SPLIT}/shards.parquet": encode_shards(shards)}
        write(root, files | {"dataset.json": seal(files)})
        try:
            obeys(lambda: config_verify(root))
        finally:
            write(root, FILES | {"dataset.json": seal(FILES)})

    explore("tar headers, verify", check, pick(SHARDS), byte_ops, examples=50, times=times)
