"""What is left to score under a score root, and whether that root may be used at all."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlal_dist.data.dataset import Dataset, open_split
from vlal_dist.data.scores import score_key
from vlal_dist.errors import ConflictError, NotFoundError
from vlal_dist.scoring.prompts import build_prompts
from vlal_dist.storage.store import Store

Task = tuple[str, int]
"""Split name and position of a shard in it."""


@dataclass(frozen=True)
class Plan:
    """What there is to score.

    Attributes:
        pending: shards without a score file, in order, with their samples.
        done: number of shards that have one.
        samples: samples of all shards.
        pairs: feasible (object, attribute) pairs.
        prompts: different prompts.
    """

    pending: dict[Task, int]
    done: int
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
    done = samples = 0
    for name in splits:
        present = set(store.list_keys(f"{name}/"))
        split = open_split(dataset, name)
        samples += split.num_samples
        for position, shard in enumerate(split.shards):
            key = score_key(name, shard_sha256=shard.sha256, scorer_digest=scorer_digest)
            if key in present:
                done += 1
            else:
                pending[name, position] = shard.samples
    return Plan(pending, done, samples, len(prompts.position), len(prompts.text))


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
