"""What finished runs left behind, and the bootstrap replicates of their test mAP."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from vlal_dist.data.format.dataset import Dataset, open_dataset, open_split
from vlal_dist.data.format.photo_groups import image_numbers
from vlal_dist.errors import DataError
from vlal_dist.evaluation.bootstrap import (
    image_weights,
    mean_average_precision,
    weighted_average_precision,
)
from vlal_dist.evaluation.predictions import load_predictions
from vlal_dist.experimenting.jobs import SECONDS, TEST, Job, is_done, read_json
from vlal_dist.storage.store import open_store

Float64 = npt.NDArray[np.float64]

OVERALL, COMPLETE = "overall", "complete labels"
SEED = 0
"""Of the weights of photos: the same in all runs and tables, so that differences are paired."""
CACHE = "bootstrap.safetensors"


@dataclass(frozen=True)
class RunResult:
    """One finished run on the test split.

    Attributes:
        maps: group -> mAP, a share of 1, None where no AP is defined; `COMPLETE` too if known.
        num_classes: group -> attributes behind it.
        replicates: group -> float64 [R], mAP in each bootstrap replicate; not of `COMPLETE`.
        validation_map: of the best model, a share of 1.
        best_epoch: the epoch that ended with it, from 1.
        seconds: of its commands, over all attempts that ended in order; None if unknown.
    """

    maps: dict[str, float | None]
    num_classes: dict[str, int]
    replicates: dict[str, Float64]
    validation_map: float
    best_epoch: int
    seconds: float | None


class Replicates:
    """Bootstrap replicates of runs on one dataset's test split; computed once, kept beside them.

    Args:
        dataset_url: the dataset that runs were evaluated on.
        cache: local folder for index files.
        count: R.
    """

    def __init__(self, dataset_url: str, *, cache: Path, count: int) -> None:
        self._url, self._cache, self._count = dataset_url, cache, count
        self._known: dict[str, dict[str, Float64]] = {}

    @cached_property
    def dataset(self) -> Dataset:
        """The dataset, opened at the first use."""
        return open_dataset(self._url, cache=self._cache)

    @cached_property
    def _weight(self) -> Float64:
        photo = image_numbers(open_split(self.dataset, "test"))
        weight = image_weights(int(photo.max()) + 1, replicates=self._count, seed=SEED)
        return weight[:, photo]

    def of(self, folder: Path) -> dict[str, Float64]:
        """Group -> float64 [R] of the predictions in a folder."""
        stat = (folder / "predictions.safetensors").stat()
        key = f"{self.dataset.digest} {self._count} {SEED} {stat.st_size} {stat.st_mtime_ns}"
        if key not in self._known:
            self._known[key] = _read(folder / CACHE, key) or self._compute(folder, key)
        return self._known[key]

    def _compute(self, folder: Path, key: str) -> dict[str, Float64]:
        store = open_store(str(folder))
        predictions = load_predictions(store, "predictions.safetensors")
        if not np.array_equal(predictions.uid, open_split(self.dataset, "test").index.uid):
            raise DataError(f"{folder} names other samples than {self._url}; evaluate again")
        ap = weighted_average_precision(predictions.score, predictions.label, self._weight)
        groups = self.dataset.vocabulary.groups()
        found = {name: mean_average_precision(ap, ids) for name, ids in groups.items()}
        store.replace(CACHE, safetensors.numpy.save(found, metadata={"of": key}))
        return found


def collect(job: Job, replicates: Replicates) -> RunResult | None:
    """The result of a run; None while there is none.

    Raises:
        DataError: it was evaluated on another dataset.
    """
    if not is_done(job):
        return None
    folder = job.root / TEST
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if result["dataset"]["digest"] != replicates.dataset.digest:
        raise DataError(
            f"{folder} was evaluated on a dataset with digest {result['dataset']['digest']}, "
            f"{replicates.dataset.url} has {replicates.dataset.digest}; give another "
            "paths.experiments, or the former paths.dataset"
        )
    groups = {group["name"]: group for group in result["groups"]}
    if result["truth"] is not None:
        groups[COMPLETE] = result["truth"]["groups"][0]
    seconds = (read_json(job.root / SECONDS) or {}).get("seconds")
    return RunResult(
        maps={name: group["mAP"] for name, group in groups.items()},
        num_classes={name: group["num_classes"] for name, group in groups.items()},
        replicates=replicates.of(folder),
        validation_map=result["model"]["validation_map"],
        best_epoch=result["model"]["epoch"],
        seconds=None if seconds is None else float(str(seconds)),
    )


def _read(path: Path, key: str) -> dict[str, Float64] | None:
    """Replicates that were kept, if they are of these predictions."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("of") == key:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError):
        pass
    return None
