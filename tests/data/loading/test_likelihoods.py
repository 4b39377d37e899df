"""Likelihoods straight from score files: any number of shards, many threads, nothing trusted."""

import json
import os
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlal_dist.data.format.dataset import Split
from vlal_dist.data.format.index import INDEX_TYPES, Blocks, Shard, index_from_columns
from vlal_dist.data.format.scores import ShardScores, decode_scores, encode_scores, score_key
from vlal_dist.data.loading.likelihoods import ScoreLikelihoods
from vlal_dist.errors import DataError, StorageError
from vlal_dist.method.likelihood import log_likelihood
from vlal_dist.storage.local import LocalStore

SCORER, FEASIBLE, VOCABULARY = "5c" * 32, "fe" * 32, "70" * 32
MANIFEST = {
    "scorer_digest": SCORER,
    "feasible_digest": FEASIBLE,
    "vocabulary_digest": VOCABULARY,
    "splits": {"train": {"samples": 5, "shards": 1}},
}
TEMPERATURE = 0.03
DIM = 64


class RemoteStore(LocalStore):
    """A folder that pretends to be a bucket, and counts what is read from it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[str] = []
        self.bytes = 0
        self.blocked: dict[str, threading.Event] = {}

    def local_path(self, key: str) -> Path | None:
        return None

    def read(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        if key in self.blocked:
            assert self.blocked[key].wait(60)
        data = super().read(key, offset=offset, length=length)
        self.reads.append(key)
        self.bytes += len(data)
        return data


def digest_of(shard: int) -> str:
    return f"{shard:016x}" * 4


def key_of(shard: int) -> str:
    return score_key("train", shard_sha256=digest_of(shard), scorer_digest=SCORER)


def make_split(shards: int, rows: int) -> Split:
    count = shards * rows
    columns: dict[str, Any] = {name: np.zeros(count) for name in INDEX_TYPES}
    columns["uid"] = np.random.default_rng(1).permutation(count) + 5
    columns["shard"] = np.repeat(np.arange(shards), rows)
    none = np.zeros(0, np.uint64)
    listed = [Shard(f"train-{n:06d}.tar", 1, digest_of(n), rows) for n in range(shards)]
    index = index_from_columns(columns)
    return Split(
        "train", LocalStore(Path(".")), listed, index, Blocks(none, none, none, none, none)
    )


def make_scores(split: Split, shard: int, *, mean_row: int = 12) -> ShardScores:
    rng = np.random.default_rng(shard)
    rows = np.flatnonzero(split.index.shard == shard)
    indptr = np.concatenate([[0], np.cumsum(rng.integers(0, 2 * mean_row, len(rows)))])
    header = {
        "shard_sha256": digest_of(shard),
        "scorer_digest": SCORER,
        "feasible_digest": FEASIBLE,
        "vocabulary_digest": VOCABULARY,
        "temperature": "0.01",
    }
    return ShardScores(
        uid=split.index.uid[rows],
        embedding=rng.normal(size=(len(rows), DIM)).astype(np.float32),
        indptr=indptr.astype(np.int64),
        similarity=rng.normal(0.2, 0.05, int(indptr[-1])).astype(np.float32),
        header=header,
    )


def write_all(folder: Path, split: Split, **options: int) -> list[ShardScores]:
    found = [make_scores(split, n, **options) for n in range(len(split.shards))]
    for number, scores in enumerate(found):
        LocalStore(folder).create(key_of(number), encode_scores(scores))
    return found


def reading(split: Split, store: LocalStore, cache: Path) -> ScoreLikelihoods:
    return ScoreLikelihoods(
        split, scores=store, manifest=MANIFEST, temperature=TEMPERATURE, cache=cache
    )


def expected_rows(scores: list[ShardScores]) -> list[bytes]:
    """Bytes of each row's likelihoods, as merge works them out: a whole shard at a time."""
    found = []
    for one in scores:
        values = log_likelihood(one.similarity, one.indptr, temperature=TEMPERATURE)
        found += [part.tobytes() for part in np.split(values, one.indptr[1:-1])]
    return found


