"""Against the losses that the paper builds on, written out from their equations.

ASL (Ridnik et al., 2021), partially selective learning (PSL: Ben-Baruch et al., class-aware
selective loss) and the paper's own Eqs. (1), (3), as their authors run them: probabilities by
`sigmoid`, logarithms of what is clamped at 1e-8, and in their training scripts no gradient through
the focusing weight. Within |z| <= 15 no clamp is reached and all must agree; beyond, the clamp cuts
gradients that ours keeps.
"""

import math

import pytest
import torch

from tests.fixtures.loss_batches import BACKENDS, PAPER, Case, away_from, feasible_mask, make, run

on_backends = pytest.mark.parametrize("backend", BACKENDS, ids=[b.name for b in BACKENDS])
on_settings = pytest.mark.parametrize(
    ("margin", "detach_focal"), [(0.0, False), (0.0, True), (0.05, False), (0.05, True)]
)
EPSILON = 1e-8


def clamped_log(probability):
    return probability.clamp(min=EPSILON).log()


def focused(base, gamma, detach_focal):
    weight = base**gamma
    return weight.detach() if detach_focal else weight


def asl(z, positive, *, gammas, margin, detach_focal):
    """y L+ + (1 - y) L-: L+ = (1 - p)^g+ log p, L- = p_m^g- log(1 - p_m), p_m = max(p - m, 0)."""
    p = z.sigmoid()
    negative_p = (1 - p + margin).clamp(max=1)
    plus = focused(1 - p, gammas[0], detach_focal) * clamped_log(p)
    minus = focused(1 - negative_p, gammas[1], detach_focal) * clamped_log(negative_p)
    return -torch.where(positive, plus, minus)


def psl(z, label, ignored, *, gammas, margin, detach_focal):
    """ASL with a gamma of its own for the unannotated, and a weight of 0 for those ignored.

    One exponent for each pair and one base for all, as in the authors' code.
    """
    y = [(label == kind).to(z.dtype) for kind in (1, -1, 0)]
    p = z.sigmoid()
    negative_p = (1 - p + margin).clamp(max=1)
    kept = torch.where(ignored & (label == 0), 0.0, 1.0)
    entropy = y[0] * clamped_log(p) + y[1] * clamped_log(negative_p)
    entropy = entropy + y[2] * kept * clamped_log(negative_p)
    base = 1 - p * y[0] - negative_p * (y[1] + y[2])
    exponent = sum(one * gamma for one, gamma in zip(y, gammas, strict=True))
    return -focused(base, exponent, detach_focal) * entropy


def selective(z, label, ignored, feasible, *, gammas, margin, detach_focal):
    """Eqs. (1), (3), (4): omega is 0 of what is drawn, feasible and infeasible differ in gamma."""
    p = z.sigmoid()
    negative_p = (1 - p + margin).clamp(max=1)
    omega = torch.where(ignored, 0.0, 1.0)
    total = torch.zeros_like(z)
    unannotated = label == 0
    for chosen, gamma, weight in (
        (label < 0, gammas[1], 1.0),
        (unannotated & feasible, gammas[2], omega),
        (unannotated & ~feasible, gammas[3], omega),
    ):
        loss = focused(1 - negative_p, gamma, detach_focal) * clamped_log(negative_p)
        total = total + torch.where(chosen, weight * loss, 0.0)
    present = focused(1 - p, gammas[0], detach_focal) * clamped_log(p)
    return -total - torch.where(label > 0, present, 0.0)


def theirs(name, case: Case, dtype, settings):
    """Their losses by row and gradient, and how ours is asked for the same."""
    z = case.logits.to(dtype).requires_grad_()
    if name == "asl":
        losses = asl(z, case.label > 0, gammas=(1.0, 4.0), **settings)
        mode, gammas = "negatify", (1.0, 4.0, 4.0, 4.0)
    elif name == "psl":
        losses = psl(z, case.label, case.ignored, gammas=(1.0, 2.0, 4.0), **settings)
        mode, gammas = "mask", (1.0, 2.0, 4.0, 4.0)
    else:
        given = (z, case.label, case.ignored, feasible_mask(case))
        losses = selective(*given, gammas=PAPER, **settings)
        mode, gammas = "mask", PAPER
    (slope,) = torch.autograd.grad(losses.sum(), z)
    return losses.sum(1).detach().double(), slope.double(), mode, gammas


def inside_15(margin) -> Case:
    case = make(rows=24, attributes=300, annotated=0.4, spread=7.0, seed=21)
    case = case._replace(logits=case.logits.clamp(-15, 15))
    assert (case.logits.abs() == 15).any()
    return away_from(case, margin)


