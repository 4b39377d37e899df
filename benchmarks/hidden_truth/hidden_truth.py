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
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Inputs:
    """What is drawn from and counted against.

    Attributes:
        crops: all of the training split.
        weights: name -> float32 [N, A], max weight / weight; infinite where infeasible.
        truth: int8 [N, A], +1, -1, or 0 where not known.
    """

    crops: TrainingCrops
    weights: dict[str, Weights]
    truth: npt.NDArray[np.int8]


def read_inputs(config: Config, truth: str) -> Inputs:
    """Read the merged dataset and the truth.

    Raises:
        DataError: no likelihoods in the dataset, or a truth that does not fit it.
    """
    dataset = open_dataset(config.paths.merged, cache=Path(config.paths.cache))
    split, likelihood = config.data.train_split, dataset.manifest["likelihood"]
    if likelihood is None or split not in likelihood["splits"]:
        raise DataError(
            f"{dataset.url} has no likelihoods of split {split}; run score_clip and shard_tools "
            "merge, and give the root that merge wrote as --paths.merged"
        )
    crops = read_training_crops(dataset, split, temperature=config.scoring.temperature, most=None)
    weights = {
        "likelihood": crops.inverse_weight,
        "uniform": object_weights(dataset, crops, cooccurrence=False),
        "cooccurrence": object_weights(dataset, crops, cooccurrence=True),
    }
    return Inputs(crops, weights, read_hidden_truth(truth, dataset, split))


def object_weights(dataset: Dataset, crops: TrainingCrops, *, cooccurrence: bool) -> Weights:
    """Inverse weights of a draw without CLIP, as training makes them: float32 [N, A]."""
    corpus = ConcatSplits([open_split(dataset, crops.split)])
    read = ObjectLikelihoods(corpus, dataset.feasible, cooccurrence=cooccurrence)
    values, indptr = read(np.arange(len(corpus), dtype=np.int64), ())
    dense = np.full(crops.feasible.shape, np.inf, np.float32)
    # The ragged rows have each row's feasible attributes in ascending order, as the mask has.
    dense[crops.feasible] = inverse_weights(values, indptr)
    return dense


def count_all(
    inputs: Inputs, *, num_ignores: Sequence[int], visits: int, draw_over: str, seed: int
) -> tuple[HiddenCount, Counts]:
    """Chance, and every way at every NUM_IGNORE."""
    crops = inputs.crops

    def count(drawn: npt.NDArray[np.bool_]) -> HiddenCount:
        return count_hidden_truth(
            drawn, feasible=crops.feasible, label=crops.label, truth=inputs.truth
        )

    drawable = crops.feasible & (crops.label == 0) if draw_over == "unannotated" else crops.feasible
    uid = torch.from_numpy(crops.uid.view(np.int64))
    found: Counts = {}
    for name, weights, draw in WAYS:
        given = {
            "inverse_weight": torch.from_numpy(inputs.weights[weights]),
            "drawable": torch.from_numpy(drawable),
        }
        for number in num_ignores:
            if draw == "top":
                drawn = [top_ignore_set(**given, num_ignore=number)]
            else:
                drawn = [
                    sample_ignore_set(
                        **given,
                        num_ignore=number,
                        uid=uid,
                        visit=torch.full_like(uid, visit),
                        seed=seed,
                    )
                    for visit in range(visits)
                ]
            found[name, number] = [count(one.numpy()) for one in drawn]
    return count(crops.feasible), found


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
        inputs = read_inputs(config, given.truth)
    except VlalError as error:
        sys.stderr.write(f"hidden_truth: error: {error}\n")
        sys.exit(error.exit_code)
    draw_over, seed, crops = config.method.draw_over, config.training.seed, inputs.crops
    chance, found = count_all(
        inputs, num_ignores=given.num_ignore, visits=given.visits, draw_over=draw_over, seed=seed
    )
    text = (
        f"{crops.dataset}, {crops.split}: {chance.crops:,} crops, {chance.ignored:,} unannotated "
        f"feasible pairs, the truth of {chance.known:,} known, {chance.hidden:,} really present; "
        f"visits {given.visits}, method.draw_over {draw_over}, seed {seed}.\n\n"
        + markdown(chance, found, given.num_ignore)
    )
    finish(given, text)


if __name__ == "__main__":
    main()
