"""Density of labels, counted one by one."""

from pathlib import Path

import numpy as np
import pytest

from vlal_dist.data.format.dataset import open_dataset, open_split, read_labels
from vlal_dist.data.format.label_figures import label_figures
from vlal_dist.method.feasible import FeasibleSets, largest_num_ignore


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_counts_are_those_of_the_labels(small: Path, tmp_path: Path, split: str) -> None:
    dataset = open_dataset(str(small / "dataset"), cache=tmp_path)
    found = label_figures(dataset, split)
    objects = np.asarray(open_split(dataset, split).index.object_id).tolist()
    rows = read_labels(dataset, split, columns=["positive", "negative"]).to_pylist()
    sets = [set(dataset.feasible.of(one).tolist()) for one in objects]
    labels = [{*row["positive"], *row["negative"]} for row in rows]
    assert (found.samples, found.feasible) == (len(rows), sum(map(len, sets)))
    assert found.positive == sum(len(row["positive"]) for row in rows)
    assert found.negative == sum(len(row["negative"]) for row in rows)
    assert found.annotated == sum(len(a & b) for a, b in zip(sets, labels, strict=True))
    if split == "train":
        assert found.annotated == found.positive + found.negative > 0
    assert found.mean_feasible == found.feasible / len(rows)
    assert found.labels_per_sample == (found.positive + found.negative) / len(rows)
    assert found.unannotated == 1 - found.annotated / found.feasible


def test_places_of_pairs() -> None:
    sets = FeasibleSets(
        np.array([0, 2, 2, 4]),
        np.array([0, 2, 0, 1], np.int32),
        np.zeros(4, np.int32),
        np.zeros(4, np.int32),
    )
    grid = np.array([(o, a) for o in range(3) for a in (0, 1, 2, 9)])
    found = sets.locate(grid[:, 0], grid[:, 1])
    assert found.reshape(3, 4).tolist() == [[0, -1, 1, -1], [-1] * 4, [0, 1, -1, -1]]
    assert sets.locate(grid[:0, 0], grid[:0, 1]).tolist() == []


@pytest.mark.parametrize(("mean", "most"), [(0, 0), (3.9, 0), (4, 1), (64, 16), (120, 30)])
def test_the_rule_for_num_ignore(mean: float, most: int) -> None:
    assert largest_num_ignore(mean) == most
