"""Which visits an epoch holds: mixes, fractions of a pass, subsets and repeat factors, as laws.

`oracle` works the same visits out from the files on disk, in plain integers.
"""

import math
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.loading.test_exactness import open_written, visits_at, visits_of
from tests.fixtures import epoch_oracle
from tests.fixtures.epoch_oracle import Visit
from vlal_dist.config.sections import DataConfig, Section, TrainingConfig
from vlal_dist.data.format.dataset import Dataset, Split, open_dataset, open_split, read_labels
from vlal_dist.data.format.index import INDEX_TYPES, Blocks, Index
from vlal_dist.data.loading.batch import Batch
from vlal_dist.data.loading.batch_builder import BatchBuilder
from vlal_dist.data.loading.likelihoods import tar_likelihoods
from vlal_dist.data.loading.loader import TrainLoader
from vlal_dist.data.loading.shard_reader import ShardReader
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.data.order.epoch_plan import EpochPlan
from vlal_dist.data.order.ledger import Ledger
from vlal_dist.data.order.sampling_rates import repeat_factors, subset_factors
from vlal_dist.data.order.shuffle import Shuffle
from vlal_dist.errors import ConfigError
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.method.ignore_set import sample_ignore_set
from vlal_dist.storage.store import open_store

SEED = 11
SIZES = ([[3, 4], [5]], [[2, 2, 2], [1]], [[7, 1]])
"""Blocks of the shards of three small datasets."""


class Mix:
    """Datasets written to disk, opened as a corpus; and what the oracle reads of them."""

    def __init__(self, folder: Path, sizes: Sequence[Sequence[Sequence[int]]]) -> None:
        names = [f"set{number}" for number in range(len(sizes))]
        folders = [
            epoch_oracle.write_split(folder / name, shards, name=name)
            for name, shards in zip(names, sizes, strict=True)
        ]
        self.corpus = ConcatSplits([open_written(one) for one in folders])
        self.by_set = [
            epoch_oracle.uids(one, name=name) for one, name in zip(folders, names, strict=True)
        ]
        self.uids = [uid for one in self.by_set for uid in one]

    def rates(self, passes: Sequence[float]) -> list[float]:
        """Passes over the dataset of each row."""
        return [one for uids, one in zip(self.by_set, passes, strict=True) for _ in uids]


@pytest.fixture
def mix(tmp_path: Path) -> Mix:
    return Mix(tmp_path, SIZES)


def stream_of(plan: EpochPlan, *, lanes: int = 4) -> Shuffle:
    return Shuffle(plan, lanes=lanes, window_blocks=2, seed=SEED)


def visits(stream: Shuffle, epoch: int) -> list[Visit]:
    """All visits of an epoch, in its order."""
    return visits_at(stream, epoch, np.arange(stream.length(epoch)))


def check_laws(
    plan: EpochPlan, uids: Sequence[int], rates: Sequence[float], *, epochs: int
) -> None:
    """What holds for any rates: the counts, their numbers, the ledger, and no history."""
    stream, total = stream_of(plan), Counter[int]()
    for epoch in range(epochs):
        held = visits(stream, epoch)
        planned = epoch_oracle.planned(uids, rates, seed=SEED, epoch=epoch)
        assert Counter(held) == Counter(planned) and len(set(held)) == len(held)
        assert plan.ledger(epoch).to_json() == epoch_oracle.ledger(planned)
        numbers: dict[int, list[int]] = {}
        for uid, visit in held:
            numbers.setdefault(uid, []).append(visit)
        for uid, found in numbers.items():
            assert sorted(found) == list(range(total[uid], total[uid] + len(found)))
            total[uid] += len(found)
        for uid, rate in zip(uids, rates, strict=True):
            due = round(rate * 2**16) * (epoch + 1) / 2**16
            assert math.floor(due) <= total[uid] <= math.ceil(due)