def rows_of(read: ScoreLikelihoods, rows: list[int]) -> list[bytes]:
    values, indptr = read(np.array(rows, dtype=np.int64), [b""] * len(rows))
    assert values.dtype == np.float32 and indptr.dtype == np.int64
    assert indptr[0] == 0 and indptr[-1] == len(values) and len(indptr) == len(rows) + 1
    return [part.tobytes() for part in np.split(values, indptr[1:-1])] if rows else []


@pytest.mark.parametrize("remote", [False, True])
def test_batches_over_hundreds_of_shards_hold_the_bits_of_merge(
    tmp_path: Path, remote: bool
) -> None:
    split = make_split(300, 7)
    expected = expected_rows(write_all(tmp_path / "scores", split))
    store = (RemoteStore if remote else LocalStore)(tmp_path / "scores")
    read = reading(split, store, tmp_path / "cache")
    open_before = len(os.listdir("/proc/self/fd"))
    order = np.random.default_rng(0).permutation(split.num_samples)
    for batch in (rows.tolist() for rows in np.array_split(order, 13)):
        assert rows_of(read, batch) == [expected[row] for row in batch]
    # Fewer: what earlier tests left to the garbage collector may be closed meanwhile.
    assert len(os.listdir("/proc/self/fd")) <= open_before
    assert rows_of(read, []) == []


def test_memory_does_not_grow_with_the_shards(tmp_path: Path) -> None:
    split = make_split(20, 40)
    shard_bytes = (
        4
        * sum(len(one.similarity) for one in write_all(tmp_path, split, mean_row=2000))
        / len(split.shards)
    )
    read = reading(split, LocalStore(tmp_path), tmp_path / "cache")
    rows_of(read, [0])
    tracemalloc.start()
    for row in range(0, split.num_samples, 40):
        rows_of(read, [row])
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < shard_bytes / 2


def test_a_remote_file_is_copied_once_without_its_embeddings(tmp_path: Path) -> None:
    split = make_split(3, 2000)
    expected = expected_rows(write_all(tmp_path / "scores", split))
    store = RemoteStore(tmp_path / "scores")
    read = reading(split, store, tmp_path / "cache")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: rows_of(read, [row])[0], range(0, 6000, 5)))
    assert found == expected[::5]
    whole = sum(path.stat().st_size for path in (tmp_path / "scores/train").iterdir())
    heads = 3 * (1 << 16)
    assert store.bytes < whole - 6000 * DIM * 4 + heads
    assert len(store.reads) == 3 * 4  # head, uid, indptr, similarity
    again = RemoteStore(tmp_path / "scores")
    assert rows_of(reading(split, again, tmp_path / "cache"), [7, 5999]) == [
        expected[7],
        expected[5999],
    ]
    assert again.reads == []


def test_a_slow_file_delays_no_other_file(tmp_path: Path) -> None:
    split = make_split(2, 4)
    expected = expected_rows(write_all(tmp_path / "scores", split))
    store = RemoteStore(tmp_path / "scores")
    store.blocked[key_of(0)] = threading.Event()
    read = reading(split, store, tmp_path / "cache")
    with ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(rows_of, read, [row]) for row in (0, 1)]
        try:
            assert pool.submit(rows_of, read, [5]).result(timeout=60) == [expected[5]]
            assert not any(one.done() for one in slow)
        finally:
            store.blocked[key_of(0)].set()
        assert [one.result(timeout=60) for one in slow] == [[expected[0]], [expected[1]]]
    assert store.reads.count(key_of(0)) == 4


def header_changed(data: bytes, **changes: str) -> bytes:
    scores = decode_scores(data, where="test")
    changed = ShardScores(
        scores.uid, scores.embedding, scores.indptr, scores.similarity, {**scores.header, **changes}
    )
    return encode_scores(changed)


def with_layout(data: bytes, name: str, field: str, value: object) -> bytes:
    """The file with an altered entry of its safetensors header, of the same length as before."""
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    entries[name][field] = value
    text = json.dumps(entries, separators=(",", ":")).encode()
    assert len(text) <= size
    return data[:8] + text.ljust(size) + data[8 + size :]


