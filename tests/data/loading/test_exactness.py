"""Every planned visit once, whatever stops and restarts on whatever ranks: against the oracle.

A schedule is a list of starts: ranks, batch size, and the step after which the start is cut off.
Most examples drive the stream the way `TrainLoader` does, without images; some the loader itself.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fixtures import epoch_oracle
from tests.fixtures.epoch_oracle import Visit
from vlal_dist.config.sections import DataConfig, TrainingConfig
from vlal_dist.data.format.dataset import Dataset, Split, open_dataset, open_split
from vlal_dist.data.format.index import map_blocks, map_index
from vlal_dist.data.loading import loader as loader_module
from vlal_dist.data.loading.batch_builder import BatchBuilder
from vlal_dist.data.loading.loader import TrainLoader
from vlal_dist.data.loading.shard_reader import ShardReader
from vlal_dist.data.order import epoch_plan as plan_module
from vlal_dist.data.order import shuffle as stream_module
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.data.order.epoch_plan import EpochPlan
from vlal_dist.data.order.ledger import Ledger
from vlal_dist.data.order.rank_split import choose_micro_batches, epoch_samples, plan_step
from vlal_dist.data.order.shuffle import Shuffle, choose_lanes
from vlal_dist.storage.store import open_store

WORLDS = (1, 2, 3, 5, 7, 8)
EPOCHS = 2
TO_THE_END = 1 << 30


@dataclass(frozen=True)
class Start:
    """Attributes: ranks, B, and the steps after which it is cut off."""

    world_size: int
    batch_size: int
    steps: int = TO_THE_END


@dataclass(frozen=True)
class Order:
    """What no restart may change."""

    seed: int
    lanes: int
    micro_batches: int
    window_blocks: int
    epoch_end: str
    passes: float


@dataclass(frozen=True)
class Dealt:
    """One step: its positions, and the visits of each rank."""

    epoch: int
    start: int
    samples: int
    ranks: list[list[Visit]]

    def together(self) -> list[Visit]:
        return sorted(visit for rank in self.ranks for visit in rank)


Deal = Callable[[Start, int, int], Iterator[Dealt]]
"""The steps of one start from a position of an epoch on, to that epoch's end."""


def open_written(folder: Path, *, name: str = "made") -> Split:
    """What `epoch_oracle.write_split` wrote."""
    index, blocks = map_index(folder / "index.arrow"), map_blocks(folder / "blocks.arrow")
    return Split(name, open_store(str(folder)), [], index, blocks)


def fresh_stream(split: Split, order: Order) -> Shuffle:
    plan = EpochPlan(ConcatSplits([split]), seed=order.seed, passes=(order.passes,))
    return Shuffle(plan, lanes=order.lanes, window_blocks=order.window_blocks, seed=order.seed)


def visits_at(stream: Shuffle, epoch: int, positions: Any) -> list[Visit]:
    places = stream.at(epoch, positions)
    uid = stream.plan.corpus.column("uid", places.row)
    return list(zip(uid.tolist(), places.visit.tolist(), strict=True))


def end_of(stream: Shuffle, order: Order, start: Start, epoch: int, position: int) -> int:
    left = stream.length(epoch) - position
    return position + epoch_samples(
        num_samples=left, batch_size=start.batch_size, epoch_end=order.epoch_end
    )


def deal_from_files(split: Split, order: Order) -> Deal:
    """Ranks that cut and look up their steps as `TrainLoader` does."""

    def deal(start: Start, epoch: int, position: int) -> Iterator[Dealt]:
        stream = fresh_stream(split, order)
        end = end_of(stream, order, start, epoch, position)
        firsts = list(range(position, end, start.batch_size))[: start.steps]
        per_rank = []
        for rank in range(start.world_size):
            plans = [
                plan_step(
                    start=first,
                    samples=min(start.batch_size, end - first),
                    lanes=order.lanes,
                    micro_batches=order.micro_batches,
                    rank=rank,
                    world_size=start.world_size,
                )
                for first in firsts
            ]
            rows = [np.concatenate(plan.micro_batches) for plan in plans]
            found = iter(visits_at(stream, epoch, np.concatenate(rows)) if rows else [])
            per_rank.append([[next(found) for _ in one] for one in rows])
        for number, first in enumerate(firsts):
            samples = min(start.batch_size, end - first)
            yield Dealt(epoch, first, samples, [rank[number] for rank in per_rank])

    return deal


