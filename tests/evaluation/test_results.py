"""result.json, attributes.parquet and the printed row."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures.tiny_dataset import VOCABULARY, make_instances
from tests.release.test_saved_model import INFO
from vlal_dist.config.sections import EvaluationConfig
from vlal_dist.data.format.dataset import Dataset
from vlal_dist.errors import DataError
from vlal_dist.evaluation.dense_labels import DenseLabels
from vlal_dist.evaluation.predictions import Predictions
from vlal_dist.evaluation.predictors import predict_constant
from vlal_dist.evaluation.results import (
    build_result,
    encode_attributes,
    format_row,
    percent,
    read_attributes,
)
from vlal_dist.method.metrics import evaluate
from vlal_dist.storage.store import open_store

LARGE = VOCABULARY.attribute_ids["large"]


def all_labels() -> np.ndarray:
    label = np.full((len(make_instances()), len(VOCABULARY.attributes)), -1, np.int8)
    for row, instance in enumerate(make_instances()):
        label[row, instance.present] = 1
    return label


@pytest.fixture
def predictions(dataset: Dataset) -> Predictions:
    """Right of everything but `red`, where all are tied; `large` has no negative."""
    constant = predict_constant(dataset, "test")
    score = np.where(all_labels() == 1, 0.9, 0.1).astype(np.float32)
    score[:, VOCABULARY.attribute_ids["red"]] = 0.25
    constant.label[:, LARGE] = np.maximum(constant.label[:, LARGE], 0)
    return dataclasses.replace(constant, score=score)


def build(
    dataset: Dataset, predictions: Predictions, dense: DenseLabels | None = None
) -> dict[str, Any]:
    evaluation = evaluate(predictions.score, predictions.label, groups=VOCABULARY.groups(), top_k=3)
    config = EvaluationConfig(top_k=3)
    return build_result(config, dataset, predictions, evaluation, model=INFO.to_json(), dense=dense)


def test_groups_and_counts(dataset: Dataset, predictions: Predictions) -> None:
    result = json.loads(json.dumps(build(dataset, predictions), allow_nan=False))
    names = [group["name"] for group in result["groups"]]
    assert names == [
        *("overall", "head", "medium", "tail"),
        *("color", "other", "shape", "size", "texture"),
    ]
    groups = {group["name"]: group for group in result["groups"]}
    label = predictions.label[:, VOCABULARY.attribute_ids["red"]]
    share = (label == 1).sum() / (label != 0).sum()
    assert groups["overall"]["num_attributes"] == 8 and groups["overall"]["num_classes"] == 7
    assert groups["overall"]["mAP"] == pytest.approx((6 + share) / 7)
    assert groups["overall"]["mAP_vaw"] == pytest.approx((7 + share) / 8)
    assert groups["color"]["mAP"] == pytest.approx((1 + share) / 2)
    assert groups["size"]["num_classes"] == 1
    assert {"mA", "mR@3", "F1@3"} <= set(groups["overall"])
    assert result["excluded"] == ["large"]
    assert result["dataset"]["digest"] == dataset.digest
    assert result["model"]["step"] == INFO.step and result["name"] == "selective (paper)"
    assert result["num_positive"] == int((predictions.label == 1).sum())
    assert result["truth"] is None


def test_dense_labels_give_their_own_map(dataset: Dataset, predictions: Predictions) -> None:
    result = build(dataset, predictions, DenseLabels(label=all_labels(), unknown_names=["odd"]))
    overall = result["truth"]["groups"][0]
    share = (all_labels()[:, VOCABULARY.attribute_ids["red"]] == 1).mean()
    assert overall == {"name": "overall", "num_classes": 8, "mAP": pytest.approx((7 + share) / 8)}
    assert result["truth"]["unknown_names"] == ["odd"]
    assert "mAP_complete" in format_row(result)


def test_attributes_table(predictions: Predictions, tmp_path: Path) -> None:
    attributes = evaluate(predictions.score, predictions.label, groups={}).attributes
    data = encode_attributes(attributes, predictions.score, VOCABULARY)
    store = open_store(str(tmp_path))
    store.replace("a/attributes.parquet", data)
    rows = read_attributes(store, "a")
    assert [row["attribute"] for row in rows] == list(VOCABULARY.attributes)
    assert [row["type"] for row in rows] == list(VOCABULARY.attribute_type)
    for row, column in zip(rows, predictions.label.T, strict=True):
        counts = [row["num_positive"], row["num_negative"], row["num_unannotated"]]
        assert counts == [(column == 1).sum(), (column == -1).sum(), (column == 0).sum()]
    assert rows[LARGE]["ap"] is None and rows[0]["ap"] == 1
    # All rows count in the mean score, annotated or not.
    assert rows[4]["mean_score"] == pytest.approx(0.25)
    assert rows[0]["mean_score"] == pytest.approx(predictions.score[:, 0].mean())
    store.replace("a/attributes.parquet", data[:50])
    with pytest.raises(DataError, match="damaged"):
        read_attributes(store, "a")


def test_the_printed_row_has_counts_and_a_dash_where_undefined(
    dataset: Dataset, predictions: Predictions
) -> None:
    text = format_row(build(dataset, predictions))
    head, count, value = (line.split() for line in text.splitlines()[1:])
    assert head[-4:] == ["mAP_vaw", "mA", "mR@3", "F1@3"]
    assert count[1:3] == ["7/8", "3/3"] or count[1] == "7/8"
    # `large` has no negative, so VAW's evaluator leaves mA of its groups undefined.
    assert value[-3] == "-"
    assert len(head) - 2 == len(count) - 1 == len(value)


def test_percent() -> None:
    assert [percent(value) for value in (None, -1, 0.0, 0.68339)] == ["-", "-", "0.00", "68.34"]
