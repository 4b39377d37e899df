"""Rows of a table: means and spreads over seeds, and paired differences from the reference row.

Shares are of 1. R bootstrap replicates.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlal_dist.evaluation.bootstrap import interval
from vlal_dist.experimenting.grid import REFERENCE, Variant
from vlal_dist.experimenting.results import RunResult

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
        pairs = [
            (runs[variant.name, seed], runs[REFERENCE, seed])
            for seed in have
            if (REFERENCE, seed) in runs and variant.name != REFERENCE
        ]
        seconds = [run.seconds for run in own if run.seconds is not None]
        groups = list(own[0].maps) if own else []
        rows.append(
            SummaryRow(
                variant=variant,
                seeds=have,
                failed=[seed for seed in seeds if (variant.name, seed) in failed],
                maps=_estimates(groups, [(run, None) for run in own]),
                differences=_estimates(groups, pairs),
                validation_map=_mean([run.validation_map for run in own]),
                seconds=_mean(seconds),
            )
        )
    return rows


def _estimates(
    groups: Sequence[str], pairs: Sequence[tuple[RunResult, RunResult | None]]
) -> dict[str, Estimate]:
    """Group -> estimate of first - second (None: 0), over the pairs; undefined groups left out.

    Replicates are subtracted pair by pair: both of a pair see the same photos.
    """
    found = {}
    for group in groups:
        values, replicates = [], []
        for first, second in pairs:
            value = first.maps[group]
            other = 0.0 if second is None else second.maps.get(group)
            if value is not None and other is not None:
                values.append(value - other)
            runs = [first] if second is None else [first, second]
            if all(group in run.replicates for run in runs):
                base = 0.0 if second is None else second.replicates[group]
                replicates.append(first.replicates[group] - base)
        if not values or len(values) < len(pairs):
            continue
        mean = statistics.fmean(values)
        low, high = None, None
        if len(replicates) == len(pairs):
            low, high = interval(mean, np.mean(replicates, axis=0))
        sd = statistics.stdev(values) if len(values) > 1 else None
        found[group] = Estimate(mean, sd, low, high, len(values))
    return found


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
