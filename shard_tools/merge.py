"""`vlal merge`: tars and score files to self-contained tars with likelihoods.

Every sample of a scored split gains `KEY.likelihood.npy`: the log of Eq. (2), float32, over its
object's feasible attributes in ascending id. Other splits are copied byte for byte. The unit of
work is a shard; a killed merge continues.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shard_tools.shard_writer import (
    Engine,
    ShardReport,
    TarBuilder,
    commit_derived,
    commit_settings,
    find_report,
    gather_index,
    open_engine,
    open_source,
    open_splits,
    owned_by,
    reopen_dataset,
    report_key,
    run_tasks,
)
from vlal_dist.config.sections import Config
from vlal_dist.data.format.dataset import Dataset, Split, open_dataset, refuse_in_place
from vlal_dist.data.format.sample_reader import SampleReader, parse_meta
from vlal_dist.data.format.scores import ShardScores, read_scores_manifest, read_shard_scores
from vlal_dist.data.format.tar import encode_sample
from vlal_dist.errors import ConflictError, DataError, NotFoundError
from vlal_dist.method.likelihood import log_likelihood
from vlal_dist.pipeline import merge_inputs
from vlal_dist.program import Counts, Program, make_way
from vlal_dist.storage.store import Store, open_store


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
    paths = config.paths
    with open_engine(
        flags,
        workers=config.pack.workers,
        written={"paths.merged": paths.merged},
        read={
            "paths.dataset": f"{paths.dataset}/dataset.json",
            "paths.scores": f"{paths.scores}/scores.json",
        },
    ) as engine:
        return _merge(config, flags, engine)


def _merge(config: Config, flags: Mapping[str, str], engine: Engine) -> Counts:
    paths = config.paths
    dataset = open_dataset(paths.dataset, cache=Path(paths.cache))
    refuse_in_place(
        dataset,
        what="to which merge cannot add likelihoods",
        instead="set data.likelihood scores, which needs no merge",
    )
    scores = read_scores_manifest(
        open_store(paths.scores),
        feasible_digest=dataset.feasible.digest,
        vocabulary_digest=dataset.vocabulary.digest,
    )
    temperature = config.scoring.temperature or float(scores["temperature"])
    target = open_store(paths.merged)
    settings = {"scorer_digest": scores["scorer_digest"], "temperature": temperature}
    splits = open_splits(dataset)
    tasks = [
        MergeTask(
            source=dataset.url,
            cache=os.path.abspath(paths.cache),
            target=target.url,
            scores=open_store(paths.scores).url if name in scores["splits"] else None,
            manifest=scores,
            temperature=temperature,
            split=name,
            shard=shard,
        )
        for name, split in splits.items()
        for shard in range(len(split.shards))
    ]
    state = {**settings, "dataset_digest": dataset.digest}
    make_way(PROGRAM, config, flags)
    if is_outdated(target, state):
        if "retry-rejected" not in flags:
            raise ConflictError(
                f"{target.url} was merged when the dataset {dataset.url} was another one "
                "(pack --retry-rejected changes it); repeat with --retry-rejected to merge the "
                "shards that have changed, or give another paths.merged"
            )
        stale = {name: stale_shards(target, tasks, split) for name, split in splits.items()}
        reopen_dataset(target, stale)
        target.delete("merge.json")
    commit_settings(target, "merge.json", state)
    reports = run_tasks(
        merge_shard,
        tasks,
        label="merge",
        unit="samples",
        sizes=[splits[task.split].shards[task.shard].samples for task in tasks],
        engine=engine,
    )
    by_split = {
        name: gather_index([r for t, r in zip(tasks, reports, strict=True) if t.split == name])
        for name in splits
    }
    counts = commit_derived(
        target,
        dataset,
        by_split,
        block_bytes=config.pack.block_bytes,
        likelihood={
            **settings,
            "splits": list(scores["splits"]),
            "source_digest": dataset.digest,
        },
    )
    return {**counts, "with_likelihood": list(scores["splits"]), "temperature": temperature}


def is_outdated(target: Store, state: Mapping[str, Any]) -> bool:
    """Whether a root was merged from an earlier state of the dataset, with the same scorer.

    Args:
        target: the merged root.
        state: what `merge.json` is to say.
    """
    try:
        present = json.loads(target.read("merge.json"))
    except (NotFoundError, ValueError):
        return False
    if not isinstance(present, dict) or present == state:
        return False
    return {**present, "dataset_digest": state["dataset_digest"]} == state


def stale_shards(target: Store, tasks: Sequence[MergeTask], split: Split) -> list[str]:
    """Shards of a split that a merged root holds, made from another shard than the present one."""
    stale = []
    for task in tasks:
        if task.split != split.name:
            continue
        shard = split.shards[task.shard]
        report = find_report(target, split.name, shard.name)
        if report is not None:
            source = report.sha256 if task.scores is None else report.source
            if source != shard.sha256:
                stale.append(shard.name)
    return stale


def merge_shard(task: MergeTask) -> ShardReport:
    """Merge and commit one shard, unless its report says that it is there already."""
    dataset, split = open_source(task.source, task.cache, task.split)
    target, shard = open_store(task.target), split.shards[task.shard]
    if report := find_report(target, task.split, shard.name):
        return report
    if task.scores is None:
        return _copy_shard(dataset, split, task)
    scores = read_shard_scores(
        open_store(task.scores),
        task.split,
        shard_sha256=shard.sha256,
        manifest=task.manifest,
    )
    rows = split.index.rows_of_shard(task.shard)
    if not np.array_equal(scores.uid, split.index.uid[rows.start : rows.stop]):
        raise DataError(
            f"scores of {split.name}/{shard.name} hold {len(scores.uid)} samples that are not the "
            f"shard's {len(rows)}, in its order; delete that score file and score again"
        )
    with TarBuilder(shard.name) as builder:
        builder.report.source = shard.sha256
        _merge_rows(builder, dataset, SampleReader(split), rows, scores, task.temperature)
        return builder.commit(target, task.split)


def _merge_rows(
    builder: TarBuilder,
    dataset: Dataset,
    reader: SampleReader,
    rows: range,
    scores: ShardScores,
    temperature: float,
) -> None:
    likelihoods = log_likelihood(scores.similarity, scores.indptr, temperature=temperature)
    for place, row in enumerate(rows):
        key, members = reader.read_members(row)
        meta = parse_meta(members["json"])
        values = likelihoods[scores.indptr[place] : scores.indptr[place + 1]]
        expected = len(dataset.feasible.of(int(reader.split.index.object_id[row])))
        if len(values) != expected:
            raise DataError(
                f"sample {key}: {len(values)} similarities, its object has {expected} feasible "
                "attributes; score again with the present dataset"
            )
        sink = io.BytesIO()
        np.lib.format.write_array(sink, values, version=(1, 0), allow_pickle=False)
        members["likelihood.npy"] = sink.getvalue()
        builder.add(int(reader.split.index.uid[row]), encode_sample(key, members), meta)


def _copy_shard(dataset: Dataset, split: Split, task: MergeTask) -> ShardReport:
    """Carry a shard without scores over, bytes unchanged, its report too."""
    target, shard = open_store(task.target), split.shards[task.shard]
    data = dataset.store.read(split.shard_key(task.shard))
    found = hashlib.sha256(data).hexdigest()
    if found != shard.sha256:
        raise DataError(
            f"{dataset.url}/{split.shard_key(task.shard)}: sha256 {found} where {shard.sha256} is "
            "expected; the shard was altered or cut: restore it, or pack again"
        )
    key = report_key(split.name, shard.name)
    report = dataset.store.read(key)
    found_report = ShardReport.decode(report, where=f"{dataset.url}/{key}")
    target.create(split.shard_key(task.shard), data)
    target.create(key, report)
    return found_report


PROGRAM = Program(
    name="merge",
    usage="vlal merge",
    purpose="Write self-contained tars that also hold each crop's log-likelihood (Eq. 2). Reads "
    "paths.dataset and paths.scores, writes paths.merged. Repeat the command after an "
    "interruption: finished shards are kept.",
    sections=("paths", "pack", "scoring", "observability"),
    flags=("engine", "retry-rejected", "replace", "json"),
    output=lambda config, flags: config.paths.merged,
    work=merge,
    inputs=merge_inputs,
    owned=owned_by("merge.json"),
)
