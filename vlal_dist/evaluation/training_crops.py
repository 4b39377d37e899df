"""The first training crops of a merged dataset as arrays: what the draw of Fig. 3 saw of them.

Shapes: N crops, A attributes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vlal_dist.data.dataset import Dataset, open_split
from vlal_dist.data.rows import RowReader
from vlal_dist.errors import DataError
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
    reader, width = RowReader(split), len(dataset.vocabulary.attributes)
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
