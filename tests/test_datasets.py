"""ShardDataset and ShardStream: the trainer's samples, order and draws, in any layout."""

import doctest
import io
import pickle
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

import vlal_dist.datasets
from tests.conftest import S3Server
from tests.fixtures.damaged_tars import damaged_copy, undecodable_copy, upload
from vlal_dist.config.sections import (
    DataConfig,
    LossConfig,
    PathsConfig,
    ScoringConfig,
    TrainingConfig,
)
from vlal_dist.data.format.dataset import Dataset, open_dataset, open_split
from vlal_dist.data.format.sample_reader import Sample, SampleReader
from vlal_dist.data.loading.batch import on_device
from vlal_dist.data.loading.decode import decode_into
from vlal_dist.data.loading.loader import Step, TrainLoader
from vlal_dist.data.order.shuffle import choose_lanes
from vlal_dist.datasets import ShardDataset, ShardStream
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.training.data import open_data
from vlal_dist.training.ranks import Ranks

SIZE, SEED, SAMPLES = 64, 3, 72
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def merged(small: Path) -> Dataset:
    return open_dataset(str(small / "merged"), cache=small / "cache")


def stream_of(root: str, **options: Any) -> ShardStream:
    return ShardStream(root, **{"batch_size": 16, "seed": SEED, "image_size": SIZE, **options})


def trainer_loader(
    dataset: Dataset, *, batch_size: int = 16, world_size: int = 1, lanes: int = 0
) -> TrainLoader:
    """The loader of `vlal train` on one rank, with the lanes of a start on some ranks."""
    paths = PathsConfig(merged=dataset.url, cache=str(dataset.cache))
    data = DataConfig(image_size=SIZE, lanes=lanes)
    opened = open_data(paths, data, LossConfig(), ScoringConfig())
    training = TrainingConfig(batch_size=batch_size, seed=SEED)
    return opened.make_loader(training, Ranks(0, world_size, 0, CPU, None), first=None)


