"""A packed, scored and merged small dataset, once for the rooms' tests."""

from pathlib import Path

import pytest

from tests.scored import write_merged


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `config.yaml`, `dataset`, `scores` and `merged`; leave it as it is."""
    return write_merged(tmp_path_factory.mktemp("training") / "small")
