"""Report sections on the selective loss: ignored attributes, and likelihood against annotation.

Shapes: N crops, A attributes.

Training logs only how many attributes it ignored per crop. A draw is a function of seed, uid and
visit alone, so it is repeated here without a model, bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vlal_dist.config.sections import PathsConfig
from vlal_dist.data.format.dataset import Dataset, open_dataset, open_split
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.errors import DataError, VlalError
from vlal_dist.method.ignore_set import sample_ignore_set
from vlal_dist.method.likelihood import inverse_weights, rescale
from vlal_dist.reporting.charts import Frame, Tick
from vlal_dist.vocabulary import Vocabulary

MAX_CROPS = 2000
MAX_ATTRIBUTES = 15
CALIBRATION_FRAME = Frame(width=720, height=280, left=48, right=708, top=24, bottom=218)
EDGES = tuple(float(edge) for edge in 10.0 ** np.arange(-3.0, 2.01, 0.25))


@dataclass(frozen=True)
class TrainingCrops:
    """Crops in index order, from the first on.

    Attributes:
        dataset, split: names of the dataset and of the split.
        num_samples: crops in the split, N or more.
        uid: uint64 [N].
        label: int8 [N, A], +1 annotated present, -1 annotated absent, 0 unannotated.
        feasible: bool [N, A], Omega_o of each crop's object.
        likelihood: float64 [N, A], g of Eq. (2); 0 where infeasible.
        inverse_weight: float32 [N, A], max g / g; infinite where it cannot be drawn.
    """

    dataset: str
    split: str
    num_samples: int
    uid: npt.NDArray[np.uint64]
    label: npt.NDArray[np.int8]
    feasible: npt.NDArray[np.bool_]
    likelihood: npt.NDArray[np.float64]
    inverse_weight: npt.NDArray[np.float32]


@dataclass(frozen=True)
class LikelihoodBin:
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

    @property
    def range(self) -> str:
        """The range in words."""
        if self.low == 0:
            return f"below {self.high:.2g}"
        end = " or more" if np.isinf(self.high) else f" to {self.high:.2g}"
        return f"{self.low:.2g}{end}"

    @property
    def decade(self) -> str:
        """The lower end where it is a power of ten, for the axis; else empty."""
        exponent = np.log10(self.low) if self.low else 0.5
        return f"{self.low:g}" if abs(exponent - round(float(exponent))) < 1e-6 else ""


@dataclass(frozen=True)
class CalibrationSection:
    """Share annotated present by likelihood, a chart of bars.

    Attributes:
        summary: what it shows, in words.
        bins: one per bar.
        share: annotated present over all bins, of 1.
    """

    summary: str
    bins: list[LikelihoodBin]
    share: float
    frame: Frame = CALIBRATION_FRAME

    def x(self, place: float) -> float:
        """Position of the left edge of a bar, counted from 0."""
        return self.frame.x(place / len(self.bins))

    @property
    def y_ticks(self) -> list[Tick]:
        """(position, text) of the shares beside the chart."""
        return [(self.frame.y(share), f"{100 * share:g}%") for share in (0, 0.25, 0.5, 0.75, 1)]


def selective_sections(
    run_config: Mapping[str, Any], result: Mapping[str, Any], paths: PathsConfig
) -> tuple[dict[str, Any] | str, CalibrationSection | str]:
    """Both sections; a sentence with the reason in place of one that cannot be made.

    Args:
        run_config: the run's resolved configuration; empty without training.
        result: `result.json`, whose digests are of the dataset that was evaluated.
        paths: `paths.merged` is read.
    """
    if not run_config:
        reason = "This run holds no config.yaml: nothing was trained here."
        return reason, reason
    try:
        method = run_config["method"]
        no_draw = _why_no_draw(method)
        if method["loss"] != "selective":
            return no_draw, f"method.loss {method['loss']} uses no likelihoods."
        if run_config["data"]["likelihood"] != "tar":
            reason = (
                "The run read its likelihoods from score files (data.likelihood), not from tars."
                if method.get("draw_weights", "likelihood") == "likelihood"
                else "The run used no CLIP (method.draw_weights)."
            )
            return no_draw or reason, reason
        merged = open_dataset(paths.merged, cache=Path(paths.cache))
        reason = _why_no_crops(run_config["data"], merged.manifest, result)
        if reason:
            return reason, reason
        crops = read_training_crops(
            merged,
            run_config["data"]["train_split"],
            temperature=run_config["scoring"]["temperature"],
        )
        ignored = no_draw or count_ignored(
            crops,
            merged.vocabulary,
            num_ignore=method["num_ignore"],
            draw_over=method["draw_over"],
            seed=run_config["training"]["seed"],
        )
        return ignored, calibrate(crops)
    except VlalError as error:
        reason = f"The merged dataset cannot be read: {error}"
    except KeyError as error:
        reason = f"The run's config.yaml is of another version and lacks {error}."
    return reason, reason


def _why_no_draw(method: Mapping[str, Any]) -> str:
    """Why a run has no draws to repeat; empty: it has."""
    if method["loss"] != "selective":
        return f"method.loss {method['loss']} draws no ignore sets."
    draw, weights = method.get("draw", "random"), method.get("draw_weights", "likelihood")
    if (draw, weights) != ("random", "likelihood"):
        return (
            f"Only random draws weighted by the likelihood are counted here; this run has "
            f"method.draw {draw} and method.draw_weights {weights}."
        )
    if method["num_ignore"] in (0, "all"):
        return f"method.num_ignore {method['num_ignore']}: all attributes are treated alike."
    return ""


def _why_no_crops(
    data: Mapping[str, Any], manifest: Mapping[str, Any], result: Mapping[str, Any]
) -> str:
    """Why the merged dataset is not what a run drew from; empty: it is."""
    if data["mix"]:
        return "The run was trained on a mix of datasets (data.mix)."
    for key in ("vocabulary_digest", "feasible_digest"):
        if manifest[key] != result["dataset"][key]:
            return f"The merged dataset in paths.merged has another {key.replace('_', ' ')}."
    split = data["train_split"]
    if manifest["likelihood"] is None or split not in manifest["likelihood"]["splits"]:
        return f"The dataset in paths.merged has no likelihoods of split {split}."
    return ""


def read_training_crops(
    dataset: Dataset,
    split_name: str,
    *,
    temperature: float | None,
    most: int | None = MAX_CROPS,
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
        num_samples=split.num_samples,
        uid=np.array(split.index.uid[: len(rows)]),
        label=label,
        feasible=feasible,
        likelihood=likelihood,
        inverse_weight=inverse,
    )


def count_ignored(
    crops: TrainingCrops, vocabulary: Vocabulary, *, num_ignore: int, draw_over: str, seed: int
) -> dict[str, Any]:
    """Draw Omega_Ignore of each crop's visit 0 and count it by attribute (Fig. 3).

    Args:
        crops: of the run's training split.
        vocabulary: names and types of the attributes.
        num_ignore: NUM_IGNORE.
        draw_over: `feasible` or `unannotated` (feasible ones).
        seed: of the run.

    Returns:
        `counted` and `summary`, sentences; `attributes`, the most ignored first: `name`, `kind`,
        its type; `crops` in which it is feasible and unannotated; `share` of them in which it was
        ignored; `uniform`, that share expected of a draw with equal weights.
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
    set_size = drawable.sum(axis=1)
    chance = np.minimum(1.0, num_ignore / np.maximum(set_size, 1))
    num_crops = len(crops.uid)
    least = max(1, num_crops // 100)
    count = open_pairs.sum(axis=0)
    found: list[dict[str, Any]] = [
        {
            "name": vocabulary.attributes[a],
            "kind": vocabulary.attribute_type[a],
            "crops": int(count[a]),
            "share": float(ignored[:, a].sum() / count[a]),
            "uniform": float(chance[open_pairs[:, a]].mean()),
        }
        for a in np.flatnonzero(count >= least).tolist()
    ]
    found.sort(key=lambda one: (-one["share"], -one["crops"], one["name"]))
    pairs, left_out = int(open_pairs.sum()), int(ignored.sum())
    small = 100 * float((set_size <= num_ignore).sum()) / max(1, num_crops)
    return {
        "counted": (
            f"Drawn again for the first {num_crops:,} of {crops.num_samples:,} crops of split "
            f"{crops.split} of {crops.dataset}, in index order, each at its first visit, with the "
            f"run's NUM_IGNORE {num_ignore}, method.draw_over {draw_over} and seed {seed}. "
            f"Attributes that are feasible and unannotated in fewer than {least} of these crops "
            "are not listed."
        ),
        "summary": (
            f"{left_out:,} of {pairs:,} feasible unannotated pairs were ignored "
            f"({100 * left_out / max(1, pairs):.1f} %, {left_out / max(1, num_crops):.1f} per "
            f"crop); the others counted as weak negatives. In {small:.1f} % of the crops the "
            f"drawing set has {num_ignore} members or fewer, and all of them were ignored."
        ),
        "attributes": found[:MAX_ATTRIBUTES],
    }


def calibrate(crops: TrainingCrops) -> CalibrationSection | str:
    """Annotated feasible pairs by g |Omega_o|, in bins of a quarter of a decade; or why not.

    Eq. (2) gives probabilities within a feasible set: the likelihood relative to uniform,
    g |Omega_o|, compares crops of different objects. Empty bins at either end are left out. The
    outermost ones of `EDGES` are open.
    """
    row, column = np.nonzero(crops.feasible & (crops.label != 0))
    if not len(row):
        return "None of the counted crops has an annotated feasible attribute."
    ratio = crops.likelihood[row, column] * crops.feasible.sum(axis=1)[row]
    positive = crops.label[row, column] > 0
    place = np.searchsorted(EDGES, ratio, side="right")
    pairs = np.bincount(place, minlength=len(EDGES) + 1)
    found = np.bincount(place[positive], minlength=len(EDGES) + 1)
    ends = (0.0, *EDGES, float("inf"))
    share = float(positive.mean())
    return CalibrationSection(
        summary=(
            f"{len(row):,} annotated feasible pairs of the first {len(crops.uid):,} crops of split "
            f"{crops.split}; {100 * share:.1f} % of them are annotated present."
        ),
        bins=[
            LikelihoodBin(ends[n], ends[n + 1], int(pairs[n]), int(found[n]))
            for n in range(int(place.min()), int(place.max()) + 1)
        ],
        share=share,
    )
