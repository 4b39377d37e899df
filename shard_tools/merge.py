"""`python -m shard_tools merge`: tars and score files to self-contained tars with likelihoods.

Every sample of a scored split gains `KEY.likelihood.npy`: the log of Eq. (2), float32, over its
object's feasible attributes in ascending id. Other splits are copied byte for byte. The unit of
work is a shard; a killed merge continues.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet

from shard_tools.shard_writer import (
    SampleLabels,
    ShardPart,
    TarBuilder,
    check_uids,
    commit_dataset,
    commit_shard,
    commit_split,
    part_key,
    run_tasks,
)
from vlal_dist.config.sections import Config
from vlal_dist.data.format.dataset import (
    Dataset,
    Split,
    check_shard_sizes,
    open_dataset,
    open_split,
)
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.data.format.scores import ShardScores, read_scores_manifest, read_shard_scores
from vlal_dist.data.format.tar import encode_sample
from vlal_dist.errors import DataError
from vlal_dist.method.likelihood import log_likelihood
from vlal_dist.program import Counts, Program
from vlal_dist.storage.store import open_store


@dataclass(frozen=True)
class MergeTask:
    """One shard to merge; `scores` is None where the split has none and is copied."""

    source: str
    cache: str
    target: str
    scores: str | None
    manifest: dict[str, Any]
    temperature: float
    split: str
    shard: int


def merge(config: Config, flags: Mapping[str, str]) -> Counts:
    """Merge the score root into a copy of the dataset root."""
    cache = Path(config.paths.cache)
    dataset = open_dataset(config.paths.dataset, cache=cache)
    scores = read_scores_manifest(
        open_store(config.paths.scores),
        feasible_digest=dataset.feasible.digest,
        vocabulary_digest=dataset.vocabulary.digest,
    )
    temperature = config.scoring.temperature or float(scores["temperature"])
    target = open_store(config.paths.merged)
    settings = {
        "dataset_digest": dataset.digest,
        "scorer_digest": scores["scorer_digest"],
        "temperature": temperature,
    }
    # Committed first: a rerun with other scores must not continue this one's shards.
    target.create("merge.json", (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
    splits = {name: open_split(dataset, name) for name in dataset.splits}
    tasks = [
        MergeTask(
            source=config.paths.dataset,
            cache=str(cache),
            target=config.paths.merged,
            scores=config.paths.scores if name in scores["splits"] else None,
            manifest=scores,
            temperature=temperature,
            split=name,
            shard=shard,
        )
        for name, split in splits.items()
        for shard in range(len(split.shards))
    ]
    for split in splits.values():
        check_shard_sizes(split)
    found = run_tasks(
        merge_shard,
        tasks,
        label="merge",
        unit="samples",
        sizes=[splits[task.split].shards[task.shard].samples for task in tasks],
        workers=config.pack.workers,
    )
    parts: dict[str, list[ShardPart]] = {name: [] for name in splits}
    for task, part in zip(tasks, found, strict=True):
        parts[task.split].append(part)
    return _commit(dataset, config, parts, scores, temperature)


def merge_shard(task: MergeTask) -> ShardPart:
    """Merge and commit one shard, unless its part file says that it is there already."""
    dataset, split = _open(task.source, task.cache, task.split)
    target, name = open_store(task.target), split.shards[task.shard].name
    key = part_key(task.split, name)
    if target.exists(key):
        return ShardPart.decode(target.read(key))
    if task.scores is None:
        return _copy_shard(dataset, task, name)
    scores = read_shard_scores(
        open_store(task.scores),
        task.split,
        shard_sha256=split.shards[task.shard].sha256,
        manifest=task.manifest,
    )
    first, last = np.searchsorted(split.index.shard, [task.shard, task.shard + 1]).tolist()
    rows = np.arange(first, last)
    _check_alignment(split, rows, scores, name)
    ragged = log_likelihood(scores.similarity, scores.indptr, temperature=task.temperature)
    with TarBuilder(name) as builder:
        _merge_rows(builder, dataset, split, rows, scores.indptr, ragged)
        return commit_shard(target, task.split, builder)


@lru_cache(maxsize=1)
def _open(source: str, cache: str, split: str) -> tuple[Dataset, Split]:
    # Kept per process: the tasks of a split follow each other.
    dataset = open_dataset(source, cache=Path(cache))
    return dataset, open_split(dataset, split)


def _merge_rows(
    builder: TarBuilder,
    dataset: Dataset,
    split: Split,
    rows: npt.NDArray[np.int64],
    indptr: npt.NDArray[np.int64],
    ragged: npt.NDArray[np.float32],
) -> None:
    reader = SampleReader(split)
    for place, row in enumerate(rows.tolist()):
        key, members = reader.read_members(row)
        meta = json.loads(members["json"])
        values = ragged[indptr[place] : indptr[place + 1]]
        expected = len(dataset.feasible.of(meta["object_id"]))
        if len(values) != expected:
            raise DataError(
                f"sample {key}: {len(values)} similarities, its object has {expected} feasible "
                "attributes; score again with the present dataset"
            )
        sink = io.BytesIO()
        np.lib.format.write_array(sink, values, version=(1, 0), allow_pickle=False)
        members["likelihood.npy"] = sink.getvalue()
        labels = SampleLabels(key, meta["instance_id"], meta["positive"], meta["negative"])
        uid = int(split.index.uid[row])
        builder.add(uid, meta["object_id"], encode_sample(key, members), labels)


def _check_alignment(
    split: Split, rows: npt.NDArray[np.int64], scores: ShardScores, name: str
) -> None:
    if not np.array_equal(scores.uid, split.index.uid[rows]):
        raise DataError(
            f"scores of {split.name}/{name} hold {len(scores.uid)} samples that are not the "
            f"shard's {len(rows)}, in its order; delete that score file and score again"
        )


def _copy_shard(dataset: Dataset, task: MergeTask, name: str) -> ShardPart:
    """Carry a shard without scores over, bytes unchanged, its part file too."""
    target = open_store(task.target)
    tar = f"{task.split}/shards/{name}"
    part = dataset.store.read(part_key(task.split, name))
    data = dataset.store.read(tar)
    stated = ShardPart.decode(part)
    found = hashlib.sha256(data).hexdigest()
    if found != stated.sha256:
        raise DataError(
            f"{dataset.url}/{tar}: sha256 {found} where {stated.sha256} is expected; the shard "
            "was altered or cut: restore it, or pack again"
        )
    target.create(tar, data)
    target.create(part_key(task.split, name), part)
    return stated


def _commit(
    dataset: Dataset,
    config: Config,
    parts: Mapping[str, list[ShardPart]],
    scores: Mapping[str, Any],
    temperature: float,
) -> Counts:
    target = open_store(config.paths.merged)
    for name in ("vocabulary.json", "feasible.npz"):
        target.create(name, dataset.store.read(name))
    manifest = {key: value for key, value in dataset.manifest.items() if key != "format"}
    manifest["likelihood"] = {
        "scorer_digest": scores["scorer_digest"],
        "temperature": temperature,
        "splits": list(scores["splits"]),
        "source_digest": dataset.digest,
    }
    manifest["splits"], indexes = {}, {}
    for split, split_parts in parts.items():
        manifest["splits"][split], indexes[split] = commit_split(
            target,
            split,
            split_parts,
            block_bytes=config.pack.block_bytes,
            rejects=_rejects(dataset, split),
        )
    check_uids(indexes)
    digest = commit_dataset(target, manifest)
    entries = manifest["splits"].values()
    return {
        "samples": {split: entry["samples"] for split, entry in manifest["splits"].items()},
        "with_likelihood": list(scores["splits"]),
        "temperature": temperature,
        "shards": sum(entry["shards"] for entry in entries),
        "bytes": sum(entry["bytes"] for entry in entries),
        "dataset": digest[:16],
    }


def _rejects(dataset: Dataset, split: str) -> list[dict[str, str]]:
    """What pack rejected: merging carries it over."""
    data = dataset.store.read(f"{split}/rejects.parquet")
    rows: list[dict[str, str]] = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    return rows


PROGRAM = Program(
    name="merge",
    usage="python -m shard_tools merge",
    purpose="Write self-contained tars that also hold each crop's log-likelihood (Eq. 2). Reads "
    "paths.dataset and paths.scores, writes paths.merged. Repeat the command after an "
    "interruption: finished shards are kept.",
    sections=("paths", "pack", "scoring", "observability"),
    flags=("json",),
    output=lambda config, flags: config.paths.merged,
    work=merge,
)
