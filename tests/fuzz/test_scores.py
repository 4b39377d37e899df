"""Score files and scores.json: mutated as a whole, and as arrays under a header that fits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from tests.fuzz.mutations import (
    VALUES,
    byte_ops,
    explore,
    mutate_bytes,
    mutate_json,
    numbers,
    obeys,
    pick,
    tree_ops,
)
from vlal_dist.data.format.scores import (
    LARGEST,
    ShardScores,
    encode_scores,
    open_scores,
    quarantined_of,
    read_scores_manifest,
    read_shard_scores,
    score_key,
)
from vlal_dist.errors import DataError
from vlal_dist.method.likelihood import log_likelihood
from vlal_dist.storage.store import Store, open_store

DIGESTS = {"scorer_digest": "5c" * 32, "feasible_digest": "fe" * 32, "vocabulary_digest": "0c" * 32}
SHARD = "ab" * 32
MANIFEST = {
    "format": 1, **DIGESTS, "dataset_digest": "da" * 32, "temperature": 0.05, "splits": ["test"],
    "settings": {"batch_size": 4}, "quarantined": {},
}  # fmt: skip
SCORES = ShardScores(
    uid=np.arange(4, dtype=np.uint64) + 2**63,
    embedding=np.eye(4, 3, dtype=np.float32),
    indptr=np.array([0, 2, 5, 5, 8]),
    similarity=np.linspace(-0.2, 0.4, 8, dtype=np.float32),
    header={
        **DIGESTS, "shard_sha256": SHARD, "temperature": "0.05",
        "quarantined": '{"00ff00ff00ff00ff": "no jpg"}',
    },
)  # fmt: skip
KEY = score_key("test", shard_sha256=SHARD, scorer_digest=DIGESTS["scorer_digest"])
FILES = {KEY: encode_scores(SCORES), "scores.json": json.dumps(MANIFEST).encode()}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = open_store(str(tmp_path))
    for key, data in FILES.items():
        found.replace(key, data)
    return found


def use(store: Store) -> ShardScores:
    """Read the root as merge and training do; what is given out lies in its range."""
    manifest = read_scores_manifest(
        store,
        feasible_digest=DIGESTS["feasible_digest"],
        vocabulary_digest=DIGESTS["vocabulary_digest"],
    )
    assert 0 < manifest["temperature"] < float("inf")
    cache = Path(store.url) / "cache"
    mapped = open_scores(
        store, "test", shard_sha256=SHARD, uid=SCORES.uid, manifest=manifest, cache=cache
    )
    for place in range(4):
        row = mapped.row(place)
        log_likelihood(row, np.array([0, len(row)]), temperature=manifest["temperature"])
    scores = read_shard_scores(store, "test", shard_sha256=SHARD, manifest=manifest)
    assert np.abs(scores.similarity).max(initial=0) <= LARGEST
    assert len(scores.uid) == len(scores.embedding) == len(scores.indptr) - 1
    assert all(isinstance(why, str) for why in quarantined_of(scores.header).values())
    return scores


def changed(store: Store, key: str, data: bytes) -> Any:
    Path(store.url, key).write_bytes(data)
    try:
        return obeys(lambda: use(store))
    finally:
        Path(store.url, key).write_bytes(FILES[key])


def test_bytes(store: Store, times: int) -> None:
    def check(key: str, ops: Any) -> None:
        changed(store, key, mutate_bytes(FILES[key], ops))

    explore("score root, bytes", check, pick(list(FILES)), byte_ops, examples=250, times=times)


def test_manifest(store: Store, times: int) -> None:
    def check(ops: Any) -> None:
        changed(store, "scores.json", mutate_json(FILES["scores.json"], ops))

    explore("scores.json", check, tree_ops, examples=120, times=times)


def test_head(store: Store, times: int) -> None:
    """The JSON that safetensors files begin with, of any length."""
    data = FILES[KEY]
    start = 8 + int.from_bytes(data[:8], "little")

    def check(ops: Any, inner: bool) -> None:
        head = data[8:start]
        if inner:
            tree = json.loads(head)
            old = tree["__metadata__"]["header"].encode()
            tree["__metadata__"]["header"] = mutate_json(old, ops).decode(errors="replace")
            head = json.dumps(tree).encode()
        else:
            head = mutate_json(head, ops)
        changed(store, KEY, len(head).to_bytes(8, "little") + head + data[start:])

    explore("score header", check, tree_ops, st.booleans(), examples=250, times=times)


def test_numbers(store: Store, times: int) -> None:
    floats = st.sampled_from([one for one in VALUES if isinstance(one, float)])

    def check(name: str, place: int, number: int, value: float) -> None:
        arrays = {
            field: np.array(array) for field, array in vars(SCORES).items() if field != "header"
        }
        flat = arrays[name].reshape(-1)
        whole = flat.dtype.kind in "iu"
        with np.errstate(over="ignore"):
            flat[place % len(flat)] = number % 2**63 if whole else np.float32(value)
        changed(store, KEY, encode_scores(ShardScores(header=SCORES.header, **arrays)))

    names = pick(["uid", "embedding", "indptr", "similarity"])
    drawn = names, st.integers(0, 20), numbers, floats
    explore("score numbers", check, *drawn, examples=120, times=times)


def test_nan_is_refused(store: Store) -> None:
    arrays = {**vars(SCORES), "similarity": np.full(8, np.nan, np.float32)}
    Path(store.url, KEY).write_bytes(encode_scores(ShardScores(**arrays)))
    with pytest.raises(DataError, match="similarity lies outside"):
        read_shard_scores(store, "test", shard_sha256=SHARD, manifest=MANIFEST)
