"""`python -m shard_tools inspect --order WHAT`: what any rank sees at any step, without an image.

The same pure functions as training, of the same settings: nothing is simulated, nothing is read but
manifests, indexes and labels.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vlal_dist.config.config import Config
from vlal_dist.data.dataset import read_labels
from vlal_dist.data.keyed import I64
from vlal_dist.data.mixture import Mixture, open_mixture
from vlal_dist.data.plan import Plan
from vlal_dist.data.steps import choose_micro_batches, epoch_samples, plan_step
from vlal_dist.data.stream import Stream, choose_lanes
from vlal_dist.errors import UsageError
from vlal_dist.program import Counts

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

    stream: Stream
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
        mix=data.mix,
        subset=data.subset,
        repeat_threshold=data.repeat_threshold,
        cache=Path(paths.cache),
        split=data.train_split,
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
    plan = Plan(mixture.corpus, seed=seed, passes=mixture.passes, factor=mixture.factor)
    blocks = len(mixture.corpus.samples)
    lanes = config.data.lanes or choose_lanes(num_blocks=blocks, world_size=first)
    if max(first, asked.ranks) > lanes:
        raise UsageError(
            f"--order: {max(first, asked.ranks)} ranks but {lanes} lanes; give at most {lanes}"
        )
    stream = Stream(plan, lanes=lanes, window_blocks=config.data.window_blocks, seed=seed)
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
    stream: Stream, mixture: Mixture, keys: list[Any], epoch: int, positions: I64
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
            f"{int(columns['uid'][n]):016x}",
            keys[dataset][row].as_py(),
            objects[int(columns["object_id"][n])],
        )
