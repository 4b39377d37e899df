"""Logits that are not finite, or so large that clamped formulas fail."""

import math

import pytest
import torch

from tests.fixtures.loss_batches import (
    GAMMAS,
    PAPER,
    Case,
    indptr,
    make,
    on_backends,
    on_fused,
    oracle,
    run,
)
from vlal_dist.kernels.arguments import FeasibleTable

TERMS = ("positive", "negative", "feasible", "infeasible", "ignored")


def uniform(logits, term: str) -> Case:
    """All pairs of one term; `run` it with mode "mask"."""
    logits = torch.as_tensor(logits)
    rows, attributes = logits.shape
    label = {"positive": 1, "negative": -1}.get(term, 0)
    size = attributes if term == "feasible" else 0
    case = make(rows=rows, attributes=attributes, objects=1)
    return case._replace(
        logits=logits,
        label=torch.full((rows, attributes), label, dtype=torch.int8),
        feasible=FeasibleTable(indptr([size]), torch.arange(size, dtype=torch.int32)),
        weight_indptr=indptr([size] * rows),
        inverse_weight=torch.ones(size * rows),
        ignored=torch.full((rows, attributes), term == "ignored"),
    )


@on_fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("margin", [0.0, 0.05])
@pytest.mark.parametrize("gammas", GAMMAS)
@pytest.mark.parametrize("term", TERMS)
def test_nan_reaches_its_own_gradient_and_its_rows_loss(backend, term, gammas, margin, dtype):
    logits = torch.zeros(3, 37)
    logits[1, 5] = math.nan
    found = run(backend, uniform(logits.to(dtype), term), "mask", gammas=gammas, margin=margin)
    reached = term != "ignored"
    assert found[0].isnan().tolist() == [False, reached, False]
    at = found[1].isnan().nonzero().tolist()
    assert at == ([[1, 5]] if reached else [])
    assert found[2].isnan().tolist() == [reached and term == name for name in TERMS]
    if not reached:
        assert (found[1] == 0).all() and (found[0] == 0).all()


@on_fused
@pytest.mark.parametrize("gammas", GAMMAS)
@pytest.mark.parametrize("term", TERMS[:4])
def test_infinite_wrong_answers_are_not_finite(backend, term, gammas):
    logits = torch.zeros(2, 20)
    logits[1, 3] = -math.inf if term == "positive" else math.inf
    losses, gradient, *_ = run(backend, uniform(logits, term), "mask", gammas=gammas)
    assert losses[0].isfinite() and not losses[1].isfinite()
    lost = (~gradient.isfinite()).nonzero().tolist()
    assert lost in ([[1, 3]], [] if max(gammas) == 0 else None)


@on_fused
@pytest.mark.parametrize("margin", [0.0, 0.05])
@pytest.mark.parametrize("gammas", GAMMAS)
@pytest.mark.parametrize("term", TERMS)
def test_infinite_right_answers_cost_nothing(backend, term, gammas, margin):
    right = math.inf if term == "positive" else -math.inf
    logits = torch.full((2, 20), right)
    losses, gradient, *_ = run(backend, uniform(logits, term), "mask", gammas=gammas, margin=margin)
    assert losses.abs().max() < 1e-35 and gradient.abs().max() < 1e-35


@on_fused
@pytest.mark.parametrize("term", TERMS[1:4])
def test_a_margin_levels_off_infinite_wrong_answers(backend, term):
    case = uniform(torch.full((1, 1), math.inf), term)
    losses, gradient, *_ = run(backend, case, "mask", gammas=(2.0,) * 4, margin=0.05)
    assert losses.item() == pytest.approx(-(0.95**2) * math.log(0.05), rel=1e-5)
    assert gradient.abs().item() < 1e-30


@on_backends
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_rows_of_weight_zero_are_left_out_by_branch(backend, value, margin):
    case = make(rows=3, attributes=50, annotated=0.3)
    case.logits[1] = value
    case = case._replace(row_weight=torch.tensor([1.0, 0.0, 2.0]))
    losses, gradient, sums, counts = run(backend, case, margin=margin)
    assert losses[1] == 0 and (gradient[1] == 0).all() and sums.isfinite().all()
    kept = run(backend, case.rows(torch.tensor([0, 2])), margin=margin)
    assert torch.equal(counts, kept[3])
    torch.testing.assert_close(sums, kept[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[[0, 2]], kept[1])


@on_backends
@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_drawn_nan_costs_nothing(backend, margin):
    """The draw knows no logit, so what it drew may hold anything."""
    case = make(rows=6, attributes=70, annotated=0.0)
    clean = run(backend, case, num_ignore=20, margin=margin)
    hidden = clean[1] == 0
    case.logits[hidden & (case.logits > 0)] = math.nan
    found = run(backend, case, num_ignore=20, margin=margin)
    assert found[3][4] > 0 and torch.equal(found[3], clean[3])
    assert torch.equal(found[0], clean[0]) and torch.equal(found[1], clean[1])


@on_backends
@pytest.mark.parametrize("term", TERMS[:4])
def test_gradients_where_clamped_formulas_give_zero(backend, term):
    """`1 - sigmoid(17)` is 0 in float32, and the clamp cuts its gradient: -1 and +1 are right."""
    sign = -1.0 if term == "positive" else 1.0
    case = uniform(sign * torch.tensor([[17.0, 19.0, 30.0, 88.0, 104.0, 1e30, 1e38]]), term)
    for gammas in (PAPER, (0.0,) * 4):
        losses, gradient, *_ = run(backend, case, "mask", gammas=gammas)
        assert gradient[0].tolist() == pytest.approx([sign] * 7, rel=2e-5)
        assert losses.item() == pytest.approx(1e38, rel=1e-6)


@on_backends
def test_gradients_where_the_answer_is_right(backend):
    """Small as they are, they keep their relative accuracy down to underflow."""
    for term in TERMS[:4]:
        sign = 1.0 if term == "positive" else -1.0
        case = uniform(sign * torch.tensor([[5.0, 8.0, 10.0, 17.0, 40.0, 80.0]]), term)
        for gammas in (PAPER, GAMMAS[3]):
            found, exact = (f(case, "mask", gammas=gammas) for f in (_of(backend), oracle))
            torch.testing.assert_close(found[1].double(), exact[1], rtol=2e-5, atol=1e-36)
            torch.testing.assert_close(found[0].double(), exact[0], rtol=2e-5, atol=1e-36)


def _of(backend):
    return lambda *args, **kwargs: run(backend, *args, **kwargs)
