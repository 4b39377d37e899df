"""The ablations of the draw: what it is weighted by, and the top instead of a draw."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from tests.fixtures import tiny_model
from tests.fixtures.tiny_vaw import run
from tests.integration.test_training_runs import arguments, finish, lines, start
from tests.training.test_kernel import IGNORED, compare
from vlal_dist.config.sections import DataConfig, LossConfig, PathsConfig, ScoringConfig
from vlal_dist.data.loading.batch import Batch
from vlal_dist.data.loading.likelihoods import ObjectLikelihoods
from vlal_dist.method.ignore_set import sample_ignore_set, top_ignore_set
from vlal_dist.method.likelihood import inverse_weights
from vlal_dist.training.data import TrainingData, open_data
from vlal_dist.training.objective import top_pairs


def dense(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse weights (0 outside of Omega_o) and Omega_o, [B, A]."""
    assert batch.weight_indptr is not None and batch.inverse_weight is not None
    drawable = torch.from_numpy(tiny_model.feasible_sets().mask(tiny_model.ATTRIBUTES))[
        batch.object_id
    ]
    weight = torch.zeros(drawable.shape)
    weight[drawable] = batch.inverse_weight
    return weight, drawable


@pytest.mark.parametrize("draw_over", ["feasible", "unannotated"])
@pytest.mark.parametrize("num_ignore", [0, 2, "all"])
def test_top_is_the_mask_of_the_greatest_weights(num_ignore: Any, draw_over: str) -> None:
    batch = tiny_model.rows(np.arange(tiny_model.ROWS))
    weight, drawable = dense(batch)
    if draw_over == "unannotated":
        drawable &= batch.label == 0
    loss = tiny_model.loss_config("selective", draw_over=draw_over, num_ignore=num_ignore)
    found = top_pairs(loss, batch, tiny_model.table())
    expected = top_ignore_set(inverse_weight=weight, drawable=drawable, num_ignore=num_ignore)
    assert torch.equal(found, expected)
    batch.visit += 3
    assert torch.equal(top_pairs(loss, batch, tiny_model.table()), expected)


