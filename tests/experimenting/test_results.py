"""Replicates belong to the predictions and are computed once; other results are refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from vlal_dist.data.format.dataset import open_dataset, open_split, read_labels
from vlal_dist.data.format.photo_groups import image_numbers
from vlal_dist.errors import DataError
from vlal_dist.evaluation.bootstrap import image_weights
from vlal_dist.evaluation.predictions import Predictions, label_matrix, save_predictions
from vlal_dist.experimenting.jobs import Job
from vlal_dist.experimenting.results import CACHE, SEED, ResultReader
from vlal_dist.method.metrics import average_precision
from vlal_dist.storage.store import open_store

R = 20


def predictions(small: Path, folder: Path, *, seed: int) -> Predictions:
    """Random scores of the test split, saved."""
    dataset = open_dataset(str(small / "dataset"), cache=small / "cache")
    split, labels = open_split(dataset, "test"), read_labels(dataset, "test")
    width = len(dataset.vocabulary.attributes)
    label = label_matrix(labels["positive"], labels["negative"], width=width)
    score = np.random.default_rng(seed).random(label.shape, dtype=np.float32)
    found = Predictions(np.arange(len(label)), np.array(split.index.uid), score, label)
    save_predictions(open_store(str(folder)), "predictions.safetensors", found)
    return found


def reader(small: Path, count: int = R) -> ResultReader:
    dataset = open_dataset(str(small / "dataset"), cache=small / "cache")
    return ResultReader(dataset, count=count)


def test_they_weigh_photos_and_are_kept(small: Path, tmp_path: Path) -> None:
    made = predictions(small, tmp_path, seed=1)
    first = reader(small)
    found = first.replicates(tmp_path)
    photo = image_numbers(open_split(first.dataset, "test"))
    assert found.keys() == first.dataset.vocabulary.groups().keys() and len(set(photo)) < len(photo)
    # Rows repeated by rounded weights: an independent way to the same mean.
    weight = image_weights(int(photo.max()) + 1, replicates=R, seed=SEED)[:, photo]
    times = np.rint(weight[0] * 2000).astype(int)
    label = np.repeat(made.label, times, axis=0)
    ap = average_precision(np.repeat(made.score, times, axis=0), label)
    defined = (made.label > 0).any(axis=0) & (made.label < 0).any(axis=0)
    assert found["overall"][0] == pytest.approx(ap[defined].mean(), abs=1e-3)

    kept = (tmp_path / CACHE).read_bytes()
    path = tmp_path / "predictions.safetensors"
    stat = path.stat()
    path.write_bytes(bytes(stat.st_size))  # nothing that could be read again
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert np.array_equal(reader(small).replicates(tmp_path)["overall"], found["overall"])
    assert (tmp_path / CACHE).read_bytes() == kept


def test_other_predictions_or_counts_are_computed_again(small: Path, tmp_path: Path) -> None:
    predictions(small, tmp_path, seed=1)
    both = reader(small)
    first = both.replicates(tmp_path)["overall"]
    predictions(small, tmp_path, seed=2)
    os.utime(tmp_path / "predictions.safetensors", ns=(1, 1))
    assert not np.array_equal(both.replicates(tmp_path)["overall"], first)
    assert len(reader(small, 5).replicates(tmp_path)["overall"]) == 5
    (tmp_path / CACHE).write_bytes(b"cut")
    assert len(reader(small).replicates(tmp_path)["overall"]) == R


def test_a_result_of_another_dataset_is_refused(small: Path, tmp_path: Path) -> None:
    job = Job("selective", 1, tmp_path, "", None, truth=False)
    assert reader(small).read(job) is None
    folder = tmp_path / "evaluation/test-model"
    made = predictions(small, folder, seed=1)
    digest = reader(small).dataset.digest
    result = {
        "dataset": {"digest": digest},
        "groups": [{"name": "overall", "mAP": 0.5, "num_classes": 3}],
        "truth": {"groups": [{"name": "overall", "mAP": 0.25, "num_classes": 4}]},
        "model": {"validation_map": 0.4, "epoch": 2},
    }
    (folder / "result.json").write_text(json.dumps(result))
    found = reader(small).read(job)
    assert found is not None and found.maps == {"overall": 0.5, "complete labels": 0.25}
    assert found.seconds is None and found.best_epoch == 2
    result["dataset"] = {"digest": "0" * 64}
    (folder / "result.json").write_text(json.dumps(result))
    with pytest.raises(DataError, match=r"another paths\.experiments"):
        reader(small).read(job)
    wrong = Predictions(made.row, made.uid[::-1].copy(), made.score, made.label)
    save_predictions(open_store(str(folder)), "predictions.safetensors", wrong)
    with pytest.raises(DataError, match="other samples"):
        reader(small).replicates(folder)
