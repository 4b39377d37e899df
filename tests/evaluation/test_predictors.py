"""Predictors on the tiny dataset."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.fixtures.tiny_dataset import SAMPLES, VOCABULARY, make_instances
from vlal_dist.config.sections import DataConfig
from vlal_dist.data.format.dataset import Dataset, open_split
from vlal_dist.data.format.scores import (
    ShardScores,
    encode_scores,
    score_key,
    write_scores_manifest,
)
from vlal_dist.data.loading.batch_builder import BatchBuilder
from vlal_dist.data.loading.loader import evaluation_batches
from vlal_dist.data.loading.shard_reader import ShardReader
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.errors import DataError
from vlal_dist.evaluation.predictions import merge_predictions
from vlal_dist.evaluation.predictors import predict, predict_clip, predict_constant
from vlal_dist.storage.store import Store, open_store

WIDTH = len(VOCABULARY.attributes)
SCORER = "5" * 64


class Colour(nn.Module):
    """Logits from the mean colour; the object shifts the last; counts its training calls."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def forward(self, image: Tensor, object_id: Tensor) -> Tensor:
        self.modes.append(self.training)
        logits = torch.zeros(len(image), WIDTH)
        mean = image.mean(dim=(2, 3))
        logits[:, 0] = 9 * (mean[:, 2] - mean[:, 0])
        logits[:, 4] = -logits[:, 0]
        logits[:, -1] = object_id
        return logits


@pytest.fixture
def builder(dataset: Dataset):  # type: ignore[no-untyped-def]
    made = BatchBuilder(
        ShardReader(ConcatSplits([open_split(dataset, "test")])),
        dataset,
        DataConfig(image_size=64),
    )
    yield made
    made.close()


def run(model: nn.Module, builder: BatchBuilder, rows: np.ndarray, batch_size: int):  # type: ignore[no-untyped-def]
    return predict(
        model,
        evaluation_batches(builder, rows, batch_size=batch_size),
        num_attributes=WIDTH,
        device=torch.device("cpu"),
    )


def test_ranks_give_what_one_process_gives(dataset: Dataset, builder: BatchBuilder) -> None:
    model = Colour().train()
    whole = run(model, builder, np.arange(SAMPLES), 7)
    assert model.training and set(model.modes) == {False}
    # Rank 3 has no row at all, as when there are more ranks than batches.
    shares = [np.arange(0, SAMPLES, 2), np.arange(1, 20, 2), np.arange(21, SAMPLES, 2)]
    parts = [run(model, builder, rows, 5) for rows in (*shares, np.arange(0))]
    merged = merge_predictions(parts, num_samples=SAMPLES)
    for name in ("row", "uid", "label", "score"):
        assert np.array_equal(getattr(whole, name), getattr(merged, name)), name
    assert np.array_equal(whole.uid, open_split(dataset, "test").index.uid)
    for row, instance in enumerate(make_instances()):
        assert np.flatnonzero(whole.label[row] == 1).tolist() == instance.positive
        assert np.flatnonzero(whole.label[row] == -1).tolist() == instance.negative
        assert (whole.score[row, 0] > 0.5) == (0 in instance.present)


def test_dummy_rows_are_left_out_and_progress_is_reported(builder: BatchBuilder) -> None:
    batch = next(evaluation_batches(builder, np.array([3, 4]), batch_size=2))
    batch.row_weight[1] = 0
    seen: list[int] = []
    found = predict(
        Colour(),
        [batch],
        num_attributes=WIDTH,
        device=torch.device("cpu"),
        autocast=torch.bfloat16,
        advance=seen.append,
    )
    assert found.row.tolist() == [3] and seen == [1]


def test_a_diverged_model_is_named_and_left_in_its_mode(builder: BatchBuilder) -> None:
    class Diverged(nn.Module):
        def forward(self, image: Tensor, object_id: Tensor) -> Tensor:
            return torch.full((len(image), WIDTH), torch.nan)

    model = Diverged().train()
    with pytest.raises(DataError, match="diverged"):
        run(model, builder, np.arange(4), 4)
    assert model.training


def test_constant(dataset: Dataset, builder: BatchBuilder) -> None:
    found = predict_constant(dataset, "test")
    whole = run(Colour(), builder, np.arange(SAMPLES), 9)
    assert np.array_equal(found.label, whole.label)
    assert np.array_equal(found.uid, whole.uid)
    assert (found.score == 0.5).all()


def write_scores(dataset: Dataset, root: Path, **changes: object) -> Store:
    """Cosine = 0.01 x attribute id - 0.02, minus the row; as score_clip would write it."""
    store = open_store(str(root))
    split = open_split(dataset, "test")
    digests = {
        "feasible_digest": dataset.feasible.digest,
        "vocabulary_digest": VOCABULARY.digest,
        "scorer_digest": SCORER,
    }
    for number, shard in enumerate(split.shards):
        rows = np.flatnonzero(split.index.shard == number)
        ids = [dataset.feasible.of(int(owner)) for owner in split.index.object_id[rows]]
        cosine = [0.01 * one - 0.02 for one in ids]
        cosine[0][-1] = 1.0000001  # what rounding does
        scores = ShardScores(
            uid=np.array(split.index.uid[rows]),
            embedding=np.ones((len(rows), 1), np.float32),
            indptr=np.concatenate([[0], np.cumsum([len(one) for one in ids])]).astype(np.int64),
            similarity=np.concatenate(cosine).astype(np.float32),
            header={**digests, "shard_sha256": shard.sha256, "temperature": "0.01"},
        )
        key = score_key("test", shard_sha256=shard.sha256, scorer_digest=SCORER)
        store.create(key, encode_scores(scores))
    manifest = {**digests, "dataset_digest": dataset.digest}
    manifest["splits"] = {"test": {"samples": 5, "shards": 1}}
    manifest |= {"temperature": 0.01, **changes}
    write_scores_manifest(store, manifest)
    return store


def test_clip_scores_feasible_attributes_only(dataset: Dataset, tmp_path: Path) -> None:
    found = predict_clip(dataset, "test", scores=write_scores(dataset, tmp_path / "scores"))
    constant = predict_constant(dataset, "test")
    assert np.array_equal(found.label, constant.label)
    index = open_split(dataset, "test").index
    for row in range(1, SAMPLES):
        feasible = dataset.feasible.of(int(index.object_id[row]))
        others = np.setdiff1d(np.arange(WIDTH), feasible)
        assert (found.score[row, others] == 0).all()
        if index.shard[row] == index.shard[row - 1]:  # the first of a shard is altered
            expected = (0.01 * feasible - 0.02 + 1) / 2
            assert found.score[row, feasible] == pytest.approx(expected, abs=1e-6)
    assert found.score.max() == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"splits": {"train": {"samples": 5, "shards": 1}}}, "cover the splits train, not test"),
        ({"feasible_digest": "0" * 64}, "feasible"),
        ({"vocabulary_digest": "0" * 64}, "vocabulary"),
    ],
)
def test_scores_of_something_else_are_refused(
    dataset: Dataset, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        predict_clip(dataset, "test", scores=write_scores(dataset, tmp_path / "s", **changes))
