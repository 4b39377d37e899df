"""Files of strangers: refused by name, before memory is taken or a map is read past its end."""

import hashlib
import io
import json
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from tests.fuzz.files import FILES, SPLIT, seal, write
from vlal_dist.data.format.dataset import open_dataset, open_split, read_labels
from vlal_dist.data.format.images import open_photo
from vlal_dist.data.format.index import (
    LABELS_SCHEMA,
    Blocks,
    Index,
    decode_shards,
    encode_blocks,
    encode_index,
    encode_table,
    map_blocks,
    map_index,
)
from vlal_dist.data.format.jpeg import decode_jpeg
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.data.format.scores import quarantined_of
from vlal_dist.data.format.tar import list_members
from vlal_dist.errors import DataError
from vlal_dist.method.feasible import FeasibleSets, decode_npy

INDEX = f"{SPLIT}/index.arrow"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "root", FILES | {"dataset.json": seal(FILES)})


def open_with(root: Path, key: str, data: bytes) -> None:
    """Open the root with another file under digests that fit, and read its labels and samples."""
    write(root, {key: data, "dataset.json": seal(FILES | {key: data})})
    dataset = open_dataset(str(root), cache=root.parent / "cache")
    split = open_split(dataset, SPLIT)
    read_labels(dataset, SPLIT)
    reader = SampleReader(split)
    for row in range(split.num_samples):
        reader.read(row)


def test_an_index_whose_buffers_leave_the_file_does_not_end_the_process(root: Path) -> None:
    """The message of an Arrow file states where its buffers lie: 58 kB were enough for SIGSEGV."""
    write(root, {INDEX: _buffers_moved(FILES[INDEX])})
    script = (
        "import sys; from pathlib import Path; from vlal_dist.data.format.index import map_index\n"
        "i = map_index(Path(sys.argv[1])); print(sum(int(c.sum()) for c in vars(i).values()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(root / INDEX)], capture_output=True, text=True
    )
    assert found.returncode == 1, found
    assert "index.arrow is damaged" in found.stderr and "DataError" in found.stderr


def _buffers_moved(data: bytes) -> bytes:
    """The index with a million times the rows, over buffers that stay as they are."""
    rows = struct.pack("<q", 8)
    return data.replace(rows, struct.pack("<q", 8_000_000))


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("object_id", 3, "its object is none of 3"),
        ("object_id", 2**32 - 1, "its object is none of 3"),
        ("shard", 2, "its shard is none of 2"),
        ("offset", 2**64 - 1, "it leaves its shard"),
        ("length", 2**32 - 1, "it leaves its shard"),
        ("jpg_offset", 2**32 - 1, "its jpg leaves the sample"),
        ("json_length", 0, "it has no json"),
        ("likelihood_length", 2**32 - 1, "its likelihood leaves the sample"),
        ("offset", 0, "it lies before the end of the last"),
    ],
)
def test_a_number_of_the_index_out_of_range(
    root: Path, column: str, value: int, problem: str
) -> None:
    columns = {name: np.array(one) for name, one in vars(map_index(root / INDEX)).items()}
    columns[column][1] = value
    with pytest.raises(DataError, match=rf"index\.arrow: row 1: {problem}.*{column} {value}"):
        open_with(root, INDEX, encode_index(Index(**columns)))


def test_more_samples_in_a_shard_than_it_states(root: Path) -> None:
    columns = {name: np.array(one) for name, one in vars(map_index(root / INDEX)).items()}
    fewer = {name: np.array(one[:-1]) for name, one in columns.items()}
    columns["shard"][3] = 1
    with pytest.raises(DataError, match="it lies before the end"):
        open_with(root, INDEX, encode_index(Index(**columns)))
    with pytest.raises(DataError, match=r"3 samples in test-000001\.tar, shards\.parquet says 4"):
        open_with(root, INDEX, encode_index(Index(**fewer)))


@pytest.mark.parametrize("column", ["shard", "first_row", "samples", "offset", "bytes"])
def test_blocks_that_are_no_runs_of_the_index(root: Path, column: str) -> None:
    key = f"{SPLIT}/blocks.arrow"
    columns = {name: np.array(one) for name, one in vars(map_blocks(root / key)).items()}
    columns[column][0] += 1
    with pytest.raises(DataError, match=r"blocks\.arrow: its blocks are not runs"):
        open_with(root, key, encode_blocks(Blocks(**columns)))


def test_an_index_is_checked_once_per_node(root: Path) -> None:
    cache = root.parent / "cache"
    open_split(open_dataset(str(root), cache=cache), SPLIT)
    notes = {path: path.stat().st_mtime_ns for path in (cache / "verified").iterdir()}
    open_split(open_dataset(str(root), cache=cache), SPLIT)
    assert notes == {path: path.stat().st_mtime_ns for path in (cache / "verified").iterdir()}


@pytest.mark.parametrize("change", ["null", "type", "column", "twice", "batches"])
def test_other_columns_than_those_of_an_index(root: Path, change: str) -> None:
    columns = dict(vars(map_index(root / INDEX)))
    batch = pa.record_batch(list(map(pa.array, columns.values())), names=list(columns))
    if change == "null":
        batch = batch.set_column(0, "uid", pa.array([None] * len(batch), pa.uint64()))
    elif change == "type":
        batch = batch.set_column(0, "uid", batch["uid"].cast(pa.float64(), safe=False))
    elif change == "column":
        batch = batch.drop_columns(["crc32"])
    elif change == "twice":
        batch = batch.append_column("uid", batch["uid"])
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        for _ in range(2 if change == "batches" else 1):
            writer.write_batch(batch)
    with pytest.raises(DataError, match=r"index\.arrow is damaged"):
        open_with(root, INDEX, sink.getvalue())


