"""Eq. (1) and Eq. (3): the selective loss as one table of terms, and its readable reference.

Every (instance, attribute) pair falls into exactly one term; Eq. (1), Eq. (3) and Eq. (4) are this
table (p = sigmoid(logit); the paper prints the first two without the minus sign, we minimise):

    term         pairs                                       loss
    POSITIVE     annotated present                           -(1-p)^gamma_positive   log p
    NEGATIVE     annotated absent                            -p^gamma_negative       log(1-p)
    FEASIBLE     unannotated, in Omega_o, not drawn          -p^gamma_feasible       log(1-p)
    INFEASIBLE   unannotated, not in Omega_o, not drawn      -p^gamma_infeasible     log(1-p)
    IGNORED      unannotated and drawn (omega_a = 0)         0

A margin m (the authors' code: 0.05) replaces p by max(p - m, 0) in all terms but POSITIVE; then
the loss and its gradient are 0 where p <= m. Nothing is clamped: by softplus all forms, and
autograd's gradients of them, are right at any logit.

Shapes: B batch, A attributes. Neither draws (ignore_set.py) nor reduces over the batch.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlal_dist.method.baselines import check_settings


class Term(IntEnum):
    """What a pair counts as; the first four index `gammas`."""

    POSITIVE = 0
    NEGATIVE = 1
    FEASIBLE = 2
    INFEASIBLE = 3
    IGNORED = 4


class LossTerms(NamedTuple):
    """The loss, and what it is made of.

    Attributes:
        per_row: [B], sum over attributes, times the row's weight; differentiable.
        sums: [5], the same by term, over all rows; detached.
        counts: int64 [5], pairs of each term in rows whose weight is not 0.
    """

    per_row: Tensor
    sums: Tensor
    counts: Tensor


def assign_terms(label: Tensor, feasible: Tensor, ignored: Tensor) -> Tensor:
    """The term of each pair, Eq. (3) and Eq. (4); annotations override everything else.

    Args:
        label: int8 [B, A]; +1 present, -1 absent, 0 unannotated.
        feasible: bool [B, A], membership in Omega_o.
        ignored: bool [B, A], Omega_Ignore.

    Returns:
        uint8 [B, A] of `Term`.
    """
    term = torch.where(feasible, int(Term.FEASIBLE), int(Term.INFEASIBLE))
    term = torch.where(ignored, int(Term.IGNORED), term)
    term = torch.where(label < 0, int(Term.NEGATIVE), term)
    return torch.where(label > 0, int(Term.POSITIVE), term).to(torch.uint8)


def selective_loss(
    logits: Tensor,
    term: Tensor,
    *,
    gammas: tuple[float, float, float, float],
    margin: float = 0.0,
    detach_focal: bool = False,
    row_weight: Tensor | None = None,
) -> LossTerms:
    """Loss of each row by the table above: Eq. (1), Eq. (3) and Eq. (4).

    16-bit logits are computed in float32, float64 stays. Ignored pairs and rows of weight 0 are
    left out by branch: their loss and gradient are exactly 0 whatever the logit, NaN included.

    Args:
        logits: floating [B, A].
        term: uint8 [B, A] (`assign_terms`).
        gammas: focusing exponents >= 0 of POSITIVE, NEGATIVE, FEASIBLE, INFEASIBLE.
        margin: m in [0, 1).
        detach_focal: no gradient through the focusing weight (the authors' code).
        row_weight: floating [B] or None for 1; no gradient flows to it.

    Returns:
        Losses, sums and counts; float32, or float64 for float64 logits.

    Raises:
        ConfigError: a gamma is negative, or the margin is outside [0, 1).
    """
    check_settings(gammas, margin)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    dropped = term == int(Term.IGNORED)
    if row_weight is not None:
        dropped = dropped | (row_weight == 0)[:, None]
    z = torch.where(dropped, 0.0, logits.to(dtype))
    gamma = torch.tensor([*gammas, 0.0], dtype=dtype, device=z.device)[term.to(torch.int64)]
    positive = term == int(Term.POSITIVE)
    if margin > 0:
        # Each form sees only its own pairs: the other's are 0, where both are regular.
        plain = _focal(torch.where(positive, -z, 0.0), gamma, detach_focal)
        clipped = _focal_margin(torch.where(positive, 0.0, z), gamma, margin, detach_focal)
        loss = torch.where(positive, plain, clipped)
    else:
        loss = _focal(torch.where(positive, -z, z), gamma, detach_focal)
    loss = torch.where(dropped, 0.0, loss)
    if row_weight is not None:
        loss = loss * row_weight.detach().to(dtype)[:, None]
        term = torch.where((row_weight == 0)[:, None], len(Term), term)  # counted nowhere
    per_term = [term == int(kind) for kind in Term]
    sums = torch.stack([torch.where(mask, loss.detach(), 0.0).sum() for mask in per_term])
    return LossTerms(loss.sum(dim=1), sums, torch.stack([mask.sum() for mask in per_term]))


def _focal(u: Tensor, gamma: Tensor, detach_focal: bool) -> Tensor:
    """P^gamma * softplus(u) with P = sigmoid(u): all four terms, u = -logit for POSITIVE."""
    return _power(F.logsigmoid(u), gamma, detach_focal) * -F.logsigmoid(-u)


def _focal_margin(z: Tensor, gamma: Tensor, margin: float, detach_focal: bool) -> Tensor:
    """p_m^gamma * -log(1 - p_m) with p_m = max(p - m, 0).

    `where` stands before every function that is singular on the side not taken: a zero gradient
    times an infinite slope is NaN. A NaN logit counts as active and stays NaN.
    """
    # exp(logsigmoid), not sigmoid: autograd's slope p (1 - p) loses 1 - p at large logits.
    p, q = F.logsigmoid(z).exp(), F.logsigmoid(-z).exp()
    active = ~(p - margin <= 0)
    p_m = torch.where(active, p - margin, 0.5)
    small = p_m < 0.5
    cross_entropy = torch.where(
        small, -torch.log1p(-torch.where(small, p_m, 0.0)), -torch.log(q + margin)
    )
    return torch.where(active, _power(torch.log(p_m), gamma, detach_focal) * cross_entropy, 0.0)


def _power(log_base: Tensor, gamma: Tensor, detach_focal: bool) -> Tensor:
    """base^gamma; gamma 0 gives 1 also for base 0, whose logarithm times 0 is NaN."""
    exponent = torch.where(gamma == 0, 0.0, gamma * log_base)
    return exponent.detach().exp() if detach_focal else exponent.exp()
