"""`vlal inspect`: print what a dataset holds, or the order of training.

The order comes from the functions and settings that training uses. Manifests, indexes and labels
are read, no image.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from vlal_dist.config.sections import Config
from vlal_dist.data.format.dataset import Dataset, open_newest, open_split, read_labels
from vlal_dist.data.format.label_figures import label_figures
from vlal_dist.data.hashing import I64, uid_to_hex
from vlal_dist.data.order.epoch_plan import EpochPlan
from vlal_dist.data.order.mixture import Mixture, open_mixture
from vlal_dist.data.order.rank_split import choose_micro_batches, epoch_samples, plan_step
from vlal_dist.data.order.shuffle import Shuffle, choose_lanes
from vlal_dist.errors import UsageError
from vlal_dist.method.feasible import largest_num_ignore
from vlal_dist.program import Counts, Program, only_reads

COLUMNS = (
    "step", "rank", "micro_batch", "position", "visit", "dataset", "shard", "row", "uid", "key",
    "object",
)  # fmt: skip


@dataclass(frozen=True)
class StepSelection:
    """The steps to print, from the flags of the same names.

    Attributes:
        epoch: 0-based.
        step: the first step, 0-based within the epoch.
        steps: how many; fewer where the epoch ends.
        ranks: how many ranks share a step.
        rank: the rank whose samples are printed; None: all.
        first_ranks: ranks of the run's first start, which fixed lanes and micro-batches; None:
            `ranks`.
    """

    epoch: int = 0
    step: int = 0
    steps: int = 1
    ranks: int = 1
    rank: int | None = None
    first_ranks: int | None = None


SELECTION_FLAGS = tuple(field.name.replace("_", "-") for field in fields(StepSelection))


def inspect(config: Config, flags: Mapping[str, str]) -> Counts:
    """Print facts of paths.merged where it exists, else of paths.dataset; or the order."""
    given = [name for name in SELECTION_FLAGS if name in flags]
    if "order" in flags:
        return print_order(config, select_steps(flags))
    if given:
        raise UsageError(f"--{given[0]} selects steps of --order; give --order too")
    dataset = open_newest(config.paths)
    lines = [f"dataset {dataset.name} at {dataset.url}", f"digest {dataset.digest}"]
    lines += _vocabulary_lines(dataset)
    for split in dataset.splits:
        lines += _split_lines(dataset, split)
    lines += _num_ignore_lines(config, dataset)
    likelihood = dataset.manifest["likelihood"]
    lines.append(
        "likelihood: none in the tars; run vlal score, and vlal merge or set data.likelihood scores"
        if likelihood is None
        else f"likelihood: splits {', '.join(likelihood['splits'])}, temperature "
        f"{likelihood['temperature']:.6g}, scorer {likelihood['scorer_digest'][:16]}"
    )
    sys.stdout.write("\n".join(lines) + "\n")
    samples = {name: entry["samples"] for name, entry in dataset.manifest["splits"].items()}
    return {"samples": samples, "dataset": dataset.digest[:16]}


def select_steps(flags: Mapping[str, str]) -> StepSelection:
    """Read the flags that select steps.

    Raises:
        UsageError: not a whole number, too small, or a rank that does not exist.
    """
    found: dict[str, int] = {}
    for name in (name for name in SELECTION_FLAGS if name in flags):
        least = 1 if name in ("steps", "ranks", "first-ranks") else 0
        if not re.fullmatch(r"[0-9]{1,9}", flags[name]) or int(flags[name]) < least:
            raise UsageError(f"--{name} {flags[name]!r}: give a whole number, {least} or larger")
        found[name.replace("-", "_")] = int(flags[name])
    selection = StepSelection(**found)
    if selection.rank is not None and selection.rank >= selection.ranks:
        raise UsageError(
            f"--rank {selection.rank}: ranks are counted from 0 and --ranks is {selection.ranks}; "
            "give a smaller rank, or more ranks"
        )
    return selection


def print_order(config: Config, selection: StepSelection) -> Counts:
    """Print the samples of the selected steps of a run that starts the epoch at its beginning."""
    data, paths, training = config.data, config.paths, config.training
    url = paths.merged if data.likelihood == "tar" else paths.dataset
    mixture = open_mixture(url, data, cache=Path(paths.cache))
    first_ranks = selection.first_ranks or selection.ranks
    blocks = len(mixture.corpus.samples)
    lanes = data.lanes or choose_lanes(num_blocks=blocks, world_size=first_ranks)
    if (most := max(first_ranks, selection.ranks)) > lanes:
        raise UsageError(f"--order: {most} ranks but {lanes} lanes; give at most {lanes}")
    plan = EpochPlan(
        mixture.corpus, seed=training.seed, passes=mixture.passes, factor=mixture.factor
    )
    shuffle = Shuffle(plan, lanes=lanes, window_blocks=data.window_blocks, seed=training.seed)
    visits, batch_size = shuffle.length(selection.epoch), training.batch_size
    micro_batches = choose_micro_batches(
        lanes=lanes, world_size=first_ranks, accumulation=training.accumulation
    )
    end = epoch_samples(num_samples=visits, batch_size=batch_size, epoch_end=data.epoch_end)
    steps = -(-end // batch_size)
    if selection.step >= steps:
        raise UsageError(
            f"--step {selection.step}: epoch {selection.epoch} has {steps} steps of {batch_size} "
            "samples; give a step below that"
        )
    counts: Counts = {"epoch": selection.epoch, "visits": visits, "lanes": lanes}
    counts |= {"micro_batches": micro_batches, "steps": steps}
    sys.stdout.write("# " + ", ".join(f"{name} {value}" for name, value in counts.items()) + "\n")
    sys.stdout.write("# " + "\t".join(COLUMNS) + "\n")
    keys = [read_labels(one, data.train_split, columns=["key"])["key"] for one in mixture.trained]
    ranks = range(selection.ranks) if selection.rank is None else [selection.rank]
    printed = 0
    for step in range(selection.step, min(selection.step + selection.steps, steps)):
        for rank in ranks:
            step_plan = plan_step(
                start=step * batch_size,
                samples=min(batch_size, end - step * batch_size),
                lanes=lanes,
                micro_batches=micro_batches,
                rank=rank,
                world_size=selection.ranks,
            )
            for number, positions in enumerate(step_plan.micro_batches):
                for sample in _samples(shuffle, mixture, keys, selection.epoch, positions):
                    line = "\t".join(map(str, (step, rank, number, *sample)))
                    sys.stdout.write(line + "\n")
                    printed += 1
    return {**counts, "printed": printed}


def _samples(
    shuffle: Shuffle, mixture: Mixture, keys: list[Any], epoch: int, positions: I64
) -> Iterator[tuple[object, ...]]:
    """The samples at some positions: the columns from `position` on."""
    corpus, objects = mixture.corpus, mixture.dataset.vocabulary.objects
    places = shuffle.at(epoch, positions)
    which, local = corpus.locate(places.row)
    columns = {name: corpus.column(name, places.row) for name in ("uid", "shard", "object_id")}
    for n, position in enumerate(positions.tolist()):
        dataset, row = int(which[n]), int(local[n])
        yield (
            position,
            int(places.visit[n]),
            mixture.trained[dataset].name,
            corpus.splits[dataset].shards[int(columns["shard"][n])].name,
            row,
            uid_to_hex(int(columns["uid"][n])),
            keys[dataset][row].as_py(),
            objects[int(columns["object_id"][n])],
        )


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
    found = label_figures(dataset, name)
    count = max(found.samples, 1)
    return [
        f"{name}: {split.num_samples} samples in {entry['shards']} shards and "
        f"{len(split.blocks)} blocks, {entry['bytes'] / 1e6:.1f} MB, {entry['rejected']} rejected",
        f"  per sample: {found.positive / count:.2f} positive and {found.negative / count:.2f} "
        f"negative labels, {found.mean_feasible:.1f} feasible attributes, "
        f"{100 * found.unannotated:.1f} % of them unannotated",
    ]


def _num_ignore_lines(config: Config, dataset: Dataset) -> list[str]:
    """What the training split's feasible sets say about NUM_IGNORE."""
    name, chosen = config.data.train_split, config.method.num_ignore
    if name not in dataset.splits:
        return []
    most = largest_num_ignore(label_figures(dataset, name).mean_feasible)
    return [
        f"method.num_ignore: at most {most}, a quarter of the mean feasible set of {name} "
        f"(docs/your-data.md); it is {chosen}"
    ]


PROGRAM = Program(
    name="inspect",
    usage="vlal inspect",
    purpose="Print what a dataset holds: vocabulary, groups, feasible sets, label density, sizes. "
    "Reads paths.merged if it is finished, else paths.dataset; opens no image. With --order: print "
    "the samples of a run's steps, one per line, from the settings that training reads. "
    "Quarantined samples are printed too; every epoch begins at its first sample.",
    sections=("paths", "data", "method.num_ignore", "training", "observability"),
    flags=("order", *SELECTION_FLAGS, "json"),
    output=lambda config, flags: config.paths.run,
    writes=only_reads,
    work=inspect,
)