@pytest.mark.parametrize("draw_over", ["feasible", "unannotated"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_operator_trains_on_the_top_as_the_reference_does(
    draw_over: str, micro_batches: int
) -> None:
    top = compare("selective", draw_over=draw_over, draw="top", micro_batches=micro_batches)
    drawn = compare("selective", draw_over=draw_over, micro_batches=micro_batches)
    assert all(one.pairs[IGNORED] > 0 for one in top[:2])
    assert any(not torch.equal(a.loss, b.loss) for a, b in zip(top, drawn, strict=True))
    if draw_over == "unannotated":  # as many are drawn, and none of them is lost to an annotation
        assert all(a.pairs[IGNORED] == b.pairs[IGNORED] for a, b in zip(top, drawn, strict=True))


def opened(small: Path, weighted_by: str) -> TrainingData:
    """The packed dataset, without a look at scores that do not exist."""
    paths = PathsConfig(
        dataset=str(small / "dataset"), scores=str(small / "nowhere"), cache=str(small / "cache")
    )
    loss = LossConfig(draw_weights=weighted_by)  # type: ignore[arg-type]
    return open_data(paths, DataConfig(likelihood="scores"), loss, ScoringConfig())


@pytest.mark.parametrize("weighted_by", ["uniform", "cooccurrence"])
def test_weights_without_clip_are_those_of_the_counts(small: Path, weighted_by: str) -> None:
    sources = opened(small, weighted_by)
    feasible, rows = sources.dataset.feasible, np.array([7, *range(72), 7])
    assert sources.read_likelihoods is not None
    values, indptr = sources.read_likelihoods(rows, [b""] * len(rows))
    weights = inverse_weights(values, indptr)
    assert values.dtype == np.float32 and indptr.dtype == np.int64
    object_id = sources.corpus.splits[0].index.object_id[rows]
    for one, (low, high) in zip(object_id.tolist(), pairwise(indptr.tolist()), strict=True):
        count = feasible.positive_count[feasible.indptr[one] : feasible.indptr[one + 1]] + 1.0
        expected = count.max() / count if weighted_by == "cooccurrence" else np.ones(len(count))
        np.testing.assert_allclose(weights[low:high], expected, rtol=1e-6)
    assert len(sources.read_likelihoods(rows[:0], [])[0]) == 0


def test_a_pair_annotated_absent_alone_can_be_drawn(small: Path) -> None:
    sources = opened(small, "uniform")
    sets = sources.dataset.feasible
    sets = replace(sets, positive_count=np.arange(len(sets.indices), dtype=np.int32) % 3)
    read = ObjectLikelihoods(sources.corpus, sets, cooccurrence=True)
    values, indptr = read(np.array([5]), [b""])
    first = sets.indptr[sources.corpus.splits[0].index.object_id[5]]
    count = (np.arange(len(values)) + first) % 3 + 1
    np.testing.assert_allclose(inverse_weights(values, indptr), 3 / count, rtol=1e-6)


def test_the_uniform_draw_is_uniform(small: Path) -> None:
    sources = opened(small, "uniform")
    assert sources.read_likelihoods is not None
    values, indptr = sources.read_likelihoods(np.array([5]), [b""])
    inverse, visits = torch.from_numpy(inverse_weights(values, indptr)), 20_000
    assert torch.equal(inverse, torch.ones(len(values)))
    drawn = sample_ignore_set(
        inverse_weight=inverse.repeat(visits, 1),
        drawable=torch.ones(visits, len(values), dtype=torch.bool),
        num_ignore=1,
        uid=torch.full((visits,), 17),
        visit=torch.arange(visits),
        seed=0,
    )
    assert 1e-4 < stats.chisquare(drawn.sum(0).numpy()).pvalue < 1 - 1e-4


def trained(small: Path, out: Path, draw: str, weights: str, kernel: str) -> list[dict[str, Any]]:
    """The lines of two steps; without CLIP from the packed dataset, and no score root exists."""
    options = ["--method.draw", draw, "--method.draw_weights", weights]
    options += ["--method.num_ignore", "3", "--training.kernel", kernel]
    options += ["--training.max_steps", "2", "--training.log_steps", "1"]
    if weights != "likelihood":
        options += ["--data.likelihood", "scores", "--paths.scores", str(out / "none")]
    finish(start([sys.executable, *arguments(small, out, *options)], {}))
    found = [line for line in lines(out) if line["kind"] == "train"]
    assert len(found) == 2 and all(line["ignored_effective"] > 0 for line in found)
    return found


@pytest.mark.deepspeed
def test_a_run_without_clip(small: Path, tmp_path: Path) -> None:
    trained(small, tmp_path, "top", "cooccurrence", "auto")


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("draw", "weights"),
    [
        ("random", "uniform"),
        ("random", "cooccurrence"),
        ("top", "likelihood"),
        pytest.param("random", "likelihood", marks=pytest.mark.nightly),
        pytest.param("top", "uniform", marks=pytest.mark.nightly),
        pytest.param("top", "cooccurrence", marks=pytest.mark.nightly),
    ],
)
def test_runs_of_each_way_by_both_kernels(
    small: Path, tmp_path: Path, draw: str, weights: str
) -> None:
    both = [trained(small, tmp_path / k, draw, weights, k) for k in ("auto", "reference")]
    for one, other in zip(*both, strict=True):
        assert one["ignored_effective"] == other["ignored_effective"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_an_unknown_way_is_refused(small: Path) -> None:
    config = small / "config.yaml"
    assert run("vlal_dist.train", config, "--method.draw", "best") == 64
    assert run("vlal_dist.train", config, "--method.draw_weights", "clip") == 64