def train(
    starts: Sequence[Start], deal: Deal, end: Callable[[Start, int, int], int]
) -> tuple[list[Dealt], list[Start]]:
    """The training loop: the steps of a schedule, and the start that ended each epoch.

    A start that is cut off after an epoch's last step leaves the epoch open: the next one, with
    another B, may still find a batch in what this one would have dropped.
    """
    dealt: list[Dealt] = []
    ended: list[Start] = []
    epoch = position = 0
    for start in starts:
        left = start.steps
        while left and epoch < EPOCHS:
            stop = end(start, epoch, position)
            for step in deal(replace(start, steps=left), epoch, position):
                assert step.samples == min(start.batch_size, stop - position)
                dealt.append(step)
                position, left = step.start + step.samples, left - 1
            if left:
                assert position == stop
                ended.append(start)
                epoch, position = epoch + 1, 0
    return dealt, ended


def check_schedule(
    starts: Sequence[Start],
    *,
    deal: Deal,
    reference: Shuffle,
    order: Order,
    uids: Sequence[int],
) -> list[Dealt]:
    """Compare all steps of a schedule with the undisturbed order of one rank, and with the plan."""

    def end(start: Start, epoch: int, position: int) -> int:
        return end_of(reference, order, start, epoch, position)

    dealt, ended = train(starts, deal, end)
    line = [
        visits_at(reference, epoch, np.arange(reference.length(epoch))) for epoch in range(EPOCHS)
    ]
    for step in dealt:
        undisturbed = line[step.epoch][step.start : step.start + step.samples]
        assert step.together() == sorted(undisturbed)
    if len({start.batch_size for start in starts}) == 1:
        alone, _ = train([Start(1, starts[0].batch_size)], deal, end)
        assert [(s.epoch, s.start, s.together()) for s in dealt] == [
            (s.epoch, s.start, s.together()) for s in alone
        ]
    for epoch in range(EPOCHS):
        rates = [order.passes] * len(uids)
        planned = epoch_oracle.planned(uids, rates, seed=order.seed, epoch=epoch)
        ranks = [rank for step in dealt if step.epoch == epoch for rank in step.ranks]
        given = [visit for rank in ranks for visit in rank]
        dropped = line[epoch][len(given) :]
        assert Counter(given) + Counter(dropped) == Counter(planned)
        assert len(dropped) < (ended[epoch].batch_size if order.epoch_end == "drop" else 1)
        ledger = sum((of_visits(rank) for rank in ranks), Ledger())
        assert reference.plan.ledger(epoch).to_json() == epoch_oracle.ledger(planned)
        assert (ledger + of_visits(dropped)).to_json() == epoch_oracle.ledger(planned)
    return dealt


def of_visits(visits: Sequence[Visit]) -> Ledger:
    uid, visit = ([one[k] for one in visits] for k in (0, 1))
    return Ledger.of(np.array(uid, np.uint64), np.array(visit, np.int64))


shard_sizes = st.lists(
    st.one_of(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.just([1])),
    min_size=1,
    max_size=12,
)


def draw_starts(
    data: st.DataObject, *, lanes: int, first: int, sizes: tuple[int, int], least: int = 0
) -> list[Start]:
    """A schedule that begins on `first` ranks.

    Args:
        sizes: the smallest and the largest batch.
        least: restarts, and steps of a start that is cut off.
    """
    worlds = st.sampled_from([world for world in WORLDS if world <= lanes])
    size, steps = st.integers(*sizes), st.integers(least, 12)
    starts, changes = [Start(first, data.draw(size), data.draw(steps))], data.draw(st.booleans())
    for cut in data.draw(st.lists(steps, min_size=least, max_size=4)):
        batch_size = data.draw(size) if changes else starts[0].batch_size
        starts.append(Start(data.draw(worlds), batch_size, cut))
    return [*starts, Start(data.draw(worlds), starts[-1].batch_size)]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shard_sizes, st.integers(0, 2**40), st.data())
def test_every_visit_once_whatever_stops_and_ranks(
    shards: list[list[int]], seed: int, data: st.DataObject
) -> None:
    check_any(shards, seed, data)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shard_sizes, st.integers(0, 2**40), st.data())
def test_every_visit_once_in_many_examples(
    shards: list[list[int]], seed: int, data: st.DataObject
) -> None:
    check_any(shards, seed, data)


