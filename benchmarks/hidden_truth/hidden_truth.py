"""Share of the ignored attributes that are really present, for several ways of drawing them.

    python -m benchmarks.hidden_truth.hidden_truth --config CONFIG --truth FILE [--visits 4]
        [--num-ignore 5 10 20 30] [--markdown FILE] [--section.key value ...]

FILE is what clean put aside (clean.hide; in the instances root), or complete labels of rendered
data (the demo's truth.parquet). Reads the merged dataset in paths.merged; trains nothing. For every
crop of data.train_split the ignore sets of its first visits are drawn as training draws them
(training.seed, method.draw_over, the crop's uid, the visit), in five ways: weighted by the
likelihood (Fig. 3 of the paper), not at all, or by how often attribute and object were annotated
present together; at random, or the top ones by that weight (the same at every visit). Chance is
what ignoring every unannotated feasible pair gives, whatever NUM_IGNORE is.

Counted are unannotated feasible pairs, as being drawn has no effect elsewhere. Spreads are standard
deviations over visits.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.common.harness import finish, make_parser, table
from vlal_dist.config.load import parse_command_line
from vlal_dist.config.sections import Config
from vlal_dist.data.format.dataset import Dataset, open_dataset, open_split
from vlal_dist.data.loading.likelihoods import ObjectLikelihoods
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.errors import DataError, VlalError
from vlal_dist.experimenting.hidden_truth import (
    HiddenCount,
    count_hidden_truth,
    read_hidden_truth,
)
from vlal_dist.method.ignore_set import sample_ignore_set, top_ignore_set
from vlal_dist.method.likelihood import inverse_weights
from vlal_dist.reporting.selective_sections import TrainingCrops, read_training_crops

Weights = npt.NDArray[np.float32]
Counts = dict[tuple[str, int], list[HiddenCount]]
"""(way, NUM_IGNORE) -> one count per visit."""

CHANCE = "chance: every unannotated feasible pair"
WAYS = (
    ("random, by likelihood (the method)", "likelihood", "random"),
    ("top, by likelihood", "likelihood", "top"),
    ("random, uniform", "uniform", "random"),
    ("random, by co-occurrence", "cooccurrence", "random"),
    ("top, by co-occurrence", "cooccurrence", "top"),
)
TABLES: tuple[tuple[str, Callable[[HiddenCount], float]], ...] = (
    (
        "Of the ignored pairs whose truth is known, really present, %",
        lambda count: 100 * count.positive_share,
    ),
    ("Of all pairs really present, ignored, %", lambda count: 100 * count.hidden_share),
    ("Ignored per crop and visit", lambda count: count.per_crop),
    ("Of the ignored pairs, truth known, %", lambda count: 100 * count.known_share),
)


def read_crops(dataset: Dataset, config: Config) -> TrainingCrops:
    """All crops of the training split; DataError: the dataset has no likelihoods of it."""
    split, likelihood = config.data.train_split, dataset.manifest["likelihood"]
    if likelihood is None or split not in likelihood["splits"]:
        raise DataError(
            f"{dataset.url} has no likelihoods of split {split}; run vlal score and vlal "
            "merge, and give the root that merge wrote as --paths.merged"
        )
    return read_training_crops(dataset, split, temperature=config.scoring.temperature, most=None)


def read_weights(dataset: Dataset, crops: TrainingCrops) -> dict[str, Weights]:
    """Name -> float32 [N, A], max weight / weight as training makes it; infinite: infeasible."""
    found = {"likelihood": crops.inverse_weight}
    corpus = ConcatSplits([open_split(dataset, crops.split)])
    for name in ("uniform", "cooccurrence"):
        read = ObjectLikelihoods(corpus, dataset.feasible, cooccurrence=name == "cooccurrence")
        values, indptr = read(np.arange(len(corpus), dtype=np.int64), ())
        found[name] = np.full(crops.feasible.shape, np.inf, np.float32)
        # The ragged rows have each row's feasible attributes in ascending order, as the mask has.
        found[name][crops.feasible] = inverse_weights(values, indptr)
    return found


def draw_masks(
    crops: TrainingCrops, weights: Weights, draw: str, number: int, config: Config, visits: int
) -> list[npt.NDArray[np.bool_]]:
    """Omega_Ignore of all crops, bool [N, A], at each visit; one of `top`, the same at all."""
    drawable = crops.feasible
    if config.method.draw_over == "unannotated":
        drawable = drawable & (crops.label == 0)
    weight, uid = torch.from_numpy(weights), torch.from_numpy(crops.uid.view(np.int64))
    given: dict[str, Any] = {"drawable": torch.from_numpy(drawable), "num_ignore": number}
    if draw == "top":
        return [top_ignore_set(inverse_weight=weight, **given).numpy()]
    seed = config.training.seed
    return [
        sample_ignore_set(
            inverse_weight=weight, **given, uid=uid, visit=torch.full_like(uid, visit), seed=seed
        ).numpy()
        for visit in range(visits)
    ]


def cell(counts: Sequence[HiddenCount], measure: Callable[[HiddenCount], float]) -> str:
    """One number, with its spread over visits where there are some."""
    values = [measure(one) for one in counts]
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def markdown(chance: HiddenCount, found: Counts, num_ignores: Sequence[int]) -> str:
    """A table per quantity: a line per way, a column per NUM_IGNORE."""
    parts = []
    for title, measure in TABLES:
        rows = [[CHANCE, *[cell([chance], measure)] * len(num_ignores)]]
        for name, _, _ in WAYS:
            rows.append([name, *(cell(found[name, number], measure) for number in num_ignores)])
        parts.append(table([title, *(f"NUM_IGNORE {k}" for k in num_ignores)], rows))
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Read, draw, count; print and write the tables."""
    parser = make_parser(__doc__)
    parser.epilog = "Other flags are settings, --section.key value, as all programs take them."
    parser.add_argument("--truth", required=True, help="Parquet file (path or URL)")
    parser.add_argument("--visits", type=int, default=4, help="of each crop, from the first")
    parser.add_argument("--num-ignore", type=int, nargs="+", default=[5, 10, 20, 30])
    given, rest = parser.parse_known_args(argv)
    if given.visits < 1 or min(given.num_ignore) < 1:
        parser.error("--visits and --num-ignore must be 1 or more")
    try:
        config = parse_command_line(
            rest, flags=(), sections=("paths", "data", "method", "training")
        ).config
        dataset = open_dataset(config.paths.merged, cache=Path(config.paths.cache))
        crops = read_crops(dataset, config)
        weights = read_weights(dataset, crops)
        truth = read_hidden_truth(given.truth, dataset, crops.split)
    except VlalError as error:
        sys.stderr.write(f"hidden_truth: error: {error}\n")
        sys.exit(error.exit_code)

    def count(drawn: npt.NDArray[np.bool_]) -> HiddenCount:
        return count_hidden_truth(drawn, feasible=crops.feasible, label=crops.label, truth=truth)

    chance = count(crops.feasible)
    found = {
        (name, number): [
            count(drawn)
            for drawn in draw_masks(crops, weights[by], draw, number, config, given.visits)
        ]
        for name, by, draw in WAYS
        for number in given.num_ignore
    }
    text = (
        f"{crops.dataset}, {crops.split}: {chance.crops:,} crops, {chance.ignored:,} unannotated "
        f"feasible pairs, the truth of {chance.known:,} known, {chance.hidden:,} really present; "
        f"visits {given.visits}, method.draw_over {config.method.draw_over}, seed "
        f"{config.training.seed}.\n\n" + markdown(chance, found, given.num_ignore)
    )
    finish(given, text)


if __name__ == "__main__":
    main()
