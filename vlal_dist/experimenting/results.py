"""Test results of finished runs, with bootstrap replicates of their mAP."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from vlal_dist.data.format.dataset import Dataset, open_split
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
        seconds: of its commands, over all attempts that were not killed; None if unknown.
    """

    maps: dict[str, float | None]
    num_classes: dict[str, int]
    replicates: dict[str, Float64]
    validation_map: float
    best_epoch: int
    seconds: float | None


class ResultReader:
    """Reads results of runs on one dataset's test split; replicates are computed once, and kept.

    Args:
        dataset: the dataset that runs were evaluated on.
        count: R, bootstrap replicates.
    """

    def __init__(self, dataset: Dataset, *, count: int) -> None:
        self.dataset, self.count = dataset, count

    def read(self, job: Job) -> RunResult | None:
        """The result of a run; None while there is none.

        Raises:
            DataError: it was evaluated on another dataset.
        """
        if not is_done(job):
            return None
        folder = job.root / TEST
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if result["dataset"]["digest"] != self.dataset.digest:
            raise DataError(
                f"{folder} was evaluated on a dataset with digest {result['dataset']['digest']}, "
                f"{self.dataset.url} has {self.dataset.digest}; give another paths.experiments, or "
                "the former paths.dataset"
            )
        groups = {group["name"]: group for group in result["groups"]}
        if result["truth"] is not None:
            groups[COMPLETE] = result["truth"]["groups"][0]
        return RunResult(
            maps={name: group["mAP"] for name, group in groups.items()},
            num_classes={name: group["num_classes"] for name, group in groups.items()},
            replicates=self.replicates(folder),
            validation_map=result["model"]["validation_map"],
            best_epoch=result["model"]["epoch"],
            seconds=read_json(job.root / SECONDS).get("seconds"),
        )

    def replicates(self, folder: Path) -> dict[str, Float64]:
        """Group -> float64 [R] of the predictions in a folder."""
        stat = (folder / "predictions.safetensors").stat()
        key = f"{self.dataset.digest} {self.count} {SEED} {stat.st_size} {stat.st_mtime_ns}"
        try:
            with safetensors.safe_open(folder / CACHE, "numpy") as file:
                if (file.metadata() or {}).get("of") == key:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError):
            pass  # absent or damaged
        store = open_store(str(folder))
        predictions = load_predictions(store, "predictions.safetensors")
        if not np.array_equal(predictions.uid, open_split(self.dataset, "test").index.uid):
            raise DataError(f"{folder} names other samples than {self.dataset.url}; evaluate again")
        ap = weighted_average_precision(predictions.score, predictions.label, self._weight)
        groups = self.dataset.vocabulary.groups()
        found = {name: mean_average_precision(ap, ids) for name, ids in groups.items()}
        store.replace(CACHE, safetensors.numpy.save(found, metadata={"of": key}))
        return found

    @cached_property
    def _weight(self) -> Float64:
        photo = image_numbers(open_split(self.dataset, "test"))
        weight = image_weights(int(photo.max()) + 1, replicates=self.count, seed=SEED)
        return weight[:, photo]