def plain(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch that can be compared with ==."""
    return {name: value.tolist() for name, value in batch.items()}


def visits(batches: list[dict[str, Any]]) -> list[list[tuple[int, int]]]:
    return [
        list(zip(batch["sample_id"].tolist(), batch["epoch"].tolist(), strict=True))
        for batch in batches
    ]


def iterate(stream: ShardStream, workers: int, **options: Any) -> list[dict[str, Any]]:
    return list(DataLoader(stream, batch_size=None, num_workers=workers, **options))


class TestTrainersBits:
    def test_a_whole_epoch_with_its_flips_and_draws(self, merged: Dataset) -> None:
        stream = stream_of(merged.url)
        stream.set_epoch(2)
        pairs = undrawable = 0
        with closing(trainer_loader(merged)) as loader:
            for step, batch in zip(loader.epoch(2, 0), stream, strict=True):
                (own,) = step.micro_batches
                assert batch["position"].tolist() == [2, step.position]
                for name, tensor in (
                    ("labels", own.label),
                    ("object_id", own.object_id),
                    ("sample_id", own.uid),
                    ("epoch", own.visit),
                ):
                    assert torch.equal(batch[name], tensor) and batch[name].dtype == tensor.dtype
                assert batch["image"].dtype == torch.uint8
                assert 0 < own.flip.sum() < len(own)
                floats = batch["image"].to(torch.float32, memory_format=torch.channels_last)
                assert torch.equal(floats * (1 / 255), on_device(own, CPU).image)
                weights = inverse_weights(batch["likelihood"], own.object_id, stream)
                assert own.inverse_weight is not None
                assert weights.numpy().tobytes() == own.inverse_weight.numpy().tobytes()
                pairs += len(weights)
                undrawable += int(weights.isinf().sum())
        assert pairs > 64 * 5 and undrawable == 0

    def test_likelihoods_are_distributions_over_the_feasible_sets(self, merged: Dataset) -> None:
        stream = stream_of(merged.url)
        mask = torch.from_numpy(stream.feasible.mask(len(stream.attributes)))
        for batch in stream:
            likelihood = batch["likelihood"]
            assert likelihood.dtype == torch.float64
            assert torch.allclose(likelihood.sum(1), torch.ones(16, dtype=torch.float64))
            assert torch.equal(likelihood > 0, mask[batch["object_id"]])

    @settings(max_examples=50, deadline=None)
    @given(st.data())
    def test_any_inverse_weights_come_back(self, data: st.DataObject) -> None:
        """Also the largest, those that are not finite, empty sets, and rows without any weight."""
        sizes = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
        rows = data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=6))
        finite = st.floats(1, float(np.finfo(np.float32).max), width=32)
        weight = st.one_of(st.just(float("inf")), finite)
        weights = [data.draw(st.lists(weight, min_size=sizes[o], max_size=sizes[o])) for o in rows]
        for row in weights:
            if row and min(row) < float("inf"):
                row[data.draw(st.integers(0, len(row) - 1))] = 1.0  # of the likeliest
        sets = vlal_dist.datasets.FeasibleSets(
            np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            np.concatenate([np.arange(n, dtype=np.int32) * 2 for n in sizes]),
            *(np.ones(sum(sizes), np.int32) for _ in range(2)),
        )
        flat = np.array([one for row in weights for one in row], dtype=np.float32)
        found = vlal_dist.datasets.likelihoods(
            torch.tensor([0, *np.cumsum([len(row) for row in weights])]),
            torch.from_numpy(flat),
            object_id=torch.tensor(rows),
            feasible=sets,
            num_attributes=11,
        )
        inside = torch.from_numpy(sets.mask(11))[rows]
        assert not found[~inside].any() and found.isfinite().all() and (found >= 0).all()
        largest = found.amax(1, keepdim=True)
        back = torch.where(found > 0, largest / found, torch.inf).float()[inside]
        assert back.numpy().tobytes() == flat.tobytes()

    def test_another_epoch_has_other_flips_and_seeds_another_order(self, merged: Dataset) -> None:
        stream, other = stream_of(merged.url), stream_of(merged.url, seed=4)
        epochs = []
        for epoch in (0, 1):
            stream.set_epoch(epoch)
            epochs.append(list(stream))
        assert visits(epochs[0]) != visits(epochs[1])
        assert visits(epochs[0]) != visits(list(other))
        images: list[dict[int, Any]] = [{}, {}]
        for found, epoch in zip(images, epochs, strict=True):
            for batch in epoch:
                found.update(zip(batch["sample_id"].tolist(), batch["image"], strict=True))
        both = images[0].keys() & images[1].keys()
        equal = [torch.equal(images[0][uid], images[1][uid]) for uid in both]
        turned = [torch.equal(images[0][uid].flip(-1), images[1][uid]) for uid in both]
        assert all(a or b for a, b in zip(equal, turned, strict=True))
        assert 0.2 < np.mean(equal) < 0.8


def inverse_weights(likelihood: torch.Tensor, object_id: torch.Tensor, stream: Any) -> torch.Tensor:
    """max g / g as float32 over the feasible pairs, row by row; infinite where g is 0."""
    inside = torch.from_numpy(stream.feasible.mask(len(stream.attributes)))[object_id]
    return (likelihood.amax(1, keepdim=True) / likelihood).float()[inside]


class TestLayouts:
    """Ranks, DataLoader workers and resumes change nothing in the order."""

    @pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 2), (1, 3), (2, 2), (3, 0)])
    def test_an_epoch(self, merged: Dataset, world_size: int, workers: int) -> None:
        self.check(merged, batch_size=16, first=world_size, starts=[(world_size, workers, 99)])

    def test_resumes_on_other_ranks_and_workers(self, merged: Dataset) -> None:
        self.check(
            merged, batch_size=7, first=2, starts=[(2, 0, 2), (1, 2, 3), (3, 1, 2), (4, 0, 99)]
        )

    @pytest.mark.slow
    @settings(
        max_examples=30, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck]
    )
    @given(st.data())
    def test_in_many_examples(self, merged: Dataset, data: st.DataObject) -> None:
        start = st.tuples(st.integers(1, 5), st.integers(0, 3), st.integers(0, 4))
        starts = data.draw(st.lists(start, min_size=1, max_size=4))
        starts.append((data.draw(st.integers(1, 5)), data.draw(st.integers(0, 3)), 99))
        batch_size = data.draw(st.integers(1, 30))
        self.check(merged, batch_size=batch_size, first=starts[0][0], starts=starts)

    @staticmethod
    def check(
        merged: Dataset, *, batch_size: int, first: int, starts: list[tuple[int, int, int]]
    ) -> None:
        """Iterate an epoch in (ranks, workers, batches) pieces, each resumed from the last state.

        Oracle: the step's visits in the trainer's order, on one rank with the lanes of the first
        start; each rank's rows are those in the lanes l = r mod W.
        """
        blocks = len(open_split(merged, "train").blocks)
        lanes = choose_lanes(num_blocks=blocks, world_size=first)
        with closing(trainer_loader(merged, batch_size=batch_size, lanes=lanes)) as loader:
            steps = [visits_of(step) for step in loader.epoch(0, 0)]
        state, done = None, 0
        for world_size, workers, batches in starts:
            streams = [
                stream_of(merged.url, batch_size=batch_size, rank=rank, world_size=world_size)
                for rank in range(world_size)
            ]
            if state is not None:
                for stream in streams:
                    stream.load_state_dict(state)
            found = [iterate(stream, workers)[:batches] for stream in streams]
            for number, rows in enumerate(zip(*found, strict=True), start=done):
                whole = dict.fromkeys(range(batch_size * number, batch_size * (number + 1)))
                for rank, (batch, own) in enumerate(zip(rows, visits(list(rows)), strict=True)):
                    assert batch["position"].tolist() == [0, batch_size * (number + 1)]
                    places = [at for at in whole if at % lanes % world_size == rank]
                    assert len(own) == len(places)
                    whole |= dict(zip(places, own, strict=True))
                assert list(whole.values()) == steps[number]
            done += len(found[0])
            if found[0]:
                states = [s.state_dict(f[-1]) for s, f in zip(streams, found, strict=True)]
                assert all(one == states[0] for one in states)
                state = states[0]
        assert done == len(steps) == SAMPLES // batch_size
        assert len({visit for step in steps for visit in step}) == len(steps) * batch_size


def visits_of(step: Step) -> list[tuple[int, int]]:
    (batch,) = step.micro_batches
    return list(zip(batch.uid.tolist(), batch.visit.tolist(), strict=True))


class TestEpochs:
    @pytest.mark.parametrize("options", [{}, {"persistent_workers": True}])
    def test_two_epochs_through_one_loader(self, merged: Dataset, options: dict[str, bool]) -> None:
        stream, direct = stream_of(merged.url), stream_of(merged.url)
        loader = DataLoader(stream, batch_size=None, num_workers=2, **options)
        assert len(loader) == len(stream) == 4
        for epoch in (0, 1, 1, 5):
            stream.set_epoch(epoch)
            direct.set_epoch(epoch)
            assert [plain(one) for one in loader] == [plain(one) for one in direct]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_early_break_and_a_second_iterator(self, merged: Dataset, workers: int) -> None:
        stream = stream_of(merged.url)
        whole = visits(list(stream))
        loader = DataLoader(
            stream, batch_size=None, num_workers=workers, persistent_workers=workers > 0
        )
        for count in (1, 3):
            some = [batch for batch, _ in zip(loader, range(count), strict=False)]
            assert visits(some) == whole[:count]
        assert visits(list(loader)) == whole
        stream.load_state_dict(stream.state_dict(some[1]))  # workers that live on see the position
        assert visits(list(loader)) == whole[2:]
        stream.set_epoch(0)
        assert visits(list(loader)) == whole[2:]
        stream.set_epoch(1)
        stream.set_epoch(0)
        assert visits(list(loader)) == whole

    def test_two_iterators_at_once(self, merged: Dataset) -> None:
        stream = stream_of(merged.url)
        for one, other in zip(stream, stream, strict=True):
            assert plain(one) == plain(other)


class TestState:
    def test_it_is_plain_and_follows_the_last_batch(self, merged: Dataset) -> None:
        stream = stream_of(merged.url)
        assert stream.state_dict()["position"] == 0
        for number, batch in enumerate(stream, start=1):
            state = stream.state_dict()
            assert state == stream.state_dict(batch) and state["position"] == 16 * number
        assert all(type(value) in (int, str) for value in state.values())
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        stream.load_state_dict(torch.load(file, weights_only=True))
        assert list(stream) == [] and stream.epoch == 0
        stream.set_epoch(1)
        assert stream.state_dict() == {**state, "epoch": 1, "position": 0}
        assert len(list(stream)) == 4

    def test_with_workers_the_batch_is_needed(self, merged: Dataset) -> None:
        stream = stream_of(merged.url)
        batches = DataLoader(stream, batch_size=None, num_workers=2)
        for batch in batches:
            assert stream.state_dict(batch)["position"] in (16, 32, 48, 64)
            with pytest.raises(ValueError, match=r"state_dict\(batch\)"):
                stream.state_dict()
        stream.set_epoch(1)
        assert stream.state_dict()["epoch"] == 1

    def test_batches_of_batches_are_refused(self, merged: Dataset) -> None:
        stream = stream_of(merged.url)
        with pytest.raises(ValueError, match=r"shape \[1, 2\]; .*batch_size=None"):
            stream.state_dict(next(iter(DataLoader(stream))))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"seed": 5}, "seed is 5, the state has 3"),
            ({"batch_size": 8}, "batch_size is 8, the state has 16"),
            ({"split": "test"}, "split is test, the state has train"),
        ],
    )
    def test_another_stream_is_refused(
        self, merged: Dataset, options: dict[str, Any], message: str
    ) -> None:
        state = stream_of(merged.url).state_dict()
        with pytest.raises(DataError, match=message):
            stream_of(merged.url, **options).load_state_dict(state)

    def test_other_refusals(self, small: Path, merged: Dataset) -> None:
        stream = stream_of(merged.url)
        state = stream.state_dict()
        with pytest.raises(DataError, match="digest is"):
            stream_of(str(small / "dataset")).load_state_dict(state)
        with pytest.raises(DataError, match="the state has None"):
            stream.load_state_dict({"model": 1})
        with pytest.raises(DataError, match="position is 73, the split has 72"):
            stream.load_state_dict({**state, "position": 73})
        with pytest.raises(ConfigError, match="at most 8 ranks"):
            stream_of(merged.url, rank=0, world_size=9).load_state_dict(state)
        with pytest.raises(ValueError, match="count from 0"):
            stream.set_epoch(-1)


class TestRanks:
    def test_they_come_from_the_launcher(
        self, merged: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = [plain(one) for one in stream_of(merged.url, rank=1, world_size=2)]
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert [plain(one) for one in stream_of(merged.url)] == given
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            assert [len(one["labels"]) for one in stream_of(merged.url)] == [16] * 4
        finally:
            torch.distributed.destroy_process_group()

    def test_impossible_ones_are_refused(self, merged: Dataset) -> None:
        with pytest.raises(ValueError, match="give both"):
            stream_of(merged.url, rank=1)
        with pytest.raises(ValueError, match="rank 2 of 2"):
            stream_of(merged.url, rank=2, world_size=2)
        with pytest.raises(ConfigError, match="exceeds the 72 samples"):
            stream_of(merged.url, batch_size=73)

    def test_a_rank_without_a_row_gets_an_empty_batch(self, merged: Dataset) -> None:
        for options in ({}, {"transform": np.array}):
            stream = stream_of(merged.url, batch_size=1, rank=1, world_size=2, **options)
            lengths = [len(batch["image"]) for batch in stream]
            assert lengths == [0, 1] * 36


@pytest.fixture(scope="module")
def read(merged: Dataset) -> list[Sample]:
    """All samples as the plain reader gives them."""
    reader = SampleReader(open_split(merged, "train"))
    return [reader.read(row) for row in range(SAMPLES)]


class TestMapStyle:
    def test_items_hold_what_the_shards_hold(self, merged: Dataset, read: list[Sample]) -> None:
        dataset = ShardDataset(merged.url, image_size=SIZE)
        assert len(dataset) == SAMPLES
        for item, one in zip((dataset[n] for n in range(SAMPLES)), read, strict=True):
            pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
            decode_into(one.jpg, pixels)
            assert item["image"].permute(1, 2, 0).numpy().tobytes() == pixels.tobytes()
            assert item["object_id"] == one.object_id
            assert item["sample_id"] % 2**64 == one.uid
            present, absent = (np.flatnonzero(item["labels"] == sign) for sign in (1, -1))
            assert (present.tolist(), absent.tolist()) == (one.positive, one.negative)
            ids = dataset.feasible.of(one.object_id)
            assert one.log_likelihood is not None
            assert np.allclose(item["likelihood"][ids], np.exp(one.log_likelihood), rtol=1e-5)
            assert item["likelihood"].count_nonzero() == len(ids)

    def test_names(self, merged: Dataset) -> None:
        for opened in (ShardDataset(merged.url), stream_of(merged.url)):
            assert opened.objects == opened.vocabulary.objects == merged.vocabulary.objects
            assert opened.attributes == merged.vocabulary.attributes
            assert opened.feasible.digest == merged.feasible.digest

    def test_indices_from_the_end_and_beyond(self, merged: Dataset) -> None:
        dataset = ShardDataset(merged.url, image_size=SIZE)
        assert dataset[-1]["sample_id"] == dataset[np.int64(71)]["sample_id"]
        for index in (72, -73):
            with pytest.raises(IndexError, match=f"index {index} of a dataset of 72"):
                dataset[index]
        with pytest.raises(TypeError):
            dataset[1.0]  # type: ignore[index]

    def test_without_likelihoods_where_there_are_none(self, small: Path, merged: Dataset) -> None:
        packed, test = str(small / "dataset"), "test"
        assert "likelihood" not in ShardDataset(packed, image_size=SIZE)[0]
        assert "likelihood" not in ShardDataset(merged.url, test, image_size=SIZE)[0]
        assert "likelihood" not in next(iter(stream_of(packed)))

    @pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
    def test_through_a_loader(self, merged: Dataset, context: str) -> None:
        dataset = ShardDataset(merged.url, image_size=SIZE)
        # All of its threads run in this process already when the workers are forked.
        expected = {item["sample_id"]: item for item in dataset.__getitems__(range(SAMPLES))}
        loader = DataLoader(
            dataset, batch_size=10, shuffle=True, num_workers=2, multiprocessing_context=context
        )
        for _ in range(2):
            self.check_batches(list(loader), expected)

    def test_through_a_loader_without_workers(self, merged: Dataset) -> None:
        dataset = ShardDataset(merged.url, image_size=SIZE)
        expected = {item["sample_id"]: item for item in (dataset[n] for n in range(SAMPLES))}
        self.check_batches(list(DataLoader(dataset, batch_size=10, shuffle=True)), expected)

    @staticmethod
    def check_batches(batches: list[dict[str, Any]], expected: dict[int, Any]) -> None:
        assert [len(batch["labels"]) for batch in batches] == [10] * 7 + [2]
        seen = []
        for batch in batches:
            for n, uid in enumerate(batch["sample_id"].tolist()):
                seen.append(uid)
                for name, value in expected[uid].items():
                    assert torch.equal(batch[name][n], torch.as_tensor(value)), name
        assert sorted(seen) == sorted(expected)


class TestProcesses:
    def test_pickles_open_the_root_again(self, merged: Dataset) -> None:
        dataset, stream = ShardDataset(merged.url, image_size=SIZE), stream_of(merged.url)
        item, batches = dataset[5], list(stream)
        stream.load_state_dict(stream.state_dict(batches[0]))
        data = pickle.dumps((dataset, stream))
        assert len(data) < 5_000
        dataset, stream = pickle.loads(data)
        assert all(
            torch.equal(torch.as_tensor(item[k]), torch.as_tensor(v)) for k, v in dataset[5].items()
        )
        assert [plain(one) for one in stream] == [plain(one) for one in batches[1:]]

    def test_another_root_in_the_place_is_refused(self, merged: Dataset, tmp_path: Path) -> None:
        place = tmp_path / "root"
        place.symlink_to(merged.url)
        data = pickle.dumps(ShardDataset(place, "test", image_size=SIZE))
        place.unlink()
        place.symlink_to(Path(merged.url).parent / "dataset")
        with pytest.raises(DataError, match=r"it was .* in the process that opened the root"):
            pickle.loads(data)

    @pytest.mark.slow
    @pytest.mark.parametrize("workers", [1, 2])
    def test_spawned_workers(self, merged: Dataset, workers: int) -> None:
        stream = stream_of(merged.url)
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            multiprocessing_context="spawn",
            persistent_workers=True,
        )
        for epoch in (0, 1):
            stream.set_epoch(epoch)
            assert [plain(one) for one in loader] == [plain(one) for one in stream]


def smaller(photo: Image.Image) -> torch.Tensor:
    """Grey, 8 x 8."""
    assert photo.mode == "RGB"
    return torch.from_numpy(np.array(photo.convert("L").resize((8, 8))))


class TestTransform:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_it_gets_the_crop_as_stored(
        self, merged: Dataset, read: list[Sample], workers: int
    ) -> None:
        expected = {one.uid: smaller(Image.open(io.BytesIO(one.jpg))) for one in read}
        dataset = ShardDataset(merged.url, transform=smaller)
        stream = stream_of(merged.url, transform=smaller)
        decoded = visits(list(stream_of(merged.url)))
        batches = iterate(stream, workers)
        assert visits(batches) == decoded
        batches += list(DataLoader(dataset, batch_size=9, num_workers=workers))
        for batch in batches:
            for uid, image in zip(batch["sample_id"].tolist(), batch["image"], strict=True):
                assert torch.equal(image, expected[uid % 2**64])

    def test_its_own_errors_are_not_changed(self, merged: Dataset) -> None:
        def fails(photo: Image.Image) -> None:
            raise OSError(f"no room for {photo.size}")

        with pytest.raises(OSError, match="no room for"):
            ShardDataset(merged.url, transform=fails)[0]


class TestDamage:
    @pytest.mark.parametrize("transform", [None, pytest.param(smaller, marks=pytest.mark.slow)])
    def test_a_damaged_sample_is_named(
        self, merged: Dataset, tmp_path: Path, transform: Any
    ) -> None:
        damaged = damaged_copy(merged, tmp_path / "root", "jpg_flip")
        root, (uid,) = str(tmp_path / "root"), damaged.uids
        said = rf"(?s){root}/{damaged.key}: sample uid {uid:016x}: crc32 .*: restore it"
        dataset = ShardDataset(root, image_size=SIZE, transform=transform)
        for workers in (0, 2):
            with pytest.raises(DataError, match=said):
                list(DataLoader(dataset, batch_size=8, num_workers=workers))
            with pytest.raises(DataError, match=said):
                iterate(stream_of(root, transform=transform), workers)
        good = [n for n in range(SAMPLES) if self.readable(dataset, n)]
        assert len(good) == SAMPLES - 1

    @staticmethod
    def readable(dataset: ShardDataset, index: int) -> bool:
        try:
            return bool(dataset[index])
        except DataError:
            return False

    @pytest.mark.parametrize("transform", [None, smaller])
    def test_a_crop_that_does_not_decode(
        self, merged: Dataset, tmp_path: Path, transform: Any
    ) -> None:
        uid = undecodable_copy(merged, tmp_path / "root", split="train", row=3)
        dataset = ShardDataset(tmp_path / "root", image_size=SIZE, transform=transform)
        said = rf"uid {uid:016x}: a crop cannot be decoded: .*; its bytes are as they were packed"
        with pytest.raises(DataError, match=said):
            dataset[3]
        assert dataset[2]

    def test_no_such_root_or_split(self, merged: Dataset, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"holds no dataset\.json"):
            ShardDataset(tmp_path)
        with pytest.raises(DataError, match="has no split 'vla'; it has"):
            ShardStream(merged.url, "vla")
        with pytest.raises(ValueError, match="greater than or equal to 64"):
            ShardDataset(merged.url, image_size=8)


@pytest.fixture(scope="module")
def root(merged: Dataset, moto_s3: S3Server) -> str:
    """The merged dataset in a bucket."""
    with moto_s3.environment():
        root = moto_s3.url()
        upload(merged, root)
    return root


class TestRemote:
    @pytest.mark.parametrize("workers", [0, 1, 2])
    def test_a_stream(self, merged: Dataset, root: str, tmp_path: Path, workers: int) -> None:
        remote = iterate(stream_of(root, cache=tmp_path), workers)
        assert [plain(one) for one in remote] == [plain(one) for one in stream_of(merged.url)]

    def test_samples(
        self, merged: Dataset, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset = ShardDataset(root, image_size=SIZE, cache=tmp_path)
        local = ShardDataset(merged.url, image_size=SIZE)
        store, index = type(dataset._dataset.store), open_split(merged, "train").index
        read, asked = store.read, []

        def counting(self: Any, key: str, **where: Any) -> bytes:
            asked.append(where["length"])
            return read(self, key, **where)

        monkeypatch.setattr(store, "read", counting)
        rows = [70, 3, 4, 3]
        found = dataset.__getitems__(rows)
        assert sorted(asked) == sorted(index.length[[70, 3, 4]].tolist())
        for item, row in zip(found, rows, strict=True):
            for name, value in local[row].items():
                assert torch.equal(torch.as_tensor(item[name]), torch.as_tensor(value)), name
        assert dataset._builder is not None
        assert not dataset._builder[1].reader.prefetcher._held


def test_examples_of_the_docstrings(
    merged: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # of runs/cache
    found = doctest.testmod(vlal_dist.datasets, extraglobs={"root": merged.url})
    assert found.attempted >= 12 and found.failed == 0
