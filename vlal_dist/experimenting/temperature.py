"""Tau of Eq. (2) of the likelihoods that training reads, for the rows at other temperatures."""

from pathlib import Path

from vlal_dist.data.dataset import open_dataset
from vlal_dist.data.scores import finished_manifest
from vlal_dist.errors import DataError
from vlal_dist.storage.store import open_store


def stored_temperature(*, dataset_url: str, scores_url: str | None, cache: Path) -> float:
    """The scorer's, as merge or score_clip recorded it.

    Args:
        dataset_url: merged dataset.
        scores_url: score root, where the likelihoods come from there; None: from the tars.
        cache: local folder for index files.

    Raises:
        DataError: samples without likelihood, or scoring has not finished.
    """
    if scores_url is not None:
        return float(finished_manifest(open_store(scores_url))["temperature"])
    likelihood = open_dataset(dataset_url, cache=cache).manifest["likelihood"]
    if likelihood is None:
        raise DataError(
            f"{dataset_url} holds samples without likelihood; run score_clip and shard_tools "
            "merge, or point paths.merged at what merge wrote"
        )
    return float(likelihood["temperature"])
