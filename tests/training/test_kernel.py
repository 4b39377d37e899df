"""The step by the fused operator and by the readable reference: the same draws, the same losses."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.fixtures import tiny_model
from vlal_dist.data.loading.loader import Step
from vlal_dist.errors import DataError
from vlal_dist.kernels.backend import choose
from vlal_dist.method.selective_loss import Term
from vlal_dist.training.engine import Engine
from vlal_dist.training.objective import feasible_table, seed_bits, undrawable
from vlal_dist.training.ranks import Ranks
from vlal_dist.training.step import Tally

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, CPU, None)
SAMPLES = (12, 5, 1, 6)
"""Of each step; where there are two micro-batches, one of the third step is empty."""
IGNORED = int(Term.IGNORED)


class PlainEngine:
    """What TrainStep needs of an engine, without DeepSpeed (test_gradients.py has it)."""

    def __init__(self) -> None:
        self.module: nn.Module = tiny_model.SmallClassifier()
        self.optimizer = torch.optim.Adam(cast(Any, tiny_model.groups(self.module)))

    def __call__(self, image: Tensor, object_id: Tensor) -> Tensor:
        return cast(Tensor, self.module(image, object_id))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def reduce(self) -> None:
        """One process has nothing to sum."""

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def steps(*, micro_batches: int, likelihood: bool = True) -> list[Step]:
    found, start = [], 0
    for samples in SAMPLES:
        step = tiny_model.step(
            start=start, samples=samples, micro_batches=micro_batches, rank=0, world_size=1
        )
        for batch in step.micro_batches:
            if not likelihood:
                batch.weight_indptr = batch.inverse_weight = None
        found.append(step)
        start += samples
    return found


def train(
    loss: str,
    *,
    micro_batches: int,
    likelihood: bool = True,
    kernel: str = "auto",
    seed: int = 99,
    **changes: Any,
) -> list[Tally]:
    """Losses and pairs of each step; `changes` are of the loss."""
    train_step = tiny_model.train_step(
        cast(Engine, PlainEngine()),
        ALONE,
        tiny_model.loss_config(loss, **changes),
        kernel=kernel,
        seed=seed,
    )
    found = []
    for step in steps(micro_batches=micro_batches, likelihood=likelihood):
        train_step.accumulate(step)
        train_step.apply()
        found.append(train_step.take_tally())
    return found


def compare(loss: str, **changes: Any) -> list[Tally]:
    """Train by both; returns the fused one's."""
    if choose("cpu").name != "cpu":
        pytest.skip(f"no fused operator here: {choose('cpu').why}")
    fused, readable = (train(loss, kernel=k, **changes) for k in ("auto", "reference"))
    for one, other in zip(fused, readable, strict=True):
        assert torch.equal(one.pairs, other.pairs), "the drawn pairs differ"
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-5, atol=0)
        assert torch.equal(one.rows, other.rows) and (one.loss >= 0).all()
    assert [int(one.pairs.sum()) for one in fused] == [n * tiny_model.ATTRIBUTES for n in SAMPLES]
    return fused


@pytest.mark.parametrize("seed", [99, -1, 2**63 + 5, 2**64 + 99])
@pytest.mark.parametrize("draw_over", ["feasible", "unannotated"])
def test_the_selective_loss_draws_the_same(draw_over: str, seed: int) -> None:
    found = compare("selective", draw_over=draw_over, seed=seed, micro_batches=2)
    assert all(one.pairs[IGNORED] > 0 for one in found[:2])


def test_the_seed_matters_by_its_low_64_bits() -> None:
    def pairs(seed: int) -> Tensor:
        return torch.stack([t.loss for t in train("selective", micro_batches=1, seed=seed)])

    assert torch.equal(pairs(99), pairs(2**64 + 99)) and not torch.equal(pairs(99), pairs(98))
    assert seed_bits(-1, CPU).tolist() == seed_bits(2**64 - 1, CPU).tolist() == [-1]
    assert seed_bits(2**63, CPU).tolist() == [-(2**63)]


@pytest.mark.parametrize("loss", ["ce_ignoring", "asl_negatifying", "psl"])
def test_the_baselines_choose_the_same(loss: str) -> None:
    found = compare(loss, micro_batches=1, likelihood=False)
    unannotated = [
        sum(int((b.label == 0).sum()) for b in step.micro_batches)
        for step in steps(micro_batches=1)
    ]
    ignored = [int(one.pairs[IGNORED]) for one in found]
    if loss == "psl":
        assert all(0 < a < b for a, b in zip(ignored, unannotated, strict=True))
    else:
        assert ignored == (unannotated if loss == "ce_ignoring" else [0] * len(SAMPLES))


@pytest.mark.parametrize("num_ignore", [0, 2, "all"])
def test_without_likelihoods_only_the_whole_set_can_be_ignored(num_ignore: int | str) -> None:
    found = compare("selective", micro_batches=2, likelihood=False, num_ignore=num_ignore)
    for one in found:
        none_left = one.pairs[int(Term.FEASIBLE)] == 0
        assert none_left if num_ignore == "all" else one.pairs[IGNORED] == 0


def test_rows_that_cannot_draw_have_weights_as_long_as_their_sets() -> None:
    batch = tiny_model.rows(np.arange(5))
    made = undrawable(batch, tiny_model.table().indptr.diff())
    assert made.weight_indptr is not None and made.inverse_weight is not None
    assert batch.weight_indptr is not None
    assert made.weight_indptr.tolist() == batch.weight_indptr.tolist()
    assert made.inverse_weight.isposinf().all() and made.inverse_weight.dtype == torch.float32


@pytest.mark.parametrize("change", [{"num_objects": tiny_model.OBJECTS + 1}, {"num_attributes": 3}])
def test_feasible_sets_of_another_vocabulary_are_refused(change: dict[str, int]) -> None:
    fits = {"num_objects": tiny_model.OBJECTS, "num_attributes": tiny_model.ATTRIBUTES}
    with pytest.raises(DataError, match="pack again"):
        feasible_table(tiny_model.feasible_sets(), **(fits | change), device=CPU)
