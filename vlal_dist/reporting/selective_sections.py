"""Report sections on the selective loss: ignored attributes, and likelihood against annotation.

Shapes: N crops, A attributes.

The trainer logs only how many pairs it ignored per crop. The draw is a function of seed, uid and
visit alone, so that it can be repeated here without a model, bit for bit.

Shapes: N crops, A attributes.

Eq. (2) gives probabilities within a feasible set, so that their size depends on the set's: the
likelihood relative to uniform, g |Omega_o|, compares crops of different objects.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vlal_dist.data.format.dataset import Dataset, open_split
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.errors import DataError, VlalError
from vlal_dist.method.ignore_set import sample_ignore_set
from vlal_dist.method.likelihood import inverse_weights, rescale

MOST_CROPS = 2000


@dataclass(frozen=True)
class TrainingCrops:
    """Crops in index order, from the first on.

    Attributes:
        dataset: name of the dataset.
        split: it is of.
        of: crops in that split.
        uid: uint64 [N].
        label: int8 [N, A], +1 annotated present, -1 annotated absent, 0 unannotated.
        feasible: bool [N, A], Omega_o of each crop's object.
        likelihood: float64 [N, A], g of Eq. (2); 0 where infeasible.
        inverse_weight: float32 [N, A], max g / g; infinite where it cannot be drawn.
    """

    dataset: str
    split: str
    of: int
    uid: npt.NDArray[np.uint64]
    label: npt.NDArray[np.int8]
    feasible: npt.NDArray[np.bool_]
    likelihood: npt.NDArray[np.float64]
    inverse_weight: npt.NDArray[np.float32]


def why_no_crops(
    run_config: Mapping[str, Any], manifest: Mapping[str, Any], result: Mapping[str, Any]
) -> str:
    """Why the crops of a dataset say nothing about a run's draws; empty: they do.

    Args:
        run_config: the run's resolved configuration.
        manifest: `dataset.json` of the merged dataset.
        result: `result.json`, whose digests are of the dataset that was evaluated.
    """
    data, split = run_config["data"], run_config["data"]["train_split"]
    if data["likelihood"] != "tar":
        return "The run read its likelihoods from score files (data.likelihood), not from tars."
    if data["mix"]:
        return "The run was trained on a mix of datasets (data.mix)."
    for key in ("vocabulary_digest", "feasible_digest"):
        if manifest[key] != result["dataset"][key]:
            return f"The merged dataset in paths.merged has another {key.replace('_', ' ')}."
    if manifest["likelihood"] is None or split not in manifest["likelihood"]["splits"]:
        return f"The dataset in paths.merged has no likelihoods of split {split}."
    return ""


def read_training_crops(
    dataset: Dataset,
    split_name: str,
    *,
    temperature: float | None,
    most: int | None = MOST_CROPS,
) -> TrainingCrops:
    """Read the first crops of a split.

    Args:
        dataset: merged.
        split_name: trained on.
        temperature: tau that the run set; None: that of the merge.
        most: how many crops are read; None: all of them.

    Raises:
        DataError: a damaged sample, or likelihoods that do not fit the feasible sets.
    """
    split = open_split(dataset, split_name)
    reader, width = SampleReader(split), len(dataset.vocabulary.attributes)
    rows = range(split.num_samples if most is None else min(most, split.num_samples))
    shape = (len(rows), width)
    label, feasible = np.zeros(shape, np.int8), np.zeros(shape, np.bool_)
    likelihood, inverse = np.zeros(shape), np.full(shape, np.inf, np.float32)
    merged_at = float(dataset.manifest["likelihood"]["temperature"])
    for row in rows:
        sample = reader.read(row)
        members, values = dataset.feasible.of(sample.object_id), sample.log_likelihood
        if values is None or len(values) != len(members):
            raise DataError(
                f"{dataset.url}: sample uid {sample.uid:016x} has no likelihood over its "
                f"{len(members)} feasible attributes; merge again"
            )
        indptr = np.array([0, len(values)], np.int64)
        if temperature is not None and temperature != merged_at:
            values = rescale(values, indptr, temperature_from=merged_at, temperature_to=temperature)
        label[row, sample.positive], label[row, sample.negative] = 1, -1
        feasible[row, members] = True
        likelihood[row, members] = np.exp(values.astype(np.float64))
        inverse[row, members] = inverse_weights(values, indptr)
    return TrainingCrops(
        dataset=dataset.name,
        split=split_name,
        of=split.num_samples,
        uid=np.array(split.index.uid[: len(rows)]),
        label=label,
        feasible=feasible,
        likelihood=likelihood,
        inverse_weight=inverse,
    )


SHOWN = 15


@dataclass(frozen=True)
class IgnoredAttribute:
    """How often one attribute was ignored.

    Attributes:
        name: attribute.
        kind: its type.
        crops: crops in which it is feasible and unannotated.
        ignored: those of them in which it was drawn.
        uniform: share that a draw with equal weights would ignore, expected.
    """

    name: str
    kind: str
    crops: int
    ignored: int
    uniform: float

    @property
    def share(self) -> float:
        """Share of the crops, of 1."""
        return self.ignored / self.crops


@dataclass(frozen=True)
class IgnoredSection:
    """What the page says of it.

    Attributes:
        counted: what was counted, in words.
        summary: over all attributes, in words.
        attributes: the most ignored, highest share first.
    """

    counted: str
    summary: str
    attributes: list[IgnoredAttribute]


def why_no_draw(method: Mapping[str, Any]) -> str:
    """Why there is nothing to draw again; empty: there is.

    Args:
        method: the section of the run's resolved configuration.
    """
    if method["loss"] != "selective":
        return f"method.loss {method['loss']} draws no ignore sets."
    draw, weights = method.get("draw", "random"), method.get("draw_weights", "likelihood")
    if (draw, weights) != ("random", "likelihood"):
        return (
            f"Only random draws weighted by the likelihood are counted here; this run has "
            f"method.draw {draw} and method.draw_weights {weights}."
        )
    if method["num_ignore"] in (0, "all"):
        return (
            f"method.num_ignore {method['num_ignore']}: each feasible attribute is treated alike."
        )
    return ""


def count_ignored(
    crops: TrainingCrops,
    *,
    names: Sequence[str],
    kinds: Sequence[str],
    num_ignore: int,
    draw_over: str,
    seed: int,
) -> IgnoredSection:
    """Draw Omega_Ignore of each crop's visit 0 and count it by attribute (Fig. 3).

    Args:
        crops: of the run's training split.
        names, kinds: of the attributes and their types, [A].
        num_ignore: NUM_IGNORE.
        draw_over: `feasible` or `unannotated` (feasible ones).
        seed: of the run.
    """
    open_pairs = crops.feasible & (crops.label == 0)
    drawable = open_pairs if draw_over == "unannotated" else crops.feasible
    drawn = sample_ignore_set(
        inverse_weight=torch.from_numpy(crops.inverse_weight),
        drawable=torch.from_numpy(drawable),
        num_ignore=num_ignore,
        uid=torch.from_numpy(crops.uid.view(np.int64)),
        visit=torch.zeros(len(crops.uid), dtype=torch.int64),
        seed=seed,
    ).numpy()
    ignored = drawn & open_pairs
    size = drawable.sum(axis=1)
    chance = np.minimum(1.0, num_ignore / np.maximum(size, 1))
    least = max(1, len(crops.uid) // 100)
    count = open_pairs.sum(axis=0)
    found = [
        IgnoredAttribute(
            name=names[a],
            kind=kinds[a],
            crops=int(count[a]),
            ignored=int(ignored[:, a].sum()),
            uniform=float(chance[open_pairs[:, a]].mean()),
        )
        for a in np.flatnonzero(count >= least).tolist()
    ]
    found.sort(key=lambda one: (-one.share, -one.crops, one.name))
    return IgnoredSection(
        counted=(
            f"Drawn again for the first {len(crops.uid):,} of {crops.of:,} crops of split "
            f"{crops.split} of {crops.dataset}, in index order, each at its first visit, with the "
            f"run's NUM_IGNORE {num_ignore}, method.draw_over {draw_over} and seed {seed}. "
            f"Attributes that are feasible and unannotated in fewer than {least} of these crops "
            "are not listed."
        ),
        summary=_summary(int(open_pairs.sum()), int(ignored.sum()), size, num_ignore),
        attributes=found[:SHOWN],
    )


def _summary(pairs: int, ignored: int, size: npt.NDArray[np.int64], num_ignore: int) -> str:
    """Over all attributes; `size` is that of each crop's drawing set."""
    crops = max(1, len(size))
    small = 100 * float((size <= num_ignore).sum()) / crops
    return (
        f"{ignored:,} of {pairs:,} feasible unannotated pairs were ignored "
        f"({100 * ignored / max(1, pairs):.1f} %, {ignored / crops:.1f} per crop); the others "
        f"counted as weak negatives. In {small:.1f} % of the crops the drawing set has "
        f"{num_ignore} members or fewer, and nothing was left to chance."
    )


