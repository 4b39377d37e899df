"""Saved models load as they were; weights that do not fit their description are refused."""

import json
from pathlib import Path

import pytest
import torch

from tests.fixtures.tiny_dataset import VOCABULARY
from vlal_dist.config.sections import ModelConfig
from vlal_dist.errors import DataError, NotFoundError
from vlal_dist.method.model import AttributeClassifier, build_model
from vlal_dist.release.saved_model import (
    SavedModelInfo,
    encode_weights,
    load_saved_model,
    write_model,
)
from vlal_dist.storage.store import Store, open_store
from vlal_dist.vocabulary import Vocabulary

INFO = SavedModelInfo(
    layers=ModelConfig(depth=18, width=8),
    num_objects=len(VOCABULARY.objects),
    num_attributes=len(VOCABULARY.attributes),
    image_size=64,
    normalize=False,
    vocabulary_digest=VOCABULARY.digest,
    feasible_digest="f" * 64,
    profile="paper",
    loss="selective",
    seed=99,
    step=120,
    epoch=2,
    validation_map=0.5,
)


def tiny_model(seed: int = 0) -> AttributeClassifier:
    return build_model(
        INFO.layers,
        num_objects=INFO.num_objects,
        num_attributes=INFO.num_attributes,
        seed=seed,
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "run"))


def test_round_trip_and_replacement(store: Store) -> None:
    write_model(store, "best", encode_weights(tiny_model(1)), INFO)
    model = tiny_model(2)
    model(torch.rand(2, 3, 64, 64), torch.tensor([0, 1]))  # moves the BatchNorm buffers
    write_model(store, "best", encode_weights(model), INFO)
    loaded, info = load_saved_model(store, "best", vocabulary=VOCABULARY)
    assert info == INFO
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert store.list_keys() == ["best/model.json", "best/model.safetensors"]


def test_another_vocabulary_is_refused_with_both_digests(store: Store) -> None:
    write_model(store, "best", encode_weights(tiny_model()), INFO)
    other = Vocabulary(("ball",), VOCABULARY.attributes, VOCABULARY.attribute_type,
                       VOCABULARY.prevalence)  # fmt: skip
    with pytest.raises(DataError, match=f"{VOCABULARY.digest}.*{other.digest}"):
        load_saved_model(store, "best", vocabulary=other)


def test_an_interrupted_save_is_noticed(store: Store) -> None:
    write_model(store, "best", encode_weights(tiny_model(1)), INFO)
    first = store.read("best/model.json")
    write_model(store, "best", encode_weights(tiny_model(2)), INFO)
    store.replace("best/model.json", first)
    with pytest.raises(DataError, match="was interrupted"):
        load_saved_model(store, "best", vocabulary=VOCABULARY)


def test_absent_damaged_or_newer_description(store: Store) -> None:
    with pytest.raises(NotFoundError):
        load_saved_model(store, "best", vocabulary=VOCABULARY)
    write_model(store, "best", encode_weights(tiny_model()), INFO)
    values = json.loads(store.read("best/model.json"))
    store.replace("best/model.json", json.dumps({**values, "format": 2}).encode())
    with pytest.raises(DataError, match="format 2"):
        load_saved_model(store, "best", vocabulary=VOCABULARY)
    store.replace("best/model.json", json.dumps({**values, "depth": 34}).encode())
    with pytest.raises(DataError, match="does not fit a ResNet-34"):
        load_saved_model(store, "best", vocabulary=VOCABULARY)
    del values["depth"]
    store.replace("best/model.json", json.dumps(values).encode())
    with pytest.raises(DataError, match="damaged"):
        load_saved_model(store, "best", vocabulary=VOCABULARY)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_attributes": 10**12}, "does not fit a ResNet-18"),
        ({"num_objects": 10**15}, "does not fit a ResNet-18"),
        ({"num_objects": 2**62}, "does not fit a ResNet-18"),
        ({"width": 10**6}, "does not fit a ResNet-18"),
        ({"image_size": 10**9}, "image_size: Input should be less than or equal to 16384"),
        ({"validation_map": 1.5}, "validation_map: Input should be less than or equal to 1"),
        ({"step": "3"}, "step: Input should be a valid integer"),
        ({"normalize": None}, "normalize: Input should be a valid boolean"),
    ],
)
def test_sizes_are_compared_with_the_file_before_memory_is_taken(
    store: Store, change: dict[str, object], problem: str
) -> None:
    write_model(store, "best", encode_weights(tiny_model()), INFO)
    values = json.loads(store.read("best/model.json")) | change
    store.replace("best/model.json", json.dumps(values).encode())
    with pytest.raises(DataError, match=problem) as error:
        load_saved_model(store, "best", vocabulary=VOCABULARY)
    assert len(str(error.value)) < 1000
