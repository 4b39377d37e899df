"""The dataset of these tests, and what an undisturbed run on it ends with."""

from pathlib import Path

import pytest

from tests.reliability.harness import Job, each_once_an_epoch


@pytest.fixture(scope="session")
def config(small: Path) -> Path:
    """`config.yaml` of a merged dataset; leave it as it is."""
    return small / "config.yaml"


@pytest.fixture(scope="session")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two ranks from the beginning to the end."""
    job = Job(config, tmp_path_factory.mktemp("undisturbed"))
    start = job.start()
    assert start.wait() == 0, start.text()
    start.wait_for_all(timeout_s=5)
    each_once_an_epoch(job.trained(), steps=4)
    return job
