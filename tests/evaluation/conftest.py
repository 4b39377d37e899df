"""Fixtures: the tiny dataset, and its dense labels."""

from pathlib import Path

import pytest

from tests.fixtures.tiny_dataset import write_dataset, write_dense_labels
from vlal_dist.data.format.dataset import Dataset, open_dataset


@pytest.fixture(scope="session")
def dataset_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def dataset(dataset_root: Path, tmp_path: Path) -> Dataset:
    return open_dataset(str(dataset_root), cache=tmp_path / "cache")


@pytest.fixture
def truth_file(tmp_path: Path) -> Path:
    return write_dense_labels(tmp_path / "truth.parquet")