WIDTH, HEIGHT = 720, 280
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 24, 62
EDGES = tuple(float(edge) for edge in 10.0 ** np.arange(-3.0, 2.01, 0.25))


@dataclass(frozen=True)
class Bin:
    """Annotated feasible pairs whose likelihood relative to uniform lies in one range.

    Attributes:
        low, high: its ends; 0 and infinity for the outermost.
        pairs: annotated pairs.
        positive: those annotated present.
    """

    low: float
    high: float
    pairs: int
    positive: int

    @property
    def share(self) -> float:
        """Share annotated present, of 1."""
        return self.positive / self.pairs if self.pairs else 0.0


@dataclass(frozen=True)
class Bar:
    """A bin as drawn, in SVG units, with its texts."""

    x: float
    y: float
    width: float
    height: float
    share: str
    pairs: str
    range: str


@dataclass(frozen=True)
class CalibrationSection:
    """The chart.

    Attributes:
        summary: what it shows, in words.
        bars: one per bin.
        overall: y of the share annotated present over all bins.
        x_ticks, y_ticks: (position, text).
        width, height, left, right, top, bottom: frame.
    """

    summary: str
    bars: list[Bar]
    overall: float
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def calibration_bins(crops: TrainingCrops) -> list[Bin]:
    """Annotated feasible pairs by g |Omega_o|, in bins of a quarter of a decade.

    Empty bins at either end are left out. The two outermost of all are open.
    """
    row, column = np.nonzero(crops.feasible & (crops.label != 0))
    ratio = crops.likelihood[row, column] * crops.feasible.sum(axis=1)[row]
    positive = crops.label[row, column] > 0
    place = np.searchsorted(EDGES, ratio, side="right")
    pairs = np.bincount(place, minlength=len(EDGES) + 1)
    found = np.bincount(place[positive], minlength=len(EDGES) + 1)
    ends = (0.0, *EDGES, float("inf"))
    used = np.flatnonzero(pairs)
    kept = range(int(used[0]), int(used[-1]) + 1) if len(used) else range(0)
    return [Bin(ends[n], ends[n + 1], int(pairs[n]), int(found[n])) for n in kept]


