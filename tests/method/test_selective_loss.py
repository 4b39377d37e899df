"""The term table and its reference: partition, gradients, extremes, the authors' formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.loss_batches import loss_config
from vlal_dist.method.selective_loss import Term, assign_terms, selective_loss

PAPER = (1.0, 2.0, 4.0, 7.0)
GAMMAS = [PAPER, (0.0, 0.0, 0.0, 0.0), (0.5, 3.3, 0.2, 1.0)]


def random_case(rows=64, attributes=40, spread=5.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, attributes, generator=generator, dtype=dtype) * spread
    term = torch.randint(0, 5, (rows, attributes), generator=generator).to(torch.uint8)
    return logits, term


def gradient(logits, term, **kwargs):
    leaf = logits.clone().requires_grad_()
    result = selective_loss(leaf, term, loss=loss_config(**kwargs))
    (slope,) = torch.autograd.grad(result.per_row.sum(), leaf)
    return result.per_row.detach(), slope


def closed_form(z, kind, gammas, margin, detach):
    """Loss and d/dz of one pair in double precision, kernel by kernel, branch by branch."""
    if kind == Term.IGNORED:
        return 0.0, 0.0
    g = gammas[kind]
    u, sign = (-z, -1.0) if kind == Term.POSITIVE else (z, 1.0)
    e = math.exp(-abs(u))
    p, q = (1 / (1 + e), e / (1 + e)) if u >= 0 else (e / (1 + e), 1 / (1 + e))
    softplus, softplus_minus = max(u, 0) + math.log1p(e), max(-u, 0) + math.log1p(e)
    if margin == 0 or kind == Term.POSITIVE:
        weight = math.exp(-g * softplus_minus)
        full = 0.0 if detach else g * q * softplus
        return weight * softplus, sign * weight * (full + p)
    if p <= margin:
        return 0.0, 0.0
    p_m, q_m = p - margin, min(q + margin, 1.0)
    cost = -math.log1p(-p_m) if p_m < 0.5 else -math.log(q_m)
    weight = p_m**g
    full = 0.0 if detach else g * p * q * cost / p_m
    return weight * cost, weight * (full + p * q / q_m)


@given(st.lists(st.tuples(st.sampled_from([-1, 0, 1]), st.booleans(), st.booleans()), min_size=1))
@settings(deadline=None)
def test_terms_partition_the_pairs(pairs):
    label, feasible, ignored = zip(*pairs, strict=True)
    term = assign_terms(
        torch.tensor([label], dtype=torch.int8), torch.tensor([feasible]), torch.tensor([ignored])
    )
    assert term.dtype == torch.uint8
    for (y, f, i), found in zip(pairs, term[0].tolist(), strict=True):
        holds = {
            Term.POSITIVE: y == 1,
            Term.NEGATIVE: y == -1,
            Term.FEASIBLE: y == 0 and f and not i,
            Term.INFEASIBLE: y == 0 and not f and not i,
            Term.IGNORED: y == 0 and i,
        }
        assert [kind for kind, true in holds.items() if true] == [found]


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.05, 0.2, 0.6])
@pytest.mark.parametrize("gammas", GAMMAS)
def test_loss_and_gradient_equal_the_closed_form(gammas, margin, detach):
    logits, term = random_case(rows=20, attributes=30)
    loss, slope = gradient(logits, term, gammas=gammas, margin=margin, detach_focal=detach)
    for row in range(len(logits)):
        exact = [
            closed_form(z, kind, gammas, margin, detach)
            for z, kind in zip(logits[row].tolist(), term[row].tolist(), strict=True)
        ]
        assert loss[row].item() == pytest.approx(sum(e[0] for e in exact), rel=1e-12, abs=1e-13)
        assert slope[row].tolist() == pytest.approx([e[1] for e in exact], rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_gradcheck(margin):
    logits, term = random_case(rows=3, attributes=7, spread=2.0, seed=4)
    logits = torch.where((logits.sigmoid() - margin).abs() < 1e-3, 1.0, logits)
    weight = torch.tensor([1.0, 0.0, 2.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: (
            selective_loss(z, term, loss=loss_config(margin=margin), row_weight=weight).per_row
        ),
        logits.requires_grad_(),
    )


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("margin", [0.0, 1e-9, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("gammas", GAMMAS)
def test_extreme_logits_have_the_right_limits(gammas, margin, detach):
    size = torch.tensor([17.0, 50.0, 88.0, 104.0, 1e3, 1e4])
    z = torch.cat([-size.flip(0), torch.zeros(1), size])
    for kind in Term:
        term = torch.full((len(z), 1), int(kind), dtype=torch.uint8)
        loss, slope = gradient(z[:, None], term, gammas=gammas, margin=margin, detach_focal=detach)
        exact = [closed_form(v, kind, gammas, margin, detach) for v in z.tolist()]
        assert loss.tolist() == pytest.approx([e[0] for e in exact], rel=3e-5, abs=1e-30)
        absolute = 1e-6 if margin else 1e-30
        slopes = [e[1] for e in exact]
        assert slope[:, 0].tolist() == pytest.approx(slopes, rel=3e-5, abs=absolute)
        assert slope.isfinite().all()


def test_float32_is_accurate_where_clamped_formulas_fail():
    z = torch.tensor([[-19.0, 17.0]])
    _, slope = gradient(z, torch.tensor([[0, 1]], dtype=torch.uint8), gammas=(0.0,) * 4)
    assert slope[0].tolist() == pytest.approx([-1.0, 1.0], rel=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_float32_against_float64(margin):
    logits, term = random_case(spread=8.0, dtype=torch.float32)
    logits = torch.where((logits.sigmoid() - margin).abs() < 1e-2, 1.0, logits)
    single = gradient(logits, term, gammas=PAPER, margin=margin)
    double = gradient(logits.double(), term, gammas=PAPER, margin=margin)
    assert single[0].dtype == torch.float32 and double[0].dtype == torch.float64
    torch.testing.assert_close(single[0].double(), double[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(single[1].double(), double[1], rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    logits, term = random_case(dtype=torch.float32)
    half = logits.to(dtype)
    loss, slope = gradient(half, term, gammas=PAPER, margin=0.05, detach_focal=True)
    exact, exact_slope = gradient(half.float(), term, gammas=PAPER, margin=0.05, detach_focal=True)
    assert loss.dtype == torch.float32 and slope.dtype == dtype
    assert torch.equal(loss, exact)
    assert torch.equal(slope, exact_slope.to(dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_ignored_pairs_give_zero_for_any_logit(value, margin):
    logits = torch.tensor([[value, 1.0], [2.0, value]])
    term = torch.tensor([[4, 1], [0, 4]], dtype=torch.uint8)
    loss, slope = gradient(logits, term, gammas=PAPER, margin=margin)
    assert loss.isfinite().all() and slope[0, 0] == 0 and slope[1, 1] == 0
    assert slope[0, 1] > 0 and slope[1, 0] < 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_rows_of_weight_zero_are_left_out_by_branch(value, margin):
    logits, term = random_case(rows=3, attributes=6, dtype=torch.float32)
    logits[1] = value
    weight = torch.tensor([1.0, 0.0, 2.0])
    leaf = logits.clone().requires_grad_()
    result = selective_loss(leaf, term, loss=loss_config(margin=margin), row_weight=weight)
    result.per_row.sum().backward()
    assert result.per_row[1] == 0 and (leaf.grad[1] == 0).all()
    kept = torch.tensor([0, 2])
    plain = selective_loss(logits[kept], term[kept], loss=loss_config(margin=margin))
    torch.testing.assert_close(result.per_row[kept], plain.per_row * weight[kept])
    assert torch.equal(result.counts, plain.counts)
    torch.testing.assert_close(result.sums.sum(), result.per_row.sum().detach())


@pytest.mark.parametrize("kind", list(Term)[:4])
@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_nan_reaches_only_its_own_gradient_and_row(kind, margin):
    logits = torch.zeros(2, 2)
    logits[0, 0] = math.nan
    term = torch.full((2, 2), int(kind), dtype=torch.uint8)
    loss, slope = gradient(logits, term, gammas=PAPER, margin=margin)
    assert loss[0].isnan() and loss[1].isfinite()
    assert slope.isnan().tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize("margin", [0.0, 0.05])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_infinite_logits(margin, gamma):
    """Right answers give 0 and no gradient; wrong ones are infinite, or level off at -log m."""
    z = torch.tensor([[math.inf, -math.inf, -math.inf, math.inf]])
    term = torch.tensor([[0, 1, 0, 1]], dtype=torch.uint8)
    loss, slope = gradient(z[:, :2], term[:, :2], gammas=(gamma,) * 4, margin=margin)
    assert loss.item() == 0 and slope.tolist() == [[0, 0]]
    loss, slope = gradient(z[:, 2:3], term[:, 2:3], gammas=(gamma,) * 4, margin=margin)
    assert loss.item() == math.inf and (gamma == 0 or slope.isnan().all())
    loss, slope = gradient(z[:, 3:], term[:, 3:], gammas=(gamma,) * 4, margin=margin)
    if margin:
        assert loss.item() == pytest.approx(-(0.95**gamma) * math.log(0.05), rel=1e-5)
        assert slope.item() == 0
    else:
        assert loss.item() == math.inf and (gamma == 0 or slope.isnan().all())


def authors_loss(z, term, gammas, clip, eps=1e-8):
    """The authors' formulas: margin on 1 - p, clamps, weight without gradient, plain sum."""
    p = torch.sigmoid(z)
    shifted = (1 - p + clip).clamp(max=1)
    losses = []
    for kind, gamma in zip(list(Term)[:4], gammas, strict=True):
        inside, base = (p, 1 - p) if kind == Term.POSITIVE else (shifted, 1 - shifted)
        with torch.no_grad():
            focal = base**gamma
        losses.append(torch.where(term == int(kind), -focal * inside.clamp(min=eps).log(), 0.0))
    return sum(losses).sum()


