"""Show what a dataset holds, and what each rank trains on; opens no image.

The same pure functions as training, of the same settings: nothing is simulated, nothing is read but
manifests, indexes and labels.

With `--order` what a run's steps train on; see `inspect_order`.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from vlal_dist.config.sections import Config
from vlal_dist.data.format.dataset import Dataset, open_dataset, open_split, read_labels
from vlal_dist.data.hashing import I64, uid_to_hex
from vlal_dist.data.order.epoch_plan import EpochPlan
from vlal_dist.data.order.mixture import Mixture, open_mixture
from vlal_dist.data.order.rank_split import choose_micro_batches, epoch_samples, plan_step
from vlal_dist.data.order.shuffle import Shuffle, choose_lanes
from vlal_dist.errors import UsageError
from vlal_dist.program import Counts, Program
from vlal_dist.storage.store import open_store

FORM = "epoch=E,step=S,steps=K,ranks=W,rank=R,first=F"
COLUMNS = (
    "step", "rank", "micro_batch", "position", "visit", "dataset", "shard", "row", "uid", "key",
    "object",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What is to be printed.

    Attributes:
        epoch: 0-based.
        step: the first step, 0-based within the epoch.
        steps: how many; fewer where the epoch ends.
        ranks: how many ranks share a step.
        rank: the rank whose samples are printed; None: all.
        first: ranks of the run's first start, which fixed lanes and micro-batches; None: `ranks`.
    """

    epoch: int = 0
    step: int = 0
    steps: int = 1
    ranks: int = 1
    rank: int | None = None
    first: int | None = None


@dataclass(frozen=True)
class Order:
    """The steps of one epoch of a run that starts it from its beginning.

    Attributes:
        stream: the order of the visits.
        micro_batches: M.
        batch_size: B, visits of a step over all ranks.
        end: visits of the epoch that are trained on.
    """

    stream: Shuffle
    micro_batches: int
    batch_size: int
    end: int

    @property
    def steps(self) -> int:
        """Steps of the epoch."""
        return -(-self.end // self.batch_size)


def parse_order(text: str) -> Asked:
    """Read `--order WHAT`.

    Raises:
        UsageError: an unknown, repeated or malformed part, or a rank that there is not.
    """
    names = [field.name for field in fields(Asked)]
    found: dict[str, int] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if name not in names or not equals or not re.fullmatch(r"[0-9]{1,9}", value):
            raise UsageError(
                f"--order {text!r}: {part!r} is none of {FORM} with whole numbers; each part may "
                "be left out, such as --order epoch=0,step=10,ranks=4"
            )
        if name in found:
            raise UsageError(f"--order {text!r}: {name} is given twice; give it once")
        found[name] = int(value)
    asked = Asked(**found)
    for name in ("steps", "ranks", "first"):
        if found.get(name) == 0:
            raise UsageError(f"--order {text!r}: {name} is 0; give at least 1")
    if asked.rank is not None and asked.rank >= asked.ranks:
        raise UsageError(
            f"--order {text!r}: rank {asked.rank} of {asked.ranks} ranks; they are counted from 0: "
            "give a smaller rank, or more ranks"
        )
    return asked


def inspect_order(config: Config, text: str) -> Counts:
    """Print what the asked steps of a run with this configuration train on."""
    asked = parse_order(text)
    data, paths = config.data, config.paths
    mixture = open_mixture(
        paths.merged if data.likelihood == "tar" else paths.dataset,
        data,
        cache=Path(paths.cache),
    )
    order = _lay_out(config, mixture, asked)
    if not asked.step < order.steps:
        raise UsageError(
            f"--order {text!r}: epoch {asked.epoch} has {order.steps} steps of "
            f"{order.batch_size} samples; give a step below that"
        )
    counts: Counts = {
        "epoch": asked.epoch,
        "visits": order.stream.length(asked.epoch),
        "lanes": order.stream.lanes,
        "micro_batches": order.micro_batches,
        "steps": order.steps,
    }
    sys.stdout.write("# " + ", ".join(f"{name} {value}" for name, value in counts.items()) + "\n")
    sys.stdout.write("# " + "\t".join(COLUMNS) + "\n")
    printed = 0
    for line in _lines(order, mixture, data.train_split, asked):
        sys.stdout.write(line + "\n")
        printed += 1
    return {**counts, "printed": printed}


def _lay_out(config: Config, mixture: Mixture, asked: Asked) -> Order:
    """The epoch as the training loader lays it out."""
    seed, first = config.training.seed, asked.first or asked.ranks
    plan = EpochPlan(mixture.corpus, seed=seed, passes=mixture.passes, factor=mixture.factor)
    blocks = len(mixture.corpus.samples)
    lanes = config.data.lanes or choose_lanes(num_blocks=blocks, world_size=first)
    if max(first, asked.ranks) > lanes:
        raise UsageError(
            f"--order: {max(first, asked.ranks)} ranks but {lanes} lanes; give at most {lanes}"
        )
    stream = Shuffle(plan, lanes=lanes, window_blocks=config.data.window_blocks, seed=seed)
    return Order(
        stream=stream,
        micro_batches=choose_micro_batches(
            lanes=lanes, world_size=first, accumulation=config.training.accumulation
        ),
        batch_size=config.training.batch_size,
        end=epoch_samples(
            num_samples=stream.length(asked.epoch),
            batch_size=config.training.batch_size,
            epoch_end=config.data.epoch_end,
        ),
    )


def _lines(order: Order, mixture: Mixture, split: str, asked: Asked) -> Iterator[str]:
    """A line per sample: steps, in them ranks, in them micro-batches."""
    keys = [read_labels(one, split, columns=["key"])["key"] for one in mixture.trained]
    ranks = range(asked.ranks) if asked.rank is None else [asked.rank]
    for step in range(asked.step, min(asked.step + asked.steps, order.steps)):
        start = step * order.batch_size
        for rank in ranks:
            plan = plan_step(
                start=start,
                samples=min(order.batch_size, order.end - start),
                lanes=order.stream.lanes,
                micro_batches=order.micro_batches,
                rank=rank,
                world_size=asked.ranks,
            )
            for number, positions in enumerate(plan.micro_batches):
                for sample in _samples(order.stream, mixture, keys, asked.epoch, positions):
                    yield "\t".join(map(str, (step, rank, number, *sample)))


def _samples(
    stream: Shuffle, mixture: Mixture, keys: list[Any], epoch: int, positions: I64
) -> Iterator[tuple[object, ...]]:
    """The samples at some positions: the columns from `position` on."""
    corpus, objects = mixture.corpus, mixture.dataset.vocabulary.objects
    places = stream.at(epoch, positions)
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
