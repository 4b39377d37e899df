"""Choice of the example crops, and shares over all crops."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tests.fixtures.tiny_dataset import VOCABULARY, make_instances
from vlal_dist.data.format.dataset import Dataset, open_split
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.evaluation.predictions import Predictions
from vlal_dist.evaluation.predictors import predict_constant
from vlal_dist.reporting.fig4 import (
    CROP_SIDE,
    build_example,
    choose_rows,
    tally,
    top_attributes,
)


def test_the_choice_knows_no_score_and_needs_a_positive(dataset: Dataset) -> None:
    constant = predict_constant(dataset, "test")
    constant.label[:30] = np.minimum(constant.label[:30], 0)
    first = choose_rows(constant, count=4, seed=1)
    constant.score[:] = np.random.default_rng(0).random(constant.score.shape)
    assert choose_rows(constant, count=4, seed=1).tolist() == first.tolist()
    assert all((constant.label[row] == 1).any() for row in first)
    assert choose_rows(constant, count=4, seed=2).tolist() != first.tolist()
    assert len(choose_rows(constant, count=99, seed=1)) <= 6
    assert choose_rows(constant, count=0, seed=1).tolist() == []


def test_top_attributes_ties_to_the_lower_id() -> None:
    score = np.array([[0.5, 0.9, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4]], np.float32)
    assert top_attributes(score, 3).tolist() == [[1, 0, 2], [3, 2, 1]]
    assert top_attributes(score[0], 9).tolist() == [1, 0, 2, 3]


def test_example_and_tally(dataset: Dataset) -> None:
    constant = predict_constant(dataset, "test")
    truth = np.full(constant.label.shape, -1, np.int8)
    for row, instance in enumerate(make_instances()):
        truth[row, instance.present] = 1
    reader = SampleReader(open_split(dataset, "test"))
    found = build_example(reader, constant, 7, vocabulary=VOCABULARY, truth=truth, k=99)
    instance = make_instances()[7]
    assert (found["instance_id"], found["image_id"]) == (instance.instance_id, "1")
    assert found["object_name"] == VOCABULARY.objects[instance.object_id]
    assert found["positives"] == [VOCABULARY.attributes[i] for i in instance.positive]
    assert [guess["name"] for guess in found["guesses"]] == list(VOCABULARY.attributes)
    for attribute, guess in enumerate(found["guesses"]):
        assert guess["truth"] == ("present" if attribute in instance.present else "absent")
        if guess["kind"] != "unannotated":
            assert guess["kind"] == guess["truth"]
    image = Image.open(io.BytesIO(base64.b64decode(found["image"].split(",")[1])))
    assert image.size == (found["width"], found["height"]) and max(image.size) <= CROP_SIDE
    shares = tally(constant, truth, k=8)
    label = constant.label
    assert shares["present"] == pytest.approx((label == 1).mean())
    assert shares["present"] + shares["absent"] + shares["unannotated"] == pytest.approx(1)
    assert shares["unannotated_true"] == pytest.approx((truth[label == 0] == 1).mean())
    assert "unannotated_true" not in tally(constant, None, k=8)


def test_tally_of_nothing() -> None:
    empty = Predictions(
        row=np.zeros(0, np.int64),
        uid=np.zeros(0, np.uint64),
        score=np.zeros((0, 3), np.float32),
        label=np.zeros((0, 3), np.int8),
    )
    assert tally(empty, empty.label, k=2)["unannotated_true"] == 0
