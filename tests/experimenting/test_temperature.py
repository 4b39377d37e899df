"""The temperature is where merge and score_clip left it."""

from pathlib import Path

import pytest

from tests.fixtures.scored_dataset import TEMPERATURE
from vlal_dist.errors import DataError
from vlal_dist.experimenting.jobs import stored_temperature


def test_of_tars_and_of_score_files(small: Path) -> None:
    cache = small / "cache"
    for url, scores in (("merged", None), ("dataset", str(small / "scores"))):
        found = stored_temperature(dataset_url=str(small / url), scores_url=scores, cache=cache)
        assert found == TEMPERATURE
    with pytest.raises(DataError, match="run score_clip and shard_tools merge"):
        stored_temperature(dataset_url=str(small / "dataset"), scores_url=None, cache=cache)
