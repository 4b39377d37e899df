"""`python -m shard_tools inspect`: what a dataset holds, in numbers, without opening an image.

With `--order` what a run's steps train on; see `inspect_order`.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from shard_tools.inspect_order import inspect_order
from vlal_dist.config.config import Config
from vlal_dist.data.dataset import Dataset, open_dataset, open_split, read_labels
from vlal_dist.program import Counts, Program
from vlal_dist.storage.store import open_store


def inspect(config: Config, flags: Mapping[str, str]) -> Counts:
    """Print facts of paths.merged where it exists, else of paths.dataset; or the asked order."""
    if "order" in flags:
        return inspect_order(config, flags["order"])
    url = config.paths.merged
    if not open_store(url).exists("dataset.json"):
        url = config.paths.dataset
    dataset = open_dataset(url, cache=Path(config.paths.cache))
    lines = [f"dataset {dataset.name} at {url}", f"digest {dataset.digest}"]
    lines += _vocabulary_lines(dataset)
    for split in dataset.splits:
        lines += _split_lines(dataset, split)
    likelihood = dataset.manifest["likelihood"]
    lines.append(
        "likelihood: none; run score_clip and merge"
        if likelihood is None
        else f"likelihood: splits {', '.join(likelihood['splits'])}, temperature "
        f"{likelihood['temperature']:.6g}, scorer {likelihood['scorer_digest'][:16]}"
    )
    sys.stdout.write("\n".join(lines) + "\n")
    samples = {name: entry["samples"] for name, entry in dataset.manifest["splits"].items()}
    return {"samples": samples, "dataset": dataset.digest[:16]}


def _vocabulary_lines(dataset: Dataset) -> list[str]:
    vocabulary = dataset.vocabulary
    sizes = np.diff(dataset.feasible.indptr)
    groups = ", ".join(f"{name} {len(ids)}" for name, ids in vocabulary.groups().items())
    return [
        f"objects {len(vocabulary.objects)}, attributes {len(vocabulary.attributes)}",
        f"attribute groups: {groups}",
        f"feasible attributes per object: mean {sizes.mean():.1f}, median {np.median(sizes):.0f}, "
        f"most {sizes.max()}, objects without any {int((sizes == 0).sum())}",
    ]


def _split_lines(dataset: Dataset, name: str) -> list[str]:
    split, entry = open_split(dataset, name), dataset.manifest["splits"][name]
    labels = read_labels(dataset, name)
    count = max(split.num_samples, 1)
    positive = pc.sum(pc.list_value_length(labels["positive"])).as_py() or 0
    negative = pc.sum(pc.list_value_length(labels["negative"])).as_py() or 0
    feasible = np.diff(dataset.feasible.indptr)[split.index.object_id]
    width = len(dataset.vocabulary.attributes)
    unannotated = 1 - (positive + negative) / count / max(width, 1)
    return [
        f"{name}: {split.num_samples} samples in {entry['shards']} shards and "
        f"{len(split.blocks)} blocks, {entry['bytes'] / 1e6:.1f} MB, {entry['rejected']} rejected",
        f"  per sample: {positive / count:.2f} positive, {negative / count:.2f} negative, "
        f"{100 * unannotated:.1f} % unannotated, {feasible.mean() if len(feasible) else 0:.1f} "
        "feasible attributes",
    ]


PROGRAM = Program(
    name="inspect",
    usage="python -m shard_tools inspect",
    purpose="Print what a dataset holds: vocabulary, groups, feasible sets, label density, sizes. "
    "Reads paths.merged if it is finished, else paths.dataset; opens no image. With --order: print "
    "the samples of a run's steps, one a line, from the settings that training reads; what was "
    "quarantined is printed too, and every epoch begins at its first sample.",
    sections=("paths", "data", "training", "observability"),
    flags=("order", "json"),
    output=lambda config, flags: config.paths.run,
    work=inspect,
)
