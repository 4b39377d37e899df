"""A packed, scored and merged small dataset, once for the rooms' tests."""

from pathlib import Path

import pytest

from tests.scored import write_scores
from tests.small import run_all, write_small_vaw


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `config.yaml`, `dataset`, `scores` and `merged`; leave it as it is."""
    folder = tmp_path_factory.mktemp("training") / "small"
    config = write_small_vaw(folder)
    run_all(config, ["clean", "pack"])
    write_scores(folder)
    run_all(config, ["merge"])
    return folder
