"""Ignored attributes, and likelihood against annotation: a merged dataset, counted slowly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.fixtures.tiny_dataset import VOCABULARY
from vlal_dist.config.load import config_yaml, load_config
from vlal_dist.config.sections import PathsConfig
from vlal_dist.data.format.dataset import Dataset, open_dataset, open_split
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.method.ignore_set import draw_keys
from vlal_dist.reporting.selective_sections import (
    CalibrationSection,
    TrainingCrops,
    calibrate,
    count_ignored,
    read_training_crops,
    selective_sections,
)

NUM_IGNORE, SEED = 3, 99


@pytest.fixture
def merged(small: Path, tmp_path: Path) -> Dataset:
    return open_dataset(str(small / "merged"), cache=tmp_path / "cache")


@pytest.fixture
def run_config(small: Path) -> dict[str, Any]:
    config = load_config(small / "config.yaml", {"method.num_ignore": str(NUM_IGNORE)})
    values: dict[str, Any] = yaml.safe_load(config_yaml(config))
    return values


def paths_of(dataset: Dataset) -> PathsConfig:
    return PathsConfig(merged=dataset.url, cache=str(dataset.cache))


def result_of(dataset: Dataset) -> dict[str, Any]:
    return {
        "dataset": {
            "vocabulary_digest": dataset.vocabulary.digest,
            "feasible_digest": dataset.feasible.digest,
        }
    }


def slow_counts(dataset: Dataset, draw_over: str) -> dict[str, tuple[int, int]]:
    """Attribute -> (crops, ignored): each crop's race run in plain Python."""
    import torch

    split = open_split(dataset, "train")
    reader, names = SampleReader(split), dataset.vocabulary.attributes
    found = dict.fromkeys(names, (0, 0))
    for row in range(split.num_samples):
        sample = reader.read(row)
        annotated = {*sample.positive, *sample.negative}
        members = dataset.feasible.of(sample.object_id).tolist()
        clock = draw_keys(
            uid=torch.tensor([sample.uid - 2**64 if sample.uid >= 2**63 else sample.uid]),
            visit=torch.zeros(1, dtype=torch.int64),
            seed=SEED,
            num_attributes=len(names),
        )[0]
        assert sample.log_likelihood is not None
        finish = {
            a: float(clock[a]) * float(np.exp(-value))
            for a, value in zip(members, sample.log_likelihood.astype(np.float64), strict=True)
            if draw_over == "feasible" or a not in annotated
        }
        drawn = sorted(finish, key=finish.__getitem__)[:NUM_IGNORE]
        for a in set(members) - annotated:
            crops, ignored = found[names[a]]
            found[names[a]] = crops + 1, ignored + (a in drawn)
    return found


@pytest.mark.parametrize("draw_over", ["feasible", "unannotated"])
def test_counts_are_those_of_the_races(
    merged: Dataset, run_config: dict[str, Any], draw_over: str
) -> None:
    run_config["method"]["draw_over"] = draw_over
    ignored, calibration = selective_sections(run_config, result_of(merged), paths_of(merged))
    assert isinstance(ignored, dict) and isinstance(calibration, CalibrationSection)
    expected = slow_counts(merged, draw_over)
    assert {
        one["name"]: (one["crops"], round(one["share"] * one["crops"]))
        for one in ignored["attributes"]
    } == {name: counts for name, counts in expected.items() if counts[0]}
    shares = [one["share"] for one in ignored["attributes"]]
    assert shares == sorted(shares, reverse=True) and 0 < shares[0] <= 1
    pairs = sum(crops for crops, _ in expected.values())
    left_out = sum(count for _, count in expected.values())
    assert ignored["summary"].startswith(f"{left_out:,} of {pairs:,} feasible unannotated pairs")
    assert f"NUM_IGNORE {NUM_IGNORE}" in ignored["counted"] and f"seed {SEED}" in ignored["counted"]
    assert f"draw_over {draw_over}" in ignored["counted"]


def test_equal_likelihoods_are_ignored_as_often_as_equal_weights_say() -> None:
    """With one set for all and no annotation, the mean share is NUM_IGNORE / |Omega_o|."""
    crops = make_crops(np.full((400, 8), 1 / 8), np.zeros((400, 8), np.int8))
    section = count_ignored(
        crops,
        VOCABULARY,
        num_ignore=2,
        draw_over="feasible",
        seed=1,
    )
    assert all(one["uniform"] == pytest.approx(2 / 8) for one in section["attributes"])
    assert sum(round(one["share"] * one["crops"]) for one in section["attributes"]) == 2 * 400
    assert all(one["share"] == pytest.approx(2 / 8, abs=0.1) for one in section["attributes"])


def make_crops(likelihood: np.ndarray, label: np.ndarray) -> TrainingCrops:
    rows = len(likelihood)
    with np.errstate(divide="ignore"):
        inverse = (likelihood.max(axis=1, keepdims=True) / likelihood).astype(np.float32)
    return TrainingCrops(
        dataset="made",
        split="train",
        num_samples=rows,
        uid=np.random.default_rng(3).integers(0, 2**63, rows).astype(np.uint64),
        label=label,
        feasible=likelihood > 0,
        likelihood=likelihood,
        inverse_weight=inverse,
    )