def check_any(shards: list[list[int]], seed: int, data: st.DataObject) -> None:
    first = data.draw(st.sampled_from(WORLDS))
    by_rule = choose_lanes(num_blocks=sum(map(len, shards)), world_size=first)
    lanes = data.draw(st.sampled_from(sorted({by_rule, 8, 12, 24, 120})))
    order = Order(
        seed=seed,
        lanes=lanes,
        micro_batches=choose_micro_batches(
            lanes=lanes, world_size=first, accumulation=data.draw(st.integers(1, 3))
        ),
        window_blocks=data.draw(st.integers(1, 3)),
        epoch_end=data.draw(st.sampled_from(["drop", "exact"])),
        passes=data.draw(st.sampled_from([1.0, 1.0, 2.0, 1.3, 0.4])),
    )
    sizes = 1, min(40, sum(map(sum, shards)))
    starts = draw_starts(data, lanes=lanes, first=first, sizes=sizes)
    piece = data.draw(st.sampled_from([16, 1 << 14]))
    with tempfile.TemporaryDirectory() as folder:
        check_written(Path(folder), shards, order, starts, piece=piece)


def check_written(
    folder: Path,
    shards: list[list[int]],
    order: Order,
    starts: Sequence[Start],
    *,
    piece: int = 16,
) -> list[Dealt]:
    """Write a split and check a schedule on it.

    Args:
        piece: positions whose order the ranks of the schedule compute at a time; the undisturbed
            order is worked out in the usual, larger pieces.
    """
    split = epoch_oracle.write_split(folder / "train", shards)
    opened = open_written(split)
    reference = fresh_stream(opened, order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_module, "_TABLE_VISITS", piece)
        patch.setattr(plan_module, "_PIECE_ROWS", piece)
        return check_schedule(
            starts,
            deal=deal_from_files(opened, order),
            reference=reference,
            order=order,
            uids=epoch_oracle.uids(split, name="made"),
        )


PLAIN = Order(seed=5, lanes=8, micro_batches=1, window_blocks=3, epoch_end="exact", passes=1.0)


def test_fewer_samples_than_lanes(tmp_path: Path) -> None:
    order = replace(PLAIN, lanes=24, micro_batches=8)
    dealt = check_written(tmp_path, [[2, 1], [2]], order, [Start(8, 4, 1), Start(3, 4)])
    assert [step.samples for step in dealt] == [4, 1, 4, 1]
    assert [len(rank) for rank in dealt[0].ranks] == [1, 1, 1, 1, 0, 0, 0, 0]


def test_shards_of_one_sample(tmp_path: Path) -> None:
    order = replace(PLAIN, lanes=12, micro_batches=2)
    starts = [Start(2, 5, 3), Start(7, 5, 4), Start(1, 5)]
    dealt = check_written(tmp_path, [[1]] * 41, order, starts)
    assert [step.samples for step in dealt] == 2 * ([5] * 8 + [1])


def test_more_ranks_than_micro_batches(tmp_path: Path) -> None:
    starts = [Start(1, 16, 1), Start(8, 16, 1), Start(5, 16)]
    dealt = check_written(tmp_path, [[4, 4, 4], [4, 4]], PLAIN, starts)
    assert [len(rank) for rank in dealt[1].ranks] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert all(dealt[2].ranks) and len(dealt[2].ranks) == 5


@pytest.mark.parametrize("epoch_end", ["drop", "exact"])
def test_ranks_without_a_row_in_any_step(tmp_path: Path, epoch_end: str) -> None:
    order = replace(PLAIN, epoch_end=epoch_end)
    dealt = check_written(tmp_path, [[3, 1]], order, [Start(8, 3)])
    empty = [[rank for rank, given in enumerate(step.ranks) if not given] for step in dealt]
    last = [] if epoch_end == "drop" else [[0, 1, 2, 4, 5, 6, 7]]
    assert empty == 2 * [[3, 4, 5, 6, 7], *last]


def test_a_rank_that_counts_other_peers_is_noticed(tmp_path: Path) -> None:
    """The checks above can fail: one rank of three works as if there were two."""
    split = epoch_oracle.write_split(tmp_path / "train", [[4] * 6])
    opened = open_written(split)
    three, two = (
        next(deal_from_files(opened, PLAIN)(Start(world, 24), 0, 0)).ranks for world in (3, 2)
    )
    given = [*three[0], *two[1], *three[2]]
    planned = epoch_oracle.planned(
        epoch_oracle.uids(split, name="made"), [1.0] * 24, seed=PLAIN.seed, epoch=0
    )
    assert of_visits(three[0] + three[1] + three[2]).to_json() == epoch_oracle.ledger(planned)
    assert of_visits(given).to_json() != epoch_oracle.ledger(planned)
    assert Counter(given) - Counter(planned) and Counter(planned) - Counter(given)