def draw_calibration(crops: TrainingCrops) -> CalibrationSection | str:
    """The chart, or why there is none."""
    bins = calibration_bins(crops)
    total, positive = sum(one.pairs for one in bins), sum(one.positive for one in bins)
    if not total:
        return "None of the counted crops has an annotated feasible attribute."
    step = (WIDTH - RIGHT - LEFT) / len(bins)
    bars = [
        Bar(
            x=round(LEFT + number * step + 3, 1),
            y=_place(one.share),
            width=round(step - 6, 1),
            height=round(HEIGHT - BOTTOM - _place(one.share), 1),
            share=f"{100 * one.share:.0f}%" if one.pairs else "",
            pairs=_short(one.pairs),
            range=_range(one),
        )
        for number, one in enumerate(bins)
    ]
    inner = [(number, one.low) for number, one in enumerate(bins) if one.low > 0]
    return CalibrationSection(
        summary=(
            f"{total:,} annotated feasible pairs of the first {len(crops.uid):,} crops of split "
            f"{crops.split}; {100 * positive / total:.1f} % of them are annotated present."
        ),
        bars=bars,
        overall=_place(positive / total),
        x_ticks=[
            (round(LEFT + number * step, 1), f"{low:g}")
            for number, low in inner
            if abs(np.log10(low) - round(float(np.log10(low)))) < 1e-6
        ],
        y_ticks=[(_place(share), f"{100 * share:g}%") for share in (0, 0.25, 0.5, 0.75, 1)],
    )


def _place(share: float) -> float:
    return round(TOP + (1 - share) * (HEIGHT - BOTTOM - TOP), 1)


def _range(one: Bin) -> str:
    if one.low == 0:
        return f"below {one.high:.2g}"
    return f"{one.low:.2g} or more" if np.isinf(one.high) else f"{one.low:.2g} to {one.high:.2g}"


def _short(count: int) -> str:
    return f"{count / 1000:.1f}k" if count >= 10_000 else f"{count:,}"


def selective_sections(
    run_config: Mapping[str, Any],
    result: Mapping[str, Any],
    open_merged: Callable[[], Dataset],
) -> tuple[IgnoredSection | str, CalibrationSection | str]:
    """What was ignored, and likelihood against annotation; a sentence where there is no section.

    A page is worth having without them: nothing that lacks or does not fit is an error here.

    Args:
        run_config: the run's resolved configuration; empty without training.
        result: `result.json`.
        open_merged: opens the merged dataset in `paths.merged`.
    """
    if not run_config:
        reason = "This run holds no config.yaml: nothing was trained here."
        return reason, reason
    try:
        return _sections(run_config, result, open_merged)
    except VlalError as error:
        reason = f"The merged dataset cannot be read: {error}"
    except KeyError as error:
        reason = f"The run's config.yaml is of another version and lacks {error}."
    return reason, reason


def _sections(
    run_config: Mapping[str, Any], result: Mapping[str, Any], open_merged: Callable[[], Dataset]
) -> tuple[IgnoredSection | str, CalibrationSection | str]:
    method = run_config["method"]
    no_draw = why_no_draw(method)
    if method["loss"] != "selective":
        return no_draw, f"method.loss {method['loss']} uses no likelihoods."
    merged = open_merged()
    reason = why_no_crops(run_config, merged.manifest, result)
    if reason:
        return reason, reason
    crops = read_training_crops(
        merged,
        run_config["data"]["train_split"],
        temperature=run_config["scoring"]["temperature"],
    )
    calibration = draw_calibration(crops)
    if no_draw:
        return no_draw, calibration
    return (
        count_ignored(
            crops,
            names=merged.vocabulary.attributes,
            kinds=merged.vocabulary.attribute_type,
            num_ignore=method["num_ignore"],
            draw_over=method["draw_over"],
            seed=run_config["training"]["seed"],
        ),
        calibration,
    )