@on_backends
@on_settings
@pytest.mark.parametrize("name", ["asl", "psl", "selective"])
def test_their_formulas_give_the_same_where_no_clamp_is_reached(
    backend, name, margin, detach_focal
):
    """To float32's accuracy when theirs are evaluated in float64."""
    case = inside_15(margin)
    settings = {"margin": margin, "detach_focal": detach_focal}
    losses, slope, mode, gammas = theirs(name, case, torch.float64, settings)
    found = run(backend, case, mode, gammas=gammas, **settings)
    torch.testing.assert_close(found[0].double(), losses, rtol=1e-5, atol=0)
    assert (found[1].double() - slope).norm() <= 1e-6 * slope.norm()
    assert (found[1].double() - slope).abs().max() <= 2e-6 * max(1.0, slope.abs().max().item())


@on_settings
@pytest.mark.parametrize("name", ["asl", "psl", "selective"])
def test_their_formulas_in_float32_differ_by_their_rounding(name, margin, detach_focal):
    """1 - p is off by up to 2^-24, hence its logarithm by 2^-24 / (1 - p): a fifth at |z| = 15."""
    case = inside_15(margin)
    settings = {"margin": margin, "detach_focal": detach_focal}
    losses, slope, mode, gammas = theirs(name, case, torch.float32, settings)
    found = run(BACKENDS[0], case, mode, gammas=gammas, **settings)
    rounding = (2.0**-24 / (-case.logits.double().abs()).sigmoid()).sum(1)
    assert ((found[0].double() - losses).abs() <= rounding + 1e-5 * losses).all()
    assert (found[1].double() - slope).abs().max() <= 1e-5


def exact(size, gamma, detach_focal):
    """Loss and slope of a wrong answer of that size by its definition, in float64."""
    p, q = 1 / (1 + math.exp(-size)), math.exp(-size) / (1 + math.exp(-size))
    entropy = size + math.log1p(math.exp(-size))
    slope = p**gamma * (p if detach_focal else gamma * q * entropy + p)
    return p**gamma * entropy, slope


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("detach_focal", [False, True])
@pytest.mark.parametrize("label", [1, -1, 0])
@pytest.mark.parametrize("name", ["asl", "psl", "selective"])
def test_beyond_17_they_stop_learning_and_we_do_not(backend, name, label, detach_focal, dtype):
    """The surest wrong answers: their slope is 0, the right one 1; their loss ends at 18.4.

    In float64 too, so it is the clamp; in float32 negatives stop earlier, where 1 - p is 0.
    """
    sizes = [19.0, 25.0, 40.0, 80.0]
    if dtype == torch.float32 and label < 1:
        sizes = [17.5, 18.0, *sizes]
    sign = -1.0 if label == 1 else 1.0
    case = make(rows=len(sizes), attributes=5)
    case = case._replace(
        logits=sign * torch.tensor(sizes)[:, None].repeat(1, 5),
        label=torch.full((len(sizes), 5), label, dtype=torch.int8),
        ignored=torch.zeros(len(sizes), 5, dtype=torch.bool),
    )
    settings = {"margin": 0.0, "detach_focal": detach_focal}
    their_losses, their_slope, mode, gammas = theirs(name, case, dtype, settings)
    losses, slope, *_ = run(backend, case, mode, gammas=gammas, **settings)
    assert their_slope.abs().max() < 1e-6
    assert (their_losses <= 5 * -math.log(EPSILON) * (1 + 1e-6)).all()
    infeasible = ~feasible_mask(case)
    for row, size in enumerate(sizes):
        for attribute in range(5):
            unannotated = gammas[3] if infeasible[row, attribute] else gammas[2]
            gamma = {1: gammas[0], -1: gammas[1], 0: unannotated}[label]
            _, right = exact(size, gamma, detach_focal)
            assert slope[row, attribute].item() == pytest.approx(sign * right, rel=2e-5)
        assert losses[row].item() == pytest.approx(5 * exact(size, 0.0, True)[0], rel=2e-5)
    beyond = torch.tensor(sizes) > 18.5
    assert (losses[beyond].double() > their_losses[beyond]).all()


@on_backends
def test_with_a_margin_both_level_off(backend):
    """A margin is meant to give up sure wrong negatives; positives have none and are kept."""
    case = make(rows=2, attributes=4, annotated=1.1)
    case = case._replace(
        logits=torch.tensor([[25.0] * 4, [-25.0] * 4]),
        label=torch.tensor([[-1] * 4, [1] * 4], dtype=torch.int8),
    )
    settings = {"margin": 0.05, "detach_focal": True}
    their_losses, their_slope, mode, gammas = theirs("selective", case, torch.float32, settings)
    losses, slope, *_ = run(backend, case, mode, gammas=gammas, **settings)
    assert losses[0].item() == pytest.approx(their_losses[0].item(), rel=1e-5)
    # q / (q + m), which is too small for 1 - p in float32 but not for us.
    assert slope[0].tolist() == pytest.approx([0.95**2 * math.exp(-25) / 0.05] * 4, rel=1e-4)
    assert (their_slope[0].abs() < 1e-12).all() and (their_slope[1].abs() < 1e-6).all()
    assert slope[1].tolist() == pytest.approx([-1.0] * 4, rel=2e-5)
