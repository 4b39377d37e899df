"""What is left to score under a score root, and whether that root may be used at all."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlal_dist.data.dataset import Dataset, open_split
from vlal_dist.data.score_files import open_scores
from vlal_dist.data.scores import finished_manifest, quarantined_of, score_key
from vlal_dist.errors import ConfigError, ConflictError, NotFoundError
from vlal_dist.scoring.embed import shard_rows
from vlal_dist.scoring.prompts import build_prompts
from vlal_dist.storage.store import Store

Task = tuple[str, int]
"""Split name and position of a shard in it."""


@dataclass(frozen=True)
class Plan:
    """What there is to score.

    Attributes:
        pending: shards without a score file, in order, with their samples.
        present: shards that have one, in order.
        pending_bytes: size of the tars without.
        samples: samples of all shards.
        pairs: feasible (object, attribute) pairs.
        prompts: different prompts.
    """

    pending: dict[Task, int]
    present: list[Task]
    pending_bytes: int
    samples: int
    pairs: int
    prompts: int


def make_plan(
    dataset: Dataset,
    store: Store,
    splits: Sequence[str],
    templates: Sequence[str],
    *,
    scorer_digest: str,
) -> Plan:
    """Compare the shards of `splits` with the score files of `store`; one listing per split.

    Raises:
        DataError: a split that the dataset lacks.
        ConfigError: a template that cannot be filled.
    """
    prompts = build_prompts(dataset.vocabulary, dataset.feasible, templates=templates)
    pending: dict[Task, int] = {}
    present: list[Task] = []
    samples = pending_bytes = 0
    for name in splits:
        keys = set(store.list_keys(f"{name}/"))
        split = open_split(dataset, name)
        samples += split.num_samples
        for position, shard in enumerate(split.shards):
            key = score_key(name, shard_sha256=shard.sha256, scorer_digest=scorer_digest)
            if key in keys:
                present.append((name, position))
            else:
                pending[name, position] = shard.samples
                pending_bytes += shard.bytes
    return Plan(pending, present, pending_bytes, samples, len(prompts.position), len(prompts.text))


def check_not_taken(store: Store, wanted: Mapping[str, object], splits: Sequence[str]) -> bool:
    """Whether `scores.json` is there already and says the same.

    Args:
        store: score root.
        wanted: digests and temperature of this run, by their names in `scores.json`.
        splits: splits of this run.

    Raises:
        ConflictError: it belongs to another dataset, scorer or temperature, or lacks a split.
    """
    try:
        present = json.loads(store.read("scores.json"))
    except NotFoundError:
        return False
    for name, value in wanted.items():
        if present.get(name) != value:
            raise ConflictError(
                f"{store.url}/scores.json has {name} {present.get(name)}, this run has {value}; "
                "give another paths.scores"
            )
    missing = [split for split in splits if split not in present["splits"]]
    if missing:
        raise ConflictError(
            f"{store.url} was finished for {', '.join(present['splits'])} and lacks "
            f"{', '.join(missing)}; delete its scores.json (score files are kept and skipped) and "
            "score all splits in one command"
        )
    return True


def read_embeddings_manifest(store: Store, *, embedder_digest: str) -> dict[str, Any]:
    """`scores.json` of the root whose embeddings are to be used again.

    Args:
        store: that score root.
        embedder_digest: of this run's model, preprocessing and precision.

    Raises:
        DataError: it is not finished.
        ConfigError: its embeddings are another model's.
    """
    manifest = finished_manifest(store)
    found = manifest.get("embedder_digest")
    if found != embedder_digest:
        raise ConfigError(
            f"scoring.embeddings {store.url} has embedder_digest {found}, this run has "
            f"{embedder_digest}: another model, weights, preprocessing or precision; give those it "
            "was scored with, or score the images again"
        )
    return manifest


def forget_quarantined(
    dataset: Dataset, store: Store, plan: Plan, *, header: Mapping[str, Any], cache: Path
) -> Plan:
    """Delete the score files that list unusable crops, and `scores.json` if there is one.

    Args:
        dataset: the opened dataset.
        store: score root.
        plan: what is present.
        header: expected digests.
        cache: local folder for copies of remote score files.

    Returns:
        The plan with their shards pending again.

    Raises:
        DataError: a score file is damaged.
    """
    doomed: dict[str, Task] = {}
    digest = str(header["scorer_digest"])
    for name, position in plan.present:
        split = open_split(dataset, name)
        rows, sha256 = shard_rows(split, position), split.shards[position].sha256
        uid = split.index.uid[rows.start : rows.stop]
        scores = open_scores(
            store, name, shard_sha256=sha256, uid=uid, manifest=header, cache=cache
        )
        if quarantined_of(scores.header):
            doomed[score_key(name, shard_sha256=sha256, scorer_digest=digest)] = (name, position)
    for key in ["scores.json", *doomed] if doomed else []:
        store.delete(key)
    shards = {task: open_split(dataset, task[0]).shards[task[1]] for task in doomed.values()}
    return replace(
        plan,
        pending=plan.pending | {task: shard.samples for task, shard in shards.items()},
        present=[task for task in plan.present if task not in shards],
        pending_bytes=plan.pending_bytes + sum(shard.bytes for shard in shards.values()),
    )