passes_of_a_mix = st.lists(
    st.one_of(st.sampled_from([0.3, 0.5, 1.0, 2.0, 2.5]), st.floats(0.01, 3.0)),
    min_size=2,
    max_size=3,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(passes_of_a_mix, st.integers(2, 7))
def test_laws_of_a_mix(
    tmp_path_factory: pytest.TempPathFactory, passes: list[float], epochs: int
) -> None:
    mix = Mix(tmp_path_factory.mktemp("mix"), SIZES[: len(passes)])
    plan = EpochPlan(mix.corpus, seed=SEED, passes=tuple(passes))
    check_laws(plan, mix.uids, mix.rates(passes), epochs=epochs)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_laws_of_factors_of_rows(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Rows left out, and rows repeated, in a mix: what a subset and repeat factors come to."""
    mix = Mix(tmp_path_factory.mktemp("factors"), SIZES[:2])
    rows, passes = len(mix.uids), (1.0, 0.3)
    factor = data.draw(
        st.lists(st.one_of(st.just(0.0), st.floats(1.0, 4.0)), min_size=rows, max_size=rows).filter(
            lambda factors: max(factors) > 0
        )
    )
    plan = EpochPlan(mix.corpus, seed=SEED, passes=passes, factor=np.array(factor))
    rates = [a * b for a, b in zip(mix.rates(passes), factor, strict=True)]
    check_laws(plan, mix.uids, rates, epochs=4)


def test_visits_need_no_history(mix: Mix) -> None:
    """A plan that is asked for a late epoch alone numbers its visits like one that saw them all."""
    passes, last = (0.3, 2.5, 1.0), 60
    patient, total = EpochPlan(mix.corpus, seed=SEED, passes=passes), Counter[int]()
    for epoch in range(last):
        total.update(uid for uid, _ in visits(stream_of(patient), epoch))
    late = EpochPlan(mix.corpus, seed=SEED, passes=passes)
    first: dict[int, int] = {}
    for uid, visit in sorted(visits(stream_of(late), last)):
        first.setdefault(uid, visit)
    assert len(first) > len(mix.by_set[1]) and first == {uid: total[uid] for uid in first}


def test_fractions_fall_in_different_epochs_for_different_samples(tmp_path: Path) -> None:
    """0.3 of a pass is 0.3 of the rows in every epoch, not all rows in every third."""
    mix = Mix(tmp_path, [[[10] * 100]])
    plan = EpochPlan(mix.corpus, seed=SEED, passes=(0.3,))
    lengths = [stream_of(plan).length(epoch) for epoch in range(10)]
    assert min(lengths) > 250 and max(lengths) < 350 and sum(lengths) == 3000


def test_a_subset_holds_the_keys_on_the_list_and_no_other(tmp_path: Path) -> None:
    mix = Mix(tmp_path, SIZES[:2])
    tables = [pa.parquet.read_table(tmp_path / f"set{n}" / "labels.parquet") for n in (0, 1)]
    wanted = ["000001", "000008"]  # both sets have a 000001, the first alone a 000008
    kept = subset_factors([table["key"] for table in tables], wanted)
    plan = EpochPlan(mix.corpus, seed=SEED, passes=(1.0, 2.0), factor=kept.astype(np.float64))
    expected = {
        (epoch_oracle.uid_of("set0", "000001"), 3),
        (epoch_oracle.uid_of("set0", "000008"), 3),
        (epoch_oracle.uid_of("set1", "000001"), 6),
        (epoch_oracle.uid_of("set1", "000001"), 7),
    }
    assert set(visits(stream_of(plan), 3)) == expected
    assert plan.ledger(3).to_json() == epoch_oracle.ledger(expected)


def test_unknown_keys_are_refused(mix: Mix, tmp_path: Path) -> None:
    keys = [pa.parquet.read_table(tmp_path / "set0" / "labels.parquet")["key"]]
    with pytest.raises(ConfigError, match=r"1 of 2 keys .*nobody"):
        subset_factors(keys, ["000001", "nobody"])
    with pytest.raises(ConfigError, match="the list is empty"):
        subset_factors(keys, [])
    nothing = np.zeros(len(mix.corpus))
    with pytest.raises(ConfigError, match="no sample is left"):
        EpochPlan(mix.corpus, seed=SEED, passes=(1.0, 1.0, 1.0), factor=nothing)


@pytest.mark.parametrize("passes", [0.0, -1.0, 1e-6, 4097.0])
def test_passes_out_of_range_are_refused(mix: Mix, passes: float) -> None:
    with pytest.raises(ConfigError, match="passes per epoch"):
        EpochPlan(mix.corpus, seed=SEED, passes=(1.0, passes, 1.0))


def test_an_epoch_may_hold_nothing(tmp_path: Path) -> None:
    """A hundredth of a pass over two samples is nothing in most epochs."""
    plan = EpochPlan(Mix(tmp_path, [[[2]]]).corpus, seed=SEED, passes=(0.01,))
    lengths = [stream_of(plan).length(epoch) for epoch in range(200)]
    assert sum(lengths) == 4 and max(lengths) == 1
    assert [plan.ledger(epoch).count for epoch in range(200)] == lengths


def test_a_missing_sample_is_named(mix: Mix) -> None:
    plan = EpochPlan(mix.corpus, seed=SEED, passes=(2.5, 1.0, 0.3))
    held = visits(stream_of(plan), 4)
    for lost in (held[0], held[-1]):
        given = Ledger(**epoch_oracle.ledger(one for one in held if one != lost))
        assert plan.find(4, plan.ledger(4) - given) == lost[0]
    other = (held[0][0], held[0][1] + 100)
    assert plan.find(4, Ledger(**epoch_oracle.ledger([other]))) is None


def test_copies_of_a_row_are_far_apart(tmp_path: Path) -> None:
    """As far as if each copy were put anywhere: a third of the epoch on average."""
    mix = Mix(tmp_path, [[[8] * 300]])
    stream = stream_of(EpochPlan(mix.corpus, seed=SEED, passes=(2.0,)), lanes=12)
    rows = stream.at(0, np.arange(stream.length(0))).row
    places = np.argsort(rows, kind="stable").reshape(-1, 2)
    apart = np.abs(places[:, 0] - places[:, 1]) / len(rows)
    assert 0.28 < apart.mean() < 0.38
    assert (apart < 0.01).mean() < 0.04


def test_whole_passes_allocate_no_array_of_the_size_of_the_index() -> None:
    """Four million rows whose columns take no memory: what is allocated is the plan's own."""
    rows, blocks = 4_000_000, 1000
    samples = np.full(blocks, rows // blocks, dtype=np.uint32)
    columns = {name: np.broadcast_to(np.zeros(1, kind), rows) for name, kind in INDEX_TYPES.items()}
    split = Split(
        "train",
        open_store("."),
        [],
        Index(**columns),
        Blocks(
            shard=np.zeros(blocks, np.uint32),
            first_row=np.cumsum(samples, dtype=np.uint64) - samples,
            samples=samples,
            offset=np.zeros(blocks, np.uint64),
            bytes=np.zeros(blocks, np.uint64),
        ),
    )

    def most_allocated(*passes: float) -> int:
        tracemalloc.start()
        stream = stream_of(EpochPlan(ConcatSplits([split, split]), seed=SEED, passes=passes))
        stream.at(1, np.arange(64))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert most_allocated(1.0, 2.0) < rows < most_allocated(1.0, 0.5)


def test_golden_mix(tmp_path: Path) -> None:
    """A change here moves the samples of every run that mixes: it needs a new format."""
    mix = Mix(tmp_path, ([[2, 1], [2]], [[3, 1]], [[2]]))
    stream = stream_of(EpochPlan(mix.corpus, seed=SEED, passes=(0.3, 1.0, 2.5)))
    for epoch, expected in enumerate(GOLDEN_ROWS_AND_VISITS):
        places = stream.at(epoch, np.arange(stream.length(epoch)))
        assert list(zip(places.row.tolist(), places.visit.tolist(), strict=True)) == expected


def test_repeat_factors_are_the_papers() -> None:
    """LVIS (Gupta et al. 2019): max over a sample's positives of max(1, sqrt(t / f))."""
    positive = pa.chunked_array([pa.array([[0], [0, 1], [0], [], [0, 2]], pa.list_(pa.uint32()))])
    kept = np.array([True, True, True, True, False])
    found = repeat_factors([positive], kept, threshold=0.5)
    # Of the four kept, three have 0 and one has 1; 2 is only on the sample that is left out.
    assert found.tolist() == [1.0, math.sqrt(0.5 / 0.25), 1.0, 1.0, 1.0]


@pytest.fixture(scope="module")
def merged(small: Path) -> Dataset:
    return open_dataset(str(small / "merged"), cache=small / "cache")


def make_loader(
    dataset: Dataset,
    passes: dict[str, float],
    *,
    rank: int = 0,
    world_size: int = 1,
    factor: npt.NDArray[np.float64] | None = None,
    **options: Any,
) -> TrainLoader:
    """A loader of splits that are taken for a mix; likelihoods are read where it is train alone."""

    def of(section: type[Section]) -> dict[str, Any]:
        return {name: options[name] for name in options if name in section.model_fields}

    corpus = ConcatSplits([open_split(dataset, name) for name in passes])
    builder = BatchBuilder(
        ShardReader(corpus),
        dataset,
        DataConfig(**{"image_size": 64, "threads": 1, "epoch_end": "exact", **of(DataConfig)}),
        read_likelihoods=tar_likelihoods if list(passes) == ["train"] else None,
    )
    plan = EpochPlan(corpus, seed=SEED, passes=tuple(passes.values()), factor=factor)
    training = TrainingConfig(**{"batch_size": 16, "seed": SEED, **of(TrainingConfig)})
    first = {name: options[name] for name in ("micro_batches",) if name in options}
    return TrainLoader(builder, plan, training, rank=rank, world_size=world_size, **first)


def batches(loader: TrainLoader, epoch: int, start: int = 0) -> Iterator[Batch]:
    for step in loader.epoch(epoch, start):
        yield from step.micro_batches


def test_planned_and_seen_positives_are_equal_attribute_by_attribute(merged: Dataset) -> None:
    """Repeat factors by the oracle and the labels; what is seen by counting in the batches."""
    positive = read_labels(merged, "train")["positive"]
    kept = np.ones(len(positive), dtype=np.bool_)
    lists, threshold = positive.to_pylist(), 0.3
    carried = Counter(attribute for one in lists for attribute in one)
    share = {attribute: count / len(lists) for attribute, count in carried.items()}
    factor = [max([1.0, *(math.sqrt(threshold / share[a]) for a in one)]) for one in lists]
    uids = epoch_oracle.uids(Path(merged.url) / "train", name=merged.name)
    by_uid = dict(zip(uids, lists, strict=True))
    found = repeat_factors([positive], kept, threshold=threshold)
    loader = make_loader(merged, {"train": 1.0}, factor=found)
    whole = Counter[int]()
    for epoch in range(3):
        held = epoch_oracle.planned(uids, factor, seed=SEED, epoch=epoch)
        planned = Counter(attribute for uid, _ in held for attribute in by_uid[uid])
        seen = sum((batch.label == 1).sum(0) for batch in batches(loader, epoch))
        assert {a: n for a, n in enumerate(seen.tolist()) if n} == dict(planned)
        whole += planned
    loader.close()
    rare = [attribute for attribute, one in share.items() if one < threshold / 2]
    assert rare and all(whole[attribute] > 3.6 * carried[attribute] for attribute in rare)


Content = tuple[bytes, bool, bytes]
"""Image bytes, flip, ignore set."""


def contents(batch: Batch, sets: FeasibleSets) -> dict[Visit, Content]:
    """What training makes of each (uid, visit) of a batch."""
    assert batch.inverse_weight is not None
    feasible = torch.from_numpy(sets.mask(batch.label.shape[1])[batch.object_id.numpy()])
    weight = torch.zeros(feasible.shape)
    weight[feasible] = batch.inverse_weight  # ascending within a row, in both
    ignored = sample_ignore_set(
        inverse_weight=weight,
        drawable=feasible,
        num_ignore=3,
        uid=batch.uid,
        visit=batch.visit,
        seed=SEED,
    )
    return {
        visit: (
            batch.image[n].contiguous().numpy().tobytes(),
            bool(batch.flip[n]),
            ignored[n].numpy().tobytes(),
        )
        for n, visit in enumerate(visits_of(batch))
    }


def test_a_visit_has_the_same_bits_in_every_layout(merged: Dataset) -> None:
    """Ranks, batch size, lanes, micro-batches, threads ahead and a resume: none of them counts."""

    def seen(world_size: int, *, start: int = 0, **options: Any) -> dict[Visit, Content]:
        found: dict[Visit, Content] = {}
        for rank in range(world_size):
            loader = make_loader(
                merged, {"train": 1.3}, rank=rank, world_size=world_size, **options
            )
            for batch in batches(loader, 1, start):
                found |= contents(batch, merged.feasible)
            loader.close()
        return found

    one = seen(1, lanes=8)
    of_sample = Counter(uid for uid, _ in one)
    assert len(of_sample) == 72 and len(one) > 80
    for layout in (
        {"world_size": 2, "batch_size": 10, "lanes": 12},
        {"world_size": 3, "batch_size": 64, "lanes": 24, "accumulation": 2},
        {"world_size": 5, "batch_size": 7, "lanes": 8, "micro_batches": 4, "prefetch_steps": 1},
        {"world_size": 8, "batch_size": 33, "lanes": 120, "window_blocks": 1},
    ):
        assert seen(**layout) == one, layout
    resumed = seen(3, lanes=8, batch_size=20, start=48)
    assert len(resumed) == len(one) - 48 and resumed.items() <= one.items()
    twice = [[one[key] for key in one if key[0] == uid] for uid in of_sample if of_sample[uid] > 1]
    assert all(first[0] == second[0] for first, second in twice)  # the decoded crop is the sample's
    assert 0 < sum(first[1] != second[1] for first, second in twice) < len(twice)
    assert sum(first[2] != second[2] for first, second in twice) > 0


def test_a_mix_reads_what_its_datasets_alone_read(merged: Dataset) -> None:
    """The same pixels and the same flip for a (sample, visit), whatever it is mixed with."""

    def seen(**passes: float) -> dict[Visit, tuple[bytes, bool]]:
        loader = make_loader(merged, passes)
        found = {
            visit: (batch.image[n].contiguous().numpy().tobytes(), bool(batch.flip[n]))
            for batch in batches(loader, 0)
            for n, visit in enumerate(visits_of(batch))
        }
        loader.close()
        return found

    train, test, mixed = seen(train=1.0), seen(test=2.0), seen(train=0.5, test=2.0)
    assert test.items() <= mixed.items() <= (train | test).items()
    assert 24 < len(mixed.keys() & train.keys()) < 48


GOLDEN_ROWS_AND_VISITS = [
    [(8, 0), (10, 1), (5, 0), (6, 0), (2, 0), (10, 0), (4, 0), (7, 0), (9, 1), (9, 0)],
    [(9, 4), (6, 1), (10, 3), (9, 2), (3, 0), (5, 1), (9, 3), (10, 2), (10, 4), (7, 1), (8, 1)],
    [(9, 5), (1, 0), (10, 6), (6, 2), (8, 2), (9, 6), (5, 2), (7, 2), (10, 5), (0, 0)],
]