def other_samples(data: bytes) -> bytes:
    scores = decode_scores(data, where="test")
    return encode_scores(ShardScores(**{**vars(scores), "uid": scores.uid[::-1].copy()}))


def falling(data: bytes) -> bytes:
    scores = decode_scores(data, where="test")
    indptr = scores.indptr.copy()
    indptr[1] = indptr[-1] + 1
    return encode_scores(ShardScores(**{**vars(scores), "indptr": indptr}))


DAMAGES: dict[str, tuple[Any, str]] = {
    "cut": (lambda data: data[:-100], "bytes where"),
    "cut to a page": (lambda data: data[:4096], "bytes where"),
    "cut in the header": (lambda data: data[:100], "header cannot be read"),
    "empty": (lambda data: b"", "header cannot be read"),
    "longer": (lambda data: data + b"\0", "bytes where"),
    "noise": (lambda data: os.urandom(len(data)), "header cannot be read"),
    "list for a header": (
        lambda data: (2).to_bytes(8, "little") + b"[]" + data[10:],
        "header cannot be read",
    ),
    "other shape": (lambda data: with_layout(data, "similarity", "shape", [9]), "in .* bytes"),
    "other type": (lambda data: with_layout(data, "uid", "dtype", "I64"), "do not fit together"),
    "other shard": (lambda data: header_changed(data, shard_sha256="0" * 64), "shard_sha256"),
    "other scorer": (lambda data: header_changed(data, scorer_digest="0" * 64), "scorer_digest"),
    "other feasible": (lambda data: header_changed(data, feasible_digest="0"), "feasible_digest"),
    "other samples": (other_samples, "score again"),
    "falling indptr": (falling, "does not rise"),
}  # fmt: skip


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_by_name_and_a_sound_one_taken_after_it(
    tmp_path: Path, damage: str, remote: bool
) -> None:
    split = make_split(2, 100)
    expected = expected_rows(write_all(tmp_path / "scores", split))
    path = tmp_path / "scores" / key_of(1)
    sound = path.read_bytes()
    change, message = DAMAGES[damage]
    path.chmod(0o644)
    path.write_bytes(change(sound))
    store = (RemoteStore if remote else LocalStore)(tmp_path / "scores")
    read = reading(split, store, tmp_path / "cache")
    assert rows_of(read, [3]) == [expected[3]]
    with pytest.raises(DataError, match=message) as error:
        read(np.array([100]), [b""])
    assert key_of(1) in str(error.value)
    path.write_bytes(sound)
    assert rows_of(read, [100]) == [expected[100]]


@pytest.mark.parametrize("remote", [False, True])
def test_an_absent_file_says_what_to_run(tmp_path: Path, remote: bool) -> None:
    split = make_split(2, 3)
    write_all(tmp_path, split)
    (tmp_path / key_of(1)).unlink()
    store = (RemoteStore if remote else LocalStore)(tmp_path)
    with pytest.raises(DataError, match="run vlal score for split train") as error:
        reading(split, store, tmp_path / "cache")(np.array([0, 4]), [b"", b""])
    assert key_of(1) in str(error.value)


def test_an_altered_copy_is_refused_and_fetched_again(tmp_path: Path) -> None:
    split = make_split(1, 50)
    expected = expected_rows(write_all(tmp_path / "scores", split))
    store = RemoteStore(tmp_path / "scores")
    rows_of(reading(split, store, tmp_path / "cache"), [0])
    (copy,) = (tmp_path / "cache/scores").iterdir()
    copy.write_bytes(copy.read_bytes()[:-8])
    with pytest.raises(DataError, match="bytes where"):
        rows_of(reading(split, store, tmp_path / "cache"), [0])
    assert rows_of(reading(split, store, tmp_path / "cache"), [0]) == [expected[0]]


def test_a_copy_that_cannot_be_written_is_an_error_of_storage(tmp_path: Path) -> None:
    split = make_split(1, 5)
    write_all(tmp_path / "scores", split)
    (tmp_path / "cache").write_text("a file where a folder should be")
    read = reading(split, RemoteStore(tmp_path / "scores"), tmp_path / "cache")
    with pytest.raises(StorageError, match="cache"):
        rows_of(read, [0])