def test_labels_out_of_range_null_or_too_many(root: Path) -> None:
    key = f"{SPLIT}/labels.parquet"
    table = pa.parquet.read_table(root / key)
    rows = table.to_pylist()
    for change, problem in (
        ({"positive": [8]}, "positive holds attribute ids outside 0..7"),
        ({"negative": [None]}, "column negative holds a null"),
        ({"key": None}, "column key holds a null"),
    ):
        other = pa.Table.from_pylist([{**rows[0], **change}, *rows[1:]], schema=LABELS_SCHEMA)
        sink = io.BytesIO()
        pa.parquet.write_table(other, sink)
        with pytest.raises(DataError, match=rf"labels\.parquet.*{problem}"):
            open_with(root, key, sink.getvalue())
    columns = {name: values * 2 for name, values in table.to_pydict().items()}
    with pytest.raises(DataError, match="16 rows where 8 are expected"):
        open_with(root, key, encode_table(columns, LABELS_SCHEMA))


@pytest.mark.parametrize("name", ["../../other.tar", "a/b.tar", ".tar", "", "x\0.tar", "x"])
def test_a_shard_with_a_name_that_is_none(name: str) -> None:
    data = FILES[f"{SPLIT}/shards.parquet"]
    table = pa.parquet.read_table(pa.BufferReader(data))
    sink = io.BytesIO()
    pa.parquet.write_table(table.set_column(0, "shard", pa.array([name, "b.tar"])), sink)
    with pytest.raises(DataError, match="row 0 has name"):
        decode_shards(sink.getvalue())


def test_an_archive_of_feasible_sets_that_unpacks_to_gigabytes_is_not_unpacked() -> None:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("indptr", "indices", "positive_count", "negative_count"):
            with file.open(f"{name}.npy", "w") as member:
                member.write(_npy("<i4", 50_000_000))
                for _ in range(50):
                    member.write(bytes(4_000_000))
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(DataError, match=r"indptr\.npy is compressed, or states 200000128 bytes"):
        FeasibleSets.from_npz(sink.getvalue())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000 and time.monotonic() - started < 5


def _npy(dtype: str, count: int) -> bytes:
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({count},), }}"
    return b"\x93NUMPY\x01\x00v\x00" + head.ljust(117).encode() + b"\n"


def test_an_npy_header_of_a_million_million_numbers_allocates_none() -> None:
    with pytest.raises(DataError, match="a vector of 1000000000000 <f4 in 12 bytes"):
        decode_npy(_npy("<f4", 10**12) + bytes(12), "<f4")
    with pytest.raises(DataError, match="a vector of <i8 in numpy's format where one of <f4"):
        decode_npy(_npy("<i8", 1) + bytes(8), "<f4")
    with pytest.raises(DataError, match="no vector"):
        decode_npy(b"\x93NUMPY\x01\x00v\x00" + b"(" * 118, "<f4")
    values = np.array([1.5, -2], np.float32)
    assert np.array_equal(decode_npy(_npy("<f4", 2) + values.tobytes(), "<f4"), values)


def test_feasible_sets_of_another_vocabulary(root: Path) -> None:
    for labels in ([[1] * 9] * 3, [[1] * 8] * 2):
        sets = FeasibleSets.from_labels(list(range(len(labels))), labels)
        data, manifest = sets.to_npz(), json.loads(seal(FILES))
        manifest["feasible_digest"] = sets.digest
        manifest["files"]["feasible.npz"] = hashlib.sha256(data).hexdigest()
        write(root, {"feasible.npz": data, "dataset.json": json.dumps(manifest).encode()})
        with pytest.raises(DataError, match="the vocabulary has 3 objects and 8 attributes"):
            open_dataset(str(root), cache=root.parent / "cache")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"splits": {"../x": {}}}, "splits"),
        ({"splits": []}, "splits: Input should be an object"),
        ({"name": 3}, "name: Input should be a valid string, got 3"),
        ({"files": {}}, "no digest of vocabulary.json"),
        ({"vocabulary_digest": "x" * 10**6}, "vocabulary_digest"),
        ({"likelihood": {"temperature": "hot"}}, "likelihood.scorer_digest"),
    ],
)
def test_a_manifest_of_another_form(root: Path, change: dict[str, object], problem: str) -> None:
    manifest = {**json.loads(seal(FILES)), **change}
    write(root, {"dataset.json": json.dumps(manifest).encode()})
    with pytest.raises(DataError, match=rf"dataset\.json.*{problem}") as error:
        open_dataset(str(root), cache=root.parent / "cache")
    assert len(str(error.value)) < 1200


def test_a_manifest_nested_too_deeply(root: Path) -> None:
    write(root, {"dataset.json": b"[" * 200_000})
    with pytest.raises(DataError, match="recursion limit exceeded"):
        open_dataset(str(root), cache=root.parent / "cache")


def test_an_absurd_tar_is_no_tar() -> None:
    with pytest.raises(DataError, match="no tar can be read"):
        list_members(b"\xff" * 512)


def test_reasons_of_unusable_crops_that_are_none() -> None:
    for text in ("[", '{"x": "y"}', '{"00ff00ff00ff00ff": 1}'):
        with pytest.raises(DataError, match="list of unusable crops"):
            quarantined_of({"quarantined": text})


def test_a_jpeg_header_that_libjpeg_does_not_know_is_a_reason() -> None:
    """simplejpeg ends with a KeyError where a damaged header leaves no colour space."""
    sink = io.BytesIO()
    Image.new("CMYK", (32, 24)).save(sink, "JPEG")
    data = bytearray(sink.getvalue())
    data[4] ^= 1  # the length of the first segment
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_jpeg(bytes(data))
    with pytest.raises(DataError):
        open_photo(bytes(data), max_pixels=10**6)
