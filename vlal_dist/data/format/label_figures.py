"""Density of a split's labels: what `vlal inspect` and the page show to choose NUM_IGNORE by."""

from dataclasses import dataclass

import numpy as np

from vlal_dist.data.format.dataset import Dataset, open_split, read_labels


@dataclass(frozen=True)
class LabelFigures:
    """Counts over the samples of a split.

    Attributes:
        samples: N.
        positive, negative: labels.
        feasible: sizes of the samples' feasible sets, summed up.
        annotated: labels of feasible pairs; of the training split all are.
    """

    samples: int
    positive: int
    negative: int
    feasible: int
    annotated: int

    @property
    def mean_feasible(self) -> float:
        """Mean size of a sample's feasible set; 0 without samples."""
        return self.feasible / max(self.samples, 1)

    @property
    def labels_per_sample(self) -> float:
        """Mean number of labels of a sample; 0 without samples."""
        return (self.positive + self.negative) / max(self.samples, 1)

    @property
    def unannotated(self) -> float:
        """Share of the feasible pairs of samples and attributes that have no label."""
        return 1 - self.annotated / max(self.feasible, 1)


def label_figures(dataset: Dataset, split_name: str) -> LabelFigures:
    """Count the labels of a split.

    Raises:
        DataError: no such split, or labels that differ from their digest.
        StorageError: they cannot be read.
    """
    split = open_split(dataset, split_name)
    table = read_labels(dataset, split_name, columns=["positive", "negative"])
    object_id = np.asarray(split.index.object_id)
    counts, annotated = {}, 0
    for column in ("positive", "negative"):
        lists = table[column].combine_chunks()
        objects = np.repeat(object_id, lists.value_lengths().to_numpy(zero_copy_only=False))
        places = dataset.feasible.locate(objects, lists.flatten().to_numpy())
        counts[column] = len(objects)
        annotated += int((places >= 0).sum())
    feasible = int(np.diff(dataset.feasible.indptr)[object_id].sum())
    return LabelFigures(len(object_id), **counts, feasible=feasible, annotated=annotated)
