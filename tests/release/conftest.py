"""Fixture: a run on the tiny dataset, its random model evaluated and exported."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fixtures.tiny_dataset import write_dataset
from tests.fixtures.tiny_vaw import run
from tests.release.test_saved_model import INFO, tiny_model
from vlal_dist.release.saved_model import encode_weights, write_model
from vlal_dist.storage.store import open_store


@dataclass(frozen=True)
class Trained:
    """Paths of the run, shared by all tests: read only.

    Attributes:
        config: file for evaluate and export.
        dataset: its root, with the split test.
        run: the run's root, evaluated.
        export: what export wrote, thresholds (learned on test) included.
    """

    config: Path
    dataset: Path
    run: Path
    export: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    dataset = write_dataset(folder / "tiny")
    names = ("run", "export", "cache")
    paths = {"dataset": str(dataset), **{name: str(folder / name) for name in names}}
    values = {"paths": paths, "data": {"validation_split": "test"}, "export": {"min_annotated": 5}}
    config = folder / "config.yaml"
    config.write_text(json.dumps(values))
    write_model(open_store(str(folder / "run")), "best", encode_weights(tiny_model()), INFO)
    for program in ("vlal_dist.evaluate", "vlal_dist.export"):
        assert run(program, config) == 0
    return Trained(config, dataset, folder / "run", folder / "export")