@pytest.mark.parametrize("gammas", [PAPER, (0.0,) * 4, (1.0, 2.0, 4.0, 4.0)])
def test_parity_with_the_authors_formulas_inside_15(gammas):
    logits, term = random_case(rows=64, attributes=100, spread=6.0)
    logits = logits.clamp(-15, 15)
    leaf = logits.clone().requires_grad_()
    theirs = authors_loss(leaf, term, gammas, 0.05)
    (their_slope,) = torch.autograd.grad(theirs, leaf)
    ours, slope = gradient(logits, term, gammas=gammas, margin=0.05, detach_focal=True)
    torch.testing.assert_close(ours.sum(), theirs.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(slope, their_slope, rtol=1e-8, atol=1e-12)


def test_sums_and_counts_by_term():
    logits, term = random_case(rows=6, attributes=50)
    result = selective_loss(logits.requires_grad_(), term, loss=loss_config(margin=0.05))
    for kind in Term:
        only = torch.where(term == int(kind), term, torch.tensor(4, dtype=torch.uint8))
        alone = selective_loss(logits, only, loss=loss_config(margin=0.05)).per_row.sum()
        torch.testing.assert_close(result.sums[kind], alone.detach())
        assert result.counts[kind] == (term == int(kind)).sum()
    assert result.sums[Term.IGNORED] == 0 and not result.sums.requires_grad
    assert result.counts.dtype == torch.int64 and result.counts.sum() == term.numel()


def test_empty_batch_and_odd_layouts():
    empty = selective_loss(
        torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.uint8), loss=loss_config()
    )
    assert empty.per_row.shape == (0,) and empty.counts.sum() == 0
    logits, term = random_case(rows=5, attributes=9)
    expected = selective_loss(logits, term, loss=loss_config()).per_row
    strided = logits.t().contiguous().t()
    assert torch.equal(selective_loss(strided, term, loss=loss_config()).per_row, expected)


def test_loss_needs_no_gradient():
    logits, term = random_case(rows=5, attributes=9)
    with torch.no_grad():
        loss = loss_config(detach_focal=True)
        assert not selective_loss(logits, term, loss=loss).per_row.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # inductor itself
def test_inductor():
    """The whole table with a sum inside, forward and backward, for batches of several sizes."""
    torch._dynamo.reset()
    loss = loss_config(margin=0.05, detach_focal=True)

    def step(logits, term):
        found = selective_loss(logits * 2, term, loss=loss)
        return found.per_row.sum(), found.sums, found.counts

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (9, 5, 17):
        logits, term = random_case(rows=rows, attributes=33, spread=3.0)
        slopes = []
        for one in (compiled, step):
            leaf = logits.clone().requires_grad_()
            total, sums, counts = one(leaf, term)
            slopes.append((*torch.autograd.grad(total, leaf), total.detach(), sums, counts))
        torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()