def test_bins_hold_every_annotated_feasible_pair_once() -> None:
    rng = np.random.default_rng(0)
    likelihood = rng.dirichlet(np.full(20, 0.2), size=60)
    likelihood[:, 15:] = 0
    label = rng.choice(np.array([-1, 0, 1], np.int8), likelihood.shape)
    section = calibrate(make_crops(likelihood, label))
    assert isinstance(section, CalibrationSection)
    bins = section.bins
    feasible = likelihood > 0
    assert sum(one.pairs for one in bins) == ((label != 0) & feasible).sum()
    assert sum(one.positive for one in bins) == ((label > 0) & feasible).sum()
    ratio = likelihood * feasible.sum(axis=1, keepdims=True)
    for one in bins:
        inside = feasible & (label != 0) & (ratio >= one.low) & (ratio < one.high)
        assert one.pairs == inside.sum() and one.positive == (inside & (label > 0)).sum()
    assert bins[0].pairs and bins[-1].pairs


def test_the_chart_puts_a_full_bar_at_the_top() -> None:
    likelihood = np.array([[0.9, 0.1]] * 4)
    label = np.array([[1, -1]] * 4, np.int8)
    section = calibrate(make_crops(likelihood, label))
    assert isinstance(section, CalibrationSection)
    low, high = section.bins[0], section.bins[-1]
    assert (low.share, section.frame.y(low.share)) == (0, section.frame.bottom)
    assert (high.share, section.frame.y(high.share)) == (1, section.frame.top)
    assert high.pairs == 4 and section.share == 0.5
    nothing = calibrate(make_crops(likelihood, np.zeros_like(label)))
    assert nothing == "None of the counted crops has an annotated feasible attribute."


@pytest.mark.parametrize(
    ("changes", "ignored", "likelihood"),
    [
        ({"method.loss": "ce_ignoring"}, "ce_ignoring draws no ignore sets", "uses no likelihoods"),
        ({"method.num_ignore": "all"}, "treated alike", None),
        ({"method.draw": "top"}, "method.draw top", None),
        ({"method.draw_weights": "uniform"}, "method.draw_weights uniform", None),
        ({"data.likelihood": "scores"}, "score files", "score files"),
        ({"data.mix": {"elsewhere": 1.0}}, "a mix of datasets", "a mix of datasets"),
        ({"data.train_split": "night"}, "no likelihoods of split night", "split night"),
    ],
)
def test_a_section_that_does_not_fit_is_left_out_with_its_reason(
    merged: Dataset,
    run_config: dict[str, Any],
    changes: dict[str, object],
    ignored: str,
    likelihood: str | None,
) -> None:
    for key, value in changes.items():
        section, name = key.split(".")
        run_config[section][name] = value
    found = selective_sections(run_config, result_of(merged), paths_of(merged))
    assert isinstance(found[0], str) and ignored in found[0]
    if likelihood is None:
        assert isinstance(found[1], CalibrationSection)
    else:
        assert isinstance(found[1], str) and likelihood in found[1]


def test_an_absent_or_different_dataset_is_no_error(
    merged: Dataset, run_config: dict[str, Any]
) -> None:
    paths = PathsConfig(merged=f"{merged.url}-absent", cache=str(merged.cache))
    found = selective_sections(run_config, result_of(merged), paths)
    assert "holds no dataset.json" in str(found[0]) and found[0] == found[1]
    result = result_of(merged)
    result["dataset"]["feasible_digest"] = "other"
    found = selective_sections(run_config, result, paths_of(merged))
    assert "another feasible digest" in str(found[0]) and found[0] == found[1]
    assert "nothing was trained" in str(selective_sections({}, result, paths)[0])
    assert "lacks 'loss'" in str(selective_sections({"method": {}}, result, paths)[0])


def test_a_run_without_clip_needs_no_merged_dataset(
    merged: Dataset, run_config: dict[str, Any], tmp_path: Path
) -> None:
    run_config["method"]["draw_weights"] = "cooccurrence"
    run_config["data"]["likelihood"] = "scores"
    paths = PathsConfig(merged=str(tmp_path / "absent"), cache=str(tmp_path))
    ignored, calibration = selective_sections(run_config, result_of(merged), paths)
    assert "draw_weights cooccurrence" in str(ignored)
    assert calibration == "The run used no CLIP (method.draw_weights)."


def test_another_temperature_than_the_merges_is_used(merged: Dataset) -> None:
    at_merge = read_training_crops(merged, "train", temperature=None)
    np.testing.assert_allclose(at_merge.likelihood.sum(axis=1), 1, rtol=1e-5)
    hotter = read_training_crops(merged, "train", temperature=100.0)
    spread = at_merge.feasible / at_merge.feasible.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(hotter.likelihood, spread, atol=1e-3)
