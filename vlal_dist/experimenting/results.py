"""Test results of finished runs: bootstrap replicates of each run, and the rows of a table.

A row has means and spreads over seeds, and paired differences from the reference row. Shares are
of 1. R bootstrap replicates.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    interval,
    mean_average_precision,
    weighted_average_precision,
)
from vlal_dist.evaluation.predictions import as_counted, load_predictions
from vlal_dist.evaluation.results import unannotated_of
from vlal_dist.experimenting.grid import REFERENCE, Variant
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
        validation_map: of the best model, a share of 1; None where it is undefined.
        best_epoch: the epoch that ended with it, from 1.
        seconds: of its commands, over all attempts that were not killed; None if unknown.
    """

    maps: dict[str, float | None]
    num_classes: dict[str, int]
    replicates: dict[str, Float64]
    validation_map: float | None
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
        result = read_json(folder / "result.json")
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
            replicates=self.replicates(folder, unannotated_of(result)),
            validation_map=result["model"]["validation_map"],
            best_epoch=result["model"]["epoch"],
            seconds=read_json(job.root / SECONDS).get("seconds"),
        )

    def replicates(self, folder: Path, unannotated: str = "excluded") -> dict[str, Float64]:
        """Group -> float64 [R] of the predictions in a folder, labels as `as_counted`."""
        stat = (folder / "predictions.safetensors").stat()
        key = f"{self.dataset.digest} {self.count} {SEED} {stat.st_size} {stat.st_mtime_ns}"
        key += "" if unannotated == "excluded" else f" {unannotated}"
        try:
            with safetensors.safe_open(folder / CACHE, "numpy") as file:
                if (file.metadata() or {}).get("of") == key:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError):
            pass  # absent or damaged
        store = open_store(str(folder))
        predictions = load_predictions(store, "predictions.safetensors")
        predictions = as_counted(predictions, unannotated)
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


Runs = Mapping[tuple[str, int], RunResult]
"""(row, seed) -> finished run."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, or a mean paired difference.

    Attributes:
        mean: over seeds.
        sd: sample standard deviation over seeds; None of a single one.
        low, high: ends of the central 95 % interval of the bootstrap over test photos, of the
            mean over seeds; None where the group has no replicates.
        seeds: how many.
    """

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True)
class SummaryRow:
    """One row of a table.

    Attributes:
        variant: the row.
        seeds: finished ones, in order.
        failed: seeds whose run failed.
        maps: group -> mAP; without the groups in which no AP is defined.
        differences: group -> this row - reference, over the seeds that both have; empty of the
            reference itself.
        validation_map: mean over seeds of the best model's; None without a run.
        seconds: mean over seeds of a run's; None where unknown.
    """

    variant: Variant
    seeds: list[int]
    failed: list[int]
    maps: dict[str, Estimate]
    differences: dict[str, Estimate]
    validation_map: float | None
    seconds: float | None


def summarise(
    variants: Sequence[Variant],
    runs: Runs,
    *,
    seeds: Sequence[int],
    failed: frozenset[tuple[str, int]] = frozenset(),
) -> list[SummaryRow]:
    """All rows of a table, those without a run too.

    Args:
        variants: in the table's order.
        runs: what has finished.
        seeds: of the experiment.
        failed: (row, seed) of failed runs.
    """
    rows = []
    for variant in variants:
        have = [seed for seed in seeds if (variant.name, seed) in runs]
        own = [runs[variant.name, seed] for seed in have]
        changes = [
            _difference(runs[variant.name, seed], runs[REFERENCE, seed])
            for seed in have
            if (REFERENCE, seed) in runs and variant.name != REFERENCE
        ]
        defined = [run.validation_map for run in own if run.validation_map is not None]
        seconds = [run.seconds for run in own if run.seconds is not None]
        rows.append(
            SummaryRow(
                variant=variant,
                seeds=have,
                failed=[seed for seed in seeds if (variant.name, seed) in failed],
                maps=_estimates(own),
                differences=_estimates(changes),
                validation_map=statistics.fmean(defined) if defined else None,
                seconds=statistics.fmean(seconds) if seconds else None,
            )
        )
    return rows


def _difference(one: RunResult, other: RunResult) -> RunResult:
    """`one` minus `other`, replicate by replicate: a pair of them weighs the photos alike."""
    maps: dict[str, float | None] = {}
    for group, value in one.maps.items():
        base = other.maps.get(group)
        maps[group] = None if value is None or base is None else value - base
    both = one.replicates.keys() & other.replicates.keys()
    replicates = {group: one.replicates[group] - other.replicates[group] for group in both}
    return replace(one, maps=maps, replicates=replicates)


def _estimates(runs: Sequence[RunResult]) -> dict[str, Estimate]:
    """Group -> estimate of its mean over runs; without the groups undefined in one of them."""
    found = {}
    for group in runs[0].maps if runs else ():
        values = [value for run in runs if (value := run.maps[group]) is not None]
        if len(values) < len(runs):
            continue
        mean = statistics.fmean(values)
        low, high = None, None
        if all(group in run.replicates for run in runs):
            low, high = interval(mean, np.mean([run.replicates[group] for run in runs], axis=0))
        sd = statistics.stdev(values) if len(values) > 1 else None
        found[group] = Estimate(mean, sd, low, high, len(values))
    return found