@pytest.fixture(scope="module")
def packed(small: Path) -> Dataset:
    return open_dataset(str(small / "dataset"), cache=small / "cache")


def make_loader(dataset: Dataset, order: Order, start: Start, rank: int) -> TrainLoader:
    builder = BatchBuilder(
        ShardReader(ConcatSplits([open_split(dataset, "train")])),
        dataset,
        DataConfig(
            image_size=64,
            threads=1,
            window_blocks=order.window_blocks,
            epoch_end=order.epoch_end,
            prefetch_steps=2,
        ),
    )
    return TrainLoader(
        builder,
        EpochPlan(builder.reader.corpus, seed=order.seed, passes=(order.passes,)),
        TrainingConfig(batch_size=start.batch_size, seed=order.seed),
        rank=rank,
        world_size=start.world_size,
        lanes=order.lanes,
        micro_batches=order.micro_batches,
    )


def deal_by_loaders(dataset: Dataset, order: Order) -> Deal:
    """All ranks' loaders in one process, step by step as the ranks of a job."""

    def deal(start: Start, epoch: int, position: int) -> Iterator[Dealt]:
        with ExitStack() as stack:
            loaders = [make_loader(dataset, order, start, r) for r in range(start.world_size)]
            for loader in loaders:
                stack.callback(loader.close)
            epochs = [loader.epoch(epoch, position) for loader in loaders]
            for one in epochs:
                stack.callback(one.close)  # type: ignore[attr-defined]
            for number, steps in enumerate(zip(*epochs, strict=True)):
                if number == start.steps:
                    return
                (samples,) = {step.samples for step in steps}
                (after,) = {step.position for step in steps}
                given = [
                    [visit for batch in step.micro_batches for visit in visits_of(batch)]
                    for step in steps
                ]
                yield Dealt(epoch, after - samples, samples, given)

    return deal


def visits_of(batch: Any) -> list[Visit]:
    uid = batch.uid.numpy().view(np.uint64)
    return list(zip(uid.tolist(), batch.visit.tolist(), strict=True))


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
@given(st.data())
def test_the_loaders_read_every_image_once(packed: Dataset, data: st.DataObject) -> None:
    check_any_loaders(packed, data)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
@given(st.data())
def test_the_loaders_in_many_examples(packed: Dataset, data: st.DataObject) -> None:
    check_any_loaders(packed, data)


def check_any_loaders(packed: Dataset, data: st.DataObject) -> None:
    lanes, first = data.draw(st.sampled_from([8, 12, 24])), data.draw(st.sampled_from(WORLDS))
    order = Order(
        seed=data.draw(st.integers(0, 2**40)),
        lanes=lanes,
        micro_batches=choose_micro_batches(lanes=lanes, world_size=first, accumulation=1),
        window_blocks=data.draw(st.integers(1, 3)),
        epoch_end=data.draw(st.sampled_from(["drop", "exact"])),
        passes=data.draw(st.sampled_from([1.0, 1.3])),
    )
    starts = draw_starts(data, lanes=lanes, first=first, sizes=(5, 30), least=1)
    check_loaders(packed, order, starts)


@pytest.mark.parametrize("epoch_end", ["drop", "exact"])
def test_the_loaders_with_another_batch_at_each_resume(packed: Dataset, epoch_end: str) -> None:
    order = replace(PLAIN, epoch_end=epoch_end, micro_batches=4)
    starts = [Start(3, 14, 2), Start(8, 24, 2), Start(2, 9, 3), Start(5, 20)]
    dealt = check_loaders(packed, order, starts)
    # Of 72 samples: the second start ends the first epoch, and with `drop` begins the next.
    second = {"drop": [24, 9, 9, 9, 20], "exact": [20, 9, 9, 9, 20, 20, 5]}
    assert [step.samples for step in dealt] == [14, 14, 24, *second[epoch_end]]


def check_loaders(packed: Dataset, order: Order, starts: Sequence[Start]) -> list[Dealt]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "_STRETCH_ROWS", 8)  # a few steps are looked up at a time
        return check_schedule(
            starts,
            deal=deal_by_loaders(packed, order),
            reference=fresh_stream(open_split(packed, "train"), order),
            order=order,
            uids=epoch_oracle.uids(Path(packed.url) / "train", name=packed.name),
        )
