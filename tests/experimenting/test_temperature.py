"""The temperature is read from where merge and score_clip recorded it."""

from pathlib import Path

import pytest

from tests.fixtures.scored_dataset import TEMPERATURE
from vlal_dist.config.sections import DataConfig, PathsConfig
from vlal_dist.errors import DataError
from vlal_dist.experimenting.jobs import stored_temperature


def test_of_tars_and_of_score_files(small: Path) -> None:
    paths = PathsConfig(
        merged=str(small / "merged"), scores=str(small / "scores"), cache=str(small / "cache")
    )
    for likelihood in ("tar", "scores"):
        data = DataConfig.model_validate({"likelihood": likelihood})
        assert stored_temperature(data, paths) == TEMPERATURE
    dataset = paths.model_copy(update={"merged": str(small / "dataset")})
    with pytest.raises(DataError, match="run vlal score and vlal merge"):
        stored_temperature(DataConfig(), dataset)
