"""A small dataset packed, scored without a model, and merged: seeded similarities, real formats."""

import shutil
from pathlib import Path

import numpy as np

from tests.small import run_all, write_small_vaw
from vlal_dist.data.dataset import Dataset, open_dataset, open_split
from vlal_dist.data.scores import ShardScores, encode_scores, score_key, write_scores_manifest
from vlal_dist.storage.store import open_store

SCORER = "5c" * 32
TEMPERATURE = 0.05


def write_scores(folder: Path, *, splits: tuple[str, ...] = ("train",)) -> Dataset:
    """Score `folder/dataset` into `folder/scores` with similarities drawn from a seed."""
    dataset = open_dataset(str(folder / "dataset"), cache=folder / "cache")
    store = open_store(str(folder / "scores"))
    for name in splits:
        split = open_split(dataset, name)
        for number, shard in enumerate(split.shards):
            rows = np.flatnonzero(split.index.shard == number)
            rng = np.random.default_rng(number)
            sizes = [len(dataset.feasible.of(int(o))) for o in split.index.object_id[rows]]
            indptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
            embedding = rng.normal(size=(len(rows), 8)).astype(np.float32)
            embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
            scores = ShardScores(
                uid=np.array(split.index.uid[rows]),
                embedding=embedding,
                indptr=indptr,
                similarity=rng.normal(0.2, 0.05, int(indptr[-1])).astype(np.float32),
                header={
                    "shard_sha256": shard.sha256,
                    "scorer_digest": SCORER,
                    "feasible_digest": dataset.feasible.digest,
                    "vocabulary_digest": dataset.vocabulary.digest,
                    "temperature": str(TEMPERATURE),
                },
            )
            key = score_key(name, shard_sha256=shard.sha256, scorer_digest=SCORER)
            store.create(key, encode_scores(scores))
    manifest = {
        "dataset_digest": dataset.digest,
        "scorer_digest": SCORER,
        "feasible_digest": dataset.feasible.digest,
        "vocabulary_digest": dataset.vocabulary.digest,
        "temperature": TEMPERATURE,
        "splits": list(splits),
        "settings": {},
    }
    write_scores_manifest(store, manifest)
    return dataset


def write_merged(folder: Path) -> Path:
    """Make `config.yaml`, `dataset`, `scores` and `merged` in a new folder; returns it."""
    config = write_small_vaw(folder)
    run_all(config, ["clean", "pack"])
    write_scores(folder)
    run_all(config, ["merge"])
    return folder


def copy_merged(source: Path, folder: Path) -> Path:
    """Another such folder that may be altered, of the same bytes; returns it."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("cache", "run"))
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(source), str(folder)))
    return folder
